"""What a user gets by importing the package, and that using it leaves nothing behind."""

import gc
import inspect
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import requires, version
from importlib.resources import files

import pytest
import torch
from torch.testing import assert_close

import mhex_core
from mhex_core import saliency_maps, token_saliency

NOT_IMPORTED = [
    "torchvision",
    "transformers",
    "timm",
    "matplotlib",
    "PIL",
    "scipy",
    "medmnist",
    "mhex_vision",
    "mhex_text",
    "torch._dynamo",
]


def test_importing_it_imports_torch_and_no_other_heavy_package(python):
    script = (
        "import sys, mhex_core\n"
        f"found = [name for name in {NOT_IMPORTED!r} if name in sys.modules]\n"
        "assert not found, found\n"
        "assert 'torch' in sys.modules\n"
    )
    done = python.run("-c", script)
    assert done.returncode == 0, done.stderr


def test_importing_it_starts_no_cuda_and_draws_no_random_numbers(python):
    script = (
        "import torch\n"
        "torch.manual_seed(0); state = torch.get_rng_state()\n"
        "import mhex_core\n"
        "assert torch.equal(state, torch.get_rng_state())\n"
        "assert not torch.cuda.is_initialized()\n"
    )
    done = python.run("-c", script)
    assert done.returncode == 0, done.stderr


def test_it_depends_on_torch_and_numpy_only():
    assert sorted(line.partition(">")[0] for line in requires("mhex-core")) == ["numpy", "torch"]
    assert mhex_core.__version__ == version("mhex-core")
    assert files("mhex_core").joinpath("py.typed").is_file()


@pytest.mark.parametrize("name", mhex_core.__all__)
def test_every_public_name_exists_and_is_documented(name):
    value = getattr(mhex_core, name)
    assert inspect.getdoc(value)
    # A dataclass without a docstring is given its signature for one.
    assert not inspect.getdoc(value).startswith(f"{name}(")
    if inspect.isclass(value):
        for member, method in vars(value).items():
            if callable(method) and not member.startswith("_"):
                assert inspect.getdoc(method), f"{name}.{member}"


def test_the_public_names_are_sorted_and_unique():
    assert sorted(set(mhex_core.__all__)) == list(mhex_core.__all__)


def test_threads_do_not_disturb_each_other(make_layers):
    jobs = [(make_layers(seed=seed), "all" if seed % 2 else seed % 4, (8 + seed, 9), seed / 10) for seed in range(8)]

    def run(job):
        layers, target, size, beta = job
        return saliency_maps(*layers, target, size=size, beta=beta)

    expected = [run(job) for job in jobs]
    with ThreadPoolExecutor(2) as pool:
        for _ in range(5):
            for ours, theirs in zip(pool.map(run, jobs), expected, strict=True):
                assert_close(ours, theirs, rtol=0, atol=0)


def live_tensors():
    gc.collect()
    return sum(isinstance(found, torch.Tensor) for found in gc.get_objects())


@pytest.mark.filterwarnings("ignore")  # gc.get_objects touches other libraries' deprecated attributes
@pytest.mark.parametrize("graph", [False, True])
def test_thousands_of_calls_leave_no_tensor_alive(make_layers, graph):
    maps = make_layers([(3, 3)])
    tokens = make_layers([(4,)])
    if graph:
        for value in (*maps[0], *maps[1]):
            value.requires_grad_()
    before = live_tensors()
    for _ in range(2_000):
        saliency_maps(*maps, 1, size=4)
        token_saliency(*tokens, 1)
    assert live_tensors() <= before
