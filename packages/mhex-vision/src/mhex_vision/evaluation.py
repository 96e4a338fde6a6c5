"""How a classifier does on a set of images, in one process or over many.

Letters: B batch, K classes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Sampler

from mhex_core import DeepSupervisionLoss
from mhex_vision.classifier import ClassifierOutput, MHEXClassifier
from mhex_vision.data.sets import Batch, DataBundle, ImageSet, keep_batch
from mhex_vision.progress import bar


@dataclass(frozen=True, kw_only=True)
class Metrics:
    """How a network does on one set of images.

    Attributes:
        loss: Mean cross-entropy of the prediction.
        accuracy: Share of right predictions; of right yes/no answers where classes are independent.
        head_accuracy: The same of each head, shallow to deep.
        images: How many were judged.
    """

    loss: float
    accuracy: float
    head_accuracy: tuple[float, ...]
    images: int


def evaluate(
    model: nn.Module,
    images: ImageSet,
    data: DataBundle,
    *,
    batch_size: int = 256,
    workers: int = 0,
    progress: bool = True,
) -> Metrics:
    """Judge a network on one set of images, on the device it is on.

    Args:
        model: An `MHEXClassifier`, or any network whose output is (B, K) logits.
        images: The images, usually `data.test`.
        data: The bundle they belong to.
        batch_size: Images at a time.
        workers: Processes that decode image files.
        progress: Whether a terminal shows a bar.
    """
    batches = IndexBatches(len(images), batch_size)
    loader = batch_loader(images, batches, workers=workers)
    device = next(model.parameters()).device
    with bar(loader, desc="evaluating", shown=progress) as shown:
        return metrics_of(tally(model, shown, data, device))


class IndexBatches(Sampler[list[int]]):
    """Index batches of nearly equal size: a last batch of one image would upset batch statistics.

    With a seed, shuffled anew each epoch and padded so that every process has as many; without, in order, each image
    once over all processes.
    """

    def __init__(self, count: int, batch_size: int, *, seed: int | None = None, rank: int = 0, world: int = 1) -> None:
        self.count, self.seed, self.rank, self.world = count, seed, rank, world
        self.epoch = 0
        mine = math.ceil(count / world) if seed is not None else len(range(rank, count, world))
        self.batches = max(math.ceil(mine / batch_size), 1) if mine else 0

    def __len__(self) -> int:
        return self.batches

    def __iter__(self) -> Iterator[list[int]]:
        if self.seed is None:
            order = np.arange(self.count)
        else:
            order = np.random.default_rng([self.seed, self.epoch]).permutation(self.count)
            order = np.resize(order, math.ceil(self.count / self.world) * self.world)
        for part in np.array_split(order[self.rank :: self.world], self.batches) if self.batches else []:
            yield part.tolist()


def batch_loader(images: ImageSet, batches: IndexBatches, *, workers: int) -> DataLoader[Batch]:
    """A loader of whole batches."""
    # The datasets hand over whole batches, which is more than the loader's types know of.
    return DataLoader(images, batch_sampler=batches, collate_fn=cast("Any", keep_batch), num_workers=workers)


def tally(network: nn.Module, loader: Iterable[Batch], data: DataBundle, device: torch.device) -> Tensor:
    """Sums over images: [count, loss, right predictions, right predictions of each head], float64."""
    judge = DeepSupervisionLoss(multi_label=data.multi_label, reduction="none")
    was_training = network.training
    network.eval()
    # float64 where there is one; Apple's accelerator has none.
    exact = torch.float32 if device.type == "mps" else torch.float64
    heads_of = len(network.blocks) if isinstance(network, MHEXClassifier) else 0
    total = torch.zeros(3 + heads_of, dtype=exact, device=device)
    with torch.no_grad():
        for batch in loader:
            images = data.preprocessing.normalize(batch.images.to(device))
            labels = batch.labels.to(device)
            output = network(images)
            logits = output.logits if isinstance(output, ClassifierOutput) else output
            heads = output.head_logits if isinstance(output, ClassifierOutput) else ()
            loss = judge((logits.float(),), labels)
            values = [
                torch.tensor(float(len(labels)), device=device),
                loss.mean(dim=1).sum() if data.multi_label else loss.sum(),
                *(_right(each, labels, multi_label=data.multi_label) for each in (logits, *heads)),
            ]
            total += torch.stack(values).to(exact)
    network.train(was_training)
    return total


def _right(logits: Tensor, labels: Tensor, *, multi_label: bool) -> Tensor:
    if multi_label:
        return ((logits > 0) == (labels > 0.5)).float().mean(dim=1).sum()
    return (logits.argmax(dim=1) == labels).float().sum()


def metrics_of(sums: Tensor) -> Metrics:
    """Means from the sums that `tally` gives, of one process or added up over all."""
    count, loss, right, *heads = sums.tolist()
    if not count:
        raise ValueError("images must hold at least one that can be read, got none")
    return Metrics(
        loss=loss / count,
        accuracy=right / count,
        head_accuracy=tuple(head / count for head in heads),
        images=int(count),
    )
