"""What torch must know of the compiled operators beside their kernels: shapes of results, and how to map them.

Letters: B batch, n targets per sample, H x W output size, T tokens, V the size of the dimension that vmap adds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from mhex_core.matrix import compute_dtype


def _fake_saliency_maps(
    activations: list[Tensor],
    matrices: list[Tensor],
    _sums: list[Tensor],
    targets: Tensor | None,
    *rest: Any,
) -> Tensor:
    *_, height, width, _normalize = rest
    return _new(activations[0], _count(matrices, targets), height, width)


def _fake_signed_maps(
    activations: list[Tensor],
    matrices: list[Tensor],
    _sums: list[Tensor],
    targets: Tensor | None,
    *_: Any,
) -> list[Tensor]:
    count = _count(matrices, targets)
    return [_new(layer, count, *layer.shape[2:]) for _ in range(2) for layer in activations]


def _fake_combine_maps(positive: list[Tensor], _negative: list[Tensor], *rest: Any) -> Tensor:
    *_, height, width, _normalize = rest
    return _new(positive[0], positive[0].shape[1], height, width)


def _fake_token_saliency(
    activations: list[Tensor],
    matrices: list[Tensor],
    _sums: list[Tensor],
    targets: Tensor | None,
    *_: Any,
) -> Tensor:
    return _new(activations[0], _count(matrices, targets), activations[0].shape[1])


def _count(matrices: list[Tensor], targets: Tensor | None) -> int:
    return matrices[0].shape[0] if targets is None else targets.shape[1]


def _new(like: Tensor, *shape: int) -> Tensor:
    return like.new_empty((like.shape[0], *shape), dtype=compute_dtype(like.dtype))


def _vmap_rule(operator: Callable[..., Any], batched_by_sample: Sequence[int]) -> Callable[..., Any]:
    """Map an operator over V: V is folded into B, or, where something without a B is mapped, gone through one by one.

    Args:
        operator: The raw operator.
        batched_by_sample: Positions of the arguments that have a B, (B, ...) or lists of such.
    """

    def rule(info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> Any:
        size = info.batch_size
        foldable = all(position in batched_by_sample or not _mapped(dims) for position, dims in enumerate(in_dims))
        if foldable:
            folded = [
                _each(lambda tensor, dim: _fold(tensor, dim, size), argument, dims)
                if position in batched_by_sample
                else argument
                for position, (argument, dims) in enumerate(zip(arguments, in_dims, strict=True))
            ]
            result = operator(*folded)
            if isinstance(result, Tensor):
                return _unfold(result, size), 0
            return [_unfold(tensor, size) for tensor in result], [0] * len(result)
        results = [
            operator(
                *(_each(_select(index), argument, dims) for argument, dims in zip(arguments, in_dims, strict=True))
            )
            for index in range(size)
        ]
        if isinstance(results[0], Tensor):
            return torch.stack(results), 0
        return [torch.stack(parts) for parts in zip(*results, strict=True)], [0] * len(results[0])

    return rule


def _mapped(dims: Any) -> bool:
    return any(_mapped(dim) for dim in dims) if isinstance(dims, list | tuple) else dims is not None


def _each(function: Callable[[Tensor, Any], Tensor], argument: Any, dims: Any) -> Any:
    if isinstance(argument, Tensor):
        return function(argument, dims)
    if isinstance(argument, list | tuple) and argument and isinstance(argument[0], Tensor):
        dims = dims if isinstance(dims, list | tuple) else [dims] * len(argument)
        return [function(tensor, dim) for tensor, dim in zip(argument, dims, strict=True)]
    return argument


def _fold(tensor: Tensor, dim: int | None, size: int) -> Tensor:
    whole = tensor.unsqueeze(0).expand(size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)
    return whole.reshape(whole.shape[0] * whole.shape[1], *whole.shape[2:])


def _select(index: int) -> Callable[[Tensor, Any], Tensor]:
    return lambda tensor, dim: tensor if dim is None else tensor.select(dim, index)


def _unfold(tensor: Tensor, size: int) -> Tensor:
    return tensor.reshape(size, tensor.shape[0] // size, *tensor.shape[1:])


def register() -> None:
    """Tell torch what it needs of the loaded operators beside their kernels. Called once, after loading."""
    for name, fake, batched in (
        ("saliency_maps", _fake_saliency_maps, (0, 3)),
        ("signed_maps", _fake_signed_maps, (0, 3)),
        ("combine_maps", _fake_combine_maps, (0, 1)),
        ("token_saliency", _fake_token_saliency, (0, 3, 4)),
    ):
        torch.library.register_fake(f"mhex::{name}", fake)
        torch.library.register_vmap(f"mhex::{name}", _vmap_rule(getattr(torch.ops.mhex, name), batched))
