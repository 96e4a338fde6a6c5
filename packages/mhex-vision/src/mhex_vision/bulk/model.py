"""A classifier that explains batches: from uint8 images to the rows of a bulk run.

Letters: N rows, K classes, h x w size of the stored maps, S side of the images.
"""

from __future__ import annotations

import io
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from mhex_core.bulk.job import Values
from mhex_core.explanation import NotFiniteError
from mhex_vision import drawing
from mhex_vision.bulk.storing import Storage, as_lists, pack, unpack
from mhex_vision.data import Preprocessing
from mhex_vision.explainers import Explainer
from mhex_vision.explainers.own import OwnSaliency
from mhex_vision.explaining import explain_by
from mhex_vision.explanation import Explanation
from mhex_vision.plain import PlainClassifier, load_classifier

Autocast = Literal["bfloat16", "float16"]
AUTOCAST: dict[Autocast, torch.dtype] = {"bfloat16": torch.bfloat16, "float16": torch.float16}

# At 224 pixels JPEG takes a quarter of PNG's bytes and a tenth of its time; its error, one level of 255, does not show.
_OVERLAY: dict[str, Any] = {"format": "JPEG", "quality": 90, "subsampling": 0}


@dataclass(frozen=True, kw_only=True, eq=False)
class Settings:
    """How batches are explained.

    Attributes:
        checkpoint: The run.
        method: Makes the maps.
        method_name: What it is called.
        target: The class to explain, or None for the predicted one.
        preprocessing: How images are normalised.
        size: (h, w).
        storage: Of the maps.
        overlays: Whether each row carries its overlay.
        autocast: Mixed precision, or None.
        compile: Whether the network is compiled.
        labels: K names.
        schema: Of the rows.
    """

    checkpoint: str
    method: Explainer
    method_name: str
    target: int | None
    preprocessing: Preprocessing
    size: tuple[int, int]
    storage: Storage
    overlays: bool
    autocast: Autocast | None
    compile: bool
    labels: tuple[str, ...]
    schema: pa.Schema


class ImageModel:
    """A classifier on its device.

    What is stored is computed from a row alone. The classifier's own saliency takes one forward pass without gradients,
    and threads may share it; other methods may put hooks into the network, and every thread has its own.

    Args:
        settings: How batches are explained.
        device: Where.
        batch_size: The largest batch; a compiled network is made ready for it.

    Attributes:
        shared: Whether several threads may call it at once.
        fixed: Whether every batch must have `batch_size` rows.
    """

    def __init__(self, settings: Settings, device: torch.device, *, batch_size: int) -> None:
        self._settings, self._device = settings, device
        self.shared = isinstance(settings.method, OwnSaliency)
        self.fixed = settings.compile or device.type != "cpu"
        network = load_classifier(settings.checkpoint)
        # Sums over channels run along memory.
        self._network = network.eval().to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        if settings.compile:
            self._network.compile(dynamic=False)
            side = settings.preprocessing.size
            self(torch.zeros(batch_size, 3, side, side, dtype=torch.uint8))

    def __call__(self, values: Values) -> pa.RecordBatch:
        """Explain images, uint8 (N, 3, S, S)."""
        if not isinstance(values, Tensor):
            raise TypeError(f"values must be a tensor of images, got {type(values).__name__}")
        settings = self._settings
        with ExitStack() as modes:
            if self.shared:
                modes.enter_context(torch.inference_mode())
            if settings.autocast is not None:
                modes.enter_context(torch.autocast(self._device.type, AUTOCAST[settings.autocast]))
            explanation, numberless = self._explained(self._moved(values))
        with torch.inference_mode():
            maps = explanation.saliency.float()
            if tuple(maps.shape[1:]) != settings.size:
                maps = F.interpolate(
                    maps.unsqueeze(1), settings.size, mode="bilinear", align_corners=False, antialias=True
                ).squeeze(1)
            unit = self.shared and explanation.options.normalize
            stored, scale, offset = pack(maps, settings.storage, unit=unit)
            classes = explanation.prediction, explanation.target
            probabilities = explanation.probabilities.float()
            if numberless is not None:
                probabilities = probabilities.masked_fill(numberless.unsqueeze(1), torch.nan)
                stored, offset = stored * ~numberless.view(-1, 1, 1), offset * ~numberless
            arrays = _together(*classes, probabilities, scale, offset, stored)
        columns = self._columns(*arrays)
        if settings.overlays:
            pictures = _overlays(values, unpack(arrays[5], arrays[3], arrays[4]), unit=unit)
            parts = [pa.array(pictures, pa.binary()), pa.nulls(len(pictures), pa.string())]
            columns.append(pa.StructArray.from_arrays(parts, names=["bytes", "path"]))
        return pa.RecordBatch.from_arrays(columns, schema=settings.schema)

    def _moved(self, values: Tensor) -> Tensor:
        """Images as the network takes them."""
        if self._device.type == "cuda":
            values = values.pin_memory()
        images = values.to(self._device, non_blocking=True).contiguous(memory_format=torch.channels_last)
        return self._settings.preprocessing.normalize(images)

    def _explained(self, images: Tensor) -> tuple[Explanation, Tensor | None]:
        """The explanation, and which images gave no numbers, (N,): blank ones stand for these, beside all others.

        Raises:
            ValueError: The network gives no numbers for blank images either.
        """
        try:
            return self._explain(images), None
        except NotFiniteError as error:
            blank = images.masked_fill(error.samples.view(-1, 1, 1, 1), 0)
            return self._explain(blank), error.samples

    def _explain(self, images: Tensor) -> Explanation:
        settings, method = self._settings, self._settings.method
        if isinstance(method, OwnSaliency) and not isinstance(self._network, PlainClassifier):
            own: Explanation = self._network.explain(
                images, settings.target, size=settings.size, keep_images=False, **method.options
            )
            return own
        name = settings.method_name
        return explain_by(self._network, images, method, settings.target, keep_images=False, name=name)

    def _columns(
        self,
        predictions: NDArray[Any],
        targets: NDArray[Any],
        probabilities: NDArray[Any],
        scale: NDArray[Any],
        offset: NDArray[Any],
        stored: NDArray[Any],
    ) -> list[pa.Array]:
        count, classes = probabilities.shape
        labels = pa.array(self._settings.labels, pa.string())
        each = np.arange(count)
        return [
            labels.take(pa.array(predictions)),
            pa.array(probabilities[each, predictions]),
            labels.take(pa.array(targets)),
            pa.array(probabilities[each, targets]),
            pa.ListArray.from_arrays(
                pa.array(np.arange(count + 1, dtype=np.int32) * classes), pa.array(probabilities.reshape(-1))
            ),
            as_lists(stored),
            pa.array(scale),
            pa.array(offset),
        ]


def _together(*tensors: Tensor) -> list[NDArray[Any]]:
    """Several tensors, widest elements first, brought to the CPU by one copy."""
    pieces = [tensor.contiguous().view(-1).view(torch.uint8) for tensor in tensors]
    whole = torch.cat(pieces).cpu().numpy()
    arrays, begin = [], 0
    for tensor, piece in zip(tensors, pieces, strict=True):
        kind = torch.empty(0, dtype=tensor.dtype).numpy().dtype
        arrays.append(whole[begin : begin + len(piece)].view(kind).reshape(tuple(tensor.shape)))
        begin += len(piece)
    return arrays


def _overlays(images: Tensor, maps: NDArray[Any], *, unit: bool) -> list[bytes]:
    """Encoded overlays of the maps as they are stored, each drawn by itself: no other map has a say in its colours."""
    pictures = []
    shown = torch.nan_to_num(torch.from_numpy(maps), nan=0.0, posinf=0.0, neginf=0.0)
    for image, one in zip(images, shown, strict=True):
        signed = not unit and bool((one < 0).any())
        ready = one if unit else drawing.drawable(one, signed=signed)
        fitted = F.interpolate(ready[None, None], image.shape[1:], mode="bilinear", align_corners=False)[0]
        drawn = drawing.overlay(image.unsqueeze(0), fitted.clamp(-1, 1), signed=signed)[0]
        file = io.BytesIO()
        Image.fromarray(drawn.movedim(0, -1).contiguous().numpy()).save(file, **_OVERLAY)
        pictures.append(file.getvalue())
    return pictures
