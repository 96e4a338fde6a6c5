"""What an explanation holds, how it is weighed anew, and how it is kept in a file.

Letters: B batch, n targets per sample, K classes, L layers, h_l x w_l layer size, H x W map size.

What another method than MHEX found is held in the same form: one layer, whose positive and negative parts are those of
its signed map. With `normalize` off and beta 1 the saliency is that map, sign and scale as the method gave them.
"""

from __future__ import annotations

import json
import operator
import zipfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, BinaryIO, Self

import numpy as np
import torch
from torch import Tensor

from mhex_core.files import write_atomically
from mhex_core.options import SaliencyOptions
from mhex_core.saliency import SignedMaps, combine_maps

FORMAT = "mhex-explanation"
FORMAT_VERSION = 1

# What reading a damaged archive, or a file of another kind, is known to raise. RuntimeError: a flipped bit may say that
# a member is encrypted, or compressed by a method unheard of.
_DAMAGE = (
    ValueError,
    KeyError,
    TypeError,
    EOFError,
    OSError,
    AttributeError,
    RuntimeError,
    zipfile.BadZipFile,
    zlib.error,
)


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
        for name in ("probabilities", "saliency"):
            value = getattr(self, name)
            if not (value.is_meta or bool(value.isfinite().all())):
                raise ValueError(
                    f"{name} by {self.method} must be finite, got NaN or infinity: look for it in network and input"
                )

    def __len__(self) -> int:
        return self.saliency.shape[0]

    def __getitem__(self, index: int | slice) -> Self:
        """One sample (still a batch, of one) or a slice of the batch."""
        if not isinstance(index, slice):
            index = operator.index(index)
            if not -len(self) <= index < len(self):
                raise IndexError(f"index must lie in [{-len(self)}, {len(self) - 1}], got {index}")
            index %= len(self)
            index = slice(index, index + 1)

        def cut(name: str, value: Tensor) -> Tensor:
            return value[:, index] if name == "head_logits" else value[index]

        return self._map(cut)

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
            class_names=tuple(class_names),
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
        count = len(self.positive)
        one_hot = np.eye(count).tolist()
        return torch.stack(
            [self._combined(replace(self.options, layer_weights=one_hot[layer])) for layer in range(count)]
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
        header = {"format": FORMAT, "version": FORMAT_VERSION, "options": asdict(self.options), **self._texts()}
        arrays["header"] = np.frombuffer(json.dumps(header).encode(), dtype=np.uint8)

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
            with np.load(file, allow_pickle=False) as archive:
                arrays = {name: archive[name] for name in archive.files}
            header = json.loads(arrays.pop("header").tobytes())
            if header["format"] != FORMAT or header["version"] != FORMAT_VERSION:
                raise ValueError(f"format {header['format']!r}, version {header['version']!r}")
            return cls._rebuild(arrays, header)
        except _DAMAGE as error:
            raise ValueError(
                f"path must name a saved explanation; {path} is damaged or something else ({error})"
            ) from error

    @classmethod
    def _rebuild(cls, arrays: Mapping[str, np.ndarray[Any, Any]], header: Mapping[str, Any]) -> Self:
        values: dict[str, Any] = {"options": SaliencyOptions(**header["options"])}
        for field in fields(cls):
            name = field.name
            if name in arrays:
                values[name] = torch.from_numpy(arrays[name])
            elif f"{name}.0" in arrays:
                count = sum(key.startswith(f"{name}.") for key in arrays)
                values[name] = tuple(torch.from_numpy(arrays[f"{name}.{index}"]) for index in range(count))
            elif name in header and name != "options":
                values[name] = header[name] if isinstance(header[name], str) else tuple(header[name])
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

    def _texts(self) -> dict[str, str | tuple[str, ...]]:
        return {"layer_names": self.layer_names, "class_names": self.class_names, "method": self.method}

    def _map(self, change: Callable[[str, Tensor], Tensor]) -> Self:
        changed: dict[str, Any] = {
            name: change(name, value) if isinstance(value, Tensor) else tuple(change(name, item) for item in value)
            for name, value in self._tensors().items()
        }
        return replace(self, **changed)


def _numbered(name: str, values: Sequence[Tensor]) -> list[tuple[str, Tensor]]:
    return [(f"{name}.{index}", value) for index, value in enumerate(values)]
