"""A classifier explains what was asked for, and does so in any precision, thread, copy and compiled form."""

import copy
import pickle
import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.parallel import scatter_gather
from torch.testing import assert_close

from mhex_core import saliency_maps
from mhex_vision import ClassifierOutput, Preprocessing, explain_by

every_kind = pytest.mark.parametrize(
    ("classifier", "gate", "objective"),
    [(c, g, o) for c in ("drop", "keep") for g in (True, False) for o in ("layerwise", "joint")],
)


# -------------------------------------------------------------------------------------------------------------- explain


def test_an_explanation_is_a_forward_pass_in_evaluation_mode_and_saliency_of_it(make_classifier, make_images):
    model, images = make_classifier(), make_images()
    with torch.no_grad():
        output = model(images)
        matrices = [block.head.weight @ block.gate.weight for block in model.blocks]
    assert_close(model.equivalent_matrices(), tuple(matrices))
    model.train()
    explanation = model.explain(images, beta=0.5, decay=0.8)
    assert_close(explanation.probabilities, output.logits.softmax(dim=1))
    assert_close(explanation.head_logits, torch.stack(output.head_logits))
    assert_close(explanation.target, output.logits.argmax(dim=1))
    expected = saliency_maps(output.activations, matrices, explanation.target, size=(32, 32), beta=0.5, decay=0.8)
    assert_close(explanation.saliency, expected, rtol=1e-5, atol=1e-5)
    assert not explanation.saliency.requires_grad
    assert explanation.layer_names == model.layer_names
    assert [layer.shape for layer in explanation.positive] == [a.shape[:1] + a.shape[2:] for a in output.activations]


@pytest.mark.parametrize("training", [True, False])
def test_an_explanation_does_not_depend_on_its_company(make_classifier, make_images, training):
    model, images = make_classifier().train(training), make_images(4)
    together = model.explain(images)
    apart = type(together).concatenate([model.explain(images[row : row + 1]) for row in range(4)])
    padded = model.explain(torch.cat([images, torch.zeros(3, 3, 32, 32)]))
    for name in ("saliency", "probabilities", "target"):
        assert_close(getattr(together, name), getattr(apart, name), rtol=0, atol=1e-5)
        assert_close(getattr(together, name), getattr(padded, name)[:4], rtol=0, atol=1e-5)


TARGETS = {
    "None": (None, (4,)),
    "int": (2, (4,)),
    "(B,)": (torch.tensor([0, 2, 1, 1]), (4,)),
    "(B, n)": (torch.tensor([[0, 1], [2, 1], [0, 0], [1, 2]]), (4, 2)),
    "(B, 1)": (torch.tensor([[0], [1], [2], [0]]), (4, 1)),
    "int32": (torch.tensor([0, 2, 1, 1], dtype=torch.int32), (4,)),
    "all": ("all", (4, 3)),
}


@pytest.mark.parametrize("target", TARGETS)
def test_one_class_or_several_can_be_explained(make_classifier, make_images, target):
    asked, shape = TARGETS[target]
    model, images = make_classifier(), make_images(4, (16, 12))
    explanation = model.explain(images, asked)
    assert explanation.saliency.shape == (*shape, 16, 12)
    assert explanation.target.shape == shape
    assert explanation.target.dtype == torch.int64
    assert 0 <= explanation.saliency.min() <= explanation.saliency.max() <= 1
    every = model.explain(images, "all").saliency
    columns = explanation.target if explanation.target.ndim == 2 else explanation.target[:, None]
    chosen = torch.stack([every[row, columns[row]] for row in range(4)])
    assert_close(explanation.saliency.reshape(chosen.shape), chosen, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("size", "expected"), [(None, (20, 14)), (7, (7, 7)), ((5, 40), (5, 40))])
def test_maps_have_the_size_asked_for(make_classifier, make_images, size, expected):
    assert make_classifier().explain(make_images(2, (20, 14)), size=size).saliency.shape == (2, *expected)


@pytest.mark.parametrize(
    ("images", "options", "error", "words"),
    [
        (torch.zeros(2, 3, 8, 8, dtype=torch.uint8), {}, TypeError, "normalised floating-point.*torch.uint8"),
        ([[0.0]], {}, TypeError, "images must be .*got list"),
        (torch.zeros(3, 8, 8), {}, ValueError, r"\(B, 3, H, W\), got \(3, 8, 8\)"),
        (torch.zeros(2, 3, 8, 8), {"betta": 1}, TypeError, "betta"),
        (torch.zeros(2, 3, 8, 8), {"beta": 2}, ValueError, "beta"),
        (torch.zeros(2, 3, 8, 8), {"layer_weights": [1.0]}, ValueError, "layer_weights"),
        (torch.zeros(2, 3, 8, 8), {"target": 3}, ValueError, "target"),
        (torch.zeros(2, 3, 8, 8), {"target": -1}, ValueError, "target"),
        (torch.zeros(2, 3, 8, 8), {"target": "everything"}, ValueError, "target"),
        (torch.zeros(2, 3, 8, 8), {"target": torch.tensor([0.0, 1.0])}, TypeError, "target"),
        (torch.zeros(2, 3, 8, 8), {"target": torch.tensor([0])}, ValueError, "target"),
        (torch.zeros(2, 3, 8, 8), {"target": [0, 1.5]}, TypeError, r"target\[1\] must be an int"),
        (
            torch.zeros(2, 3, 8, 8),
            {"target": ["disc", 1]},
            ValueError,
            r"target\[0\] must be the number of a class below 3",
        ),
        (torch.zeros(2, 1, 8, 8), {}, ValueError, r"images must have shape \(B, 3, H, W\), got \(2, 1, 8, 8\)"),
        (
            torch.full((2, 3, 8, 8), torch.nan),
            {},
            ValueError,
            "by mhex must be finite.*look for it in network and input",
        ),
        (torch.zeros(2, 3, 8, 8), {"size": 0}, ValueError, "size"),
    ],
    ids=lambda value: repr(value)[:30],
)
def test_what_cannot_be_explained_is_named(make_classifier, images, options, error, words):
    with pytest.raises(error, match=words):
        make_classifier().explain(images, **options)


@pytest.mark.parametrize("objective", ["layerwise", "joint"])
def test_an_empty_batch_gives_empty_results(make_classifier, make_images, objective):
    model, images = make_classifier(objective=objective), make_images(0, (16, 12))
    output = model(images)
    assert output.logits.shape == (0, 3)
    explanation = model.explain(images)
    assert explanation.saliency.shape == (0, 16, 12)
    assert explanation.target.shape == (0,)
    assert model.explain(images, "all").saliency.shape == (0, 3, 16, 12)
    assert model.collaboration(images).shape == (0, 2)
    assert model.strip_heads()(images).shape == (0, 3)


def test_one_class_is_explained_too(make_classifier, make_images):
    model = make_classifier(num_classes=1, multi_label=True)
    explanation = model.explain(make_images())
    assert explanation.saliency.isfinite().all()
    assert_close(explanation.probabilities, model(make_images()).logits.sigmoid())


def test_images_are_kept_where_it_is_known_how_they_were_normalised(make_classifier, make_images):
    model = make_classifier()
    assert model.explain(make_images()).images is None
    preprocessing = Preprocessing(size=32, mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7))
    model.with_metadata(preprocessing=preprocessing)
    pictures = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    images = preprocessing.normalize(pictures)
    assert_close(model.explain(images).images, pictures, rtol=0, atol=0)
    assert model.explain(images, keep_images=False).images is None


def test_class_names_reach_the_explanation(make_classifier, make_images):
    model = make_classifier().with_metadata(class_names=("a", "b", "c"))
    assert model.explain(make_images()).class_names == ("a", "b", "c")
    with pytest.raises(ValueError, match="only class_names and preprocessing can be changed, got gate"):
        model.with_metadata(gate=False)
    with pytest.raises(ValueError, match="class_names must hold 3 names, got 2"):
        model.with_metadata(class_names=("a", "b"))


# --------------------------------------------------------------------------------------------------------- environments


def test_half_precision_keeps_prediction_and_map_close(make_classifier, make_images):
    model, images = make_classifier(), make_images()
    exact = model.explain(images)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(images)
        half = model.explain(images, exact.target)
    assert output.logits.dtype == torch.bfloat16
    assert half.saliency.dtype == half.probabilities.dtype == half.head_logits.dtype == torch.float32
    assert_close(half.probabilities, exact.probabilities, rtol=0, atol=0.03)
    assert_close(half.saliency, exact.saliency, rtol=0, atol=0.05)
    low = copy.deepcopy(model).to(torch.bfloat16).explain(images.to(torch.bfloat16), exact.target)
    assert_close(low.saliency, exact.saliency, rtol=0, atol=0.1)


def test_autocast_trains(make_classifier, make_images):
    model = make_classifier().train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(make_images())
        loss = model.loss()(model.supervised_logits(output), torch.tensor([0, 1]))
    loss.backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def test_memory_format_does_not_matter(make_classifier, make_images):
    model, images = make_classifier(), make_images(2, (20, 14))
    expected = model.explain(images, "all")
    result = model.to(memory_format=torch.channels_last).explain(images.to(memory_format=torch.channels_last), "all")
    assert_close(result.saliency, expected.saliency, rtol=0, atol=1e-4)
    assert_close(result.probabilities, expected.probabilities, rtol=0, atol=1e-5)


def test_threads_may_share_a_classifier_in_evaluation_mode(make_classifier, make_images):
    model = make_classifier()
    jobs = [(make_images(2, (16 + seed, 12), seed=seed), "all" if seed % 2 else None) for seed in range(6)]
    expected = [model.explain(*job).saliency for job in jobs]
    with ThreadPoolExecutor(2) as pool:
        for _ in range(5):
            for ours, theirs in zip(pool.map(lambda job: model.explain(*job).saliency, jobs), expected, strict=True):
                assert_close(ours, theirs, rtol=0, atol=0)


@pytest.mark.parametrize("way", ["deepcopy", "pickle"])
@every_kind
def test_a_copy_computes_the_same_and_shares_nothing(make_classifier, make_images, way, classifier, gate, objective):
    model = make_classifier(classifier=classifier, gate=gate, objective=objective)
    model = model.with_metadata(class_names=("a", "b", "c"))
    images = make_images()
    expected = model(images)
    copied = copy.deepcopy(model) if way == "deepcopy" else pickle.loads(pickle.dumps(model))
    assert_close(copied(images), expected, rtol=0, atol=0)
    assert copied.config == model.config
    assert copied.layer_names == model.layer_names
    assert not {p.data_ptr() for p in copied.parameters()} & {p.data_ptr() for p in model.parameters()}
    with torch.no_grad():
        copied.backbone.stem.weight.zero_()
    assert_close(model(images), expected, rtol=0, atol=0)
    copied.train()(images)  # the graph of training mode is there as well


@pytest.mark.parametrize("name", ["resnet18", "timm/convnext_atto"])
def test_a_named_network_survives_pickle(make_classifier, make_images, name):
    model = make_classifier(name)
    images = make_images(1, (64, 64))
    with torch.no_grad():
        assert_close(pickle.loads(pickle.dumps(model))(images), model(images), rtol=0, atol=0)


def test_a_classifier_that_is_no_module_goes_without_harm(networks, make_classifier, make_images):
    """What a forward computes with must be there to trace a copy, though no block depends on it."""
    model = make_classifier(networks.RawWeight(), 2)
    images = make_images()
    assert_close(copy.deepcopy(model)(images), model(images), rtol=0, atol=0)
    output = model.train()(images)
    model.loss()(model.supervised_logits(output), torch.tensor([0, 1])).backward()
    assert all(parameter.grad is not None for parameter in model.parameters() if parameter.requires_grad)
    assert model.strip_heads()(images).shape == (2, 2)


def test_data_parallel_is_transparent_without_accelerators(make_classifier, make_images):
    model, images = make_classifier(), make_images()
    assert_close(nn.DataParallel(model)(images), model(images), rtol=0, atol=0)


def test_outputs_of_several_devices_are_gathered_into_one(make_classifier, make_images, monkeypatch):
    """The batch of two that gives one map elsewhere (pytorch-grad-cam #322)."""
    monkeypatch.setattr(scatter_gather.Gather, "apply", lambda device, dim, *parts: torch.cat(parts, dim))
    model, images = make_classifier(), make_images(4)
    merged = scatter_gather.gather([model(images[:2]), model(images[2:])], "cpu")
    assert isinstance(merged, ClassifierOutput)
    assert_close(merged, model(images), rtol=0, atol=1e-5)


def test_a_replica_computes_with_its_own_blocks(make_classifier, make_images):
    """What DataParallel does to a module before it sends it to a device."""
    model, images = make_classifier(), make_images()
    replicas = {name: module._replicate_for_data_parallel() for name, module in model.named_modules()}
    for name, replica in replicas.items():
        for child in replica._modules:
            setattr(replica, child, replicas[f"{name}.{child}" if name else child])
        for key, parameter in dict(model.get_submodule(name)._parameters).items():
            # A tensor of its own, no nn.Parameter.
            setattr(replica, key, None if parameter is None else parameter * 0.5)
    output = replicas[""](images)
    halved = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in halved.parameters():
            parameter.mul_(0.5)
    assert_close(output, halved(images))
    sum(logits.sum() for logits in output.head_logits).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("training", [True, False])
def test_it_compiles_as_one_graph(make_classifier, make_images, training):
    torch._dynamo.reset()
    model, images = make_classifier().train(training), make_images()
    expected = copy.deepcopy(model)(images)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        output = torch.compile(model, backend="eager", fullgraph=True)(images)
    assert isinstance(output, ClassifierOutput)
    assert_close(output, expected)


def test_classes_may_be_called_by_their_names(make_classifier, make_images):
    """One lookup for images and texts, for Python and the command line."""
    model, images = make_classifier().with_metadata(class_names=("disc", "2", "ring")), make_images()
    for target, number in (
        ("ring", 2),
        ("2", 1),
        ("0", 0),
        (np.int64(2), 2),
        (["ring", "2"], [2, 1]),
        ((0, "ring"), [0, 2]),
    ):
        expected = model.explain(images, torch.tensor(number) if isinstance(number, list) else number)
        for explanation in (model.explain(images, target), explain_by(model, images, "mhex", target)):
            assert explanation.target.tolist() == expected.target.tolist()
            assert_close(explanation.saliency, expected.saliency, rtol=0, atol=0)
        assert explain_by(model, images, "random", target).target.tolist() == expected.target.tolist()
    with pytest.raises(
        ValueError, match=r"target must be one of the classes \(disc, 2, ring\) or its number, got 'disk'"
    ):
        model.explain(images, "disk")
