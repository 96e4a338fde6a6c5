"""Errors on a command line name flags."""

import argparse
from pathlib import Path

import pytest

from mhex_core.program import error_line

OPTIONS = argparse.Namespace(
    run=print, beta=2.0, batch_size=0, methods="soup", max_mb=30, text_column=None, seed=None, self_judged=False,
    input=Path("photos"), out=Path("made/here"), target="dog"
)  # fmt: skip


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("beta must be in [0, 1], got 2"), "--beta must be in [0, 1], got 2"),
        (ValueError("batch_size must be\n at least 1, got 0"), "--batch-size must be at least 1, got 0"),
        (ValueError("name must be one of mhex, got 'soup'"), "--methods must be one of mhex, got 'soup'"),
        (ValueError("text must be one of the columns"), "--text-column must be one of the columns"),
        (ValueError("it needs more than max_bytes, got 'max_mb'"), "it needs more than --max-mb, got 'max_mb'"),
        (ValueError("judge must be another (say self_judged)"), "judge must be another (say --self-judged)"),
        # Not the user's: an argument without a flag, one that was not given, a name within a path, a word.
        (ValueError("tokenizer must be fast"), "tokenizer must be fast"),
        (ValueError("seed must be set"), "seed must be set"),
        (ValueError("a/batch_size/b and 'batch_size' must be"), "a/batch_size/b and 'batch_size' must be"),
        (ValueError("beta testers must wait"), "beta testers must wait"),
        (ValueError("run must be"), "run must be"),
        (ValueError(""), "ValueError"),
        (FileExistsError(17, "File exists", "made"), "--out: File exists: made"),
        (PermissionError(13, "Permission denied", "made/here/a.png"), "--out: Permission denied: made/here/a.png"),
        (FileNotFoundError(2, "No such file or directory", "photos/x"), "--input: No such file or directory: photos/x"),
        (FileNotFoundError(2, "No such file or directory", "/else"), "/else: No such file or directory"),
        (OSError("no space left"), "no space left"),
    ],
)
def test_errors_name_flags(error, line):
    assert error_line(error, OPTIONS) == line
