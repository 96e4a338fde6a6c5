"""Explaining archives of images, as the engines of `mhex_core.bulk` want it described.

Letters: N images, K classes, h x w map size, S side of the images as the network sees them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import pyarrow as pa
import torch

from mhex_core import _checks
from mhex_core.bulk.job import OWN_COLUMNS, Decoded
from mhex_vision import checkpoint as checkpoints
from mhex_vision.bulk.decoding import DECODER_ERRORS, reason_of
from mhex_vision.bulk.listing import ImageReader, ImageSource, in_batches
from mhex_vision.bulk.model import AUTOCAST, Autocast, ImageModel, Settings
from mhex_vision.bulk.storing import STORAGES, Storage
from mhex_vision.classifier import MHEXClassifier
from mhex_vision.data import Preprocessing, UnreadableImageError
from mhex_vision.explainers import parse
from mhex_vision.explainers.own import OwnSaliency
from mhex_vision.plain import PlainClassifier, load_classifier
from mhex_vision.vit import architecture_of

Resolution = Literal["full", "native"] | int

_RESOLUTIONS = ("full", "native")


@dataclass(frozen=True)
class ImageJob:
    """Images, a classifier, and what is to be stored of its explanations.

    The rows' columns: `prediction` and `target` (a class's name, or its number as text) with `probability` and
    `target_probability`, float32; `probabilities`, a list of K float32; `saliency`, a list of h lists of w values;
    `saliency_scale` and `saliency_offset`, float32, with which value = scale * saliency + offset (`read_saliency`); and
    perhaps `overlay`, a JPEG as a struct of bytes and path. A map's values that are no finite numbers count as 0 in
    uint8, and stay what they are in float16.

    Attributes:
        checkpoint: A run of `mhex-vision train`, or a repository on the Hugging Face hub.
        source: From `open_source`.
        target: The class to explain, by name or number; None for the predicted one.
        method: As in `explain_by`: "mhex", or another with its options after a colon.
        beta: Weight of negative evidence in the classifier's own maps, in [0, 1]; None means the method's.
        resolution: "full", the size of the images as the network sees them; "native", that of the finest block's map,
            of the classifier's own methods only; or a side in pixels.
        dtype: "uint8", 256 levels (of [0, 1], or between the extremes of each map that is not in [0, 1] by itself), or
            "float16".
        overlays: Whether each row carries its overlay on the image.
        autocast: "bfloat16" or "float16" for mixed precision; None for float32.
        compile: Whether the network goes through torch.compile; of the classifier's own methods only.

    Raises:
        TypeError: A value is of another type.
        ValueError: A value does not fit the classifier, or the checkpoint cannot be used.
        FileNotFoundError: There is no such checkpoint.
        ImportError: The library that the method needs is not installed.
    """

    checkpoint: str
    source: ImageSource
    target: str | int | None = field(default=None, kw_only=True)
    method: str = field(default="mhex", kw_only=True)
    beta: float | None = field(default=None, kw_only=True)
    resolution: Resolution = field(default="full", kw_only=True)
    dtype: Storage = field(default="uint8", kw_only=True)
    overlays: bool = field(default=False, kw_only=True)
    autocast: Autocast | None = field(default=None, kw_only=True)
    compile: bool = field(default=False, kw_only=True)
    _plan: Settings = field(init=False, repr=False, compare=False)
    _settings: Mapping[str, Any] = field(init=False, repr=False, compare=False)
    _about: Mapping[str, Any] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        self._check()
        method = _method(self.method, self.beta)
        network = load_classifier(self.checkpoint)
        preprocessing = _preprocessing(network, self.checkpoint)
        if isinstance(method, OwnSaliency):
            if not isinstance(network, MHEXClassifier):
                raise ValueError(  # noqa: TRY004 - what a folder holds is a value
                    f"{self.checkpoint} is a plain network; choose another method than {self.method}"
                )
            if self.compile and architecture_of(network.backbone) is not None and method.options.get("attention", True):
                raise ValueError(
                    "compile must be False for a vision transformer explained with its attention, which is run block "
                    "by block; the method 'mhex:attention=false' can be compiled"
                )
        elif self.compile:
            raise ValueError(f"compile belongs to the classifier's own saliency, and method is {self.method!r}")
        names = network.config.class_names
        labels = names or tuple(map(str, range(network.config.num_classes)))
        classes = network.config.num_classes
        target = None if self.target is None else _checks.class_number("target", self.target, names, classes)
        size = _size(self.resolution, network, method, preprocessing)
        layers = list(network.layer_names) if isinstance(network, MHEXClassifier) else []
        own = {"beta": method.options.get("beta", 0.0)} if isinstance(method, OwnSaliency) else {}
        chosen = {
            "method": self.method,
            **own,
            "target": target,
            "resolution": list(size),
            "dtype": self.dtype,
            "overlays": self.overlays,
            "autocast": self.autocast,
            "compile": self.compile,
        }
        about = {
            "checkpoint": self.checkpoint,
            "input": self.source.description,
            "reading": dict(self.source.reading),
            "class_names": list(names),
            "target": None if target is None else labels[target],
            "layers": layers,
            "preprocessing": preprocessing.to_dict(),
            "multi_label": network.config.multi_label,
            "map": {"shape": list(size), "dtype": self.dtype, "value": "saliency_scale * saliency + saliency_offset"},
        }
        plan = Settings(
            checkpoint=_found_everywhere(self.checkpoint),
            method=method,
            method_name=self.method,
            target=target,
            preprocessing=preprocessing,
            size=size,
            storage=self.dtype,
            overlays=self.overlays,
            autocast=self.autocast,
            compile=self.compile,
            labels=labels,
            schema=_schema(self.dtype, size, overlays=self.overlays),
        )
        object.__setattr__(self, "_plan", plan)
        object.__setattr__(self, "_settings", {"checkpoint_sha256": _digest(self.checkpoint), **chosen})
        object.__setattr__(self, "_about", about)

    @property
    def program(self) -> str:
        """The command it belongs to."""
        return "mhex-vision"

    @property
    def schema(self) -> pa.Schema:
        """The rows' columns, with the features that Hugging Face's datasets reads them as."""
        return self._plan.schema

    @property
    def settings(self) -> Mapping[str, Any]:
        """What decides the rows' values."""
        return self._settings

    @property
    def about(self) -> Mapping[str, Any]:
        """What else the manifest says."""
        return self._about

    @property
    def row_bytes(self) -> int:
        """About how many bytes a row takes."""
        height, width = self._plan.size
        side = self._plan.preprocessing.size
        numbers = 4 * (len(self._plan.labels) + 4) + int(STORAGES[self.dtype].byte_width) * height * width
        return 64 + numbers + (side * side // 3 if self.overlays else 0)

    @property
    def input_bytes(self) -> int:
        """How many bytes an image takes as the network sees it."""
        return 3 * self._plan.preprocessing.size**2

    def entries(self) -> Iterator[pa.RecordBatch]:
        """List the images."""
        return in_batches(self.source.listed())

    def reader(self) -> JobReader:
        """A reader of images."""
        return JobReader(self.source.reader(), self._plan.preprocessing)

    def model(self, device: torch.device, *, batch_size: int) -> ImageModel:
        """The classifier, ready to explain."""
        return ImageModel(self._plan, device, batch_size=batch_size)

    def _check(self) -> None:
        if not isinstance(self.checkpoint, str):
            raise TypeError(f"checkpoint must be a str, got {type(self.checkpoint).__name__}")
        if self.target is not None and (isinstance(self.target, bool) or not isinstance(self.target, str | int)):
            raise TypeError(f"target must be a class's name or number, or None, got {type(self.target).__name__}")
        if isinstance(self.resolution, str):
            if self.resolution not in _RESOLUTIONS:
                raise ValueError(f"resolution must be 'full', 'native' or a side in pixels, got {self.resolution!r}")
        else:
            _checks.positive_int("resolution", self.resolution)
        _checks.choice("dtype", self.dtype, get_args(Storage))
        if self.autocast is not None:
            _checks.choice("autocast", self.autocast, tuple(AUTOCAST))
        for name in ("overlays", "compile"):
            _checks.flag(name, getattr(self, name))


class JobReader:
    """Reads images as the network sees them, uint8 (n, 3, S, S).

    Args:
        images: Reads them at their own size.
        preprocessing: Brings them to theirs.
    """

    def __init__(self, images: ImageReader, preprocessing: Preprocessing) -> None:
        self._images, self._preprocessing = images, preprocessing

    def __call__(self, entries: pa.RecordBatch) -> Decoded:
        """Read entries; what cannot be read comes with its reason."""
        kept: list[int] = []
        rejected: list[tuple[int, str]] = []
        columns = (entries.column(name).to_pylist() for name in ("source", "place", "length", "problem"))
        side = self._preprocessing.size
        values = torch.empty(entries.num_rows, 3, side, side, dtype=torch.uint8)
        for number, (source, place, length, problem) in enumerate(zip(*columns, strict=True)):
            if problem is not None:
                rejected.append((number, problem))
                continue
            try:
                values[len(kept)] = self._preprocessing.fit(self._images(source, place, length))
            except UnreadableImageError as error:
                rejected.append((number, " ".join(str(error).split())))
            except DECODER_ERRORS as error:
                rejected.append((number, reason_of(error)))
            else:
                kept.append(number)
        return Decoded(kept=kept, values=values[: len(kept)], rejected=rejected)

    def close(self) -> None:
        """Close what is open. The reader can still be used."""
        self._images.close()


def _method(name: str, beta: float | None) -> Any:
    method = parse(name)
    if beta is None:
        return method
    if not isinstance(method, OwnSaliency):
        # A method's name is a value, whatever class it stands for.
        raise ValueError(  # noqa: TRY004
            f"beta belongs to the classifier's own saliency, and method is {name!r}"
        )
    return OwnSaliency({**method.options, "beta": beta})


def _preprocessing(network: MHEXClassifier | PlainClassifier, name: str) -> Preprocessing:
    if network.config.preprocessing is None:
        raise ValueError(f"{name} does not say how images are prepared; explain from Python instead")
    return network.config.preprocessing


def _size(
    resolution: Resolution, network: MHEXClassifier | PlainClassifier, method: object, preprocessing: Preprocessing
) -> tuple[int, int]:
    """(h, w) of the maps."""
    if resolution != "native":
        side = preprocessing.size if isinstance(resolution, str) else resolution
        return side, side
    if not isinstance(method, OwnSaliency) or not isinstance(network, MHEXClassifier):
        raise ValueError(  # noqa: TRY004
            "resolution must be 'full' or a side in pixels for methods other than the classifier's own, got 'native'"
        )
    image = preprocessing.normalize(torch.zeros(1, 3, preprocessing.size, preprocessing.size, dtype=torch.uint8))
    maps = network.explain(image, 0, size=1, keep_images=False, **method.options).positive
    height, width = max((tuple(layer.shape[1:]) for layer in maps), key=lambda shape: shape[0] * shape[1])
    return height, width


def _found_everywhere(checkpoint: str) -> str:
    """The checkpoint as processes that begin in other folders can name it, too."""
    return str(Path(checkpoint).absolute()) if Path(checkpoint).is_dir() else checkpoint


def _digest(checkpoint: str) -> str:
    """What tells two checkpoints apart, wherever they lie."""
    folder = checkpoints.locate(checkpoint)
    whole = hashlib.sha256()
    for name in (checkpoints.CONFIG_FILE, checkpoints.WEIGHTS_FILE):
        with (folder / name).open("rb") as file:
            whole.update(hashlib.file_digest(file, "sha256").digest())
    return whole.hexdigest()


def _schema(dtype: Storage, size: tuple[int, int], *, overlays: bool) -> pa.Schema:
    """The rows' columns. The features are written out: the datasets library need not be there."""
    number, text = {"dtype": "float32", "_type": "Value"}, {"dtype": "string", "_type": "Value"}
    columns: list[tuple[str, pa.DataType, dict[str, Any]]] = [
        ("prediction", pa.string(), text),
        ("probability", pa.float32(), number),
        ("target", pa.string(), text),
        ("target_probability", pa.float32(), number),
        ("probabilities", pa.list_(pa.float32()), {"feature": number, "_type": "List"}),
        (
            "saliency",
            pa.list_(pa.list_(STORAGES[dtype])),
            {"shape": list(size), "dtype": dtype, "_type": "Array2D"},
        ),
        ("saliency_scale", pa.float32(), number),
        ("saliency_offset", pa.float32(), number),
    ]
    if overlays:
        kind = pa.struct([pa.field("bytes", pa.binary()), pa.field("path", pa.string())])
        columns.append(("overlay", kind, {"_type": "Image"}))
    # A list of lists says nothing of its shape, and so datasets has a type of its own for arrays. By these two entries
    # it knows the column for one, while everybody else reads the lists.
    marked = {
        "ARROW:extension:name": "datasets.features.features.Array2DExtensionType",
        "ARROW:extension:metadata": json.dumps([list(size), dtype]),
    }
    features = {own.name: {"dtype": str(own.type), "_type": "Value"} for own in OWN_COLUMNS}
    features |= {name: feature for name, _, feature in columns}
    return pa.schema(
        [pa.field(name, kind, metadata=marked if name == "saliency" else None) for name, kind, _ in columns],
        metadata={"huggingface": json.dumps({"info": {"features": features}})},
    )
