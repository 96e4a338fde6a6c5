"""What the command line does once it is understood. Imported late: `--help` should not wait for what it needs."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from mhex_core import _checks
from mhex_core.specs import listed, look_here
from mhex_text import explainers
from mhex_text._library import quiet
from mhex_text.by_method import explain_by
from mhex_text.data import TextBundle, load_texts
from mhex_text.data.unlabelled import UnlabelledTexts, from_lines, read_texts
from mhex_text.explaining import class_names
from mhex_text.explanation import Layers
from mhex_text.history import TextEpoch
from mhex_text.loading import checked, load_classifier, load_tokenizer
from mhex_text.modeling import MHEXForSequenceClassification
from mhex_text.recipes import RECIPES
from mhex_text.run_files import write_text
from mhex_text.training import train as train_model

Say = Callable[[str], None]

JSON_FILE = "explanations.json"
PAGE_FILE = "explanations.html"
SUMMARY_JSON = "summary.json"
SUMMARY_MARKDOWN = "summary.md"


def train(options: argparse.Namespace, say: Say) -> int:
    """`mhex-text train`."""
    changes = {
        name: getattr(options, name)
        for name in ("epochs", "batch_size", "learning_rate", "max_length", "patience")
        if getattr(options, name) is not None
    }
    recipe = replace(RECIPES[options.recipe], **changes)
    bundle = bundle_of(options)
    with quiet():
        tokenizer = load_tokenizer(options.encoder)
        torch.manual_seed(options.seed)
        model = _fresh_model(options, bundle)
    say(f"{bundle.name}: {len(bundle.train)} training texts, {bundle.num_classes} classes")
    if isinstance(model, MHEXForSequenceClassification):
        blocks = ", ".join(map(str, model.layer_indices))
        say(f"{options.encoder}: blocks in the layers {blocks}")

    def report(epoch: TextEpoch) -> None:
        judged = epoch.validation
        shown = f", validation loss {judged.loss:.4f}, accuracy {100 * judged.accuracy:.2f} %" if judged else ""
        say(f"epoch {epoch.epoch}/{recipe.epochs}: loss {epoch.train_loss:.4f}{shown}, {epoch.seconds:.1f} s")

    result = train_model(
        model,
        tokenizer,
        bundle,
        recipe,
        out=options.out,
        seed=options.seed,
        overwrite=options.overwrite,
        on_epoch=report,
    )
    for split, share in result.truncated.items():
        if share:
            say(f"{100 * share:.1f} % of the {split} texts are longer than {result.max_length} tokens and were cut")
    if result.test is not None:
        heads = ", ".join(f"{100 * accuracy:.1f}" for accuracy in result.test.head_accuracy)
        each = f"; each head: {heads}" if heads else ""
        say(f"test accuracy {100 * result.test.accuracy:.2f} % (epoch {result.best_epoch}){each}")
    if options.plain:
        say(f"wrote {options.out}; it judges: mhex-text evaluate --checkpoint RUN --judge {options.out} ...")
    else:
        say(f'wrote {options.out}; next: mhex-text explain --checkpoint {options.out} --text "..."')
    return 0


def explain(options: argparse.Namespace, say: Say, complain: Say) -> int:
    """`mhex-text explain`; returns how many texts could not be read."""
    if options.batch_size < 1:
        raise ValueError(f"--batch-size must be at least 1, got {options.batch_size}")
    method, settings = _method(options)
    given = given_texts(options)
    model = load_classifier(options.checkpoint)
    check_own(options.checkpoint, model, method, "--method")
    tokenizer = load_tokenizer(options.checkpoint)
    target = (
        None
        if options.target is None
        else _checks.class_number("target", options.target, class_names(model), len(class_names(model)))
    )
    model = model.to("cuda" if torch.cuda.is_available() else "cpu")
    for line, reason in given.rejected:
        complain(f"skipped: {options.input}: line {line}: {reason}")
    explanation = explain_by(
        model,
        given.texts,
        method,
        target,
        tokenizer=tokenizer,
        max_length=options.max_length,
        batch_size=options.batch_size,
        progress=True,
        **settings,
    )
    cut = sum(bool(item.truncated) for item in explanation)
    checkpoint = shlex.quote(options.checkpoint)
    if options.out is None:
        explanation.print()
        # Whoever reads the output with a program wants the texts alone.
        if sys.stdout.isatty():
            say(f'next: mhex-text report --checkpoint {checkpoint} --text "..." --out report.html')
    else:
        options.out.mkdir(parents=True, exist_ok=True)
        explanation.to_json(options.out / JSON_FILE)
        explanation.save_html(options.out / PAGE_FILE)
        count = len(explanation) + len(given.rejected)
        say(f"explained {len(explanation)} of {count} texts; wrote {options.out / PAGE_FILE} and {JSON_FILE}")
        say(f"next: open {shlex.quote(str(options.out / PAGE_FILE))} in a browser")
    if cut:
        complain(f"{cut} of {len(explanation)} texts were longer than the model takes; the rest was not read")
    return len(given.rejected)


def evaluate(options: argparse.Namespace, say: Say) -> None:
    """`mhex-text evaluate`."""
    from mhex_text.comparison import compare

    bundle = bundle_of(options)
    texts = getattr(bundle, options.split)
    if texts is None:
        raise ValueError(f"--split: {bundle.name} has no {options.split} texts")
    model, judge = load_classifier(options.checkpoint), load_classifier(options.judge)
    for name, network in (("--checkpoint", model), ("--judge", judge)):
        _check_classes(name, network, bundle)
    tokenizer, other = load_tokenizer(options.checkpoint), load_tokenizer(options.judge)
    methods = listed(options.methods)
    look_here(methods)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model.to(device)
    judge.to(device)
    comparison = compare(
        model,
        texts,
        tokenizer=tokenizer,
        judge=judge,
        judge_tokenizer=other,
        self_judged=options.self_judged,
        methods=methods,
        metrics=listed(options.metrics),
        out=options.out,
        max_length=options.max_length,
        batch_size=options.batch_size,
        limit=options.limit,
        seed=options.seed,
        overwrite=options.overwrite,
        note={
            "data": bundle.name,
            "checkpoint": str(options.checkpoint),
            "judge": str(options.judge),
            "split": options.split,
        },
    )
    summaries = comparison.summary()
    write_text(options.out / SUMMARY_JSON, comparison.to_json(summaries))
    write_text(options.out / SUMMARY_MARKDOWN, comparison.to_markdown(summaries))
    say(comparison.to_text(summaries))
    if comparison.settings.get("self_judged"):
        say("the judge is the classifier that is explained: these values do not compare methods fairly")
    say(f"{comparison.settings['compared']} texts, means with 95 % bootstrap intervals; wrote {options.out}")
    command = ["mhex-text", "report", "--checkpoint", options.checkpoint, "--data", options.data]
    for name in ("root", "text_column", "pair_column", "label_column"):
        if getattr(options, name) is not None:
            command += [f"--{name.replace('_', '-')}", str(getattr(options, name))]
    command += ["--split", options.split] if options.split != "test" else []
    command += ["--methods", options.methods, "--out", str(options.out / "report.html")]
    say(f"next: {shlex.join(command)}")


def info(options: argparse.Namespace, say: Say) -> None:
    """`mhex-text info`."""
    import transformers

    import mhex_core
    import mhex_text

    status = mhex_core.native.status()
    devices = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU only"
    say(f"mhex-text {mhex_text.__version__}, mhex-core {mhex_core.__version__}")
    say(
        f"torch {torch.__version__}, transformers {transformers.__version__}, {devices}, "
        f"{torch.get_num_threads()} threads"
    )
    say(f"saliency: {status.backend} ({status.reason})")
    say(f"encoders: {', '.join(mhex_text.supported_encoders())}")
    if options.checkpoint is not None:
        model = load_classifier(options.checkpoint)
        say(f"{options.checkpoint}: {type(model).__name__}")
        say(f"  classes: {', '.join(class_names(model))}")
        if isinstance(model, MHEXForSequenceClassification):
            config = model.config
            say(f"  encoder: {config.encoder.model_type}, {config.hidden_size} wide, {config.vocab_size} tokens")
            say(f"  blocks in the layers {', '.join(map(str, model.layer_indices))}")
            say(f"  gate: {config.gate}, objective: {config.objective}")
        say(f"  parameters: {sum(parameter.numel() for parameter in model.parameters()):,}")
        own = "" if isinstance(model, MHEXForSequenceClassification) else "--method occlusion "
        say(f'next: mhex-text explain --checkpoint {shlex.quote(options.checkpoint)} {own}--text "..."')
    else:
        say("next: mhex-text demo")


# ------------------------------------------------------------------------------------------------------------- options


def bundle_of(options: argparse.Namespace) -> TextBundle:
    """The labelled texts that --data names."""
    return load_texts(
        options.data,
        root=options.root,
        text=options.text_column,
        pair=options.pair_column,
        label=options.label_column,
        rationale=options.rationale_column,
        seed=options.seed,
        download=not options.no_download,
    )


def _fresh_model(options: argparse.Namespace, bundle: TextBundle) -> PreTrainedModel:
    if not options.plain:
        return MHEXForSequenceClassification.from_encoder(
            options.encoder,
            bundle.num_classes,
            gate=not options.no_gate,
            freeze_backbone=options.freeze_backbone,
            layers="all" if options.layers == "all" else _places("--layers", options.layers),
            objective=options.objective,
            labels=bundle.class_names,
        )
    asked = [
        flag
        for flag, given in (
            ("--layers", options.layers != "all"),
            ("--no-gate", options.no_gate),
            ("--freeze-backbone", options.freeze_backbone),
            ("--objective", options.objective != "layerwise"),
        )
        if given
    ]
    if asked:
        raise ValueError(f"--plain is a classifier without blocks, and {', '.join(asked)} is about blocks")
    plain = AutoModelForSequenceClassification.from_pretrained
    model: PreTrainedModel = checked(plain, options.encoder, fresh_head=True, num_labels=bundle.num_classes)
    return model


def check_own(checkpoint: str, model: PreTrainedModel, method: str, flag: str) -> None:
    """Refuse the classifier's own evidence where it has no blocks.

    Raises:
        ValueError: It has none.
    """
    if method.partition(":")[0] == "mhex" and not isinstance(model, MHEXForSequenceClassification):
        raise ValueError(
            f"--checkpoint must hold an MHEX classifier for {flag} mhex, got {checkpoint} with a "
            f"{type(model).__name__}; choose another of {flag}, or train one without --plain"
        )


def given_texts(options: argparse.Namespace) -> UnlabelledTexts:
    """What --text and --pair, or --input and its columns, say.

    Raises:
        ValueError: They do not go together, or there is no text.
    """
    if (options.text is None) == (options.input is None):
        raise ValueError("give texts with --text, or a file of them with --input")
    if options.text is None:
        if options.pair is not None:
            raise ValueError("--pair goes with --text; of a file, --pair-column names the second texts")
        if str(options.input) == "-":
            return _some(from_lines(sys.stdin.read().splitlines()), "the standard input")
        found = read_texts(options.input, text=options.text_column, pair=options.pair_column)
        return _some(found, str(options.input))
    if options.text_column is not None or options.pair_column is not None:
        raise ValueError("--text-column and --pair-column go with --input")
    texts: Sequence[Any] = options.text
    if options.pair is not None:
        if len(options.pair) != len(texts):
            raise ValueError(f"--pair must come once for each --text, got {len(options.pair)} for {len(texts)}")
        texts = list(zip(texts, options.pair, strict=True))
    return UnlabelledTexts(texts=tuple(texts), lines=tuple(range(1, len(texts) + 1)), rejected=())


def _some(found: UnlabelledTexts, where: str) -> UnlabelledTexts:
    if not found.texts:
        reasons = "; ".join(f"line {line}: {reason}" for line, reason in found.rejected[:3]) or "it is empty"
        raise ValueError(f"--input must hold at least one text, got none in {where} ({reasons})")
    return found


def _method(options: argparse.Namespace) -> tuple[str, dict[str, Any]]:
    """The method, and what flags say about it."""
    flags = {"layers": options.layers, "beta": options.beta, "attention": options.attention}
    if options.method == "mhex":
        return "mhex", flags | {"layers": layers_of("--layers", options.layers)}
    given = [f"--{name}" for name, value in flags.items() if value != {"layers": "3", "beta": 1.0}.get(name, False)]
    if given:
        raise ValueError(f"{', '.join(given)} must go with --method mhex, got --method {options.method}")
    look_here([options.method])
    explainers.parse(options.method)  # what is wrong shows before anything is loaded
    return options.method, {}


def layers_of(name: str, text: str) -> Layers:
    """How many of the first blocks, "all", or places with a comma among them ("4," is one place)."""
    if text == "all":
        return "all"
    return _places(name, text) if "," in text else _whole(name, text)


def _places(name: str, text: str) -> list[int]:
    return [_whole(name, part) for part in text.split(",") if part.strip()]


def _whole(name: str, text: str) -> int:
    if not text.strip().isdecimal():
        raise ValueError(f"{name} must be all, or whole numbers with commas between them, got {text!r}")
    return int(text)


def _check_classes(name: str, network: Any, bundle: TextBundle) -> None:
    """A judge of other classes would judge something else without a word."""
    known = class_names(network)
    if known != bundle.class_names:
        raise ValueError(
            f"{name} must know the classes of {bundle.name} ({', '.join(bundle.class_names)}), got {', '.join(known)}"
        )
