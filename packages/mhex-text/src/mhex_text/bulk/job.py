"""Texts explained in bulk: what a run over an archive of texts is made of.

Letters: K classes, L blocks.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import torch

from mhex_core import _checks
from mhex_core.bulk.job import Model, Reader
from mhex_text import explainers
from mhex_text.bulk import columns
from mhex_text.bulk.checkpoint import Checkpoint, find_checkpoint
from mhex_text.bulk.models import OtherModel, OwnModel
from mhex_text.bulk.reading import TextReader
from mhex_text.bulk.sources import TextSource
from mhex_text.explainers import TextExplainer
from mhex_text.explainers.own import OwnScores
from mhex_text.explanation.records import spread_weights

_AUTOCAST = {"bfloat16": torch.bfloat16, "float16": torch.float16}
_OWN_SETTINGS = {"layers": 3, "beta": 1.0, "attention": False}


@dataclass(frozen=True, kw_only=True)
class TextJob:
    """Texts, the classifier that explains them, and how: a `mhex_core.bulk.BulkJob`.

    What each row holds is described in `mhex_text.bulk.columns.schema`.

    Attributes:
        checkpoint: A folder from `mhex-text train`, another classifier of transformers, or a name on the hub.
        source: The texts, from `open_source`.
        target: Name or number of the class to explain; None means the predicted one.
        method: "mhex", the classifier's own evidence, or another one as `explain_by` takes it: a name with its options
            after a colon.
        layers: Of the method "mhex": how many of the first blocks are added up, their places, or "all".
        beta: Of the method "mhex": how much negative evidence counts, in [0, 1].
        attention: Of the method "mhex": whether evidence is multiplied by the attention that a token receives.
        max_length: The most tokens of a text; None means as many as tokenizer and encoder take.
        keep_text: Whether texts, and those of their tokens, are written.
        autocast: "bfloat16" or "float16", in which the forward pass computes where that is safe; None leaves the
            weights' own type.
        compile: Whether the classifier is compiled; only for the method "mhex" without `attention`.

    Raises:
        TypeError: A value is of another type.
        ValueError: A value does not fit.
        OSError: There is no such checkpoint.
    """

    checkpoint: str | Path
    source: TextSource
    target: str | int | None = None
    method: str = "mhex"
    layers: int | Sequence[int] | Literal["all"] = 3
    beta: float = 1.0
    attention: bool = False
    max_length: int | None = None
    keep_text: bool = True
    autocast: Literal["bfloat16", "float16"] | None = None
    compile: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.source, TextSource):
            raise TypeError(f"source must be a TextSource, from open_source, got {type(self.source).__name__}")
        for name in ("attention", "keep_text", "compile"):
            _checks.flag(name, getattr(self, name))
        if self.autocast is not None:
            _checks.choice("autocast", self.autocast, tuple(_AUTOCAST))
        if not isinstance(self.layers, str | int) and isinstance(self.layers, Sequence):
            object.__setattr__(self, "layers", tuple(self.layers))
        explainer, known = self._explainer, self._checkpoint
        own = self._own
        if isinstance(explainer, OwnScores) and not known.blocks:
            raise ValueError(
                f"checkpoint must hold an MHEX classifier for the method {self.method!r}, got {self.checkpoint} "
                "without blocks; choose another method"
            )
        if own is not None:
            layers = [len(known.blocks) - 1] if own.layers == "last" else own.layers
            spread_weights(layers, own.layer_weights, count=len(known.blocks), decay=own.decay)
        if self.compile and (own is None or own.attention):
            raise ValueError("compile must go with the method 'mhex' without attention: other methods look inside")
        if self.target is not None:
            known.target(self.target)

    @property
    def program(self) -> str:
        """The command it belongs to."""
        return "mhex-text"

    @cached_property
    def schema(self) -> pa.Schema:
        """The columns, see `mhex_text.bulk.columns.schema`."""
        return columns.schema(pairs=self.source.pairs, keep_text=self.keep_text)

    @property
    def settings(self) -> Mapping[str, Any]:
        """What decides the rows' values."""
        known = self._checkpoint
        layers = list(self.layers) if isinstance(self.layers, tuple) else self.layers
        own = {"layers": layers, "beta": float(self.beta), "attention": self.attention}
        return {
            "checkpoint": known.digest,
            "method": self.method,
            **(own if self.method == "mhex" else {}),
            "target": None if self.target is None else known.target(self.target),
            "max_length": known.limit,
            "keep_text": self.keep_text,
            "autocast": self.autocast,
            "compile": self.compile,
            "text_column": self.source.text,
            "pair_column": self.source.pair,
        }

    @property
    def about(self) -> Mapping[str, Any]:
        """What else the manifest says."""
        known, source = self._checkpoint, self.source
        count = len(source.files)
        return {
            "checkpoint": known.place,
            "revision": known.revision,
            "class_names": list(known.class_names),
            "layers": [f"layer {index}" for index in known.blocks],
            "input": str(source.folder / source.files[0] if count == 1 else source.folder),
            "files": count,
            "kind": source.kind,
            "pairs": source.pairs,
        }

    @property
    def row_bytes(self) -> int:
        """About how many bytes a row takes: a text of some hundred tokens."""
        return 4096 if self.keep_text else 2048

    @property
    def input_bytes(self) -> int:
        """About how many bytes a text takes once it is read: itself, and its tokens."""
        return 4096 + 24 * (self._checkpoint.limit or 512)

    def entries(self) -> Iterator[pa.RecordBatch]:
        """List the texts; see `TextSource.entries`."""
        return self.source.entries()

    def reader(self) -> Reader:
        """What reads and tokenizes, for one process."""
        return TextReader(self.source, self._checkpoint, exact=self._own is None)

    def model(self, device: torch.device, *, batch_size: int) -> Model:
        """The classifier, ready to explain."""
        known, own = self._checkpoint, self._own
        rows = partial(columns.rows, schema=self.schema, class_names=known.class_names)
        target = None if self.target is None else known.target(self.target)
        autocast = None if self.autocast is None else _AUTOCAST[self.autocast]
        if own is None:
            return OtherModel(
                known, self._explainer, self.method, rows, target=target, device=device, autocast=autocast
            )
        compiled = batch_size if self.compile else None
        return OwnModel(known, own, rows, target=target, device=device, autocast=autocast, compiled=compiled)

    @cached_property
    def _checkpoint(self) -> Checkpoint:
        return find_checkpoint(self.checkpoint, max_length=self.max_length, pairs=self.source.pairs)

    @property
    def _explainer(self) -> TextExplainer:
        if self.method == "mhex":
            return OwnScores(layers=self.layers, beta=self.beta, attention=self.attention)
        chosen = explainers.parse(self.method)
        given = [name for name, value in _OWN_SETTINGS.items() if getattr(self, name) != value]
        if given:
            raise ValueError(f"{', '.join(given)} must go with the method 'mhex', got {self.method!r}")
        return chosen

    @property
    def _own(self) -> OwnScores | None:
        """The settings of the classifier's own evidence, or None for what explainers give."""
        chosen = self._explainer
        return chosen if isinstance(chosen, OwnScores) and not chosen.rectify else None
