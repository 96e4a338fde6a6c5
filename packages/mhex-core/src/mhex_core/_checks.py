"""Argument checks shared by the public functions: each error names the argument, what was expected and what came."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Sequence
from numbers import Real
from typing import Literal, SupportsIndex, TypeVar

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import forward_ad

T = TypeVar("T", bound=str)

FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
"""What torch calculates in. It has narrower types as well, but only to store numbers in."""

MOST_PIXELS = 2**31 - 1
"""Along one side of a map: kernels count in 32 bits."""


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
    if floating and value.dtype not in FLOATING:
        raise TypeError(f"{name} must be of a floating-point dtype of 16, 32 or 64 bits, got {value.dtype}")
    return value


def tensors(name: str, value: object, *, ndim: int | tuple[int, ...]) -> tuple[Tensor, ...]:
    """Return `value` as a tuple if it is a non-empty sequence of tensors, one per layer."""
    if isinstance(value, Tensor) or not isinstance(value, Sequence):
        raise TypeError(f"{name} must be a sequence of tensors, one per layer, got {type(value).__name__}")
    if not value:
        raise ValueError(f"{name} must hold at least one layer, got an empty sequence")
    # What is right, as nearly always, is not given a name first.
    ranks = (ndim,) if isinstance(ndim, int) else ndim
    if all(isinstance(item, Tensor) and item.ndim in ranks and item.dtype in FLOATING for item in value):
        return tuple(value)
    return tuple(tensor(f"{name}[{index}]", item, ndim=ndim) for index, item in enumerate(value))


def number(name: str, value: object, *, low: float = -math.inf, high: float = math.inf) -> float:
    """Return `value` as a float if it is a finite real number in [low, high]."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    try:
        result = float(value)
    except OverflowError:  # a whole number beyond every float
        result = math.inf
    # A comparison, and not math.isfinite: torch.compile traces numbers as symbols.
    if not -math.inf < result < math.inf or not low <= result <= high:
        if low == -math.inf and high == math.inf:
            wanted = "finite"
        elif high == math.inf:
            wanted = f"at least {low:g}"
        else:
            wanted = f"in [{low:g}, {high:g}]"
        # Not `value`: Python refuses to write out a whole number of more than 4,300 digits.
        raise ValueError(f"{name} must be {wanted}, got {result!r}")
    return result


def numbers(name: str, value: object, *, low: float = -math.inf) -> tuple[float, ...]:
    """Return `value` (a sequence or a 1-D tensor) as a tuple of finite floats."""
    if isinstance(value, Tensor):
        if value.requires_grad:
            raise ValueError(f"{name} must not require a gradient, of which nothing would come; give {name}.detach()")
        value = tensor(name, value, ndim=1, floating=False).tolist()
    if isinstance(value, str) or not isinstance(value, Iterable):
        raise TypeError(f"{name} must be a sequence of numbers, got {type(value).__name__}")
    return tuple(number(f"{name}[{index}]", item, low=low) for index, item in enumerate(value))


def integer(name: str, value: object) -> int:
    """Return `value` as an int if it is a whole number of Python, of NumPy, or in a tensor without dimensions."""
    if type(value) is int:
        return value
    whole = isinstance(value, SupportsIndex) and not isinstance(value, bool) and getattr(value, "ndim", 0) == 0
    if not whole or (isinstance(value, Tensor) and (value.dtype in FLOATING or value.dtype == torch.bool)):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    try:
        return operator.index(value)  # type: ignore[arg-type]
    except TypeError as error:
        raise TypeError(f"{name} must be an int, got {type(value).__name__}") from error


def positive_int(name: str, value: object) -> int:
    """Return `value` if it is an int of at least 1."""
    # Many a caller keeps what was given and writes it to a file as JSON, which knows no numbers of NumPy's.
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
    if isinstance(value, str) or not isinstance(value, Sequence):
        try:
            side = integer(name, value)
        except TypeError:
            raise TypeError(f"{name} must be an int or a pair (H, W), got {type(value).__name__}") from None
        value = (side, side)
    if len(value) != 2:
        raise ValueError(f"{name} must be an int or a pair (H, W), got {tuple(value)!r}")
    height, width = (positive_int(f"{name}[{axis}]", integer(name, side)) for axis, side in enumerate(value))
    if max(height, width) > MOST_PIXELS:
        raise ValueError(f"{name} must be at most {MOST_PIXELS} along each side, got {(height, width)}")
    return height, width


def is_transformed(value: Tensor) -> bool:
    """Whether torch.func (vmap, grad, jvp) is looking through this tensor."""
    return bool(torch._C._functorch.is_functorch_wrapped_tensor(value))


def has_tangent(value: Tensor) -> bool:
    """Whether forward-mode differentiation follows this tensor."""
    return forward_ad.unpack_dual(value).tangent is not None  # type: ignore[no-untyped-call]


def names(name: str, value: object) -> tuple[str, ...]:
    """Return `value` as a tuple if it is a sequence of strings, and not one string."""
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise TypeError(f"{name} must be a sequence of str, got {type(value).__name__}")
    for index, item in enumerate(value):
        if not isinstance(item, str):
            raise TypeError(f"{name}[{index}] must be a str, got {type(item).__name__}")
    return tuple(value)


def has_values(value: Tensor) -> bool:
    """Whether there are numbers to look at, and not a tensor's shape alone."""
    return not value.is_meta and not isinstance(value, FakeTensor)


def on_device(name: str, value: Tensor, like: Tensor, *, of: str) -> None:
    """Raise unless two tensors lie on one device: beside a meta tensor, which has no values, torch makes up results."""
    if value.device != like.device:
        raise ValueError(f"{name} must be on the device of {of}, {like.device}, got {value.device}")


def moved(name: str, value: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Return `value` on another device, and as another dtype."""
    if value.is_meta and device.type != "meta":
        raise ValueError(f"{name} must hold values, got a tensor on the device meta, which holds none")
    return value.to(device=device, dtype=dtype)


def class_number(name: str, value: object, class_names: Sequence[str], num_classes: int) -> int:
    """Return the number of a class that is given by its name, its number, or its number in words of digits."""
    if isinstance(value, str):
        if value in class_names:
            return list(class_names).index(value)
        found = int(value) if value.isdecimal() and len(value) < 10 else -1
    else:
        try:
            found = integer(name, value)
        except TypeError:
            raise TypeError(f"{name} must be the name or the number of a class, got {type(value).__name__}") from None
    if not 0 <= found < num_classes:
        if class_names:
            known = f"one of the classes ({', '.join(class_names)}) or its number"
        else:
            known = f"the number of a class below {num_classes}"
        raise ValueError(f"{name} must be {known}, got {value!r}")
    return found


def class_indices(
    name: str,
    value: object,
    *,
    batch: int,
    num_classes: int,
    device: torch.device,
    look: bool = True,
    class_names: Sequence[str] | None = None,
) -> Tensor:
    """Return class indices as an int64 tensor (B,) or (B, n) on `device`; one number stands for the whole batch.

    `look`: whether a tensor's values are checked, too. `class_names`: where classes may be called by their names.
    """
    if class_names is not None and isinstance(value, str):
        value = class_number(name, value, class_names, num_classes)
    if isinstance(value, Sequence) and not isinstance(value, str):
        numbers = []
        for index, item in enumerate(value):
            if class_names is not None and isinstance(item, str):
                numbers.append(class_number(f"{name}[{index}]", item, class_names, num_classes))
            else:
                numbers.append(integer(f"{name}[{index}]", item))
        value = torch.tensor(numbers)
    if not isinstance(value, Tensor):
        try:
            found = integer(name, value)
        except TypeError:
            accepted = "an int, ints, an integer tensor" + (" or names of classes" if class_names is not None else "")
            raise TypeError(f"{name} must be {accepted}, got {type(value).__name__}") from None
        if not 0 <= found < num_classes:
            raise ValueError(f"{name} must lie in [0, {num_classes - 1}], got {found}")
        return torch.full((batch,), found, dtype=torch.int64, device=device)
    if value.is_floating_point() or value.is_complex() or value.dtype == torch.bool:
        raise TypeError(f"{name} must be of an integer dtype, got {value.dtype}")
    if value.ndim == 0:
        value = value.expand(batch)
    if value.ndim not in (1, 2) or value.shape[0] != batch or 0 in value.shape[1:]:
        raise ValueError(f"{name} must have shape ({batch},) or ({batch}, n), n >= 1, got {tuple(value.shape)}")
    # An index out of range would be a device-side assertion on an accelerator, which ends the process's use of it.
    # While torch traces, there are no values to look at.
    traced = torch.compiler.is_compiling() or is_transformed(value) or not has_values(value)
    if look and not traced and value.numel():
        low, high = (int(extreme) for extreme in value.aminmax())
        if low < 0 or high >= num_classes:
            raise ValueError(f"{name} must lie in [0, {num_classes - 1}], got values from {low} to {high}")
    return moved(name, value, device, torch.int64)


def chosen_layers(layers: int | Sequence[int] | Literal["all"], available: int) -> list[int]:
    """Indices of the layers that `layers` means: how many of the first ones, their indices, or "all"."""
    if isinstance(layers, str):
        choice("layers", layers, ("all",))
        return list(range(available))
    try:
        if not isinstance(layers, Sequence):
            return list(range(min(positive_int("layers", integer("layers", layers)), available)))
        chosen = [integer("layers", index) for index in layers]
    except TypeError:
        raise TypeError(f"layers must be an int, a sequence of ints or 'all', got {layers!r}") from None
    if not chosen or not all(-available <= index < available for index in chosen):
        raise ValueError(f"layers must name layers in [0, {available - 1}], got {chosen}")
    return [index % available for index in chosen]
