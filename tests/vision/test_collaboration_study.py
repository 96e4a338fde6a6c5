"""The study of collaboration: against each image on its own, scipy and scikit-learn; its files and figures."""

import builtins
import math

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import stats
from torch import nn
from torch.testing import assert_close

from mhex_vision import Preprocessing, collaboration
from mhex_vision.collaboration import CollaborationStudy, collaboration_study, spatial_collaboration
from mhex_vision.data import DataBundle, UnreadableImageWarning
from mhex_vision.data.sets import ArrayImages, FolderImages

SIDE = 11


def bundle(images):
    return DataBundle(
        name="made up",
        train=images,
        validation=None,
        test=images,
        class_names=("a", "b", "c"),
        multi_label=images.labels.ndim == 2,
        preprocessing=Preprocessing(size=SIDE),
    )


@pytest.fixture
def images():
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (13, 3, SIDE, SIDE), generator=generator, dtype=torch.uint8)
    return ArrayImages(pixels, torch.randint(0, 3, (13,), generator=generator))


@pytest.fixture
def judge(networks):
    """Another network than the one explained."""
    torch.manual_seed(9)
    return networks.shaken(networks.Net(), 9)


@pytest.fixture
def settings(judge):
    return {"judge": judge, "batch_size": 4, "spatial": 3, "progress": False}


@pytest.fixture
def made():
    """A study of made-up numbers that go together a little."""
    rng = np.random.default_rng(0)
    values = rng.uniform(-1, 1, size=(40, 5))
    mean = values[:, -3:].mean(axis=1)
    return CollaborationStudy(
        collaboration=torch.from_numpy(values).float(),
        sad=torch.from_numpy(np.clip(0.5 + 0.4 * mean + 0.1 * rng.normal(size=40), 0, 1)).float(),
        confidence=torch.from_numpy(np.clip(0.5 - 0.1 * mean + 0.2 * rng.normal(size=40), 0, 1)).float(),
        labels=torch.arange(40) % 3,
        layer_names=tuple(f"layer{i}.größe" for i in range(5)),
        spatial=torch.from_numpy(rng.uniform(-1, 1, size=(6, 4, 4))).float(),
    )


def mean_replaced(image, rows, columns):
    """One cell, pixel by pixel."""
    changed = image.copy()
    for channel in range(3):
        mean = image[channel].mean()
        for y in rows:
            for x in columns:
                changed[channel, y, x] = mean
    return changed


def test_the_study_equals_each_image_on_its_own(make_classifier, images, judge, settings):
    model = make_classifier().train()
    data = bundle(images)
    study = collaboration_study(model, images, data, spatial_images=None, **settings)
    assert model.training
    assert judge.training
    assert study.collaboration.shape == (13, 2)
    assert study.layer_names == ("steps.0", "steps.1")
    assert study.spatial.shape == (13, 3, 3)
    model.eval()
    judge.eval()
    for index in range(13):
        x = data.preprocessing.normalize(images.images[index : index + 1])
        label = images.labels[index : index + 1]
        assert_close(study.collaboration[index], model.collaboration(x, label)[0], rtol=1e-4, atol=1e-5)
        explained = model.explain(x, label)
        assert study.confidence[index].item() == pytest.approx(explained.probabilities[0, label].item(), abs=1e-5)
        s = explained.saliency[0].numpy()
        original = x[0].numpy()
        soft = np.stack([c * (1 - s) + c.mean() * s for c in original])
        with torch.no_grad():
            p, q = judge(torch.from_numpy(np.stack([original, soft]))).softmax(dim=1)[:, label].flatten().tolist()
        assert study.sad[index].item() == pytest.approx(max(0, (p - q) / p), abs=1e-4)
        for i in range(3):
            for j in range(3):
                rows, columns = (range(n * SIDE // 3, (n + 1) * SIDE // 3) for n in (i, j))
                variant = torch.from_numpy(mean_replaced(original, rows, columns))[None]
                expected = model.collaboration(variant, label).sum().item()
                assert study.spatial[index, i, j].item() == pytest.approx(expected, abs=1e-4)
    assert torch.equal(study.labels, images.labels)


def test_the_batch_is_not_felt(make_classifier, images, settings):
    model = make_classifier()
    studies = [
        collaboration_study(model, images, bundle(images), **settings | {"batch_size": size}) for size in (1, 5, 100)
    ]
    for other in studies[1:]:
        for name in ("collaboration", "sad", "confidence", "labels", "spatial"):
            assert_close(getattr(other, name), getattr(studies[0], name), rtol=1e-4, atol=1e-5)


def test_cells_cover_the_image_once():
    for height, width, cells in ((11, 7, 3), (7, 7, 7), (5, 9, 1), (28, 28, 7)):
        members = collaboration._members(height, width, cells)
        assert members.shape == (cells**2, height, width)
        assert (members.sum(dim=0) == 1).all()
        sizes = members.sum(dim=(1, 2))
        assert sizes.min() >= (height // cells) * (width // cells)


def test_spatial_images_are_spread_over_the_set(make_classifier, images, settings):
    model = make_classifier()
    whole = collaboration_study(model, images, bundle(images), spatial_images=None, **settings)
    few = collaboration_study(model, images, bundle(images), spatial_images=4, **settings)
    assert_close(few.spatial, whole.spatial[[0, 4, 8, 12]], rtol=1e-4, atol=1e-5)
    none = collaboration_study(model, images, bundle(images), **settings | {"spatial": None})
    assert none.spatial is None


def test_unreadable_files_are_left_out(make_classifier, images, settings, tmp_path):
    samples = []
    for number, (pixels, label) in enumerate(zip(images.images, images.labels.tolist(), strict=True)):
        path = tmp_path / f"{number}.png"
        Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(path)
        samples.append((path, label))
    broken = [0, 5, 6, 7]
    for number in broken:
        (tmp_path / f"{number}.png").write_bytes(b"broken")
    files = FolderImages(samples, Preprocessing(size=SIDE))
    kept = [number for number in range(13) if number not in broken]
    model = make_classifier()
    whole = collaboration_study(model, images, bundle(images), spatial_images=None, **settings)
    for size in (4, 1):  # with 1, whole batches are unreadable
        with pytest.warns(UnreadableImageWarning):
            study = collaboration_study(
                model, files, bundle(files), spatial_images=None, **settings | {"batch_size": size}
            )
        for name in ("collaboration", "sad", "confidence", "labels", "spatial"):
            assert_close(getattr(study, name), getattr(whole, name)[kept], rtol=1e-4, atol=1e-5)
    none = FolderImages([samples[0], samples[5]], Preprocessing(size=SIDE))
    with (
        pytest.warns(UnreadableImageWarning),
        pytest.raises(ValueError, match="images must hold at least one that can be read, got none"),
    ):
        collaboration_study(model, none, bundle(none), **settings)


def test_the_saliency_judged_may_be_chosen(make_classifier, images, settings):
    model = make_classifier()
    settings |= {"spatial": None}
    default, other = (
        collaboration_study(model, images, bundle(images), options=options, **settings)
        for options in (None, {"beta": 1.0, "decay": 0.2})
    )
    assert not torch.equal(default.sad, other.sad)
    assert torch.equal(default.collaboration, other.collaboration)


@pytest.mark.parametrize("last", [1, 3, 5, 9])
def test_pearson_is_scipys(made, last):
    values = made.collaboration.double().numpy()[:, -last:].mean(axis=1)
    found = made.pearson(last)
    for name in ("sad", "confidence"):
        expected = stats.pearsonr(values, getattr(made, name).double().numpy())
        assert getattr(found, name) == pytest.approx((expected.statistic, expected.pvalue), rel=1e-4)


def test_pearson_by_hand(made):
    a, b = (each.double().tolist() for each in (made.collaboration[:, -3:].mean(dim=1), made.sad))
    ma, mb = sum(a) / 40, sum(b) / 40
    above = sum((x - ma) * (y - mb) for x, y in zip(a, b, strict=True))
    below = math.sqrt(sum((x - ma) ** 2 for x in a) * sum((y - mb) ** 2 for y in b))
    assert made.pearson().sad.r == pytest.approx(above / below)


def part(study, count, **change):
    fields = {name: getattr(study, name)[:count] for name in ("collaboration", "sad", "confidence", "labels")}
    return CollaborationStudy(**fields | {"layer_names": study.layer_names} | change)


def test_correlations_that_are_not_defined_are_nan(made):
    flat = part(made, 40, collaboration=torch.zeros(40, 5))
    assert all(math.isnan(value) for pair in flat.pearson() for value in pair)
    for count in (0, 1):
        assert all(math.isnan(value) for pair in part(made, count).pearson() for value in pair)
    sure = part(made, 40, confidence=torch.ones(40)).pearson()
    assert math.isnan(sure.confidence.r)
    assert not math.isnan(sure.sad.r)


def test_blocks_without_a_gate_do_not_collaborate(make_classifier, images, settings):
    model = make_classifier(gate=False)
    study = collaboration_study(model, images, bundle(images), **settings)
    assert not study.collaboration.any()
    assert math.isnan(study.pearson().sad.r)
    study.plot().canvas.draw()


def test_mutual_information_is_scikit_learns(made):
    feature_selection = pytest.importorskip("sklearn.feature_selection")
    values = made.mean_collaboration(2).double().numpy()[:, None]
    found = made.mutual_information(2, neighbors=4, seed=3)
    for name in ("sad", "confidence"):
        other = getattr(made, name).double().numpy()
        expected = feature_selection.mutual_info_regression(values, other, n_neighbors=4, random_state=3)
        assert getattr(found, name) == pytest.approx(expected[0])
    assert found.sad > found.confidence >= 0
    assert made.mutual_information() == made.mutual_information()


def test_mutual_information_of_a_gaussian_is_in_nats():
    """-log(1 - rho^2) / 2 is its mutual information."""
    pytest.importorskip("sklearn")
    rng = np.random.default_rng(0)
    x, noise = rng.normal(size=(2, 3000))
    y = 0.9 * x + math.sqrt(1 - 0.81) * noise
    study = CollaborationStudy(
        collaboration=torch.from_numpy(x)[:, None],
        sad=torch.from_numpy(y),
        confidence=torch.from_numpy(noise),
        labels=torch.zeros(3000, dtype=torch.int64),
        layer_names=("a",),
    )
    assert study.mutual_information().sad == pytest.approx(-math.log(1 - 0.81) / 2, abs=0.05)
    assert study.mutual_information().confidence < 0.05


def test_mutual_information_needs_more_images_than_neighbours(made):
    with pytest.raises(ValueError, match="neighbors must be below 3, the number of images, got 3"):
        part(made, 3).mutual_information()


@pytest.mark.parametrize(
    ("package", "call", "words"),
    [
        ("scipy", "pearson", r"correlations need scipy: pip install 'mhex-vision\[bench\]'"),
        ("sklearn", "mutual_information", r"mutual information needs scikit-learn: pip install 'mhex-vision\[bench\]'"),
    ],
)
def test_what_is_missing_is_named(made, monkeypatch, package, call, words):
    imported = builtins.__import__

    def missing(name, *rest):
        if name.split(".")[0] == package:
            raise ImportError(name)
        return imported(name, *rest)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(ImportError, match=words):
        getattr(made, call)()


def test_a_study_is_kept_whole(made, tmp_path):
    path = tmp_path / "study"
    assert made.save(path) == path
    assert [file.name for file in tmp_path.iterdir()] == ["study"]
    for study in (made, part(made, 40, spatial=None), part(made, 0)):
        study.save(path)
        loaded = CollaborationStudy.load(path)
        assert loaded.layer_names == study.layer_names
        for name in ("collaboration", "sad", "confidence", "labels", "spatial"):
            if getattr(study, name) is None:
                assert getattr(loaded, name) is None
            else:
                assert_close(getattr(loaded, name), getattr(study, name), rtol=0, atol=0)
    assert CollaborationStudy.load(path).labels.dtype == torch.int64


@pytest.mark.parametrize("kind", ["text", "empty", "other", "truncated", "pickle", "array"])
def test_a_file_that_is_no_study_is_refused(made, tmp_path, kind):
    path = tmp_path / "study.npz"
    made.save(path)
    if kind == "text":
        path.write_text("no study")
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "other":
        np.savez(path, a=np.zeros(3))
    elif kind == "truncated":
        path.write_bytes(path.read_bytes()[:-100])
    elif kind == "pickle":
        np.savez(path, layer_names=np.array([{}], dtype=object))
    else:
        with path.open("wb") as file:
            np.save(file, np.zeros(3))
    with pytest.raises(ValueError, match=r"path must be a saved collaboration study, got .*study\.npz"):
        CollaborationStudy.load(path)
    with pytest.raises(FileNotFoundError):
        CollaborationStudy.load(tmp_path / "none")


def test_the_figure_says_what_was_found(made):
    figure = made.plot()
    figure.canvas.draw()
    titles = [axis.get_title() for axis in figure.axes]
    r, p = made.pearson().sad
    assert titles[:4] == [
        f"SAD: r = {r:.3f}, p = {p:.2g}",
        "confidence: r = {:.3f}, p = {:.2g}".format(*made.pearson().confidence),
        "per block",
        "cell replaced, mean of 6",
    ]
    points = figure.axes[0].collections[0].get_offsets()
    assert_close(torch.tensor(points[:, 0].tolist()), made.mean_collaboration(), rtol=1e-5, atol=1e-6)
    assert [label.get_text() for label in figure.axes[2].get_xticklabels()] == list(made.layer_names)
    part(made, 0).plot().canvas.draw()
    import matplotlib.pyplot as plt

    assert not plt.get_fignums()


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"sad": torch.zeros(3)}, ValueError, r"sad must have shape \(40,\), got \(3,\)"),
        ({"labels": torch.zeros(40, 2)}, ValueError, "labels must have 1 dimensions"),
        ({"layer_names": ("a",)}, ValueError, "layer_names must hold 5 names, got 1"),
        ({"spatial": torch.zeros(2, 3, 4)}, ValueError, r"spatial must have shape \(N', g, g\), got \(2, 3, 4\)"),
        ({"collaboration": [0.0]}, TypeError, "collaboration must be a torch.Tensor, got list"),
    ],
    ids=["sad", "labels", "names", "spatial", "list"],
)
def test_a_study_that_does_not_fit_is_refused(made, change, error, words):
    with pytest.raises(error, match=words):
        part(made, 40, **change)


def test_spatial_collaboration_of_no_image_and_of_what_does_not_fit(make_classifier, make_images):
    model, x = make_classifier(), make_images(2, (8, 9))
    assert spatial_collaboration(model, x[:0], 1, cells=2).shape == (0, 2, 2)
    assert spatial_collaboration(model.double(), x.double(), 1, cells=2).dtype == torch.float64
    with pytest.raises(ValueError, match="cells must be at most 8, the shorter side of the images, got 9"):
        spatial_collaboration(model, x, 1, cells=9)
    with pytest.raises(ValueError, match=r"target must have shape \(2,\), got \(2, 1\)"):
        spatial_collaboration(model, x, torch.zeros(2, 1, dtype=torch.int64), cells=2)
    with pytest.raises(TypeError, match="model must be an MHEXClassifier, got Linear"):
        spatial_collaboration(nn.Linear(1, 1), x, 1)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"model": nn.Linear(1, 1)}, TypeError, "model must be an MHEXClassifier, got Linear"),
        ({"images": [1]}, TypeError, "images must be ArrayImages or FolderImages, got list"),
        ({"data": None}, TypeError, "data must be a DataBundle, got NoneType"),
        ({"judge": len}, TypeError, "judge must be a Judge or a network"),
        ({"batch_size": 0}, ValueError, "batch_size must be at least 1, got 0"),
        ({"spatial": 0}, ValueError, "spatial must be at least 1, got 0"),
        ({"spatial_images": 0}, ValueError, "spatial_images must be at least 1, got 0"),
        ({"progress": 1}, TypeError, "progress must be a bool, got int"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_arguments_are_named(make_classifier, images, settings, change, error, words):
    fitting = {"model": make_classifier(), "images": images, "data": bundle(images)} | settings | change
    given = [fitting.pop(name) for name in ("model", "images", "data")]
    with pytest.raises(error, match=words):
        collaboration_study(*given, **fitting)


def test_several_labels_are_refused(make_classifier, images, settings):
    several = ArrayImages(images.images, nn.functional.one_hot(images.labels, 3).float())
    with pytest.raises(ValueError, match="data must have one true class per image, got several labels"):
        collaboration_study(make_classifier(), several, bundle(several), **settings)
    with pytest.raises(ValueError, match="data must have one true class per image"):
        collaboration_study(make_classifier(multi_label=True), images, bundle(images), **settings)
