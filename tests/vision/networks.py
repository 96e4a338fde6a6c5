"""Small residual networks whose every addition is known, and weights that make a difference visible."""

from __future__ import annotations

import operator

import torch
from torch import nn
from torch.nn import functional as F


def add_method(shortcut, branch):
    return shortcut.add(branch)


def add_in_place(shortcut, branch):
    branch += shortcut
    return branch


def add_method_in_place(shortcut, branch):
    return branch.add_(shortcut)


def branch_first(shortcut, branch):
    return branch + shortcut


def add_by_name(shortcut, branch):
    return torch.add(input=shortcut, other=branch)


def add_one_by_name(shortcut, branch):
    return torch.add(branch, other=shortcut, alpha=1)


def add_in_place_by_name(shortcut, branch):
    return branch.add_(other=shortcut)


# Each way to write the addition, and whether the shortcut is its first operand.
ADDITIONS = {
    "a + b": (operator.add, True),
    "b + a": (branch_first, False),
    "+=": (add_in_place, False),
    "torch.add": (torch.add, True),
    "Tensor.add": (add_method, True),
    "Tensor.add_": (add_method_in_place, False),
    "torch.add by name": (add_by_name, True),
    "torch.add, once": (add_one_by_name, False),
    "Tensor.add_ by name": (add_in_place_by_name, False),
}


def relu_statement(features):
    """In-place, and the result is thrown away: the tensor itself has changed."""
    features.relu_()
    return features


def functional_relu_statement(features):
    F.relu(features, inplace=True)
    return features


ACTIVATIONS = {
    "F.relu": F.relu,
    "F.relu in place": lambda features: F.relu(features, inplace=True),
    "F.relu in place, by position": lambda features: F.relu(features, True),
    "F.relu_": F.relu_,
    "torch.relu_": torch.relu_,
    "Tensor.relu_": lambda features: features.relu_(),
    "relu_ as a statement": relu_statement,
    "F.relu in place as a statement": functional_relu_statement,
    "Tensor.clamp_min_": lambda features: features.clamp_min_(0),
    "nn.ReLU in place": nn.ReLU(inplace=True),
}


class Step(nn.Module):
    """One residual step."""

    def __init__(self, inputs, channels, *, stride=1, add=operator.add, activation=F.relu):
        super().__init__()
        self.conv = nn.Conv2d(inputs, channels, 3, stride=stride, padding=1)
        self.norm = nn.BatchNorm2d(channels)
        self.project = nn.Identity() if inputs == channels else nn.Conv2d(inputs, channels, 1, stride=stride)
        self.add = add
        self.activation = activation

    def forward(self, features):
        branch = self.norm(self.conv(features))
        return self.activation(self.add(self.project(features), branch))


class Net(nn.Module):
    """stem, residual steps of 4, 4 and 6 channels, one classifier."""

    def __init__(self, classes=3, *, add=operator.add, activation=F.relu):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        # The activation may be one module, shared by all steps.
        self.steps = nn.Sequential(
            *(
                Step(inputs, channels, stride=stride, add=add, activation=activation)
                for inputs, channels, stride in ((4, 4, 1), (4, 4, 1), (4, 6, 2))
            )
        )
        self.fc = nn.Linear(6, classes)

    def forward(self, images):
        return self.fc(self.steps(self.stem(images)).mean(dim=(2, 3)))


class Mixer(nn.Module):
    """Steps of a layer norm and a linear layer on maps whose channels are last, or first and moved for each step."""

    def __init__(self, *, last):
        super().__init__()
        self.stem = nn.Conv2d(3, 5, 2, stride=2)
        self.norms = nn.ModuleList(nn.LayerNorm(5) for _ in range(2))
        self.mixers = nn.ModuleList(nn.Linear(5, 5) for _ in range(2))
        self.fc = nn.Linear(5, 3)
        self.last = last

    def forward(self, images):
        features = self.stem(images)
        if self.last:
            features = features.permute(0, 2, 3, 1)
        for norm, mix in zip(self.norms, self.mixers, strict=True):
            read = features if self.last else features.permute(0, 2, 3, 1)
            branch = mix(norm(read))
            features = features + (branch if self.last else branch.permute(0, 3, 1, 2))
        return self.fc(features.mean(dim=(1, 2) if self.last else (2, 3)))


class Residue(nn.Module):
    """One residual addition of another kind, made by a function of (module, features)."""

    def __init__(self, forward):
        super().__init__()
        self.first, self.second, self.third = (nn.Conv2d(3, 3, 3, padding=1) for _ in range(3))
        self.position = nn.Parameter(torch.randn(1, 3, 1, 1))
        self.tokens = nn.Linear(3, 3)
        self.drop = nn.Dropout(0.5)
        self._forward = forward

    def forward(self, images):
        return self._forward(self, images)


class Sized(nn.Module):
    """Insists on images of 40 x 40."""

    def __init__(self):
        super().__init__()
        self.step = Step(3, 3)
        self.fc = nn.Linear(3 * 40 * 40, 2)

    def forward(self, images):
        return self.fc(self.step(images).flatten(1))


class RawWeight(nn.Module):
    """Its classifier is no module but a parameter that its forward computes with."""

    def __init__(self):
        super().__init__()
        self.step = Step(3, 3)
        self.weight = nn.Parameter(torch.randn(3, 2))

    def forward(self, images):
        return self.step(images).mean(dim=(2, 3)) @ self.weight.abs().sqrt()


def shaken(network, seed=0):
    """The network with weights and statistics that no layer hides: no zeros, no ones, no 1e-6."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d):
                count = module.num_features
                module.weight.copy_(0.5 + torch.rand(count, generator=generator))
                module.bias.copy_(0.2 * torch.randn(count, generator=generator))
                module.running_mean.copy_(0.2 * torch.randn(count, generator=generator))
                module.running_var.copy_(0.5 + torch.rand(count, generator=generator))
        for name, parameter in network.named_parameters():
            if name.endswith(("layer_scale", "gamma")):
                parameter.copy_(torch.rand(parameter.shape, generator=generator))
    return network
