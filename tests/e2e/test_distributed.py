"""Training on two processes, through the launchers and the command lines that users have."""

from __future__ import annotations

import json
import os

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

LAUNCHERS = {
    "torchrun": ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2, "--module"),
    # With --cpu it would start one process however many were asked for; where no GPU is seen, this is as good.
    "accelerate": (
        *("-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", 2, "--num_machines", 1),
        *("--mixed_precision", "no", "--dynamo_backend", "no", "--module"),
    ),
}
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}


@pytest.fixture
def photos(tmp_path):
    """A folder per class; the classes differ in colour."""
    random = np.random.default_rng(0)
    for name, channel in (("blue", 2), ("red", 0)):
        folder = tmp_path / "photos" / name
        folder.mkdir(parents=True)
        for number in range(12):
            pixels = random.integers(0, 96, (32, 32, 3), dtype=np.uint8)
            pixels[..., channel] += 128
            Image.fromarray(pixels).save(folder / f"{number}.png")
    return tmp_path / "photos"


@pytest.fixture
def reviews(tmp_path):
    rows = [f"{('good', 'bad')[number % 2]} film {number},{number % 2}" for number in range(48)]
    (tmp_path / "reviews.csv").write_text("\n".join(["text,label", *rows]) + "\n")
    return tmp_path / "reviews.csv"


@pytest.fixture
def encoder(tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "good", "bad", "film"]
    tokens = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="[UNK]"))
    tokens.pre_tokenizer = pre_tokenizers.Whitespace()
    tokens.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = {f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep", "mask")}
    folder = tmp_path / "encoder"
    PreTrainedTokenizerFast(tokenizer_object=tokens, model_max_length=16, **names).save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    BertModel(BertConfig(vocab_size=len(words), max_position_embeddings=16, **sizes)).save_pretrained(folder)
    return folder


def launched(python, launcher, module, command):
    words = " ".join(map(str, command)).split()
    return python.run(*LAUNCHERS[launcher], module, *words, environment=ENVIRONMENT, timeout=240)


def recorded(done, out):
    """What a run that came to its end says of itself."""
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.count(f"wrote {out}") == 1  # of several processes one speaks
    assert {"config.json", "log.csv", "model.safetensors", "run.json"} <= {path.name for path in out.iterdir()}
    return json.loads((out / "run.json").read_text())


@pytest.mark.slow
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_images(vision_python, photos, tmp_path, launcher):
    out = tmp_path / "run"
    options = f"--size 32 --backbone resnet18 --at stage --epochs 1 --batch-size 4 --out {out}"
    done = launched(vision_python, launcher, "mhex_vision.cli", ["train", "--data", photos, options])
    assert recorded(done, out)["settings"]["processes"] == 2


@pytest.mark.parametrize("launcher", ["torchrun", pytest.param("accelerate", marks=pytest.mark.slow)])
def test_texts(text_python, reviews, encoder, tmp_path, launcher):
    out = tmp_path / "run"
    options = f"--encoder {encoder} --epochs 1 --batch-size 4 --max-length 8 --out {out}"
    done = launched(text_python, launcher, "mhex_text.cli", ["train", "--data", reviews, options])
    assert recorded(done, out)["processes"] == 2
