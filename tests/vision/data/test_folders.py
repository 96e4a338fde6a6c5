import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mhex_vision.data import DataBundle, load_data
from mhex_vision.data.folders import folder_bundle
from mhex_vision.data.sets import FolderImages


def fill(folder: Path, **counts: int) -> None:
    """Put so many images into each class folder."""
    for name, count in counts.items():
        (folder / name).mkdir(parents=True)
        for number in range(count):
            colour = (number % 256, len(name), 7)
            Image.new("RGB", (12, 10), colour).save(folder / name / f"{number:03d}.png")


def files(split: object) -> list[str]:
    assert isinstance(split, FolderImages)
    return [f"{Path(path).parent.name}/{Path(path).name}" for path in split.paths]


def per_class(split: object) -> list[int]:
    assert isinstance(split, FolderImages)
    return split.labels.bincount().tolist()


def everything(bundle: DataBundle) -> list[str]:
    return files(bundle.train) + files(bundle.validation) + files(bundle.test)


class TestFolderOfClasses:
    def test_is_split_by_class(self, tmp_path: Path) -> None:
        fill(tmp_path, cat=40, ant=20, bee=3)
        bundle = folder_bundle(tmp_path, size=16)
        assert bundle.name == tmp_path.name
        assert bundle.class_names == ("ant", "bee", "cat")
        assert per_class(bundle.train) == [16, 1, 32]
        assert per_class(bundle.validation) == [2, 1, 4]
        assert per_class(bundle.test) == [2, 1, 4]
        assert len(set(everything(bundle))) == 63
        for path, label in zip(files(bundle.test), bundle.test.labels.tolist(), strict=True):  # type: ignore[union-attr]
            assert path.startswith(bundle.class_names[label])

    def test_split_depends_on_the_seed_alone(self, tmp_path: Path) -> None:
        fill(tmp_path, ant=30, bee=30)
        first, again, other = (folder_bundle(tmp_path, seed=seed) for seed in (0, 0, 1))
        assert everything(first) == everything(again)
        assert files(first.test) != files(other.test)

    def test_new_class_leaves_the_others_where_they_are(self, tmp_path: Path) -> None:
        fill(tmp_path, bee=30, cat=30)
        before = set(files(folder_bundle(tmp_path).test))
        fill(tmp_path, ant=30)
        assert before < set(files(folder_bundle(tmp_path).test))

    def test_hidden_and_foreign_files_do_not_count(self, tmp_path: Path) -> None:
        fill(tmp_path, ant=5, bee=5)
        fill(tmp_path, **{".cache": 2, "__MACOSX": 2})
        (tmp_path / "ant" / "._000.png").write_bytes(b"resource fork")
        (tmp_path / "ant" / "notes.txt").write_text("text")
        (tmp_path / "readme.md").write_text("text")
        fill(tmp_path / "ant", **{".thumbs": 2, "deeper": 2})
        bundle = folder_bundle(tmp_path)
        assert bundle.class_names == ("ant", "bee")
        names = everything(bundle)
        assert len(names) == 12
        assert sum(name.startswith("deeper") for name in names) == 2

    def test_too_few_to_split(self, tmp_path: Path) -> None:
        fill(tmp_path, ant=10, bee=2)
        with pytest.raises(ValueError, match=r"bee: expected at least 3 images .*, got 2; .*test"):
            folder_bundle(tmp_path)

    def test_a_class_may_be_called_train(self, tmp_path: Path) -> None:
        fill(tmp_path, bus=5, train=5)
        assert folder_bundle(tmp_path).class_names == ("bus", "train")


class TestSplitFolders:
    @pytest.mark.parametrize("name", ["val", "valid", "validation", "Val"])
    def test_all_given(self, tmp_path: Path, name: str) -> None:
        fill(tmp_path / "train", ant=4, bee=5)
        fill(tmp_path / name, ant=2, bee=1)
        fill(tmp_path / "test", bee=3)
        bundle = folder_bundle(tmp_path)
        assert bundle.class_names == ("ant", "bee")
        assert per_class(bundle.train) == [4, 5]
        assert per_class(bundle.validation) == [2, 1]
        assert per_class(bundle.test) == [0, 3]

    def test_validation_is_carved_from_train(self, tmp_path: Path) -> None:
        fill(tmp_path / "Train", ant=20, bee=30)
        fill(tmp_path / "Test", ant=2, bee=2)
        bundle = folder_bundle(tmp_path)
        assert per_class(bundle.train) == [18, 27]
        assert per_class(bundle.validation) == [2, 3]
        assert not set(files(bundle.train)) & set(files(bundle.validation))

    def test_validation_stands_in_for_test(self, tmp_path: Path) -> None:
        fill(tmp_path / "train", ant=20, bee=30)
        bundle = folder_bundle(tmp_path)
        assert bundle.test is bundle.validation

    def test_other_folders_beside_are_ignored(self, tmp_path: Path) -> None:
        fill(tmp_path / "train", ant=4, bee=5)
        fill(tmp_path / "docs", figures=1)
        assert folder_bundle(tmp_path).class_names == ("ant", "bee")

    def test_flat_validation(self, tmp_path: Path) -> None:
        fill(tmp_path / "train", ant=4, bee=5)
        fill(tmp_path, val=4)
        with pytest.raises(ValueError, match=r"val: expected one sub-folder per class.* got no sub-folder"):
            folder_bundle(tmp_path)

    def test_flat_train(self, tmp_path: Path) -> None:
        fill(tmp_path, train=4, test=4)
        with pytest.raises(ValueError, match="train: expected one sub-folder per class"):
            folder_bundle(tmp_path)

    def test_no_train(self, tmp_path: Path) -> None:
        fill(tmp_path / "val", ant=4, bee=5)
        fill(tmp_path / "test", ant=4, bee=5)
        with pytest.raises(ValueError, match="expected a folder train next to val, test"):
            folder_bundle(tmp_path)

    def test_two_validations(self, tmp_path: Path) -> None:
        for name in ("train", "val", "valid"):
            fill(tmp_path / name, ant=4, bee=5)
        with pytest.raises(ValueError, match="one folder of validation images, got val, valid"):
            folder_bundle(tmp_path)

    def test_unknown_class_in_test(self, tmp_path: Path) -> None:
        fill(tmp_path / "train", ant=4, bee=5)
        fill(tmp_path / "test", ant=4, Bee=5)
        with pytest.raises(ValueError, match=r"test: expected only classes that .*train has, got also Bee"):
            folder_bundle(tmp_path)

    def test_class_without_images(self, tmp_path: Path) -> None:
        fill(tmp_path / "train", ant=4, bee=0)
        (tmp_path / "train" / "bee" / "notes.txt").write_text("text")
        with pytest.raises(ValueError, match=r"train: expected images \(.*jpg.*got none in bee"):
            folder_bundle(tmp_path)


class TestLoadData:
    def test_folder(self, tmp_path: Path) -> None:
        fill(tmp_path / "insects", ant=5, bee=5)
        for bundle in (
            load_data(tmp_path / "insects"),
            load_data(str(tmp_path / "insects")),
            load_data("insects", root=tmp_path),
            load_data(Path("insects"), root=str(tmp_path)),
        ):
            assert bundle.name == "insects"
            assert bundle.preprocessing.size == 224
        bundle = load_data("insects", root=tmp_path, size=20)
        assert bundle.train[0].images.shape == (1, 3, 20, 20)

    def test_a_path_is_a_folder_whatever_its_name(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        fill(tmp_path / "bloodmnist", ant=5, bee=5)
        monkeypatch.chdir(tmp_path)
        assert load_data(Path("bloodmnist")).class_names == ("ant", "bee")

    @pytest.mark.parametrize("name", ["no-such-set", ""])
    def test_neither_name_nor_folder(self, tmp_path: Path, name: str) -> None:
        with pytest.raises(ValueError, match=r"synthetic-lesions, .*bloodmnist.* no folder") as caught:
            load_data(name, root=tmp_path)
        assert str(tmp_path) in str(caught.value)

    def test_wrong_type(self) -> None:
        with pytest.raises(TypeError, match="name: "):
            load_data(3)  # type: ignore[arg-type]

    @pytest.mark.parametrize("size", [0, "big"])
    def test_bad_size(self, tmp_path: Path, size: int) -> None:
        fill(tmp_path, ant=5, bee=5)
        with pytest.raises((ValueError, TypeError), match="size: "):
            load_data(tmp_path, size=size)

    def test_no_class_folders(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="one sub-folder per class"):
            load_data(tmp_path)

    def test_no_folder(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError, match=r"folder: .*not there"):
            folder_bundle(tmp_path / "none")
        (tmp_path / "file").touch()
        with pytest.raises(FileNotFoundError, match=r"folder: .*is a file"):
            folder_bundle(tmp_path / "file")


def test_real_folder() -> None:
    if "MHEX_DATA" not in os.environ:
        pytest.skip("MHEX_DATA does not name a folder with real data")
    root = Path(os.environ["MHEX_DATA"])
    if not (root / "blood224").is_dir():
        pytest.skip("no blood224 under MHEX_DATA")
    bundle = load_data("blood224", root=root)
    assert bundle.num_classes == 8
    assert per_class(bundle.train) == [108] * 8
    assert per_class(bundle.validation) == [12] * 8
    assert per_class(bundle.test) == [30] * 8
    images = bundle.train.__getitems__([0, 200]).images
    assert images.shape == (2, 3, 224, 224)
    assert np.std(images.numpy()) > 10
