"""Networks without blocks: trained, saved, loaded and told from those with blocks."""

import json

import pytest
import torch
from torch.testing import assert_close

from mhex_vision import MHEXClassifier, PlainClassifier, Preprocessing, checkpoint, load_classifier
from mhex_vision.data.lesions import lesions_bundle
from mhex_vision.plain import PlainConfig
from mhex_vision.recipes import Recipe
from mhex_vision.training import train

NAME = "resnet18"


@pytest.fixture(scope="module")
def plain():
    torch.manual_seed(0)
    return PlainClassifier.from_name(NAME, 3).with_metadata(
        class_names=("a", "b", "c"), preprocessing=Preprocessing(size=32)
    )


def test_a_plain_network_comes_back_as_it_was(plain, tmp_path, make_images):
    plain.save_pretrained(tmp_path / "run")
    for again in (PlainClassifier.from_pretrained(tmp_path / "run"), load_classifier(tmp_path / "run")):
        assert isinstance(again, PlainClassifier)
        assert not again.training
        assert again.config == plain.config
        images = make_images()
        with torch.no_grad():
            assert_close(again(images), plain.eval()(images), rtol=0, atol=0)


def test_a_classifier_with_blocks_is_told_from_one_without(tmp_path):
    torch.manual_seed(0)
    model = MHEXClassifier.from_backbone(NAME, 3, at="stage")
    model.save_pretrained(tmp_path)
    assert isinstance(load_classifier(tmp_path), MHEXClassifier)
    with pytest.raises(ValueError, match="not the configuration of a plain classifier"):
        PlainClassifier.from_pretrained(tmp_path)


def test_a_plain_run_loads_without_further_ado_and_resumes(tmp_path):
    data = lesions_bundle(size=32, train=32, validation=8, test=8)
    recipe = Recipe(epochs=1, batch_size=16)
    torch.manual_seed(0)
    model = PlainClassifier.from_name(NAME, data.num_classes)
    result = train(model, data, recipe, out=tmp_path)
    loaded = load_classifier(tmp_path)
    assert loaded.config.class_names == data.class_names
    assert loaded.config.preprocessing == data.preprocessing
    images = data.preprocessing.normalize(data.test.images)
    with torch.no_grad():
        assert_close(loaded(images), model.eval()(images), rtol=0, atol=0)
    assert train(PlainClassifier.from_name(NAME, data.num_classes), data, recipe, out=tmp_path) == result
    with pytest.raises(ValueError, match="model has 3 classes"):
        train(PlainClassifier.from_name(NAME, 3), data, recipe, out=tmp_path / "other")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not JSON"),
        ("{}", "no key"),
        ('{"mhex_vision_plain_format": 2}', "format 2 is not 1"),
        ('{"mhex_vision_plain_format": 1, "backbone": "resnet18"}', "num_classes"),
        ('{"mhex_vision_plain_format": 1, "backbone": "resnet18", "num_classes": 0}', "num_classes must be at least 1"),
        ('{"mhex_vision_plain_format": 1, "backbone": "resnet18", "num_classes": 2, "x": 1}', "x"),
        ('{"mhex_vision_plain_format": 1, "backbone": "nonesuch", "num_classes": 2}', "nonesuch"),
    ],
)
def test_a_damaged_configuration_is_named(plain, tmp_path, text, message):
    plain.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        PlainClassifier.from_pretrained(tmp_path)


def test_nothing_is_loaded_from_nowhere(plain, tmp_path):
    with pytest.raises(FileNotFoundError, match="no folder"):
        load_classifier(tmp_path / "nowhere")
    plain.save_pretrained(tmp_path)
    (tmp_path / checkpoint.WEIGHTS_FILE).unlink()
    with pytest.raises(FileNotFoundError, match=r"model\.safetensors is missing"):
        load_classifier(tmp_path)
    (tmp_path / "config.json").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="cannot be used"):
        load_classifier(tmp_path)


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        ({"backbone": None}, TypeError),
        ({"num_classes": True}, TypeError),
        ({"multi_label": 1}, TypeError),
        ({"class_names": "ab"}, TypeError),
        ({"class_names": ("a",)}, ValueError),
    ],
)
def test_settings_are_checked(settings, error):
    with pytest.raises(error, match=next(iter(settings))):
        PlainConfig(**({"backbone": NAME, "num_classes": 2} | settings))


def test_the_configuration_is_readable_json(plain):
    values = json.loads(plain.config.to_json())
    assert values["backbone"] == NAME
    assert values["preprocessing"]["size"] == 32
    with pytest.raises(ValueError, match="only class_names and preprocessing"):
        plain.with_metadata(backbone="resnet34")
