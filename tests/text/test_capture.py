"""`capture`: what the library itself shows of its layers, in every family, and the model left as it was."""

import gc
import weakref

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from transformers import AutoConfig, AutoModelForSequenceClassification

from mhex_text import MHEXForSequenceClassification
from mhex_text.adapters import supported_encoders
from mhex_text.capture import SUPPORTED, capture, encoder_of

from .encoders import BOTH, SIZES, attentions, make_batch, make_encoder
from .explainers.models import FAMILIES, KINDS, BrokenError, State, breaking, make_model

TARGETS = torch.tensor([0, 1, 2, 0])
CLOSE = {"rtol": 0, "atol": 2e-5}


def shown_by_the_library(model, batch):
    """Logits, what enters each layer, and attention, by the library's own switches."""
    output = model(**batch, output_hidden_states=True, output_attentions=True)
    return output, output.hidden_states[: len(output.attentions)], output.attentions


@pytest.mark.parametrize(("case", "attention"), BOTH)
def test_it_sees_what_the_library_shows(case, attention):
    model, batch = make_model("plain", case, attention=attention), make_batch("bert")
    shown, hidden, weights = shown_by_the_library(make_model("plain", case, attention="eager"), batch)
    seen = capture(model, batch)
    real = batch["attention_mask"].bool()
    assert_close(seen.logits, shown.logits, **CLOSE)
    for ours, theirs in zip(seen.hidden, hidden, strict=True):
        assert_close(ours[real], theirs[real], **CLOSE)
    for ours, theirs in zip(seen.attentions, weights, strict=True):
        assert_close(ours.transpose(1, 2)[real], theirs.transpose(1, 2)[real], **CLOSE)
        assert_close(ours.sum(dim=3), torch.ones(4, 2, 12), **CLOSE)
        # Nothing real looks at padding.
        assert (ours.transpose(1, 2)[real].transpose(0, 1)[:, ~real[real.nonzero()[:, 0]]] == 0).all()


@pytest.mark.parametrize(("case", "attention"), BOTH)
def test_layers_under_an_adapter_are_the_encoders_own(case, attention):
    """Blocks without gates change nothing, so the encoder alone shows what there is to see."""
    encoder, batch = make_encoder(case, attention=attention), make_batch(case)
    alone = make_encoder(case, attention="eager")(**batch, output_hidden_states=True, output_attentions=True)
    seen = capture(MHEXForSequenceClassification.from_encoder(encoder, 3, gate=False), batch)
    real = batch["attention_mask"].bool()
    for ours, theirs in zip(seen.hidden, alone.hidden_states[:3], strict=True):
        assert_close(ours[real], theirs[real], **CLOSE)
    for ours, theirs in zip(seen.attentions, alone.attentions, strict=True):
        assert_close(ours.transpose(1, 2)[real], theirs.transpose(1, 2)[real], **CLOSE)


@pytest.mark.parametrize("case", FAMILIES)
def test_gradients_are_the_librarys(case):
    model, batch = make_model("plain", case, attention="eager"), make_batch("bert")
    shown, hidden, weights = shown_by_the_library(model, batch)
    total = sum(shown.logits[row, target] for row, target in enumerate(TARGETS.tolist()))
    expected = torch.autograd.grad(total, [*hidden, *weights])
    seen = capture(model, batch)
    found = seen.gradients(TARGETS, [*seen.hidden, *seen.attentions])
    for ours, theirs in zip(found, expected, strict=True):
        assert_close(ours, theirs, rtol=1e-4, atol=2e-5)
        assert theirs.abs().max() > 1e-4


@pytest.mark.parametrize("case", FAMILIES)
@pytest.mark.parametrize("gate", [True, False])
def test_gradients_under_an_adapter_are_slopes(case, gate):
    """Central differences along one direction, put in where the layer is read."""
    model, batch = make_model("mhex", case, gate=gate).double(), make_batch(case, lengths=(7, 4))
    targets = torch.tensor([2, 1])
    seen = capture(model, batch)
    with torch.no_grad():
        assert_close(seen.logits, model(**batch).logits, rtol=0, atol=1e-6)
    gradients = seen.gradients(targets, seen.hidden)
    generator = torch.Generator().manual_seed(1)
    direction = torch.randn(seen.hidden[0].shape, generator=generator).double()
    # The embeddings as the first layer reads them are all that can be nudged from outside in every family.
    parts = dict(model.base_model.named_modules())
    last = next(
        parts[name] for name in ("embeddings_project", "embeddings.dropout", "embeddings.drop") if name in parts
    )
    # ModernBERT turns and weighs in single precision.
    width, rough = (1e-3, 2e-2) if case == "modernbert" else (1e-4, 1e-3)
    sums = []
    for step in (width, -width):
        handle = last.register_forward_hook(lambda *_, step=step: _[-1] + step * direction)
        try:
            with torch.no_grad():
                sums.append(float(model(**batch).logits.gather(1, targets[:, None]).sum()))
        finally:
            handle.remove()
    slope = float((gradients[0] * direction).sum())
    assert abs((sums[0] - sums[1]) / (2 * width) - slope) < rough * max(1, abs(slope))


def test_one_backward_pass_serves_all_texts():
    model, batch = make_model("plain"), make_batch("bert")
    together = capture(model, batch)
    found = together.gradients(TARGETS, together.hidden)
    for row in range(4):
        alone = capture(model, {name: value[row : row + 1] for name, value in batch.items()})
        for ours, theirs in zip(found, alone.gradients(TARGETS[row : row + 1], alone.hidden), strict=True):
            assert_close(ours[row : row + 1], theirs, rtol=0, atol=1e-5)


def test_camembert_and_all_that_adapters_know():
    torch.manual_seed(0)
    config = AutoConfig.for_model("camembert", **SIZES, max_position_embeddings=40, pad_token_id=1, num_labels=3)
    model = AutoModelForSequenceClassification.from_config(config).eval()
    assert len(capture(model, make_batch("roberta")).attentions) == 3
    assert set(supported_encoders()) >= set(SUPPORTED)


def test_a_block_that_sits_deep_ends_the_capture():
    model = make_model("mhex", layers=[1])
    seen = capture(model, make_batch("bert"))
    assert len(seen.hidden) == len(seen.attentions) == 2


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", FAMILIES)
@pytest.mark.parametrize("broken", [False, True])
def test_the_model_is_left_as_it_was(kind, case, broken):
    model = make_model(kind, case, attention=attentions(case)[-1])
    model.train()
    for index, (parameter, module) in enumerate(zip(model.parameters(), model.modules(), strict=False)):
        parameter.requires_grad_(index % 2 == 0)
        parameter.grad = torch.ones_like(parameter) if index % 3 else None
        module.training = bool(index % 2)
    handle = breaking(model) if broken else None
    before = State.of(model)
    if broken:
        with pytest.raises(BrokenError):
            capture(model, make_batch("bert"))
        assert before.same_as(State.of(model))
        handle.remove()
        return
    seen = capture(model, make_batch("bert"))
    assert before.same_as(State.of(model))
    sum(layer.sum() for layer in (seen.logits, *seen.hidden, *seen.attentions)).backward()
    assert before.same_as(State.of(model))


def test_frozen_models_and_callers_without_gradients():
    model, batch = make_model("plain"), make_batch("bert")
    expected = capture(model, batch)
    wanted = expected.gradients(TARGETS, expected.hidden)
    model.requires_grad_(requires_grad=False)
    with torch.inference_mode():
        inside = {name: value.clone() for name, value in batch.items()}
        seen = capture(model, inside)
    for ours, theirs in zip(seen.gradients(TARGETS, seen.hidden), wanted, strict=True):
        assert_close(ours, theirs, rtol=0, atol=0)
    bare = capture(model, batch, graph=False)
    assert_close(bare.logits, expected.logits)
    assert not bare.logits.requires_grad
    assert not any(layer.requires_grad for layer in bare.attentions)


def test_nothing_is_kept():
    model = make_model("plain")
    seen = capture(model, make_batch("bert"))
    remembered = [weakref.ref(model), weakref.ref(seen.hidden[1]), weakref.ref(seen.attentions[0])]
    del model, seen
    gc.collect()
    assert [reference() for reference in remembered] == [None] * 3


def test_what_is_not_supported_is_refused():
    with pytest.raises(TypeError, match=r"model must be an nn\.Module, got str"):
        capture("bert", make_batch("bert"))
    with pytest.raises(ValueError, match=r"families bert, camembert, .*, got Linear"):
        capture(nn.Linear(2, 2), make_batch("bert"))
    config = AutoConfig.for_model("gpt2", vocab_size=60, n_embd=8, n_layer=1, n_head=2, n_positions=20)
    with pytest.raises(ValueError, match="got GPT2Model with 'gpt2'"):
        encoder_of(AutoModelForSequenceClassification.from_config(config).base_model)
    encoder = make_encoder("bert")
    with pytest.raises(ValueError, match=r"model must give logits of shape \(4, K\), got BaseModelOutput"):
        capture(encoder, make_batch("bert"))
    seen = capture(make_model("plain"), make_batch("bert"))
    with pytest.raises(ValueError, match=r"targets must lie in \[0, 2\]"):
        seen.gradients(TARGETS + 1, seen.hidden)


def test_a_layer_that_is_run_twice_is_refused():
    model = make_model("plain")
    layers = model.base_model.encoder.layer
    layers[1] = layers[0]
    before = State.of(model)
    with pytest.raises(ValueError, match="model must run each layer once, on a tensor, got another input of layer"):
        capture(model, make_batch("bert"))
    assert before.same_as(State.of(model))
