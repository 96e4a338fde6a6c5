"""From a file or its bytes to an RGB image. A reason is a line without the file's name, which stands elsewhere."""

from __future__ import annotations

import io
import os
import stat
from pathlib import Path

from PIL import Image

from mhex_vision.data.preprocessing import _DECODER_ERRORS, UnreadableImageError, _reason, read_rgb

DECODER_ERRORS = _DECODER_ERRORS
"""What decoders raise on damaged input."""


def decode_file(path: str) -> Image.Image:
    """Read an image file as `mhex_vision.data.preprocessing.read_rgb` does.

    Raises:
        UnreadableImageError: It cannot be decoded; the message is the reason alone.
    """
    try:
        mode = os.stat(path).st_mode  # noqa: PTH116
    except (OSError, ValueError):
        mode = stat.S_IFREG  # reading it will say what is wrong
    if not stat.S_ISREG(mode):
        raise UnreadableImageError("is a folder" if stat.S_ISDIR(mode) else "not a regular file")
    return _without_name(path, str(Path(path)))


def decode_bytes(data: bytes) -> Image.Image:
    """Read an image from the bytes of its file.

    Raises:
        UnreadableImageError: It cannot be decoded; the message is the reason alone.
    """
    if not data:
        raise UnreadableImageError("the file is empty")
    try:
        image = Image.open(io.BytesIO(data))
    except DECODER_ERRORS as error:
        raise UnreadableImageError(reason_of(error)) from error
    with image:
        return _without_name(image, "image")


def reason_of(error: BaseException) -> str:
    """Why something cannot be read, in one line."""
    return _reason(error)


def _without_name(source: str | Image.Image, name: str) -> Image.Image:
    try:
        return read_rgb(source)
    except UnreadableImageError as error:
        raise UnreadableImageError(" ".join(str(error).removeprefix(f"{name}: ").split())) from error
