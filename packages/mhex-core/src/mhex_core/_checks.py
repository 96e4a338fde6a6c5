"""Argument checks shared by the public functions: each error names the argument, what was expected and what came."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from numbers import Real
from typing import Literal, TypeVar

import torch
from torch import Tensor

T = TypeVar("T", bound=str)


def finite_loss(of: str, value: float) -> float:
    """Return a loss that is a finite number: a network whose loss is not predicts its first class, whatever it sees."""
    if not math.isfinite(value):
        raise RuntimeError(
            f"the loss of {of} is {value}; lower the learning rate, and let the next run overwrite what this one wrote"
        )
    return value


def tensor(name: str, value: object, *, ndim: int | tuple[int, ...], floating: bool = True) -> Tensor:
    """Return `value` if it is a tensor of the wanted rank, raise otherwise."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")
    ranks = (ndim,) if isinstance(ndim, int) else ndim
    if value.ndim not in ranks:
        wanted = " or ".join(str(rank) for rank in ranks)
        raise ValueError(f"{name} must have {wanted} dimensions, got shape {tuple(value.shape)}")
    if floating and not value.is_floating_point():
        raise TypeError(f"{name} must be of a floating-point dtype, got {value.dtype}")
    return value


def tensors(name: str, value: object, *, ndim: int | tuple[int, ...]) -> tuple[Tensor, ...]:
    """Return `value` as a tuple if it is a non-empty sequence of tensors, one per layer."""
    if isinstance(value, Tensor) or not isinstance(value, Sequence):
        raise TypeError(f"{name} must be a sequence of tensors, one per layer, got {type(value).__name__}")
    if not value:
        raise ValueError(f"{name} must hold at least one layer, got an empty sequence")
    # What is right, as nearly always, is not given a name first.
    ranks = (ndim,) if isinstance(ndim, int) else ndim
    if all(isinstance(item, Tensor) and item.ndim in ranks and item.is_floating_point() for item in value):
        return tuple(value)
    return tuple(tensor(f"{name}[{index}]", item, ndim=ndim) for index, item in enumerate(value))


def number(name: str, value: object, *, low: float = -math.inf, high: float = math.inf) -> float:
    """Return `value` as a float if it is a finite real number in [low, high]."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    result = float(value)
    # A comparison, and not math.isfinite: torch.compile traces numbers as symbols.
    if not -math.inf < result < math.inf or not low <= result <= high:
        if low == -math.inf and high == math.inf:
            wanted = "finite"
        elif high == math.inf:
            wanted = f"at least {low:g}"
        else:
            wanted = f"in [{low:g}, {high:g}]"
        raise ValueError(f"{name} must be {wanted}, got {value!r}")
    return result


def numbers(name: str, value: object, *, low: float = -math.inf) -> tuple[float, ...]:
    """Return `value` (a sequence or a 1-D tensor) as a tuple of finite floats."""
    if isinstance(value, Tensor):
        value = tensor(name, value, ndim=1, floating=False).tolist()
    if isinstance(value, str) or not isinstance(value, Iterable):
        raise TypeError(f"{name} must be a sequence of numbers, got {type(value).__name__}")
    return tuple(number(f"{name}[{index}]", item, low=low) for index, item in enumerate(value))


def positive_int(name: str, value: object) -> int:
    """Return `value` if it is an int of at least 1."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")
    return value


def flag(name: str, value: object) -> bool:
    """Return `value` if it is a bool."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be a bool, got {type(value).__name__}")
    return value


def choice(name: str, value: T, options: Sequence[str]) -> T:
    """Return `value` if it is one of `options`."""
    if not isinstance(value, str):
        raise TypeError(f"{name} must be a string, got {type(value).__name__}")
    if value not in options:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, options))}, got {value!r}")
    return value


def size_2d(name: str, value: object) -> tuple[int, int]:
    """Return `value` as (H, W); one int stands for a square."""
    if isinstance(value, int) and not isinstance(value, bool):
        value = (value, value)
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise TypeError(f"{name} must be an int or a pair (H, W), got {type(value).__name__}")
    if len(value) != 2:
        raise ValueError(f"{name} must be an int or a pair (H, W), got {tuple(value)!r}")
    return positive_int(f"{name}[0]", value[0]), positive_int(f"{name}[1]", value[1])


def is_transformed(value: Tensor) -> bool:
    """Whether torch.func (vmap, grad, jvp) is looking through this tensor."""
    return bool(torch._C._functorch.is_functorch_wrapped_tensor(value))


def class_indices(
    name: str, value: object, *, batch: int, num_classes: int, device: torch.device, look: bool = True
) -> Tensor:
    """Return class indices as an int64 tensor (B,) or (B, n) on `device`; one int stands for the whole batch.

    `look`: whether a tensor's values are checked, too.
    """
    if isinstance(value, int) and not isinstance(value, bool):
        if not 0 <= value < num_classes:
            raise ValueError(f"{name} must lie in [0, {num_classes - 1}], got {value}")
        return torch.full((batch,), value, dtype=torch.int64, device=device)
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be an int, an integer tensor or 'all', got {type(value).__name__}")
    if value.is_floating_point() or value.is_complex() or value.dtype == torch.bool:
        raise TypeError(f"{name} must be of an integer dtype, got {value.dtype}")
    if value.ndim not in (1, 2) or value.shape[0] != batch or 0 in value.shape[1:]:
        raise ValueError(f"{name} must have shape ({batch},) or ({batch}, n), n >= 1, got {tuple(value.shape)}")
    # An index out of range would be a device-side assertion on an accelerator, which ends the process's use of it.
    # While torch traces, there are no values to look at.
    traced = torch.compiler.is_compiling() or is_transformed(value)
    if look and not traced and value.numel():
        low, high = (int(extreme) for extreme in value.aminmax())
        if low < 0 or high >= num_classes:
            raise ValueError(f"{name} must lie in [0, {num_classes - 1}], got values from {low} to {high}")
    return value.to(device=device, dtype=torch.int64)


def chosen_layers(layers: int | Sequence[int] | Literal["all"], available: int) -> list[int]:
    """Indices of the layers that `layers` means: how many of the first ones, their indices, or "all"."""
    if isinstance(layers, str):
        choice("layers", layers, ("all",))
        return list(range(available))
    if isinstance(layers, int):
        return list(range(min(positive_int("layers", layers), available)))
    given: list[object] = list(layers) if isinstance(layers, Sequence) else [None]
    chosen = [index for index in given if isinstance(index, int) and not isinstance(index, bool)]
    if len(chosen) != len(given):
        raise TypeError(f"layers must be an int, a sequence of ints or 'all', got {layers!r}")
    if not chosen or not all(-available <= index < available for index in chosen):
        raise ValueError(f"layers must name layers in [0, {available - 1}], got {chosen}")
    return [index % available for index in chosen]
