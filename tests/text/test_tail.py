"""What enters the last layer, run again: the same logits, other rows, one way in the graph, nothing left behind."""

import pytest
import torch
from torch.testing import assert_close

from mhex_text.capture import capture

from .encoders import make_batch
from .explainers.models import FAMILIES, KINDS, BrokenError, State, breaking, make_model

TARGETS = torch.tensor([0, 1, 2, 0])
CLOSE = {"rtol": 0, "atol": 1e-5}
# Name of the case: kind, family and options of the model.
CASES = {f"{kind} {family}": (kind, family, {}) for kind in KINDS for family in FAMILIES}
CASES |= {
    "joint": ("mhex", "bert", {"objective": "joint"}),
    "joint, modernbert": ("mhex", "modernbert", {"objective": "joint"}),
    "without gates": ("mhex", "roberta", {"gate": False}),
    "a block half way": ("mhex", "electra", {"layers": [1]}),
}
every_case = pytest.mark.parametrize("case", CASES)


def made(case, **changes):
    kind, family, options = CASES[case]
    return make_model(kind, family, **options | changes)


def pooled_by_mean():
    """A ModernBERT whose classifier reads the mean token."""
    model = make_model("plain", "modernbert")
    model.config.classifier_pooling = "mean"
    return model


def again(seen, rows):
    return seen.hidden[-1][rows], seen.attention_inputs[-1][rows], rows


@every_case
def test_the_tail_gives_the_captured_logits(case):
    model, batch = made(case), make_batch("bert")
    seen = capture(model, batch)
    every = torch.arange(4)
    assert_close(seen.tail.logits(*again(seen, every)), seen.logits, **CLOSE)
    assert_close(seen.tail.normalize(seen.hidden[-1]), seen.attention_inputs[-1], **CLOSE)
    assert_close(seen.tail.features(*again(seen, every)), seen.features, **CLOSE)
    rows = torch.tensor([2, 0, 0, 3, 1, 2, 2])
    with torch.no_grad():
        assert_close(seen.tail.logits(*again(seen, rows)), seen.logits[rows].detach(), **CLOSE)
        assert_close(seen.tail.features(*again(seen, rows)), seen.features[rows].detach(), **CLOSE)
        assert not seen.tail.logits(*again(seen, rows)).requires_grad


@every_case
def test_of_one_text_too(case):
    model, batch = made(case), make_batch("bert", lengths=(6,))
    seen = capture(model, batch, graph=False)
    rows = torch.zeros(3, dtype=torch.int64)
    assert_close(seen.tail.logits(*again(seen, rows)), seen.logits.expand(3, -1), **CLOSE)


@every_case
def test_gradients_of_what_attention_reads_go_through_attention_alone(case):
    model, batch = made(case), make_batch("bert")
    seen = capture(model, batch)
    own, whole = seen.gradients(TARGETS, [seen.attention_inputs[-1], seen.hidden[-1]])
    read = seen.attention_inputs[-1].detach().requires_grad_()
    logits = seen.tail.logits(seen.hidden[-1].detach(), read, torch.arange(4))
    (expected,) = torch.autograd.grad(logits.gather(1, TARGETS[:, None]).sum(), read)
    assert_close(own, expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(own, whole, atol=1e-4)
    assert own.abs().max() > 1e-4


@pytest.mark.parametrize("family", FAMILIES)
def test_outputs_and_features_are_the_librarys(family):
    model, batch = make_model("plain", family, attention="eager"), make_batch("bert")
    with torch.no_grad():
        final = model.base_model(**batch).last_hidden_state
    seen = capture(model, batch)
    assert all(ours is theirs for ours, theirs in zip(seen.outputs[:-1], seen.hidden[1:], strict=True))
    ended = model.base_model.final_norm(seen.outputs[-1]) if family == "modernbert" else seen.outputs[-1]
    assert_close(ended, final, **CLOSE)
    assert_close(seen.features, final[:, 0], **CLOSE)
    assert seen.readout.tolist() == [[1.0] + [0.0] * 11] * 4
    (gradient,) = seen.gradients(TARGETS, [seen.outputs[-1]])
    assert (gradient[:, 1:] == 0).all()
    assert gradient[:, 0].abs().min() > 0


def test_a_classifier_that_averages():
    model, batch = pooled_by_mean(), make_batch("bert")
    seen = capture(model, batch)
    real = batch["attention_mask"]
    assert_close(seen.readout, real / real.sum(dim=1, keepdim=True))
    with torch.no_grad():
        final = model.base_model(**batch).last_hidden_state
        assert_close(seen.logits, model(**batch).logits, **CLOSE)
    means = [row[:count].mean(dim=0) for row, count in zip(final, real.sum(dim=1), strict=True)]
    assert_close(seen.features, torch.stack(means), **CLOSE)
    assert_close(seen.tail.logits(*again(seen, torch.arange(4))), seen.logits, **CLOSE)


@pytest.mark.parametrize("family", FAMILIES)
def test_heads_read_the_mean_token(family):
    model, batch = make_model("mhex", family), make_batch("bert")
    seen = capture(model, batch)
    with torch.no_grad():
        output = model(**batch, output_activations=True)
    assert_close(seen.features @ model.equivalent_matrices()[-1].T, output.logits, **CLOSE)
    for row, real in enumerate(batch["attention_mask"].sum(dim=1)):
        mean = output.activations[-1][row, :real].mean(dim=0)
        if family != "modernbert":  # which shows what the gate makes of it
            assert_close(seen.features[row], mean.relu(), **CLOSE)
        assert_close(seen.readout[row, :real], torch.full((int(real),), 1 / int(real)))
        assert (seen.readout[row, real:] == 0).all()
    assert len(seen.outputs) == 3
    for ours, theirs in zip(seen.outputs[:-1], seen.hidden[1:], strict=True):
        assert_close(ours, theirs)


@pytest.mark.parametrize("kind", KINDS)
def test_a_single_layer_with_a_convolution(kind):
    model = make_model(kind, "deberta-v2 with convolution")
    layers = model.base_model.encoder.layer
    if kind == "plain":
        del layers[1:]
    else:
        model = make_model(kind, "deberta-v2 with convolution", layers=[0])
    batch = make_batch("bert")
    seen = capture(model, batch)
    with torch.no_grad():
        assert_close(seen.logits, model(**batch).logits, **CLOSE)
    assert_close(seen.tail.logits(*again(seen, torch.arange(4))), seen.logits, **CLOSE)
    (gradient,) = seen.gradients(TARGETS, [seen.outputs[-1]])
    assert (gradient.abs().sum() > 0) == (kind == "plain")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("broken", [False, True])
def test_the_model_is_left_as_it_was(kind, family, broken):
    model = make_model(kind, family)
    model.train()
    for index, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(index % 2 == 0)
    seen = capture(model, make_batch("bert"))
    handle = breaking(model) if broken else None
    before, modules = State.of(model), list(model.modules())
    run = []
    counting = model.base_model.get_input_embeddings().register_forward_hook(lambda *_: run.append(1))
    if broken:
        with pytest.raises(BrokenError):
            seen.tail.logits(*again(seen, torch.arange(4)))
    else:
        for part in (seen.tail.logits, seen.tail.features):
            part(*again(seen, torch.arange(4))).sum().backward(retain_graph=True)
    counting.remove()
    assert before.same_as(State.of(model))
    assert all(ours is theirs for ours, theirs in zip(modules, model.modules(), strict=True))
    assert not run
    if handle is not None:
        handle.remove()


def test_a_classifier_that_fails_gets_its_encoder_back():
    model = make_model("plain")
    seen = capture(model, make_batch("bert"))
    encoder, weight = model.base_model, model.classifier
    model.classifier = torch.nn.Linear(5, 2)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        seen.tail.logits(*again(seen, torch.arange(4)))
    model.classifier = weight
    assert model.base_model is encoder
    assert_close(seen.tail.logits(*again(seen, torch.arange(4))), seen.logits, **CLOSE)


def test_blocks_take_what_their_forward_takes():
    model, batch = make_model("mhex"), make_batch("bert")
    with pytest.raises(TypeError, match=r"inputs must be among input_ids, .*, got labels"):
        capture(model, batch | {"labels": TARGETS})
    bare = capture(model, {"input_ids": batch["input_ids"]})
    assert_close(bare.readout, torch.full((4, 12), 1 / 12))
    assert_close(bare.tail.logits(*again(bare, torch.arange(4))), bare.logits, **CLOSE)


def test_gradients_want_a_graph():
    seen = capture(make_model("plain"), make_batch("bert"), graph=False)
    with pytest.raises(ValueError, match="keeps, got some without"):
        seen.gradients(TARGETS, seen.hidden)
