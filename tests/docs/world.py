"""What the pages of the documentation find around them: stand-ins for a user's files and for what would be downloaded.

`python world.py FOLDER` makes

- `FOLDER/home`: HOME with MedMNIST's bloodmnist.npz (28 px, few images), the hub's cache with encoders of random
  weights under the names that the pages use, and torch's cache with networks of random weights;
- `FOLDER/files`: what lies in the folder where a page's blocks run: photos/, archive/, new/, reviews.csv and
  reviews.jsonl.

Small is all that is special about them: what is run on them is what a user would run.
"""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image

CLASSES = {"beech": (40, 90, 30), "oak": (110, 80, 20), "spruce": (10, 60, 60)}
ENCODERS = ("distilbert-base-uncased", "distilbert/distilbert-base-uncased", "bert-base-uncased")
GOOD = ("a clever plot", "not a dull minute", "the cast shines", "warm and funny", "a joy to watch")
BAD = ("a plot as thin as its hero", "dull and far too long", "the cast sleeps", "cold and loud", "a waste of time")
REVISION = "0" * 40


def main(folder: Path) -> None:
    home, files = folder / "home", folder / "files"
    write_blood(home / ".medmnist" / "bloodmnist.npz")
    write_resnet(home / "torch" / "hub" / "checkpoints" / "resnet18-f37072fd.pth")
    write_encoders(home / "huggingface" / "hub")
    for name, count in (("photos", 4), ("new", 1)):
        write_photos(files / name, count)
    write_flat(files / "archive", 6)
    write_reviews(files)


def environment(folder: Path) -> dict[str, str]:
    """Where a process finds the stand-ins."""
    home = folder / "home"
    return {
        "HOME": str(home),
        "HF_HOME": str(home / "huggingface"),
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "TORCH_HOME": str(home / "torch"),
        "MPLCONFIGDIR": str(home / "matplotlib"),
        "OMP_NUM_THREADS": "1",
        "OMP_WAIT_POLICY": "PASSIVE",
    }


def write_blood(path: Path) -> None:
    """Eight classes of discs in colours of their own, in MedMNIST's form."""
    random = np.random.default_rng(0)
    rows, columns = np.mgrid[:28, :28]
    arrays = {}
    for split, count in (("train", 32), ("val", 8), ("test", 16)):
        labels = np.arange(count) % 8
        images = random.integers(180, 256, (count, 28, 28, 3))
        for image, label in zip(images, labels, strict=True):
            x, y = random.integers(10, 18, 2)
            colour = [(label & bit > 0) * 150 + 20 for bit in (1, 2, 4)]
            image[(rows - y) ** 2 + (columns - x) ** 2 < 49] = colour
        arrays |= {f"{split}_images": images.astype(np.uint8), f"{split}_labels": labels[:, None].astype(np.uint8)}
    path.parent.mkdir(parents=True)
    np.savez(path, **arrays)


def write_resnet(path: Path) -> None:
    from torchvision.models import resnet18

    torch.manual_seed(0)
    path.parent.mkdir(parents=True)
    torch.save(resnet18().state_dict(), path)


def write_photos(folder: Path, count: int) -> None:
    """A folder per class."""
    for name, colour in CLASSES.items():
        (folder / name).mkdir(parents=True)
        for number in range(count):
            picture(colour, seed=number + len(name)).save(folder / name / f"{name}-{number}.png")


def write_flat(folder: Path, count: int) -> None:
    folder.mkdir(parents=True)
    colours = list(CLASSES.values())
    for number in range(count):
        picture(colours[number % len(colours)], seed=number).save(folder / f"{number:03}.png")


def picture(colour: tuple[int, int, int], *, seed: int) -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 80, (48, 64, 3))
    return Image.fromarray((noise + np.array(colour)).astype(np.uint8))


def write_reviews(folder: Path) -> None:
    """Labelled reviews as CSV, and texts alone as JSON Lines."""
    rows = [
        (f"{text}, {other}", label)
        for texts, label in ((GOOD, "good"), (BAD, "bad"))
        for text in texts
        for other in texts
    ]
    with (folder / "reviews.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label"])
        writer.writerows(rows[::2])
    lines = (json.dumps({"text": text}) for text in (*GOOD[:3], *BAD[:3]))
    (folder / "reviews.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def write_encoders(hub: Path) -> None:
    """Small encoders of random weights with a tokenizer of the reviews' words, as the hub's cache keeps them."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import BertConfig, BertModel, DistilBertConfig, DistilBertModel, PreTrainedTokenizerFast

    words = sorted({word for text in (*GOOD, *BAD) for word in text.split()})
    letters = list("abcdefghijklmnopqrstuvwxyz,.'")
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words, *letters, *(f"##{letter}" for letter in letters)]
    vocabulary = {piece: number for number, piece in enumerate(dict.fromkeys(pieces))}
    core = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    core.normalizer = normalizers.BertNormalizer()
    core.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    core.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[(token, vocabulary[token]) for token in ("[CLS]", "[SEP]")],
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        model_max_length=512,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
    )
    torch.manual_seed(0)
    for name in ENCODERS:
        if "distil" in name:
            model = DistilBertModel(
                DistilBertConfig(vocab_size=len(vocabulary), dim=32, hidden_dim=64, n_heads=4, n_layers=4)
            )
        else:
            model = BertModel(
                BertConfig(
                    vocab_size=len(vocabulary),
                    hidden_size=32,
                    intermediate_size=64,
                    num_attention_heads=4,
                    num_hidden_layers=4,
                )
            )
        place = hub / f"models--{name.replace('/', '--')}"
        snapshot = place / "snapshots" / REVISION
        snapshot.mkdir(parents=True)
        (place / "refs").mkdir()
        (place / "refs" / "main").write_text(REVISION)
        model.save_pretrained(snapshot)
        tokenizer.save_pretrained(snapshot)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
