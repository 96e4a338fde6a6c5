"""Transforms of torch applied to each other: what comes out is what the reference gives, or an error, never less."""

import threading
from functools import partial

import pytest
import torch
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacrev, jvp, vmap
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

from mhex_core import SaliencyPlan, combine_maps, native, saliency_maps, signed_maps, token_saliency

KEEP = {"tau_pos": 0.0, "tau_neg": 0.0, "beta": 0.5}
fails = partial(pytest.mark.xfail, strict=True)
jit_warning = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:FutureWarning")  # torch's own jvp


def random(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


MATRIX, LAYER, TARGET = random(4, 3), random(2, 3, 4, 5, seed=1), torch.tensor([3, 0])


def maps(layer, matrix=MATRIX, target="all", *, backend="native", **settings):
    return saliency_maps([layer], [matrix], target, backend=backend, **{"size": (5, 6), **KEEP, **settings})


def tokens(layer, matrix=MATRIX, target="all", *, backend="native", mask=None):
    return token_saliency([layer.flatten(2).transpose(1, 2)], [matrix], target, mask=mask, backend=backend, **KEEP)


def halves(layer, matrix=MATRIX, target="all", *, backend="native"):
    return combine_maps(signed_maps([layer], [matrix], target, backend=backend), size=6, backend=backend)


every_call = pytest.mark.parametrize("call", [maps, tokens, halves])


def both(function):
    """The same with kernels and with the reference."""
    return assert_close(function("native"), function("reference"), rtol=1e-9, atol=1e-11)


def loss(call, backend, *arguments):
    return call(*arguments, backend=backend).square().sum()


# ------------------------------------------------------------------------------------------------------------ gradients


@every_call
def test_gradients_with_respect_to_either_alone(call):
    both(lambda backend: grad(lambda layer: loss(call, backend, layer))(LAYER))
    both(lambda backend: grad(lambda matrix: loss(call, backend, LAYER, matrix, TARGET))(MATRIX))


@every_call
def test_second_derivatives(call):
    small = LAYER[:1, :, :2, :2]
    both(lambda backend: jacrev(jacrev(lambda layer: loss(call, backend, layer)))(small))
    both(lambda backend: torch.autograd.functional.hessian(lambda layer: loss(call, backend, layer), small))


@pytest.mark.parametrize("rectify", [False, True])
def test_what_is_rectified_has_gradients_where_it_is_positive(rectify):
    def run(backend):
        return grad(lambda layer: maps(layer, rectify=rectify, normalize=False, backend=backend).square().sum())(LAYER)

    both(run)
    assert bool((run("native")[LAYER < 0] == 0).all()) == rectify


def test_gradients_of_a_module_and_its_optimiser_step():
    weight = torch.nn.Parameter(MATRIX.clone())
    optimiser = torch.optim.SGD([weight], lr=0.1)
    maps(LAYER, weight, TARGET, normalize=False).square().mean().backward()
    optimiser.step()
    assert not torch.equal(weight.detach(), MATRIX)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_gradients_have_the_dtype_of_what_they_belong_to(dtype):
    layer, matrix = LAYER.to(dtype).requires_grad_(), MATRIX.bfloat16().requires_grad_()
    for call in (maps, tokens, halves):
        ours = torch.autograd.grad(loss(call, "native", layer, matrix), (layer, matrix))
        theirs = torch.autograd.grad(loss(call, "reference", layer, matrix), (layer, matrix))
        assert [one.dtype for one in ours] == [dtype, torch.bfloat16]
        assert_close(ours, theirs, rtol=2e-2, atol=2e-2)


def test_a_plan_gives_gradients_to_activations_alone():
    matrix = MATRIX.clone().requires_grad_()
    layer = LAYER.clone().requires_grad_()
    saliency_maps([layer], SaliencyPlan([matrix]), 0, size=4, **KEEP).square().sum().backward()
    assert layer.grad.abs().sum() > 0
    assert matrix.grad is None


@pytest.mark.parametrize("normalize", [True, False])
def test_what_is_checkpointed_has_the_same_gradients(normalize):
    def run(again):
        layer = LAYER.clone().requires_grad_()
        again(lambda layer: maps(layer, normalize=normalize).square().sum(), layer).backward()
        return layer.grad

    assert_close(run(partial(checkpoint, use_reentrant=False)), run(lambda function, layer: function(layer)))


# ----------------------------------------------------------------------------------------------------------------- vmap


@every_call
@pytest.mark.parametrize("dims", [(0, None), (None, 0), (0, 0), (-1, 1)], ids=str)
def test_vmap_is_a_loop(call, dims):
    many = [random(7, *LAYER.shape, seed=2), random(7, *MATRIX.shape, seed=3)]
    arguments = [
        one if dim is None else stack.movedim(0, dim)
        for stack, one, dim in zip(many, (LAYER, MATRIX), dims, strict=True)
    ]
    ours = vmap(call, dims)(*arguments)
    loop = [
        call(many[0][i] if dims[0] is not None else LAYER, many[1][i] if dims[1] is not None else MATRIX)
        for i in range(7)
    ]
    assert_close(ours, torch.stack(loop), rtol=1e-12, atol=1e-12)


def test_vmap_over_masks_and_over_itself():
    mask = torch.rand(5, 2, 20, generator=torch.Generator().manual_seed(0)) > 0.4
    ours = vmap(lambda mask: tokens(LAYER, mask=mask))(mask)
    assert_close(ours, torch.stack([tokens(LAYER, mask=one) for one in mask]), rtol=0, atol=1e-12)
    nested = random(2, 3, *LAYER.shape)
    ours = vmap(vmap(maps))(nested)
    assert_close(ours, torch.stack([torch.stack([maps(one) for one in row]) for row in nested]), rtol=0, atol=1e-12)


@every_call
def test_vmap_of_gradients(call):
    many = random(3, *LAYER.shape)
    both(lambda backend: vmap(grad(lambda layer: loss(call, backend, layer)))(many))


@every_call
def test_gradients_of_vmap(call):
    many = random(3, *LAYER.shape)
    both(lambda backend: grad(lambda many: vmap(lambda layer: loss(call, backend, layer))(many).sum())(many))


@every_call
def test_backward_through_vmap(call):
    def run(backend):
        many = random(3, *LAYER.shape).requires_grad_()
        return torch.autograd.grad(vmap(lambda layer: loss(call, backend, layer))(many).sum(), many)

    both(run)


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_gradients_per_sample_with_a_target_each(backend):
    def one(layer, target):
        return loss(maps, backend, layer.unsqueeze(0), MATRIX, target.unsqueeze(0))

    ours = vmap(grad(one))(LAYER, TARGET)
    loop = torch.stack([grad(one)(layer, target) for layer, target in zip(LAYER, TARGET, strict=True)])
    assert_close(ours, loop)


@fails(reason="vmap of an einsum in backward, as autograd's own vectorised mode does it", raises=RuntimeError)
def test_a_vectorised_jacobian():
    both(lambda backend: torch.autograd.functional.jacobian(partial(maps, backend=backend), LAYER, vectorize=True))


# --------------------------------------------------------------------------------------------------------- forward mode


@jit_warning
@every_call
def test_forward_derivatives_are_right_or_refused(call):
    tangent = random(*LAYER.shape, seed=5)

    def along(backend):
        return jvp(lambda layer: call(layer, backend=backend), (LAYER,), (tangent,))[1]

    try:
        ours = along("native")
    except (RuntimeError, NotImplementedError):
        return
    assert_close(ours, along("reference"))


@jit_warning
@fails(reason="no jvp", raises=NotImplementedError)
def test_the_hessian_of_torch_func():
    both(lambda backend: hessian(lambda layer: loss(maps, backend, layer))(LAYER[:1, :, :2, :2]))


# --------------------------------------------------------------------------------------------------- compile and export


class Explainer(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.matrix = torch.nn.Parameter(MATRIX.clone())

    def forward(self, layer):
        return maps(layer.relu(), self.matrix, 1)


@pytest.fixture
def compiled():
    torch._dynamo.reset()
    yield partial(torch.compile, fullgraph=True, backend="aot_eager")
    torch._dynamo.reset()


def test_what_runs_is_a_constant_of_a_graph_as_torch_marks_them():
    assert vars(torch.compiler.assume_constant_result(lambda: None)).items() <= vars(native._choice).items()


@every_call
@pytest.mark.parametrize("with_gradient", [False, True])
def test_each_call_compiles_as_one_graph(compiled, call, with_gradient):
    layer = LAYER.clone().requires_grad_(with_gradient)
    assert_close(compiled(call)(layer, MATRIX, TARGET), call(layer, MATRIX, TARGET))
    if with_gradient:
        ours = torch.autograd.grad(compiled(partial(loss, call, "native"))(layer), layer)
        assert_close(ours, torch.autograd.grad(loss(call, "native", layer), layer))


@pytest.mark.parametrize("with_gradient", [False, True])
def test_sizes_may_change_under_one_graph(compiled, with_gradient):
    run = compiled(lambda layer, size: maps(layer, size=size), dynamic=True)
    for batch, height, width, size in ((2, 4, 4, 5), (3, 5, 4, 7), (7, 6, 9, 33)):
        layer = random(batch, 3, height, width).requires_grad_(with_gradient)
        assert_close(run(layer, size), maps(layer, size=size))
        if with_gradient:
            ours, theirs = (torch.autograd.grad(f(layer, size=size).square().sum(), layer) for f in (run, maps))
            assert_close(ours, theirs)


def test_a_plan_compiles(compiled):
    plan = SaliencyPlan([MATRIX])

    def run(layer):
        return saliency_maps([layer], plan, 0, size=5, backend="native")

    assert_close(compiled(run)(LAYER), run(LAYER))


@pytest.mark.parametrize("with_gradient", [False, True])
@pytest.mark.parametrize("dynamic", [None, {"layer": {0: torch.export.Dim("batch")}}], ids=["static", "dynamic"])
def test_a_module_is_exported_with_the_operators_in_it(with_gradient, dynamic):
    module = Explainer().requires_grad_(with_gradient)
    program = torch.export.export(module, (LAYER,), dynamic_shapes=dynamic)
    assert any("mhex" in str(node.target) for node in program.graph.nodes)
    layer = LAYER if dynamic is None else random(5, 3, 4, 5)
    assert_close(program.module()(layer), module(layer))


def test_functional_calls_see_the_weights_given():
    module, other = Explainer(), random(4, 3, seed=9)
    assert_close(functional_call(module, {"matrix": other}, (LAYER,)), maps(LAYER.relu(), other, 1))


@pytest.mark.parametrize("with_gradient", [False, True])
def test_meta_tensors_have_the_shape_and_the_dtype(with_gradient):
    layer, matrix = LAYER.half().to("meta").requires_grad_(with_gradient), MATRIX.to("meta")
    for call in (maps, tokens, halves):
        for target in (1, "all", torch.zeros(2, 3, dtype=torch.int64, device="meta")):
            ours = call(layer, matrix, target)
            real_target = torch.zeros(2, 3, dtype=torch.int64) if isinstance(target, torch.Tensor) else target
            real = call(torch.zeros_like(layer, device="cpu"), torch.zeros(4, 3), real_target)
            assert (ours.shape, ours.dtype, ours.device.type) == (real.shape, real.dtype, "meta")
            assert ours.requires_grad == with_gradient


@pytest.mark.parametrize("target", ["all", 1])
def test_fake_tensors_have_the_shape(target):
    with torch._subclasses.fake_tensor.FakeTensorMode():
        ours = maps(torch.randn(2, 3, 4, 4), torch.randn(4, 3), target)
    assert ours.shape[-2:] == (5, 6)


@pytest.mark.parametrize("backend", ["auto", "native", "reference"])
def test_fake_targets_have_no_values_to_look_at(backend):
    with torch._subclasses.fake_tensor.FakeTensorMode():
        layer, matrix = torch.randn(2, 3, 4, 4), torch.randn(4, 3)
        for shape in ((2,), (2, 3), ()):
            target = torch.zeros(shape, dtype=torch.int64)
            for call in (maps, tokens, halves):
                assert call(layer, matrix, target, backend=backend).shape[0] == 2


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*torch.jit.trace.*:FutureWarning")
@jit_warning
@every_call
def test_a_trace_of_torch_jit_follows_the_reference(call):
    traced = torch.jit.trace(lambda layer, target: call(layer, MATRIX, target, backend="auto"), (LAYER, TARGET))
    other = random(2, 3, 4, 5, seed=7)
    assert_close(traced(other, TARGET.flip(0)), call(other, MATRIX, TARGET.flip(0), backend="reference"))
    with pytest.raises(RuntimeError, match=r"torch\.jit\.trace cannot follow"):
        torch.jit.trace(lambda layer: call(layer, MATRIX, 0, backend="native"), (LAYER,))


# -------------------------------------------------------------------------------------------- gradients that go forward


@jit_warning
@every_call
@pytest.mark.parametrize("of", ["layer", "matrix", "both"])
def test_a_tangent_goes_through_as_in_the_reference_or_is_refused(call, of):
    """Of dual tensors, which do not say that they require a gradient."""
    with forward_ad.dual_level():
        layer, matrix = LAYER, MATRIX
        if of != "matrix":
            layer = forward_ad.make_dual(LAYER, random(*LAYER.shape, seed=5))
        if of != "layer":
            matrix = forward_ad.make_dual(MATRIX, random(*MATRIX.shape, seed=6))
        ours, theirs = (
            forward_ad.unpack_dual(call(layer, matrix, backend=backend)).tangent for backend in ("auto", "reference")
        )
        assert theirs.any()
        assert_close(ours, theirs)
        with pytest.raises(RuntimeError, match="kernels know no gradients that go forward"):
            call(layer, matrix, backend="native")
    # Beyond the level there is nothing left of it.
    assert_close(call(LAYER, MATRIX, backend="native"), call(LAYER, MATRIX, backend="reference"))


@jit_warning
@every_call
def test_a_tangent_is_the_slope_along_it(call):
    direction, step = random(*LAYER.shape, seed=5), 1e-6
    slope = (call(LAYER + step * direction) - call(LAYER - step * direction)) / (2 * step)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(LAYER, direction)
        tangent = forward_ad.unpack_dual(call(dual, backend="auto")).tangent
    assert_close(tangent, slope, rtol=1e-4, atol=1e-4)


@every_call
def test_a_tangent_of_the_matrix_alone_goes_through_torch_func(call):
    ours, theirs = (
        jvp(lambda matrix: call(LAYER, matrix, backend=backend), (MATRIX,), (random(*MATRIX.shape, seed=6),))[1]  # noqa: B023
        for backend in ("auto", "reference")
    )
    assert_close(ours, theirs)


# ------------------------------------------------------------------------------------------------------- modes, threads


@every_call
def test_modes_without_gradients(call):
    expected = call(LAYER)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            ours = call(LAYER.clone().requires_grad_(), MATRIX.clone().requires_grad_())
        assert not ours.requires_grad
        assert torch.equal(ours, expected)


@every_call
def test_autocast_leaves_both_ways_alone(call):
    def run(enabled):
        layer = LAYER.float().requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            value = loss(call, "native", layer, MATRIX.float())
        return value.detach(), *torch.autograd.grad(value, layer)

    assert_close(run(True), run(False), rtol=0, atol=0)


def test_threads_may_take_gradients_at_once():
    expected = grad(partial(loss, maps, "native"))(LAYER)
    results = []

    def work():
        results.extend(grad(partial(loss, maps, "native"))(LAYER) for _ in range(10))

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 60
    assert all(torch.equal(result, expected) for result in results)
