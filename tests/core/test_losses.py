"""Objectives: against the oracle and against torch's own losses."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from mhex_core import DeepSupervisionLoss, joint_logits

HEADS = [torch.randn(5, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) for seed in range(3)]
WEIGHT = torch.tensor([0.5, 2.0, 1.0, 0.0], dtype=torch.float64)
POS_WEIGHT = torch.tensor([3.0, 0.2, 1.0, 1.5], dtype=torch.float64)
INDICES = torch.tensor([0, 3, 1, 2, 1])
PROBABILITIES = torch.rand(5, 4, generator=torch.Generator().manual_seed(9), dtype=torch.float64).softmax(dim=1)
LABELS = (torch.rand(5, 4, generator=torch.Generator().manual_seed(8)) > 0.5).long()
REDUCTIONS = ["mean", "sum", "none"]
SINGLE = [{}, {"label_smoothing": 0.1}, {"weight": WEIGHT}, {"label_smoothing": 1.0, "weight": WEIGHT}]
MULTI = [{}, {"label_smoothing": 0.2}, {"weight": WEIGHT}, {"pos_weight": POS_WEIGHT, "weight": WEIGHT}]
TOLERANCE = {"rtol": 1e-10, "atol": 1e-10}


def close(ours, theirs):
    theirs = theirs if isinstance(theirs, torch.Tensor) else torch.as_tensor(theirs, dtype=torch.float64)
    assert_close(ours, theirs, **TOLERANCE)


@pytest.mark.parametrize("decay", [0.8, 0.0, 1.0])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_joint_logits_are_the_running_sum_and_its_closed_form(oracle, count, decay):
    result = joint_logits(HEADS[:count], decay=decay)
    close(result, oracle.joint_logits(HEADS[:count], decay))
    close(result, sum(decay ** (count - 1 - index) * HEADS[index] for index in range(count)))


def test_joint_logits_decay_by_four_fifths_by_default():
    close(joint_logits(HEADS), joint_logits(HEADS, decay=0.8))
    close(DeepSupervisionLoss("joint").prediction(HEADS), joint_logits(HEADS, decay=0.8))


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("settings", SINGLE, ids=lambda settings: "+".join(settings) or "plain")
@pytest.mark.parametrize("head_weights", [None, [0.2, 0.0, 3.0], torch.tensor([0.25, 0.5, 1.0])], ids=str)
def test_layerwise_is_the_weighted_sum_of_cross_entropies(oracle, head_weights, settings, reduction):
    if settings == {"label_smoothing": 1.0, "weight": WEIGHT} and reduction == "mean":
        settings = {"label_smoothing": 0.5, "weight": WEIGHT}
    ours = DeepSupervisionLoss(head_weights=head_weights, reduction=reduction, **settings)(HEADS, INDICES)
    factors = [1.0] * 3 if head_weights is None else list(map(float, head_weights))
    theirs = nn.CrossEntropyLoss(reduction=reduction, **settings)
    close(ours, sum(factor * theirs(logits, INDICES) for factor, logits in zip(factors, HEADS, strict=True)))
    close(ours, oracle.layerwise(HEADS, INDICES, head_weights=factors, reduction=reduction, **settings))


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("settings", SINGLE, ids=lambda settings: "+".join(settings) or "plain")
@pytest.mark.parametrize("target", [INDICES, PROBABILITIES], ids=["indices", "probabilities"])
def test_joint_is_one_cross_entropy_of_the_running_sum(oracle, target, settings, reduction):
    ours = DeepSupervisionLoss("joint", 0.6, reduction=reduction, **settings)(HEADS, target)
    close(ours, nn.CrossEntropyLoss(reduction=reduction, **settings)(joint_logits(HEADS, decay=0.6), target))
    close(ours, oracle.joint(HEADS, target, decay=0.6, reduction=reduction, **settings))


@pytest.mark.parametrize("mode", ["layerwise", "joint"])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("settings", MULTI, ids=lambda settings: "+".join(settings) or "plain")
@pytest.mark.parametrize("labels", [LABELS, LABELS.bool(), PROBABILITIES], ids=["int", "bool", "soft"])
def test_multi_label_is_binary_cross_entropy(oracle, mode, labels, settings, reduction):
    ours = DeepSupervisionLoss(mode, multi_label=True, reduction=reduction, **settings)(HEADS, labels)
    calls = {"loss": oracle.binary_cross_entropy, "reduction": reduction, **settings}
    close(ours, getattr(oracle, mode)(HEADS, labels, **calls))
    if "label_smoothing" not in settings:
        theirs = nn.BCEWithLogitsLoss(reduction=reduction, **settings)
        logits = [joint_logits(HEADS)] if mode == "joint" else HEADS
        close(ours, sum(theirs(one, labels.double()) for one in logits))


@pytest.mark.parametrize("mode", ["layerwise", "joint"])
def test_one_head_is_ordinary_training(mode):
    ours = DeepSupervisionLoss(mode)
    close(ours(HEADS[:1], INDICES), nn.functional.cross_entropy(HEADS[0], INDICES))
    close(ours.prediction(HEADS[:1]), HEADS[0])


def test_layerwise_predicts_with_the_last_head():
    assert DeepSupervisionLoss().prediction(HEADS) is HEADS[-1]


@pytest.mark.parametrize("mode", ["layerwise", "joint"])
@pytest.mark.parametrize("multi_label", [False, True])
def test_gradients_reach_every_head(mode, multi_label):
    loss = DeepSupervisionLoss(mode, label_smoothing=0.1, multi_label=multi_label)
    heads = [head.clone().requires_grad_() for head in HEADS]
    assert torch.autograd.gradcheck(lambda *heads: loss(heads, LABELS if multi_label else INDICES), heads)


def test_class_weights_move_with_the_module_and_are_no_parameters():
    loss = DeepSupervisionLoss(weight=WEIGHT, pos_weight=POS_WEIGHT, multi_label=True)
    assert not list(loss.parameters())
    assert set(loss.state_dict()) == {"weight", "pos_weight"}
    assert loss.float().weight.dtype == torch.float32
    assert "layerwise" in repr(loss)


@pytest.mark.parametrize(
    ("arguments", "error", "name"),
    [
        ({"mode": "both"}, ValueError, "mode"),
        ({"mode": None}, TypeError, "mode"),
        ({"decay": 1.5}, ValueError, "decay"),
        ({"decay": True}, TypeError, "decay"),
        ({"head_weights": 1.0}, TypeError, "head_weights"),
        ({"head_weights": [1.0, -1.0]}, ValueError, r"head_weights\[1\]"),
        ({"head_weights": [True]}, TypeError, r"head_weights\[0\]"),
        ({"head_weights": [1.0], "mode": "joint"}, ValueError, "head_weights"),
        ({"label_smoothing": -0.1}, ValueError, "label_smoothing"),
        ({"label_smoothing": True}, TypeError, "label_smoothing"),
        ({"weight": [1.0, 2.0]}, TypeError, "weight"),
        ({"weight": torch.ones(2, 2)}, ValueError, "weight"),
        ({"weight": torch.ones(2, dtype=torch.int64)}, TypeError, "weight"),
        ({"pos_weight": torch.ones(4)}, ValueError, "pos_weight"),
        ({"pos_weight": 2.0, "multi_label": True}, TypeError, "pos_weight"),
        ({"multi_label": 1}, TypeError, "multi_label"),
        ({"reduction": "max"}, ValueError, "reduction"),
    ],
    ids=str,
)
def test_bad_settings_are_named(arguments, error, name):
    with pytest.raises(error, match=name):
        DeepSupervisionLoss(**arguments)


@pytest.mark.parametrize("mode", ["layerwise", "joint"])
@pytest.mark.parametrize(
    ("heads", "target", "multi_label", "error", "name"),
    [
        (HEADS[0], INDICES, False, TypeError, "head_logits"),
        ([], INDICES, False, ValueError, "head_logits"),
        ([HEADS[0][0]], INDICES, False, ValueError, r"head_logits\[0\]"),
        ([HEADS[0], HEADS[1][:1]], INDICES, False, ValueError, r"head_logits\[1\]"),
        ([HEADS[0].long()], INDICES, False, TypeError, r"head_logits\[0\]"),
        (HEADS, INDICES.tolist(), False, TypeError, "target"),
        (HEADS, LABELS.tolist(), True, TypeError, "target"),
        (HEADS, INDICES, True, ValueError, "target"),
        (HEADS, INDICES[:3], False, ValueError, "target"),
    ],
)
def test_bad_inputs_are_named(mode, heads, target, multi_label, error, name):
    with pytest.raises(error, match=name):
        DeepSupervisionLoss(mode, multi_label=multi_label)(heads, target)


@pytest.mark.parametrize("head_weights", [[], [1.0], [1.0] * 4], ids=len)
def test_head_weights_must_be_one_per_head(head_weights):
    with pytest.raises(ValueError, match="head_weights"):
        DeepSupervisionLoss(head_weights=head_weights)(HEADS, INDICES)


@pytest.mark.parametrize(
    ("call", "error", "name"),
    [
        (lambda: joint_logits(HEADS, decay=-1), ValueError, "decay"),
        (lambda: joint_logits(HEADS, decay=True), TypeError, "decay"),
        (lambda: joint_logits(()), ValueError, "head_logits"),
        (lambda: joint_logits([HEADS[0], HEADS[0][:, :1]]), ValueError, r"head_logits\[1\]"),
        (lambda: DeepSupervisionLoss().prediction(HEADS[0]), TypeError, "head_logits"),
    ],
)
def test_bad_arguments_of_the_functions_are_named(call, error, name):
    with pytest.raises(error, match=name):
        call()
