"""Explainers by name, by text, and of the user's own."""

import sys

import pytest
import torch
from torch.testing import assert_close

from mhex_vision.explainers import EXPLAINERS, explainer, parse
from mhex_vision.explainers.own import RandomMaps

MODULE = """
import torch

def brightness(model, images, targets):
    return images.double().mean(dim=1)

def wrong(model, images, targets):
    return images

def nothing(model, images, targets):
    return None

class Group:
    @staticmethod
    def zeros(model, images, targets):
        return torch.zeros_like(images[:, 0])

number = 3
"""


@pytest.fixture
def module(tmp_path, monkeypatch):
    (tmp_path / "my_explainers.py").write_text(MODULE, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    yield "my_explainers"
    sys.modules.pop("my_explainers", None)


def test_the_names():
    assert tuple(EXPLAINERS) == (
        *("mhex", "mhex-paper", "mhex-authors", "random", "centre-gaussian"),
        *("gradcam", "gradcam++", "layercam", "scorecam", "eigencam", "integrated-gradients", "shap"),
        *("cdam", "gmar", "attention", "attention-rollout", "attention-flow", "attention-gradcam"),
        *("attention-shapley", "attcat", "generic-relevance", "grad-sam", "vit-cx"),
    )
    assert all(EXPLAINERS.values())


def test_importing_brings_no_library_along(vision_python):
    code = (
        "import sys, mhex_vision.explainers as e; e.explainer('random');"
        "print([m for m in ('captum', 'cv2', 'pytorch_grad_cam', 'shap', 'sklearn', 'timm') if m in sys.modules])"
    )
    done = vision_python.run("-c", code)
    assert done.stdout.strip() == "[]", done.stderr


def test_unknown_names_are_answered_with_the_known_ones():
    with pytest.raises(
        ValueError, match=r"name must be one of mhex, mhex-paper, mhex-authors, .*vit-cx, or .*got 'gradcamm'"
    ):
        explainer("gradcamm")
    with pytest.raises(ValueError, match="got 'gradcamm'"):
        parse("gradcamm:layer=steps.0")
    with pytest.raises(TypeError, match="name must be a string, got int"):
        explainer(3)
    with pytest.raises(TypeError, match="spec must be a string, got NoneType"):
        parse(None)


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("mhex", "beta, tau_pos, tau_neg, sharpness"),
        ("random", "seed"),
        ("gradcam", "layer"),
        ("scorecam", "layer, batch_size"),
        ("integrated-gradients", "steps, baseline, batch_size"),
        ("shap", "evaluations, batch_size, blur"),
    ],
)
def test_unknown_options_are_answered_with_the_known_ones(name, known):
    with pytest.raises(ValueError, match=f"options of {name} must be among: {known}.*; got stepps"):
        explainer(name, stepps=3)


@pytest.mark.parametrize(
    ("name", "options", "error", "message"),
    [
        ("mhex", {"beta": 2}, ValueError, "beta must be in"),
        ("random", {"seed": "a"}, TypeError, "seed must be an int"),
        ("centre-gaussian", {"width": 0}, ValueError, "width must be greater than 0"),
        ("gradcam", {"layer": 3}, TypeError, "layer must be a name"),
        ("scorecam", {"batch_size": 0}, ValueError, "batch_size must be at least 1"),
        ("integrated-gradients", {"steps": 1.5}, TypeError, "steps must be an int"),
        ("integrated-gradients", {"baseline": "black"}, ValueError, "baseline must be one of 'blank', 'mean'"),
        ("shap", {"evaluations": 0}, ValueError, "evaluations must be at least 1"),
        ("shap", {"blur": 0}, ValueError, "blur must be at least 1"),
    ],
)
def test_values_are_checked_when_the_explainer_is_made(name, options, error, message):
    with pytest.raises(error, match=message):
        explainer(name, **options)


def test_texts(make_classifier, make_images):
    pytest.importorskip("pytorch_grad_cam")
    pytest.importorskip("captum")
    assert parse("random") == explainer("random")
    assert parse(" random:seed=3 ") == explainer("random", seed=3) == RandomMaps(seed=3)
    assert parse("gradcam:layer=steps.1") == explainer("gradcam", layer="steps.1")
    assert parse("gradcam:layer=4") == explainer("gradcam", layer="4")
    assert parse("centre-gaussian:width=0.1") == explainer("centre-gaussian", width=0.1)
    assert parse("mhex:beta=0.5, normalize=false, sharpness=soft") == explainer(
        "mhex", beta=0.5, normalize=False, sharpness="soft"
    )
    assert parse("integrated-gradients:steps=4,baseline=mean") == explainer(
        "integrated-gradients", steps=4, baseline="mean"
    )


@pytest.mark.parametrize("spec", ["random:", "random:seed", "random:=3", "random:seed=", "random:seed=1,,"])
def test_texts_that_cannot_be_read(spec):
    with pytest.raises(ValueError, match="spec must be name:option=value"):
        parse(spec)


def test_an_option_given_twice():
    with pytest.raises(ValueError, match="got seed twice"):
        parse("random:seed=1,seed=2")


def test_a_function_of_the_users_own(module, make_plain, make_images):
    images, targets = make_images(2, (6, 5)), torch.tensor([0, 1])
    for explain in (explainer(f"{module}:brightness"), parse(f"{module}:brightness")):
        maps = explain(make_plain(), images, targets)
        assert_close(maps, images.mean(dim=1))
        assert maps.dtype == torch.float32
    assert not parse(f"{module}:Group.zeros")(make_plain(), images, targets).any()
    with pytest.raises(
        ValueError, match=r"my_explainers:wrong must give maps of shape \(2, 6, 5\), got \(2, 3, 6, 5\)"
    ):
        parse(f"{module}:wrong")(make_plain(), images, targets)
    with pytest.raises(TypeError, match="my_explainers:nothing must give a tensor, got NoneType"):
        parse(f"{module}:nothing")(make_plain(), images, targets)


def test_what_is_no_function(module):
    with pytest.raises(ValueError, match="name must be a 'module:function' that can be imported, got 'nowhere:f'"):
        explainer("nowhere:f")
    with pytest.raises(ValueError, match="got 'my_explainers:absent'"):
        explainer("my_explainers:absent")
    with pytest.raises(TypeError, match="name must name a function, got 'my_explainers:number'"):
        explainer("my_explainers:number")
    for name in (":f", "my_explainers:", ".my_explainers:f", "a:b:c"):
        with pytest.raises(ValueError, match="name must be a known explainer or 'module:function'"):
            explainer(name)
    with pytest.raises(ValueError, match="options of my_explainers:brightness must be among: none; got steps"):
        explainer("my_explainers:brightness", steps=3)


@pytest.mark.parametrize(
    ("name", "module", "distribution"),
    [
        ("gradcam", "pytorch_grad_cam", "grad-cam"),
        ("eigencam", "pytorch_grad_cam", "grad-cam"),
        ("integrated-gradients", "captum", "captum"),
        ("shap", "shap", "shap"),
    ],
)
def test_a_missing_library_is_named(name, module, distribution, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError) as caught:
        explainer(name)
    assert str(caught.value) == f'{name} needs {distribution}: pip install "mhex-vision[bench]"'
