"""CDAM against one text at a time through the whole network, by hooks of the test's own."""

from contextlib import ExitStack

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from mhex_core.attention import cdam
from mhex_text.batch import TokenBatch
from mhex_text.capture import capture
from mhex_text.explainers import explainer
from mhex_text.running import encoder_of, places

from .models import FAMILIES, KINDS, TEXTS, make_masking, make_model

TARGETS = torch.tensor([2, 1, 0, 1])
EVERY = [(kind, family) for kind in KINDS for family in FAMILIES]
CLOSE = {"rtol": 1e-3, "atol": 1e-5}


@pytest.fixture
def batch():
    return TokenBatch.make(TEXTS, make_masking())


def row_of(batch, row):
    return {name: value[row : row + 1, : batch.attention_mask[row].sum()] for name, value in batch.inputs().items()}


def swapped(module, value):
    """A hook by which a module, or attention, is given something else; it also takes a function of what it is given."""

    def change(_, args, kwargs):
        given = args[0] if args else kwargs.get("hidden_states", kwargs.get("query"))
        other = value(given) if callable(value) else value
        if args:
            return (other, *args[1:]), kwargs
        return args, {name: other if content is given else content for name, content in kwargs.items()}

    return module.register_forward_pre_hook(change, with_kwargs=True)


def entering(model, inputs):
    """What enters the last layer, and what its attention reads, in one pass of the whole network."""
    place, found = places(encoder_of(model))[-1], {}

    def note(name):
        def keep(given):
            found[name] = given.detach()
            return given

        return keep

    handles = [swapped(place.reads, note("hidden")), swapped(place.attention, note("read"))]
    with torch.no_grad():
        model(**inputs)
    for handle in handles:
        handle.remove()
    return found["hidden"], found["read"]


def slope(model, inputs, target, read, hidden=None, *, of=None):
    """The gradient of the logit with respect to what attention reads, through the whole network."""
    place = places(encoder_of(model))[-1]
    leaf = read.clone().requires_grad_()
    with ExitStack() as hooks:
        hooks.callback(swapped(place.attention, leaf).remove)
        if hidden is not None:
            hooks.callback(swapped(place.layer, hidden).remove)
        output = model(**inputs).logits[0, target] if of is None else of(model, inputs)
    return torch.autograd.grad(output, leaf)[0]


def compare(scores, batch, expected_of):
    for row in range(len(batch)):
        expected = expected_of(row_of(batch, row), int(TARGETS[row]))[0]
        places_of = batch.mask[row].nonzero().flatten()
        assert_close(scores[row, places_of], expected[places_of], **CLOSE)
        assert (scores[row] != 0).any()


@pytest.mark.parametrize(("kind", "family"), EVERY)
def test_vanilla(kind, family):
    model, batch = make_model(kind, family), TokenBatch.make(TEXTS, make_masking(family))

    def expected(inputs, target):
        _, read = entering(model, inputs)
        return (read * slope(model, inputs, target, read)).sum(dim=2)

    compare(explainer("cdam")(model, batch, TARGETS), batch, expected)


def normed(model, hidden):
    norm = places(encoder_of(model))[-1].norm
    return hidden if norm is None else norm(hidden).detach()


def noise_of(seed, step, hidden, share):
    drawn = np.random.default_rng([seed, step]).standard_normal(hidden.shape[1:])
    return share * (hidden.max() - hidden.min()) * torch.from_numpy(drawn).to(hidden)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("place", ["block_input", "attention_input"])
@pytest.mark.parametrize("mode", ["smooth", "integrated"])
def test_noise_and_scales(family, place, mode):
    model, batch = make_model("plain", family), TokenBatch.make(TEXTS, make_masking(family))
    steps, at_block = 3, place == "block_input"
    explain = explainer("cdam", mode=mode, steps=steps, noise=0.1, perturb_at=place, seed=4, batch_size=5)
    points = range(steps) if mode == "smooth" else range(1, steps) if at_block else range(steps + 1)

    def expected(inputs, target):
        hidden, read = entering(model, inputs)
        total = 0
        for number, point in enumerate(points):
            changed = hidden if at_block else read
            moved = changed * (1 if mode == "smooth" else point / steps) + noise_of(4, number, changed, 0.1)
            tokens = normed(model, moved) if at_block else moved
            total += (tokens * slope(model, inputs, target, tokens, moved if at_block else hidden)).sum(dim=2)
        return total / len(points)

    compare(explain(model, batch, TARGETS), batch, expected)


@pytest.mark.parametrize(("kind", "family"), EVERY)
def test_the_complete_form_adds_up_over_all_tokens(kind, family):
    model, batch = make_model(kind, family), TokenBatch.make(TEXTS[:2], make_masking(family))
    seen, targets = capture(model, batch.inputs(), graph=False), TARGETS[:2, None]
    scores = cdam(
        seen.hidden[-1],
        seen.tail.normalize,
        seen.tail.logits,
        targets,
        mode="integrated_complete",
        steps=800,
        mask=batch.attention_mask,
    )
    for row, target in enumerate(targets[:, 0].tolist()):
        inputs = row_of(batch, row)
        last = places(encoder_of(model))[-1].attention
        handle = swapped(last, torch.zeros_like)
        with torch.no_grad():
            without = model(**inputs).logits[0, target]
        handle.remove()
        change = float(seen.logits[row, target] - without)
        assert float(scores[row].sum()) == pytest.approx(change, abs=1e-2)
    by_name = explainer("cdam", mode="integrated_complete", steps=800)(model, batch, TARGETS[:2])
    assert_close(by_name[batch.mask], scores[:, 0][batch.mask], **CLOSE)


@pytest.mark.parametrize("joint", [False, True])
def test_earlier_heads_are_constants(batch, joint):
    """Nothing before the last layer depends on what its attention reads."""
    model = make_model("mhex", objective="joint" if joint else "layerwise")

    def expected(inputs, target):
        _, read = entering(model, inputs)
        return (read * slope(model, inputs, target, read)).sum(dim=2)

    compare(explainer("cdam")(model, batch, TARGETS), batch, expected)


@pytest.mark.parametrize("family", ["bert", "modernbert", "distilbert"])
def test_a_concept_in_place_of_a_class(family):
    model, batch = make_model("plain", family), TokenBatch.make(TEXTS, make_masking(family))
    concept = torch.randn(32, generator=torch.Generator().manual_seed(3))

    def product(model, inputs):
        return model.base_model(**inputs).last_hidden_state[0, 0] @ concept

    def expected(inputs, target):
        _, read = entering(model, inputs)
        return (read * slope(model, inputs, target, read, of=product)).sum(dim=2)

    explain = explainer("cdam", concept=concept)
    scores = explain(model, batch, TARGETS)
    compare(scores, batch, expected)
    assert torch.equal(scores, explain(model, batch, TARGETS.flip(0)))


def test_a_concept_of_heads(batch):
    model = make_model("mhex")
    matrix = model.equivalent_matrices()[-1].detach()
    scores = explainer("cdam", concept=matrix[1])(model, batch, TARGETS)
    assert_close(scores, explainer("cdam")(model, batch, torch.ones_like(TARGETS)), rtol=1e-4, atol=1e-5)


def test_rows_at_a_time_are_not_felt(batch):
    model = make_model("plain")
    found = [
        explainer("cdam", mode="smooth", steps=5, batch_size=size)(model, batch, TARGETS) for size in (1, 3, 7, 100)
    ]
    for other in found[1:]:
        assert_close(found[0], other, rtol=1e-4, atol=1e-5)
    other = explainer("cdam", mode="smooth", steps=5, seed=1)(model, batch, TARGETS)
    assert not torch.allclose(found[0], other)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"mode": "plain"}, ValueError, "mode must be one of 'vanilla', 'smooth'"),
        ({"steps": 0}, ValueError, "steps must be at least 1, got 0"),
        ({"steps": 1, "mode": "integrated"}, ValueError, "steps must be at least 2 for mode 'integrated', got 1"),
        ({"noise": 0.1}, ValueError, "noise belongs to modes 'smooth' and 'integrated', got it with 'vanilla'"),
        ({"noise": -1, "mode": "smooth"}, ValueError, "noise must be at least 0, got -1"),
        ({"perturb_at": "input"}, ValueError, "perturb_at must be one of 'block_input', 'attention_input'"),
        ({"perturb_at": "attention_input"}, ValueError, "perturb_at belongs to modes 'smooth' and 'integrated'"),
        ({"seed": 0.5}, TypeError, "seed must be an int, got float"),
        ({"seed": -1}, ValueError, "seed must be at least 0, got -1"),
        ({"concept": "sport"}, TypeError, "concept must be a torch.Tensor, got str"),
        ({"concept": torch.ones(2, 2)}, ValueError, "concept must have 1 dimensions"),
        ({"batch_size": 0}, ValueError, "batch_size must be at least 1, got 0"),
    ],
)
def test_options_are_checked_at_once(options, error, message):
    with pytest.raises(error, match=message):
        explainer("cdam", **options)


def test_a_concept_of_another_width(batch):
    with pytest.raises(ValueError, match=r"concept must have shape \(32,\), got \(3,\)"):
        explainer("cdam", concept=torch.ones(3))(make_model(), batch, TARGETS)
