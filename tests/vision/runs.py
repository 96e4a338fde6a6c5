"""What the tests of training share: a small network, a run of it, and what is compared afterwards.

Run as a script, this file is the run that gets killed, or one process of a distributed one.
"""

import csv
import os
import signal
import sys
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from mhex_vision import MHEXClassifier, checkpoint
from mhex_vision.data.lesions import lesions_bundle
from mhex_vision.recipes import Recipe
from mhex_vision.training import train

RECIPE = Recipe(epochs=3, batch_size=16, learning_rate=3e-3)
MOMENTS = ("after epoch 1", "inside epoch 2", "while files are written")


class Residual(nn.Module):
    """Two residual additions, with batch statistics and dropout: whatever a resumed run could get wrong."""

    def __init__(self, classes=4):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 4, stride=4), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.2))
        self.first = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8))
        self.second = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8))
        self.fc = nn.Linear(8, classes)

    def forward(self, images):
        x = self.stem(images)
        x = torch.relu(x + self.first(x))
        x = torch.relu(x + self.second(x))
        return self.fc(x.mean(dim=(2, 3)))


def bundle(**counts):
    return lesions_bundle(size=32, **{"train": 45, "validation": 16, "test": 12} | counts)


def classifier(classes=4, **settings):
    torch.manual_seed(3)
    return MHEXClassifier.from_backbone(Residual(classes), classes, image_size=32, **settings)


def plain_network():
    torch.manual_seed(3)
    return Residual()


def killed(moment, out):
    """A run that ends its own process the hard way."""
    model = classifier()
    seen = {"steps": 0, "files": 0}

    def die():
        os.kill(os.getpid(), signal.SIGKILL)

    def after_epoch(epoch):
        if moment == "after epoch 1":
            die()

    def before_step(module, _):
        seen["steps"] += module.training
        if moment == "inside epoch 2" and seen["steps"] == 5:  # an epoch has three
            die()

    def write_half(tensors, path, metadata=None):
        seen["files"] += 1
        save_file(tensors, path, metadata=metadata)
        if moment == "while files are written" and seen["files"] == 3:  # an epoch writes two at most
            os.truncate(path, path.stat().st_size // 2)
            die()

    save_file = checkpoint.save_file
    checkpoint.save_file = write_half
    model.register_forward_pre_hook(before_step)
    train(model, bundle(), RECIPE, out=out, on_epoch=after_epoch)


def distributed(out):
    """One of two processes; there are fewer validation images than processes."""
    train(classifier(), bundle(train=33, validation=1, test=5), replace(RECIPE, epochs=1), out=out)


ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
SCRIPT = Path(__file__)


def weights(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_same_weights(one, other):
    """With the names that differ, because pytest rewrites the assertions of test files only."""
    assert one.keys() == other.keys(), one.keys() ^ other.keys()
    different = [name for name in one if not torch.equal(one[name], other[name])]
    assert not different, different


def losses(result):
    """All but the seconds."""
    return [replace(epoch, seconds=0.0) for epoch in result.history]


def rows(out):
    with (out / "log.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def stop_after(count):
    def on_epoch(epoch):
        if epoch.epoch == count:
            raise KeyboardInterrupt

    return on_epoch


if __name__ == "__main__":
    torch.set_num_threads(1)
    what, folder = sys.argv[1], Path(sys.argv[2])
    if what == "distributed":
        distributed(folder)
    else:
        killed(what, folder)
