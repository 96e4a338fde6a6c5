"""Class-discriminative attention maps: tokens that enter the last attention, times the gradient of what they serve.

Letters: B batch, T tokens, C channels, K scores, n targets, S steps, N rows (samples, each in some steps). X (T, C) is
what enters the last block, T its normalised tokens, which its attention reads; f the target's score.

Every map is S_i = sum_c T_ic df/dT_ic, signed, and the modes say where it is taken:
  vanilla              At T = norm(X).
  smooth               Mean over S noisy inputs: X + e (or T + e), e normal with sigma = noise (max - min).
  integrated           Mean over k/S X, k = 1 .. S - 1, as released; or over k/S T, k = 0 .. S, as in a product port.
  integrated_complete  T_i . mean of df/dT over (k + 1/2)/S T, X held; the sum over all tokens is f(T) - f(0). Ours.

Only the way through T counts: at the block's input, input times gradient of every patch is 0 where the prediction is
read from CLS, since a norm does not feel the size of what it is given. For the same reason "integrated" of the block's
input hardly moves T, and its sum is not f(T) - f(0).

Source: "Class-Discriminative Attention Maps for Vision Transformers" (arXiv 2312.02364), section 3, and its code.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from mhex_core import _checks
from mhex_core.attention._layers import real_tokens, seed_of

Mode = Literal["vanilla", "smooth", "integrated", "integrated_complete"]
Place = Literal["block_input", "attention_input"]
_MODES = ("vanilla", "smooth", "integrated", "integrated_complete")
_PLACES = ("block_input", "attention_input")
_NOISY = ("smooth", "integrated")
_NOISE = 0.05


@dataclass(frozen=True)
class _Path:
    """Where the gradient is taken: one scale for each step, how much noise, and what both change."""

    scales: tuple[float, ...]
    noise: float
    at: Place
    seed: int

    def moved(self, tokens: Tensor, real: Tensor, steps: range) -> Tensor:
        """The tokens (b, T, C) at some steps, (steps * b, T, C), step by step."""
        scales = torch.tensor([self.scales[step] for step in steps], dtype=tokens.dtype, device=tokens.device)
        moved = tokens * scales[:, None, None, None]
        if self.noise:
            # Each step has a generator of its own, numpy's fill in order, and real tokens are counted: neither the
            # batch, nor how the steps are grouped, nor padding, nor the precision changes what a token gets.
            drawn = [np.random.default_rng([self.seed, step]).standard_normal(tokens.shape[1:]) for step in steps]
            places = (real.cumsum(dim=1) - 1).clamp(min=0)
            moved = moved + torch.from_numpy(np.stack(drawn)).to(tokens)[:, places] * (
                self.noise * _range(tokens, real)
            )
        return moved.flatten(0, 1)


def cdam(
    hidden: Tensor,
    normalize: Callable[[Tensor], Tensor],
    classify: Callable[[Tensor, Tensor, Tensor], Tensor],
    targets: Tensor,
    *,
    mode: Mode = "vanilla",
    steps: int = 50,
    noise: float | None = None,
    perturb_at: Place = "block_input",
    seed: int = 0,
    rows_at_a_time: int | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """Which tokens of the last attention speak for a target, and which against it.

    It works where the caller has turned gradients off, too. A score may be anything that follows from the last block: a
    logit, a probability, the product of an embedding and a concept.

    Args:
        hidden: X, (B, T, C), what enters the last block.
        normalize: (N, T, C) to (N, T, C), the norm before its attention; the identity for a post-norm encoder.
        classify: The rest of the network in evaluation mode: takes X (N, T, C), which its skip connection carries; T
            (N, T, C), which its attention reads; and int64 (N,), which of the B samples each row belongs to (for masks
            and the like). It gives scores (N, K). Rows must not depend on each other.
        targets: int64 (B, n), columns of the scores. They share the forward passes.
        mode: See the module.
        steps: S; of no meaning for "vanilla", at least 2 for "integrated".
        noise: sigma as a share of max - min over a sample's real tokens; the same noise serves every sample. None means
            0.05 for "smooth" and 0 for "integrated" (a product port has 0.05 for both); other modes have no noise.
        perturb_at: What noise and scale change, for "smooth" and "integrated": X, or T while X is held.
        seed: Of the noise.
        rows_at_a_time: At most so many rows at once; None means all B * S. Only memory and time depend on it.
        mask: (B, T), true (or 1) for real tokens; None means that all are. `classify` sees to it that padding is not
            attended to.

    Returns:
        (B, n, T), signed, in units of the score, without a graph; 0 for padding. float32 for half precision.

    Raises:
        TypeError: An argument is of another type.
        ValueError: The shapes do not fit each other, an option has no meaning for the mode, or the scores do not depend
            on T.
    """
    hidden = _checks.tensor("hidden", hidden, ndim=3)
    targets = _checks.tensor("targets", targets, ndim=2, floating=False)
    for name, given in (("normalize", normalize), ("classify", classify)):
        if not callable(given):
            raise TypeError(f"{name} must be callable, got {type(given).__name__}")
    path = _path(mode, steps, noise, perturb_at, seed)
    batch, tokens, _ = hidden.shape
    if targets.shape[0] != batch:
        raise ValueError(f"targets must have shape ({batch}, n), got {tuple(targets.shape)}")
    if rows_at_a_time is not None:
        _checks.positive_int("rows_at_a_time", rows_at_a_time)
    real = real_tokens(mask, batch, tokens, hidden)
    together = max(batch * len(path.scales) if rows_at_a_time is None else rows_at_a_time, 1)
    # What was made in inference mode cannot take part in a backward pass; copies made outside of it can.
    with torch.inference_mode(mode=False), torch.no_grad():
        hidden, targets, real = (_plain(given) for given in (hidden, targets, real))
        maps = [
            _maps(samples, hidden, normalize, classify, targets, real, path, max(together // len(samples), 1), mode)
            for samples in torch.split(torch.arange(batch, device=hidden.device), min(max(batch, 1), together))
        ]
        return torch.cat(maps)


def _maps(
    samples: Tensor,
    hidden: Tensor,
    normalize: Callable[[Tensor], Tensor],
    classify: Callable[[Tensor, Tensor, Tensor], Tensor],
    targets: Tensor,
    real: Tensor,
    path: _Path,
    steps_at_a_time: int,
    mode: Mode,
) -> Tensor:
    """The maps (b, n, T) of some samples."""
    own, kept = hidden[samples], real[samples]
    held = _normalized(normalize, own) if path.at == "attention_input" else own
    total: Tensor | float = 0.0
    for first in range(0, len(path.scales), steps_at_a_time):
        steps = range(first, min(first + steps_at_a_time, len(path.scales)))
        moved = path.moved(held, kept, steps)
        rows = samples.repeat(len(steps))
        if path.at == "attention_input":
            given, normed = own.repeat(len(steps), 1, 1), moved
        else:
            given, normed = moved, _normalized(normalize, moved)
        slopes = _slopes(classify, given, normed, rows, targets[rows])
        weighed = held.repeat(len(steps), 1, 1) if mode == "integrated_complete" else normed
        wide = torch.promote_types(weighed.dtype, torch.float32)
        products = torch.stack([(weighed.to(wide) * slope.to(wide)).sum(dim=2) for slope in slopes], dim=1)
        total = total + products.view(len(steps), len(samples), *products.shape[1:]).sum(dim=0)
    return torch.where(kept.unsqueeze(1), total / len(path.scales), 0.0)


def _slopes(
    classify: Callable[[Tensor, Tensor, Tensor], Tensor], hidden: Tensor, normed: Tensor, rows: Tensor, targets: Tensor
) -> list[Tensor]:
    """The gradients (N, T, C) of n target scores with respect to the normalised tokens, targets (N, n)."""
    with torch.enable_grad():
        normed = normed.detach().requires_grad_()
        scores = classify(hidden, normed, rows)
        if not isinstance(scores, Tensor) or scores.ndim != 2 or len(scores) != len(rows):
            got = tuple(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
            raise ValueError(f"classify must return scores of shape ({len(rows)}, K), got {got}")
        if not scores.requires_grad:
            raise ValueError(
                "classify must return scores that depend on the normalised tokens, got some without a graph"
            )
        targets = _checks.class_indices(
            "targets", targets, batch=len(rows), num_classes=scores.shape[1], device=scores.device
        )
        # Rows do not depend on each other: the gradient of their sum is that of each.
        wanted = scores.gather(1, targets).sum(dim=0).unbind()
    last = len(wanted) - 1
    return [
        torch.autograd.grad(one, normed, retain_graph=index < last, materialize_grads=True)[0]
        for index, one in enumerate(wanted)
    ]


def _path(mode: Mode, steps: int, noise: float | None, perturb_at: Place, seed: int) -> _Path:
    """The options as a path."""
    _checks.choice("mode", mode, _MODES)
    steps = _checks.positive_int("steps", steps)
    _checks.choice("perturb_at", perturb_at, _PLACES)
    seed = seed_of(seed)
    if mode not in _NOISY:
        if noise is not None:
            raise ValueError(f"noise must be None for mode {mode!r}, got {noise!r}")
        if perturb_at != "block_input":
            raise ValueError(f"perturb_at must be 'block_input' for mode {mode!r}, got {perturb_at!r}")
    if noise is None:
        noise = _NOISE if mode == "smooth" else 0.0
    noise = _checks.number("noise", noise, low=0)
    if mode == "vanilla":
        return _Path((1.0,), 0.0, perturb_at, seed)
    if mode == "smooth":
        return _Path((1.0,) * steps, noise, perturb_at, seed)
    if mode == "integrated_complete":
        return _Path(tuple((step + 0.5) / steps for step in range(steps)), 0.0, "attention_input", seed)
    if steps < 2:
        raise ValueError(f"steps must be at least 2 for mode 'integrated', got {steps}")
    points = range(1, steps) if perturb_at == "block_input" else range(steps + 1)
    return _Path(tuple(point / steps for point in points), noise, perturb_at, seed)


def _normalized(normalize: Callable[[Tensor], Tensor], hidden: Tensor) -> Tensor:
    """T of some rows, checked."""
    normed: object = normalize(hidden)
    if not isinstance(normed, Tensor) or normed.shape != hidden.shape:
        got = tuple(normed.shape) if isinstance(normed, Tensor) else type(normed).__name__
        raise ValueError(f"normalize must return the shape {tuple(hidden.shape)}, got {got}")
    return normed


def _range(tokens: Tensor, real: Tensor) -> Tensor:
    """Max - min over the real tokens of each sample, (b, 1, 1); 0 where there are none."""
    padding = ~real.unsqueeze(2)
    high = tokens.masked_fill(padding, -torch.inf).amax(dim=(1, 2), keepdim=True)
    low = tokens.masked_fill(padding, torch.inf).amin(dim=(1, 2), keepdim=True)
    return torch.where(real.any(dim=1)[:, None, None], high - low, 0.0)


def _plain(given: Tensor) -> Tensor:
    """The tensor without a graph, and not of inference mode."""
    return given.clone() if given.is_inference() else given.detach()
