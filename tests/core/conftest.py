"""What the tests of mhex_core share: the numpy oracle, random layers, and one thread."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

import mhex_core

settings.register_profile(
    "core", deadline=None, derandomize=True, max_examples=40, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("core")

RAGGED = [(5, 3), (3, 3), (2, 1)]  # odd, not square, of different sizes


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    """Two cores are shared by everybody; small tensors are fastest on one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def oracle():
    """The module oracle.py; with --import-mode=importlib a test folder is not on sys.path."""
    spec = importlib.util.spec_from_file_location("mhex_core_oracle", Path(__file__).with_name("oracle.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def make_layers():
    """Random activations and matrices, shallow to deep; channels differ from layer to layer."""

    def make(sizes=RAGGED, *, batch=2, classes=4, channels=3, dtype=torch.float64, seed=0):
        generator = torch.Generator().manual_seed(seed)
        activations, matrices = [], []
        for index, size in enumerate(sizes):
            width = channels + index
            shape = (batch, width, *size) if len(size) == 2 else (batch, *size, width)
            activations.append(torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype))
            matrices.append(torch.randn(classes, width, generator=generator, dtype=torch.float64).to(dtype))
        return activations, matrices

    return make


@pytest.fixture
def make_explanation(make_layers):
    """A small explanation, made from random layers; target is one class per sample, (B, n), or "all"."""

    def make(target=None, *, batch=3, classes=4, **settings):
        activations, matrices = make_layers(batch=batch, classes=classes, dtype=torch.float32)
        options = mhex_core.SaliencyOptions(**settings)
        target = torch.arange(batch) % classes if target is None else target
        maps = mhex_core.signed_maps(activations, matrices, target, options=options)
        explained = torch.arange(classes).expand(batch, classes) if isinstance(target, str) else target
        generator = torch.Generator().manual_seed(1)
        explanation = mhex_core.Explanation(
            saliency=mhex_core.combine_maps(maps, size=(9, 7), options=options),
            target=explained,
            probabilities=torch.rand(batch, classes, generator=generator).softmax(dim=1),
            head_logits=torch.randn(len(activations), batch, classes, generator=generator),
            positive=maps.positive,
            negative=maps.negative,
            options=options,
            layer_names=tuple(f"layer{index}.1" for index in range(len(activations))),
            class_names=("Füchse", "猫", "chien \N{DOG FACE}", "d\u0301"),
        )
        return explanation, (activations, matrices, target)

    return make
