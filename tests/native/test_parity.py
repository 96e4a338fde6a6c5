"""The kernels compute what the float64 reference does, whatever the dtype, the layout and the sizes."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from mhex_core import SaliencyOptions, combine_maps, saliency_maps, signed_maps, token_saliency

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
SETTINGS = {
    "default": {},
    "beta": {"beta": 0.4},
    "all of M": {"beta": 1.0, "tau_pos": 0.0, "tau_neg": 0.0},
    "soft": {"sharpness": "soft", "beta": 0.3},
    "soft, exponent": {"sharpness": "soft", "exponent": 0.5},
    "layer weights": {"layer_weights": [0.0, -1.0, 2.0, 0.5], "beta": 0.2},
    "not normalised": {"normalize": False, "beta": 0.7},
    "rectified": {"rectify": True, "beta": 0.4},
    "rectified, few channels": {"rectify": True, "tau_pos": 0.9},
}
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
every_layout = pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])


def agree(ours, exact):
    """Within 1e-5 of the range (1e-12 in float64)."""
    scale = float(exact.abs().max()) if exact.numel() else 0.0
    tolerance = (1e-12 if ours.dtype == torch.float64 else 1e-5) * max(scale, 1e-30)
    assert_close(ours.double(), exact, rtol=0, atol=tolerance)


@every_dtype
@every_layout
@pytest.mark.parametrize("target", ["one", "several", "all"])
@pytest.mark.parametrize("options", SETTINGS.values(), ids=SETTINGS.keys())
def test_maps_are_those_of_the_reference(make, exact, dtype, channels_last, target, options):
    activations, matrices = make(dtype=dtype, channels_last=channels_last)
    wanted = {"one": torch.tensor([4, 0, 2]), "several": torch.tensor([[0, 1], [4, 4], [2, 0]]), "all": "all"}[target]
    ours = saliency_maps(activations, matrices, wanted, size=(21, 34), backend="native", **options)
    agree(ours, exact(saliency_maps, activations, matrices, wanted, size=(21, 34), **options))


@every_dtype
@every_layout
@pytest.mark.parametrize("rectify", [False, True])
def test_both_halves_are_those_of_the_reference(make, exact, dtype, channels_last, rectify):
    activations, matrices = make(dtype=dtype, channels_last=channels_last)
    options = SaliencyOptions(beta=0.5, rectify=rectify)
    ours = signed_maps(activations, matrices, "all", options=options, backend="native")
    expected = exact(signed_maps, activations, matrices, "all", options=options)
    for part, exact_part in zip(ours, expected, strict=True):
        for layer, exact_layer in zip(part, exact_part, strict=True):
            agree(layer, exact_layer)
    whole = combine_maps(ours, size=(8, 50), options=options, backend="native")
    agree(whole, combine_maps(expected, size=(8, 50), options=options, backend="reference"))


@every_dtype
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("beta", [0.0, 0.6])
def test_token_scores_are_those_of_the_reference(make, exact, dtype, masked, beta):
    activations, matrices = make([(24, 70, 1), (7, 70, 1)], dtype=dtype)
    tokens = [layer.squeeze(-1).transpose(1, 2) for layer in activations]  # one by its layout, one by its strides
    tokens[0] = tokens[0].contiguous()
    mask = torch.rand(3, 70, generator=torch.Generator().manual_seed(1)) > 0.4 if masked else None
    ours = token_saliency(tokens, matrices, "all", mask=mask, beta=beta, backend="native")
    agree(ours, exact(token_saliency, tokens, matrices, "all", mask=mask, beta=beta))
    if mask is not None:
        assert not ours[~mask.unsqueeze(1).expand_as(ours)].any()


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    channels=st.integers(1, 70),
    height=st.integers(1, 20),
    width=st.integers(1, 20),
    size=st.tuples(st.integers(1, 70), st.integers(1, 70)),
    classes=st.integers(1, 12),
    channels_last=st.booleans(),
    beta=st.sampled_from([0.0, 0.5]),
)
def test_any_size_will_do(make, exact, channels, height, width, size, classes, channels_last, beta):
    shapes = [(channels, height, width), (3, width, height)]
    activations, matrices = make(shapes, batch=2, classes=classes, channels_last=channels_last)
    target = torch.tensor([classes - 1, 0])
    ours = saliency_maps(activations, matrices, target, size=size, beta=beta, normalize=False, backend="native")
    expected = exact(saliency_maps, activations, matrices, target, size=size, beta=beta, normalize=False)
    # Sums may cancel, and their rounding does not: what is added up sets the scale.
    scale = sum(
        float((layer.abs().amax(dim=(0, 2, 3)) * matrix.abs().amax(dim=0)).sum())
        for layer, matrix in zip(activations, matrices, strict=True)
    )
    assert_close(ours.double(), expected, rtol=0, atol=1e-6 * scale)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("channels", [512, 2048])
def test_a_thousand_classes_and_many_channels(make, exact, channels, channels_last):
    activations, matrices = make([(channels, 3, 5)], batch=2, classes=1000, channels_last=channels_last)
    ours = saliency_maps(activations, matrices, "all", size=6, beta=0.5, backend="native")
    agree(ours, exact(saliency_maps, activations, matrices, "all", size=6, beta=0.5))


@pytest.mark.parametrize(
    "view",
    {
        "channels sliced": lambda layer: layer[:, 1::2],
        "batch sliced": lambda layer: layer[1:],
        "rows sliced": lambda layer: layer[:, :, 1:],
        "columns sliced": lambda layer: layer[..., 1:],
        "transposed": lambda layer: layer.transpose(2, 3),
        "channels in front": lambda layer: layer.transpose(0, 1),
        "expanded batch": lambda layer: layer[:1].expand(3, -1, -1, -1),
        "expanded channels": lambda layer: layer[:, :1].expand(-1, 6, -1, -1),
        "expanded positions": lambda layer: layer[:, :, :1, :1].expand(-1, -1, 4, 3),
        "odd offset": lambda layer: layer.flatten()[1 : 1 + 2 * 3 * 20].view(2, 3, 4, 5),
    }.items(),
    ids=lambda item: item[0],
)
@every_layout
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_any_strides_are_right(make, exact, view, channels_last, dtype):
    ((layer,), _) = make([(6, 7, 8)], batch=6, dtype=dtype, channels_last=channels_last)
    try:
        strided = view[1](layer)
    except RuntimeError:
        strided = view[1](layer.contiguous())
    matrix = torch.randn(strided.shape[1], 4, generator=torch.Generator().manual_seed(2)).T
    ours = saliency_maps([strided], [matrix], "all", size=9, beta=0.5, backend="native")
    agree(ours, exact(saliency_maps, [strided], [matrix], "all", size=9, beta=0.5))


def test_offsets_reach_beyond_two_to_the_31():
    """Element offsets above 2^31, in storage of a few megabytes: every sample, and every channel, is the same one."""
    layer = torch.randn(1, 1, 64, 64).expand(700, 1024, 64, 64)
    assert layer.numel() > 2**31
    matrix = torch.zeros(2, 1024)
    matrix[0, 1000] = 1.0
    ours = saliency_maps([layer], [matrix], 0, size=4, normalize=False, backend="native")
    assert_close(ours[699], ours[0], rtol=0, atol=0)
    one = saliency_maps([layer[:1]], [matrix], 0, size=4, normalize=False, backend="reference")
    assert_close(ours[:1], one, rtol=0, atol=1e-6)


@pytest.mark.slow
def test_a_tensor_of_more_than_two_to_the_31_elements(exact):
    layer = torch.zeros(33, 256, 512, 512, dtype=torch.bfloat16)
    layer[32, 255] = torch.randn(512, 512).bfloat16()
    matrix = torch.ones(1, 256)
    ours = saliency_maps([layer], [matrix], 0, size=64, backend="native")
    last = layer[32:]
    agree(ours[32:], exact(saliency_maps, [last], [matrix], 0, size=64))
    assert not ours[:32].any()


def test_an_empty_batch_gives_empty_maps(make):
    activations, matrices = make(batch=0)
    assert saliency_maps(activations, matrices, "all", size=4, backend="native").shape == (0, 5, 4, 4)
    assert saliency_maps(activations, matrices, 0, size=4, backend="native").shape == (0, 4, 4)
    tokens = [layer.flatten(2).transpose(1, 2)[:, :1] for layer in activations]
    assert token_saliency(tokens, matrices, 0, backend="native").shape == (0, 1)


@every_layout
@pytest.mark.parametrize("value", [0.0, 3.7, -1e5])
def test_constant_maps_are_zeros(make, channels_last, value):
    activations, matrices = make(channels_last=channels_last)
    constant = [torch.full_like(layer, value) for layer in activations]
    ours = saliency_maps(constant, matrices, "all", size=(31, 17), beta=0.5, backend="native")
    assert not ours.any()


@pytest.mark.parametrize("magnitude", [1e-30, 1.0, 1e30])
def test_every_map_reaches_from_0_to_1(make, magnitude):
    activations, matrices = make(batch=40)
    scaled = [layer * magnitude for layer in activations]
    ours = saliency_maps(scaled, matrices, "all", size=(19, 23), beta=0.5, backend="native")
    assert (ours.amax(dim=(-2, -1)) == 1).all()
    assert (ours.amin(dim=(-2, -1)) == 0).all()


@pytest.mark.parametrize("rectify", [False, True])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_spoils_its_own_map_alone(make, value, rectify):
    activations, matrices = make()
    settings = {"size": 9, "beta": 1.0, "tau_pos": 0.0, "tau_neg": 0.0, "rectify": rectify, "backend": "native"}
    clean = saliency_maps(activations, matrices, "all", **settings)
    activations[1][2, 3, 0, 0] = value
    ours = saliency_maps(activations, matrices, "all", **settings)
    assert ours[2].isnan().all()
    assert torch.equal(ours[:2], clean[:2])


def test_a_channel_without_weight_is_not_read():
    layer = torch.randn(1, 2, 3, 3)
    layer[:, 1] = float("nan")
    matrix = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    assert saliency_maps([layer], [matrix], 0, size=3, backend="native").isfinite().all()


def test_a_class_that_does_not_exist_is_refused(make):
    activations, matrices = make()
    with pytest.raises(ValueError, match="target"):
        saliency_maps(activations, matrices, torch.tensor([0, 5, 1]), size=4, backend="native")
