"""Maps in few bytes, and back."""

import numpy as np
import pyarrow as pa
import pytest
import torch

from mhex_vision.bulk import read_saliency
from mhex_vision.bulk.storing import as_lists, pack, unpack


def stored(maps, storage="uint8", *, unit=False):
    return tuple(part.numpy() for part in pack(maps, storage, unit=unit))


def batch_of(maps, storage="uint8", *, unit=False):
    values, scale, offset = stored(maps, storage, unit=unit)
    columns = [as_lists(values), pa.array(scale), pa.array(offset)]
    return pa.RecordBatch.from_arrays(columns, names=["saliency", "saliency_scale", "saliency_offset"])


@pytest.fixture
def maps():
    return torch.rand(5, 4, 3, generator=torch.Generator().manual_seed(0))


def test_maps_in_0_to_1_keep_256_levels_of_it(maps):
    values, scale, offset = stored(maps, unit=True)
    assert values.dtype == np.uint8
    assert (scale == np.float32(1 / 255)).all()
    assert (offset == 0).all()
    assert np.abs(unpack(values, scale, offset) - maps.numpy()).max() <= 0.5 / 255 + 1e-6


@pytest.mark.parametrize("factor", [1e-30, 1e-3, 1.0, 300.0, 1e30])
def test_signed_maps_lie_between_their_own_extremes(maps, factor):
    signed = (maps - 0.3) * factor
    values, scale, offset = stored(signed)
    assert (values.min(axis=(1, 2)) == 0).all()
    assert (values.max(axis=(1, 2)) == 255).all()
    error = np.abs(unpack(values, scale, offset) - signed.numpy()).max(axis=(1, 2))
    assert (error <= 0.51 * scale).all()


@pytest.mark.parametrize("factor", [1e-8, 1e-3, 0.7, 300.0, 1e30])
def test_half_precision_keeps_its_digits_at_any_scale(maps, factor):
    signed = (maps - 0.3) * factor
    values, scale, offset = stored(signed, "float16")
    assert values.dtype == np.float16
    assert (offset == 0).all()
    assert (scale == 1).all() or factor != 0.7
    error = np.abs(unpack(values, scale, offset) - signed.numpy())
    assert (error <= 2**-11 * np.abs(signed.numpy()).max(axis=(1, 2), keepdims=True)).all()


@pytest.mark.parametrize("storage", ["uint8", "float16"])
@pytest.mark.parametrize("value", [0.0, -3.0, 5000.0])
def test_constant_maps_stay_what_they_are(storage, value):
    assert (read_saliency(batch_of(torch.full((2, 3, 3), value), storage)) == value).all()


def test_what_is_no_number_counts_as_zero_or_stays(maps):
    maps[0, 0, 0], maps[1, 0, 0] = torch.nan, torch.inf
    for unit in (False, True):
        values = read_saliency(batch_of(maps, unit=unit))
        assert np.isfinite(values).all()
        assert np.abs(values[:2, 0, 0]).max() <= 0.5 / 255
    values = read_saliency(batch_of(maps, "float16"))
    assert np.isnan(values[0, 0, 0])
    assert np.isinf(values[1, 0, 0])
    assert (~np.isfinite(values)).sum() == 2


def test_a_map_does_not_depend_on_the_others(maps):
    for storage in ("uint8", "float16"):
        whole = stored(maps * 9 - 4, storage)
        for row in range(5):
            alone = stored(maps[row : row + 1] * 9 - 4, storage)
            assert all(np.array_equal(part[row : row + 1], one) for part, one in zip(whole, alone, strict=True))


def test_tables_slices_and_chunks_are_read_alike(maps):
    batch = batch_of(maps)
    expected = read_saliency(batch)
    assert expected.dtype == np.float32
    assert expected.shape == (5, 4, 3)
    assert np.array_equal(read_saliency(batch.slice(1, 3)), expected[1:4])
    table = pa.Table.from_batches([batch.slice(0, 2), batch.slice(2, 0), batch.slice(2, 3)])
    assert np.array_equal(read_saliency(table), expected)
    assert np.array_equal(read_saliency(table.slice(1, 3)), expected[1:4])
    assert np.array_equal(read_saliency(table.take([4, 0])), expected[[4, 0]])


def test_other_tables_are_refused(maps):
    batch = batch_of(maps)
    with pytest.raises(TypeError, match="batch_or_table"):
        read_saliency([1])
    with pytest.raises(ValueError, match="got none called saliency_scale"):
        read_saliency(batch.drop_columns(["saliency_scale"]))
    for column in (pa.array([1] * 5), pa.array([[[1], [1, 2]]] * 5), pa.array([[[1]]] * 4 + [None])):
        with pytest.raises(ValueError, match="saliency must hold"):
            read_saliency(batch.set_column(0, "saliency", column))
