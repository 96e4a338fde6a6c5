"""What somebody else saved: loaded whole, or refused in one sentence. Nothing of it runs, and nothing is asked."""

import contextlib
import io
import json
import pickle
import shutil
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertForPreTraining,
    BertForSequenceClassification,
)

from mhex_text import MHEXForSequenceClassification, cli
from mhex_text.bulk.checkpoint import find_checkpoint
from mhex_text.loading import load_classifier, load_config, load_tokenizer, seal_checkpoint

from .encoders import SIZES, make_encoder, make_tokenizer

WORDS = ["good", "bad", "film"]
KINDS = ("blocks", "plain")
INPUT = torch.tensor([[2, 5, 6, 3]])


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """A classifier with blocks, one without, and an encoder; each with a tokenizer."""
    folder = tmp_path_factory.mktemp("kept")
    encoder, tokenizer = make_encoder(num_hidden_layers=2), make_tokenizer(WORDS)
    MHEXForSequenceClassification.from_encoder(encoder, 2).save_pretrained(folder / "blocks")
    BertForSequenceClassification(BertConfig(**SIZES, num_labels=2)).save_pretrained(folder / "plain")
    seal_checkpoint(folder / "plain")
    encoder.save_pretrained(folder / "encoder")
    for place in folder.iterdir():
        tokenizer.save_pretrained(place)
    return folder


@pytest.fixture
def copied(kept, tmp_path):
    return lambda kind: shutil.copytree(kept / kind, tmp_path / kind)


@pytest.fixture(autouse=True)
def asked_nothing(monkeypatch):
    """A question would be answered with yes, and is a failure; so is an unpickled file."""
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked"))
    monkeypatch.setattr(pickle, "loads", lambda *_: pytest.fail("unpickled"))
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("unpickled"))


def edit(folder, *, remove=(), name="config.json", **changes):
    path = folder / name
    settings = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in settings.items() if key not in remove}))


def refused(folder, words, load=load_classifier):
    with pytest.raises(ValueError, match=words) as caught:
        load(str(folder))
    assert "\n" not in str(caught.value)
    assert folder.name in str(caught.value)


def change_weights(folder, change):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def head(tensors):
    return next(name for name in sorted(tensors) if name in ("blocks.0.head.weight", "classifier.weight"))


def renamed(tensors):
    tensors["spoilt"] = tensors.pop("encoder.encoder.layer.0.output.dense.weight", None)
    if tensors["spoilt"] is None:
        tensors["spoilt"] = tensors.pop("bert.encoder.layer.0.output.dense.weight")


DAMAGES = {
    "the head is missing": (lambda tensors: tensors.pop(head(tensors)), r"lacks (blocks\.0\.head|classifier)\.weight"),
    "a name is damaged": (renamed, r"lacks .*layer\.0\.output\.dense\.weight"),
    "one too many": (lambda tensors: tensors.update(extra=torch.zeros(2)), "has unknown extra"),
    "another shape": (
        lambda tensors: tensors.update({head(tensors): torch.zeros(5, 5)}),
        "mismatch|size",
    ),
    "whole numbers": (
        lambda tensors: tensors.update({head(tensors): torch.zeros(tensors[head(tensors)].shape, dtype=torch.int32)}),
        r"other numbers for .*int32",
    ),
    "bytes": (
        lambda tensors: tensors.update({head(tensors): torch.zeros(tensors[head(tensors)].shape, dtype=torch.int8)}),
        r"other numbers for .*int8",
    ),
    "not a number": (lambda tensors: tensors[head(tensors)].fill_(float("nan")), "not all numbers of .* are finite"),
    "infinite": (lambda tensors: tensors[head(tensors)][0].fill_(float("-inf")), "not all numbers of .* are finite"),
    "nothing": (lambda tensors: tensors.clear(), "lacks|larger than its weights"),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("damage", DAMAGES)
def test_weights_that_are_not_all_there_are_named(copied, kind, damage):
    folder = copied(kind)
    change, words = DAMAGES[damage]
    change_weights(folder, change)
    edit(folder, remove=["sha256"])
    refused(folder, words)
    refused(folder, words, lambda place: find_checkpoint(place).model())
    if kind == "blocks":
        refused(folder, words, MHEXForSequenceClassification.from_pretrained)
        refused(folder, words, AutoModelForSequenceClassification.from_pretrained)


@pytest.mark.parametrize("kind", KINDS)
def test_one_bit_is_noticed_and_older_checkpoints_are_read(copied, kind):
    folder = copied(kind)
    wanted = load_classifier(str(folder))(input_ids=INPUT).logits
    raw = bytearray((folder / "model.safetensors").read_bytes())
    raw[-3] ^= 1
    (folder / "model.safetensors").write_bytes(raw)
    refused(folder, r"config\.json: the weights beside it are not those that were saved with it")
    raw[-3] ^= 1
    (folder / "model.safetensors").write_bytes(raw)
    edit(folder, remove=["sha256"])
    assert torch.equal(load_classifier(str(folder))(input_ids=INPUT).logits, wanted)
    edit(folder, sha256={"weights": "", "settings": ""})
    refused(folder, "not those that were saved")
    edit(folder, sha256=3)
    refused(folder, "not those that were saved")


@pytest.mark.parametrize("kind", KINDS)
def test_changed_settings_are_said(copied, kind):
    folder = copied(kind)
    edit(folder, id2label={"0": "no", "1": "yes"}, label2id={"no": 0, "yes": 1})
    with pytest.warns(UserWarning, match=r"config\.json was changed after it was saved"):
        model = load_classifier(str(folder))
    assert model.config.id2label[1] == "yes"
    # What is saved again is sealed anew.
    model.save_pretrained(folder)
    if kind == "plain":
        seal_checkpoint(folder)
    load_classifier(str(folder))


def test_shards_are_read_and_lie_beside_each_other(copied, tmp_path):
    model = load_classifier(str(copied("blocks")))
    model.save_pretrained(tmp_path / "shards", max_shard_size="10KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    assert torch.equal(load_classifier(str(tmp_path / "shards"))(input_ids=INPUT).logits, model(input_ids=INPUT).logits)
    index = tmp_path / "shards" / "model.safetensors.index.json"
    index.write_text(index.read_text().replace("model-00001", "../model-00001"))
    refused(tmp_path / "shards", "weight_map must say in which file beside it")


def test_half_precision_is_read(copied, tmp_path):
    model = load_classifier(str(copied("blocks"))).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "half")
    loaded = MHEXForSequenceClassification.from_pretrained(tmp_path / "half", dtype=torch.float32)
    assert {weight.dtype for weight in loaded.parameters()} == {torch.float32}


# ------------------------------------------------------------------------------------------------------------ encoders


def test_an_encoder_is_loaded_for_training_and_its_old_head_left(kept, tmp_path):
    MHEXForSequenceClassification.from_encoder(str(kept / "encoder"), 3)
    MHEXForSequenceClassification.from_encoder(str(kept / "plain"), 3)
    BertForPreTraining(BertConfig(**SIZES)).save_pretrained(tmp_path)
    MHEXForSequenceClassification.from_encoder(str(tmp_path), 3)
    refused(kept / "encoder", r"lacks classifier\.")


def test_an_encoder_of_which_a_part_is_missing_is_refused(copied):
    for kind in ("encoder", "plain"):
        folder = copied(kind)
        change_weights(folder, lambda tensors: tensors.pop(next(n for n in tensors if "layer.0.output.dense.w" in n)))
        edit(folder, remove=["sha256"])
        refused(
            folder,
            r"lacks .*layer\.0\.output\.dense\.weight",
            lambda place: MHEXForSequenceClassification.from_encoder(place, 2),
        )


def test_fewer_layers_than_the_file_has_are_refused_and_poolers_left_aside(copied):
    folder = copied("plain")
    change_weights(folder, lambda tensors: tensors.update({"bert.old.pooler.dense.weight": torch.zeros(2)}))
    edit(folder, remove=["sha256"])
    load_classifier(str(folder))
    edit(folder, num_hidden_layers=1)
    refused(folder, r"has unknown bert\.encoder\.layer\.1")


# ------------------------------------------------------------------------------------------------------- code, pickles


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("where", ["config", "encoder", "tokenizer", "unknown type"])
def test_code_of_a_checkpoint_never_runs_and_nobody_is_asked(copied, kind, where, monkeypatch):
    folder = copied(kind)
    (folder / "lurking.py").write_text("raise AssertionError('it was run')\n")
    names = {f"Auto{part}": "lurking.It" for part in ("Config", "Model", "ModelForSequenceClassification")}
    monkeypatch.undo()  # real questions, which are answered with yes
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 9))
    if where == "tokenizer":
        edit(folder, name="tokenizer_config.json", auto_map={"AutoTokenizer": ["lurking.It", "lurking.It"]})
        edit(folder, name="tokenizer_config.json", tokenizer_class="It")
    elif where == "unknown type":
        edit(folder, auto_map=names, model_type="lurking", remove=["sha256"])
    elif where == "encoder" and kind == "blocks":
        settings = json.loads((folder / "config.json").read_text())
        edit(folder, encoder=settings["encoder"] | {"auto_map": names}, remove=["sha256"])
    else:
        edit(folder, auto_map=names, remove=["sha256"])
    for load in (load_classifier, load_config, load_tokenizer, find_checkpoint):
        with contextlib.suppress(ValueError):
            load(str(folder))
    assert sys.stdin.tell() == 0
    assert not [name for name in sys.modules if name.endswith("lurking")]


def test_a_pickle_is_refused_by_name(copied):
    for kind in ("blocks", "plain", "encoder"):
        folder = copied(kind)
        (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
        words = "pytorch_model.bin is a pickle, which could run code"
        refused(folder, words)
        if kind != "blocks":
            refused(folder, words, lambda place: MHEXForSequenceClassification.from_encoder(place, 2))


def test_an_adapter_is_refused(copied):
    folder = copied("plain")
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "somebody/something"}')
    refused(folder, "adapter of another model; merge it")


# ----------------------------------------------------------------------------------------------------------- settings

SETTINGS = {
    "layers": ({"num_hidden_layers": 100_000}, "num_hidden_layers must be at most 256, got 100000"),
    "width": ({"hidden_size": 10**8}, "larger than its weights"),
    "positions": ({"max_position_embeddings": 10**9}, "larger than its weights"),
    "vocabulary": ({"vocab_size": 10**15}, "vocab_size must be at most"),
    "attention from the hub": (
        {"attn_implementation": "somebody/kernels"},
        "attn_implementation must be an attention that is installed",
    ),
    "quantised": ({"quantization_config": {"quant_method": "bitsandbytes"}}, "quantised weights are not read"),
    "a text": ({"hidden_size": "wide"}, "config.json|encoder|blocks|plain"),
    "nothing": ({"intermediate_size": None}, "config.json|encoder|blocks|plain"),
    "negative": ({"intermediate_size": -3}, "config.json|encoder|blocks|plain"),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", SETTINGS)
def test_settings_that_cannot_be_are_named_before_memory_is_asked_for(copied, kind, case):
    folder = copied(kind)
    changes, words = SETTINGS[case]
    settings = json.loads((folder / "config.json").read_text())
    edit(folder, **({"encoder": settings["encoder"] | changes} if kind == "blocks" else changes), remove=["sha256"])
    refused(folder, words)


@pytest.mark.parametrize("text", ["", "{", "[]", "[" * 100_000, '{"num_labels": 1000000000, "model_type": "bert"}'])
def test_a_config_that_is_none_is_named(copied, text):
    folder = copied("plain")
    (folder / "config.json").write_text(text)
    refused(folder, r"config\.json (cannot be used|must be)")
    refused(folder, r"config\.json (cannot be used|must be)", find_checkpoint)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"version": "1.0", "model": 3}', '{"model": {"type": "WordPiece"}}'])
def test_a_damaged_tokenizer_is_named(copied, text):
    folder = copied("blocks")
    (folder / "tokenizer.json").write_text(text)
    refused(folder, "the tokenizer of .* cannot be used", load_tokenizer)
    refused(folder, "the tokenizer of .* cannot be used", find_checkpoint)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_file_that_is_missing_is_named(copied, name):
    folder = copied("blocks")
    (folder / name).unlink()
    with pytest.raises(OSError, match=f"blocks is no checkpoint: {name} is missing"):
        load_classifier(str(folder))


@pytest.mark.parametrize("command", ["explain", "batch"])
def test_the_folder_of_the_other_package_is_told(tmp_path, capsys, command):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text('{"mhex_vision_format": 1}')
    (tmp_path / "texts.txt").write_text("a good film\n")
    line = [command, "--checkpoint", str(tmp_path / "run"), "--input", str(tmp_path / "texts.txt")]
    assert cli.main([*line, "--out", str(tmp_path / "out")]) == 1
    (complaint,) = capsys.readouterr().err.splitlines()
    assert "an image classifier with blocks, which mhex-vision reads" in complaint
