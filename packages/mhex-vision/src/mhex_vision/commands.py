"""What the command line does once it is understood. Imported late: `--help` should not wait for torch."""

from __future__ import annotations

import argparse
import json
import shlex
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from mhex_core import _checks
from mhex_core.specs import listed, look_here
from mhex_vision import checkpoint, drawing, surgery
from mhex_vision.classifier import MHEXClassifier
from mhex_vision.data import Preprocessing, UnreadableImageError, load_data
from mhex_vision.data.preprocessing import IMAGENET_MEAN, IMAGENET_STD
from mhex_vision.data.sets import DataBundle, FolderImages
from mhex_vision.evaluation import Metrics
from mhex_vision.explainers import parse
from mhex_vision.explainers.own import OwnSaliency
from mhex_vision.explaining import explain_by
from mhex_vision.explanation import Explanation
from mhex_vision.imbalance import class_weights
from mhex_vision.plain import PlainClassifier, load_classifier
from mhex_vision.progress import counter
from mhex_vision.recipes import RECIPES, read_class_weights
from mhex_vision.training import Epoch
from mhex_vision.training import train as train_model

Say = Callable[[str], None]

JSON_FILE = "explanations.json"
SUMMARY_JSON = "summary.json"
SUMMARY_MARKDOWN = "summary.md"
CURVES_FIGURE = "curves.png"
EXAMPLES_FIGURE = "examples.png"
MAPS_FOLDER = "maps"


def train(options: argparse.Namespace, say: Say) -> int:
    """`mhex-vision train`."""
    changes = {
        name: getattr(options, name)
        for name in ("epochs", "batch_size", "learning_rate", "patience", "monitor", "sampler")
        if getattr(options, name) is not None
    }
    if options.class_weights is not None:
        balanced = options.class_weights == "balanced"
        changes["class_weights"] = "balanced" if balanced else read_class_weights(options.class_weights)
    recipe = replace(RECIPES[options.recipe], **changes)
    data = load_data(
        options.data, root=options.root, size=options.size, download=not options.no_download, seed=options.seed
    )
    if options.weights is not None:
        # Pretrained networks have learnt what ImageNet's statistics made of images.
        data = replace(data, preprocessing=replace(data.preprocessing, mean=IMAGENET_MEAN, std=IMAGENET_STD))
    known = load_classifier(options.backbone).config.preprocessing if Path(options.backbone).is_dir() else None
    if known is not None:
        data = replace(data, preprocessing=replace(data.preprocessing, mean=known.mean, std=known.std))
    torch.manual_seed(options.seed)
    model = _fresh_network(options, data)
    say(f"{data.name}: {len(data.train)} training images of {data.preprocessing.size} px, {data.num_classes} classes")
    if isinstance(model, MHEXClassifier):
        say(f"{options.backbone}: {len(model.blocks)} blocks at {', '.join(model.layer_names)}")

    weighed = class_weights(data, recipe)
    if weighed is not None:
        what = "weights of positive answers" if data.multi_label else "weights of classes"
        say(f"{what} in the loss: {', '.join(f'{name} {weight:.4g}' for name, weight in weighed.items())}")
    if recipe.sampler == "balanced":
        say("every class is drawn as often as any other, so images of rare classes come several times an epoch")
    trained = False

    def report(epoch: Epoch) -> None:
        nonlocal trained
        trained = True
        judged = epoch.validation
        shown = f", validation loss {judged.loss:.4f}, {_scores(judged, data)}" if judged else ""
        say(f"epoch {epoch.epoch}/{recipe.epochs}: loss {epoch.train_loss:.4f}{shown}, {epoch.seconds:.1f} s")

    result = train_model(
        model,
        data,
        recipe,
        out=options.out,
        seed=options.seed,
        workers=options.workers,
        overwrite=options.overwrite,
        on_epoch=report,
    )
    if not trained:
        say(f"{options.out} is finished already, after {len(result.history)} epochs; nothing was trained now")
    for name, judged in (("validation", result.history[-1].validation), ("test", result.test)):
        if judged is not None and judged.without_auc:
            classes = ", ".join(data.class_names[index] for index in judged.without_auc)
            say(f"no AUC of {classes}: all {name} images are of that class, or none is")
    if result.test is not None:
        heads = ", ".join(f"{100 * accuracy:.1f}" for accuracy in result.test.head_accuracy)
        each = f"; each head: {heads}" if heads else ""
        say(f"test {_scores(result.test, data)} (epoch {result.best_epoch}){each}")
    wrote = f"wrote {options.out}" if trained else f"{options.out} is as it was"
    if options.plain:
        say(f"{wrote}; it judges: mhex-vision evaluate --checkpoint RUN --judge {options.out} ...")
    else:
        say(f"{wrote}; next: mhex-vision explain --checkpoint {options.out} --input FILE --out DIR")
    return 0


def _scores(judged: Metrics, data: DataBundle) -> str:
    """Accuracy and AUC in words; of independent classes also how many images are right as a whole."""
    by = " of single answers" if data.multi_label else ""
    shown = f"accuracy{by} {100 * judged.accuracy:.2f} %"
    if judged.exact_match is not None:
        shown += f", of whole images {100 * judged.exact_match:.2f} %"
    return shown if judged.auc is None else f"{shown}, AUC {judged.auc:.4f}"


def _fresh_network(options: argparse.Namespace, data: DataBundle) -> MHEXClassifier | PlainClassifier:
    if options.plain:
        if Path(options.backbone).is_dir():
            raise ValueError(f"--backbone: {options.backbone} is a run, which blocks can be attached to; not --plain")
        asked = [
            flag
            for flag, given in (
                ("--at", options.at is not None),
                ("--no-gate", options.no_gate),
                ("--freeze-backbone", options.freeze_backbone),
                ("--classifier", options.classifier != "drop"),
                ("--objective", options.objective != "layerwise"),
            )
            if given
        ]
        if asked:
            raise ValueError(f"--plain is a network without blocks, and {', '.join(asked)} is about blocks")
        return PlainClassifier.from_name(
            options.backbone, data.num_classes, weights=options.weights, multi_label=data.multi_label
        )
    return MHEXClassifier.from_backbone(
        _trained(options, data) if Path(options.backbone).is_dir() else options.backbone,
        data.num_classes,
        weights=options.weights,
        at=options.at,
        gate=not options.no_gate,
        freeze_backbone=options.freeze_backbone,
        classifier=options.classifier,
        objective=options.objective,
        multi_label=data.multi_label,
    )


def _trained(options: argparse.Namespace, data: DataBundle) -> PlainClassifier:
    """The plain network of another run, which blocks are to be attached to."""
    source = load_classifier(options.backbone)
    if isinstance(source, MHEXClassifier):
        # What a folder holds is a value, whatever class it is read into.
        raise ValueError(  # noqa: TRY004
            f"--backbone: {options.backbone} has blocks already; name a run of train --plain"
        )
    if options.weights is not None:
        raise ValueError(f"--weights: {options.backbone} is trained already")
    if options.freeze_backbone:
        check_classes("--backbone", source, data)
    return source


def explain(options: argparse.Namespace, say: Say, complain: Say) -> int:
    """`mhex-vision explain`; returns how many images could not be read."""
    if options.batch_size < 1:
        raise ValueError(f"--batch-size must be at least 1, got {options.batch_size}")
    files = image_files(options.input, options.out)
    look_here([options.method])
    method = parse(options.method)
    if options.beta is not None:
        if not isinstance(method, OwnSaliency):
            raise ValueError(f"--beta belongs to the classifier's own saliency, and --method is {options.method}")
        method = OwnSaliency({**method.options, "beta": options.beta})
    model = load_classifier(options.checkpoint)
    if isinstance(method, OwnSaliency) and isinstance(model, PlainClassifier):
        raise ValueError(  # noqa: TRY004
            f"{options.checkpoint} is a plain network; choose another --method than {options.method}"
        )
    preprocessing = model.config.preprocessing
    if preprocessing is None:
        raise ValueError(f"{options.checkpoint} does not say how images are prepared; explain from Python instead")
    target = (
        None
        if options.target is None
        else _checks.class_number("target", options.target, model.config.class_names, model.config.num_classes)
    )
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    options.out.mkdir(parents=True, exist_ok=True)
    base = options.input if options.input.is_dir() else options.input.parent
    entries: list[dict[str, Any]] = []
    rejected: list[dict[str, str]] = []

    def reject(path: Path, reason: str) -> None:
        rejected.append({"file": str(path), "reason": reason})
        complain(f"skipped: {reason}")

    batches = readable_batches(files, preprocessing, options.batch_size, reject)
    with counter(desc="explaining", total=len(files), unit="image") as shown:
        for number, (paths, images) in enumerate(batches):
            device = next(model.parameters()).device
            inputs = preprocessing.normalize(images.to(device))
            explanation = explain_by(model, inputs, method, target, name=options.method).to("cpu")
            overlays = explanation.overlay()
            for index, path in enumerate(paths):
                relative = path.relative_to(base)
                drawn = options.out / relative.with_name(relative.name + ".png")
                drawn.parent.mkdir(parents=True, exist_ok=True)
                drawing.save_png(overlays[index], drawn)
                entries.append(_entry(explanation, index, path, drawn.relative_to(options.out)))
            if options.maps:
                (options.out / MAPS_FOLDER).mkdir(exist_ok=True)
                explanation.save(options.out / MAPS_FOLDER / f"{number:06d}.npz")
            shown.update(len(paths))
    record = {
        "checkpoint": str(options.checkpoint),
        "method": options.method,
        **({"beta": method.options.get("beta", 0.0)} if isinstance(method, OwnSaliency) else {}),
        "class_names": list(model.config.class_names),
        "layers": list(model.layer_names) if isinstance(model, MHEXClassifier) else [],
        "images": entries,
        "rejected": rejected,
    }
    checkpoint.write_text(
        options.out / JSON_FILE, json.dumps(record, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    )
    overlays_too = " and an overlay for each" if entries else ", which says why"
    say(f"explained {len(entries)} of {len(files)} images; wrote {options.out / JSON_FILE}{overlays_too}")
    if entries:
        again = f"--checkpoint {quoted(options.checkpoint)} --input {quoted(options.input)}"
        again += f" --methods {quoted(options.method)}" if options.method != "mhex" else ""
        say(f"next, to weigh them anew in a browser: mhex-vision report {again} --out report.html")
    return len(rejected)


def evaluate(options: argparse.Namespace, say: Say) -> int:
    """`mhex-vision evaluate`; returns how many images could not be read."""
    from mhex_vision.comparison import compare, draw_examples

    model, judge = load_classifier(options.checkpoint), load_classifier(options.judge)
    for name, network in (("--checkpoint", model), ("--judge", judge)):
        if network.config.preprocessing is None:
            raise ValueError(f"{name}: {getattr(options, name[2:])} does not say how images are prepared")
    data = load_data(
        options.data,
        root=options.root,
        size=None if model.config.preprocessing is None else model.config.preprocessing.size,
        download=not options.no_download,
        seed=options.seed,
    )
    images = getattr(data, options.split)
    if images is None:
        raise ValueError(f"--split: {data.name} has no {options.split} images")
    for name, network in (("--checkpoint", model), ("--judge", judge)):
        check_classes(name, network, data)
    if options.masks is not None:
        if not isinstance(images, FolderImages):
            raise ValueError(f"--masks goes with a folder of images, and {data.name} is none")
        images = images.with_masks(options.masks)
    methods, metrics = listed(options.methods), listed(options.metrics)
    look_here(methods)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model.to(device)
    judge.to(device)
    comparison = compare(
        model,
        images,
        data,
        judge=judge,
        self_judged=options.self_judged,
        methods=methods,
        metrics=metrics,
        out=options.out,
        batch_size=options.batch_size,
        limit=options.limit,
        seed=options.seed,
        overwrite=options.overwrite,
        note={"checkpoint": str(options.checkpoint), "judge": str(options.judge), "split": options.split},
    )
    summaries = comparison.summary()
    checkpoint.write_text(options.out / SUMMARY_JSON, comparison.to_json(summaries))
    checkpoint.write_text(options.out / SUMMARY_MARKDOWN, comparison.to_markdown(summaries))
    if any(column.endswith("_curve") for column in comparison.samples.column_names):
        drawing.save_figure(comparison.plot(), options.out / CURVES_FIGURE)
    drawing.save_figure(draw_examples(model, images, data, methods), options.out / EXAMPLES_FIGURE)
    say(comparison.to_text(summaries))
    if comparison.settings.get("self_judged"):
        say("the judge is the network that is explained: these values do not compare methods fairly")
    compared, wanted = len(comparison.places), comparison.settings["compared"]
    say(f"{compared} of {wanted} images, means with 95 % bootstrap intervals; wrote {options.out}")
    again = f"--checkpoint {quoted(options.checkpoint)} --data {quoted(options.data)} --split {options.split}"
    again += f" --root {quoted(options.root)}" if options.root is not None else ""
    again += f" --methods {quoted(options.methods)} --out report.html"
    say(f"next, to look at the maps: mhex-vision report {again}")
    return 0 if data.multi_label else wanted - compared


def info(options: argparse.Namespace, say: Say) -> None:
    """`mhex-vision info`."""
    import torchvision

    import mhex_core
    import mhex_vision

    status = mhex_core.native.status()
    devices = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU only"
    say(f"mhex-vision {mhex_vision.__version__}, mhex-core {mhex_core.__version__}")
    say(
        f"torch {torch.__version__}, torchvision {torchvision.__version__}, {devices}, "
        f"{torch.get_num_threads()} threads"
    )
    say(f"saliency: {status.backend} ({status.reason})")
    if options.backbone is not None:
        from mhex_vision import backbones, instrumentation

        network = instrumentation.examine(backbones.build(options.backbone, 2))
        additions = network.additions
        sides = " x ".join(map(str, dict.fromkeys(network.image_size)))
        say(f"{options.backbone}: {len(additions)} residual additions (sizes at {sides} px)")
        for at in ("downsample", "stage"):
            chosen = surgery.choose(additions, at, with_last=True)
            say(f"  at={at}: {', '.join(addition.name for addition in chosen)}")
        for addition in additions:
            say(f"  {addition.name}: {addition.channels} channels, {addition.size[0]} x {addition.size[1]}")
    if options.checkpoint is not None:
        model = MHEXClassifier.from_pretrained(options.checkpoint)
        say(f"{options.checkpoint}:")
        for name, value in json.loads(model.config.to_json()).items():
            for inner, one in value.items() if isinstance(value, dict) else ((None, value),):
                say(f"  {name if inner is None else f'{name} {inner}'}: {json.dumps(one, ensure_ascii=False)}")
        say(f"  blocks: {', '.join(model.layer_names)}")
        say(f"  parameters: {sum(parameter.numel() for parameter in model.parameters()):,}")


def quoted(value: object) -> str:
    """A word of a command line that can be copied into a shell."""
    return shlex.quote(str(value))


def check_classes(name: str, network: MHEXClassifier | PlainClassifier, data: DataBundle) -> None:
    """A judge of other classes would judge something else without a word."""
    known = network.config.class_names or data.class_names
    if network.config.num_classes != data.num_classes or known != data.class_names:
        raise ValueError(
            f"{name} must know the classes of {data.name} ({', '.join(data.class_names)}), got "
            f"{', '.join(known) if network.config.class_names else network.config.num_classes}"
        )


def image_files(source: Path, out: Path) -> list[Path]:
    """The file itself, or every file in a folder that is called like an image; not what an earlier call wrote there."""
    if source.is_file():
        return [source]
    if not source.is_dir():
        raise FileNotFoundError(f"--input must be an image or a folder, and there is no {source}")
    # What Pillow can only write (PDF, say) is not meant.
    endings = {ending for ending, kind in Image.registered_extensions().items() if kind in Image.OPEN}
    written = out.resolve()
    if written == source.resolve():
        raise ValueError(f"--out must be another folder than --input, got {out} for both")
    files = sorted(
        path
        for path in source.rglob("*")
        if path.suffix.lower() in endings
        and not any(part.startswith(".") for part in path.relative_to(source).parts)
        and path.is_file()
        and written not in path.resolve().parents
    )
    if not files:
        raise ValueError(f"--input must hold images, and there is none in {source}")
    return files


def readable_batches(
    files: list[Path], preprocessing: Preprocessing, size: int, reject: Callable[[Path, str], None]
) -> Iterator[tuple[list[Path], torch.Tensor]]:
    """Readable images, some at a time; the others go to `reject`."""
    paths: list[Path] = []
    images: list[torch.Tensor] = []
    for path in files:
        try:
            images.append(preprocessing.load(path))
        except UnreadableImageError as error:
            reject(path, str(error))
            continue
        paths.append(path)
        if len(paths) == size:
            yield paths, torch.stack(images)
            paths, images = [], []
    if paths:
        yield paths, torch.stack(images)


def _entry(explanation: Explanation, index: int, path: Path, overlay: Path) -> dict[str, Any]:
    """One image's part of the JSON file."""
    probabilities = explanation.probabilities[index]
    prediction = int(explanation.prediction[index])
    target = int(explanation.target[index])
    heads = explanation.head_logits[:, index].argmax(dim=1)
    return {
        "file": str(path),
        "overlay": overlay.as_posix(),
        "prediction": explanation.label(prediction),
        "probability": float(probabilities[prediction]),
        "target": explanation.label(target),
        "probabilities": {
            explanation.label(label): float(probability) for label, probability in enumerate(probabilities)
        },
        "head_predictions": [explanation.label(int(head)) for head in heads],
    }
