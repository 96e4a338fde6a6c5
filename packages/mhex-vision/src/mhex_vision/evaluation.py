"""How a classifier does on a set of images, in one process or over many.

Letters: B batch, K classes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.data import DataLoader, Sampler

from mhex_core import DeepSupervisionLoss, _checks
from mhex_vision.classifier import ClassifierOutput, MHEXClassifier
from mhex_vision.data.sets import Batch, DataBundle, ImageSet, keep_batch
from mhex_vision.progress import bar


@dataclass(frozen=True, kw_only=True)
class Metrics:
    """How a network does on one set of images.

    Attributes:
        loss: Mean cross-entropy of the prediction.
        accuracy: Share of right predictions; of right yes/no answers where classes are independent, which is high
            where most answers are no.
        head_accuracy: The same of each head, shallow to deep.
        images: How many were judged.
        auc: Mean over classes of the area under the ROC curve of the class against all others; None where no class
            has one.
        without_auc: Numbers of the classes that are left out of it, because all images have them or none has.
        exact_match: Where classes are independent, the share of images all of whose answers are right.
    """

    loss: float
    accuracy: float
    head_accuracy: tuple[float, ...]
    images: int
    auc: float | None = None
    without_auc: tuple[int, ...] = ()
    exact_match: float | None = None


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

    Raises:
        RuntimeError: The loss is no finite number.
    """
    batches = IndexBatches(len(images), batch_size)
    loader = batch_loader(images, batches, workers=workers)
    device = next(model.parameters()).device
    with bar(loader, desc="evaluating", shown=progress) as shown:
        return metrics_of(tally(model, shown, data, device), f"the images of {data.name}")


class IndexBatches(Sampler[list[int]]):
    """Index batches of nearly equal size: a last batch of one image would upset batch statistics.

    With a seed, shuffled anew each epoch and padded so that every process has as many; without, in order, each image
    once over all processes. With chances as well, as many are drawn with these, and put back.
    """

    def __init__(
        self,
        count: int,
        batch_size: int,
        *,
        seed: int | None = None,
        rank: int = 0,
        world: int = 1,
        chances: NDArray[np.float64] | None = None,
    ) -> None:
        self.count, self.seed, self.rank, self.world, self.chances = count, seed, rank, world, chances
        self.epoch = 0
        mine = math.ceil(count / world) if seed is not None else len(range(rank, count, world))
        self.batches = max(math.ceil(mine / batch_size), 1) if mine else 0

    def __len__(self) -> int:
        return self.batches

    def __iter__(self) -> Iterator[list[int]]:
        if self.seed is None:
            order = np.arange(self.count)
        else:
            generator = np.random.default_rng([self.seed, self.epoch])
            if self.chances is None:
                order = generator.permutation(self.count)
            else:
                order = generator.choice(self.count, size=self.count, p=self.chances)
            order = np.resize(order, math.ceil(self.count / self.world) * self.world)
        for part in np.array_split(order[self.rank :: self.world], self.batches) if self.batches else []:
            yield part.tolist()


def batch_loader(images: ImageSet, batches: IndexBatches, *, workers: int) -> DataLoader[Batch]:
    """A loader of whole batches."""
    # The datasets hand over whole batches, which is more than the loader's types know of.
    return DataLoader(images, batch_sampler=batches, collate_fn=cast("Any", keep_batch), num_workers=workers)


class Tally(NamedTuple):
    """What metrics are computed from.

    Attributes:
        sums: Over images, float64: [count, loss, wholly right, right predictions, right predictions of each head].
        logits: (N, K), float32.
        labels: (N,) or (N, K).
    """

    sums: Tensor
    logits: Tensor
    labels: Tensor


def tally(network: nn.Module, loader: Iterable[Batch], data: DataBundle, device: torch.device) -> Tally:
    """What a network makes of images, whatever mode it is in."""
    judge = DeepSupervisionLoss(multi_label=data.multi_label, reduction="none")
    was_training = network.training
    network.eval()
    # float64 where there is one; Apple's accelerator has none.
    exact = torch.float32 if device.type == "mps" else torch.float64
    heads_of = len(network.blocks) if isinstance(network, MHEXClassifier) else 0
    total = torch.zeros(4 + heads_of, dtype=exact, device=device)
    kept: list[tuple[Tensor, Tensor]] = []
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
                _answers(logits, labels).all(dim=1).float().sum() if data.multi_label else loss.new_zeros(()),
                *(_right(each, labels, multi_label=data.multi_label) for each in (logits, *heads)),
            ]
            total += torch.stack(values).to(exact)
            kept.append((logits.float(), labels))
    network.train(was_training)
    if not kept:
        shape = (0, data.num_classes) if data.multi_label else (0,)
        kept.append((total.new_zeros(0, data.num_classes, dtype=torch.float32), total.new_zeros(shape)))
    logits_of, labels_of = zip(*kept, strict=True)
    return Tally(total, torch.cat(logits_of), torch.cat(labels_of))


def _answers(logits: Tensor, labels: Tensor) -> Tensor:
    return (logits > 0) == (labels > 0.5)


def _right(logits: Tensor, labels: Tensor, *, multi_label: bool) -> Tensor:
    if multi_label:
        return _answers(logits, labels).float().mean(dim=1).sum()
    return (logits.argmax(dim=1) == labels).float().sum()


def metrics_of(found: Tally, name: str) -> Metrics:
    """Metrics of what `tally` found, in one process or added up and joined over all.

    Args:
        found: The images' sums, logits and labels.
        name: What the images are called.

    Raises:
        ValueError: There was no image.
        RuntimeError: The loss is no finite number.
    """
    count, loss, whole, right, *heads = found.sums.tolist()
    if not count:
        raise ValueError("images must hold at least one that can be read, got none")
    _checks.finite_loss(name, loss / count)
    auc, without = macro_auc(found.logits, found.labels)
    return Metrics(
        loss=loss / count,
        accuracy=right / count,
        head_accuracy=tuple(head / count for head in heads),
        images=int(count),
        auc=auc,
        without_auc=without,
        exact_match=whole / count if found.labels.ndim == 2 else None,
    )


def macro_auc(logits: Tensor, labels: Tensor) -> tuple[float | None, tuple[int, ...]]:
    """The mean over classes of the area under the ROC curve, each class against all others.

    Args:
        logits: (N, K).
        labels: (N,) class numbers, or (N, K) zeros and ones of independent classes.

    Returns:
        The mean, None where no class has one; and the classes that have none, being those of all images or of none.
    """
    # Ranks are all that counts, so independent classes need no sigmoid; in float64 a softmax ties little.
    scores = (logits if labels.ndim == 2 else logits.double().softmax(dim=1)).cpu().numpy()
    known = labels.cpu()
    positive = ((known > 0.5) if labels.ndim == 2 else (known.unsqueeze(1) == torch.arange(logits.shape[1]))).numpy()
    found = [_auc(scores[:, k], positive[:, k]) for k in range(logits.shape[1])]
    areas = [area for area in found if area is not None]
    return float(np.mean(areas)) if areas else None, tuple(k for k, area in enumerate(found) if area is None)


def _auc(scores: NDArray[Any], positive: NDArray[np.bool_]) -> float | None:
    """The share of pairs, one image of the class and one not, that are in the right order; equal ones count half."""
    count = int(positive.sum())
    others = len(positive) - count
    if not count or not others:
        return None
    # Mann and Whitney: from the ranks, equal scores sharing the mean of theirs.
    _, place, shared = np.unique(scores, return_inverse=True, return_counts=True)
    rank = np.cumsum(shared) - (shared - 1) / 2
    return float((rank[place][positive].sum() - count * (count + 1) / 2) / (count * others))
