"""Does the judge's logit follow an attribution: in the order of its values, and in the sums of its boxes?

Both metrics read signed attributions: what speaks against the class stands below zero, and goes last in the order.

Letters: B batch, C channels, H x W image size, K steps, h x w cells, P positions (pixels or cells), D boxes.
Sources: the published code of the authors of class-discriminative attention maps (Brocki, Binda and Chung, arXiv
2312.02364) for the steps, the fills and the boxes; sensitivity-n, Ancona et al. 2018 (arXiv 1711.06104), for the
correlation over them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from mhex_core import _checks
from mhex_core.metrics import curve_area
from mhex_vision.metrics import _attributions
from mhex_vision.metrics.judge import Judge, as_judge
from mhex_vision.metrics.perturbation import Baseline, baseline_of, pixel_ranks, replace_pixels

BOX_SIDES = (0.125, 0.25, 0.5)


@dataclass(frozen=True, kw_only=True, eq=False)
class FidelityCurves:
    """The judge's logit of the class while positions go.

    Attributes:
        fractions: (K + 1,), k / K.
        most: (B, K + 1), the most important positions first (MIF).
        least: (B, K + 1), the least important positions first (LIF).
    """

    fractions: Tensor
    most: Tensor
    least: Tensor

    @property
    def gap(self) -> Tensor:
        """The area between the curves, LIF - MIF: (B,)."""
        return curve_area(self.least - self.most, self.fractions)


def fidelity_curves(
    judge: Judge | nn.Module,
    images: Tensor,
    attribution: Tensor,
    target: int | Tensor,
    *,
    steps: int = 40,
    baseline: Baseline = "mean",
    cells: int | tuple[int, int] | None = None,
) -> FidelityCurves:
    """The judge's logit while positions go to a baseline, in falling (MIF) and in rising order of attribution (LIF).

    At step k of K, the first floor(k P / K) of the P positions are gone.

    Args:
        judge: The network whose logit counts.
        images: (B, C, H, W), normalised as the judge expects.
        attribution: (B, H, W), of any sign; only its order counts. Equal values come in one fixed, seemingly random
            order, the same in both curves, so that a constant map has two equal ones.
        target: int64 (B,), or one class for all.
        steps: K.
        baseline: What stands where positions are gone, see `baseline_of`.
        cells: What a position is: None, a pixel; (h, w), or one number for a square, a cell of that grid, in the order
            of the cells' means. A map that is constant within patches should be read by those patches: by pixels, ties
            would leave the order inside a patch to chance, and break it up.

    Raises:
        TypeError: An argument is of another type.
        ValueError: An argument's shape or value does not fit.
    """
    images, maps, target = _attributions.check(images, attribution, target)
    steps = _checks.positive_int("steps", steps)
    height, width = images.shape[2:]
    grid = (height, width) if cells is None else _checks.size_2d("cells", cells)
    if grid[0] > height or grid[1] > width:
        raise ValueError(f"cells must be at most ({height}, {width}), the number of pixels, got {grid}")
    positions = grid[0] * grid[1]
    if steps > positions:
        raise ValueError(f"steps must be at most {positions}, the number of positions, got {steps}")
    judge = as_judge(judge)
    ground = baseline_of(images, baseline)
    curves = []
    if images.shape[0]:
        for scores in (maps, -maps):
            ranks = _ranks(scores, grid).to(images.device)
            counts = [step * positions // steps for step in range(steps + 1)]
            values = [judge.logit(replace_pixels(images, ranks < count, ground), target) for count in counts]
            curves.append(torch.stack(values, dim=1))
    else:
        curves = [images.new_zeros(0, steps + 1)] * 2
    like = curves[0]
    fractions = torch.arange(steps + 1, dtype=like.dtype, device=like.device) / steps
    return FidelityCurves(fractions=fractions, most=curves[0], least=curves[1])


def fidelity(
    judge: Judge | nn.Module,
    images: Tensor,
    attribution: Tensor,
    target: int | Tensor,
    *,
    steps: int = 40,
    baseline: Baseline = "mean",
    cells: int | tuple[int, int] | None = None,
) -> Tensor:
    """Area between the curves of the least and of the most important first, see `fidelity_curves`.

    Returns:
        (B,), in logits; higher is better. A random order gives 0 on average, a constant map 0.
    """
    curves = fidelity_curves(judge, images, attribution, target, steps=steps, baseline=baseline, cells=cells)
    return curves.gap


def box_sensitivity(
    judge: Judge | nn.Module,
    images: Tensor,
    attribution: Tensor,
    target: int | Tensor,
    *,
    sides: float | Sequence[float] = BOX_SIDES,
    boxes: int = 100,
    baseline: Baseline = "blur",
    seed: int = 0,
) -> Tensor:
    """Correlation between the sum of attributions in a square box and the logit that is lost with the box.

    Pearson's, over random boxes of one side b, then the mean over the sides. The boxes of a side depend on the seed,
    the side and the images' size: every image, batch and method gets the same.

    Args:
        judge: The network whose logit counts.
        images: (B, C, H, W), normalised as the judge expects.
        attribution: (B, H, W), of any sign, in any unit: a correlation sees neither scale nor offset.
        target: int64 (B,), or one class for all.
        sides: b, one or more: an int for pixels, a float in (0, 1) for a share of the images' shorter side (at least 1
            pixel). The source's code ends with the sums and drops of one b; the correlation per image, its mean over
            the sides, and the eighth, the quarter and the half as sides are our reading.
        boxes: D, how many of each side; every place that lies wholly inside the image is equally likely.
        baseline: What stands in the box, see `baseline_of`.
        seed: Of the places.

    Returns:
        (B,) in [-1, 1], higher is better. Where no correlation is defined (a constant attribution, or a logit that
        every box of a side changes alike, but for rounding) that side counts 0: saying nothing earns nothing, and means
        are over the same images for every method.

    Raises:
        TypeError: An argument is of another type.
        ValueError: An argument's shape or value does not fit.
    """
    images, maps, target = _attributions.check(images, attribution, target)
    boxes = _checks.positive_int("boxes", boxes)
    if boxes < 2:
        raise ValueError(f"boxes must be at least 2, got {boxes}")
    height, width = images.shape[2:]
    lengths = _check_sides(sides, min(height, width))
    places = [_places(height, width, side, boxes, seed) for side in lengths]
    ground = baseline_of(images, baseline)
    judge = as_judge(judge)
    if not images.shape[0]:
        return images.new_zeros(0)
    before = judge.logit(images, target)
    # All boxes of a side hold as many pixels, so an offset moves every sum alike; without it a flat map leaves nothing
    # to round.
    centred = maps - maps.mean(dim=(1, 2), keepdim=True)
    found = []
    for side, corners in zip(lengths, places, strict=True):
        claimed = torch.stack(
            [centred[:, top : top + side, left : left + side].sum(dim=(1, 2)) for top, left in corners], dim=1
        )
        after = _without_boxes(judge, images, ground, target, corners, side)
        change = before.cpu().double().unsqueeze(1) - after
        rounding = _attributions.judges_rounding(before, after)
        found.append(_attributions.pearson(claimed, change, _attributions.map_rounding(maps), rounding))
    return torch.stack(found, dim=1).nan_to_num(nan=0.0).mean(dim=1).to(before)


def _ranks(scores: Tensor, grid: tuple[int, int]) -> Tensor:
    """The place of each pixel's position in the order of falling scores, from 0: int64 (B, H, W)."""
    height, width = scores.shape[1:]
    if grid == (height, width):
        return pixel_ranks(scores)
    # Pixel y lies in row floor(y h / H) of the grid: what upsampling to the nearest value does, backwards.
    rows = torch.arange(height) * grid[0] // height
    columns = torch.arange(width) * grid[1] // width
    cell = (rows.unsqueeze(1) * grid[1] + columns).flatten()
    sums = scores.new_zeros(scores.shape[0], grid[0] * grid[1]).index_add_(1, cell, scores.flatten(1))
    # In float64 the mean of equal float32 values is their value, however many: what ties stays tied.
    means = sums / cell.bincount(minlength=grid[0] * grid[1])
    ranks = pixel_ranks(means.view(-1, *grid))
    return ranks.flatten(1)[:, cell].view(-1, height, width)


def _without_boxes(
    judge: Judge, images: Tensor, ground: Tensor, target: Tensor, corners: list[tuple[int, int]], side: int
) -> Tensor:
    """The judge's logit with each box gone: float64 (B, D), on the CPU."""
    batch, _, height, width = images.shape
    # As many boxes at a time as fill the judge's batch: memory does not grow with D.
    size = max(1, judge.batch_size // batch)
    parts = []
    for start in range(0, len(corners), size):
        some = corners[start : start + size]
        inside = torch.zeros(len(some), 1, height, width, dtype=torch.bool)
        for number, (top, left) in enumerate(some):
            inside[number, :, top : top + side, left : left + side] = True
        changed = torch.where(inside.to(images.device), ground.unsqueeze(1), images.unsqueeze(1))
        values = judge.logit(changed.flatten(0, 1), target.repeat_interleave(len(some)))
        parts.append(values.view(batch, len(some)).cpu().double())
    return torch.cat(parts, dim=1)


def _places(height: int, width: int, side: int, boxes: int, seed: int) -> list[tuple[int, int]]:
    """The upper left corners of the boxes."""
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise TypeError(f"seed must be an int, got {type(seed).__name__}")
    if seed < 0:
        raise ValueError(f"seed must be at least 0, got {seed}")
    generator = np.random.default_rng((seed, side))
    tops = generator.integers(0, height - side + 1, boxes).tolist()
    lefts = generator.integers(0, width - side + 1, boxes).tolist()
    return list(zip(tops, lefts, strict=True))


def _check_sides(sides: object, shorter: int) -> list[int]:
    """The sides in pixels."""
    given = list(sides) if isinstance(sides, Sequence) and not isinstance(sides, str) else [sides]
    if not given:
        raise ValueError("sides must be at least one, got none")
    lengths = []
    for side in given:
        if isinstance(side, float):
            if not 0 < side < 1:
                raise ValueError(f"sides must be in (0, 1) where they are shares of the shorter side, got {side!r}")
            lengths.append(max(1, round(side * shorter)))
            continue
        length = _checks.positive_int("sides", side)
        if length > shorter:
            raise ValueError(f"sides must be at most {shorter}, the images' shorter side, got {length}")
        lengths.append(length)
    return lengths
