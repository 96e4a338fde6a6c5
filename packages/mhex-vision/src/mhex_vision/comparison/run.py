"""Running a comparison: every method on every image, every metric on every map; stopped and continued at will.

The work is cut into pieces of one method and one batch. A finished piece is a file; whoever repeats the call goes on
with the pieces that are missing.

Letters: B batch, K classes, H x W image size.
"""

from __future__ import annotations

import json
import time
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from mhex_core import _checks
from mhex_core.files import write_atomically
from mhex_core.metrics import min_max
from mhex_core.pieces import Pieces, judged_by_itself, weights_checksum
from mhex_core.specs import methods_by_name
from mhex_vision.classifier import MHEXClassifier
from mhex_vision.comparison.results import Comparison
from mhex_vision.comparison.scores import DEFAULT_METRICS, Measure, OtherClass, Sample, parse_metric
from mhex_vision.data import Preprocessing
from mhex_vision.data.sets import Batch, DataBundle, ImageSet
from mhex_vision.explainers import Explainer, parse
from mhex_vision.metrics.judge import Judge
from mhex_vision.plain import PlainClassifier


def compare(
    model: nn.Module,
    images: ImageSet,
    data: DataBundle,
    *,
    judge: nn.Module,
    self_judged: bool = False,
    methods: Sequence[str] | Mapping[str, Explainer],
    metrics: Sequence[str] = DEFAULT_METRICS,
    out: str | Path,
    batch_size: int = 64,
    limit: int | None = None,
    seed: int = 0,
    overwrite: bool = False,
    note: Mapping[str, Any] | None = None,
    progress: bool = True,
) -> Comparison:
    """Explain the true class of every image by every method, and let a judge say how good the maps are.

    With several labels per image, the one of them the judge finds most probable is explained, and an image without any
    is left out. Metrics that ask how a map depends on its class have every method explain another class as well, which
    does not count in the seconds an explanation takes.

    Args:
        model: The network to explain: an `MHEXClassifier`, a `PlainClassifier`, or a network that gives (B, K) logits.
        images: The images, usually `data.test`.
        data: The bundle they belong to. Its preprocessing is used for a network that carries none itself.
        judge: The network that judges; an independent one, so that no method is judged by its own model.
        self_judged: Whether the judge may be the network itself, which the settings then say.
        methods: Names for `mhex_vision.explainers.parse`, or explainers by name.
        metrics: Names of metrics with options, see `parse_metric`.
        out: A folder. Pieces of work are kept there until all are done; a call that was stopped goes on when repeated.
        batch_size: Images at a time.
        limit: How many images to take, a random choice; None means all.
        seed: Of that choice.
        overwrite: Whether another comparison's files in `out` may be replaced.
        note: More to put into the settings, such as where the networks came from.
        progress: Whether a terminal shows a bar.

    Returns:
        The comparison, which is also in `out`/samples.parquet.

    Raises:
        ValueError: `out` holds another comparison, a name is unknown, the judge is the network itself without
            `self_judged`, or a metric needs masks that are not there.
    """
    explainers = explainers_of(methods)
    measures = [parse_metric(metric) for metric in metrics]
    if not measures or len({measure.name for measure in measures}) != len(measures):
        raise ValueError(f"metrics must be at least one, each once, got {', '.join(metrics) or 'none'}")
    if any(measure.score.reads == "masks" for measure in measures) and getattr(images, "masks", None) is None:
        raise ValueError("metrics pointing, mass_inside and iou need masks, and these images have none")
    if any(measure.score.other is not None for measure in measures) and data.num_classes < 2:
        raise ValueError("metrics class_sensitivity and class_sensitivity_least need two classes, and there is one")
    _checks.positive_int("batch_size", batch_size)
    chosen = _choose(len(images), limit, seed)
    identities = {"model": _identity(model), "judge": _identity(judge)}
    itself = judged_by_itself(**identities, self_judged=_checks.flag("self_judged", self_judged))
    settings = {
        "data": data.name,
        "images": len(images),
        "chosen": zlib.crc32(chosen.tobytes()),
        "compared": len(chosen),
        **identities,
        "self_judged": itself,
        "methods": list(explainers),
        "metrics": [measure.name for measure in measures],
        "batch_size": batch_size,
        **({"note": dict(note)} if note else {}),
    }
    run = _Run(model, judge, images, data, measures, Path(out), settings, overwrite=overwrite)
    batches = [chosen[start : start + batch_size] for start in range(0, len(chosen), batch_size)]
    run.work_through(explainers, batches, progress=progress)
    return run.finish(explainers, len(batches))


@dataclass(frozen=True, eq=False)
class _Prepared:
    """One batch for the network explained and for the judge; the maps of any method are judged on the same."""

    places: list[int]
    labels: Tensor
    target: Tensor
    images: Tensor
    judged: Tensor
    probability: Tensor
    masks: Tensor | None
    others: Mapping[OtherClass, Tensor]


class _Run:
    """One comparison and its files."""

    def __init__(
        self,
        model: nn.Module,
        judge: nn.Module,
        images: ImageSet,
        data: DataBundle,
        measures: Sequence[Measure],
        out: Path,
        settings: Mapping[str, Any],
        *,
        overwrite: bool,
    ) -> None:
        self.model, self.images, self.data, self.measures = model, images, data, measures
        self.device = next(model.parameters()).device
        self.preprocessing = preprocessing_of(model, data)
        self.judge_preprocessing = preprocessing_of(judge, data)
        self.judge = Judge(judge, multi_label=data.multi_label)
        self.judge_device = next(judge.parameters()).device
        asked = (measure.score.other for measure in measures if measure.score.other is not None)
        self.others = tuple(dict.fromkeys(asked))
        self.settings = settings
        self.pieces = Pieces.claim(out, settings, overwrite=overwrite)

    def work_through(
        self, explainers: Mapping[str, Explainer], batches: Sequence[np.ndarray[Any, Any]], *, progress: bool
    ) -> None:
        """Do every piece that is not there yet."""
        if self.pieces.samples.is_file():
            return
        bar = tqdm(total=len(explainers) * len(batches), unit="batch", disable=None if progress else True, leave=False)
        # Batches outside, methods inside: an image is decoded, and judged as it is, once.
        warm: set[str] = set()
        with bar:
            for number, places in enumerate(batches):
                missing = [name for name in explainers if not self.pieces.path(name, number).is_file()]
                bar.update(len(explainers) - len(missing))
                prepared = self._prepare(places) if missing else None
                for name in missing:
                    bar.set_description(name)
                    if prepared is None:
                        continue
                    table = self._measure(explainers[name], name, prepared, warm)
                    self.pieces.path(name, number).parent.mkdir(parents=True, exist_ok=True)
                    write_atomically(self.pieces.path(name, number), _writer(table))
                    bar.update()

    def finish(self, explainers: Mapping[str, Explainer], batches: int) -> Comparison:
        """Put the pieces together."""
        path = self.pieces.samples
        if not path.is_file():
            tables = [pq.read_table(self.pieces.path(name, number)) for name in explainers for number in range(batches)]
            whole = pa.concat_tables(tables)
            if not whole.num_rows:
                raise ValueError("images must hold at least one that can be read and has a label, got none")
            Comparison(samples=whole, settings=self.settings).save(path)
        self.pieces.clear()
        return Comparison.load(path)

    def _prepare(self, places: np.ndarray[Any, Any]) -> _Prepared:
        kept, batch = read_images(self.images, places)
        labels = batch.labels
        judged = self._for_judge(batch.images)
        probabilities = self.judge.probabilities(judged) if len(kept) else judged.new_zeros(0, self.data.num_classes)
        if self.data.multi_label:
            known = labels.to(probabilities.device) > 0
            rows = known.any(dim=1).cpu()
            target = torch.where(known, probabilities, -1).argmax(dim=1).cpu()
            kept = [place for place, has in zip(kept, rows.tolist(), strict=True) if has]
            target, judged, probabilities = target[rows], judged[rows], probabilities[rows]
            batch = Batch(batch.images[rows], labels[rows], None if batch.masks is None else batch.masks[rows])
            labels = target
        else:
            target = labels
        on_judge = target.to(probabilities.device)
        for_model = self.preprocessing.normalize(resized(batch.images, self.preprocessing.size).to(self.device))
        others: dict[OtherClass, Tensor] = {}
        if self.others and len(kept):
            logits = Judge(self.model, multi_label=self.data.multi_label).logits(for_model)
            others = {which: _other_class(logits, target, which) for which in self.others}
        return _Prepared(
            places=kept,
            labels=labels,
            target=target,
            images=for_model,
            judged=judged,
            probability=probabilities.gather(1, on_judge.unsqueeze(1)).squeeze(1),
            masks=batch.masks,
            others=others,
        )

    def _for_judge(self, images: Tensor) -> Tensor:
        fitting = resized(images, self.judge_preprocessing.size)
        return self.judge_preprocessing.normalize(fitting.to(self.judge_device))

    def _measure(self, explainer: Explainer, name: str, prepared: _Prepared, warm: set[str]) -> pa.Table:
        count = len(prepared.places)
        columns: dict[str, Any] = {
            "method": [name] * count,
            "image": pa.array(prepared.places, pa.int64()),
            "label": prepared.labels.numpy(),
            "target": prepared.target.numpy(),
            "probability": prepared.probability.double().cpu().numpy(),
        }
        target = prepared.target.to(self.device)
        if count and name not in warm:
            # What happens once (imports, compilation, buffers) is not what an image costs.
            explainer(self.model, prepared.images[:1], target[:1])
            warm.add(name)
        start = time.perf_counter()
        raw = explainer(self.model, prepared.images, target) if count else prepared.images.new_zeros(0, 1, 1)
        _synchronize(self.device)
        seconds = (time.perf_counter() - start) / max(count, 1)
        raw = _check_maps(name, raw, prepared.images)
        others: dict[OtherClass, Tensor] = {}
        for which, classes in prepared.others.items():
            found = explainer(self.model, prepared.images, classes.to(self.device))
            others[which] = _check_maps(name, found, prepared.images).float()
        saliency = min_max(raw.float().clamp(min=0))
        sample = Sample(
            judge=self.judge,
            images=prepared.judged,
            target=prepared.target.to(self.judge_device),
            probability=prepared.probability,
            attribution=_fitted(raw.float(), prepared.judged).to(self.judge_device),
            saliency=_fitted(saliency, prepared.judged).clamp(0, 1).to(self.judge_device),
            masks=None if prepared.masks is None else prepared.masks.to(self.judge_device),
            maps=raw.float(),
            others=others,
        )
        for measure in self.measures:
            if not count:
                columns[measure.name] = pa.array([], pa.float64())
                if measure.curve is not None:
                    columns[f"{measure.name}_curve"] = pa.array([], pa.list_(pa.float32()))
                continue
            of_masks = sample.masks is not None and measure.score.reads == "masks"
            fitting = _at_masks(sample, saliency.to(self.judge_device)) if of_masks else sample
            values, curve = measure(fitting)
            columns[measure.name] = values.double().cpu().numpy()
            if curve is not None:
                columns[f"{measure.name}_curve"] = pa.array(curve.float().cpu().tolist(), type=pa.list_(pa.float32()))
        columns["seconds"] = pa.array([seconds] * count, pa.float64())
        return pa.table(columns)


def explainers_of(methods: Sequence[str] | Mapping[str, Explainer]) -> dict[str, Explainer]:
    """Explainers by name.

    Raises:
        TypeError: The methods are one text.
        ValueError: A name is unknown or comes twice, or there is none.
    """
    return methods_by_name(methods, parse)


def _choose(count: int, limit: int | None, seed: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Which images, in ascending order: whether a batch can be continued must not depend on how it was drawn."""
    if limit is None:
        return np.arange(count)
    _checks.positive_int("limit", limit)
    drawn = np.random.default_rng(seed).permutation(count)[:limit]
    return np.sort(drawn).astype(np.int64)


def read_images(images: ImageSet, places: Iterable[int]) -> tuple[list[int], Batch]:
    """The images that can be decoded, and where they stand in the set."""
    parts = [(int(place), images[int(place)]) for place in places]
    kept = [(place, part) for place, part in parts if len(part.images)]
    if not kept:
        return [], images.__getitems__([])
    batches = [part for _, part in kept]
    masks = [part.masks for part in batches if part.masks is not None]
    return [place for place, _ in kept], Batch(
        torch.cat([part.images for part in batches]),
        torch.cat([part.labels for part in batches]),
        torch.cat(masks) if len(masks) == len(batches) else None,
    )


def preprocessing_of(network: nn.Module, data: DataBundle) -> Preprocessing:
    """The network's own, or else the data's."""
    if isinstance(network, MHEXClassifier | PlainClassifier) and network.config.preprocessing is not None:
        return network.config.preprocessing
    return data.preprocessing


def _identity(network: nn.Module) -> dict[str, Any]:
    """Enough to notice that a call is repeated with another network: its kind, and a checksum of its weights."""
    identity: dict[str, Any] = {"kind": type(network).__name__, "weights": weights_checksum(network)}
    if isinstance(network, MHEXClassifier | PlainClassifier):
        identity["config"] = json.loads(network.config.to_json())
    return identity


def resized(images: Tensor, size: int) -> Tensor:
    """8-bit images (B, 3, H, W) as squares of another size, where they are not."""
    if tuple(images.shape[2:]) == (size, size):
        return images
    smooth = F.interpolate(images.float(), size=(size, size), mode="bilinear", align_corners=False, antialias=True)
    return smooth.round().clamp(0, 255).to(torch.uint8)


def _fitted(maps: Tensor, images: Tensor) -> Tensor:
    """Maps (B, H, W) at the size of other images."""
    if maps.shape[1:] == images.shape[2:] or not len(maps):
        return maps
    flat = maps.unsqueeze(1)
    return F.interpolate(flat, size=tuple(images.shape[2:]), mode="bilinear", align_corners=False).squeeze(1)


def _other_class(logits: Tensor, target: Tensor, which: OtherClass) -> Tensor:
    """The most or the least probable of all classes but the target: int64 (B,)."""
    values = logits if which == "runner-up" else -logits
    own = target.to(values.device).unsqueeze(1)
    return values.scatter(1, own, -torch.inf).argmax(dim=1)


def _at_masks(sample: Sample, saliency: Tensor) -> Sample:
    """The sample with saliency at the size of its masks."""
    if sample.masks is None:
        return sample
    size = sample.masks.unsqueeze(1)
    return Sample(**{**vars(sample), "saliency": _fitted(saliency, size).clamp(0, 1)})


def _check_maps(name: str, raw: object, images: Tensor) -> Tensor:
    expected = (images.shape[0], *images.shape[2:])
    if not isinstance(raw, Tensor):
        raise TypeError(f"method {name!r} must return a tensor (B, H, W), got {type(raw).__name__}")
    if len(images) and tuple(raw.shape) != expected:
        raise ValueError(f"method {name!r} must return maps of shape {expected}, got {tuple(raw.shape)}")
    if not bool(raw.isfinite().all()):
        raise ValueError(f"method {name!r} returned values that are not finite")
    return raw.detach()


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _writer(table: pa.Table) -> Callable[[Path], None]:
    return lambda temporary: pq.write_table(table, temporary)
