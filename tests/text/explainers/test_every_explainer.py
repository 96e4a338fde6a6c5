"""What holds for every explainer: one score per token, no matter the batch or its padding, and the model as it was."""

import gc
import re
import weakref
from dataclasses import replace

import pytest
import torch
from torch.nn.functional import pad
from torch.testing import assert_close

from mhex_text.batch import TokenBatch
from mhex_text.explainers import EXPLAINERS

from ..encoders import attentions  # noqa: TID252  # there is no absolute name for it
from .models import FAMILIES, PAIRS, TEXTS, BrokenError, State, breaking, make_masking, make_model

EVERY = sorted(EXPLAINERS)
EVERYWHERE = [name for name in EVERY if name != "mhex"]
CASES = [(name, "mhex") for name in EVERY] + [(name, "plain") for name in EVERYWHERE]
# The same for every class.
BLIND = ("random", "attention", "attention-rollout", "attention-flow")
# What is cut off at 0 may have nothing left of a text.
RECTIFIED = ("attention-gradcam",)
# What only puts texts through the model has no need to know its family.
FEW = ("bert", "roberta", "modernbert")
EVERY_FAMILY = [
    (name, kind, case)
    for name, kind in CASES
    for case in FAMILIES
    if name != "random" and (case in FEW or name not in ("shap", "occlusion"))
]

every_case = pytest.mark.parametrize(("name", "kind"), CASES)
every_family = pytest.mark.parametrize(("name", "kind", "case"), EVERY_FAMILY)


def batch_of(texts=TEXTS, case="bert", **options):
    return TokenBatch.make(texts, make_masking(case), **options)


def targets_of(batch):
    return torch.arange(len(batch)) % 3


def one_by_one(explain, model, batch, **options):
    """Each text as a batch of its own, put back to where it stood."""
    rows = []
    for row, target in enumerate(targets_of(batch)):
        alone = TokenBatch.make([batch.texts[row]], batch.tokenizer, **options)
        scores = explain(model, alone, target[None])
        rows.append(pad(scores, (0, batch.input_ids.shape[1] - scores.shape[1])))
    return torch.cat(rows)


@every_family
def test_a_score_does_not_depend_on_its_company(make, name, kind, case):
    model, explain, batch = make_model(kind, case), make(name), batch_of(case=case)
    together = explain(model, batch, targets_of(batch))
    assert together.shape == batch.input_ids.shape
    assert together.dtype == torch.float32
    assert not together.requires_grad
    assert together.isfinite().all()
    assert (together[~batch.mask] == 0).all()
    assert name in RECTIFIED or together[0][batch.mask[0]].unique().numel() > 3
    assert_close(together, one_by_one(explain, model, batch), rtol=1e-5, atol=1e-5)


@every_family
def test_padding_is_not_felt(make, name, kind, case):
    model, explain, batch = make_model(kind, case), make(name), batch_of(case=case)
    scores = explain(model, batch, targets_of(batch))
    left = TokenBatch.make(TEXTS, make_masking(case, side="left"))
    assert not torch.equal(left.input_ids, batch.input_ids)
    assert_close(explain(model, left, targets_of(left))[left.mask], scores[batch.mask], rtol=1e-5, atol=1e-5)
    fillers = {"input_ids": 0, "attention_mask": 0, "sequence_ids": -1, "word_ids": -1, "token_type_ids": 0}
    more = {
        field: pad(getattr(batch, field), (0, 5), value=filler)
        for field, filler in fillers.items()
        if getattr(batch, field) is not None
    }
    wider = replace(batch, **more, offsets=pad(batch.offsets, (0, 0, 0, 5)))
    assert_close(explain(model, wider, targets_of(wider))[wider.mask], scores[batch.mask], rtol=1e-5, atol=1e-5)


@every_case
@pytest.mark.parametrize("training", [True, False])
def test_the_model_is_left_as_it_was(make, name, kind, training):
    model = make_model(kind).train(training)
    for index, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(index % 2 == 0)
        parameter.grad = torch.ones_like(parameter)
    before, batch = State.of(model), batch_of()
    first = make(name)(model, batch, targets_of(batch))
    assert before.same_as(State.of(model))
    assert_close(make(name)(model, batch, targets_of(batch)), first, rtol=0, atol=0)


@every_case
@pytest.mark.parametrize("fault", ["inside", "target"])
def test_the_model_is_left_as_it_was_when_explaining_fails(make, name, kind, fault):
    model, explain, batch = make_model(kind, attention="sdpa").train(), make(name), batch_of()
    targets = targets_of(batch) + (fault == "target")
    handle = breaking(model) if fault == "inside" else None
    before = State.of(model)
    if name == "random":
        explain(model, batch, targets)
    else:
        with pytest.raises(BrokenError if fault == "inside" else ValueError) as caught:
            explain(model, batch, targets)
        assert fault == "inside" or "targets must lie in [0, 2]" in str(caught.value)
    assert before.same_as(State.of(model))
    if handle is not None:
        handle.remove()


@every_case
@pytest.mark.parametrize("case", ["bert", "roberta", "modernbert"])
def test_pairs(make, name, kind, case):
    model, explain, batch = make_model(kind, case), make(name), batch_of(PAIRS, case)
    scores = explain(model, batch, targets_of(batch))
    assert (scores[~batch.mask] == 0).all()
    if name not in RECTIFIED:
        assert all((scores[0][(batch.sequence_ids[0] == part)] != 0).any() for part in (0, 1))
    assert_close(scores, one_by_one(explain, model, batch), rtol=1e-5, atol=1e-5)


@every_case
@pytest.mark.parametrize("side", ["right", "left"])
def test_texts_that_were_cut(make, name, kind, side):
    model, explain = make_model(kind), make(name)
    batch = TokenBatch.make(TEXTS, make_masking(truncation_side=side), max_length=6)
    assert batch.truncated.any()
    scores = explain(model, batch, targets_of(batch))
    assert name in RECTIFIED or (scores[0][batch.mask[0]] != 0).any()
    assert_close(scores, one_by_one(explain, model, batch, max_length=6), rtol=1e-5, atol=1e-5)


@every_case
def test_texts_of_no_token(make, name, kind):
    model, explain, batch = make_model(kind), make(name), batch_of(["", "good"])
    scores = explain(model, batch, targets_of(batch))
    assert (scores[0] == 0).all()
    assert (scores[1] != 0).sum() <= 1
    alone = batch_of([""])
    assert (explain(model, alone, targets_of(alone)) == 0).all()


@every_case
@pytest.mark.parametrize("attention", attentions("bert"))
@pytest.mark.parametrize("caller", [torch.no_grad, torch.inference_mode])
def test_callers_may_have_turned_gradients_off(make, name, kind, attention, caller):
    model, explain, batch = make_model(kind, attention=attention), make(name), batch_of()
    expected = explain(model, batch, targets_of(batch))
    with caller():
        inside = batch_of()
        scores = explain(model, inside, targets_of(inside))
    assert_close(scores.clone(), expected, rtol=0, atol=1e-6)


@every_case
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes(make, name, kind, dtype):
    batch = batch_of()
    scores = make(name)(make_model(kind).to(dtype), batch, targets_of(batch))
    assert scores.dtype == torch.float32
    exact = make(name)(make_model(kind), batch, targets_of(batch))
    if dtype == torch.float64:
        assert_close(scores, exact, rtol=1e-4, atol=1e-5)
    elif name not in RECTIFIED:
        assert (scores[0][batch.mask[0]] != 0).any()


@every_case
def test_nothing_is_printed_and_no_random_number_drawn(make, name, kind, capfd):
    import numpy as np

    model, explain, batch = make_model(kind), make(name), batch_of()
    state, other = torch.get_rng_state(), np.random.get_state()  # noqa: NPY002
    explain(model, batch, targets_of(batch))
    assert capfd.readouterr() == ("", "")
    assert torch.equal(state, torch.get_rng_state())
    assert all(np.array_equal(ours, theirs) for ours, theirs in zip(np.random.get_state(), other, strict=True))  # noqa: NPY002


@every_case
def test_nothing_is_kept(make, name, kind):
    model, explain, batch = make_model(kind), make(name), batch_of()
    scores = explain(model, batch, targets_of(batch))
    remembered = [weakref.ref(model), weakref.ref(batch), weakref.ref(scores)]
    del model, batch, scores
    if any(reference() is not None for reference in remembered):
        gc.collect()
    assert [reference() for reference in remembered] == [None, None, None]


@pytest.mark.parametrize("name", [name for name in EVERY if name not in BLIND])
def test_another_class_has_other_scores(make, name):
    model, explain, batch = make_model(), make(name), batch_of(TEXTS[:1])
    scores = [explain(model, batch, torch.tensor([target])) for target in range(3)]
    assert any(not torch.allclose(scores[0], other, atol=1e-3 * float(scores[0].abs().max())) for other in scores[1:])


@pytest.mark.parametrize("name", ["occlusion", "shap", "integrated-gradients"])
def test_a_mask_token_is_asked_for(make, name):
    tokenizer = make_masking()
    tokenizer.mask_token = None
    batch = TokenBatch.make(TEXTS, tokenizer)
    with pytest.raises(ValueError, match=f"tokenizer must have a mask token for {name}, got "):
        make(name)(make_model("plain"), batch, targets_of(batch))


@pytest.mark.parametrize("name", EVERY)
def test_what_does_not_fit_is_refused(make, name):
    model, batch, explain = make_model(), batch_of(TEXTS[:2]), make(name)
    with pytest.raises(TypeError, match=r"model must be an nn\.Module"):
        explain(lambda batch: batch, batch, torch.tensor([0, 1]))
    with pytest.raises(TypeError, match="batch must be a TokenBatch, got dict"):
        explain(model, batch.inputs(), torch.tensor([0, 1]))
    with pytest.raises(TypeError, match=re.escape("targets must be of dtype torch.int64")):
        explain(model, batch, torch.tensor([0, 1], dtype=torch.int32))
    with pytest.raises(ValueError, match=re.escape("targets must have shape (2,), got (3,)")):
        explain(model, batch, torch.tensor([0, 1, 2]))
