"""What all tests share: processes of their own that need not wait for imports."""

from __future__ import annotations

import os

import pytest

from .forge import Forge

# What `batch` asks for, and what torch must know before its first product: the same bits wherever a matrix lies.
os.environ.setdefault("MKL_CBWR", "AUTO")


# Files whose tests wait for processes for minutes.
LONG = ("test_faults.py", "test_cluster.py")


def pytest_collection_modifyitems(items):
    """Long files first: as the last ones they would be waited for by everything else."""
    items.sort(key=lambda item: item.path.name not in LONG)


@pytest.fixture(scope="session")
def python():
    """Starts processes that have imported torch."""
    forge = Forge("torch")
    yield forge
    forge.close()


@pytest.fixture(scope="session")
def vision_python():
    """Starts processes that have imported what mhex-vision stands on."""
    forge = Forge("torchvision", "torchmetrics", "accelerate", "safetensors.torch", "matplotlib.figure")
    yield forge
    forge.close()


@pytest.fixture(scope="session")
def text_python():
    """Starts processes that have imported what mhex-text stands on."""
    forge = Forge("torch", "transformers.models.bert.modeling_bert", "transformers.trainer", "datasets", "accelerate")
    yield forge
    forge.close()
