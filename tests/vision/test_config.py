"""Settings survive JSON, and nonsense is named."""

import dataclasses
import json

import pytest

from mhex_vision import MHEXConfig, Preprocessing


def test_settings_survive_json():
    config = MHEXConfig(
        backbone="resnet18",
        num_classes=2,
        at="stage",
        gate=False,
        freeze_backbone=True,
        classifier="keep",
        objective="joint",
        decay=0.5,
        activation="shortcut",
        multi_label=True,
        image_size=96,
        class_names=("Füchse", "猫"),
        preprocessing=Preprocessing(size=28, mean=(0.1, 0.2, 0.3), resize="crop"),
    )
    # Every field differs from its default, so that none can be lost unseen.
    defaults = [field for field in dataclasses.fields(config) if field.default is not dataclasses.MISSING]
    assert all(getattr(config, field.name) != field.default for field in defaults)
    assert MHEXConfig.from_json(config.to_json()) == config
    assert MHEXConfig.from_json(MHEXConfig(backbone=None, num_classes=2).to_json()).backbone is None


def test_a_setting_that_an_older_file_lacks_has_its_default():
    text = json.dumps({"mhex_vision_format": 1, "backbone": "resnet18", "num_classes": 3})
    assert MHEXConfig.from_json(text) == MHEXConfig(backbone="resnet18", num_classes=3)


def test_it_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        MHEXConfig(backbone=None, num_classes=2).gate = False


BAD_SETTINGS = [
    ({"backbone": 18}, "backbone must be a name or None, got int"),
    ({"num_classes": "3"}, "num_classes must be an int, got str"),
    ({"num_classes": True}, "num_classes must be an int, got bool"),
    ({"num_classes": 0}, "num_classes must be at least 1, got 0"),
    ({"image_size": 2.5}, "image_size must be an int, got float"),
    ({"at": "top"}, "at must be one of 'all', 'downsample', 'stage', got 'top'"),
    ({"at": ["all"]}, "at must be one of"),
    ({"classifier": None}, "classifier must be one of 'drop', 'keep', got None"),
    ({"objective": "sum"}, "objective must be one of 'layerwise', 'joint'"),
    ({"activation": 1}, "activation must be one of 'sum', 'shortcut'"),
    ({"gate": "yes"}, "gate must be a bool, got str"),
    ({"multi_label": 0}, "multi_label must be a bool, got int"),
    ({"decay": -0.1}, r"decay must be a number in \[0, 1\], got -0.1"),
    ({"decay": "0.8"}, r"decay must be a number in \[0, 1\], got '0.8'"),
    ({"decay": float("nan")}, r"decay must be a number in \[0, 1\], got nan"),
    ({"class_names": ["a", "b"]}, "class_names must hold 3 names, got 2"),
    ({"class_names": "abc"}, "class_names must be a sequence of texts, got 'abc'"),
    ({"class_names": [1, 2, 3]}, "class_names must be a sequence of texts"),
    ({"class_names": 3}, "class_names must be a sequence of texts, got 3"),
]


@pytest.mark.parametrize(("change", "words"), BAD_SETTINGS, ids=str)
def test_a_bad_setting_is_named_in_code_and_in_a_file(change, words):
    values = {"backbone": "resnet18", "num_classes": 3} | change
    with pytest.raises((TypeError, ValueError), match=words):
        MHEXConfig(**values)
    with pytest.raises(ValueError, match=words):
        MHEXConfig.from_json(json.dumps({"mhex_vision_format": 1, **values}))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "not JSON"),
        ("{", "not JSON"),
        ("resnet18", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("[]", "not the configuration of an MHEX classifier"),
        ("null", "not the configuration of an MHEX classifier"),
        ('{"model_type": "bert"}', "not the configuration of an MHEX classifier"),
        ('{"mhex_vision_format": 2}', "format 2 is not 1, the one this version reads"),
        ('{"mhex_vision_format": "1"}', "format '1' is not 1"),
        ('{"mhex_vision_format": 1, "backbone": null, "num_classes": 2, "gat": true}', "unknown keys gat"),
        ('{"mhex_vision_format": 1, "backbone": null}', "keys num_classes are missing"),
        (
            '{"mhex_vision_format": 1, "backbone": null, "num_classes": 2, "preprocessing": {"sise": 3}}',
            "sise",
        ),
        ('{"mhex_vision_format": 1, "backbone": null, "num_classes": 2, "preprocessing": 3}', "mapping"),
    ],
    ids=lambda value: value[:40],
)
def test_a_text_that_is_no_configuration_is_a_value_error(text, words):
    with pytest.raises(ValueError, match=words):
        MHEXConfig.from_json(text)
