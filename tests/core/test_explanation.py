"""What an explanation holds survives reweighting, slicing and a file."""

import collections
import io
import json
import pickle
import random
import time
import tracemalloc
import zipfile
from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from mhex_core import Explanation, SaliencyOptions, saliency_maps
from mhex_core import explanation as explanation_module

from .. import mutations  # noqa: TID252

TARGETS = {"(B,)": torch.tensor([3, 0, 1]), "(B, n)": torch.tensor([[1, 3], [0, 2], [2, 2]]), "all": "all"}
every_target = pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS.keys())


def assert_same(ours, theirs):
    """Every field equal, to the bit."""
    for field in fields(Explanation):
        one, other = getattr(ours, field.name), getattr(theirs, field.name)
        assert type(one) is type(other), field.name
        if isinstance(one, torch.Tensor) or (isinstance(one, tuple) and one and isinstance(one[0], torch.Tensor)):
            assert_close(one, other, rtol=0, atol=0)
        else:
            assert one == other, field.name


# --------------------------------------------------------------------------------------------------------- reweighting


@every_target
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize(
    "change",
    [{}, {"beta": 1.0}, {"layer_weights": [1.0, 0.0, -0.5]}, {"beta": 0.25, "layer_weights": torch.ones(3)}],
    ids=str,
)
def test_reweighted_is_what_a_fresh_computation_gives(make_explanation, target, normalize, change):
    explanation, (activations, matrices, target) = make_explanation(target, beta=0.5, decay=0.8, normalize=normalize)
    result = explanation.reweighted(**change)
    settings = {"beta": 0.5, "decay": 0.8, "normalize": normalize} | change
    expected = saliency_maps(activations, matrices, target, size=(9, 7), **settings)
    assert_close(result.saliency, expected, rtol=0, atol=0)
    assert result.options == SaliencyOptions(**settings)
    assert result.positive is explanation.positive
    assert explanation.options.beta == 0.5  # the original is as it was


def test_reweighting_twice_is_reweighting_once(make_explanation):
    explanation, _ = make_explanation()
    twice = explanation.reweighted(beta=1.0).reweighted(layer_weights=[1, 2, 3])
    assert_same(twice, explanation.reweighted(beta=1.0, layer_weights=[1, 2, 3]))


@every_target
def test_layer_saliency_is_each_layer_alone(make_explanation, target):
    explanation, (activations, matrices, target) = make_explanation(target, beta=0.5)
    result = explanation.layer_saliency()
    assert result.shape == (3, *explanation.saliency.shape)
    for layer in range(3):
        alone = saliency_maps(
            activations[layer : layer + 1], matrices[layer : layer + 1], target, size=(9, 7), beta=0.5
        )
        assert_close(result[layer], alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("normalize", [True, False])
def test_a_layer_alone_takes_the_work_of_a_layer(make_explanation, monkeypatch, normalize):
    """The others, added with weight zero, change no bit and cost as much again each."""
    explanation, _ = make_explanation(beta=0.5, normalize=normalize)
    with_others = [
        explanation.reweighted(layer_weights=[float(layer == place) for place in range(3)]).saliency
        for layer in range(3)
    ]
    added = []
    combine = explanation_module.combine_maps
    monkeypatch.setattr(
        explanation_module,
        "combine_maps",
        lambda maps, **more: added.append(len(maps.positive)) or combine(maps, **more),
    )
    assert_close(explanation.layer_saliency(), torch.stack(with_others), rtol=0, atol=0)
    assert added == [1, 1, 1]


def test_layers_add_up_to_the_map_before_the_min_max(make_explanation):
    explanation, _ = make_explanation(beta=0.5, decay=0.7, normalize=False)
    weights = torch.tensor(explanation.layer_weights)
    assert_close(weights, torch.tensor([0.49, 0.7, 1.0]))
    total = (weights[:, None, None, None] * explanation.layer_saliency()).sum(dim=0)
    assert_close(total, explanation.saliency, rtol=1e-5, atol=1e-5)


def test_prediction_and_size_are_read_off(make_explanation):
    explanation, _ = make_explanation()
    assert explanation.size == (9, 7)
    assert len(explanation) == 3
    assert_close(explanation.prediction, explanation.probabilities.argmax(dim=1))


# ------------------------------------------------------------------------------------------------------------- slicing


@every_target
@pytest.mark.parametrize(
    ("index", "rows"),
    [
        (0, [0]),
        (2, [2]),
        (-1, [2]),
        (-3, [0]),
        (np.int64(1), [1]),
        (slice(1, None), [1, 2]),
        (slice(0, 0), []),
        (slice(None, None, 2), [0, 2]),
        (slice(-2, 9), [1, 2]),
        ([0, 1], [0, 1]),
        ([-1, 0, 0], [2, 0, 0]),
        ([], []),
        ([True, False, True], [0, 2]),
        (np.array([2, 1]), [2, 1]),
        (torch.tensor([False, True, True]), [1, 2]),
        (torch.tensor([2, 0]), [2, 0]),
        (torch.tensor(1), [1]),
    ],
    ids=str,
)
def test_an_index_or_a_slice_gives_those_samples(make_explanation, target, index, rows):
    explanation, _ = make_explanation(target)
    part = explanation[index]
    assert len(part) == len(rows)
    for name in ("saliency", "target", "probabilities"):
        assert_close(getattr(part, name), getattr(explanation, name)[rows], rtol=0, atol=0)
    assert_close(part.head_logits, explanation.head_logits[:, rows], rtol=0, atol=0)
    for name in ("positive", "negative"):
        for ours, whole in zip(getattr(part, name), getattr(explanation, name), strict=True):
            assert_close(ours, whole[rows], rtol=0, atol=0)
    assert part.layer_names == explanation.layer_names
    assert part.options == explanation.options
    assert part.reweighted(beta=1.0).saliency.shape == part.saliency.shape
    assert_close(part.reweighted(beta=1.0).saliency, explanation.reweighted(beta=1.0).saliency[rows], rtol=0, atol=0)


@pytest.mark.parametrize("index", [3, -4, 10**30, [0, 3], [True], torch.tensor([False] * 4)], ids=repr)
def test_an_index_outside_the_batch_is_an_index_error(make_explanation, index):
    with pytest.raises(IndexError, match="index"):
        make_explanation()[0][index]


@pytest.mark.parametrize("index", ["0", None, 1.0, [0, 1.0], [[0]], [0, True], (0, 1)], ids=repr)
def test_other_indices_are_a_type_error(make_explanation, index):
    with pytest.raises(TypeError, match="index must be an int, a slice, or a list"):
        make_explanation()[0][index]


def test_iteration_visits_every_sample_once(make_explanation):
    explanation, _ = make_explanation()
    assert_close(torch.cat([one.saliency for one in explanation]), explanation.saliency, rtol=0, atol=0)


def test_to_moves_every_tensor(make_explanation):
    moved = make_explanation()[0].to("meta")
    tensors = [moved.saliency, moved.target, moved.probabilities, moved.head_logits, *moved.positive, *moved.negative]
    assert {value.device.type for value in tensors} == {"meta"}
    assert_same(make_explanation()[0].to("cpu"), make_explanation()[0])


def test_it_is_frozen(make_explanation):
    with pytest.raises(AttributeError):
        make_explanation()[0].saliency = None


# --------------------------------------------------------------------------------------------------------------- files


@every_target
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"beta": 0.1, "tau_pos": 1 / 3, "tau_neg": 0.2, "layer_weights": [0.1, 0.2, 0.3], "normalize": False},
        {"sharpness": "soft", "exponent": 0.7, "decay": 0.123456789012345},
    ],
    ids=lambda settings: "+".join(settings) or "defaults",
)
@pytest.mark.parametrize("as_text", [True, False])
def test_everything_comes_back_from_a_file(make_explanation, tmp_path, target, settings, as_text):
    explanation, _ = make_explanation(target, **settings)
    path = tmp_path / "a \N{DOG FACE}.npz"
    assert explanation.save(str(path) if as_text else path) == path
    assert_same(Explanation.load(str(path) if as_text else path), explanation)
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("names", [(), ("a\u0000b", "\ud800", '"', "")], ids=["none", "odd"])
def test_any_class_names_come_back(make_explanation, tmp_path, names):
    explanation = replace(make_explanation()[0], class_names=names)
    assert_same(Explanation.load(explanation.save(tmp_path / "x")), explanation)


def test_a_part_and_an_empty_part_come_back(make_explanation, tmp_path):
    explanation, _ = make_explanation()
    for part in (explanation[1], explanation[0:0]):
        assert_same(Explanation.load(part.save(tmp_path / "part.npz")), part)


def test_more_than_ten_layers_come_back_in_order(make_explanation, tmp_path):
    explanation, _ = make_explanation()
    many = tuple(torch.full((3, 2, 2), float(index)) for index in range(12))
    heads = torch.randn(12, 3, 4)
    explanation = replace(
        explanation, positive=many, negative=many, layer_names=tuple(map(str, range(12))), head_logits=heads
    )
    assert_same(Explanation.load(explanation.save(tmp_path / "deep.npz")), explanation)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_values_are_kept_as_float32(make_explanation, tmp_path, dtype):
    explanation, _ = make_explanation()
    explanation = replace(explanation, head_logits=explanation.head_logits.to(dtype))
    loaded = Explanation.load(explanation.save(tmp_path / "half.npz"))
    assert_close(loaded.head_logits, explanation.head_logits.float(), rtol=0, atol=0)


def test_values_in_a_graph_can_be_saved(make_explanation, tmp_path):
    explanation, _ = make_explanation()
    explanation = replace(explanation, saliency=explanation.saliency.clone().requires_grad_() * 1)
    loaded = Explanation.load(explanation.save(tmp_path / "graph.npz"))
    assert_close(loaded.saliency, explanation.saliency.detach(), rtol=0, atol=0)


def test_saving_again_replaces_the_file(make_explanation, tmp_path):
    explanation, _ = make_explanation()
    path = explanation.save(tmp_path / "x.npz")
    explanation.reweighted(beta=1.0).save(path)
    assert Explanation.load(path).options.beta == 1.0


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()], ids=repr)
@pytest.mark.parametrize("existing", [False, True])
def test_an_interrupted_write_leaves_nothing_behind(make_explanation, tmp_path, monkeypatch, existing, error):
    explanation, _ = make_explanation()
    path = tmp_path / "x.npz"
    if existing:
        explanation.save(path)
    before = path.read_bytes() if existing else None

    def write_a_little(file, *args, **kwargs):
        file.write(b"PK")
        raise error

    monkeypatch.setattr(np, "savez_compressed", write_a_little)
    with pytest.raises(type(error)):
        explanation.reweighted(beta=1.0).save(path)
    assert [file.read_bytes() for file in tmp_path.iterdir()] == ([before] if existing else [])


def test_saving_into_a_missing_folder_says_so(make_explanation, tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        make_explanation()[0].save(tmp_path / "nowhere" / "x.npz")


@pytest.mark.parametrize("name", ["missing.npz", "."])
def test_loading_what_is_no_file_is_file_not_found(tmp_path, name):
    with pytest.raises(FileNotFoundError, match="path"):
        Explanation.load(tmp_path / name)


class Trap:
    """Unpickling it would leave a trace."""

    def __reduce__(self):
        return (exec, ("import numpy; numpy.mhex_trap = True",))


def objects(path):
    header = np.array([Trap()], dtype=object)
    np.savez_compressed(path, header=header, saliency=header)


def bare_array(path):
    with path.open("wb") as file:
        np.save(file, np.zeros(3))


def header_only(path, **changes):
    header = {"format": "mhex-explanation", "version": 1, "options": {}} | changes
    np.savez(path, header=np.frombuffer(json.dumps(header).encode(), dtype=np.uint8))


FOREIGN = {
    "zero bytes": lambda path: path.write_bytes(b""),
    "text": lambda path: path.write_text("saliency,0.5\n" * 20),
    "bytes": lambda path: path.write_bytes(bytes(range(256)) * 4),
    "zip signature only": lambda path: path.write_bytes(b"PK\x03\x04"),
    "npz of something else": lambda path: np.savez(path, weights=np.zeros(3)),
    "npy": bare_array,
    "pickle": lambda path: path.write_bytes(pickle.dumps({"saliency": Trap()})),
    "npz of pickled objects": objects,
    "header that is no json": lambda path: np.savez(path, header=np.frombuffer(b"{", dtype=np.uint8)),
    "header that is a list": lambda path: np.savez(path, header=np.frombuffer(b"[1]", dtype=np.uint8)),
    "header and nothing else": header_only,
    "a later version": lambda path: header_only(path, version=2),
    "another format": lambda path: header_only(path, format="other"),
    "unknown options": lambda path: header_only(path, options={"gamma": 1}),
    "options out of range": lambda path: header_only(path, options={"beta": 7}),
}


@pytest.mark.parametrize("write", FOREIGN.values(), ids=FOREIGN.keys())
def test_a_foreign_file_is_a_value_error_that_names_the_path(tmp_path, write):
    path = tmp_path / "strange.npz"
    write(path)
    with pytest.raises(ValueError, match=r"path .*strange\.npz"):
        Explanation.load(path)
    assert not hasattr(np, "mhex_trap")


def test_a_file_without_one_of_its_fields_is_a_value_error(make_explanation, tmp_path):
    path = make_explanation()[0].save(tmp_path / "x.npz")
    with np.load(path) as archive:
        arrays = {name: archive[name] for name in archive.files}
    for missing in [name for name in arrays if name.partition(".")[2] != "2"]:
        np.savez(path, **{name: value for name, value in arrays.items() if name != missing})
        with pytest.raises(ValueError, match=r"x\.npz"):
            Explanation.load(path)


def test_damage_anywhere_is_a_value_error_or_harmless(make_explanation, tmp_path):
    """Cut short at any length, or one byte of it turned over: what loads is what was saved."""
    explanation, _ = make_explanation()
    path = explanation.save(tmp_path / "x.npz")
    whole = path.read_bytes()
    damaged = [whole[:length] for length in range(0, len(whole), 97)]
    damaged += [whole[:at] + bytes([whole[at] ^ 0xFF]) + whole[at + 1 :] for at in range(0, len(whole), 7)]
    refused = 0
    for content in damaged:
        path.write_bytes(content)
        try:
            loaded = Explanation.load(path)
        except ValueError as error:
            assert "x.npz" in str(error)  # noqa: PT017 - most of the damage is to be refused, not all of it
            refused += 1
        else:
            assert_same(loaded, explanation)
    assert refused > len(damaged) / 2


@pytest.mark.parametrize(
    ("change", "error", "name"),
    [
        ({"beta": True}, TypeError, "beta"),
        ({"beta": -0.5}, ValueError, "beta"),
        ({"layer_weights": [1.0]}, ValueError, "layer_weights"),
        ({"layer_weights": 1.0}, TypeError, "layer_weights"),
        ({"layer_weights": [1.0, 1.0, "1"]}, TypeError, r"layer_weights\[2\]"),
    ],
    ids=str,
)
def test_bad_weights_are_named(make_explanation, change, error, name):
    with pytest.raises(error, match=name):
        make_explanation()[0].reweighted(**change)


# ------------------------------------------------------------------------------------------- fields against each other

SAMPLES, SEVERAL = torch.tensor([3, 0, 1]), torch.tensor([[1, 3], [0, 2], [2, 2]])
FLAT = torch.rand(3, 2, 2)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"saliency": 1}, TypeError, "saliency must be a torch.Tensor, got int"),
        ({"saliency": torch.rand(3, 9)}, ValueError, "saliency must have 3 or 4 dimensions"),
        ({"saliency": torch.ones(3, 9, 7, dtype=torch.int64)}, TypeError, "saliency must be of a floating-point dtype"),
        ({"saliency": torch.rand(2, 9, 7)}, ValueError, r"probabilities must have shape \(2, K\), got \(3, 4\)"),
        ({"saliency": torch.full((3, 9, 7), torch.nan)}, ValueError, "saliency by mhex must be finite"),
        ({"target": 2}, TypeError, "target must be a torch.Tensor, got int"),
        ({"target": torch.tensor([0, 1, 99])}, ValueError, r"target must lie in \[0, 3\], got values from 0 to 99"),
        ({"target": torch.tensor([0, -7, 1])}, ValueError, r"target must lie in \[0, 3\], got values from -7 to 1"),
        ({"target": torch.tensor([0.0, 1.0, 2.0])}, TypeError, "target must be of an integer dtype"),
        ({"target": SEVERAL}, ValueError, r"target must have shape \(3,\), as saliency has it, got \(3, 2\)"),
        ({"target": torch.tensor([0, 1])}, ValueError, r"target must have shape \(3,\)"),
        ({"probabilities": torch.rand(3)}, ValueError, "probabilities must have 2 dimensions"),
        ({"probabilities": torch.rand(3, 0)}, ValueError, r"probabilities must have shape \(3, K\)"),
        ({"probabilities": torch.full((3, 4), 1.5)}, ValueError, r"probabilities must lie in \[0, 1\]"),
        ({"probabilities": torch.full((3, 4), -0.5)}, ValueError, r"probabilities must lie in \[0, 1\]"),
        ({"head_logits": torch.rand(2, 3, 4)}, ValueError, r"head_logits must have shape \(3, 3, 4\), got \(2, 3, 4\)"),
        ({"head_logits": torch.rand(3, 3, 5)}, ValueError, r"head_logits must have shape \(3, 3, 4\)"),
        ({"head_logits": torch.full((3, 3, 4), torch.inf)}, ValueError, "head_logits by mhex must be finite"),
        ({"positive": ()}, ValueError, "positive must hold at least one layer"),
        ({"positive": (FLAT,) * 2}, ValueError, "negative must have the shapes of positive, layer by layer"),
        ({"negative": (FLAT,) * 3}, ValueError, "negative must have the shapes of positive, layer by layer"),
        ({"positive": FLAT}, TypeError, "positive must be a sequence of tensors"),
        ({"positive": (FLAT, FLAT, None)}, TypeError, r"positive\[2\] must be a torch.Tensor"),
        ({"positive": (FLAT,), "negative": (FLAT,)}, ValueError, "layer_names must hold a name for each of 1 layers"),
        (
            {"positive": (FLAT[:2],) * 3, "negative": (FLAT[:2],) * 3},
            ValueError,
            r"positive\[0\] must have shape \(3, h, w\), as saliency has it, got \(2, 2, 2\)",
        ),
        (
            {"positive": (FLAT, FLAT[:2], FLAT), "negative": (FLAT, FLAT[:2], FLAT)},
            ValueError,
            r"positive\[1\] must have shape \(3, h, w\)",
        ),
        (
            {"positive": (FLAT, FLAT, FLAT[:, :0]), "negative": (FLAT, FLAT, FLAT[:, :0])},
            ValueError,
            "h and w at least 1",
        ),
        (
            {"positive": (FLAT,) * 3, "negative": (FLAT, FLAT, FLAT * torch.nan)},
            ValueError,
            r"negative.2 by mhex must be finite",
        ),
        ({"layer_names": ("a", "b")}, ValueError, "layer_names must hold a name for each of 3 layers, got 2"),
        ({"layer_names": "abc"}, TypeError, "layer_names must be a sequence of str, got str"),
        ({"class_names": "abcd"}, TypeError, "class_names must be a sequence of str, got str"),
        ({"class_names": ("a", "b")}, ValueError, "class_names must hold a name for each of 4 classes, got 2"),
        ({"class_names": ("a", "b", "c", 4)}, TypeError, r"class_names\[3\] must be a str, got int"),
        ({"method": None}, TypeError, "method must be a str, got NoneType"),
        ({"options": {}}, TypeError, "options must be SaliencyOptions, got dict"),
        ({"options": SaliencyOptions(layer_weights=[1.0])}, ValueError, "layer_weights must hold one number per layer"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None if isinstance(value, type) else value[:40],
)
def test_fields_that_do_not_fit_each_other_are_named(make_explanation, change, error, message):
    with pytest.raises(error, match=message):
        replace(make_explanation()[0], **change)


def test_other_whole_numbers_and_sequences_are_brought_into_form(make_explanation):
    explanation = replace(
        make_explanation()[0],
        target=SAMPLES.to(torch.uint8),
        class_names=["a", "b", "c", "d"],
        positive=list(make_explanation()[0].positive),
    )
    assert explanation.target.dtype == torch.int64
    assert explanation.class_names == ("a", "b", "c", "d")
    assert isinstance(explanation.positive, tuple)


def test_maps_of_another_method_have_their_names_checked_too():
    with pytest.raises(TypeError, match="class_names must be a sequence of str, got str"):
        of_maps(torch.rand(2, 3, 3), class_names="abc")


# ----------------------------------------------------------------------------------------------------- sizes of files


def archive_of(explanation, path):
    with np.load(explanation.save(path)) as archive:
        return {name: archive[name] for name in archive.files}


def member(array, *, shape=None, descr=None):
    """An array as .npy, with a head that says what it likes."""
    file = io.BytesIO()
    head = {"shape": array.shape if shape is None else shape, "fortran_order": False}
    np.lib.format.write_array_header_1_0(file, {**head, "descr": descr or array.dtype.str})
    return file.getvalue() + array.tobytes()


def write_archive(path, members, *, compression=zipfile.ZIP_DEFLATED):
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in members.items():
            archive.writestr(f"{name}.npy", data)


@pytest.mark.parametrize("shape", [(10**12,), (3, 9, 10**11), (2**63, 2), (-1, 9, 7), (3, 9, 6), (0,)], ids=str)
@pytest.mark.parametrize("name", ["saliency", "positive.1", "header"])
def test_a_shape_that_a_file_does_not_hold_asks_for_no_memory(make_explanation, tmp_path, name, shape):
    path = tmp_path / "claims.npz"
    arrays = archive_of(make_explanation()[0], path)
    write_archive(path, {key: member(value, shape=shape if key == name else None) for key, value in arrays.items()})
    tracemalloc.start()
    with pytest.raises(ValueError, match=rf"claims\.npz .*{name} says that it is"):
        Explanation.load(path)
    assert tracemalloc.get_traced_memory()[1] < 2**22
    tracemalloc.stop()


@pytest.mark.parametrize("compression", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_no_other_compression_is_taken(make_explanation, tmp_path, compression):
    """Ten kilobytes of bzip2 can be a gigabyte."""
    path = tmp_path / "x.npz"
    arrays = archive_of(make_explanation()[0], path)
    write_archive(path, {name: member(value) for name, value in arrays.items()}, compression=compression)
    with pytest.raises(ValueError, match=r"x\.npz .*says that it holds .* bytes, which it cannot"):
        Explanation.load(path)


def test_a_directory_that_claims_more_than_the_file_is_refused(make_explanation, tmp_path):
    path = tmp_path / "x.npz"
    whole = bytearray(make_explanation()[0].save(path).read_bytes())
    entry = whole.rindex(b"PK\x01\x02")
    for field, claim in ((24, 2**31), (20, 2**31)):  # the size, then what it takes in the file as well
        whole[entry + field : entry + field + 4] = claim.to_bytes(4, "little")
        path.write_bytes(whole)
        with pytest.raises(ValueError, match=r"x\.npz .*(which it cannot|hold more than its)"):
            Explanation.load(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"options": {"beta": 0.5}}, "options must hold"),
        ({"options": None}, "AttributeError"),
        ({"colour": 1}, "header must hold"),
        ({"class_names": "abcd"}, "class_names must be a sequence"),
        ({"class_names": [1, 2, 3, 4]}, r"class_names\[0\] must be a str"),
        ({"layer_names": ["a"]}, "layer_names must hold"),
        ({"method": None}, "method must be a str"),
        ({"method": float("nan")}, "numbers must be finite, got NaN"),
    ],
    ids=repr,
)
def test_a_header_that_could_not_have_been_written_is_refused(make_explanation, tmp_path, change, message):
    path = tmp_path / "x.npz"
    arrays = archive_of(make_explanation()[0], path)
    header = json.loads(arrays["header"].tobytes()) | change
    arrays["header"] = np.frombuffer(json.dumps(header).encode(), dtype=np.uint8)
    np.savez(path, **arrays)
    with pytest.raises(ValueError, match=rf"x\.npz .*{message}"):
        Explanation.load(path)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_ten_thousand_mutations_of_a_file_are_refused_or_valid(make_explanation, tmp_path):
    """Half of them to bytes, half of them inside, with checksums that are right again."""
    path = tmp_path / "mutated.npz"
    explanation = make_explanation(SEVERAL, beta=0.25)[0]
    whole = explanation.save(path).read_bytes()
    chance = random.Random(15)
    counts = collections.Counter()
    streams = {"bytes": mutations.of_bytes(whole, chance), "inside": mutations.of_archive(whole, chance)}
    for kind in ("bytes", "inside") * 5000:
        path.write_bytes(next(streams[kind]))
        start = time.perf_counter()
        try:
            loaded = Explanation.load(path)
        except ValueError as error:
            assert "mutated.npz" in str(error)  # noqa: PT017 - what is harmless need not be refused
            counts[kind, "refused"] += 1
        else:
            if kind == "bytes":
                assert_same(loaded, explanation)
            replace(loaded)  # it fits together,
            assert loaded.reweighted(beta=1.0).saliency.shape == loaded.saliency.shape
            again = Explanation.load(loaded.save(tmp_path / "again.npz"))  # and is kept as it is
            assert_same(again, loaded)
            counts[kind, "loaded"] += 1
        assert time.perf_counter() - start < 5
    print(dict(counts))  # noqa: T201 - what -s shows
    assert not hasattr(np, "mhex_trap")
    assert counts["bytes", "refused"] > 4000
    assert counts["inside", "refused"] > 3000


# ------------------------------------------------------------------------------------------------- of other methods


def of_maps(maps, **more):
    probabilities = torch.rand(len(maps), 3, generator=torch.Generator().manual_seed(2)).softmax(dim=1)
    return Explanation.of_maps(maps, torch.zeros(len(maps), dtype=torch.int64), probabilities, method="cdam", **more)


def test_maps_of_another_method_keep_sign_and_scale(tmp_path):
    maps = 7 * torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(1))
    explanation = of_maps(maps, class_names=("a", "b", "c"))
    assert torch.equal(explanation.saliency, maps)
    assert explanation.signed
    assert (explanation.method, explanation.layer_names) == ("cdam", ("cdam",))
    assert explanation.head_logits.shape == (0, 3, 3)
    assert_close(explanation.layer_saliency()[0], maps)
    assert_close(explanation.reweighted(beta=0.0).saliency, maps.clamp(min=0))
    assert not explanation.reweighted(beta=0.0).signed
    loaded = Explanation.load(explanation.save(tmp_path / "maps.npz"))
    assert (loaded.method, loaded.class_names) == ("cdam", ("a", "b", "c"))
    assert torch.equal(loaded.saliency, maps)
    whole = Explanation.concatenate([explanation[:1], explanation[1:]])
    assert torch.equal(whole.saliency, maps)
    with pytest.raises(ValueError, match="share their method"):
        Explanation.concatenate([explanation, replace(explanation, method="gmar")])
