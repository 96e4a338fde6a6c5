"""How the kernels run: threads, instruction sets, transforms of torch, plans, and what happens when loading fails."""

import copy
import json
import os
import pickle
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch.func import grad, jacrev, vmap
from torch.testing import assert_close

import mhex_core
from mhex_core import SaliencyPlan, native, saliency_maps, signed_maps, token_saliency
from mhex_core.plan import prepare

OPTIONS = {"size": (12, 9), "beta": 0.5}


@pytest.fixture
def printed(python):
    """What code prints in a process of its own."""

    def run(code, **environment):
        done = python.run("-c", code, environment={**os.environ, **environment})
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    return run


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


# ---------------------------------------------------------------------------------------------------------- determinism


@pytest.mark.parametrize("batch", [1, 2, 3, 33])
@pytest.mark.parametrize("channels_last", [False, True])
def test_the_bits_do_not_depend_on_threads_or_company(make, threads, batch, channels_last):
    activations, matrices = make([(64, 40, 41), (33, 9, 9)], batch=batch, channels_last=channels_last)
    results = []
    for count in (1, 2, 5):
        threads(count)
        results += [saliency_maps(activations, matrices, "all", **OPTIONS, backend="native") for _ in range(2)]
    alone = torch.cat(
        [
            saliency_maps([layer[i : i + 1] for layer in activations], matrices, "all", **OPTIONS, backend="native")
            for i in range(batch)
        ]
    )
    assert all(torch.equal(result, alone) for result in results)


def test_several_threads_may_call_at_once(make):
    activations, matrices = make(batch=9)
    plan = SaliencyPlan(matrices)
    expected = saliency_maps(activations, plan, "all", **OPTIONS, backend="native")
    with ThreadPoolExecutor(4) as pool:
        calls = [pool.submit(saliency_maps, activations, plan, "all", **OPTIONS, backend="native") for _ in range(40)]
        assert all(torch.equal(call.result(), expected) for call in calls)


@pytest.mark.parametrize("wish", ["baseline", "avx2", "avx512"])
def test_every_instruction_set_agrees_with_the_reference(python, wish):
    script = Path(__file__).with_name("parity.py")
    done = python.run(script, environment={**os.environ, "MHEX_CPU": wish})
    assert done.returncode == 0, done.stdout + done.stderr
    if wish == "baseline":
        assert "'instruction_set': 'baseline'" in done.stdout


# ----------------------------------------------------------------------------------------------------------- transforms


@pytest.fixture(scope="module")
def small():
    """Activations, matrices (float64) and two targets per sample."""
    generator = torch.Generator().manual_seed(0)
    activations = [torch.randn(2, *shape, dtype=torch.float64, generator=generator) for shape in ((3, 4, 5), (4, 2, 3))]
    matrices = [torch.randn(3, channels, dtype=torch.float64, generator=generator) for channels in (3, 4)]
    return activations, matrices, torch.tensor([[0, 2], [1, 1]])


def leaves(tensors):
    return [tensor.clone().requires_grad_() for tensor in tensors]


@pytest.mark.parametrize("target", ["several", "all"])
@pytest.mark.parametrize(
    "options",
    [{}, {"beta": 0.5, "normalize": False}, {"beta": 0.3, "sharpness": "soft"}, {"beta": 1.0, "tau_pos": 0.0}],
    ids=str,
)
def test_gradients_are_those_of_the_reference(small, target, options):
    activations, matrices, targets = small
    wanted = targets if target == "several" else "all"

    def run(*tensors, backend="native"):
        return saliency_maps(tensors[:2], tensors[2:], wanted, size=(6, 7), backend=backend, **options)

    inputs = leaves((*activations, *matrices))
    assert torch.autograd.gradcheck(run, inputs)
    weight = torch.randn(run(*inputs).shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    ours = torch.autograd.grad((run(*inputs) * weight).sum(), inputs)
    theirs = torch.autograd.grad((run(*inputs, backend="reference") * weight).sum(), inputs)
    assert_close(ours, theirs, rtol=1e-10, atol=1e-12)
    if not options.get("normalize", True):
        assert torch.autograd.gradgradcheck(run, inputs)


@pytest.mark.parametrize("masked", [False, True])
def test_gradients_of_token_scores(masked):
    generator = torch.Generator().manual_seed(0)
    tokens, matrix = leaves(
        [torch.randn(2, 6, 3, dtype=torch.float64, generator=generator), torch.randn(4, 3, dtype=torch.float64)]
    )
    mask = torch.rand(2, 6, generator=generator) > 0.3 if masked else None

    def run(tokens, matrix):
        return token_saliency([tokens], [matrix], "all", mask=mask, beta=0.5, backend="native")

    assert torch.autograd.gradcheck(run, (tokens, matrix))
    assert_close(run(tokens.detach(), matrix.detach()), run(tokens, matrix).detach(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("mapped", ["activations", "everything"])
def test_vmap_and_its_gradients(small, mapped):
    activations, matrices, targets = small
    tensors = [*activations, *matrices]
    stacked = [torch.stack([tensor, 2 * tensor, tensor.flip(0)]) for tensor in tensors]
    dims = (0, 0, None, None) if mapped == "activations" else (0, 0, 0, 0)
    arguments = [many if dim == 0 else one for many, one, dim in zip(stacked, tensors, dims, strict=True)]

    def run(*tensors, backend):
        return saliency_maps(tensors[:2], tensors[2:], targets, **OPTIONS, backend=backend)

    def loss(*tensors, backend):
        return run(*tensors, backend=backend).square().sum()

    for function in (run, lambda *tensors, backend: grad(loss, argnums=(0, 1, 2, 3))(*tensors, backend=backend)):
        ours = vmap(lambda *tensors, f=function: f(*tensors, backend="native"), dims)(*arguments)
        theirs = vmap(lambda *tensors, f=function: f(*tensors, backend="reference"), dims)(*arguments)
        assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


def test_vmap_over_targets_and_jacobians(small):
    activations, matrices, _ = small
    many = torch.tensor([[0, 1], [2, 2], [1, 0]])
    ours = vmap(lambda target: saliency_maps(activations, matrices, target, **OPTIONS, backend="native"))(many)
    one_by_one = [saliency_maps(activations, matrices, target, **OPTIONS, backend="native") for target in many]
    assert_close(ours, torch.stack(one_by_one), rtol=0, atol=1e-12)

    def run(layer, backend):
        return saliency_maps([layer], matrices[:1], 1, size=4, normalize=False, backend=backend)

    assert_close(
        jacrev(lambda layer: run(layer, "native"))(activations[0]),
        jacrev(lambda layer: run(layer, "reference"))(activations[0]),
        rtol=1e-9,
        atol=1e-12,
    )


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("with_gradient", [False, True])
def test_it_compiles_as_one_graph(small, dynamic, with_gradient):
    torch._dynamo.reset()
    activations, matrices, targets = small
    tensors = [tensor.float().requires_grad_(with_gradient) for tensor in (*activations, *matrices)]

    def run(*tensors):
        return saliency_maps(tensors[:2], tensors[2:], targets, size=(6, 7), backend="native")

    compiled = torch.compile(run, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    assert_close(compiled(*tensors), run(*tensors))
    if with_gradient:
        ours = torch.autograd.grad(compiled(*tensors).square().sum(), tensors)
        assert_close(ours, torch.autograd.grad(run(*tensors).square().sum(), tensors))


@pytest.mark.parametrize("targets", [torch.tensor([[0, 2], [1, 1]]), None], ids=["several", "all"])
@pytest.mark.parametrize("rectify", [False, True])
def test_torch_finds_nothing_wrong_with_the_operators(small, targets, rectify):
    activations, matrices, _ = small
    wide, sums = prepare(matrices)
    rule = (0.3, 0.1, False, 1.0)
    layers = (list(activations), list(wide), list(sums), targets)
    tokens = ([layer.flatten(2).transpose(1, 2)[:, :5] for layer in activations], list(wide), list(sums), targets)
    maps = torch.ops.mhex.signed_maps(*layers, *rule, rectify)
    for operator, arguments in (
        (torch.ops.mhex.saliency_maps.default, (*layers, *rule, rectify, 0.5, [0.9, 1.0], 6, 7, True)),
        (torch.ops.mhex.signed_maps.default, (*layers, *rule, rectify)),
        (torch.ops.mhex.combine_maps.default, (maps[:2], maps[2:], 0.5, [0.9, 1.0], 6, 7, True)),
        (torch.ops.mhex.token_saliency.default, (*tokens, None, *rule, 0.5, [0.9, 1.0])),
    ):
        torch.library.opcheck(operator, arguments)


def test_autocast_changes_nothing(make):
    activations, matrices = make()
    expected = saliency_maps(activations, matrices, 0, size=5, backend="native")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(saliency_maps(activations, matrices, 0, size=5, backend="native"), expected)


# ---------------------------------------------------------------------------------------------------------------- plans


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_a_plan_stands_for_its_matrices(make, backend, dtype):
    activations, matrices = make(dtype=dtype)
    plan = SaliencyPlan([matrix.requires_grad_() for matrix in matrices])
    assert len(plan) == len(matrices)
    assert [matrix.shape for matrix in plan] == [matrix.shape for matrix in matrices]
    assert not any(matrix.requires_grad for matrix in plan)
    with torch.no_grad():
        expected = saliency_maps(activations, matrices, "all", **OPTIONS, backend=backend)
    assert torch.equal(saliency_maps(activations, plan, "all", **OPTIONS, backend=backend), expected)
    for one in (copy.deepcopy(plan), pickle.loads(pickle.dumps(plan))):
        assert torch.equal(saliency_maps(activations, one, "all", **OPTIONS, backend=backend), expected)
    with torch.no_grad():
        maps = signed_maps(activations, matrices, "all", backend=backend)
    assert all(map(torch.equal, maps.positive, signed_maps(activations, plan, "all", backend=backend).positive))


@pytest.mark.parametrize("layers", [1, 2, [3, 1], "all"])
def test_a_plan_follows_the_choice_of_layers(make, layers):
    activations, matrices = make([(3, 6, 1), (4, 6, 1), (5, 6, 1), (6, 6, 1)])
    tokens = [layer.squeeze(-1).transpose(1, 2) for layer in activations]
    expected = token_saliency(tokens, matrices, 1, layers=layers, backend="native")
    assert torch.equal(token_saliency(tokens, SaliencyPlan(matrices), 1, layers=layers, backend="native"), expected)


def test_a_plan_of_the_wrong_model_is_refused(make):
    activations, matrices = make()
    with pytest.raises(ValueError, match=r"matrices\[0\]"):
        saliency_maps(activations, SaliencyPlan(matrices[::-1]), 0, size=4, backend="native")
    with pytest.raises(ValueError, match=r"matrices\[1\]"):
        SaliencyPlan([torch.ones(2, 3), torch.ones(3, 3)])
    with pytest.raises(TypeError, match="matrices"):
        SaliencyPlan([torch.ones(2, 3, dtype=torch.int64)])


# ------------------------------------------------------------------------------------------------------ what cannot run


def test_what_kernels_cannot_take_goes_to_the_reference(make):
    activations, matrices = make()
    mixed = [activations[0].double(), *activations[1:]]
    assert saliency_maps(mixed, matrices, 0, size=4).isfinite().all()
    with pytest.raises(RuntimeError, match="float64"):
        saliency_maps(mixed, matrices, 0, size=4, backend="native")
    many = [activations[0]] * (native.MAX_LAYERS + 1)
    assert saliency_maps(many, [matrices[0]] * len(many), 0, size=4).isfinite().all()
    with pytest.raises(RuntimeError, match="layers"):
        saliency_maps(many, [matrices[0]] * len(many), 0, size=4, backend="native")


STATUS = "import json, mhex_core; s = mhex_core.native.status(); print(json.dumps([s.backend, s.reason]))"


@pytest.mark.parametrize(("wish", "backend"), [("0", "reference"), ("1", "native"), ("auto", "native")])
def test_the_environment_chooses(printed, wish, backend):
    assert json.loads(printed(STATUS, MHEX_NATIVE=wish))[0] == backend


def test_a_damaged_library_leaves_the_reference_and_says_so(printed, tmp_path):
    package = Path(mhex_core.__file__).parent
    shutil.copytree(package, tmp_path / "mhex_core", ignore=shutil.ignore_patterns("__pycache__"))
    (library,) = (tmp_path / "mhex_core").glob("_C*.so")
    library.write_bytes(b"no library")
    backend, reason = json.loads(printed(STATUS, PYTHONPATH=str(tmp_path), MHEX_NATIVE="auto"))
    assert backend == "reference"
    assert "could not be loaded" in reason
    insisting = "import mhex_core\ntry:\n    mhex_core.native.status()\nexcept RuntimeError as error:\n    print(error)"
    assert "MHEX_NATIVE=1" in printed(insisting, PYTHONPATH=str(tmp_path), MHEX_NATIVE="1")
