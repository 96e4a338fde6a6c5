"""Packed evidence comes back as it was, to a fraction of what 16 bits resolve."""

import zlib

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mhex_core.explorer.packing import packed, unpacked

SHAPES = [(5, 3), (1, 1), (7,), (2, 8)]


def random_parts(seed, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    return [scale * torch.randn(shape, generator=generator, dtype=torch.float64) for shape in SHAPES]


@given(st.integers(0, 1000), st.floats(-30, 30).map(lambda power: 10.0**power))
def test_the_round_trip_errs_by_half_a_step(seed, scale):
    positive, negative = random_parts(seed, scale), random_parts(seed + 1, scale)
    data = packed(positive, negative)
    for before, after in zip(
        positive + negative, [part for side in unpacked(data, SHAPES) for part in side], strict=True
    ):
        assert after.shape == before.shape
        spread = float(before.max() - before.min())
        # Half a step, and what keeping the lowest value and the step as float32 costs.
        allowed = spread / 131070 + 3e-7 * float(before.abs().max())
        assert float((after - before).abs().max()) <= allowed


def test_constants_come_back_exactly():
    levels = (0.0, -3.5, 1e-20, 0.3)
    parts = [torch.full(shape, level) for shape, level in zip(SHAPES, levels, strict=True)]
    positive, negative = unpacked(packed(parts, parts), SHAPES)
    for before, after in zip(parts * 2, (*positive, *negative), strict=True):
        torch.testing.assert_close(after, before.double(), rtol=0, atol=0)


def test_smooth_maps_are_small():
    coarse = torch.randn(1, 1, 7, 7, generator=torch.Generator().manual_seed(0))
    smooth = torch.nn.functional.interpolate(coarse, size=(224, 224), mode="bilinear")[0, 0]
    assert len(packed([smooth.clamp(min=0)], [smooth.clamp(max=0)])) < 0.15 * 4 * smooth.numel()


def test_other_dtypes_and_layouts():
    part = torch.randn(6, 4, dtype=torch.float64).half()
    positive, _ = unpacked(packed([part.T], [part.T.contiguous().bfloat16()]), [(4, 6)])
    torch.testing.assert_close(positive[0], part.T.double(), rtol=0, atol=1e-4)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), -1e39, 1e300])
def test_what_is_not_finite_cannot_be_packed(value):
    part = torch.tensor([[0.0, value]], dtype=torch.float64)
    with pytest.raises(ValueError, match="evidence must be finite"):
        packed([torch.zeros(1, 2)], [part])


def test_other_bytes_are_refused():
    data = packed(*[random_parts(0)] * 2)
    with pytest.raises(ValueError, match="data must be packed evidence"):
        unpacked(data[:-5], SHAPES)
    with pytest.raises(ValueError, match="data must be packed evidence"):
        unpacked(b"no", SHAPES)
    with pytest.raises(ValueError, match="data must hold"):
        unpacked(data, SHAPES[:-1])
    with pytest.raises(ValueError, match="data must hold"):
        unpacked(zlib.compress(b""), SHAPES)
