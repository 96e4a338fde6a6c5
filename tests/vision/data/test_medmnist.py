import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mhex_vision.data import load_data
from mhex_vision.data.medmnist import MEDMNIST_2D, is_medmnist, medmnist_bundle
from mhex_vision.data.sets import DataBundle

medmnist = pytest.importorskip("medmnist")


def arrays(*, size: int = 28, channels: int = 3, classes: int = 8, multi_label: bool = False) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    made = {}
    for split, count in (("train", 12), ("val", 5), ("test", 7)):
        shape = (count, size, size, 3) if channels == 3 else (count, size, size)
        made[f"{split}_images"] = rng.integers(0, 256, shape, dtype=np.uint8)
        limit, columns = (2, classes) if multi_label else (classes, 1)
        made[f"{split}_labels"] = rng.integers(0, limit, (count, columns)).astype(np.uint8)
    return made


def lengths(bundle: DataBundle) -> list[int]:
    assert bundle.validation is not None
    assert bundle.test is not None
    return [len(bundle.train), len(bundle.validation), len(bundle.test)]


def test_names_are_those_of_the_package() -> None:
    assert set(MEDMNIST_2D) == {name for name in medmnist.INFO if not name.endswith("3d")}
    assert is_medmnist("BloodMNIST")
    assert not is_medmnist("organmnist3d")


@pytest.mark.parametrize("name", MEDMNIST_2D)
def test_every_set(tmp_path: Path, name: str) -> None:
    info = medmnist.INFO[name]
    multi_label = name == "chestmnist"
    source = arrays(channels=info["n_channels"], classes=len(info["label"]), multi_label=multi_label)
    np.savez_compressed(tmp_path / f"{name}.npz", **source)
    bundle = load_data(name, root=tmp_path, download=False)
    assert bundle.name == name
    assert bundle.multi_label == multi_label
    assert list(bundle.class_names) == list(info["label"].values())
    assert lengths(bundle) == [12, 5, 7]
    assert bundle.preprocessing.size == 28
    batch = bundle.train.__getitems__([3, 0])
    assert batch.images.shape == (2, 3, 28, 28)
    assert batch.images.is_contiguous()
    expected = source["train_images"][[3, 0]]
    if info["n_channels"] == 1:
        expected = np.stack([expected] * 3, axis=-1)
    assert np.array_equal(batch.images.permute(0, 2, 3, 1).numpy(), expected)
    labels = source["train_labels"][[3, 0]]
    if multi_label:
        assert batch.labels.dtype == torch.float32
        assert np.array_equal(batch.labels.numpy(), labels)
    else:
        assert batch.labels.dtype == torch.int64
        assert np.array_equal(batch.labels.numpy(), labels[:, 0])


def test_grey_is_stored_once(tmp_path: Path) -> None:
    np.savez(tmp_path / "breastmnist.npz", **arrays(channels=1, classes=2))
    images = medmnist_bundle("breastmnist", root=tmp_path).train.images  # type: ignore[union-attr]
    assert images.untyped_storage().nbytes() == 12 * 28 * 28


def test_larger_size_has_its_own_file(tmp_path: Path) -> None:
    np.savez(tmp_path / "bloodmnist_64.npz", **arrays(size=64))
    bundle = medmnist_bundle("BloodMNIST", root=str(tmp_path), size=64)
    assert bundle.name == "bloodmnist_64"
    assert bundle.preprocessing.size == 64
    assert bundle.train[0].images.shape == (1, 3, 64, 64)


def test_volumes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"2-D MedMNIST set, one of pathmnist, .*organsmnist; got 'organmnist3d'"):
        load_data("organmnist3d")


@pytest.mark.parametrize("size", [32, 28.5, True])
def test_other_sizes_are_refused(tmp_path: Path, size: Any) -> None:
    with pytest.raises(ValueError, match="size: expected one of 28, 64, 128, 224"):
        medmnist_bundle("bloodmnist", root=tmp_path, size=size)


def test_missing_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "medmnist", None)
    with pytest.raises(ImportError, match=r'pip install "mhex-vision\[medmnist\]"'):
        load_data("bloodmnist", root=tmp_path)


def test_absent_file_without_download(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"bloodmnist_128\.npz"):
        medmnist_bundle("bloodmnist", root=tmp_path, size=128, download=False)


def test_download(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def fetch(self: Any) -> None:
        calls.append(self.flag)
        np.savez(Path(self.root) / f"{self.flag}{self.size_flag}.npz", **arrays(size=self.size))

    monkeypatch.setattr(medmnist.BloodMNIST, "download", fetch)
    root = tmp_path / "new" / "folder"
    for _ in range(2):
        assert lengths(medmnist_bundle("bloodmnist", root=root, size=64)) == [12, 5, 7]
    assert calls == ["bloodmnist"]
    assert [path.name for path in root.iterdir()] == ["bloodmnist_64.npz"]


def test_failed_download(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fetch(self: Any) -> None:
        (Path(self.root) / "bloodmnist.npz").write_bytes(b"half a file")
        raise RuntimeError("\n Automatic download failed!\n")

    monkeypatch.setattr(medmnist.BloodMNIST, "download", fetch)
    with pytest.raises(OSError, match=r"could not download bloodmnist\.npz: .* put it into") as caught:
        medmnist_bundle("bloodmnist", root=tmp_path)
    assert str(tmp_path) in str(caught.value)
    assert not list(tmp_path.iterdir())


class TestForeignFiles:
    @pytest.mark.parametrize(
        "content", [b"", b"<html></html>", b"PK\x03\x04 and no more", b"\x93NUMPY\x01\x00", b"\x80\x04K\x01."]
    )
    def test_no_archive(self, tmp_path: Path, content: bytes) -> None:
        (tmp_path / "bloodmnist.npz").write_bytes(content)
        self.check(tmp_path, "")

    def test_single_array(self, tmp_path: Path) -> None:
        with (tmp_path / "bloodmnist.npz").open("wb") as file:
            np.save(file, np.zeros(3))
        self.check(tmp_path, "single array")

    def test_cut_short(self, tmp_path: Path) -> None:
        path = tmp_path / "bloodmnist.npz"
        np.savez_compressed(path, **arrays())
        path.write_bytes(path.read_bytes()[:-300])
        self.check(tmp_path, "")

    def test_damaged_inside(self, tmp_path: Path) -> None:
        path = tmp_path / "bloodmnist.npz"
        np.savez_compressed(path, **arrays())
        data = bytearray(path.read_bytes())
        data[2000:2100] = bytes(100)
        path.write_bytes(bytes(data))
        self.check(tmp_path, "")

    def test_pickled(self, tmp_path: Path) -> None:
        np.savez(tmp_path / "bloodmnist.npz", **arrays() | {"train_images": np.array([{"a": 1}], dtype=object)})
        self.check(tmp_path, "allow_pickle")

    @pytest.mark.parametrize(
        ("changed", "words"),
        [
            ({"val_labels": None}, "val_labels"),
            ({"train_images": np.zeros((12, 28, 28, 3))}, "train_images: .*float64"),
            ({"train_images": np.zeros((12, 64, 64, 3), dtype=np.uint8)}, r"train_images: .*\(12, 64, 64, 3\)"),
            ({"train_images": np.zeros((0, 28, 28, 3), dtype=np.uint8)}, r"train_images: .*\(0, 28"),
            ({"test_labels": np.zeros((6, 1), dtype=np.uint8)}, r"test_labels: .*\(7, 1\).*\(6, 1\)"),
            ({"test_labels": np.zeros((7, 1))}, "test_labels: .*float64"),
            ({"test_labels": np.full((7, 1), 8)}, "test_labels: .*0 to 7, got 8"),
        ],
    )
    def test_other_content(self, tmp_path: Path, changed: dict[str, np.ndarray | None], words: str) -> None:
        content = {key: value for key, value in (arrays() | changed).items() if value is not None}
        np.savez(tmp_path / "bloodmnist.npz", **content)
        self.check(tmp_path, words)

    def check(self, root: Path, words: str) -> None:
        with pytest.raises(ValueError, match=f"bloodmnist.npz: not a readable MedMNIST file: .*{words}") as caught:
            medmnist_bundle("bloodmnist", root=root)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("name", "counts"), [("bloodmnist", [11959, 1712, 3421]), ("breastmnist", [546, 78, 156])])
def test_real_files(name: str, counts: list[int]) -> None:
    if "MHEX_DATA" not in os.environ:
        pytest.skip("MHEX_DATA does not name a folder with real data")
    root = Path(os.environ["MHEX_DATA"]) / "medmnist"
    if not (root / f"{name}.npz").is_file():
        pytest.skip(f"no {name}.npz under MHEX_DATA")
    bundle = load_data(name, root=root)
    assert lengths(bundle) == counts
    batch = bundle.train.__getitems__(list(range(64)))
    assert batch.images.shape == (64, 3, 28, 28)
    assert batch.images.float().std() > 10
    assert batch.labels.max() < bundle.num_classes
