"""Weights in safetensors files: read, compared with what the network expects, sealed, bounded. None is unpickled."""

from __future__ import annotations

import hashlib
import json
import math
import threading
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as hooks

from mhex_core.files import write_atomically

SEAL = "sha256"
"""The key of config.json under which digests of its other settings and of the weights stand."""

MOST_LAYERS = 256
"""Of a network that is named by a text. The deepest ones published have half as many, and each takes time to build."""

# Of each kind a file may hold several times what the network that it belongs to has of it: classifiers that were
# dropped, poolers, tables that are computed.
_ROOM, _SLACK = 4, {"values": 16_000_000, "tensors": 1000}
_FOREIGN = {
    "mhex_vision_format": "an image classifier with blocks, which mhex-vision reads",
    "mhex_vision_plain_format": "an image classifier without blocks, which mhex-vision reads",
    "model_type": "a model of transformers, which mhex-text reads if it classifies texts",
}


def read_weights(*paths: Path) -> dict[str, Tensor]:
    """Read safetensors files.

    Raises:
        FileNotFoundError: One is missing.
        ValueError: One is damaged, truncated or something else, or a tensor lies in two of them.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    found: dict[str, Tensor] = {}
    for path in paths:
        if not path.is_file():
            raise FileNotFoundError(f"{path.parent} is no checkpoint: {path.name} is missing")
        try:
            tensors: dict[str, Tensor] = load_file(path)
        # Types of tensors that this version of torch cannot hold are a KeyError or an AttributeError there.
        except (SafetensorError, ValueError, OSError, KeyError, AttributeError, RuntimeError) as error:
            reason = " ".join(str(error).split())[:300]
            raise ValueError(f"{path} is damaged, truncated or no safetensors file ({reason})") from error
        twice = found.keys() & tensors.keys()
        if twice:
            raise ValueError(f"{path} holds {min(twice)}, which another file of the same checkpoint holds as well")
        found |= tensors
    return found


def check_weights(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor], where: str) -> None:
    """Compare what a file holds with what a network expects.

    Args:
        found: Of the file.
        wanted: The network's own, of the same names and shapes. Half precision may stand for single, and the reverse.
        where: The file, as messages call it.

    Raises:
        ValueError: A tensor is missing, unexpected, of another shape or another kind of numbers, or not finite.
    """
    both = sorted(found.keys() & wanted.keys())
    refuse("lacks", wanted.keys() - found.keys(), where)
    refuse("has unknown", found.keys() - wanted.keys(), where)
    refuse("has another shape for", (name for name in both if found[name].shape != wanted[name].shape), where)
    refuse("has other numbers for", (name for name in both if unlike(found[name], wanted[name])), where, found)
    check_finite(found, where)


def check_finite(tensors: Mapping[str, Tensor], where: str) -> None:
    """Refuse weights of which a network computes nothing but NaN.

    Raises:
        ValueError: A number is NaN or infinite.
    """
    for name, tensor in tensors.items():
        # The extremes are NaN if anything is, and need no tensor of their own.
        extremes = tensor.detach().aminmax() if tensor.is_floating_point() and tensor.numel() else ()
        if not all(math.isfinite(float(extreme)) for extreme in extremes):
            raise ValueError(
                f"{where} is damaged, or of a training that diverged: not all numbers of {name} are finite"
            )


def refuse(problem: str, names: Iterable[str], where: str, of: Mapping[str, Tensor] | None = None) -> None:
    """Raise if there are such names: ValueError with the first of them, and their types if `of` is given."""
    listed = sorted(names)
    if listed:
        shown = ", ".join(name if of is None else f"{name} ({of[name].dtype})" for name in listed[:3])
        more = f" and {len(listed) - 3} more" if len(listed) > 3 else ""
        raise ValueError(f"{where} belongs to another network: it {problem} {shown}{more}")


def unlike(found: Tensor, wanted: Tensor) -> bool:
    """Whether numbers of a file are not of the kind that a network has there: half precision is, integers are not."""
    # Numbers of one byte are scaled by something that is not in the file.
    fractions = found.is_floating_point() and wanted.is_floating_point() and found.element_size() > 1
    return found.dtype != wanted.dtype and not fractions


def weights_digest(tensors: Mapping[str, Tensor]) -> str:
    """What tells the tensors of two networks or files apart: their names, types, shapes and bits, in any order."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\n".encode("utf-8", "backslashreplace"))
        digest.update(tensor.detach().contiguous().cpu().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def sealed(settings: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """The settings of config.json with digests of themselves and of the weights that they are written with."""
    own = {name: value for name, value in settings.items() if name != SEAL}
    return {**own, SEAL: {"settings": _settings_digest(own), "weights": weights_digest(tensors)}}


def seal(config: Path, *weights: Path) -> None:
    """Put the digests into a config.json that another library wrote."""
    text = json.dumps(sealed(json.loads(config.read_text("utf-8")), read_weights(*weights)), indent=2, sort_keys=True)
    write_atomically(config, lambda temporary: temporary.write_text(f"{text}\n", "utf-8"))


def check_seal(settings: Mapping[str, Any], tensors: Mapping[str, Tensor], where: Path) -> None:
    """Compare config.json and the weights with the digests that were written with them, if any were.

    Settings that somebody changed are one warning, since they may be changed by hand.

    Args:
        settings: What config.json holds.
        tensors: What the weights hold.
        where: The file config.json.

    Raises:
        ValueError: These are other weights than those that were saved.
    """
    if SEAL not in settings:
        return
    known = settings[SEAL]
    if not isinstance(known, Mapping) or known.get("weights") != weights_digest(tensors):
        raise ValueError(
            f"{where}: the weights beside it are not those that were saved with it (their {SEAL} is another); if you "
            f'exchanged them yourself, remove "{SEAL}" from the file'
        )
    if known.get("settings") != _settings_digest({name: value for name, value in settings.items() if name != SEAL}):
        message = f'{where} was changed after it was saved; if that was you, remove "{SEAL}" from the file'
        warnings.warn(message, stacklevel=2)


def _settings_digest(settings: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def read_settings(path: Path) -> dict[str, Any]:
    """The settings that a config.json holds.

    Raises:
        FileNotFoundError: It is missing.
        ValueError: It is no JSON, or no mapping.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path.parent} is no checkpoint: {path.name} is missing")
    try:
        values: Any = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} cannot be used: not JSON ({error})") from error
    if not isinstance(values, dict):
        kind = type(values).__name__
        raise ValueError(f"{path} cannot be used: not a mapping of settings, got {kind}")  # noqa: TRY004 - of a file
    return values


def kind_of(settings: Mapping[str, Any]) -> str:
    """What a checkpoint with this config.json is, for a message of whoever expected another."""
    return next((what for key, what in _FOREIGN.items() if key in settings), "no checkpoint of this library")


@contextmanager
def no_larger_than(tensors: Mapping[str, Any]) -> Iterator[None]:
    """Building a network that these weights cannot fill raises before its memory is used.

    Settings say how large a network is, and settings that somebody else wrote may say anything.

    Args:
        tensors: Of the file; anything with a shape.

    Raises:
        ValueError: What is built is several times as large.
    """
    most = {
        "values": _ROOM * sum(math.prod(tensor.shape) for tensor in tensors.values()) + _SLACK["values"],
        "tensors": _ROOM * len(tensors) + _SLACK["tensors"],
    }
    built = dict.fromkeys(most, 0)
    thread = threading.get_ident()

    def count(_: nn.Module, name: str, tensor: Tensor | None) -> None:
        if tensor is None or threading.get_ident() != thread:
            return
        built["values"] += tensor.numel()
        built["tensors"] += 1
        for kind, count in built.items():
            if count > most[kind]:
                raise ValueError(f"the network is larger than its weights: {count} {kind} and more, at {name}")

    handles = [
        hooks.register_module_parameter_registration_hook(count),
        hooks.register_module_buffer_registration_hook(count),
    ]
    try:
        yield
    except RuntimeError as error:  # a single tensor for which there is not even an address
        if "alloc" not in str(error) and "overflow" not in str(error):
            raise
        raise ValueError(f"the network is larger than its weights: {' '.join(str(error).split())[:200]}") from error
    finally:
        for handle in handles:
            handle.remove()
