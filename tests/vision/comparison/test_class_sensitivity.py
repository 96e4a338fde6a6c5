"""Comparisons whose metrics look at more than one map on one judge: other classes, maps alone, boxes and cells."""

import time

import numpy as np
import pytest
import torch
from torch import nn
from torch.testing import assert_close

from mhex_vision import PlainClassifier, Preprocessing, metrics
from mhex_vision.comparison import Comparison, compare, parse_metric
from mhex_vision.data import DataBundle
from mhex_vision.data.sets import ArrayImages

SIZE, CLASSES, COUNT = 32, 4, 7
BOTH = ("class_sensitivity", "class_sensitivity_least", "class_sensitivity_least:kind=spearman")


class Colours(nn.Module):
    """A network that sees colour, whatever the images' size."""

    def __init__(self, seed, classes=CLASSES):
        super().__init__()
        torch.manual_seed(seed)
        self.last = nn.Linear(12, classes)

    def forward(self, images):
        return self.last(nn.functional.adaptive_avg_pool2d(images, 2).flatten(1)) * 5


def bundle(*, classes=CLASSES, several=False):
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (COUNT, 3, SIZE, SIZE), dtype=torch.uint8, generator=generator)
    labels = torch.arange(COUNT) % classes
    if several:
        labels = nn.functional.one_hot(labels, classes).float()
        labels[2] = 0
    test = ArrayImages(images, labels)
    names = tuple("abcdef"[:classes])
    return DataBundle(
        name="noise",
        train=test,
        validation=None,
        test=test,
        class_names=names,
        multi_label=several,
        preprocessing=Preprocessing(size=SIZE),
    )


class Recorder:
    """A method whose maps depend on image and class, and which remembers what it was asked for."""

    def __init__(self):
        self.asked = []

    def __call__(self, network, images, targets):
        self.asked.append(targets.tolist())
        pairs = zip(images, targets.tolist(), strict=True)
        return torch.stack([image.roll(5 * label, dims=1) for image, label in pairs]).mean(dim=1) - 0.2


def others_of(logits, target):
    """For each image the most and the least probable class that is not its own, by sorting."""
    ranked = [sorted(range(len(row)), key=lambda k, row=row: -row[k]) for row in logits.tolist()]
    left = [[k for k in order if k != own] for order, own in zip(ranked, target.tolist(), strict=True)]
    return torch.tensor([order[0] for order in left]), torch.tensor([order[-1] for order in left])


@pytest.mark.parametrize("several", [False, True])
def test_the_explained_networks_other_classes_are_asked_for(tmp_path, several):
    data, model, judge, method = bundle(several=several), Colours(1), Colours(2), Recorder()
    asked = {"judge": judge, "methods": {"own": method}, "metrics": [*BOTH, "sad"], "batch_size": 3}
    found = compare(model, data.test, data, out=tmp_path, **asked)
    places = [place for place in range(COUNT) if not (several and place == 2)]
    assert found.places == tuple(places)
    images = data.preprocessing.normalize(data.test.images)[places]
    target = torch.arange(COUNT)[places] % CLASSES
    runner_up, least = others_of(model(images).detach(), target)
    assert not torch.equal(runner_up, others_of(judge(images).detach(), target)[0])
    own, second, last = (method(None, images, classes) for classes in (target, runner_up, least))
    expected = {
        BOTH[0]: metrics.class_sensitivity(own, second),
        BOTH[1]: metrics.class_sensitivity(own, last),
        BOTH[2]: metrics.class_sensitivity(own, last, kind="spearman"),
    }
    for metric, values in expected.items():
        assert_close(torch.tensor(found.values("own", metric)), values.double(), rtol=1e-4, atol=1e-5)
    # Of each batch: its classes, the runners-up, the least probable; one image before all to warm up.
    calls = method.asked[1:-3]
    assert len(calls) == 3 * 3
    joined = [[label for call in calls[start::3] for label in call] for start in range(3)]
    assert joined == [target.tolist(), runner_up.tolist(), least.tolist()]


def test_no_other_class_is_asked_for_unless_a_metric_needs_it(tmp_path):
    data, method = bundle(), Recorder()
    asked = {"judge": Colours(2), "methods": {"own": method}, "batch_size": 3}
    compare(Colours(1), data.test, data, metrics=["sad", "compactness"], out=tmp_path / "none", **asked)
    assert len(method.asked) == 1 + 3
    method.asked.clear()
    compare(Colours(1), data.test, data, metrics=["class_sensitivity"], out=tmp_path / "one", **asked)
    assert len(method.asked) == 1 + 3 * 2


def test_seconds_are_those_of_one_explanation(tmp_path):
    class Slow(Recorder):
        def __call__(self, network, images, targets):
            time.sleep(0.4 if len(self.asked) >= 2 else 0)  # after warming up and the images' own classes
            return super().__call__(network, images, targets)

    data, method = bundle(), Slow()
    asked = {"judge": Colours(2), "methods": {"own": method}, "metrics": BOTH[:2], "limit": 1}
    found = compare(Colours(1), data.test, data, out=tmp_path, **asked)
    assert len(method.asked) == 4
    assert found.values("own", "seconds").item() < 0.4


def test_maps_of_other_classes_are_checked_as_well(tmp_path):
    def shaky(network, images, targets):
        return images.mean(dim=1) / (0 if targets.tolist() != list(range(3)) and len(targets) > 1 else 1)

    data = bundle()
    asked = {"judge": Colours(2), "methods": {"shaky": shaky}, "metrics": BOTH[:1], "batch_size": 3}
    with pytest.raises(ValueError, match="method 'shaky' returned values that are not finite"):
        compare(Colours(1), data.test, data, out=tmp_path, **asked)


def test_a_stopped_comparison_of_classes_goes_on(tmp_path):
    data, calls = bundle(), []
    steady = Recorder()

    def shaky(network, images, targets):
        calls.append(1)
        if len(calls) == 5:  # in the middle of the second batch: its own classes are explained, the others are not
            raise KeyboardInterrupt
        return steady(network, images, targets)

    asked = {"judge": Colours(2), "metrics": BOTH[:1], "batch_size": 3, "methods": {"shaky": shaky}}
    with pytest.raises(KeyboardInterrupt):
        compare(Colours(1), data.test, data, out=tmp_path / "stopped", **asked)
    resumed = compare(Colours(1), data.test, data, out=tmp_path / "stopped", **asked)
    whole = compare(Colours(1), data.test, data, out=tmp_path / "whole", **asked)
    assert resumed.values("shaky", BOTH[0]).tolist() == whole.values("shaky", BOTH[0]).tolist()


def test_two_classes_are_needed(tmp_path):
    data = bundle(classes=1, several=True)
    asked = {"judge": Colours(2, 1), "methods": ["random"], "out": tmp_path}
    with pytest.raises(ValueError, match="metrics class_sensitivity and class_sensitivity_least need two classes"):
        compare(Colours(1, 1), data.test, data, metrics=["class_sensitivity"], **asked)
    two = bundle(classes=2)
    asked |= {"judge": Colours(2, 2), "methods": {"own": Recorder()}}
    found = compare(Colours(1, 2), two.test, two, metrics=BOTH[:2], **asked)
    assert found.values("own", BOTH[0]).tolist() == found.values("own", BOTH[1]).tolist()


def test_every_value_is_that_of_its_metric(tmp_path):
    data, model, judge, method = bundle(), Colours(1), Colours(2), Recorder()
    names = (
        "fidelity:steps=9",
        "fidelity:steps=4,cells=4,baseline=blank",
        "box_sensitivity:boxes=10",
        "box_sensitivity:sides=5,boxes=6,baseline=mean",
        "compactness",
        "compactness:threshold=0.3",
    )
    asked = {"judge": judge, "methods": {"own": method}, "metrics": names, "batch_size": 3}
    found = compare(model, data.test, data, out=tmp_path, **asked)
    images = data.preprocessing.normalize(data.test.images)
    maps = method(None, images, data.test.labels)
    given = judge, images, maps, data.test.labels
    expected = (
        metrics.fidelity(*given, steps=9),
        metrics.fidelity(*given, steps=4, cells=4, baseline="blank"),
        metrics.box_sensitivity(*given, boxes=10),
        metrics.box_sensitivity(*given, sides=5, boxes=6, baseline="mean"),
        metrics.compactness(maps),
        metrics.compactness(maps, threshold=0.3),
    )
    for name, values in zip(names, expected, strict=True):
        assert_close(torch.tensor(found.values("own", name)), values.double(), rtol=1e-3, atol=1e-4)


def test_maps_alone_are_read_at_their_own_size(tmp_path):
    """What the judge's size does to a map is no property of the map."""
    data, method, seen = bundle(), Recorder(), []
    torch.manual_seed(0)
    judge = PlainClassifier.from_name("resnet18", CLASSES).with_metadata(preprocessing=Preprocessing(size=48))
    judge.register_forward_pre_hook(lambda module, arguments: seen.append(tuple(arguments[0].shape[2:])))
    asked = {"judge": judge, "methods": {"own": method}, "metrics": ("compactness", *BOTH[:1]), "limit": 3}
    found = compare(Colours(1), data.test, data, out=tmp_path, **asked)
    assert set(seen) == {(48, 48)}
    images = data.preprocessing.normalize(data.test.images)[list(found.places)]
    target = data.test.labels[list(found.places)]
    own = method(None, images, target)
    other = method(None, images, others_of(Colours(1)(images).detach(), target)[0])
    assert found.values("own", "compactness") == pytest.approx(metrics.compactness(own).numpy(), abs=1e-6)
    assert found.values("own", BOTH[0]) == pytest.approx(metrics.class_sensitivity(own, other).numpy(), abs=1e-5)


def test_tables_know_which_way_is_better(tmp_path):
    data = bundle()
    names = ("fidelity:steps=4", "box_sensitivity:boxes=4", "compactness", *BOTH[:2])
    methods = {"own": Recorder(), "blind": lambda network, images, targets: images[:, 0]}
    asked = {"judge": Colours(2), "methods": methods, "metrics": names}
    compare(Colours(1), data.test, data, out=tmp_path, **asked)
    found = Comparison.load(tmp_path / "samples.parquet")
    head = found.to_markdown().splitlines()[0]
    assert head == (
        "| method | fidelity (LIF - MIF) (steps=4) ↑ | box sensitivity (boxes=4) ↑ | compactness ↑ "
        "| similarity to runner-up ↓ | similarity to least likely ↓ | s / image |"
    )
    assert found.values("blind", BOTH[0]) == pytest.approx(np.ones(COUNT))
    own = found.to_markdown().splitlines()[2].split("|")
    assert own[1].strip() == "own"
    assert all("**" in cell for cell in own[5:7])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("fidelity:draws=3", "among: steps, baseline, cells; got 'draws=3'"),
        ("box_sensitivity:sides", "among: sides, boxes, baseline, seed; got 'sides'"),
        ("compactness:kind=pearson", "among: threshold; got 'kind=pearson'"),
        ("class_sensitivity:other=least", "among: kind; got 'other=least'"),
    ],
)
def test_options_that_are_none_are_refused(text, message):
    with pytest.raises(ValueError, match=message):
        parse_metric(text)
