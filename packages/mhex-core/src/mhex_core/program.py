"""What the command lines have in common: errors that name the flag whoever reads them has typed."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

# What functions call their arguments where flags are called something else; the first that the command has is meant.
_CALLED = {
    "label": ("label_column",),
    "max_bytes": ("max_mb",),
    "metric": ("metrics",),
    "name": ("method", "methods"),
    "pair": ("pair_column",),
    "text": ("text_column",),
}
_ARGUMENT = re.compile(r"^([a-z][a-z_]*)(?= must |: expected )")


def error_line(error: BaseException, options: argparse.Namespace) -> str:
    """An error in one line, in which flags stand for arguments and for what the operating system says of a path.

    Args:
        error: What was raised.
        options: The command's, as they were parsed.
    """
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        flag = _flag_of_path(str(error.filename), options)
        text = f"{flag}: {error.strerror}: {error.filename}" if flag else f"{error.filename}: {error.strerror}"
    else:
        text = str(error)
    text = " ".join(text.split()) or type(error).__name__
    text = _ARGUMENT.sub(lambda found: _flag(found[1], options) or found[1], text)
    # Names of several words are nobody's English; up to "got", for what came is quoted as it came.
    said, got, came = text.partition(", got ")
    for name in (*vars(options), *_CALLED):
        flag = _dashed(name) if hasattr(options, name) else _flag(name, options)
        if "_" in name and flag is not None:
            said = re.sub(rf"(?<![\w/.'\"-]){name}(?![\w/.'\"-])", flag, said)
    return said + got + came


def _flag(argument: str, options: argparse.Namespace) -> str | None:
    value = getattr(options, argument, None)
    if value is not None and not callable(value):
        return _dashed(argument)
    return next((_dashed(name) for name in _CALLED.get(argument, ()) if hasattr(options, name)), None)


def _flag_of_path(filename: str, options: argparse.Namespace) -> str | None:
    """The flag whose value is that path, or lies above it, or else below it."""
    path = Path(filename).absolute()
    found: dict[int, str] = {}
    for name, value in vars(options).items():
        if isinstance(value, str | Path) and str(value):
            given = Path(value).absolute()
            rank = 0 if given == path else 1 if given in path.parents else 2 if path in given.parents else None
            # A value that is no path at all, such as a class, lies below the current folder like any other.
            if rank is not None and (rank < 2 or isinstance(value, Path)):
                found.setdefault(rank, _dashed(name))
    return found[min(found)] if found else None


def _dashed(name: str) -> str:
    return f"--{name.replace('_', '-')}"
