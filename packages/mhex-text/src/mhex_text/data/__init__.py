"""Labelled texts from files, folders, AG News and made-up notes, and the bundle of splits a training run takes."""

from __future__ import annotations

try:
    import datasets as _datasets  # noqa: F401
except ImportError as error:  # the extra is not there
    raise ImportError("reading texts takes the library datasets: pip install 'mhex-text[train]'") from error

from mhex_text.data.ag_news import AG_NEWS, AG_NEWS_CLASSES, AG_NEWS_REPOSITORY
from mhex_text.data.bundle import TextBundle
from mhex_text.data.loading import load_texts
from mhex_text.data.notes import NOTE_CLASSES, SYNTHETIC_NOTES, notes_bundle
from mhex_text.data.rows import UnreadableTextWarning

__all__ = [
    "AG_NEWS",
    "AG_NEWS_CLASSES",
    "AG_NEWS_REPOSITORY",
    "NOTE_CLASSES",
    "SYNTHETIC_NOTES",
    "TextBundle",
    "UnreadableTextWarning",
    "load_texts",
    "notes_bundle",
]
