"""The classifier's own saliency, and the maps that look at no model."""

import pytest
import torch
from torch.testing import assert_close

from mhex_vision.explainers import explainer


def test_the_classifiers_own_saliency(make_classifier, make_images):
    model, images, targets = make_classifier(), make_images(2, (12, 10)), torch.tensor([2, 0])
    assert_close(explainer("mhex")(model, images, targets), model.explain(images, targets).saliency)
    assert_close(
        explainer("mhex", beta=0.5, normalize=False)(model, images, targets),
        model.explain(images, targets, beta=0.5, normalize=False).saliency,
    )
    paper = model.explain(images, targets, rectify=False).saliency
    assert_close(explainer("mhex-paper")(model, images, targets), paper)
    authors = model.explain(images, targets, beta=1, tau_neg=0.1, rectify=False).saliency
    assert_close(explainer("mhex-authors")(model, images, targets), authors)
    assert_close(
        explainer("mhex-authors", decay=0.5)(model, images, targets),
        model.explain(images, targets, beta=1, tau_neg=0.1, decay=0.5, rectify=False).saliency,
    )


def test_another_network_has_no_saliency_of_its_own(make_plain, make_images):
    with pytest.raises(TypeError, match=r"model must be an MHEXClassifier .* got Plain; attach heads with MHEXCl"):
        explainer("mhex")(make_plain(), make_images(1), torch.tensor([0]))


def test_noise_belongs_to_the_image_and_the_seed(make_plain, make_images):
    images, targets = make_images(3, (9, 7)), torch.zeros(3, dtype=torch.int64)
    maps = explainer("random")(make_plain(), images, targets)
    assert 0 <= float(maps.min()) < 0.2 < 0.8 < float(maps.max()) < 1
    assert len({tuple(one.flatten().tolist()) for one in maps}) == 3
    assert not torch.equal(explainer("random", seed=1)(make_plain(), images, targets), maps)
    strided = images.contiguous(memory_format=torch.channels_last)
    assert_close(explainer("random")(make_plain(), strided, targets), maps, rtol=0, atol=0)


def test_a_gaussian_on_the_centre(make_plain, make_images):
    (bell,) = explainer("centre-gaussian")(make_plain(), make_images(1, (9, 15)), torch.tensor([0]))
    assert bell.argmax() == 4 * 15 + 7
    assert float(bell[4, 7]) == 1
    assert_close(bell, bell.flip(0).flip(1))
    # A quarter of the side away from the centre is one standard deviation away.
    (even,) = explainer("centre-gaussian")(make_plain(), make_images(1, (4, 400)), torch.tensor([0]))
    assert_close(even[0, 300] / even[0, 200], torch.exp(torch.tensor(-0.5)), rtol=0, atol=1e-2)
    (narrow,) = explainer("centre-gaussian", width=0.1)(make_plain(), make_images(1, (9, 15)), torch.tensor([0]))
    assert narrow.sum() < bell.sum()
