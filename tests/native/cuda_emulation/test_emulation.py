"""The CUDA kernels' own source, run on the processor thread by thread, against the equations in float64.

This says that the arithmetic, the indices, and who waits for whom are right; how fast it is, and that a GPU agrees, it
cannot say. Letters: B batch, n targets, K classes, C channels, T tokens.
"""

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from mhex_core import SaliencyOptions, reference

HERE = Path(__file__).parent
MAX_LAYERS = 128
SMALL = 4  # multiprocessors: many blocks wait for few
DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]  # in the order of DType in csrc/params.h

# How the blocks of one map meet, by what the machine has.
MACHINES = {
    "clusters": {"multiprocessors": SMALL, "major": 9, "cooperative": 1},
    "cooperative": {"multiprocessors": 32, "major": 8, "cooperative": 1},
    "last": {"multiprocessors": SMALL, "major": 8, "cooperative": 0},
}
LAUNCHES = ("alone", "clusters", "cooperative")  # as emulation.cpp counts them
every_machine = pytest.mark.parametrize("machine", MACHINES.values(), ids=MACHINES.keys())
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=["f32", "f16", "bf16", "f64"])
every_layout = pytest.mark.parametrize("channels_last", [True, False], ids=["channels_last", "contiguous"])


class Layer(ctypes.Structure):
    _fields_ = [
        ("activation", ctypes.c_void_p),
        ("stride_b", ctypes.c_int64),
        ("stride_c", ctypes.c_int64),
        ("stride_p", ctypes.c_int64),
        ("matrix", ctypes.c_void_p),
        ("sums", ctypes.c_void_p),
        ("weight", ctypes.c_double),
        ("channels", ctypes.c_int32),
        ("height", ctypes.c_int32),
        ("width", ctypes.c_int32),
        ("dtype", ctypes.c_int32),
    ]


class Problem(ctypes.Structure):
    _fields_ = [
        ("batch", ctypes.c_int64),
        ("targets", ctypes.c_int64),
        ("classes", ctypes.c_int64),
        ("target", ctypes.c_void_p),
        ("tau_pos", ctypes.c_double),
        ("tau_neg", ctypes.c_double),
        ("exponent", ctypes.c_double),
        ("soft", ctypes.c_bool),
        ("beta", ctypes.c_double),
        ("layers", ctypes.c_int32),
        ("float64", ctypes.c_bool),
        ("rectify", ctypes.c_bool),
        ("layer", Layer * MAX_LAYERS),
    ]


class SignedMaps(ctypes.Structure):
    _fields_ = [("positive", ctypes.c_void_p * MAX_LAYERS), ("negative", ctypes.c_void_p * MAX_LAYERS)]


class Output(ctypes.Structure):
    _fields_ = [
        ("saliency", ctypes.c_void_p),
        ("height", ctypes.c_int32),
        ("width", ctypes.c_int32),
        ("normalize", ctypes.c_bool),
    ]


class Case:
    """Layers, matrices and targets, as tensors for the oracle and as pointers for the kernel."""

    def __init__(self, activations, matrices, targets=None, layer_weights=None, **settings):
        self.activations, self.targets = activations, targets
        self.wide = torch.float64 if activations[0].dtype == torch.float64 else torch.float32
        self.matrices = [matrix.to(self.wide).contiguous() for matrix in matrices]
        self.options = SaliencyOptions(layer_weights=layer_weights, **settings)
        self.weights = self.options.weights_of(len(activations))
        self.batch, self.classes = len(activations[0]), len(matrices[0])
        self.n = self.classes if targets is None else targets.shape[1]

    @property
    def tokens(self):
        return self.activations[0].ndim == 3

    def problem(self):
        options = self.options
        # Kept alive by the case: a problem holds pointers only.
        self.sums = [torch.stack([m.clamp(min=0).sum(0), (-m).clamp(min=0).sum(0)]) for m in self.matrices]
        problem = Problem(
            batch=self.batch,
            targets=self.n,
            classes=self.classes,
            target=None if self.targets is None else self.targets.data_ptr(),
            tau_pos=options.positive_threshold(num_classes=self.classes),
            tau_neg=options.tau_neg,
            exponent=options.exponent,
            soft=options.sharpness == "soft",
            beta=options.beta,
            layers=len(self.activations),
            float64=self.wide == torch.float64,
            rectify=options.rectify,
        )
        for index, (activation, matrix, sums) in enumerate(
            zip(self.activations, self.matrices, self.sums, strict=True)
        ):
            channel, position = (2, 1) if self.tokens else (1, 3 if activation.shape[3] > 1 else 2)
            problem.layer[index] = Layer(
                activation=activation.data_ptr(),
                stride_b=activation.stride(0),
                stride_c=activation.stride(channel),
                stride_p=activation.stride(position),
                matrix=matrix.data_ptr(),
                sums=sums.data_ptr(),
                weight=self.weights[index],
                channels=activation.shape[channel],
                height=1 if self.tokens else activation.shape[2],
                width=activation.shape[1 if self.tokens else 3],
                dtype=DTYPES.index(activation.dtype),
            )
        return problem

    def signed(self):
        """The oracle's layers' maps."""
        return reference.signed_maps(
            [activation.double() for activation in self.activations],
            [matrix.double() for matrix in self.matrices],
            self.targets,
            self.options,
        )

    def expected(self, size):
        return reference.saliency(*self.signed(), self.options, self.weights, size)


class Kernels:
    """The emulated kernels behind tensors."""

    def __init__(self, library):
        self.library = ctypes.CDLL(str(library))
        self.library.emulation_problem_bytes.restype = ctypes.c_size_t
        assert self.library.emulation_problem_bytes() == ctypes.sizeof(Problem)
        self.on()

    def on(self, multiprocessors=SMALL, major=9, cooperative=1, shared_limit=200 * 1024, seed=0):
        self.library.emulation_set(multiprocessors, major, cooperative, shared_limit, seed)

    def launches(self):
        return {kind: self.library.emulation_launches(index) for index, kind in enumerate(LAUNCHES)}

    def call(self, name, *arguments):
        function = getattr(self.library, name)
        function.restype = ctypes.c_char_p
        failure = function(*arguments)
        assert failure is None, failure

    def saliency(self, case, size):
        maps = torch.full((case.batch, case.n, *size), torch.nan, dtype=case.wide)
        output = Output(maps.data_ptr(), *size, case.options.normalize)
        self.call("emulated_saliency_maps", ctypes.byref(case.problem()), ctypes.byref(output))
        return maps

    def signed(self, case):
        maps, results = SignedMaps(), []
        for side in (maps.positive, maps.negative):
            results.append([])
            for index, activation in enumerate(case.activations):
                result = torch.full((case.batch, case.n, *activation.shape[2:]), torch.nan, dtype=case.wide)
                results[-1].append(result)
                side[index] = result.data_ptr()
        self.call("emulated_signed_maps", ctypes.byref(case.problem()), ctypes.byref(maps))
        return results

    def combine(self, case, positive, negative, size):
        maps = SignedMaps()
        for index, (plus, minus) in enumerate(zip(positive, negative, strict=True)):
            maps.positive[index], maps.negative[index] = plus.data_ptr(), minus.data_ptr()
        result = torch.full((case.batch, case.n, *size), torch.nan, dtype=case.wide)
        output = Output(result.data_ptr(), *size, case.options.normalize)
        arguments = map(ctypes.byref, (case.problem(), maps, output))
        self.call("emulated_combine_maps", *arguments)
        return result

    def tokens(self, case, mask=None):
        scores = torch.full((case.batch, case.n, case.activations[0].shape[1]), torch.nan, dtype=case.wide)
        pointers = [None if tensor is None else ctypes.c_void_p(tensor.data_ptr()) for tensor in (mask, scores)]
        self.call("emulated_token_saliency", ctypes.byref(case.problem()), *pointers)
        return scores


@pytest.fixture(scope="session")
def library(tmp_path_factory):
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("the kernels' source is compiled for the processor with g++, and there is none")
    target = tmp_path_factory.mktemp("cuda") / "emulation.so"
    flags = ["-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-U_FORTIFY_SOURCE"]
    subprocess.run(
        [compiler, *flags, "-fPIC", "-shared", f"-I{HERE / 'shim'}", str(HERE / "emulation.cpp"), "-o", str(target)],
        check=True,
    )
    return target


@pytest.fixture
def kernels(library):
    return Kernels(library)


def random_case(
    sizes=((7, 7), (5, 3), (5, 3), (1, 1)),
    *,
    batch=2,
    classes=4,
    channels=(24, 8, 13, 40),
    dtype=torch.float32,
    channels_last=True,
    targets=1,
    seed=0,
    **settings,
):
    generator = torch.Generator().manual_seed(seed)
    activations, matrices = [], []
    for size, width in zip(sizes, channels, strict=True):
        tokens = isinstance(size, int)
        shape = (batch, size, width) if tokens else (batch, width, *size)
        activation = torch.randn(shape, generator=generator).to(dtype)
        if channels_last and not tokens:
            activation = activation.to(memory_format=torch.channels_last)
        if not channels_last and tokens:
            activation = activation.transpose(1, 2).contiguous().transpose(1, 2)
        activations.append(activation)
        matrices.append(torch.randn(classes, width, generator=generator))
    chosen = None if targets is None else torch.randint(0, classes, (batch, targets), generator=generator)
    return Case(activations, matrices, chosen, **settings)


def assert_equal(result, expected, tolerance=1e-5):
    """Within a share of the largest value there is."""
    assert result.shape == expected.shape
    largest = max(expected.abs().max().item(), 1e-30)
    assert (result.double() - expected).abs().max().item() <= tolerance * largest


@every_machine
@every_layout
@every_dtype
def test_maps_equal_the_oracle_in_every_dtype_and_layout(kernels, dtype, channels_last, machine):
    case = random_case(dtype=dtype, channels_last=channels_last, beta=0.5)
    kernels.on(**machine)
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    assert_equal(kernels.saliency(case, (30, 44)), case.expected((30, 44)), tolerance)


@every_layout
@every_dtype
def test_rectified_maps_equal_the_oracle(kernels, dtype, channels_last):
    case = random_case(dtype=dtype, channels_last=channels_last, beta=0.5, normalize=False, rectify=True)
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    assert_equal(kernels.saliency(case, (30, 44)), case.expected((30, 44)), tolerance)
    case.activations[0][0, 0] = torch.nan
    assert kernels.saliency(case, (5, 4)).isnan().flatten(1).any(dim=1).tolist() == [True, False]


@every_layout
@pytest.mark.parametrize("targets", [1, 3, 9, None], ids=["n=1", "n=3", "n=9", "all"])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"beta": 0.5, "normalize": False},
        {"beta": 0.5, "sharpness": "soft", "exponent": 0.5},
        {"sharpness": "soft", "exponent": 2.0, "normalize": False},
        {"beta": 1.0, "layer_weights": [0.5, 0.0, -2.0, 1.0], "tau_neg": 0.3},
        {"beta": 0.5, "rectify": True},
    ],
    ids=str,
)
def test_maps_equal_the_oracle_for_any_targets_and_settings(kernels, targets, settings, channels_last):
    case = random_case(dtype=torch.bfloat16, channels_last=channels_last, targets=targets, classes=5, **settings)
    assert_equal(kernels.saliency(case, (19, 23)), case.expected((19, 23)))


@every_layout
@pytest.mark.parametrize("batch", [1, 5])
@pytest.mark.parametrize("classes", [1, 2, 1000])
def test_one_class_and_a_thousand_equal_the_oracle(kernels, classes, batch, channels_last):
    targets = None if classes < 10 else 2
    settings = {"tau_pos": 0.002} if classes == 1000 else {}
    case = random_case(batch=batch, classes=classes, targets=targets, channels_last=channels_last, beta=0.5, **settings)
    assert_equal(kernels.saliency(case, (16, 16)), case.expected((16, 16)))


def test_all_of_a_thousand_classes_equal_the_oracle(kernels):
    case = random_case([(3, 3)], batch=1, classes=1000, channels=[8], targets=None, tau_pos=0.001)
    assert_equal(kernels.saliency(case, (3, 2)), case.expected((3, 2)))


@pytest.mark.parametrize("size", [(1, 1), (2, 9), (5, 3), (33, 17), (64, 64)], ids=str)
@every_machine
def test_any_layer_size_reaches_any_output_size(kernels, size, machine):
    case = random_case([(8, 8), (1, 7), (16, 1), (13, 30)], normalize=False, beta=0.5)
    kernels.on(**machine)
    assert_equal(kernels.saliency(case, size), case.expected(size))


@every_layout
@every_dtype
@pytest.mark.parametrize("size", [(28, 28), (29, 31)], ids=str)
def test_wide_and_large_layers_equal_the_oracle(kernels, size, dtype, channels_last):
    case = random_case([size, (4, 4)], batch=1, channels=[64, 2056], dtype=dtype, channels_last=channels_last, beta=0.5)
    kernels.on(multiprocessors=2)
    assert_equal(kernels.saliency(case, (60, 60)), case.expected((60, 60)))


@every_layout
def test_channels_beyond_what_shared_memory_holds_are_taken_in_turns(kernels, channels_last):
    case = random_case(
        [(3, 3)], channels=[1600], targets=8, classes=9, channels_last=channels_last, dtype=torch.float16, tau_pos=0.05
    )
    assert_equal(kernels.saliency(case, (8, 8)), case.expected((8, 8)))


@every_machine
def test_maps_too_large_for_shared_memory_are_drawn_from_memory(kernels, machine):
    case = random_case(beta=0.5)
    kernels.on(**machine, shared_limit=21 * 1024)
    assert_equal(kernels.saliency(case, (300, 40)), case.expected((300, 40)))


@pytest.mark.parametrize(
    "strided",
    [
        lambda x: x[:, 1:],
        lambda x: x[1:],
        lambda x: x[:, :, :2],
        lambda x: x[:, ::2].to(memory_format=torch.channels_last)[:, 1:],
        lambda x: x[:, :, :1],
        lambda x: x[:, :1],
    ],
    ids=["channels", "samples", "rows", "channels of channels_last", "one row", "one channel"],
)
def test_slices_are_read_where_they_lie(kernels, strided):
    generator = torch.Generator().manual_seed(0)
    activation = strided(torch.randn(3, 17, 4, 6, generator=generator).half())
    case = Case([activation], [torch.randn(3, activation.shape[1], generator=generator)], None, beta=0.5)
    assert_equal(kernels.saliency(case, (9, 9)), case.expected((9, 9)))


@every_machine
@pytest.mark.parametrize("size", [(7, 9), (100, 90)], ids=str)
def test_constant_maps_become_zeros(kernels, size, machine):
    activations = [torch.full((2, 8, 5, 5), 0.1), torch.full((2, 8, 3, 4), 7.3)]
    case = Case(activations, [torch.randn(3, 8, generator=torch.Generator().manual_seed(0))] * 2, None, beta=0.3)
    kernels.on(**machine)
    assert kernels.saliency(case, size).eq(0).all()


@every_machine
def test_a_row_that_no_pixel_looks_at_counts_for_what_is_constant(kernels, machine):
    activation = torch.rand(9, 64, 64, 8, generator=torch.Generator().manual_seed(0))
    case = Case([activation], [torch.ones(1, 64)], None)
    kernels.on(**machine)
    assert kernels.saliency(case, (3, 40)).amax() == 1
    activation[:, :, 0] = 1e9
    assert kernels.saliency(case, (3, 40)).eq(0).all()


def test_values_of_any_size_are_brought_to_zero_and_one(kernels):
    for scale in (1e-42, 1e-30, 1.0, 1e30):
        activation = torch.rand(1, 8, 6, 6, generator=torch.Generator().manual_seed(0)) * scale
        maps = kernels.saliency(Case([activation], [torch.ones(1, 8)], None), (12, 12))
        assert (maps.min(), maps.max()) == (0, 1)


@every_machine
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_finite_spoils_its_own_map_alone(kernels, value, machine):
    case = random_case(targets=None, tau_pos=0.0)
    case.activations[1][1, 3, 2, 1] = value
    case.matrices[1][:, 3] = 1.0
    kernels.on(**machine)
    maps = kernels.saliency(case, (20, 20))
    assert maps[1].isnan().all()
    assert maps[0].isfinite().all()


@every_layout
@every_machine
@pytest.mark.parametrize("normalize", [True, False])
def test_a_target_that_is_no_class_gives_nan_and_leaves_the_others_alone(kernels, normalize, machine, channels_last):
    targets = torch.tensor([[0, 4, 2], [-1, 1, 3], [1 << 40, 0, 0]])
    case = random_case(batch=3, channels_last=channels_last, normalize=normalize, beta=0.5)
    case.targets, case.n = targets, 3
    kernels.on(**machine)
    maps = kernels.saliency(case, (11, 8))
    wrong = torch.tensor([[False, True, False], [True, False, False], [True, False, False]])
    assert maps[wrong].isnan().all()
    case.targets = targets.where(~wrong, 0)
    assert_equal(maps[~wrong], case.expected((11, 8))[~wrong])


@every_layout
@every_dtype
@pytest.mark.parametrize("targets", [1, None], ids=["n=1", "all"])
def test_layers_maps_equal_the_oracle(kernels, targets, dtype, channels_last):
    case = random_case(dtype=dtype, channels_last=channels_last, targets=targets)
    for results, expected in zip(kernels.signed(case), case.signed(), strict=True):
        for result, wanted in zip(results, expected, strict=True):
            assert_equal(result, wanted)


@every_machine
@pytest.mark.parametrize("targets", [1, None], ids=["n=1", "all"])
@pytest.mark.parametrize("settings", [{}, {"beta": 0.5}, {"beta": 0.5, "normalize": False}], ids=str)
def test_combining_layers_maps_gives_the_saliency(kernels, settings, targets, machine):
    case = random_case(targets=targets, **settings)
    kernels.on(**machine)
    positive, negative = kernels.signed(case)
    assert_equal(kernels.combine(case, positive, negative, (41, 50)), case.expected((41, 50)))


@every_layout
@every_dtype
@pytest.mark.parametrize("beta", [0.0, 0.5])
@pytest.mark.parametrize("targets", [1, 3, None], ids=["n=1", "n=3", "all"])
def test_token_scores_equal_the_oracle(kernels, targets, beta, dtype, channels_last):
    case = random_case(
        [41] * 2, channels=[32, 13], dtype=dtype, channels_last=channels_last, targets=targets, beta=beta
    )
    mask = torch.rand(2, 41, generator=torch.Generator().manual_seed(0)) > 0.4
    mask[0, :20] = mask[1, 17:] = False
    expected = reference.aggregate(*case.signed(), beta=beta, layer_weights=case.weights, size=None)
    assert_equal(kernels.tokens(case), expected)
    assert_equal(kernels.tokens(case, mask), expected * mask[:, None])


def test_masked_tokens_score_zero_whatever_they_hold(kernels):
    case = random_case([40], channels=[16])
    mask = torch.ones(2, 40, dtype=torch.bool)
    mask[0, 11] = mask[1, :] = False
    case.activations[0][~mask] = torch.nan
    scores = kernels.tokens(case, mask)
    assert scores[~mask[:, None]].eq(0).all()
    assert scores[mask[:, None]].isfinite().all()


@every_machine
@pytest.mark.parametrize("batch", [1, 5])
def test_the_order_of_blocks_and_threads_changes_no_bit(kernels, machine, batch):
    case = random_case([(14, 14), (7, 7)], channels=[64, 128], batch=batch, dtype=torch.bfloat16, beta=0.5, targets=2)
    results = []
    for seed in range(4):
        kernels.on(**machine, seed=seed)
        results.append(kernels.saliency(case, (50, 60)))
        assert sum(kernels.launches().values()) == 1
    assert all(torch.equal(result, results[0]) for result in results)


def test_small_batches_are_cut_finer_and_every_way_to_meet_is_tried(kernels):
    one, many = (random_case([(14, 14)], channels=[64], batch=batch) for batch in (1, 9))
    for machine, case, kind in [
        ("clusters", many, "clusters"),
        ("cooperative", one, "cooperative"),
        ("last", many, "alone"),
    ]:
        kernels.on(**MACHINES[machine])
        assert_equal(kernels.saliency(case, (60, 60)), case.expected((60, 60)))
        assert kernels.launches() == {**dict.fromkeys(LAUNCHES, 0), kind: 1}
