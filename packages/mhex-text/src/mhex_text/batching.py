"""Tokens of many texts, in batches of like length.

Letters: N texts, T tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from mhex_text.progress import bar

_GROUP = 50  # batches whose texts are sorted by length


class TokenizedTexts(Dataset[dict[str, Any]]):
    """The tokens of N texts, one after another in one tensor: lists of lists would take ten times the memory."""

    def __init__(
        self, tokenizer: Any, texts: Any, max_length: int, *, name: str = "texts", progress: bool = False
    ) -> None:
        first = list(texts["text"])
        second = list(texts["pair"]) if "pair" in texts.column_names else None
        self.labels = [int(label) for label in texts["label"]]
        lengths: list[int] = []
        ids: list[Tensor] = []
        types: list[Tensor] = []
        cut = 0
        with bar(len(first), description=f"reading {name}", shown=progress) as shown:
            for start in range(0, len(first), 1000):
                part = slice(start, start + 1000)
                found = tokenizer(
                    first[part], None if second is None else second[part], truncation=True, max_length=max_length
                )
                for encoding in found.encodings:
                    cut += bool(encoding.overflowing)
                for row in found["input_ids"]:
                    lengths.append(len(row))
                    ids.append(torch.tensor(row, dtype=torch.int32))
                types += [torch.tensor(row, dtype=torch.int8) for row in found.get("token_type_ids", ())]
                shown.update(len(first[part]))
        self.lengths = np.asarray(lengths)
        self.truncated = cut / len(first)
        self._ends = np.cumsum(self.lengths)
        self.ids = torch.cat(ids)
        self.types = torch.cat(types) if types else None

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        end, length = int(self._ends[index]), int(self.lengths[index])
        item = {"input_ids": self.ids[end - length : end].tolist(), "attention_mask": [1] * length}
        if self.types is not None:
            item["token_type_ids"] = self.types[end - length : end].tolist()
        return {**item, "labels": self.labels[index]}


class LengthGroups(Sampler[int]):
    """A new order per epoch in which texts of a batch are about equally long, which saves padding."""

    def __init__(self, lengths: np.ndarray[Any, Any], batch_size: int, seed: int) -> None:
        self.lengths, self.batch_size, self.seed, self.epoch = lengths, batch_size, seed, 0

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        generator = np.random.default_rng([self.seed, self.epoch])
        order = generator.permutation(len(self.lengths))
        batches: list[np.ndarray[Any, Any]] = []
        for start in range(0, len(order), _GROUP * self.batch_size):
            part = order[start : start + _GROUP * self.batch_size]
            part = part[np.argsort(self.lengths[part], kind="stable")]
            batches += [part[place : place + self.batch_size] for place in range(0, len(part), self.batch_size)]
        # One that is not full stays at the end, or it would shift the bounds of those after it.
        rest = [batches.pop()] if len(batches[-1]) < self.batch_size else []
        shuffled = [batches[place] for place in generator.permutation(len(batches))]
        yield from np.concatenate(shuffled + rest).tolist()
