"""Do the numbers of a map add up to what the network's output does?

The metrics here take a map as attributions: the value of a pixel is its share in the output, all its channels together,
in the output's units and of any sign. Taking pixels to a baseline should then change the output by the sum of their
values. (A saliency brought to [0, 1] has lost its units and its zero. `infidelity` can give it the units back, and
`sensitivity_n` needs neither; `completeness` means nothing for it.)

Random draws belong to an image: they depend on the seed and on the image itself, and so neither on its batch nor on
where in the data it stands, and they are the same for every method.

Letters: B batch, C channels, H x W image size, N = H W pixels, L blocks, D draws.
Sources: infidelity, Yeh et al. 2019 (arXiv 1901.09392); sensitivity-n, Ancona et al. 2018 (arXiv 1711.06104);
completeness, Sundararajan et al. 2017 (arXiv 1703.01365).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from mhex_core import _checks
from mhex_core.matrix import compute_dtype
from mhex_core.modes import in_evaluation_mode
from mhex_vision.classifier import MHEXClassifier
from mhex_vision.metrics import _attributions
from mhex_vision.metrics.judge import Judge, as_judge
from mhex_vision.metrics.perturbation import Baseline, baseline_of

Output = Literal["probability", "logit"]
Perturbation = Literal["square", "noise"]

Draw = Callable[[np.random.Generator, int], np.ndarray]
"""Takes a generator and a number d, gives (d, H, W): how far each pixel goes to the baseline, 1 being all the way."""


def infidelity(
    judge: Judge | nn.Module,
    images: Tensor,
    attribution: Tensor,
    target: int | Tensor,
    *,
    perturbation: Perturbation = "square",
    draws: int = 64,
    sides: tuple[float, float] = (0.1, 0.5),
    deviation: float = 0.2,
    baseline: Baseline = "blank",
    output: Output = "probability",
    normalize: bool = True,
    seed: int = 0,
) -> Tensor:
    """Infidelity: E_I[(I . attribution - (f(x) - f(x - I (x - x0))))^2], over random perturbations I.

    I (H, W) says how far each pixel, all its channels alike, goes from the image x to the baseline x0, and
    I . attribution is the sum over pixels of the product. That is the source's product for an attribution that has the
    inputs multiplied in: for the linear f(x) = w . x the attribution w (x - x0), summed over channels, has infidelity
    0. (The source's product of additive noise with a gradient needs a value per channel, which a map has not.)

    Args:
        judge: The network whose output counts.
        images: (B, C, H, W), normalised as the judge expects.
        attribution: (B, H, W), of any sign.
        target: int64 (B,), or one class for all.
        perturbation: "square" takes a random square to the baseline: I is 1 inside and 0 outside, every place that lies
            wholly inside the image equally likely. "noise" moves every pixel a normally distributed share of the way,
            of mean 0, towards the baseline or away from it.
        draws: D, how many perturbations stand for the expectation.
        sides: Of "square": the shortest and the longest side, as shares of the image's shorter one; uniform between.
        deviation: Of "noise": the standard deviation of the share.
        baseline: x0, see `baseline_of`.
        output: What f is: the judge's "probability" or its "logit".
        normalize: Whether each attribution is first multiplied by the number that makes it fit best, the least squares
            over its draws: sum (I . attribution) (f(x) - f(..)) / sum (I . attribution)^2. So maps in different units
            compare, and none is above the mean of (f(x) - f(..))^2, which an attribution of zeros has. The number may
            be negative: a map and its negative get the same.
        seed: Of the draws.

    Returns:
        (B,) at least 0; lower is better.

    Raises:
        TypeError: An argument is of another type.
        ValueError: An argument's shape or value does not fit.
    """
    images, attribution, target = _attributions.check(images, attribution, target)
    draws = _checks.positive_int("draws", draws)
    _checks.choice("perturbation", perturbation, ("square", "noise"))
    _checks.flag("normalize", normalize)
    height, width = images.shape[2:]
    if perturbation == "square":
        draw = _squares(height, width, _check_sides(sides))
    else:
        draw = _noise(height, width, _checks.number("deviation", deviation, low=0))
    found = _responses(judge, images, attribution, target, draw, draws, baseline=baseline, output=output, seed=seed)
    claimed = found.claimed
    if normalize:
        power = claimed.square().sum(dim=1, keepdim=True)
        scale = (claimed * found.change).sum(dim=1, keepdim=True) / torch.where(power > 0, power, 1)
        claimed = claimed * scale
    return (claimed - found.change).square().mean(dim=1).to(found.like)


def sensitivity_n(
    judge: Judge | nn.Module,
    images: Tensor,
    attribution: Tensor,
    target: int | Tensor,
    *,
    n: float = 0.1,
    subsets: int = 100,
    baseline: Baseline = "blank",
    output: Output = "probability",
    seed: int = 0,
) -> Tensor:
    """Sensitivity-n: correlation between the sum of n pixels' attributions and what the output loses with the pixels.

    Pearson's, over random subsets S of n pixels: corr(sum_{i in S} attribution_i, f(x) - f(x_S)), where x_S is the
    image with S taken to the baseline.

    Args:
        judge: The network whose output counts.
        images: (B, C, H, W), normalised as the judge expects.
        attribution: (B, H, W), of any sign, in any unit: a correlation sees neither scale nor offset.
        target: int64 (B,), or one class for all.
        n: How many pixels: an int, or a float in (0, 1) for a share of them (at least 1 pixel). The source asks for a
            range of n, one after the other.
        subsets: D, how many.
        baseline: What stands where pixels are gone, see `baseline_of`.
        output: What f is: the judge's "probability" or its "logit".
        seed: Of the subsets.

    Returns:
        (B,) in [-1, 1], higher is better. NaN where no correlation is defined: for a constant attribution, or an output
        that every subset changes alike, but for rounding. Means should leave those out.

    Raises:
        TypeError: An argument is of another type.
        ValueError: An argument's shape or value does not fit.
    """
    images, attribution, target = _attributions.check(images, attribution, target)
    height, width = images.shape[2:]
    count = _check_n(n, height * width)
    subsets = _checks.positive_int("subsets", subsets)
    if subsets < 2:
        raise ValueError(f"subsets must be at least 2, got {subsets}")
    # All subsets are of one size, so an offset moves every sum alike; without it a flat map leaves nothing to round.
    centred = attribution - attribution.mean(dim=(1, 2), keepdim=True)
    draw = _subsets(height, width, count)
    found = _responses(judge, images, centred, target, draw, subsets, baseline=baseline, output=output, seed=seed)
    rounding = _attributions.map_rounding(attribution)
    return _attributions.pearson(found.claimed, found.change, rounding, found.rounding).to(found.like)


def completeness(
    judge: Judge | nn.Module,
    images: Tensor,
    attribution: Tensor,
    target: int | Tensor,
    *,
    baseline: Baseline = "blank",
    output: Output = "logit",
) -> Tensor:
    """How far an attribution is from adding up: |sum attribution - (f(x) - f(x0))| / |f(x) - f(x0)|.

    Args:
        judge: The network that was explained: only of it can an attribution be complete.
        images: (B, C, H, W), normalised as the judge expects.
        attribution: (B, H, W), of any sign, in the output's units.
        target: int64 (B,), or one class for all.
        baseline: x0, see `baseline_of`; the one the attribution was made with.
        output: What f is: the judge's "probability" or its "logit".

    Returns:
        (B,) at least 0; lower is better, and an attribution of zeros has 1. NaN where f(x) = f(x0).

    Raises:
        TypeError: An argument is of another type.
        ValueError: An argument's shape or value does not fit.
    """
    images, attribution, target = _attributions.check(images, attribution, target)
    judge = as_judge(judge)
    if not images.shape[0]:
        return images.new_zeros(0)
    value, empty = (_output(judge, each, target, output) for each in (images, baseline_of(images, baseline)))
    change = value.cpu().double() - empty.cpu().double()
    gap = (attribution.sum(dim=(1, 2)) - change).abs() / torch.where(change != 0, change, 1).abs()
    return torch.where(change != 0, gap, torch.nan).to(value)


class HeadCompleteness(NamedTuple):
    """What the maps of each block add up to, beside what its head says.

    Attributes:
        evidence: (B, L), the mean over pixels of each block's map with beta 1 and both thresholds 0.
        logits: (B, L), each head's own logit of the class.
    """

    evidence: Tensor
    logits: Tensor

    @property
    def relative_gap(self) -> Tensor:
        """|evidence - logit| / |logit|: (B, L), lower is better; NaN where the logit is 0."""
        there = self.logits != 0
        gap = (self.evidence - self.logits).abs() / torch.where(there, self.logits, 1).abs()
        return torch.where(there, gap, torch.nan)


def head_completeness(model: MHEXClassifier, images: Tensor, target: int | Tensor) -> HeadCompleteness:
    """The fidelity of MHEX's own maps: evidence_l = sum_k M^l_{c,k} GAP(A^l_k) against the head's logit_l.

    The head computes logit_l = M^l ReLU(GAP(x) + GAP(r)) of shortcut x and branch r, the map reads A^l = r + g x. What
    is between them is the gate g, and the ReLU where a channel's mean is negative; a block without a gate, all of whose
    means are positive, is complete.

    Args:
        model: The classifier; in evaluation mode for the call, and in its own mode again afterwards.
        images: (B, 3, H, W), normalised.
        target: int64 (B,), or one class for all.

    Returns:
        Evidence and logits, each (B, L), in float32 or wider.

    Raises:
        TypeError: An argument is of another type.
        ValueError: An argument's shape or value does not fit.
    """
    if not isinstance(model, MHEXClassifier):
        raise TypeError(f"model must be an MHEXClassifier, got {type(model).__name__}")
    images = _checks.tensor("images", images, ndim=4)
    with torch.no_grad(), in_evaluation_mode(model):
        given = model(images)
        matrices = model.equivalent_matrices()
    logits = torch.stack(given.head_logits, dim=1)
    wanted = _attributions.class_of_each(
        target, batch=images.shape[0], num_classes=logits.shape[2], device=logits.device
    )
    wide = compute_dtype(logits.dtype)
    evidence = [
        (matrix.detach().to(wide)[wanted] * activation.to(wide).mean(dim=(2, 3))).sum(dim=1)
        for matrix, activation in zip(matrices, given.activations, strict=True)
    ]
    index = wanted.view(-1, 1, 1).expand(-1, logits.shape[1], 1)
    return HeadCompleteness(torch.stack(evidence, dim=1), logits.gather(2, index).squeeze(2).to(wide))


class _Responses(NamedTuple):
    """What the draws did: (B, D), in float64 on the CPU, where every device's numbers can be.

    Attributes:
        claimed: I . attribution.
        change: f(x) - f(x - I (x - x0)).
        rounding: (B,), how much of a spread among the changes may be the judge's rounding.
        like: A tensor of the dtype and device to answer in, the judge's.
    """

    claimed: Tensor
    change: Tensor
    rounding: Tensor
    like: Tensor


def _responses(
    judge: Judge | nn.Module,
    images: Tensor,
    attribution: Tensor,
    target: Tensor,
    draw: Draw,
    draws: int,
    *,
    baseline: Baseline,
    output: Output,
    seed: int,
) -> _Responses:
    judge = as_judge(judge)
    batch = images.shape[0]
    _checks.choice("output", output, ("probability", "logit"))
    ground = baseline_of(images, baseline)
    generators = _generators(images, seed)
    if not batch:
        none = torch.zeros(0, draws, dtype=torch.float64)
        return _Responses(none, none, none.new_zeros(0), images.new_zeros(0))
    before = _output(judge, images, target, output)
    claimed, after = [], []
    # As many draws at a time as fill the judge's batch: memory does not grow with D.
    for some in _parts(draws, max(1, judge.batch_size // batch)):
        move = torch.from_numpy(np.stack([draw(generator, some) for generator in generators]))
        claimed.append((move.double() * attribution.unsqueeze(1)).sum(dim=(2, 3)))
        share = move.to(images).unsqueeze(2)
        image, end = images.unsqueeze(1), ground.unsqueeze(1)
        # A pixel that goes all the way must be the baseline to the bit, and one that stays the image.
        changed = torch.where(share == 1, end, image - share * (image - end))
        values = _output(judge, changed.flatten(0, 1), target.repeat_interleave(some), output)
        after.append(values.view(batch, some).cpu().double())
    beliefs = torch.cat(after, dim=1)
    change = before.cpu().double().unsqueeze(1) - beliefs
    return _Responses(torch.cat(claimed, dim=1), change, _attributions.judges_rounding(before, beliefs), before)


def _output(judge: Judge, images: Tensor, target: Tensor, output: Output) -> Tensor:
    """f of each image: (B,), in the judge's own dtype."""
    _checks.choice("output", output, ("probability", "logit"))
    return judge.probability(images, target) if output == "probability" else judge.logit(images, target)


def _generators(images: Tensor, seed: int) -> list[np.random.Generator]:
    """One generator per image, seeded by the seed and by what the image holds."""
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise TypeError(f"seed must be an int, got {type(seed).__name__}")
    salt = str(seed).encode()
    pixels = images.detach().to(device="cpu", dtype=torch.float32).contiguous().numpy()
    digests = (hashlib.blake2b(salt + b":" + image.tobytes(), digest_size=16).digest() for image in pixels)
    return [np.random.default_rng(int.from_bytes(digest, "little")) for digest in digests]


def _squares(height: int, width: int, sides: tuple[float, float]) -> Draw:
    shorter = min(height, width)
    shortest, longest = (min(max(round(side * shorter), 1), shorter) for side in sides)
    rows, columns = np.arange(height), np.arange(width)

    def draw(generator: np.random.Generator, count: int) -> np.ndarray:
        random = generator.random((count, 3))
        side = shortest + np.floor(random[:, 0] * (longest - shortest + 1)).astype(np.int64)
        top = np.floor(random[:, 1] * (height - side + 1)).astype(np.int64)
        left = np.floor(random[:, 2] * (width - side + 1)).astype(np.int64)
        inside_rows = (rows >= top[:, None]) & (rows < (top + side)[:, None])
        inside_columns = (columns >= left[:, None]) & (columns < (left + side)[:, None])
        return (inside_rows[:, :, None] & inside_columns[:, None, :]).astype(np.float32)

    return draw


def _noise(height: int, width: int, deviation: float) -> Draw:
    def draw(generator: np.random.Generator, count: int) -> np.ndarray:
        return deviation * generator.standard_normal((count, height, width), dtype=np.float32)

    return draw


def _subsets(height: int, width: int, n: int) -> Draw:
    def draw(generator: np.random.Generator, count: int) -> np.ndarray:
        keys = generator.random((count, height * width))
        chosen = np.zeros(keys.shape, dtype=np.float32)
        np.put_along_axis(chosen, np.argpartition(keys, n - 1, axis=1)[:, :n], 1, axis=1)
        return chosen.reshape(count, height, width)

    return draw


def _parts(total: int, size: int) -> Iterator[int]:
    for start in range(0, total, size):
        yield min(size, total - start)


def _check_sides(sides: object) -> tuple[float, float]:
    pair = _checks.numbers("sides", sides)
    if len(pair) != 2 or not 0 < pair[0] <= pair[1] <= 1:
        raise ValueError(f"sides must be two numbers in (0, 1], the shorter first, got {sides!r}")
    return pair


def _check_n(n: object, pixels: int) -> int:
    if isinstance(n, float):
        if not 0 < n < 1:
            raise ValueError(f"n must be in (0, 1) where it is a share of the pixels, got {n!r}")
        return max(1, round(n * pixels))
    count = _checks.positive_int("n", n)
    if count >= pixels:
        raise ValueError(f"n must be below {pixels}, the number of pixels, got {count}")
    return count
