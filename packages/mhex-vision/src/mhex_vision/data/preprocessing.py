"""From an image file, of whatever kind, to the tensor a network sees, and back."""

import struct
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from mhex_vision.data._checks import check_int

__all__ = ["IMAGENET_MEAN", "IMAGENET_STD", "Preprocessing", "UnreadableImageError", "read_rgb"]

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

Resize = Literal["stretch", "crop"]
Triple = tuple[float, float, float]

# Of means and standard deviations, so that no pixel leaves the range of single precision, and of an image's side, whose
# memory a configuration from elsewhere decides on.
_LARGEST, _LARGEST_SIDE = 1e6, 8192

# The crop keeps the proportion that ImageNet evaluation made customary: short side 256, centre square 224.
_CROP_NUMERATOR, _CROP_DENOMINATOR = 256, 224

# What Pillow's decoders are known to raise on damaged input; they do not agree on one class.
_DECODER_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    LookupError,
    EOFError,
    ArithmeticError,
    NotImplementedError,
    MemoryError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
    Image.DecompressionBombWarning,  # only raised where warnings are errors
)


class UnreadableImageError(ValueError):
    """An image cannot be decoded; the message is one line with its path and the reason."""


def read_rgb(source: str | Path | Image.Image) -> Image.Image:
    """Read an image, at its own size, as 8-bit RGB the right way up.

    Transparency is composited on white; 16-bit grey is scaled from its full range; of several frames the first counts;
    an EXIF orientation is applied.

    Args:
        source: A path, or an image already opened with Pillow (left as it is).

    Raises:
        UnreadableImageError: The file is missing, empty, damaged, too large to be safe, or no image.
        TypeError: ``source`` is neither a path nor a Pillow image.
    """
    if isinstance(source, Image.Image):
        name = str(getattr(source, "filename", "") or "image")
        try:
            return _to_rgb(source)
        except _DECODER_ERRORS as error:
            raise UnreadableImageError(f"{name}: {_reason(error)}") from error
    if not isinstance(source, str | Path):
        raise TypeError(f"source: expected a path or a PIL image, got {type(source).__name__}")
    path = Path(source)
    try:
        if path.is_file() and path.stat().st_size == 0:
            raise UnreadableImageError(f"{path}: the file is empty")
        with Image.open(path) as image:
            return _to_rgb(image)
    except UnreadableImageError:
        raise
    except _DECODER_ERRORS as error:
        raise UnreadableImageError(f"{path}: {_reason(error)}") from error


def _reason(error: BaseException) -> str:
    if isinstance(error, UnidentifiedImageError):
        return "not an image in a known format"
    if isinstance(error, Image.DecompressionBombError | Image.DecompressionBombWarning):
        return f"refused as a possible decompression bomb ({_one_line(error)})"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror[0].lower() + error.strerror[1:]
    return f"cannot be decoded ({_one_line(error) or type(error).__name__})"


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())


def _to_rgb(image: Image.Image) -> Image.Image:
    image.load()
    image = _upright(image)
    if image.mode.startswith("I"):
        return _from_integers(image)
    if image.mode == "F":
        return _from_floats(image)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def _upright(image: Image.Image) -> Image.Image:
    try:
        turned = ImageOps.exif_transpose(image)
    except _DECODER_ERRORS:
        # The pixels were decoded already; metadata too broken to be parsed is no reason to lose them.
        return image
    return image if turned is None else turned


def _from_integers(image: Image.Image) -> Image.Image:
    # Pillow's own conversion clips at 255, which turns a 16-bit radiograph white.
    values = np.asarray(image).astype(np.int64)
    low, high = int(values.min()), int(values.max())
    if low < 0 or high > 65535:
        raise ValueError(f"integer values from {low} to {high}, expected 0 to 65535")
    return Image.fromarray(((values + 128) // 257).astype(np.uint8)).convert("RGB")


def _from_floats(image: Image.Image) -> Image.Image:
    values = np.asarray(image)
    low, high = float(values.min()), float(values.max())
    if not (low >= 0.0 and high <= 1.0):  # written so that NaN fails
        raise ValueError(f"floating-point values from {low:g} to {high:g}, expected 0 to 1")
    return Image.fromarray(np.rint(values * 255.0).astype(np.uint8)).convert("RGB")


@dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """How images become network input: size, then normalisation.

    It is stored with a trained network, so that the network meets later images as it met those it learnt from.

    Attributes:
        size: Side of the square the network sees, in pixels.
        mean: Per-channel mean subtracted, on the scale 0 to 1.
        std: Per-channel divisor, on the scale 0 to 1.
        resize: ``"stretch"`` brings the whole image to the square; ``"crop"`` brings the short side to
            ``size * 256 / 224`` and takes the centre.
    """

    size: int
    mean: Triple = (0.5, 0.5, 0.5)
    std: Triple = (0.5, 0.5, 0.5)
    resize: Resize = "stretch"

    def __post_init__(self) -> None:
        if check_int("size", self.size, minimum=1) > _LARGEST_SIDE:
            raise ValueError(f"size: expected an integer of at most {_LARGEST_SIDE}, got {self.size}")
        # Integers and lists from JSON become floats and tuples, so that equal settings compare equal.
        object.__setattr__(self, "mean", _triple("mean", self.mean, positive=False))
        object.__setattr__(self, "std", _triple("std", self.std, positive=True))
        if not isinstance(self.resize, str):
            raise TypeError(f"resize: expected one of {get_args(Resize)}, got {self.resize!r}")
        if self.resize not in get_args(Resize):
            raise ValueError(f"resize: expected one of {get_args(Resize)}, got {self.resize!r}")

    def load(self, source: str | Path | Image.Image) -> Tensor:
        """Read one image as the network sees it, before normalisation.

        Args:
            source: A path, or an image already opened with Pillow.

        Returns:
            uint8 tensor (3, size, size).

        Raises:
            UnreadableImageError: The image cannot be decoded.
        """
        return self.fit(read_rgb(source))

    def fit(self, image: Image.Image) -> Tensor:
        """Bring an RGB image to the square the network sees.

        Args:
            image: Pillow image of mode RGB, as `read_rgb` gives it.

        Returns:
            uint8 tensor (3, size, size).
        """
        square = (self.size, self.size)
        # Pillow widens the bilinear kernel when it shrinks: that is the antialiasing.
        fitted = image.resize(square, Image.Resampling.BILINEAR, box=self._box(image.width, image.height))
        return torch.from_numpy(np.array(fitted)).permute(2, 0, 1).contiguous()

    def fit_mask(self, mask: Image.Image) -> Tensor:
        """Bring a mask to the square the network sees, as `fit` brings its image.

        Args:
            mask: RGB image as `read_rgb` gives it; whatever is not black is inside.

        Returns:
            bool tensor (size, size).
        """
        inside = Image.fromarray(np.asarray(mask).any(axis=2).astype(np.uint8) * 255)
        square = (self.size, self.size)
        fitted = inside.resize(square, Image.Resampling.BOX, box=self._box(mask.width, mask.height))
        # At least half of what a pixel stands for.
        return torch.from_numpy(np.array(fitted) >= 128)

    def _box(self, width: int, height: int) -> tuple[float, float, float, float]:
        """Part of the source that fills the square, in source pixels.

        Resizing from a box gives the pixels that resizing the whole and cropping would, without ever holding the
        whole: a strip of 1 x 10,000 pixels would otherwise grow to gigabytes.
        """
        if self.resize == "stretch":
            return (0.0, 0.0, float(width), float(height))
        short = round(self.size * _CROP_NUMERATOR / _CROP_DENOMINATOR)
        scale = short / min(width, height)
        resized = [short if side == min(width, height) else int(side * scale) for side in (width, height)]
        per_pixel = [side / new for side, new in zip((width, height), resized, strict=True)]
        start = [round((new - self.size) / 2) * step for new, step in zip(resized, per_pixel, strict=True)]
        stop = [
            min(first + self.size * step, float(side))  # rounding must not lead outside the image
            for first, step, side in zip(start, per_pixel, (width, height), strict=True)
        ]
        return (start[0], start[1], stop[0], stop[1])

    def normalize(self, images: Tensor) -> Tensor:
        """Turn 8-bit images into network input.

        Args:
            images: uint8 tensor (B, 3, H, W).

        Returns:
            float32 tensor (B, 3, H, W) on the same device.
        """
        _check_images(images)
        if images.dtype != torch.uint8:
            raise TypeError(f"images: expected dtype torch.uint8, got {images.dtype}")
        mean, std = self._statistics(images.device, torch.float32)
        return images.to(torch.float32).div_(255.0).sub_(mean).div_(std)

    def denormalize(self, images: Tensor) -> Tensor:
        """Turn network input back into 8-bit images; values outside the range are clipped.

        Args:
            images: floating-point tensor (B, 3, H, W), as `normalize` gives it.

        Returns:
            uint8 tensor (B, 3, H, W) on the same device.
        """
        _check_images(images)
        if not images.is_floating_point():
            raise TypeError(f"images: expected a floating-point dtype, got {images.dtype}")
        mean, std = self._statistics(images.device, torch.float32)
        values = images.detach().to(torch.float32) * std + mean
        return values.mul_(255.0).round_().clamp_(0.0, 255.0).to(torch.uint8)

    def _statistics(self, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        mean = torch.tensor(self.mean, device=device, dtype=dtype).view(1, 3, 1, 1)
        std = torch.tensor(self.std, device=device, dtype=dtype).view(1, 3, 1, 1)
        return mean, std

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as JSON-able values."""
        return {"size": self.size, "mean": list(self.mean), "std": list(self.std), "resize": self.resize}

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any]) -> "Preprocessing":
        """Make the settings from what `to_dict` returned.

        Args:
            settings: Mapping with ``size`` and, optionally, ``mean``, ``std`` and ``resize``.

        Raises:
            TypeError: ``settings`` is no mapping, or a value has a wrong type.
            ValueError: A key is unknown or missing, or a value is out of range.
        """
        if not isinstance(settings, Mapping):
            raise TypeError(f"settings: expected a mapping, got {type(settings).__name__}")
        known = [field.name for field in fields(cls)]
        foreign = [str(key) for key in settings if key not in known]
        if foreign:
            raise ValueError(f"settings: expected keys among {known}, got also {sorted(foreign)}")
        if "size" not in settings:
            raise ValueError(f"settings: expected the key 'size', got only {sorted(settings)}")
        return cls(**settings)


def _triple(argument: str, value: object, *, positive: bool) -> Triple:
    expected = f"three {'positive' if positive else 'finite'} numbers, one per channel"
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise TypeError(f"{argument}: expected {expected}, got {value!r}")
    numbers: list[float] = []
    for number in value:
        if isinstance(number, bool) or not isinstance(number, int | float):
            raise TypeError(f"{argument}: expected {expected}, got {value!r}")
        if not -_LARGEST <= number <= _LARGEST or (positive and number < 1 / _LARGEST):
            raise ValueError(f"{argument}: expected {expected}, got {value!r}")
        numbers.append(float(number))
    if len(numbers) != 3:
        raise ValueError(f"{argument}: expected {expected}, got {value!r}")
    return (numbers[0], numbers[1], numbers[2])


def _check_images(images: object) -> None:
    if not isinstance(images, Tensor):
        raise TypeError(f"images: expected a tensor (B, 3, H, W), got {type(images).__name__}")
    if images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(f"images: expected shape (B, 3, H, W), got {tuple(images.shape)}")
