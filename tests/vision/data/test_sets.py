import pickle
import warnings
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from mhex_vision.data import Batch, DataBundle, Preprocessing, UnreadableImageWarning, keep_batch
from mhex_vision.data.augment import imagenet_augmentation
from mhex_vision.data.sets import ArrayImages, FolderImages


def array_images(count: int = 10, *, masks: bool = False) -> ArrayImages:
    images = torch.arange(count, dtype=torch.uint8).view(-1, 1, 1, 1).repeat(1, 3, 4, 5)
    return ArrayImages(images, torch.arange(count) % 3, torch.ones(count, 4, 5, dtype=torch.bool) if masks else None)


@pytest.fixture
def samples(tmp_path: Path) -> list[tuple[str | Path, int]]:
    """Nine images of their number's grey and, at place 4, a broken file."""
    made: list[tuple[str | Path, int]] = []
    for number in range(10):
        path = tmp_path / f"{number}.png"
        Image.new("RGB", (20 + number, 16), (number * 10,) * 3).save(path)
        made.append((path, number % 2))
    (tmp_path / "4.png").write_bytes(b"broken")
    return made


class TestArrayImages:
    def test_a_slice_is_a_batch(self) -> None:
        data = array_images(masks=True)
        assert data[2:5].images[:, 0, 0, 0].tolist() == [2, 3, 4]
        assert data[-2:].labels.tolist() == data.labels[-2:].tolist()
        assert len(data[4:4].images) == 0

    def test_batch_in_the_order_asked_for(self) -> None:
        batch = array_images(masks=True).__getitems__([7, 2, 2])
        assert isinstance(batch, Batch)
        assert batch.images[:, 0, 0, 0].tolist() == [7, 2, 2]
        assert batch.labels.tolist() == [1, 2, 2]
        assert batch.masks is not None
        assert batch.masks.shape == (3, 4, 5)

    def test_single_image_is_a_batch_of_one(self) -> None:
        data = array_images()
        assert data[3].images.shape == (1, 3, 4, 5)
        assert data[3].masks is None
        assert data[-1].images[0, 0, 0, 0] == 9
        for index in (10, -11):
            with pytest.raises(IndexError, match=r"index: .*10 images"):
                data[index]

    @pytest.mark.parametrize("workers", [0, 2])
    def test_in_a_loader(self, workers: int) -> None:
        loader = DataLoader(array_images(), batch_size=4, collate_fn=keep_batch, num_workers=workers)
        batches = list(loader)
        assert all(isinstance(batch, Batch) for batch in batches)
        assert [len(batch.images) for batch in batches] == [4, 4, 2]
        assert torch.cat([batch.images[:, 0, 0, 0] for batch in batches]).tolist() == list(range(10))

    def test_views_come_out_contiguous(self) -> None:
        grey = torch.arange(6, dtype=torch.uint8).view(6, 1, 1, 1).expand(6, 3, 4, 4)
        colour = torch.zeros(6, 4, 4, 3, dtype=torch.uint8).permute(0, 3, 1, 2)
        for images in (grey, colour):
            assert ArrayImages(images, torch.zeros(6, dtype=torch.int64)).__getitems__([5, 1]).images.is_contiguous()

    def test_several_labels(self) -> None:
        data = ArrayImages(torch.zeros(4, 3, 2, 2, dtype=torch.uint8), torch.eye(4))
        assert data.__getitems__([2]).labels.tolist() == [[0, 0, 1, 0]]

    @pytest.mark.parametrize(
        ("change", "error", "words"),
        [
            ({"images": torch.zeros(4, 3, 2, 2)}, TypeError, "images: .*float32"),
            ({"images": torch.zeros(4, 2, 2, dtype=torch.uint8)}, ValueError, "images: .*shape"),
            ({"images": [1]}, TypeError, "images: .*list"),
            ({"labels": torch.zeros(4)}, TypeError, "labels: .*float32"),
            ({"labels": torch.zeros(3, dtype=torch.int64)}, ValueError, "labels: .*4 rows.*3"),
            ({"labels": torch.full((4,), -1)}, ValueError, "labels: .*-1"),
            ({"masks": torch.zeros(4, 2, 2)}, TypeError, "masks: .*float32"),
            ({"masks": torch.zeros(4, 2, 3, dtype=torch.bool)}, ValueError, "masks: .*shape"),
        ],
    )
    def test_refuses_what_does_not_fit(self, change: dict, error: type[Exception], words: str) -> None:
        fitting = {"images": torch.zeros(4, 3, 2, 2, dtype=torch.uint8), "labels": torch.zeros(4, dtype=torch.int64)}
        with pytest.raises(error, match=words):
            ArrayImages(**fitting | change)


class TestFolderImages:
    def test_unreadable_file_is_left_out_by_name(self, samples: list[tuple[str | Path, int]]) -> None:
        data = FolderImages(samples, Preprocessing(size=8))
        with pytest.warns(UnreadableImageWarning, match=r"4\.png"):
            batch = data.__getitems__([5, 4, 2])
        assert batch.images.shape == (2, 3, 8, 8)
        assert batch.images[:, 0, 0, 0].tolist() == [50, 20]
        assert batch.labels.tolist() == [1, 0]
        assert batch.masks is None

    def test_batch_without_readable_files_is_empty(self, samples: list[tuple[str | Path, int]]) -> None:
        with pytest.warns(UnreadableImageWarning):
            batch = FolderImages(samples, Preprocessing(size=8))[4]
        assert batch.images.shape == (0, 3, 8, 8)
        assert batch.images.dtype == torch.uint8
        assert batch.labels.shape == (0,)
        assert batch.labels.dtype == torch.int64

    @pytest.mark.parametrize("workers", [0, 2])
    def test_in_a_loader(self, samples: list[tuple[str | Path, int]], workers: int) -> None:
        data = FolderImages(samples, Preprocessing(size=8))
        loader = DataLoader(data, batch_size=4, collate_fn=keep_batch, num_workers=workers)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UnreadableImageWarning)  # the workers warn on their own standard error
            batches = list(loader)
        assert [len(batch.images) for batch in batches] == [4, 3, 2]
        shown = torch.cat([batch.images[:, 0, 0, 0] for batch in batches]).tolist()
        assert shown == [0, 10, 20, 30, 50, 60, 70, 80, 90]

    def test_augmented_copy(self, samples: list[tuple[str | Path, int]]) -> None:
        plain = FolderImages(samples, Preprocessing(size=8))
        augmented = plain.with_augmentation(imagenet_augmentation(8))
        assert plain.augment is None
        assert len(augmented) == 10
        assert augmented.__getitems__([0, 9]).images.shape == (2, 3, 8, 8)
        assert augmented.with_augmentation(None)[1].images[0, 0, 0, 0] == 10
        sent = pickle.loads(pickle.dumps(augmented))
        assert sent[0].images.shape == (1, 3, 8, 8)

    def test_augmentation_of_another_shape(self, samples: list[tuple[str | Path, int]]) -> None:
        data = FolderImages(samples, Preprocessing(size=8))
        with pytest.raises(ValueError, match=r"augment: .*\(3, 8, 8\), got \(3, 9, 9\)"):
            data.with_augmentation(imagenet_augmentation(9))[0]
        with pytest.raises(TypeError, match=r"augment: .*uint8 tensor, got Image"):
            data.with_augmentation(lambda image: image)[0]  # type: ignore[arg-type, return-value]
        with pytest.raises(TypeError, match=r"augment: .*callable"):
            data.with_augmentation("flip")  # type: ignore[arg-type]

    def test_refuses_labels_that_are_no_numbers(self) -> None:
        with pytest.raises(TypeError, match=r"samples: .*'cat'"):
            FolderImages([("a.png", "cat")], Preprocessing(size=8))  # type: ignore[list-item]


class TestDataBundle:
    def bundle(self, **change: object) -> DataBundle:
        settings = {
            "name": "made up",
            "train": array_images(),
            "validation": None,
            "test": None,
            "class_names": ("a", "b", "c"),
            "multi_label": False,
            "preprocessing": Preprocessing(size=4),
        }
        return DataBundle(**settings | change)  # type: ignore[arg-type]

    def test_counts_classes(self) -> None:
        assert self.bundle().num_classes == 3

    @pytest.mark.parametrize(
        ("change", "error", "words"),
        [
            ({"class_names": ("a", "b")}, ValueError, "train: .*below 2, got 2"),
            ({"class_names": ("a", "b", "a")}, ValueError, "class_names: .*once"),
            ({"class_names": ("a",)}, ValueError, "class_names: .*at least 2"),
            ({"class_names": "abc"}, TypeError, "class_names: "),
            ({"multi_label": True}, ValueError, "train: .*several labels"),
            ({"train": None}, TypeError, "train: .*NoneType"),
            ({"validation": [1]}, TypeError, "validation: .*list"),
            ({"test": array_images(0)}, ValueError, "test: .*at least one image"),
        ],
    )
    def test_refuses_what_does_not_fit(self, change: dict, error: type[Exception], words: str) -> None:
        with pytest.raises(error, match=words):
            self.bundle(**change)
