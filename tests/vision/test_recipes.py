"""What a recipe accepts, and the learning rate of each step."""

import math

import pytest

from mhex_vision.recipes import RECIPES, Recipe


def test_cosine_goes_from_the_one_rate_to_the_other():
    recipe = Recipe(learning_rate=1e-2, min_learning_rate=1e-4)
    rates = [recipe.learning_rate_at(step, 10) for step in range(11)]
    assert rates[0] == 1e-2
    assert rates[5] == pytest.approx((1e-2 + 1e-4) / 2)
    assert rates[10] == pytest.approx(1e-4)
    assert rates == sorted(rates, reverse=True)


def test_constant_stays():
    recipe = Recipe(learning_rate=3e-3, schedule="constant")
    assert {recipe.learning_rate_at(step, 7) for step in range(7)} == {3e-3}


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"epochs": 0}, ValueError, "epochs must be at least 1, got 0"),
        ({"epochs": 1.5}, TypeError, "epochs must be an int, got float"),
        ({"batch_size": True}, TypeError, "batch_size must be an int, got bool"),
        ({"patience": 0}, ValueError, "patience must be at least 1"),
        ({"learning_rate": -1e-3}, ValueError, "learning_rate must be >= 0"),
        ({"learning_rate": math.nan}, ValueError, "learning_rate must be >= 0, got nan"),
        ({"min_learning_rate": math.inf}, ValueError, "min_learning_rate must be >= 0, got inf"),
        ({"weight_decay": "0.1"}, TypeError, "weight_decay must be a number, got str"),
        ({"label_smoothing": 1.0}, ValueError, r"label_smoothing must be in \[0, 1\), got 1.0"),
        ({"schedule": "linear"}, ValueError, "schedule must be one of 'cosine', 'constant', got 'linear'"),
        ({"monitor": "f1"}, ValueError, "monitor must be one of"),
        ({"augment": "flip"}, ValueError, "augment must be one of"),
        ({"mixed_precision": "fp8"}, ValueError, "mixed_precision must be one of"),
    ],
    ids=str,
)
def test_a_setting_that_makes_no_sense_is_named(change, error, text):
    with pytest.raises(error, match=text):
        Recipe(**change)


def test_differences_are_named():
    assert Recipe().differences(Recipe()) == []
    assert Recipe().differences(Recipe(epochs=3, patience=2)) == ["epochs", "patience"]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("medmnist", {"epochs": 20, "weight_decay": 0.01, "augment": "none"}),
        ("imagenet-finetune", {"epochs": 25, "learning_rate": 2e-4}),
        ("imagenet-scratch", {"epochs": 90, "learning_rate": 1e-3}),
    ],
)
def test_presets_are_those_of_the_specification(name, expected):
    if name.startswith("imagenet"):
        expected |= {"batch_size": 468, "weight_decay": 0.01, "min_learning_rate": 2e-5, "augment": "imagenet"}
    assert {key: getattr(RECIPES[name], key) for key in expected} == expected
