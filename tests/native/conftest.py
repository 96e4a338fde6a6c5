"""Random layers for the kernels, and a reason to skip where nothing was compiled."""

from __future__ import annotations

import os

import pytest
import torch

import mhex_core

SHAPES = ((3, 9, 7), (17, 5, 5), (64, 4, 4), (130, 1, 1))  # C, h, w


def pytest_collection_modifyitems(items):
    if os.environ.get("MHEX_NATIVE") == "1":
        return  # then their absence is a failure
    status = mhex_core.native.status()
    if status.backend == "native":
        return
    for item in items:
        if item.path.parent.name == "native":
            item.add_marker(pytest.mark.skip(reason=status.reason))


@pytest.fixture(scope="session")
def make():
    """(activations, matrices): B samples of layers (C, h, w), K classes."""

    def layers(shapes=SHAPES, *, batch=3, classes=5, dtype=torch.float32, channels_last=False, seed=0):
        generator = torch.Generator().manual_seed(seed)
        layout = torch.channels_last if channels_last else torch.contiguous_format
        activations = [
            torch.randn(batch, *shape, generator=generator).to(dtype).contiguous(memory_format=layout)
            for shape in shapes
        ]
        return activations, [torch.randn(classes, shape[0], generator=generator) for shape in shapes]

    return layers


@pytest.fixture(scope="session")
def exact():
    """The same call in float64 by the reference."""

    def run(function, activations, matrices, *arguments, **options):
        wide = [layer.double() for layer in activations], [matrix.double() for matrix in matrices]
        return function(*wide, *arguments, backend="reference", **options)

    return run
