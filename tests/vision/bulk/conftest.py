"""What the tests of bulk runs share: images in every kind of container, and a classifier in a folder."""

from __future__ import annotations

import io
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

from mhex_vision import MHEXClassifier, Preprocessing
from mhex_vision.plain import PlainClassifier

SIDE = 32


def noise(seed=0, size=(40, 36)):
    """Coarse noise, so that pictures differ in what a network sees of them."""
    values = np.random.default_rng(seed).integers(0, 255, size=(6, 6, 3), dtype=np.uint8)
    return Image.fromarray(values).resize(size, Image.Resampling.BICUBIC)


def encoded(image, kind="PNG"):
    file = io.BytesIO()
    image.save(file, format=kind)
    return file.getvalue()


def shaken(model, seed=0):
    """Weights and statistics that make a difference between images and classes visible."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.03 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


@pytest.fixture(scope="session")
def picture():
    """Makes a Pillow image out of a number."""
    return noise


@pytest.fixture(scope="session")
def encode():
    """An image as the bytes of a file."""
    return encoded


@pytest.fixture
def photos(tmp_path):
    """A folder of images, the damaged ones among them, and what is none."""
    folder = tmp_path / "photos"
    (folder / "b" / "deep").mkdir(parents=True)
    (folder / ".thumbnails").mkdir()
    for seed, name in enumerate(("a.png", "b/a.jpg", "b/deep/x.PNG", "c.gif", ".hidden.png", ".thumbnails/a.png")):
        noise(seed).save(folder / name)
    (folder / "empty.png").write_bytes(b"")
    (folder / "text.png").write_text("not an image\n")
    whole = encoded(noise(9), "JPEG")
    (folder / "b" / "cut.jpg").write_bytes(whole[: len(whole) // 3])
    (folder / "notes.md").write_text("text")
    (folder / "paper.pdf").write_bytes(b"%PDF-1.7")
    return folder


@pytest.fixture
def make_tar():
    """Packs (name, bytes) into a tar file."""

    def make(path, members, **options):
        with tarfile.open(path, "w", **options) as archive:
            for name, data in members:
                member = tarfile.TarInfo(name)
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
        return path

    return make


@pytest.fixture(scope="session")
def run_folder(tmp_path_factory):
    """A run of a classifier with blocks."""
    torch.manual_seed(0)
    model = MHEXClassifier.from_backbone("resnet18", 3, at="stage", image_size=SIDE)
    model.with_metadata(class_names=("disc", "ring", "cross"), preprocessing=Preprocessing(size=SIDE))
    folder = tmp_path_factory.mktemp("runs") / "mhex"
    shaken(model).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def plain_folder(tmp_path_factory):
    """A run of a network without blocks, whose classes have no names and are independent of each other."""
    torch.manual_seed(1)
    model = PlainClassifier.from_name("resnet18", 3, multi_label=True)
    folder = tmp_path_factory.mktemp("runs") / "plain"
    shaken(model.with_metadata(preprocessing=Preprocessing(size=SIDE, resize="crop"))).save_pretrained(folder)
    return folder
