"""What the tests of explainers share."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import nn

from mhex_vision.explainers import explainer

LIBRARIES = {
    "gradcam": "pytorch_grad_cam",
    "gradcam++": "pytorch_grad_cam",
    "layercam": "pytorch_grad_cam",
    "scorecam": "pytorch_grad_cam",
    "eigencam": "pytorch_grad_cam",
    "integrated-gradients": "captum",
    "shap": "shap",
}
# Less than the defaults, which take their time.
QUICK = {"integrated-gradients": {"steps": 6}, "shap": {"evaluations": 60}, "scorecam": {"batch_size": 4}}


@pytest.fixture(scope="session")
def make():
    """An explainer that is quick; the test is skipped where its library is missing."""

    def make(name, **options):
        if name in LIBRARIES:
            pytest.importorskip(LIBRARIES[name])
        return explainer(name, **(QUICK.get(name, {}) | options))

    return make


@dataclass
class State:
    """All of a network that an explainer might leave changed."""

    hooks: list
    modes: list
    gradients: list
    values: dict

    @classmethod
    def of(cls, network):
        return cls(
            [
                [len(getattr(module, name)) for name in vars(module) if name.endswith("_hooks")]
                for module in network.modules()
            ],
            [module.training for module in network.modules()],
            [(parameter.requires_grad, parameter.grad) for parameter in network.parameters()],
            {name: value.clone() for name, value in network.state_dict().items()},
        )

    def same_as(self, other):
        return (
            self.hooks == other.hooks
            and self.modes == other.modes
            and all(a == b and g is h for (a, g), (b, h) in zip(self.gradients, other.gradients, strict=True))
            and all(torch.equal(value, other.values[name]) for name, value in self.values.items())
        )


@pytest.fixture(scope="session")
def state_of():
    return State.of


class Plain(nn.Module):
    """No residual network, and activations that work in place, right behind the layers one may look at."""

    def __init__(self, classes=3, *, inplace=True):
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, padding=1)
        self.norm = nn.BatchNorm2d(6)
        self.relu = nn.ReLU(inplace=inplace)
        self.deep = nn.Sequential(nn.Conv2d(6, 5, 3, stride=2, padding=1), nn.ReLU(inplace=inplace))
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.unused = nn.Conv2d(5, 5, 1)
        self.fc = nn.Linear(5, classes)

    def forward(self, images):
        features = self.relu(self.norm(self.conv(images)))
        return self.fc(self.relu(self.pool(self.deep(features))).flatten(1))


@pytest.fixture
def make_plain(networks):
    """A plain network in evaluation mode."""

    def make(*, seed=0, **options):
        torch.manual_seed(seed)
        return networks.shaken(Plain(**options), seed).eval()

    return make
