"""Comparisons: what is measured, that it goes on where it stopped, and what is refused."""

import copy
import json
import warnings
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from torch import nn
from torch.testing import assert_close

from mhex_core.metrics import min_max
from mhex_vision import PlainClassifier, Preprocessing, metrics
from mhex_vision.comparison import SCORES, Comparison, compare, draw_examples, parse_metric
from mhex_vision.data import DataBundle, UnreadableImageWarning
from mhex_vision.data.folders import folder_bundle
from mhex_vision.data.lesions import lesions_bundle
from mhex_vision.data.sets import ArrayImages

METHODS = ("mhex", "centre-gaussian", "random")
METRICS = ("sad", "avg_drop", "ead", "area_drop", "insertion:steps=4", "deletion:steps=4", "pointing")


class Small(nn.Module):
    """A judge that sees colour, whatever the images' size."""

    def __init__(self, classes):
        super().__init__()
        torch.manual_seed(2)
        self.last = nn.Linear(12, classes)

    def forward(self, images):
        return self.last(nn.functional.adaptive_avg_pool2d(images, 2).flatten(1)) * 5


@pytest.fixture(scope="module")
def data():
    return lesions_bundle(size=32, train=8, validation=4, test=10)


@pytest.fixture
def model(make_classifier, data):
    return make_classifier(num_classes=data.num_classes)


@pytest.fixture
def judge(data):
    return Small(data.num_classes)


def values_of(comparison):
    """All columns but the time that was taken."""
    return {name: comparison.samples[name].to_pylist() for name in comparison.samples.column_names if name != "seconds"}


def test_every_value_is_that_of_its_metric(model, judge, data, tmp_path):
    found = compare(model, data.test, data, judge=judge, methods=METHODS, metrics=METRICS, out=tmp_path, batch_size=4)
    images, labels = data.preprocessing.normalize(data.test.images), data.test.labels
    saliency = min_max(model.explain(images, labels).saliency)
    expected = {
        "sad": metrics.sad(judge, images, saliency, labels),
        "avg_drop": metrics.avg_drop(judge, images, saliency, labels),
        "ead": metrics.ead(judge, images, saliency, labels),
        "area_drop": metrics.area_drop(judge, images, saliency, labels),
        "insertion:steps=4": metrics.insertion(judge, images, saliency, labels, steps=4),
        "deletion:steps=4": metrics.deletion(judge, images, saliency, labels, steps=4),
        "pointing": metrics.pointing_game(saliency, data.test.masks),
    }
    assert found.metrics == METRICS
    assert found.methods == METHODS
    for metric, values in expected.items():
        assert_close(torch.tensor(found.values("mhex", metric)), values.double(), rtol=1e-4, atol=1e-5)
    curve = found.values("mhex", "deletion:steps=4_curve")
    assert curve.shape == (10, 5)
    assert np.trapezoid(curve, dx=0.25, axis=1) == pytest.approx(found.values("mhex", "deletion:steps=4"), rel=1e-4)
    assert found.values("random", "image").tolist() == list(range(10))
    assert found.values("random", "label").tolist() == labels.tolist()
    assert (found.values("mhex", "seconds") > 0).all()
    assert_close(
        torch.tensor(found.values("mhex", "probability")), metrics.Judge(judge).probability(images, labels).double()
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["comparison.json", "samples.parquet"]


def test_a_stopped_comparison_goes_on_where_it_stopped(model, judge, data, tmp_path):
    asked = {"judge": judge, "metrics": ("sad", "deletion:steps=4"), "batch_size": 3}
    calls = {"steady": 0, "shaky": 0}

    def steady(network, images, targets):
        calls["steady"] += 1
        return images.mean(dim=1)

    def shaky(network, images, targets):
        calls["shaky"] += 1
        if calls["shaky"] == 4:  # a first call on one image to warm up, then batches
            raise KeyboardInterrupt
        return -images.mean(dim=1)

    methods = {"steady": steady, "shaky": shaky}
    with pytest.raises(KeyboardInterrupt):
        compare(model, data.test, data, methods=methods, out=tmp_path / "stopped", **asked)
    pieces = sorted(path.name for path in (tmp_path / "stopped" / "pieces").rglob("*.parquet"))
    assert pieces == ["000000.parquet"] * 2 + ["000001.parquet"] * 2 + ["000002.parquet"]
    before = dict(calls)
    resumed = compare(model, data.test, data, methods=methods, out=tmp_path / "stopped", **asked)
    assert calls["steady"] - before["steady"] == 2  # warming up, and the last batch
    whole = compare(model, data.test, data, methods=methods, out=tmp_path / "whole", **asked)
    assert values_of(resumed) == values_of(whole)
    assert not (tmp_path / "stopped" / "pieces").exists()
    before = dict(calls)
    again = compare(model, data.test, data, methods=methods, out=tmp_path / "whole", **asked)
    assert calls == before
    assert values_of(again) == values_of(whole)


def test_a_folder_of_another_comparison_is_not_touched(model, judge, data, tmp_path):
    asked = {"judge": judge, "methods": ["random"], "out": tmp_path}
    first = compare(model, data.test, data, metrics=["sad"], **asked)
    with pytest.raises(ValueError, match=r"another comparison \(it differs in metrics\)"):
        compare(model, data.test, data, metrics=["ead"], **asked)
    weights = {name: value.clone() for name, value in judge.state_dict().items()}
    with torch.no_grad():
        judge.last.bias += 1
    with pytest.raises(ValueError, match=r"differs in judge"):
        compare(model, data.test, data, metrics=["sad"], **asked)
    assert values_of(Comparison.load(tmp_path / "samples.parquet")) == values_of(first)
    judge.load_state_dict(weights)
    moved = compare(model, data.test, data, metrics=["sad"], note={"checkpoint": "elsewhere"}, **asked)
    assert values_of(moved) == values_of(first)
    other = compare(model, data.test, data, metrics=["ead"], overwrite=True, **asked)
    assert other.metrics == ("ead",)
    (tmp_path / "comparison.json").write_text("[")
    with pytest.raises(ValueError, match=r"comparison\.json is damaged"):
        compare(model, data.test, data, metrics=["ead"], **asked)


def test_a_limit_chooses_at_random_and_the_batch_size_changes_nothing(model, judge, data, tmp_path):
    runs = [
        compare(
            model,
            data.test,
            data,
            judge=judge,
            methods=["mhex", "random"],
            metrics=["sad"],
            out=tmp_path / str(size),
            batch_size=size,
            limit=6,
            seed=3,
        )
        for size in (1, 4, 64)
    ]
    assert len(runs[0].places) == 6
    assert runs[0].places != tuple(range(6))
    for run in runs[1:]:
        assert run.places == runs[0].places
        for method in ("mhex", "random"):
            assert run.values(method, "sad") == pytest.approx(runs[0].values(method, "sad"), abs=1e-5)


def test_attributions_are_judged_as_they_are_and_saliency_without_what_speaks_against(model, judge, data, tmp_path):
    def signed(network, images, targets):
        return images.mean(dim=1) * 7 - 1

    found = compare(
        model, data.test, data, judge=judge, methods={"signed": signed}, metrics=["sad", "deletion"], out=tmp_path
    )
    images, labels = data.preprocessing.normalize(data.test.images), data.test.labels
    maps = signed(None, images, labels)
    saliency = min_max(maps.clamp(min=0))
    assert found.values("signed", "sad") == pytest.approx(metrics.sad(judge, images, saliency, labels), abs=1e-5)
    assert found.values("signed", "deletion") == pytest.approx(metrics.deletion(judge, images, maps, labels), abs=1e-5)


def test_a_judge_of_another_size_sees_the_same_images_in_its_own(model, data, tmp_path):
    torch.manual_seed(0)
    judge = PlainClassifier.from_name("resnet18", data.num_classes).with_metadata(preprocessing=Preprocessing(size=48))
    seen = []
    judge.register_forward_pre_hook(lambda module, arguments: seen.append(arguments[0].shape))
    found = compare(
        model, data.test, data, judge=judge, methods=["mhex"], metrics=["sad", "pointing"], out=tmp_path, limit=4
    )
    assert {tuple(shape[1:]) for shape in seen} == {(3, 48, 48)}
    assert np.isfinite(found.values("mhex", "sad")).all()


def folder_of_images(tmp_path, masks=False):
    generator = np.random.default_rng(0)
    for name in ("cat", "dog"):
        for number in range(12):
            for folder in ("images", "masks") if masks else ("images",):
                path = tmp_path / folder / name / f"{number}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                shape = (40, 40, 3) if folder == "images" else (40, 40)
                Image.fromarray(generator.integers(0, 2 if folder == "masks" else 256, shape, dtype=np.uint8)).save(
                    path
                )
    return folder_bundle(tmp_path / "images", size=32)


def test_a_broken_file_costs_itself_alone(make_classifier, tmp_path):
    data = folder_of_images(tmp_path)
    Path(data.train.paths[3]).write_bytes(b"no image")
    asked = {"judge": Small(2), "methods": ["mhex", "random"], "metrics": ["sad"], "batch_size": 4}
    with pytest.warns(UnreadableImageWarning, match="left out"):
        found = compare(make_classifier(num_classes=2), data.train, data, out=tmp_path / "out", **asked)
    assert found.settings["compared"] == len(data.train)
    assert found.places == tuple(place for place in range(len(data.train)) if place != 3)
    assert found.values("random", "label").tolist() == [int(data.train.labels[place]) for place in found.places]


def test_masks_beside_a_folder_are_found_and_resized(make_classifier, tmp_path):
    data = folder_of_images(tmp_path, masks=True)
    images = data.train.with_masks(tmp_path / "masks")
    batch = images[2]
    source = np.asarray(Image.open(images.masks[2])) > 0
    assert batch.masks.shape == (1, 32, 32)
    assert float(batch.masks.float().mean()) == pytest.approx(source.mean(), abs=0.15)
    found = compare(
        make_classifier(num_classes=2),
        images,
        data,
        judge=Small(2),
        methods=["random"],
        metrics=["iou"],
        out=tmp_path / "out",
    )
    assert 0 < found.values("random", "iou").mean() < 1
    (tmp_path / "masks" / "cat" / "7.png").unlink()
    split = next(s for s in (data.train, data.test, data.validation) if any("cat/7.png" in path for path in s.paths))
    with pytest.raises(FileNotFoundError, match=r"cat/7\.png, and there is none"):
        split.with_masks(tmp_path / "masks")


def test_of_several_labels_the_one_the_judge_believes_in_is_explained(make_classifier, tmp_path):
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (6, 3, 32, 32), dtype=torch.uint8, generator=generator)
    labels = torch.tensor([[1, 1, 0], [0, 0, 1], [0, 0, 0], [1, 1, 1], [0, 1, 0], [1, 0, 1]], dtype=torch.float32)
    several = ArrayImages(images, labels)
    data = DataBundle(
        name="several",
        train=several,
        validation=None,
        test=several,
        class_names=("a", "b", "c"),
        multi_label=True,
        preprocessing=Preprocessing(size=32),
    )
    judge = Small(3)
    found = compare(
        make_classifier(num_classes=3, multi_label=True),
        several,
        data,
        judge=judge,
        methods=["mhex"],
        metrics=["sad"],
        out=tmp_path,
    )
    assert found.places == (0, 1, 3, 4, 5)
    beliefs = judge(data.preprocessing.normalize(images)).detach().sigmoid()
    expected = torch.where(labels > 0, beliefs, -1).argmax(dim=1)[[0, 1, 3, 4, 5]]
    assert found.values("mhex", "target").tolist() == expected.tolist()


def test_the_summary_is_means_with_intervals_that_a_bootstrap_gives(model, judge, data, tmp_path):
    found = compare(model, data.test, data, judge=judge, methods=METHODS, metrics=["sad", "deletion"], out=tmp_path)
    first, second, _ = found.summary(resamples=3000)
    values = found.values("mhex", "sad")
    assert first.scores["sad"].mean == pytest.approx(values.mean())
    assert first.differences == {}
    generator = np.random.default_rng(5)
    means = [generator.choice(values, len(values)).mean() for _ in range(3000)]
    spread = np.std(means)
    assert first.scores["sad"].low == pytest.approx(np.quantile(means, 0.025), abs=0.2 * spread)
    assert first.scores["sad"].high == pytest.approx(np.quantile(means, 0.975), abs=0.2 * spread)
    difference = second.differences["sad"]
    assert difference.mean == pytest.approx((found.values("centre-gaussian", "sad") - values).mean())
    assert difference.low <= difference.mean <= difference.high
    assert found.summary(resamples=50) == found.summary(resamples=50)
    with pytest.raises(ValueError, match="confidence must be in"):
        found.summary(confidence=1)


def test_undefined_values_are_left_out_and_leave_valid_json(model, judge, data, tmp_path):
    def blank(network, images, targets):
        return torch.zeros_like(images[:, 0])

    found = compare(
        model, data.test, data, judge=judge, methods={"blank": blank}, metrics=["sensitivity_n:subsets=4"], out=tmp_path
    )
    (summary,) = found.summary()
    assert summary.scores["sensitivity_n:subsets=4"].images == 0
    record = json.loads(found.to_json())
    assert record["methods"]["blank"]["scores"]["sensitivity_n:subsets=4"]["mean"] is None
    assert "| - [-, -] |" in found.to_markdown().replace("-* [", "- [")


def test_tables_name_what_is_best(model, judge, data, tmp_path):
    found = compare(model, data.test, data, judge=judge, methods=METHODS, metrics=["sad", "deletion"], out=tmp_path)
    means = {metric: [found.values(method, metric).mean() for method in METHODS] for metric in ("sad", "deletion")}
    markdown = found.to_markdown().splitlines()
    assert markdown[0] == "| method | SAD ↑ | deletion AUC ↓ | s / image |"
    for column, best in ((2, np.argmax(means["sad"])), (3, np.argmin(means["deletion"]))):
        marked = [row for row, line in enumerate(markdown[2:]) if "**" in line.split("|")[column]]
        assert marked == [best]
    assert len(found.to_text().splitlines()) == 4


def test_what_is_saved_is_plain_parquet(model, judge, data, tmp_path):
    found = compare(model, data.test, data, judge=judge, methods=["random"], metrics=["sad"], out=tmp_path)
    assert pq.read_table(tmp_path / "samples.parquet").num_rows == 10
    again = Comparison.load(tmp_path / "samples.parquet")
    assert again.settings == found.settings
    whole = (tmp_path / "samples.parquet").read_bytes()
    for content in (whole[: len(whole) // 2], b"", b"PAR1"):
        (tmp_path / "damaged.parquet").write_bytes(content)
        with pytest.raises(ValueError, match="damaged, or not the samples"):
            Comparison.load(tmp_path / "damaged.parquet")
    with pytest.raises(FileNotFoundError, match="there is no file"):
        Comparison.load(tmp_path / "nowhere.parquet")
    with pytest.raises(KeyError, match="there is no 'ead'"):
        found.values("random", "ead")


def test_figures_are_drawn(model, judge, data, tmp_path):
    found = compare(
        model, data.test, data, judge=judge, methods=METHODS, metrics=["insertion", "deletion:steps=4"], out=tmp_path
    )
    figure = found.plot()
    assert [len(axis.lines) for axis in figure.axes] == [3, 3]
    examples = draw_examples(model, data.test, data, METHODS, samples=2)
    assert len(examples.axes) == 2 * 5 + 1
    bare = compare(model, data.test, data, judge=judge, methods=METHODS, metrics=["sad"], out=tmp_path / "bare")
    with pytest.raises(ValueError, match="insertion or deletion to be plotted"):
        bare.plot()


def test_metrics_are_read_from_text():
    measure = parse_metric("deletion:steps=8,baseline=mean")
    assert measure.options == {"steps": 8, "baseline": "mean"}
    assert measure.title == "deletion AUC (steps=8,baseline=mean)"
    assert all(parse_metric(name).name == name for name in SCORES)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("beauty", "metric must be one of sad|metric must be one of avg_drop"),
        ("sad:steps=3", "options of metric 'sad' must be NAME=VALUE with a name among: none"),
        ("deletion:step=3", "among: steps, baseline; got 'step=3'"),
        ("deletion:steps", "got 'steps'"),
    ],
)
def test_metrics_that_are_none_are_refused(text, message):
    with pytest.raises(ValueError, match=message):
        parse_metric(text)


def returns(value):
    return lambda network, images, targets: value(images)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"methods": "mhex"}, TypeError, "methods must be a sequence"),
        ({"methods": []}, ValueError, "methods must be at least one"),
        ({"methods": ["random", "random"]}, ValueError, "methods must be each once"),
        ({"methods": ["gradcamel"]}, ValueError, "name must be one of"),
        ({"metrics": []}, ValueError, "metrics must be at least one"),
        ({"metrics": ["sad", "sad"]}, ValueError, "each once"),
        ({"limit": 0}, ValueError, "limit must be at least 1"),
        ({"batch_size": 0}, ValueError, "batch_size must be at least 1"),
        ({"methods": {"x": returns(lambda images: 3)}}, TypeError, "method 'x' must return a tensor"),
        ({"methods": {"x": returns(lambda images: images)}}, ValueError, "method 'x' must return maps of shape"),
        ({"methods": {"x": returns(lambda images: images[:, 0] * torch.nan)}}, ValueError, "not finite"),
    ],
)
def test_errors_name_the_argument(model, judge, data, tmp_path, change, error, message):
    asked = {"methods": ["random"], "metrics": ["sad"], "judge": judge, "out": tmp_path} | change
    with pytest.raises(error, match=message):
        compare(model, data.test, data, **asked)


def test_a_network_judges_itself_only_where_that_is_meant(model, judge, data, tmp_path):
    asked = {"methods": ["random"], "metrics": ["sad"], "out": tmp_path / "out"}
    for same in (model, copy.deepcopy(model)):
        with pytest.raises(ValueError, match=r"judge must be another network .* got the same weights.*self_judged"):
            compare(model, data.test, data, judge=same, **asked)
    assert not (tmp_path / "out").exists()
    found = compare(model, data.test, data, judge=model, self_judged=True, **asked)
    assert found.settings["self_judged"] is True
    assert json.loads(found.to_json())["settings"]["self_judged"] is True
    other = compare(model, data.test, data, judge=judge, self_judged=True, **(asked | {"out": tmp_path / "other"}))
    assert other.settings["self_judged"] is False


def test_localisation_needs_masks(model, judge, data, tmp_path):
    bare = ArrayImages(data.test.images, data.test.labels)
    with pytest.raises(ValueError, match="need masks, and these images have none"):
        compare(model, bare, data, judge=judge, methods=["random"], metrics=["iou"], out=tmp_path)


def test_the_networks_are_left_as_they_were(model, judge, data, tmp_path):
    model.train()
    judge.train()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compare(model, data.test, data, judge=judge, methods=["mhex"], metrics=["sad"], out=tmp_path)
    assert model.training
    assert judge.training
