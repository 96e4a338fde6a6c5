"""What is saved is loaded, to the bit; what is damaged says so in one sentence; what fails leaves what was there."""

import json
import pickle
import shutil
import struct

import pytest
import torch
from safetensors.torch import save_file
from torch.testing import assert_close

from mhex_core.weights import read_weights
from mhex_vision import MHEXClassifier, Preprocessing, checkpoint

SIZE = (32, 32)


class Interrupted(BaseException):
    """As a signal or a full disk would be."""


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def one_sentence(error):
    return str(error) and "\n" not in str(error) and "Traceback" not in str(error)


@pytest.fixture
def saved(make_classifier, tmp_path):
    """A folder with a classifier of a network of one's own."""
    folder = tmp_path / "run"
    make_classifier().save_pretrained(folder)
    return folder


@pytest.fixture
def load(networks, saved):
    """Load it again."""
    return lambda: MHEXClassifier.from_pretrained(saved, backbone=networks.Net())


# ----------------------------------------------------------------------------------------------------------- round trip


@pytest.mark.parametrize("name", ["resnet18", "timm/convnext_atto"])
@pytest.mark.parametrize("classifier", ["drop", "keep"])
def test_a_named_network_comes_back_to_the_bit(make_classifier, make_images, tmp_path, name, classifier):
    if name.startswith("timm/"):
        pytest.importorskip("timm")
    model = make_classifier(name, classifier=classifier, objective="joint").with_metadata(
        class_names=("a", "b", "c"), preprocessing=Preprocessing(size=32)
    )
    assert model.save_pretrained(tmp_path) is None
    assert {"config.json", "model.safetensors"} <= set(contents(tmp_path))
    loaded = MHEXClassifier.from_pretrained(tmp_path)
    assert loaded.config == model.config
    assert loaded.layer_names == model.layer_names
    assert not loaded.training
    with torch.no_grad():
        assert_close(loaded(make_images(2, SIZE)), model(make_images(2, SIZE)), rtol=0, atol=0)


@pytest.mark.parametrize("gate", [True, False])
def test_a_network_of_ones_own_is_handed_over_again(networks, make_classifier, make_images, tmp_path, gate):
    model = make_classifier(gate=gate, classifier="keep", freeze_backbone=True)
    model.save_pretrained(tmp_path)
    network = networks.Net()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    loaded = MHEXClassifier.from_pretrained(str(tmp_path), backbone=network)
    assert_close(loaded(make_images()), model(make_images()), rtol=0, atol=0)
    assert_close(network.state_dict(), before, rtol=0, atol=0)
    with pytest.raises(ValueError, match=r"module of your own; pass the network as backbone=\.\.\."):
        MHEXClassifier.from_pretrained(tmp_path)


def test_a_network_that_insists_on_a_size_is_loaded_at_that_size(networks, make_classifier, make_images, tmp_path):
    model = make_classifier(networks.Sized(), 2, image_size=40, classifier="keep")
    model.save_pretrained(tmp_path)
    loaded = MHEXClassifier.from_pretrained(tmp_path, backbone=networks.Sized())
    assert_close(loaded(make_images(2, (40, 40))), model(make_images(2, (40, 40))), rtol=0, atol=0)


def test_another_number_of_classes_is_kept_with_the_last_layer(networks, make_classifier, make_images, tmp_path):
    model = make_classifier(networks.Net(classes=7), 3, classifier="keep")
    model.save_pretrained(tmp_path)
    loaded = MHEXClassifier.from_pretrained(tmp_path, backbone=networks.Net(classes=7))
    assert_close(loaded(make_images()), model(make_images()), rtol=0, atol=0)


def test_saving_twice_replaces_what_was_there(make_classifier, make_images, tmp_path, networks):
    first, second = make_classifier(seed=0), make_classifier(seed=1)
    first.save_pretrained(tmp_path)
    (tmp_path / "README.md").write_text("mine")
    second.save_pretrained(tmp_path)
    loaded = MHEXClassifier.from_pretrained(tmp_path, backbone=networks.Net())
    assert_close(loaded(make_images()), second(make_images()), rtol=0, atol=0)
    assert (tmp_path / "README.md").read_text() == "mine"
    assert set(contents(tmp_path)) == {"config.json", "model.safetensors", "README.md"}


def test_half_precision_weights_are_written_as_they_are(make_classifier, tmp_path):
    make_classifier().to(torch.bfloat16).save_pretrained(tmp_path)
    dtypes = {tensor.dtype for tensor in read_weights(tmp_path / "model.safetensors").values()}
    assert dtypes == {torch.bfloat16, torch.int64}  # BatchNorm counts its batches


# --------------------------------------------------------------------------------------------------------------- damage


@pytest.mark.parametrize("name", ["nowhere", "nowhere/at/all", "./nowhere", "~/nowhere"])
def test_a_folder_that_is_not_there_is_named(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=f"there is no folder {name}") as caught:
        MHEXClassifier.from_pretrained(name)
    assert one_sentence(caught.value)
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        MHEXClassifier.from_pretrained(tmp_path / name)


def test_a_file_in_place_of_a_folder_is_named(saved):
    with pytest.raises(FileNotFoundError, match=r"a checkpoint is a folder .*there is no folder .*config\.json"):
        MHEXClassifier.from_pretrained(saved / "config.json")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_file_that_is_missing_is_named(saved, load, name):
    (saved / name).unlink()
    with pytest.raises(FileNotFoundError, match=f"run is no checkpoint: {name} is missing") as caught:
        load()
    assert one_sentence(caught.value)


DAMAGES = {
    "empty": lambda raw: b"",
    "cut in the header's length": lambda raw: raw[:5],
    "cut in the header": lambda raw: raw[:60],
    "cut in the tensors": lambda raw: raw[:-1000],
    "something appended": lambda raw: raw + b"\0" * 8,
    "a pickle": lambda raw: pickle.dumps({"weight": [1.0, 2.0]}),
    "a text": lambda raw: b"not a model at all, but long enough to have a header" * 20,
    "a header longer than anything": lambda raw: struct.pack("<Q", 2**63) + raw[8:],
    "an image": lambda raw: b"\x89PNG\r\n\x1a\n" + bytes(200),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_weights_are_named_and_never_unpickled(saved, load, damage, monkeypatch):
    monkeypatch.setattr(pickle, "loads", lambda *_: pytest.fail("unpickled"))
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("unpickled"))
    path = saved / "model.safetensors"
    path.write_bytes(DAMAGES[damage](path.read_bytes()))
    with pytest.raises(ValueError, match=r"run/model\.safetensors is damaged, truncated or no safetensors") as caught:
        load()
    assert one_sentence(caught.value)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda tensors: tensors.pop("blocks.0.gate.weight"), r"lacks blocks\.0\.gate\.weight"),
        (lambda tensors: tensors.update(extra=torch.zeros(1)), "has unknown extra"),
        (
            lambda tensors: tensors.update({"blocks.0.head.weight": torch.zeros(4, 4)}),
            "another shape for blocks.0.head",
        ),
        (lambda tensors: tensors.clear(), r"lacks .*, .*, .* and \d+ more"),
    ],
    ids=["one is missing", "one too many", "another shape", "nothing"],
)
def test_weights_of_another_network_are_named(saved, load, change, words):
    path = saved / "model.safetensors"
    tensors = read_weights(path)
    change(tensors)
    save_file(tensors, path)
    with pytest.raises(ValueError, match=rf"run/model\.safetensors belongs to another network: it .*{words}") as caught:
        load()
    assert one_sentence(caught.value)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int8, torch.bool, torch.float8_e5m2], ids=str)
def test_numbers_of_another_kind_are_named(saved, load, dtype):
    path = saved / "model.safetensors"
    tensors = read_weights(path)
    tensors["blocks.0.head.weight"] = torch.ones(tensors["blocks.0.head.weight"].shape).to(dtype)
    save_file(tensors, path)
    with pytest.raises(ValueError, match=rf"has other numbers for blocks\.0\.head\.weight \({dtype}\)"):
        load()


def test_a_header_that_says_another_type_is_noticed(saved, load):
    path = saved / "model.safetensors"
    raw = path.read_bytes()
    assert b'"F32"' in raw
    path.write_bytes(raw.replace(b'"F32"', b'"I32"', 1))
    with pytest.raises(ValueError, match=r"has other numbers for .*torch\.int32"):
        load()
    path.write_bytes(raw.replace(b'"F32"', b'"C64"', 1))  # other sizes do not add up
    with pytest.raises(ValueError, match="damaged"):
        load()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", ["blocks.0.head.weight", "backbone."])
def test_weights_that_are_not_finite_are_named(saved, load, name, value):
    path = saved / "model.safetensors"
    tensors = read_weights(path)
    name = (
        name
        if name in tensors
        else next(key for key in tensors if key.startswith("backbone.") and key.endswith("weight"))
    )
    tensors[name].view(-1)[-1] = value
    save_file(tensors, path)
    with pytest.raises(ValueError, match=rf"not all numbers of {name} are finite"):
        load()


def test_half_precision_is_read_where_single_is_expected(make_classifier, networks, tmp_path):
    make_classifier().to(torch.float16).save_pretrained(tmp_path)
    model = MHEXClassifier.from_pretrained(tmp_path, backbone=networks.Net())
    assert {value.dtype for value in model.parameters()} == {torch.float32}


def test_one_bit_more_or_less_is_noticed(saved, load):
    path = saved / "model.safetensors"
    raw = bytearray(path.read_bytes())
    raw[-3] ^= 1
    path.write_bytes(raw)
    with pytest.raises(ValueError, match=r"config\.json: the weights beside it are not those that were saved with it"):
        load()
    settings = json.loads((saved / "config.json").read_text())
    del settings["sha256"]  # as older checkpoints are, and those that somebody changed on purpose
    (saved / "config.json").write_text(json.dumps(settings))
    load()


def test_weights_of_another_run_are_noticed(saved, load, make_classifier, tmp_path):
    make_classifier(seed=5).save_pretrained(tmp_path / "other")
    shutil.copy(tmp_path / "other" / "model.safetensors", saved)
    with pytest.raises(ValueError, match="not those that were saved with it"):
        load()


def test_settings_that_were_changed_are_said(saved, load):
    path = saved / "config.json"
    path.write_text(edited(decay=0.25)(path.read_text()))
    with pytest.warns(UserWarning, match=r"config\.json was changed after it was saved; .* remove \"sha256\""):
        assert load().config.decay == 0.25


def test_whoever_is_killed_while_saving_leaves_what_can_be_loaded(saved, load, make_classifier, monkeypatch):
    write_text, written = checkpoint.write_text, []

    def killed(path, text):
        if written:
            raise Interrupted
        written.append(path)
        write_text(path, text)

    monkeypatch.setattr(checkpoint, "write_text", killed)
    with pytest.raises(Interrupted):
        checkpoint.write(make_classifier(seed=1), saved)
    load()


def edited(**changes):
    return lambda text: json.dumps(json.loads(text) | changes)


CONFIGS = {
    "empty": (lambda text: "", "not JSON"),
    "cut": (lambda text: text[:40], "not JSON"),
    "not UTF-8": (lambda text: b"\xff\xfe\x00", "utf-8"),
    "foreign": (lambda text: '{"model_type": "vit"}', "not the configuration of an MHEX classifier"),
    "a newer version": (edited(mhex_vision_format=2), "format 2 is not 1"),
    "an unknown key": (edited(colour="red"), "unknown keys colour"),
    "a wrong type": (edited(gate="yes"), "gate must be a bool"),
    "a wrong value": (edited(at="top"), "at must be one of"),
    "an unknown network": (edited(backbone="resnet19"), "backbone must be .* got 'resnet19'"),
    "another package's": (
        lambda text: '{"model_type": "bert"}',
        "but of a model of transformers, which mhex-text",
    ),
    "a number beyond floats": (
        edited(preprocessing={"size": 8, "mean": [10**400, 0, 0]}),
        "mean: expected three finite numbers",
    ),
    "names in one text": (edited(class_names="abc"), "class_names must be a sequence of texts, got 'abc'"),
    "a list": (lambda text: "[1]", "not a mapping of settings, got list"),
    "classes without end": (edited(backbone="resnet18", num_classes=10**9), "larger than its weights"),
    "classes beyond memory": (edited(backbone="resnet18", num_classes=10**15), "larger than its weights"),
    "images without end": (edited(backbone="resnet18", image_size=10**7), "image_size must be at most 4096"),
    "another network": (edited(backbone="wide_resnet101_2"), "larger than its weights: .*, at "),
    "a download": (edited(backbone="resnet18:weights=DEFAULT"), "must be of its shape .*got weights in"),
    "a path": (edited(backbone="vit_b_16:checkpoint_path=x"), "must be of its shape .*got checkpoint_path in"),
    "layers without end": (edited(backbone="vit_b_16:num_layers=100000"), r"num_layers must be in \(0, 256\]"),
    "a width without end": (edited(backbone="vit_b_16:hidden_dim=1e9"), "hidden_dim must be at most 65536"),
    "a shape nobody can build": (edited(backbone="vit_b_16:patch_size=0"), "cannot be built with these options"),
    "a network without residual additions": (edited(backbone="squeezenet1_1"), "SqueezeNet has no residual addition"),
}


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_damaged_configuration_is_named(saved, kind):
    change, words = CONFIGS[kind]
    path = saved / "config.json"
    text = change(path.read_text())
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=rf"run/config\.json cannot be used: .*{words}") as caught:
        MHEXClassifier.from_pretrained(saved)
    assert one_sentence(caught.value)


# --------------------------------------------------------------------------------------------------------- interruption


@pytest.mark.parametrize("there", [True, False])
@pytest.mark.parametrize("place", ["weights", "config", "half the weights"])
def test_a_failure_leaves_the_files_as_they_were(make_classifier, tmp_path, monkeypatch, place, there):
    folder = tmp_path / "run"
    if there:
        make_classifier(seed=0).save_pretrained(folder)
    before = contents(folder) if there else {}

    def fail(tensors, path, metadata=None):
        if place == "half the weights":
            path.write_bytes(b"half of it")
        raise Interrupted

    second = make_classifier(seed=1).with_metadata(class_names=("a", "b", "c"))
    if place == "config":
        monkeypatch.setattr(type(second.config), "to_json", lambda _: (_ for _ in ()).throw(Interrupted))
    else:
        monkeypatch.setattr(checkpoint, "save_file", fail)
    with pytest.raises(Interrupted):
        second.save_pretrained(folder)
    assert contents(folder) == before


def test_nothing_temporary_is_left_and_others_may_read_it(saved):
    assert set(contents(saved)) == {"config.json", "model.safetensors", "README.md"}
    plain = saved / "plain"
    plain.touch()
    assert {path.stat().st_mode for path in saved.iterdir()} == {plain.stat().st_mode}


# ------------------------------------------------------------------------------------------------------------------ hub


@pytest.fixture
def offline(monkeypatch, tmp_path):
    """No network, and nothing cached."""
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.mark.parametrize("name", ["somebody/something", "some body/some:thing"])
def test_a_name_on_the_hub_that_cannot_be_fetched_is_named(offline, name):
    with pytest.raises(FileNotFoundError, match=f"there is no folder {name}, and it could not be fetched") as caught:
        MHEXClassifier.from_pretrained(name, cache_dir=offline)
    assert one_sentence(caught.value)


@pytest.mark.parametrize("error", [ConnectionError(), OSError("\n"), TimeoutError("slow\nline")])
def test_any_failure_of_the_network_is_one_sentence(monkeypatch, error):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    with pytest.raises(FileNotFoundError, match=r"could not be fetched from the hub: .") as caught:
        MHEXClassifier.from_pretrained("somebody/something")
    assert one_sentence(caught.value)


def test_a_repository_is_fetched_and_then_a_folder(networks, saved, load, monkeypatch, tmp_path, make_images):
    asked = {}

    def download(name, **options):
        asked.update(options, name=name)
        return str(shutil.copytree(saved, tmp_path / "snapshot"))

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    loaded = MHEXClassifier.from_pretrained(
        "somebody/something", backbone=networks.Net(), revision="v1", local_files_only=True
    )
    assert_close(loaded(make_images()), load()(make_images()), rtol=0, atol=0)
    assert (asked["name"], asked["revision"], asked["local_files_only"]) == ("somebody/something", "v1", True)
    assert sorted(asked["allow_patterns"]) == ["config.json", "model.safetensors"]
