"""`mhex-vision report` as a user meets it, and which classes it explains."""

import shutil
from pathlib import Path

import pytest
import torch

from mhex_vision import cli, load_classifier, load_data
from mhex_vision.exploring import NamedBatch, chosen_places, classes_to_explain, explore

from .test_cli import ENVIRONMENT, MODULE, picture
from .test_reporting import document

OWN = "def brightness(model, images, targets):\n    return images.mean(dim=1)\n"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Images, a network, a plain one, and a method of one's own."""
    folder = tmp_path_factory.mktemp("report")
    for label, shade in (("dark", 60), ("light cells", 190)):
        for number in range(20):
            picture(folder / "photos" / label / f"{number:02d}.png", shade=shade, seed=number)
    asked = ("--data", folder / "photos", "--size", 32, "--epochs", 1, "--batch-size", 8)
    for name, more in (("net", ()), ("judge", ("--plain",))):
        assert cli.main([str(part) for part in ("train", *asked, *more, "--out", folder / name)]) == 0
    (folder / "mymaps.py").write_text(OWN)
    return folder


def arguments(place, out, **changes):
    asked = {"checkpoint": place / "net", "data": place / "photos", "out": out} | changes
    flags = ((f"--{key.replace('_', '-')}", value) for key, value in asked.items() if value is not None)
    return ["report", *(str(part) for pair in flags for part in pair)]


def test_a_page_of_labelled_images_by_several_methods(vision_python, place, tmp_path):
    out = tmp_path / "not there yet" / "page.html"
    methods = "mhex,mhex:beta=0.25,decay=1,random,mymaps:brightness"
    asked = arguments(place, out, methods=methods, split="train", samples=6, beta=0.5, title="Cells")
    done = vision_python.run(*MODULE, *asked, environment=ENVIRONMENT, folder=place)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    lines = done.stdout.splitlines()
    assert lines[0].startswith(f"wrote {out} (")
    assert lines[0].endswith(" MB): 6 of 6 images by 4 methods, 2.0 classes each")
    assert lines[1:] == [f"next: open '{out}' in a browser"]
    assert [path.name for path in out.parent.iterdir()] == ["page.html"]

    found, _ = document(out.read_text(encoding="utf-8"))
    assert [method["name"] for method in found["methods"]] == [
        "mhex",
        "mhex:beta=0.25,decay=1",
        "random",
        "mymaps:brightness",
    ]
    assert [method["beta"] for method in found["methods"][:2]] == [0.5, 0.25]
    assert set(found["methods"][1]["layer_weights"]) == {1.0}
    assert [method["signed"] for method in found["methods"]] == [False, False, False, True]
    assert (found["title"], found["about"]["checkpoint"]) == ("Cells", str(place / "net"))
    assert found["about"]["images"] == "photos, train, 6 of 32 by chance (seed 0)"
    data = load_data(place / "photos", size=32)
    for sample in found["samples"]:
        assert sample["name"].split("/")[0] == data.class_names[sample["label"]]
        explained = [one["target"] for one in sample["evidence"] if one["method"] == 0]
        assert explained == [sample["prediction"], 1 - sample["prediction"]]
    # In the order of the data, and another choice with another seed.
    paths = [f"{path.split('/')[-2]}/{path.split('/')[-1]}" for path in data.train.paths]
    chosen = [paths.index(sample["name"]) for sample in found["samples"]]
    assert chosen == sorted(chosen) == chosen_places(32, 6, 0)


def test_files_that_cannot_be_read_are_named_and_the_status_says_so(place, tmp_path, capsys):
    mixed = tmp_path / "mixed"
    shutil.copytree(place / "photos" / "dark", mixed / "below")
    (mixed / "below" / "05.png").write_bytes(b"no image")
    (mixed / "empty.png").write_bytes(b"")
    out = tmp_path / "page.html"
    assert cli.main(arguments(place, out, data=None, input=mixed, batch_size=7)) == 3
    said = capsys.readouterr()
    assert [line.split(": ")[1:3] for line in said.err.splitlines()] == [
        ["skipped", str(mixed / "below" / "05.png")],
        ["skipped", str(mixed / "empty.png")],
    ]
    assert "19 of 21 images" in said.out
    found, _ = document(out.read_text(encoding="utf-8"))
    names = [f"below/{number:02d}.png" for number in range(20) if number != 5]
    assert [(sample["name"], sample["label"]) for sample in found["samples"]] == [(name, None) for name in names]
    assert found["about"]["images"] == str(mixed)


@pytest.mark.filterwarnings("default::mhex_vision.data.UnreadableImageWarning")
def test_images_of_a_set_that_cannot_be_read_are_left_out(place, tmp_path, capsys):
    photos = tmp_path / "photos"
    shutil.copytree(place / "photos", photos)
    data = load_data(photos, size=32)
    Path(data.test.paths[0]).write_bytes(b"no image")
    assert cli.main(arguments(place, tmp_path / "page.html", data=photos)) == 3
    said = capsys.readouterr()
    assert "left out" in said.err
    assert f"{len(data.test) - 1} of {len(data.test)} images" in said.out


def test_what_does_not_fit_is_left_out_and_said(place, tmp_path, capsys):
    whole, small = tmp_path / "whole.html", tmp_path / "small.html"
    assert cli.main(arguments(place, whole, split="train")) == 0
    size = whole.stat().st_size
    assert cli.main(arguments(place, small, split="train", max_mb=(size - 20_000) / 1e6)) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-2].endswith("--max-mb takes more")
    assert int(lines[-2].split()[0]) >= 1
    assert small.stat().st_size <= size - 20_000
    assert cli.main(arguments(place, tmp_path / "none.html", max_mb=0.001)) == 1
    assert "--max-mb must leave room" in capsys.readouterr().err
    assert not (tmp_path / "none.html").exists()


def test_a_plain_network_is_explained_by_other_methods(place, tmp_path, capsys):
    out = tmp_path / "page.html"
    assert cli.main(arguments(place, out, checkpoint=place / "judge", methods="centre-gaussian")) == 0
    found, _ = document(out.read_text(encoding="utf-8"))
    assert all(sample["heads"] == [] for sample in found["samples"])
    capsys.readouterr()
    assert cli.main(arguments(place, out, checkpoint=place / "judge", methods="random,mhex-paper")) == 1
    assert "is a plain network; choose other --methods than mhex-paper" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"samples": 0}, "--samples must be at least 1, got 0"),
        ({"targets": 0}, "--targets must be at least 1, got 0"),
        ({"batch_size": -1}, "--batch-size must be at least 1, got -1"),
        ({"seed": -1}, "--seed must be at least 0, got -1"),
        ({"max_mb": 0}, "--max-mb must be above 0, got 0"),
        ({"max_mb": "nan"}, "--max-mb must be above 0, got nan"),
        ({"methods": "gradcamel"}, "--methods must be one of mhex"),
        ({"methods": "mhex,mhex"}, "each once"),
        ({"methods": "random", "beta": 0.5}, "--beta belongs to the classifier's own saliency"),
        ({"beta": 2}, "beta"),
        ({"data": "synthetic-lesions"}, "--checkpoint must know the classes of synthetic-lesions"),
        ({"data": None, "input": "nowhere"}, "there is no nowhere"),
        ({"data": None, "input": "photos", "split": "test"}, "--split goes with --data"),
        ({"data": None, "input": "photos", "root": "."}, "--root goes with --data"),
        ({"checkpoint": "nowhere"}, "there is no folder nowhere"),
        ({"out": "photos"}, "--out must be a file, got the folder photos"),
        ({"data": None, "input": "photos/dark/01.png", "out": "photos/dark/01.png"}, "--out must be another file"),
    ],
    ids=str,
)
def test_errors_are_one_line(place, tmp_path, monkeypatch, capsys, changes, words):
    monkeypatch.chdir(place)
    assert cli.main(arguments(place, **({"out": tmp_path / "page.html"} | changes))) == 1
    (complaint,) = capsys.readouterr().err.splitlines()
    assert words in complaint
    assert not (tmp_path / "page.html").exists()


@pytest.mark.parametrize("given", [[], ["--input", "x", "--data", "y"]])
def test_it_is_either_files_or_a_set(given):
    with pytest.raises(SystemExit) as left:
        cli.main(["report", "--checkpoint", "x", "--out", "y", *given])
    assert left.value.code == 2


# ----------------------------------------------------------------------------------------------- classes and choices


def test_the_predicted_class_comes_first_then_the_true_one_then_the_others():
    probabilities = torch.tensor([[0.1, 0.5, 0.1, 0.3], [0.4, 0.3, 0.2, 0.1], [0.25, 0.25, 0.25, 0.25]])
    assert classes_to_explain(probabilities, None, targets=2).tolist() == [[1, 3], [0, 1], [0, 1]]
    found = classes_to_explain(probabilities, torch.tensor([2, 1, 0]), targets=2).tolist()
    assert found == [[1, 2, 3], [0, 1, 0], [0, 1, 0]]
    assert classes_to_explain(probabilities, torch.tensor([1, 0, 0]), targets=9).shape == (3, 4)


def test_of_several_true_classes_the_most_probable_is_explained():
    probabilities = torch.tensor([[0.9, 0.1, 0.8], [0.9, 0.2, 0.1]])
    labels = torch.tensor([[0.0, 1.0, 1.0], [0.0, 0.0, 0.0]])
    assert classes_to_explain(probabilities, labels, targets=1).tolist() == [[0, 2], [0, 0]]


@pytest.mark.parametrize(("count", "samples"), [(10, 3), (10, 10), (3, 200)])
def test_a_choice_is_in_order_and_repeats_itself(count, samples):
    chosen = chosen_places(count, samples, 7)
    assert chosen == sorted(set(chosen)) == chosen_places(count, samples, 7)
    assert len(chosen) == min(count, samples)


def test_a_method_is_signed_if_it_is_in_any_batch(place):
    model = load_classifier(place / "net")
    images = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)
    batches = [NamedBatch(["a", "b"], images[:2]), NamedBatch(["c", "d"], images[2:])]
    values = iter([1.0, -1.0])

    def method(model, images, targets):
        return torch.full((len(images), 32, 32), next(values))

    page = explore(model, batches, {"mine": method}, count=2, targets=1)
    assert [one["signed"] for one in document(page)[0]["methods"]] == [True]


def test_without_a_readable_image_there_is_no_page(place):
    with pytest.raises(ValueError, match="at least one image that can be read"):
        explore(load_classifier(place / "net"), [], {}, count=0)
