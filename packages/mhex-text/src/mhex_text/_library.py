"""Keeping transformers' own bars and reports to itself."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from transformers.utils import logging


@contextlib.contextmanager
def quiet(*, reports: bool = False) -> Iterator[None]:
    """Without the bars that loading and saving a model bring up.

    Args:
        reports: Whether the library still says what a checkpoint lacks and what it holds besides.
    """
    shown, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    if not reports:
        logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if shown:
            logging.enable_progress_bar()  # type: ignore[no-untyped-call]
