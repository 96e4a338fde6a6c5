"""What holds for every explainer: one map per image, no matter the batch, and the network as it was."""

import contextlib
import gc
import weakref

import pytest
import torch
from torch.testing import assert_close

from mhex_vision.explainers import EXPLAINERS

# Those of vision transformers are tested in tests/vision/vit.
OF_TOKENS = ("cdam", "gmar", "attcat", "generic-relevance", "grad-sam", "vit-cx")
EVERY = sorted(name for name in EXPLAINERS if not name.startswith(("attention", *OF_TOKENS)))
OWN = ("mhex", "mhex-paper", "mhex-authors")
EVERYWHERE = [name for name in EVERY if name not in OWN]
CASES = [(name, "mhex") for name in EVERY] + [(name, "plain") for name in EVERYWHERE]

every_case = pytest.mark.parametrize(("name", "kind"), CASES)


@pytest.fixture
def network(kind, make_classifier, make_plain):
    return make_classifier() if kind == "mhex" else make_plain()


def targets_of(images):
    return torch.arange(images.shape[0]) % 3


@every_case
@pytest.mark.parametrize("size", [(16, 16), (12, 18)])
def test_one_finite_map_per_image(make, network, make_images, name, size):
    images = make_images(3, size).requires_grad_()
    maps = make(name)(network, images, targets_of(images))
    assert maps.shape == (3, *size)
    assert maps.dtype == torch.float32
    assert maps.isfinite().all()
    assert not maps.requires_grad
    assert images.grad is None
    assert (maps.amax(dim=(1, 2)) > maps.amin(dim=(1, 2))).any()


@every_case
def test_a_map_does_not_depend_on_its_company(make, network, make_images, name):
    images, explain = make_images(3, (16, 12)), make(name)
    targets = targets_of(images)
    together = explain(network, images, targets)
    apart = torch.cat([explain(network, images[row : row + 1], targets[row : row + 1]) for row in range(3)])
    assert_close(together, apart, rtol=0, atol=1e-4)
    assert_close(together.flip(0), explain(network, images.flip(0), targets.flip(0)), rtol=0, atol=1e-4)
    assert_close(explain(network, images, targets), together, rtol=0, atol=0)


@every_case
@pytest.mark.parametrize("training", [True, False])
def test_the_network_is_left_as_it_was(make, network, make_images, state_of, name, training):
    network.train(training)
    for index, parameter in enumerate(network.parameters()):
        parameter.requires_grad_(index % 2 == 0)
        parameter.grad = torch.ones_like(parameter)
    before, images = state_of(network), make_images(2, (12, 12))
    make(name)(network, images, targets_of(images))
    assert before.same_as(state_of(network))


@every_case
@pytest.mark.parametrize("fault", ["channels", "target"])
def test_the_network_is_left_as_it_was_when_explaining_fails(make, network, make_images, state_of, name, fault):
    network.train()
    before, explain = state_of(network), make(name)
    images = torch.randn(2, 5, 12, 12) if fault == "channels" else make_images(2, (12, 12))
    targets = torch.tensor([0, 3 if fault == "target" else 1])
    indifferent = name in ("random", "centre-gaussian")
    with contextlib.nullcontext() if indifferent else pytest.raises((ValueError, RuntimeError)) as caught:
        explain(network, images, targets)
    if fault == "target" and not indifferent:
        assert "must lie in [0, 2]" in str(caught.value)
    assert before.same_as(state_of(network))


@every_case
def test_nothing_is_kept(make, make_classifier, make_plain, make_images, name, kind):
    network = make_classifier() if kind == "mhex" else make_plain()
    images, explain = make_images(2, (12, 12)), make(name)
    maps = explain(network, images, targets_of(images))
    remembered = [weakref.ref(network), weakref.ref(images), weakref.ref(maps)]
    del network, images, maps
    if any(reference() is not None for reference in remembered):
        gc.collect()
    assert [reference() for reference in remembered] == [None, None, None]


@every_case
@pytest.mark.parametrize("caller", [torch.no_grad, torch.inference_mode])
def test_callers_may_have_turned_gradients_off(make, network, make_images, name, caller):
    images, explain = make_images(2, (12, 12)), make(name)
    expected = explain(network, images, targets_of(images))
    with caller():
        inside = images.clone()
        maps = explain(network, inside, targets_of(inside))
    assert_close(maps.clone(), expected, rtol=0, atol=1e-5)


@every_case
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes(make, network, make_images, name, dtype):
    images = make_images(2, (12, 12), dtype=dtype)
    maps = make(name)(network.to(dtype), images, targets_of(images))
    assert maps.dtype == torch.float32
    assert maps.isfinite().all()


@every_case
def test_another_layout_in_memory(make, network, make_images, name):
    images, explain = make_images(2, (12, 14)), make(name)
    expected = explain(network, images, targets_of(images))
    network.to(memory_format=torch.channels_last)
    maps = explain(network, images.contiguous(memory_format=torch.channels_last), targets_of(images))
    assert_close(maps, expected, rtol=0, atol=1e-4)


@every_case
def test_nothing_is_printed(make, network, make_images, name, capfd):
    images = make_images(2, (12, 12))
    make(name)(network, images, targets_of(images))
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("name", [name for name in EVERYWHERE if name not in ("random", "centre-gaussian", "eigencam")])
def test_another_class_has_another_map(make, make_plain, make_images, name):
    images, explain, network = make_images(1, (16, 16)), make(name), make_plain()
    maps = [explain(network, images, torch.tensor([target])) for target in range(3)]
    assert any(not torch.allclose(maps[0], other, atol=1e-3 * float(maps[0].abs().max())) for other in maps[1:])


@pytest.mark.parametrize("name", EVERY)
def test_what_does_not_fit_is_refused(make, make_classifier, make_images, name):
    model, images, explain = make_classifier(), make_images(2, (12, 12)), make(name)
    with pytest.raises(TypeError, match=r"model must be an nn\.Module"):
        explain(lambda images: images, images, torch.tensor([0, 1]))
    with pytest.raises(TypeError, match="images must be of a floating-point dtype"):
        explain(model, images.to(torch.uint8), torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="images must have 4 dimensions"):
        explain(model, images[0], torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="images must hold at least one image"):
        explain(model, images[:0], torch.tensor([], dtype=torch.int64))
    with pytest.raises(TypeError, match=r"targets must be of dtype torch.int64"):
        explain(model, images, torch.tensor([0, 1], dtype=torch.int32))
    with pytest.raises(ValueError, match=r"targets must have shape \(2,\), got \(3,\)"):
        explain(model, images, torch.tensor([0, 1, 2]))
