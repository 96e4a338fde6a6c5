"""Shapley values of a hierarchy of tokens (Owen values), as shap computes them.

Letters: B batch, T tokens, M tokens of one text that carry a score, N masked texts, K classes.
Source: Lundberg and Lee 2017 (arXiv 1705.07874); the hierarchy is shap's `PartitionExplainer` on its `maskers.Text`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mhex_core import _checks
from mhex_text.batch import TokenBatch
from mhex_text.capture import logits_of, ungraded
from mhex_text.explainers.interface import check, finished, load, require
from mhex_text.explainers.view import aligned, all_logits, number_of, wanted, wide

LIBRARY = "shap"
Array = np.ndarray[Any, Any]


@dataclass(frozen=True, kw_only=True)
class PartitionShap:
    """What each token adds to the target's logit as it takes the place of a mask token: signed.

    The sum of the scores is the logit of the text less the logit of mask tokens alone, however few evaluations there
    are. The library is told the model's own tokens and masks them one for one: a masked text is never cut into tokens
    anew, in which the pieces of a word would change with their neighbours. Special tokens always stay.

    Attributes:
        evaluations: Masked texts per text; the more, the smaller the groups of tokens. The last batch may exceed it.
        batch_size: Masked texts at a time. Groups are split a batch at a time, so it has some effect on the scores.
    """

    evaluations: int = 500
    batch_size: int = 50

    def __post_init__(self) -> None:
        _checks.positive_int("evaluations", self.evaluations)
        _checks.positive_int("batch_size", self.batch_size)
        require(LIBRARY, needed_by="shap", distribution="shap")

    def __call__(self, model: nn.Module, batch: TokenBatch, targets: Tensor) -> Tensor:
        """Explain."""
        check(model, batch, targets)
        library = load(LIBRARY, needed_by="shap", distribution="shap")
        filler = number_of("mask", batch.tokenizer, needed_by="shap")
        texts = aligned(model, batch)
        with ungraded(model), torch.no_grad():
            scores = torch.zeros(texts.batch.input_ids.shape, dtype=torch.float64)
            whole = all_logits(model, texts.inputs, self.batch_size)
            for row, target in enumerate(wanted(targets, whole).tolist()):
                one = {name: values[row : row + 1] for name, values in texts.inputs.items()}
                places = texts.batch.mask[row].nonzero().squeeze(1)
                segmented = _Segmented.of(texts.batch, row, places, filler)
                scores[row, places.cpu()] = self._values(library, model, one, places, segmented, target)
        return finished("shap", texts.back(scores), batch)

    def _values(
        self,
        library: ModuleType,
        model: nn.Module,
        inputs: dict[str, Tensor],
        places: Tensor,
        segmented: _Segmented,
        target: int,
    ) -> Tensor:
        """M values of one text."""
        longest = int(inputs["attention_mask"].sum())

        def logits(ids: Array) -> Array:
            masked = {name: values[:, :longest].repeat(len(ids), 1) for name, values in inputs.items()}
            masked["input_ids"][:, places] = torch.from_numpy(ids).to(places.device)
            found: Array = wide(logits_of(model, masked)).cpu().numpy()
            return found

        if len(places) < 2:  # too few for a hierarchy
            ids = np.array(segmented.ids, dtype=np.int64)[None]
            gained = logits(ids) - logits(np.full_like(ids, segmented.filler))
            return torch.from_numpy(gained[0, [target] * len(places)]).double()
        masker = library.maskers.Text(
            segmented, mask_token=segmented.filler, collapse_mask_token=False, output_type="token_ids"
        )
        method = library.PartitionExplainer(logits, masker)
        with _numpy_seeded():
            explanation = method(
                [segmented.text],
                max_evals=self.evaluations,
                batch_size=self.batch_size,
                outputs=[target],
                silent=True,
            )
        return torch.from_numpy(np.asarray(explanation.values, dtype=np.float64).reshape(len(places)))


@dataclass(frozen=True)
class _Segmented:
    """A text that is cut into tokens already, in the guise of a tokenizer.

    Attributes:
        text: The text, or both of a pair in one.
        ids: Of its M tokens.
        offsets: Their M characters (start, end).
        filler: What masks a token.
    """

    text: str
    ids: list[int]
    offsets: list[tuple[int, int]]
    filler: int

    @classmethod
    def of(cls, batch: TokenBatch, row: int, places: Tensor, filler: int) -> _Segmented:
        written = batch.texts[row]
        first, text = (written, written) if isinstance(written, str) else (written[0], "\n".join(written))
        shifts = [(len(first) + 1) * part for part in batch.sequence_ids[row, places].tolist()]
        spans = batch.offsets[row, places].tolist()
        offsets = [(start + shift, end + shift) for (start, end), shift in zip(spans, shifts, strict=True)]
        return cls(text, batch.input_ids[row, places].tolist(), offsets, filler)

    def __call__(self, text: str, *, return_offsets_mapping: bool = False) -> dict[str, Any]:
        """What the library asks: the tokens of the text, and of none."""
        if text != self.text:
            return {"input_ids": [], "offset_mapping": []}
        tokens: dict[str, Any] = {"input_ids": self.ids}
        return tokens | {"offset_mapping": self.offsets} if return_offsets_mapping else tokens


@contextmanager
def _numpy_seeded() -> Iterator[None]:
    """A fixed state of numpy's own generator, by which shap breaks ties; the caller's goes on afterwards."""
    state = np.random.get_state()  # noqa: NPY002 - shap draws from it, and takes no other
    np.random.seed(0)  # noqa: NPY002
    try:
        yield
    finally:
        np.random.set_state(state)  # noqa: NPY002
