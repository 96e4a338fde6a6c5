"""Writing files that are either whole or not there, and reading arrays from files that may be anything."""

from __future__ import annotations

import io
import math
import os
import re
import secrets
import zipfile
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

# How many bytes one compressed byte stands for at most: so much is deflate able to.
_GROWTH = {zipfile.ZIP_STORED: 1, zipfile.ZIP_DEFLATED: 1032}
_PARTIAL = re.compile(r"\.(?P<name>.+)\.[0-9a-f]{12}\.mhex-partial", re.DOTALL)


def partial_of(path: Path) -> Path:
    """A new name beside `path`, for what is to become it; `remove_partials` knows it again."""
    return path.with_name(f".{path.name}.{secrets.token_hex(6)}.mhex-partial")


def remove_partials(folder: str | Path, names: Collection[str] | None = None) -> None:
    """Remove what a process that was killed had begun to write, and nothing that anybody else may have put there.

    Args:
        folder: Where to look; not in the folders below it. It need not be there.
        names: The files that were to be written; None means any.
    """
    folder = Path(folder)
    for path in folder.iterdir() if folder.is_dir() else ():
        match = _PARTIAL.fullmatch(path.name)
        if match and (names is None or match["name"] in names) and path.is_file() and not path.is_symlink():
            path.unlink(missing_ok=True)


def write_atomically(path: str | Path, write: Callable[[Path], object]) -> Path:
    """Let `write` fill a file beside `path`, then put it in place in one step.

    Args:
        path: The file wanted.
        write: Called with the path to write to, on the same file system.

    Returns:
        `path`. If anything raises, what was there before is still there and nothing else is left behind.
    """
    path = Path(path)
    temporary = partial_of(path)
    # Opened like any new file, and not by tempfile, whose files nobody else may read.
    temporary.open("xb").close()
    try:
        write(temporary)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    return path


def as_cell(text: str) -> str:
    """A text for a CSV file, which no spreadsheet takes for a formula: an apostrophe goes before one that begins so."""
    return f"'{text}" if text.startswith(("=", "+", "-", "@", "\t", "\r", "'")) else text


def from_cell(text: str) -> str:
    """The text that `as_cell` made a cell of."""
    return text[1:] if text.startswith("'") else text


def read_arrays(file: BinaryIO) -> dict[str, np.ndarray[Any, Any]]:
    """Read the arrays of an .npz archive, by name. No more memory is asked for than the file's own bytes can fill.

    Raises:
        Exception: Of whatever class, where the file is no such archive.
    """
    size = file.seek(0, os.SEEK_END)
    with zipfile.ZipFile(file) as archive:
        members = archive.infolist()
        if len({member.filename for member in members}) != len(members):
            raise ValueError("an array stands in it twice")
        if sum(member.compress_size for member in members) > size:
            raise ValueError(f"its members say that they hold more than its {size} bytes")
        found = {}
        for member in members:
            if member.file_size > member.compress_size * _GROWTH.get(member.compress_type, 0):
                raise ValueError(f"{member.filename} says that it holds {member.file_size} bytes, which it cannot")
            name = member.filename.removesuffix(".npy")
            found[name] = _array(name, archive.read(member))
    return found


def _array(name: str, data: bytes) -> np.ndarray[Any, Any]:
    """An array as NumPy writes it to a file."""
    stream = io.BytesIO(data)
    if np.lib.format.read_magic(stream) != (1, 0):
        raise ValueError(f"{name} is of a version of .npy that explanations are not written in")
    shape, by_column, dtype = np.lib.format.read_array_header_1_0(stream)
    start = stream.tell()
    if dtype.hasobject or min(shape, default=0) < 0 or math.prod(shape) * dtype.itemsize != len(data) - start:
        raise ValueError(f"{name} says that it is {dtype} of shape {shape}, and holds {len(data) - start} bytes")
    values = np.frombuffer(data, dtype, offset=start).reshape(shape, order="F" if by_column else "C")
    return values.copy()  # what is frozen or lies anywhere in memory torch does not take
