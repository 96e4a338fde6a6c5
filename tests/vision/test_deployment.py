"""The network to deploy predicts what the classifier predicted, to the bit, with less."""

import copy
import pickle

import pytest
import torch
from torch.testing import assert_close

from mhex_vision import DeployedClassifier

every_kind = pytest.mark.parametrize(
    ("classifier", "gate", "objective"),
    [(c, g, o) for c in ("drop", "keep") for g in (True, False) for o in ("layerwise", "joint")],
)


def block_weights(deployed):
    """The names of the weights that are left of each block."""
    return [sorted(name.partition(".")[0] for name in block.state_dict()) for block in deployed.blocks]


@every_kind
@pytest.mark.parametrize("activation", ["sum", "shortcut"])
def test_predictions_do_not_change_by_one_bit(make_classifier, make_images, classifier, gate, objective, activation):
    model = make_classifier(classifier=classifier, gate=gate, objective=objective, activation=activation, decay=0.7)
    deployed = model.train().strip_heads()
    assert isinstance(deployed, DeployedClassifier)
    assert model.training
    model.eval()
    for size in ((32, 32), (9, 17)):
        images = make_images(3, size)
        with torch.no_grad():
            assert_close(deployed(images), model(images).logits, rtol=0, atol=0)


@every_kind
def test_what_only_supervised_is_gone(make_classifier, classifier, gate, objective):
    left = block_weights(make_classifier(classifier=classifier, gate=gate, objective=objective).strip_heads())
    whole, between = ["gate", "head"], ["gate"] if gate else []
    if objective == "joint":
        assert left == [whole] * 3
    else:
        assert left == [between, between, between if classifier == "keep" else whole]


@pytest.mark.parametrize("name", ["resnet18", "timm/convnext_atto"])
@pytest.mark.parametrize("at", ["all", "stage"])
def test_named_networks_are_deployed_too(make_classifier, make_images, name, at):
    if name.startswith("timm/"):
        pytest.importorskip("timm")
    model = make_classifier(name, 4, at=at)
    images = make_images(2, (64, 64))
    with torch.no_grad():
        assert_close(model.strip_heads()(images), model(images).logits, rtol=0, atol=0)


def test_the_classifier_stays_as_it_was_and_shares_nothing(make_classifier, make_images):
    model = make_classifier()
    images = make_images()
    expected = model(images).logits
    deployed = model.strip_heads()
    assert not any(parameter.requires_grad for parameter in deployed.parameters())
    assert all(parameter.requires_grad for parameter in model.parameters())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert_close(deployed(images), expected, rtol=0, atol=0)


def test_its_weights_can_be_saved_and_loaded_in_another_one(make_classifier, make_images, tmp_path):
    first, second = (make_classifier(seed=seed).strip_heads() for seed in (0, 1))
    images = make_images()
    assert not torch.equal(first(images), second(images))
    torch.save(first.state_dict(), tmp_path / "weights.pt")
    second.load_state_dict(torch.load(tmp_path / "weights.pt", weights_only=True))
    assert_close(second(images), first(images), rtol=0, atol=0)


def test_it_is_for_evaluation_only(make_classifier):
    deployed = make_classifier().strip_heads()
    assert not any(module.training for module in deployed.modules())
    with pytest.raises(RuntimeError, match="cannot be trained; train the MHEXClassifier"):
        deployed.train()
    assert deployed.eval() is deployed
    for refused in (pickle.dumps, copy.deepcopy):
        with pytest.raises(TypeError, match="cannot be pickled; save its state_dict"):
            refused(deployed)


def test_it_can_be_exported(make_classifier, make_images):
    deployed, images = make_classifier().strip_heads(), make_images()
    exported = torch.export.export(deployed, (images,)).module()
    assert_close(exported(images), deployed(images), rtol=0, atol=1e-6)
