"""Strides, offsets and widths: where a loop could read the wrong number, or one that is not there."""

import pytest
import torch
from torch.testing import assert_close

from mhex_core import SaliencyOptions, SignedMaps, combine_maps, saliency_maps, signed_maps, token_saliency

KEEP = {"tau_pos": 0.0, "tau_neg": 0.0, "beta": 1.0}
LAST = torch.channels_last
VIEWS = {
    "every second sample": lambda layer: layer[::2],
    "every second row": lambda layer: layer[:, :, ::2],
    "every second column": lambda layer: layer[..., ::2],
    "columns of channels_last": lambda layer: layer.contiguous(memory_format=LAST)[..., 1:-1],
    "rows of channels_last": lambda layer: layer.contiguous(memory_format=LAST)[:, :, 1:],
    "channels of channels_last": lambda layer: layer.contiguous(memory_format=LAST)[:, 1:-1],
    "every second channel of channels_last": lambda layer: layer.contiguous(memory_format=LAST)[:, ::2],
    "one row": lambda layer: layer[:, :, 1:2],
    "one column": lambda layer: layer[..., 1:2],
    "one column of channels_last": lambda layer: layer.contiguous(memory_format=LAST)[..., 1:2],
    "one position": lambda layer: layer[:, :, 1:2, 1:2],
    "channels turned round": lambda layer: layer.permute(0, 3, 2, 1),
    "flipped twice": lambda layer: layer.flip(2).flip(2),
    "windows that overlap": lambda layer: layer.flatten()[:400].as_strided((3, 5, 4, 4), (7, 1, 4, 1)),
    "channels_last from an odd element": lambda layer: layer.flatten()[1:241].view(2, 5, 6, 4).permute(0, 3, 1, 2),
    "a negative bit": lambda layer: torch.complex(torch.zeros_like(layer), layer).conj().imag,
}
ONE_CHANNEL = {
    "of channels_last": lambda: torch.randn(2, 4, 5, 6).contiguous(memory_format=LAST)[:, 1:2],
    "expanded": lambda: torch.randn(2, 1, 1, 1).expand(-1, -1, 5, 6),
    "of an image of colours": lambda: torch.randn(2, 5, 6, 3)[..., 1].unsqueeze(1),
    "contiguous": lambda: torch.randn(2, 1, 5, 6),
}


def parity(layers, matrices, target="all", *, tolerance=1e-5, **settings):
    settings = {"size": (13, 18), "normalize": False, **KEEP, **settings}
    ours = saliency_maps(layers, matrices, target, backend="native", **settings)
    wide = [layer.double() for layer in layers], [matrix.double() for matrix in matrices]
    expected = saliency_maps(*wide, target, backend="reference", **settings)
    assert_close(ours.double(), expected, rtol=0, atol=tolerance * max(float(expected.abs().max()), 1.0))


@pytest.fixture(autouse=True)
def _seed():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS.keys())
def test_a_view_means_its_values(view, dtype):
    base = torch.randn(4, 6, 7, 8)
    if view is VIEWS["a negative bit"] and dtype.itemsize == 2:
        pytest.skip("complex numbers of half precision are experimental in torch")
    layer = view(base.to(dtype))
    parity([layer, base[: layer.shape[0]].to(dtype)], [torch.randn(3, layer.shape[1]), torch.randn(3, 6)])


@pytest.mark.parametrize(
    "layer", [pytest.param(ONE_CHANNEL[name], id=name) for name in ("of channels_last", "expanded")]
)
def test_a_layer_of_one_channel_with_gaps_between_its_positions(layer):
    parity([layer()], [torch.randn(3, 1)])


@pytest.mark.parametrize(
    "layer", [pytest.param(ONE_CHANNEL[name], id=name) for name in ("of an image of colours", "contiguous")]
)
def test_a_layer_of_one_channel(layer):
    parity([layer()], [torch.randn(3, 1)])


def test_tokens_of_one_channel_with_gaps_between_them():
    tokens, matrix = torch.randn(2, 9, 4)[:, :, 1:2], torch.randn(3, 1)
    ours = token_saliency([tokens], [matrix], "all", **KEEP, backend="native")
    assert_close(ours, token_saliency([tokens], [matrix], "all", **KEEP, backend="reference"))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("channels_last", [False, True])
def test_every_number_of_channels_up_to_seventy(dtype, channels_last):
    """Each layer ends where its storage ends, so that what is read beyond it is not zero by chance."""
    for channels in range(1, 71):
        storage = torch.full((2 * channels * 6 + 64,), float("nan"), dtype=dtype)
        part = storage[: 2 * channels * 6]
        part.copy_(torch.randn(part.numel()))
        layer = part.view(2, 2, 3, channels).permute(0, 3, 1, 2) if channels_last else part.view(2, channels, 2, 3)
        parity([layer], [torch.randn(2, channels)], torch.tensor([1, 0]))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("channels_last", [False, True])
def test_every_width_up_to_seventy_of_layer_and_map(dtype, channels_last):
    for width in range(1, 71):
        storage = torch.full((5 * width + 64,), float("nan"), dtype=dtype)
        part = storage[: 5 * width]
        part.copy_(torch.randn(part.numel()))
        layer = part.view(1, 1, width, 5).permute(0, 3, 1, 2) if channels_last else part.view(1, 5, 1, width)
        parity([layer], [torch.randn(2, 5)], size=(2, 71 - width))
        parity([layer], [torch.randn(2, 5)], size=(1, width))


@pytest.mark.parametrize("shape", [(70, 70), (65, 63), (64, 64), (4097, 1), (1, 4096)], ids=str)
@pytest.mark.parametrize("size", [(5, 3), (90, 40)], ids=str)
def test_layers_of_more_positions_than_a_tile(shape, size):
    parity([torch.randn(2, 9, *shape)], [torch.randn(3, 9)], size=size)


@pytest.mark.parametrize("targets", [1, 15, 16, 17, 33])
@pytest.mark.parametrize("channels_last", [False, True])
def test_targets_around_the_sixteen_of_a_task(targets, channels_last):
    layer = torch.randn(3, 20, 6, 7).contiguous(memory_format=LAST if channels_last else torch.contiguous_format)
    target = torch.randint(40, (targets, 3)).T
    assert targets == 1 or not target.is_contiguous()
    parity([layer], [torch.randn(40, 20)], target)


def test_matrices_and_targets_of_any_strides():
    layer = torch.randn(2, 5, 4, 4)
    whole = torch.randn(7, 12)
    for matrix in (whole[:, 1:11:2], whole[::2, :5], whole.T[:5].T, torch.randn(1, 5).expand(4, 5), whole[:3, 4:9]):
        parity([layer], [matrix])
        parity([layer], [matrix], torch.tensor([[0, 9], [2, 9]])[:, 0])
        parity([layer], [matrix], torch.tensor([1]).expand(2))


def test_tokens_of_any_strides_and_masks():
    matrix, mask = torch.randn(3, 6), torch.rand(20, 4) > 0.4
    for tokens in (
        torch.randn(2, 6, 20).transpose(1, 2),
        torch.randn(20, 2, 6).transpose(0, 1),
        torch.randn(2, 41, 6)[:, 1::2],
        torch.randn(2, 20, 13)[:, :, 1::2],
        torch.randn(1, 20, 6).expand(2, -1, -1),
        torch.randn(2, 1, 6).expand(-1, 20, -1),
        torch.randn(2 * 20 * 6 + 1).half()[1:].view(2, 20, 6),
    ):
        ours = token_saliency([tokens], [matrix], "all", mask=mask.T[1:3], **KEEP, backend="native")
        wide = token_saliency(
            [tokens.double()], [matrix.double()], "all", mask=mask.T[1:3], **KEEP, backend="reference"
        )
        assert_close(ours.double(), wide, rtol=1e-5, atol=1e-5)


def test_signed_maps_of_any_strides_are_combined():
    options = SaliencyOptions(beta=0.5)
    parts = [tuple(torch.randn(5, 2, 3, 4).permute(1, 2, 3, 0)[..., ::2] for _ in range(2)) for _ in range(2)]
    ours = combine_maps(SignedMaps(*parts), size=9, options=options, backend="native")
    assert_close(ours, combine_maps(SignedMaps(*parts), size=9, options=options, backend="reference"))


def test_the_result_is_contiguous_and_its_own():
    layers = [torch.randn(2, 3, 4, 4).contiguous(memory_format=LAST)]
    matrices = [torch.randn(4, 3)]
    first = saliency_maps(layers, matrices, "all", size=5, backend="native")
    kept = first.clone()
    saliency_maps([2 * layers[0] + 1], matrices, "all", size=5, backend="native")
    assert first.is_contiguous()
    assert torch.equal(first, kept)
    maps = signed_maps(layers, matrices, "all", backend="native")
    assert len({part.data_ptr() for side in maps for part in side}) == 2


@pytest.mark.parametrize("channels_last", [False, True])
def test_an_element_that_lies_beyond_two_to_the_31(channels_last):
    """The storage is reserved and hardly touched: only the pages of the view become memory."""
    offset = 2**31 + 5
    storage = torch.empty(offset + 4096, dtype=torch.float16)
    last = storage[offset : offset + 2048]
    last.copy_(torch.randn(2048))
    first = storage[:2048]
    first.copy_(torch.randn(2048))
    strides = (offset, 1, 64 * 4, 64) if channels_last else (offset, 32, 4, 1)
    layer = storage.as_strided((2, 64, 8, 4), strides)
    parity([layer], [torch.randn(2, 64)])
    channels = storage.as_strided((1, 2, 8, 4), (0, offset, 4, 1))
    parity([channels], [torch.randn(2, 2)])
    positions = storage.as_strided((1, 5, 2, 1), (0, 1, offset, 1))
    parity([positions], [torch.randn(2, 5)])
