"""What the tests of mhex_vision share: small networks, images, explanations, and one thread."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

from mhex_vision import MHEXClassifier, Preprocessing


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    """Small tensors are fastest on one thread, and sums depend on how they are split: subprocesses use one, too."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def networks():
    """The module networks.py; with --import-mode=importlib a test folder is not on sys.path."""
    name = "mhex_vision_test_networks"
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name("networks.py"))
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # pickle looks classes up there
    spec.loader.exec_module(module)
    yield module
    del sys.modules[name]


@pytest.fixture(scope="session")
def make_images():
    """Normalised images."""

    def make(batch=2, size=(32, 32), *, seed=0, dtype=torch.float32):
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(batch, 3, *size, generator=generator).to(dtype)

    return make


@pytest.fixture
def make_classifier(networks):
    """A classifier on a small network or a named one, in evaluation mode, with weights that show."""

    def make(backbone=None, num_classes=3, *, seed=0, **options):
        torch.manual_seed(seed)
        backbone = networks.Net(num_classes) if backbone is None else backbone
        model = MHEXClassifier.from_backbone(backbone, num_classes, **({"image_size": 64} | options))
        return networks.shaken(model, seed).eval()

    return make


@pytest.fixture
def make_explanation(make_classifier, make_images):
    """An explanation that carries its images."""

    def make(target=None, *, batch=2, size=(12, 10), **options):
        model = make_classifier().with_metadata(preprocessing=Preprocessing(size=12), class_names=("a", "b", "c"))
        return model.explain(make_images(batch, size), target, **options)

    return make
