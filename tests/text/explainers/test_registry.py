"""Explainers of texts by name, and by the text of a command line."""

import sys

import pytest

from mhex_text.explainers import EXPLAINERS, explainer, parse
from mhex_text.explainers.own import OwnScores, RandomScores

OF_ATTENTION = (
    "cdam",
    "gmar",
    "attention",
    "attention-rollout",
    "attention-flow",
    "attention-gradcam",
    "attention-shapley",
    "attcat",
    "generic-relevance",
    "grad-sam",
)
NAMES = ("mhex", "random", *OF_ATTENTION, "integrated-gradients", "shap", "occlusion")


def test_the_names():
    assert tuple(EXPLAINERS) == NAMES
    assert all(EXPLAINERS.values())


def test_importing_brings_no_library_along(python):
    code = (
        "import sys, mhex_text.explainers as e; e.explainer('random');"
        "print([m for m in ('captum', 'shap', 'mhex_vision') if m in sys.modules])"
    )
    done = python.run("-c", code)
    assert done.stdout.strip() == "[]", done.stderr


def test_unknown_names_are_answered_with_the_known_ones():
    with pytest.raises(ValueError, match=r"name must be one of mhex, random, .*occlusion, or .*got 'atcat'"):
        explainer("atcat")
    with pytest.raises(ValueError, match="got 'atcat'"):
        parse("atcat:query=max")
    with pytest.raises(TypeError, match="name must be a string, got int"):
        explainer(3)
    with pytest.raises(TypeError, match="spec must be a string, got NoneType"):
        parse(None)


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("mhex", "layers, layer_weights, decay, attention, beta, tau_pos, tau_neg, sharpness, exponent, rectify"),
        ("random", "seed"),
        ("cdam", "mode, steps, noise, perturb_at, seed, concept, batch_size"),
        ("gmar", "norm, residual"),
        ("attention", "none"),
        ("attention-rollout", "query, residual, start"),
        ("attention-flow", "residual"),
        ("attention-gradcam", "none"),
        ("attention-shapley", "game, gradient"),
        ("attcat", "none"),
        ("generic-relevance", "none"),
        ("grad-sam", "none"),
        ("integrated-gradients", "steps, baseline, batch_size"),
        ("shap", "evaluations, batch_size"),
        ("occlusion", "batch_size"),
    ],
)
def test_unknown_options_are_answered_with_the_known_ones(name, known):
    with pytest.raises(ValueError, match=f"options of {name} must be among: {known}; got stepps"):
        explainer(name, stepps=3)


def test_texts():
    assert parse("random") == explainer("random")
    assert parse(" random:seed=3 ") == explainer("random", seed=3) == RandomScores(seed=3)
    assert parse("mhex:layers=last,beta=0.5,rectify=true") == OwnScores(layers="last", beta=0.5, rectify=True)
    assert parse("mhex:layers=2").layers == 2
    assert parse("mhex:layers=all").layers == "all"
    assert parse("attention-rollout:query=max") == explainer("attention-rollout", query="max")
    assert parse("attention-shapley:game=cls,gradient=false") == explainer(
        "attention-shapley", game="cls", gradient=False
    )
    assert parse("cdam:mode=smooth,steps=8,noise=0.1").noise == 0.1
    for spec in ("random:", "random:seed", "random:seed=1,seed=2"):
        with pytest.raises(ValueError, match="spec must"):
            parse(spec)


def test_texts_of_what_needs_a_library():
    for name, library in (("shap", "shap"), ("integrated-gradients", "captum")):
        pytest.importorskip(library)
        assert parse(f"{name}:batch_size=4") == explainer(name, batch_size=4)


def test_functions_take_no_options():
    with pytest.raises(ValueError, match="options of os:getcwd must be among: none; got steps"):
        explainer("os:getcwd", steps=3)
    assert parse("os:getcwd").name == "os:getcwd"


@pytest.mark.parametrize(
    ("name", "library"), [("integrated-gradients", "captum"), ("shap", "shap"), ("attention-flow", "scipy")]
)
def test_a_missing_library_is_named(name, library, monkeypatch):
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(ImportError) as caught:
        explainer(name)
    assert str(caught.value) == f'{name} needs {library}: pip install "mhex-text[bench]"'
