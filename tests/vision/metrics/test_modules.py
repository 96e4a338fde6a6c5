"""The metrics as torchmetrics: means over all images, the same however the images are shared out among processes."""

import json
import math
import pickle
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from mhex_vision import metrics
from mhex_vision.metrics.modules import JudgedMetric, LocalizationMetric, MapMetric

JUDGED = [kind for kind in vars(metrics.modules).values() if isinstance(kind, type) and JudgedMetric in kind.__bases__]
LOCAL = [
    kind for kind in vars(metrics.modules).values() if isinstance(kind, type) and LocalizationMetric in kind.__bases__
]
ALONE = [kind for kind in vars(metrics.modules).values() if isinstance(kind, type) and MapMetric in kind.__bases__]
EVERY = JUDGED + LOCAL + ALONE
OPTIONS = {
    "ROAD": {"fractions": (0.2, 0.5)},
    "Infidelity": {"draws": 8},
    "SensitivityN": {"subsets": 8},
    "Fidelity": {"steps": 5},
    "BoxSensitivity": {"boxes": 8},
    "Compactness": {"threshold": 0.2},
}


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(
            nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)
        )

    def forward(self, images):
        return self.layers(images)


def cases(count=7):
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(count, 3, 8, 8, generator=generator)
    saliency = torch.rand(count, 8, 8, generator=generator)
    target = torch.randint(0, 3, (count,), generator=generator)
    masks = torch.rand(count, 8, 8, generator=generator) > 0.7
    return images, saliency, target, masks


def measured(kind, rows, judge):
    """A metric that has seen some of the images, in batches of two."""
    images, saliency, target, masks = cases()
    options = OPTIONS.get(kind.__name__, {})
    metric = kind(judge, **options) if issubclass(kind, JudgedMetric) else kind(**options)
    for part in [rows[start : start + 2] for start in range(0, len(rows), 2)]:
        if issubclass(kind, JudgedMetric):
            metric.update(images[part], saliency[part], target[part])
        elif issubclass(kind, MapMetric):
            metric.update(saliency[part])
        else:
            metric.update(saliency[part], masks[part])
    return metric


def test_every_metric_is_among_them():
    assert len(JUDGED) == 13
    assert len(LOCAL) == 3
    assert len(ALONE) == 1


@pytest.mark.parametrize("kind", EVERY)
def test_a_metric_is_the_mean_of_its_function(kind):
    images, saliency, target, masks = cases()
    judge = Network()
    options = OPTIONS.get(kind.__name__, {})
    if kind in JUDGED:
        values = kind.function(metrics.Judge(judge), images, saliency, target, **options)
    elif kind in ALONE:
        values = kind.function(saliency, **options)
    else:
        values = kind.function(saliency, masks)
    metric = measured(kind, list(range(7)), judge)
    assert_close(metric.compute(), values.double().nanmean())
    assert not metric.state_dict()
    copy = pickle.loads(pickle.dumps(metric))
    assert_close(copy.compute(), metric.compute())
    metric.reset()
    with pytest.warns(UserWarning, match="before the ``update``"):
        assert math.isnan(metric.compute())


def test_undefined_values_are_left_out():
    metric = metrics.SensitivityN(Network(), subsets=8)
    images, saliency, target, _ = cases(2)
    metric.update(images[:1], saliency[:1], target[:1])
    defined = metric.compute()
    metric.update(images[1:], torch.zeros(1, 8, 8), target[1:])
    assert int(metric.count) == 1
    assert_close(metric.compute(), defined)


def worker(rank, world, folder):
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world)
    judge = Network()
    found = {kind.__name__: float(measured(kind, list(range(rank, 7, world)), judge).compute()) for kind in EVERY}
    (Path(folder) / f"{rank}.json").write_text(json.dumps(found))
    torch.distributed.destroy_process_group()


def test_processes_with_unequal_shares_agree_on_the_mean_of_all(vision_python, tmp_path):
    world = 2
    processes = [vision_python.start(__file__, rank, world, tmp_path) for rank in range(world)]
    for process in processes:
        done = process.wait()
        assert done.returncode == 0, done.stderr
    alone = {kind.__name__: float(measured(kind, list(range(7)), Network()).compute()) for kind in EVERY}
    for rank in range(world):
        found = json.loads((tmp_path / f"{rank}.json").read_text())
        assert found == pytest.approx(alone, rel=1e-6, abs=1e-6)


if __name__ == "__main__":
    torch.set_num_threads(1)
    worker(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
