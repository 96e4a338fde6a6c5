"""What an explanation holds, how it is weighed anew, and how it is kept in a file.

Letters: B batch, n targets per sample, K classes, L layers, h_l x w_l layer size, H x W map size.

What another method than MHEX found is held in the same form: one layer, whose positive and negative parts are those of
its signed map. With `normalize` off and beta 1 the saliency is that map, sign and scale as the method gave them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, BinaryIO, Self

import numpy as np
import torch
from torch import Tensor

from mhex_core import _checks
from mhex_core.files import read_arrays, write_atomically
from mhex_core.options import SaliencyOptions
from mhex_core.saliency import SignedMaps, check_maps, combine_maps

FORMAT = "mhex-explanation"
FORMAT_VERSION = 1

_TEXTS = ("layer_names", "class_names", "method")  # what stands in the header beside the options
_MESSAGE_WIDTH = 300  # characters of an error's cause

_LEEWAY = 1e-3  # half precision does not sum to 1


class NotFiniteError(ValueError):
    """Something in an explanation is NaN or infinite.

    Attributes:
        samples: bool (B,), which samples have it.
    """

    def __init__(self, message: str, samples: Tensor) -> None:
        super().__init__(message)
        self.samples = samples


@dataclass(frozen=True, kw_only=True, eq=False)
class Explanation:
    """Predictions of a batch together with the evidence for them.

    Attributes:
        saliency: (B, H, W), or (B, n, H, W) with several targets; in [0, 1] unless `options.normalize` is off.
        target: (B,) or (B, n), the classes explained.
        probabilities: (B, K).
        head_logits: (L, B, K), of each head, shallow to deep.
        positive: L tensors (B, h_l, w_l) or (B, n, h_l, w_l): evidence for the target, at the layer's resolution.
        negative: The same for evidence against it.
        options: The settings `saliency` was made with.
        layer_names: L names, shallow to deep.
        class_names: K names, or empty where none are known.
        method: What made it: "mhex", or another method's name with its options.
    """

    saliency: Tensor
    target: Tensor
    probabilities: Tensor
    head_logits: Tensor
    positive: tuple[Tensor, ...]
    negative: tuple[Tensor, ...]
    options: SaliencyOptions
    layer_names: tuple[str, ...]
    class_names: tuple[str, ...] = ()
    method: str = "mhex"

    def __post_init__(self) -> None:
        set_field = object.__setattr__
        if not isinstance(self.options, SaliencyOptions):
            raise TypeError(f"options must be SaliencyOptions, got {type(self.options).__name__}")
        if not isinstance(self.method, str):
            raise TypeError(f"method must be a str, got {type(self.method).__name__}")
        for name in ("layer_names", "class_names"):
            set_field(self, name, _checks.names(name, getattr(self, name)))
        samples = _checks.tensor("saliency", self.saliency, ndim=(3, 4)).shape[:-2]
        batch = samples[0]
        classes = _checks.tensor("probabilities", self.probabilities, ndim=2).shape[1]
        if self.probabilities.shape[0] != batch or classes < 1:
            raise ValueError(f"probabilities must have shape ({batch}, K), got {tuple(self.probabilities.shape)}")
        if self.class_names and len(self.class_names) != classes:
            raise ValueError(f"class_names must hold a name for each of {classes} classes, got {len(self.class_names)}")
        self._check_layers(batch, samples, classes)
        target = _checks.tensor("target", self.target, ndim=(1, 2), floating=False)
        if target.shape != samples:
            raise ValueError(f"target must have shape {tuple(samples)}, as saliency has it, got {tuple(target.shape)}")
        target = _checks.class_indices("target", target, batch=batch, num_classes=classes, device=target.device)
        set_field(self, "target", target)
        self._check_values()

    def _check_layers(self, batch: int, samples: Sequence[int], classes: int) -> None:
        """Raise unless layers, their names, their weights and their heads are as many."""
        for name in ("positive", "negative"):
            object.__setattr__(self, name, _checks.tensors(name, getattr(self, name), ndim=(3, 4)))
        check_maps(self.positive, self.negative)
        if self.positive[0].shape[:-2] != samples:
            raise ValueError(
                f"positive[0] must have shape ({', '.join(map(str, samples))}, h, w), as saliency has it, "
                f"got {tuple(self.positive[0].shape)}"
            )
        count = len(self.positive)
        if len(self.layer_names) != count:
            raise ValueError(f"layer_names must hold a name for each of {count} layers, got {len(self.layer_names)}")
        self.options.weights_of(count)
        heads = _checks.tensor("head_logits", self.head_logits, ndim=3)
        if heads.shape[0] not in (0, count) or heads.shape[1:] != (batch, classes):
            raise ValueError(f"head_logits must have shape ({count}, {batch}, {classes}), got {tuple(heads.shape)}")

    def _check_values(self) -> None:
        """Raise unless all numbers are finite and probabilities are some."""
        given = {name: value for name, value in self._tensors().items() if name not in ("target", "images")}
        named = [
            entry
            for name, value in given.items()
            for entry in ([(name, value)] if isinstance(value, Tensor) else _numbered(name, value))
            if _checks.has_values(entry[1])
        ]
        if not named:
            return
        # One look at all of them: each waits for an accelerator.
        probabilities = self.probabilities
        sound = [value.isfinite().all() for _, value in named]
        sound.append(((probabilities >= -_LEEWAY) & (probabilities <= 1 + _LEEWAY)).all())
        *finite, within = torch.stack([flag.to(probabilities.device) for flag in sound]).tolist()
        for (name, _), fine in zip(named, finite, strict=True):
            if not fine:
                raise NotFiniteError(
                    f"{name} by {self.method} must be finite, got NaN or infinity: look for it in network and input",
                    torch.stack([self._infinite(*entry).to(probabilities.device) for entry in named]).any(dim=0),
                )
        if not within:
            low, high = probabilities.min(), probabilities.max()
            raise ValueError(f"probabilities must lie in [0, 1], got values from {low:g} to {high:g}")

    def _infinite(self, name: str, value: Tensor) -> Tensor:
        """Which samples have NaN or infinity there, (B,)."""
        by_sample = value.transpose(0, 1) if name == "head_logits" else value
        return ~by_sample.reshape(len(self), -1).isfinite().all(dim=1)

    def __len__(self) -> int:
        return self.saliency.shape[0]

    def __getitem__(self, index: int | slice | Sequence[int] | Tensor) -> Self:
        """One sample (still a batch, of one), a slice of the batch, or those samples that a list or a mask names."""
        places = index if isinstance(index, slice) else self._places(index)

        def cut(name: str, value: Tensor) -> Tensor:
            return value[:, places] if name == "head_logits" else value[places]

        return self._map(cut)

    def _places(self, index: int | Sequence[int] | Tensor) -> slice | Tensor:
        """What cuts those samples out of a tensor: a slice for one of them, else int64 (n,)."""
        count = len(self)
        listed = index.tolist() if isinstance(index, Tensor | np.ndarray) else index
        if isinstance(listed, list) and listed and all(isinstance(chosen, bool) for chosen in listed):
            if len(listed) != count:
                raise IndexError(f"index must be a mask of {count} bools, one per sample, got {len(listed)}")
            listed = [place for place, chosen in enumerate(listed) if chosen]
        try:
            places = [_checks.integer("index", place) for place in (listed if isinstance(listed, list) else [listed])]
        except TypeError:
            raise TypeError(
                f"index must be an int, a slice, or a list or tensor of ints or of bools, got {index!r}"
            ) from None
        for place in places:
            if not -count <= place < count:
                raise IndexError(f"index must lie in [{-count}, {count - 1}], got {place}")
        places = [place % count for place in places]
        if not isinstance(listed, list):
            return slice(places[0], places[0] + 1)
        return torch.tensor(places, dtype=torch.int64, device=self.saliency.device)

    @classmethod
    def of_maps(
        cls,
        maps: Tensor,
        target: Tensor,
        probabilities: Tensor,
        *,
        method: str,
        class_names: Sequence[str] = (),
        **more: Any,
    ) -> Self:
        """The maps of another method, as they are.

        Args:
            maps: (B, H, W) or (B, n, H, W), of any sign and range.
            target: (B,) or (B, n), the classes explained.
            probabilities: (B, K).
            method: Its name.
            class_names: K names, or none.
            **more: Fields of a subclass.
        """
        return cls(
            saliency=maps,
            target=target,
            probabilities=probabilities,
            head_logits=probabilities.new_zeros(0, *probabilities.shape),
            positive=(maps.clamp(min=0),),
            negative=(maps.clamp(max=0),),
            options=SaliencyOptions(beta=1.0, normalize=False),
            layer_names=(method,),
            class_names=_checks.names("class_names", class_names),
            method=method,
            **more,
        )

    @classmethod
    def concatenate(cls, parts: Sequence[Self]) -> Self:
        """One explanation of all samples, in order.

        Args:
            parts: Explanations by one model with one set of options.

        Raises:
            ValueError: There are none, or their options, layers, map sizes or numbers of targets differ.
        """
        if not parts:
            raise ValueError("parts must hold at least one explanation, got none")
        first = parts[0]
        for part in parts[1:]:
            for name in ("method", "options", "layer_names", "class_names"):
                if getattr(part, name) != getattr(first, name):
                    raise ValueError(
                        f"parts must share their {name}, got {getattr(first, name)} and {getattr(part, name)}"
                    )
            if part.saliency.shape[1:] != first.saliency.shape[1:]:
                raise ValueError(
                    f"parts must share their map shape, got {tuple(first.saliency.shape[1:])} "
                    f"and {tuple(part.saliency.shape[1:])}"
                )
        held = [part._tensors() for part in parts]
        # What only some parts carry (the images, say) the whole does not.
        shared = [name for name in held[0] if all(name in part for part in held)]
        joined: dict[str, Any] = dict.fromkeys(held[0].keys() - set(shared))
        for name in shared:
            values = [part[name] for part in held]
            axis = 1 if name == "head_logits" else 0
            if isinstance(values[0], Tensor):
                joined[name] = torch.cat([value for value in values if isinstance(value, Tensor)], dim=axis)
            else:
                joined[name] = tuple(torch.cat(layers) for layers in zip(*values, strict=True))
        return replace(first, **joined)

    @property
    def size(self) -> tuple[int, int]:
        """(H, W) of the saliency maps, in pixels."""
        height, width = self.saliency.shape[-2:]
        return height, width

    @property
    def prediction(self) -> Tensor:
        """(B,), the class of the highest probability."""
        return self.probabilities.argmax(dim=1)

    @property
    def signed(self) -> bool:
        """Whether evidence against the target shows: some value of a map that was not brought to [0, 1] is negative."""
        return not self.options.normalize and bool((self.saliency < 0).any())

    @property
    def layer_weights(self) -> tuple[float, ...]:
        """lambda_1 .. lambda_L as used."""
        return self.options.weights_of(len(self.positive))

    def reweighted(self, *, beta: float | None = None, layer_weights: Sequence[float] | Tensor | None = None) -> Self:
        """The same explanation with another beta or other layer weights, without the model.

        Args:
            beta: In [0, 1]; None keeps it.
            layer_weights: L numbers; None keeps them.
        """
        options = replace(
            self.options,
            beta=self.options.beta if beta is None else beta,
            layer_weights=self.options.layer_weights if layer_weights is None else layer_weights,
        )
        return replace(self, options=options, saliency=self._combined(options))

    def layer_saliency(self) -> Tensor:
        """Each layer's map alone, with the explanation's beta: (L, *saliency.shape), shallow to deep."""
        alone = replace(self.options, layer_weights=(1.0,))
        layers = zip(self.positive, self.negative, strict=True)
        return torch.stack(
            [combine_maps(SignedMaps((plus,), (minus,)), size=self.size, options=alone) for plus, minus in layers]
        )

    def to(self, device: torch.device | str) -> Self:
        """A copy on another device."""
        return self._map(lambda _, value: value.to(device))

    def save(self, path: str | Path) -> Path:
        """Write everything to one file (a NumPy .npz archive); an interrupted write leaves nothing behind.

        Half-precision tensors, which NumPy does not know all of, are kept as float32.

        Returns:
            The path written.
        """
        arrays: dict[str, np.ndarray[Any, Any]] = {}
        for name, value in self._tensors().items():
            for key, item in [(name, value)] if isinstance(value, Tensor) else _numbered(name, value):
                item = item.detach().cpu()
                arrays[key] = (item.float() if item.dtype in (torch.float16, torch.bfloat16) else item).numpy()
        header = {
            "format": FORMAT,
            "version": FORMAT_VERSION,
            "options": asdict(self.options),
            **{name: getattr(self, name) for name in _TEXTS},
        }
        arrays["header"] = np.frombuffer(json.dumps(header, allow_nan=False).encode(), dtype=np.uint8)

        def write(temporary: Path) -> None:
            with temporary.open("wb") as file:  # by name, numpy would add an ending
                np.savez_compressed(file, allow_pickle=False, **arrays)

        return write_atomically(path, write)

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read what `save` wrote. Nothing is unpickled.

        Raises:
            FileNotFoundError: There is no such file.
            ValueError: The file is damaged, or not an explanation.
        """
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"path must name a saved explanation, and there is no file {path}")
        # Opened here: numpy forgets to close a file that turns out to be no archive; and a file that may not be read is
        # not a damaged one.
        with path.open("rb") as file:
            return cls._read(file, path)

    @classmethod
    def _read(cls, file: BinaryIO, path: Path) -> Self:
        try:
            arrays = read_arrays(file)
            header = json.loads(arrays.pop("header").tobytes(), parse_constant=_refuse_constant)
            if header["format"] != FORMAT or header["version"] != FORMAT_VERSION:
                raise ValueError(f"format {header['format']!r}, version {header['version']!r}")
            return cls._rebuild(arrays, header)
        except MemoryError:
            raise
        # Of whatever class: there are many ways to be damaged, and as many that the libraries tell of it.
        except Exception as error:
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:_MESSAGE_WIDTH]
            raise ValueError(
                f"path must name a saved explanation; {path} is damaged or something else ({reason})"
            ) from error

    @classmethod
    def _rebuild(cls, arrays: Mapping[str, np.ndarray[Any, Any]], header: Mapping[str, Any]) -> Self:
        expected = {"format", "version", "options", *_TEXTS}
        settings = {field.name for field in fields(SaliencyOptions)}
        for name, wanted, given in (("header", expected, header), ("options", settings, header.get("options", {}))):
            if given.keys() != wanted:
                raise ValueError(f"{name} must hold {sorted(wanted)}, got {sorted(given)}")
        values: dict[str, Any] = {"options": SaliencyOptions(**header["options"])}
        for field in fields(cls):
            name = field.name
            if name in arrays:
                values[name] = torch.from_numpy(arrays[name])
            elif f"{name}.0" in arrays:
                count = sum(key.startswith(f"{name}.") for key in arrays)
                values[name] = tuple(torch.from_numpy(arrays[f"{name}.{index}"]) for index in range(count))
            elif name in _TEXTS:
                values[name] = header[name]
        return cls(**values)

    def _combined(self, options: SaliencyOptions) -> Tensor:
        return combine_maps(SignedMaps(self.positive, self.negative), size=self.size, options=options)

    def _tensors(self) -> dict[str, Tensor | tuple[Tensor, ...]]:
        """The fields that hold tensors, by name; a subclass's fields are found as well."""
        found: dict[str, Tensor | tuple[Tensor, ...]] = {}
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Tensor) or (isinstance(value, tuple) and value and isinstance(value[0], Tensor)):
                found[field.name] = value
        return found

    def _map(self, change: Callable[[str, Tensor], Tensor]) -> Self:
        changed: dict[str, Any] = {
            name: change(name, value) if isinstance(value, Tensor) else tuple(change(name, item) for item in value)
            for name, value in self._tensors().items()
        }
        return replace(self, **changed)


def _numbered(name: str, values: Sequence[Tensor]) -> list[tuple[str, Tensor]]:
    return [(f"{name}.{index}", value) for index, value in enumerate(values)]


def _refuse_constant(constant: str) -> None:
    raise ValueError(f"numbers must be finite, got {constant}")
