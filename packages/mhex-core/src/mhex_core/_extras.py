"""Libraries that are no dependency of mhex_core: imported where they are used."""

from __future__ import annotations

import importlib
from types import ModuleType


def library(module: str, *, needed_by: str, distribution: str) -> ModuleType:
    """Import `module`.

    Raises:
        ImportError: It is missing; the message says what to install.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f'{needed_by} needs {distribution}: pip install "mhex-vision[bench]" or "mhex-text[bench]"'
        ) from error
