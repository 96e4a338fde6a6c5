"""What an explanation holds survives reweighting, slicing and a file."""

import json
import pickle
from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from mhex_core import Explanation, SaliencyOptions, saliency_maps

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


@pytest.mark.parametrize("index", [3, -4, 10**30])
def test_an_index_outside_the_batch_is_an_index_error(make_explanation, index):
    with pytest.raises(IndexError, match="index"):
        make_explanation()[0][index]


@pytest.mark.parametrize("index", ["0", None, 1.0, [0, 1], (0, 1)], ids=repr)
def test_other_indices_are_a_type_error(make_explanation, index):
    with pytest.raises(TypeError):
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
    explanation = replace(explanation, positive=many, negative=many, layer_names=tuple(map(str, range(12))))
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
