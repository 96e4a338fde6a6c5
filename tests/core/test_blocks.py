"""The block against the oracle, and what a mask, a layout or half precision must not change."""

import math

import pytest
import torch
from torch.testing import assert_close

from mhex_core import MHEXBlock, equivalent_matrix

SHAPES = {
    "tokens": (3, 7, 5),
    "map": (3, 5, 4, 3),
    "one pixel": (3, 5, 1, 1),
    "signal": (3, 5, 6),
    "vector": (3, 5),
    "volume": (3, 5, 2, 3, 2),
    "empty batch": (0, 5, 4, 3),
}


def make_block(dtype=torch.float64, **settings):
    torch.manual_seed(0)
    return MHEXBlock(5, 4, **settings).to(dtype)


def make_inputs(shape, dtype=torch.float64, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for _ in range(2)]


def last(shape):
    """Whether a shape of these is tokens, (B, T, C)."""
    return len(shape) == 3 and shape != SHAPES["signal"]


def positions_of(shape):
    return shape[:-1] if last(shape) else (shape[0], *shape[2:])


def flat(result):
    gated, output = result
    return (gated, *output)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("activation", ["sum", "shortcut"])
@pytest.mark.parametrize("gate", [True, False])
@pytest.mark.parametrize(
    ("shape", "masked"),
    # A vector has no positions to mask, and the oracle stacks at least one sample.
    [(shape, masked) for shape in SHAPES.values() for masked in (False, True) if shape[0] and len(shape) > 1 + masked],
    ids=str,
)
def test_forward_equals_the_oracle(oracle, shape, gate, activation, masked, dtype, tolerance):
    block = make_block(dtype, gate=gate, activation=activation)
    x, r = make_inputs(shape, dtype)
    mask = None
    if masked:
        mask = torch.rand(positions_of(shape), generator=torch.Generator().manual_seed(2)) > 0.4
        mask[0] = False  # a sample without a single real position
    expected = oracle.block(
        block.gate.weight, block.head.weight, x, r, mask, gate=gate, activation=activation, tokens=last(shape)
    )
    for ours, theirs in zip(flat(block(x, r, mask, channels_last=last(shape))), expected, strict=True):
        assert ours.dtype == dtype
        assert_close(ours.double(), torch.from_numpy(theirs), rtol=tolerance, atol=tolerance)


def test_logits_are_the_equivalent_matrix_times_the_pooled_features():
    block = make_block()
    x, r = make_inputs(SHAPES["map"])
    pooled = torch.relu(x.mean(dim=(2, 3)) + r.mean(dim=(2, 3)))
    assert_close(block(x, r)[1].logits, pooled @ block.equivalent_matrix().T, rtol=1e-12, atol=1e-12)
    assert_close(block.equivalent_matrix(), equivalent_matrix(block.gate.weight, block.head.weight), rtol=0, atol=0)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_without_a_gate_the_shortcut_itself_comes_back(shape):
    block = make_block(gate=False)
    x, r = make_inputs(shape)
    gated, output = block(x, r, channels_last=last(shape))
    assert gated is x
    assert_close(output.activation, r + x, rtol=0, atol=0)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_output_shapes_follow_the_input_also_for_an_empty_batch(shape):
    gated, output = make_block()(*make_inputs(shape), channels_last=last(shape))
    assert gated.shape == output.activation.shape == shape
    assert output.hidden.shape == (shape[0], 5)
    assert output.logits.shape == (shape[0], 4)


@pytest.mark.parametrize("filling", [0.0, 1e30, float("nan"), float("inf")])
@pytest.mark.parametrize("side", ["right", "left"])
def test_padding_is_not_felt_whatever_it_holds(filling, side):
    block = make_block()
    x, r = make_inputs((1, 4, 5))
    padding = torch.full((1, 3, 5), filling, dtype=torch.float64)
    order = (lambda real, pad: [real, pad]) if side == "right" else (lambda real, pad: [pad, real])
    padded_x, padded_r = (torch.cat(order(value, padding), dim=1) for value in (x, r))
    mask = torch.cat(order(torch.ones(1, 4), torch.zeros(1, 3)), dim=1)
    gated, output = block(padded_x, padded_r, mask, channels_last=True)
    real = mask.bool()
    plain_gated, plain = block(x, r, channels_last=True)
    assert_close(output.hidden, plain.hidden, rtol=1e-14, atol=1e-14)
    assert_close(output.logits, plain.logits, rtol=1e-14, atol=1e-14)
    assert_close(gated[real], plain_gated[0], rtol=1e-14, atol=1e-14)
    assert_close(output.activation[real], plain.activation[0], rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("mask_dtype", [torch.bool, torch.int64, torch.float32, torch.uint8])
def test_mask_may_be_of_any_dtype(mask_dtype):
    block = make_block()
    x, r = make_inputs(SHAPES["tokens"])
    mask = torch.tensor([[1, 1, 1, 0, 0, 0, 0], [1, 1, 1, 1, 1, 1, 1], [0, 1, 0, 1, 0, 1, 1]])
    expected = block(x, r, mask.bool(), channels_last=True)
    assert_close(block(x, r, mask.to(mask_dtype), channels_last=True), expected, rtol=0, atol=0)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("shape", [(2, 3, 5), (2, 5, 2, 3)], ids=str)
def test_gradients_are_right_for_inputs_and_matrices(shape, masked):
    block = make_block()
    x, r = (value.abs().requires_grad_() for value in make_inputs(shape))  # away from the kink of the ReLU
    mask = torch.ones(positions_of(shape))
    mask[0, -1] = 0

    def run(x, r, w1, w2):
        return flat(torch.func.functional_call(block, {"gate.weight": w1, "head.weight": w2}, (x, r, given), layout))

    layout = {"channels_last": last(shape)}
    given = mask if masked else None
    weights = [weight.detach().clone().requires_grad_() for weight in (block.gate.weight, block.head.weight)]
    assert torch.autograd.gradcheck(run, (x, r, *weights))


def test_memory_layout_does_not_matter_and_channels_last_is_kept():
    block = make_block()
    x, r = make_inputs((2, 5, 4, 3))
    expected = block(x, r)
    nhwc = block(x.contiguous(memory_format=torch.channels_last), r.contiguous(memory_format=torch.channels_last))
    assert nhwc[0].is_contiguous(memory_format=torch.channels_last)
    strided = block(x.transpose(2, 3).contiguous().transpose(2, 3), r)
    for other in (nhwc, strided):
        for ours, theirs in zip(flat(other), flat(expected), strict=True):
            assert_close(ours, theirs, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("masked", [False, True])
def test_half_precision_averages_survive_many_large_positions(dtype, masked):
    """A sum of 1000 times 100 is infinite in float16, and bfloat16 cannot count to 1000."""
    block = make_block(dtype)
    x = torch.full((1, 1001, 5), 100.0, dtype=dtype)
    mask = torch.ones(1, 1001) if masked else None
    hidden = block(x, x, mask, channels_last=True)[1].hidden
    exact = make_block(dtype).double()(x.double(), x.double(), channels_last=True)[1].hidden
    assert_close(hidden.double(), exact, rtol=1e-2, atol=1.0)


@pytest.mark.parametrize("shape", [(2, 7, 5), (2, 5, 4, 3)], ids=str)
def test_autocast_stays_close_to_full_precision(shape):
    block = make_block(torch.float32)
    x, r = make_inputs(shape, torch.float32)
    mask = torch.ones(positions_of(shape))
    expected = flat(block(x, r, mask, channels_last=last(shape)))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = flat(block(x, r, mask, channels_last=last(shape)))
    for ours, theirs in zip(result, expected, strict=True):
        assert_close(ours.float(), theirs, rtol=3e-2, atol=3e-2)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("gate", [True, False])
@pytest.mark.parametrize("shape", [SHAPES["tokens"], SHAPES["map"]], ids=str)
def test_the_gate_of_a_sum_equals_a_plain_loop(shape, gate, masked):
    block = make_block(gate=gate)
    total = sum(make_inputs(shape))
    mask = torch.rand(positions_of(shape), generator=torch.Generator().manual_seed(2)) > 0.4
    mask[0] = False  # a sample without a single real position
    w1, w2 = block.gate.weight.tolist(), block.head.weight.tolist()
    gated, output = block.gate_sum(total, mask if masked else None, channels_last=last(shape))
    for sample in range(shape[0]):
        columns = total[sample].T if len(shape) == 3 else total[sample].flatten(1)
        real = mask[sample].flatten().tolist() if masked else [True] * columns.shape[1]
        pooled = []
        for channel in columns.tolist():
            kept = [value for value, counts in zip(channel, real, strict=True) if counts]
            pooled.append(max(sum(kept) / len(kept), 0.0) if kept else 0.0)
        hidden = [sum(weight * value for weight, value in zip(row, pooled, strict=True)) for row in w1]
        logits = [sum(weight * value for weight, value in zip(row, hidden, strict=True)) for row in w2]
        factors = [1 / (1 + math.exp(-value)) if gate else 1.0 for value in hidden]
        assert output.hidden[sample].tolist() == pytest.approx(hidden, rel=1e-12, abs=1e-12)
        assert output.logits[sample].tolist() == pytest.approx(logits, rel=1e-12, abs=1e-12)
        result = gated[sample].T if len(shape) == 3 else gated[sample].flatten(1)
        for row, column, factor in zip(result, columns, factors, strict=True):
            assert row.tolist() == pytest.approx([factor * value for value in column.tolist()], rel=1e-12, abs=1e-12)
    assert output.activation is total
    assert (gated is total) is not gate


def test_the_gate_of_a_sum_and_that_of_a_shortcut_read_the_same_head():
    block = make_block()
    x, r = make_inputs(SHAPES["tokens"])
    mask = torch.rand(positions_of(SHAPES["tokens"]), generator=torch.Generator().manual_seed(2)) > 0.4
    _, ours = block.gate_sum(x + r, mask, channels_last=True)
    _, other = block(x, r, mask, channels_last=True)
    assert_close(ours.hidden, other.hidden, rtol=1e-12, atol=1e-12)
    assert_close(ours.logits, other.logits, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("filling", [1e30, float("nan")])
def test_the_gate_of_a_sum_does_not_feel_padding(filling):
    block = make_block()
    total = make_inputs((2, 4, 5))[0]
    padded = torch.cat([total, torch.full((2, 3, 5), filling, dtype=torch.float64)], dim=1)
    mask = torch.cat([torch.ones(2, 4), torch.zeros(2, 3)], dim=1)
    gated, output = block.gate_sum(padded, mask, channels_last=True)
    plain_gated, plain = block.gate_sum(total, channels_last=True)
    assert_close(output.logits, plain.logits, rtol=1e-14, atol=1e-14)
    assert_close(gated[:, :4], plain_gated, rtol=1e-14, atol=1e-14)


def test_gradients_of_the_gate_of_a_sum_are_right():
    block = make_block()
    total = make_inputs((2, 3, 5))[0].abs().requires_grad_()  # away from the kink of the ReLU
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]])
    assert torch.autograd.gradcheck(lambda value: flat(block.gate_sum(value, mask, channels_last=True))[:3], (total,))


@pytest.mark.parametrize(
    ("shape", "mask", "settings", "name"),
    [
        ((2, 4, 3, 3), None, {}, "total must have shape"),
        ((5,), None, {}, "total must have shape"),
        ((2, 7, 5), (2, 6), {}, "mask must have shape"),
        ((2, 7, 5), None, {"activation": "shortcut"}, "activation must be 'sum'.*got 'shortcut'"),
    ],
)
def test_the_gate_of_a_sum_names_what_does_not_fit(shape, mask, settings, name):
    total, mask = torch.zeros(shape), None if mask is None else torch.ones(mask)
    with pytest.raises(ValueError, match=name):
        make_block(**settings).gate_sum(total, mask, channels_last=last(shape))


def test_no_layer_has_a_bias_and_the_matrices_have_the_stated_shapes():
    block = MHEXBlock(5, 4)
    assert {name: tuple(value.shape) for name, value in block.named_parameters()} == {
        "gate.weight": (5, 5),
        "head.weight": (4, 5),
    }
    assert "gated=True" in repr(block)


@pytest.mark.parametrize(
    ("arguments", "settings", "error", "name"),
    [
        ((0, 2), {}, ValueError, "channels"),
        ((True, 2), {}, TypeError, "channels"),
        ((2.0, 2), {}, TypeError, "channels"),
        ((2, 0), {}, ValueError, "num_classes"),
        ((2, True), {}, TypeError, "num_classes"),
        ((2, "3"), {}, TypeError, "num_classes"),
        ((2, 2), {"gate": 1}, TypeError, "gate"),
        ((2, 2), {"activation": "both"}, ValueError, "activation"),
        ((2, 2), {"activation": None}, TypeError, "activation"),
    ],
)
def test_bad_settings_are_named(arguments, settings, error, name):
    with pytest.raises(error, match=name):
        MHEXBlock(*arguments, **settings)


@pytest.mark.parametrize(
    ("x", "r", "mask", "name"),
    [
        ((2, 5, 3, 3), (2, 5, 3, 4), None, "branch"),
        ((2, 4, 3, 3), (2, 4, 3, 3), None, "shortcut"),
        ((2, 7, 5), (2, 7, 5), None, "shortcut .* channels_last=True"),  # tokens, of which nobody said so
        ((5,), (5,), None, "shortcut"),
        ((2, 5, 6), (2, 5, 6), (2, 5), "mask"),
        ((2, 5, 3, 3), (2, 5, 3, 3), (2, 9), "mask"),
    ],
)
def test_bad_shapes_are_named(x, r, mask, name):
    with pytest.raises(ValueError, match=name):
        make_block()(torch.zeros(x), torch.zeros(r), None if mask is None else torch.ones(mask))


@pytest.mark.parametrize("gate", [True, False])
def test_what_the_axes_are_is_said_and_not_guessed(gate):
    """As many positions as channels: a signal, tokens, and maps are read alike only where they are alike."""
    block = make_block(gate=gate)
    x, r = make_inputs((2, 5, 5))
    as_signal, as_tokens = flat(block(x, r)), flat(block(x, r, channels_last=True))
    turned = flat(block(x.mT, r.mT, channels_last=True))
    as_map = flat(block(x.unsqueeze(3), r.unsqueeze(3)))
    nhwc = flat(block(x.mT.unsqueeze(1), r.mT.unsqueeze(1), channels_last=True))
    assert (as_signal[2] - as_tokens[2]).abs().max() > 1e-3
    for place, ours in enumerate(as_signal):
        positions = place in (0, 3)
        assert_close(turned[place].mT if positions else turned[place], ours)
        assert_close(as_map[place].squeeze(3) if positions else as_map[place], ours)
        assert_close(nhwc[place].squeeze(1).mT if positions else nhwc[place], ours)
    summed = block.gate_sum(x + r)
    assert_close(block.gate_sum((x + r).mT, channels_last=True)[0].mT, summed[0])
    assert_close(summed[1].hidden, as_signal[1])


# ------------------------------------------------------------------------------------------- tokens before the patches


@pytest.mark.parametrize("gate", [True, False])
@pytest.mark.parametrize("activation", ["sum", "shortcut"])
@pytest.mark.parametrize("prefix", [1, 3])
def test_a_prefix_is_gated_and_not_averaged_over(gate, activation, prefix):
    block = make_block(gate=gate, activation=activation)
    x, r = make_inputs((3, 7, 5))
    mask = torch.arange(7).expand(3, 7) >= prefix
    for ours, theirs in zip(
        flat(block(x, r, prefix=prefix, channels_last=True)), flat(block(x, r, mask, channels_last=True)), strict=True
    ):
        assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    none = block(x[:0], r[:0], prefix=prefix, channels_last=True)[1]
    assert none.logits.shape == (0, 4)


@pytest.mark.parametrize(
    ("shape", "prefix", "masked"),
    [((3, 7, 5), 7, False), ((3, 7, 5), -1, False), ((3, 7, 5), 1, True), ((3, 5, 4), 5, False)],
)
def test_a_prefix_that_cannot_be_left_out_is_named(shape, prefix, masked):
    x, r = make_inputs(shape if shape[2] == 5 else (3, 5, 4, 3))
    mask = torch.ones(3, 7) if masked else None
    with pytest.raises(ValueError, match="prefix must be less than the number of tokens"):
        make_block()(x, r, mask, prefix=prefix, channels_last=x.ndim == 3)
