"""What a network returns is read as what it is: logits, probabilities, one logit for two classes, logits in a dict."""

import copy
import warnings
from dataclasses import dataclass
from typing import NamedTuple

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close

from mhex_vision import MHEXClassifier, PlainClassifier, TwoClasses, explain_by
from mhex_vision.metrics.judge import Judge
from mhex_vision.plain import PlainConfig

WATCHING = {"freeze_backbone": True, "gate": False, "classifier": "keep", "image_size": 16}


class Ended(nn.Module):
    """A network, and what somebody put behind it."""

    def __init__(self, network, end):
        super().__init__()
        self.network, self.end = network, end

    def forward(self, images):
        return self.end(self.network(images))


SOFTMAXES = {
    "module": nn.Softmax(dim=1),
    "functional": lambda z: F.softmax(z, dim=1),
    "method": lambda z: z.softmax(-1),
    "and a shape": lambda z: torch.softmax(z, 1).flatten(1),
    "log": nn.LogSoftmax(dim=1),
}
SIGMOIDS = {"module": nn.Sigmoid(), "functional": torch.sigmoid, "method": lambda z: z.sigmoid()}


@pytest.fixture
def network(networks):
    return networks.shaken(networks.Net()).eval()


@pytest.mark.parametrize("end", SOFTMAXES)
def test_a_softmax_is_not_applied_twice(network, make_images, end, tmp_path):
    torch.manual_seed(0)
    ended, images = Ended(network, SOFTMAXES[end]).eval(), make_images(4, (16, 16))
    own = network(images).softmax(dim=1)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        model = MHEXClassifier.from_backbone(ended, 3, **WATCHING)
        by = explain_by(ended, images, "gradcam")
    assert len(said) == (0 if end == "log" else 2)
    assert all("ends in a softmax" in str(one.message) for one in said)
    assert_close(model.explain(images).probabilities, own)
    assert_close(by.probabilities, own)
    model.save_pretrained(tmp_path)
    assert_close(MHEXClassifier.from_pretrained(tmp_path, backbone=ended).explain(images).probabilities, own)
    assert_close(copy.deepcopy(model).explain(images).probabilities, own)
    assert_close(Judge(ended).probabilities(images), own)
    # The loss is that of the network, and not that of a softmax of a softmax.
    labels = torch.tensor([0, 1, 2, 0])
    assert_close(F.cross_entropy(model.eval()(images).logits, labels), F.cross_entropy(network(images), labels))


@pytest.mark.parametrize("end", SIGMOIDS)
def test_a_sigmoid_is_not_applied_twice(network, make_images, end):
    ended, images = Ended(network, SIGMOIDS[end]).eval(), make_images(8, (16, 16))
    with pytest.warns(UserWarning, match="ends in a sigmoid"):
        model = MHEXClassifier.from_backbone(ended, 3, multi_label=True, **WATCHING)
    assert_close(model.explain(images).probabilities, network(images).sigmoid())
    with pytest.warns(UserWarning, match=r"lie in \[0, 1\], as those of a sigmoid"):
        explain_by(ended, images, "random")
    with pytest.raises(ValueError, match="multi_label must be True for Ended, which ends in a sigmoid, got False"):
        MHEXClassifier.from_backbone(ended, 3, **WATCHING)
    with pytest.raises(ValueError, match="multi_label must be False for Ended, which ends in a softmax, got True"):
        MHEXClassifier.from_backbone(Ended(network, nn.Softmax(dim=1)), 3, multi_label=True, **WATCHING)


def test_logits_that_add_up_to_one_by_chance_are_logits(networks, make_images):
    """Negative ones cannot be probabilities."""

    class Balanced(nn.Module):
        def forward(self, images):
            return torch.tensor([[1.5, -0.5], [0.2, 0.8]])[: len(images)]

    assert_close(
        explain_by(Balanced(), make_images(), "random").probabilities,
        torch.tensor([[1.5, -0.5], [0.2, 0.8]]).softmax(1),
    )


ONES = {
    "a column": lambda z: z,
    "no column": lambda z: z.squeeze(1),
    "a sigmoid": nn.Sigmoid(),
    "a sigmoid without a column": lambda z: torch.sigmoid(z).flatten(),
}


@pytest.mark.filterwarnings("ignore:.*ends in a sigmoid:UserWarning")
@pytest.mark.parametrize("end", ONES)
def test_one_logit_tells_two_classes_apart(networks, make_images, end):
    network = networks.shaken(networks.Net(1)).eval()
    ended, images = Ended(network, ONES[end]).eval(), make_images(8, (16, 16))
    yes = network(images).sigmoid().flatten()
    model = MHEXClassifier.from_backbone(ended, 2, **WATCHING).with_metadata(class_names=("no", "yes"))
    explanation = model.explain(images)
    assert_close(explanation.probabilities, torch.stack([1 - yes, yes], dim=1))
    assert torch.equal(explanation.target, (yes > 0.5).long())
    labels = torch.arange(8) % 2
    loss = model.loss()(model.supervised_logits(model(images))[-1:], labels)
    assert_close(loss, F.binary_cross_entropy(yes, labels.float()))
    assert model.strip_heads()(images).shape == (8, 2)


@pytest.mark.parametrize("classifier", [nn.Flatten(0), nn.Identity()])
def test_a_network_with_one_logit_is_wrapped_or_refused(networks, make_images, classifier):
    network = networks.shaken(networks.Net(1)).eval()
    ended, images = Ended(network, classifier), make_images(4, (16, 16))
    for call in (lambda: explain_by(ended, images, "gradcam"), lambda: Judge(ended).probabilities(images)):
        with pytest.raises(ValueError, match="model must give logits of shape"):
            call()
    with pytest.raises(ValueError, match=r"num_classes must be at least 2.*TwoClasses"):
        MHEXClassifier.from_backbone("resnet18", 1)
    with pytest.raises(ValueError, match=r"num_classes must be at least 2.*TwoClasses"):
        PlainClassifier(PlainConfig(backbone="resnet18", num_classes=1), network)
    explanation = explain_by(TwoClasses(ended), images, "gradcam", 1)
    assert_close(explanation.probabilities[:, 1], network(images).sigmoid().flatten())
    twice = TwoClasses(nn.Sequential(network, nn.Sigmoid()))
    assert_close(explain_by(twice, images, "random").probabilities, explanation.probabilities)


@dataclass
class Output:
    logits: torch.Tensor
    hidden: torch.Tensor | None = None


class Named(NamedTuple):
    logits: torch.Tensor
    auxiliary: torch.Tensor


HOLDERS = {
    "dict": lambda z: {"logits": z, "hidden": z * 2},
    "dataclass": Output,
    "named tuple": lambda z: Named(z, z * 2),
    "model output": lambda z: pytest.importorskip("transformers").modeling_outputs.ImageClassifierOutput(logits=z),
}


@pytest.mark.parametrize("holder", HOLDERS)
def test_logits_among_other_things_are_found(network, make_images, holder):
    ended, images = Ended(network, HOLDERS[holder]).eval(), make_images(4, (16, 16))
    model = MHEXClassifier.from_backbone(ended, 3, **WATCHING).eval()
    assert torch.equal(model(images).logits, network(images))
    assert torch.equal(
        explain_by(ended, images, "gradcam", 1).saliency, explain_by(network, images, "gradcam", 1).saliency
    )
    assert torch.equal(Judge(ended).logits(images), network(images))
