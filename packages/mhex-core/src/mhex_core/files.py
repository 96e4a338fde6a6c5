"""Writing files that are either whole or not there."""

from __future__ import annotations

import os
import re
import secrets
from collections.abc import Callable, Collection
from pathlib import Path

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
