"""Map-style image datasets that hand over whole batches, and the bundle of splits a training run takes."""

import copy
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, TypeAlias

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from mhex_vision.data._checks import check_int
from mhex_vision.data.preprocessing import Preprocessing, UnreadableImageError, read_rgb

__all__ = [
    "ArrayImages",
    "Augmentation",
    "Batch",
    "DataBundle",
    "FolderImages",
    "ImageSet",
    "UnreadableImageWarning",
    "keep_batch",
]

Augmentation: TypeAlias = Callable[[Image.Image], Tensor]


class UnreadableImageWarning(UserWarning):
    """An image file was left out of its batch because it cannot be decoded."""


class Batch(NamedTuple):
    """Images with their labels.

    Attributes:
        images: uint8 tensor (B, 3, H, W).
        labels: int64 tensor (B,), or float32 tensor (B, K) of zeros and ones where an image may have several labels.
        masks: bool tensor (B, H, W) of what the label is about, or None where that is not known.
    """

    images: Tensor
    labels: Tensor
    masks: Tensor | None


def keep_batch(batch: Batch) -> Batch:
    """Return the batch as it is: the ``collate_fn`` for loaders over these datasets.

    A loader gives what ``__getitems__`` returned to its ``collate_fn``; here that is a whole batch already. (A lambda
    would do the same but cannot be sent to worker processes that are spawned.)
    """
    return batch


class ArrayImages(Dataset[Batch]):
    """Images held in memory.

    Args:
        images: uint8 tensor (N, 3, H, W). A view that repeats a grey channel is fine.
        labels: int64 tensor (N,), or float32 tensor (N, K) for several labels per image.
        masks: bool tensor (N, H, W), or None.
    """

    def __init__(self, images: Tensor, labels: Tensor, masks: Tensor | None = None) -> None:
        for argument, value in (("images", images), ("labels", labels)):
            if not isinstance(value, Tensor):
                raise TypeError(f"{argument}: expected a tensor, got {type(value).__name__}")
        if images.dtype != torch.uint8:
            raise TypeError(f"images: expected dtype torch.uint8, got {images.dtype}")
        if images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(f"images: expected shape (N, 3, H, W), got {tuple(images.shape)}")
        count = images.shape[0]
        if (labels.dtype, labels.ndim) not in ((torch.int64, 1), (torch.float32, 2)):
            raise TypeError(
                f"labels: expected int64 (N,) or float32 (N, K), got {labels.dtype} of shape {tuple(labels.shape)}"
            )
        if labels.shape[0] != count:
            raise ValueError(f"labels: expected {count} rows, one per image, got {labels.shape[0]}")
        if labels.ndim == 1 and count and int(labels.min()) < 0:
            raise ValueError(f"labels: expected class numbers from 0, got {int(labels.min())}")
        if masks is not None:
            if not isinstance(masks, Tensor) or masks.dtype != torch.bool:
                raise TypeError(f"masks: expected a bool tensor, got {getattr(masks, 'dtype', type(masks).__name__)}")
            if masks.shape != (count, *images.shape[2:]):
                raise ValueError(
                    f"masks: expected shape {(count, *images.shape[2:])} to go with images, got {tuple(masks.shape)}"
                )
        self.images = images
        self.labels = labels
        self.masks = masks

    def __len__(self) -> int:
        return self.images.shape[0]

    def __getitem__(self, index: int | slice) -> Batch:
        """Return image ``index`` as a batch of one, negative numbers count from the end; or a slice as a batch."""
        return self.__getitems__(_positions(index, len(self)))

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        """Return the images at ``indices``, in that order, as one batch."""
        positions = torch.as_tensor(indices, dtype=torch.int64)
        masks = None if self.masks is None else self.masks.index_select(0, positions)
        return Batch(
            # The source may be a permuted or expanded view; what is sent on to a device should not be.
            self.images.index_select(0, positions).contiguous(),
            self.labels.index_select(0, positions),
            masks,
        )


class FolderImages(Dataset[Batch]):
    """Image files, decoded as they are asked for.

    A file that cannot be decoded is left out of its batch with an `UnreadableImageWarning`, so a batch may be smaller
    than asked for, down to empty.

    Args:
        samples: Pairs of path and class number.
        preprocessing: How a file becomes an image tensor.
        augment: Takes the RGB Pillow image at its own size and returns uint8 (3, size, size), in place of the
            plain resize; None for none.

    Attributes:
        paths: The files.
        labels: int64 tensor (N,).
        masks: The files of their masks, or None; see `with_masks`.
    """

    def __init__(
        self,
        samples: Sequence[tuple[str | Path, int]],
        preprocessing: Preprocessing,
        augment: Augmentation | None = None,
    ) -> None:
        if not isinstance(preprocessing, Preprocessing):
            raise TypeError(f"preprocessing: expected a Preprocessing, got {type(preprocessing).__name__}")
        _check_augmentation(augment)
        self.paths = tuple(str(path) for path, _ in samples)  # a Path each would cost ImageNet a gigabyte
        self.labels = torch.tensor(
            [check_int("samples: class number", label, minimum=0) for _, label in samples], dtype=torch.int64
        )
        self.preprocessing = preprocessing
        self.augment = augment
        self.masks: tuple[str, ...] | None = None

    def with_masks(self, folder: str | Path) -> "FolderImages":
        """Return a copy whose batches carry masks, for localisation against known truth.

        Args:
            folder: Holds one sub-folder per class, like the images' own, with one mask per image of the same name (the
                ending may differ). Whatever is not black in a mask is inside. Images stay as they are, so augmentation
                and masks do not go together.

        Raises:
            FileNotFoundError: An image has no mask.
            ValueError: The images are augmented.
        """
        if self.augment is not None:
            raise ValueError("masks: expected images without augmentation, which would leave their masks behind")
        there: dict[tuple[str, str], str] = {}
        for path in sorted(Path(folder).glob("*/*")):
            there.setdefault((path.parent.name, path.stem), str(path))
        keys = [(path.parent.name, path.stem) for path in map(Path, self.paths)]
        missing = next((key for key in keys if key not in there), None)
        if missing is not None:
            raise FileNotFoundError(f"masks: expected a mask {Path(folder, *missing)}.png, and there is none")
        other = copy.copy(self)
        other.masks = tuple(there[key] for key in keys)
        return other

    def with_augmentation(self, augment: Augmentation | None) -> "FolderImages":
        """Return a copy over the same files with another augmentation (None for none)."""
        _check_augmentation(augment)
        if augment is not None and self.masks is not None:
            raise ValueError("augment: expected images without masks, which augmentation would leave behind")
        other = copy.copy(self)
        other.augment = augment
        return other

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int | slice) -> Batch:
        """Return image ``index`` as a batch of one, or a slice as a batch, without what cannot be decoded."""
        return self.__getitems__(_positions(index, len(self)))

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        """Return the images at ``indices``, in that order, without those that cannot be decoded."""
        images: list[Tensor] = []
        masks: list[Tensor] = []
        kept: list[int] = []
        for index in indices:
            try:
                image = self._image(self.paths[index])
                mask = None if self.masks is None else self.preprocessing.fit_mask(read_rgb(self.masks[index]))
            except UnreadableImageError as error:
                warnings.warn(f"left out: {error}", UnreadableImageWarning, stacklevel=2)
            else:
                images.append(image)
                masks += [] if mask is None else [mask]
                kept.append(index)
        size = self.preprocessing.size
        stacked = torch.stack(images) if images else torch.empty((0, 3, size, size), dtype=torch.uint8)
        stacked_masks = None
        if self.masks is not None:
            stacked_masks = torch.stack(masks) if masks else torch.empty((0, size, size), dtype=torch.bool)
        return Batch(stacked, self.labels[torch.tensor(kept, dtype=torch.int64)], stacked_masks)

    def _image(self, path: str) -> Tensor:
        image = read_rgb(path)
        if self.augment is None:
            return self.preprocessing.fit(image)
        tensor = self.augment(image)
        # One batch is one tensor, so what the augmentation returns is settled here and not by a failing stack.
        expected = (3, self.preprocessing.size, self.preprocessing.size)
        if not isinstance(tensor, Tensor) or tensor.dtype != torch.uint8:
            came = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
            raise TypeError(f"augment: expected it to return a uint8 tensor, got {came}")
        if tuple(tensor.shape) != expected:
            raise ValueError(f"augment: expected it to return shape {expected}, got {tuple(tensor.shape)}")
        return tensor


ImageSet: TypeAlias = ArrayImages | FolderImages


@dataclass(frozen=True, kw_only=True)
class DataBundle:
    """The splits of a data set with what there is to know about them.

    Attributes:
        name: What the data is called.
        train: Images to learn from.
        validation: Images to choose by, or None.
        test: Images to judge by, or None.
        class_names: Name of each class, by class number.
        multi_label: Whether an image may have several labels (or none).
        preprocessing: How images become network input.
    """

    name: str
    train: ImageSet
    validation: ImageSet | None
    test: ImageSet | None
    class_names: tuple[str, ...]
    multi_label: bool
    preprocessing: Preprocessing

    def __post_init__(self) -> None:
        if isinstance(self.class_names, str) or not all(isinstance(name, str) for name in self.class_names):
            raise TypeError(f"class_names: expected a tuple of names, got {self.class_names!r}")
        least = 1 if self.multi_label else 2
        if len(self.class_names) < least:
            raise ValueError(f"class_names: expected at least {least}, got {self.class_names!r}")
        if len(set(self.class_names)) != len(self.class_names):
            raise ValueError(f"class_names: expected each name once, got {self.class_names!r}")
        for argument in ("train", "validation", "test"):
            split = getattr(self, argument)
            if split is None and argument != "train":
                continue
            if not isinstance(split, ArrayImages | FolderImages):
                raise TypeError(f"{argument}: expected ArrayImages or FolderImages, got {type(split).__name__}")
            if len(split) == 0:
                raise ValueError(f"{argument}: expected at least one image, got none")
            self._check_labels(argument, split.labels)

    def _check_labels(self, argument: str, labels: Tensor) -> None:
        if self.multi_label != (labels.ndim == 2):
            kind = "several labels per image (N, K)" if self.multi_label else "one label per image (N,)"
            raise ValueError(f"{argument}: expected {kind}, got labels of shape {tuple(labels.shape)}")
        if self.multi_label and labels.shape[1] != self.num_classes:
            raise ValueError(f"{argument}: expected {self.num_classes} label columns, got {labels.shape[1]}")
        if not self.multi_label and int(labels.max()) >= self.num_classes:
            raise ValueError(f"{argument}: expected class numbers below {self.num_classes}, got {int(labels.max())}")

    @property
    def num_classes(self) -> int:
        """How many classes there are."""
        return len(self.class_names)


def _check_augmentation(augment: object) -> None:
    if augment is not None and not callable(augment):
        raise TypeError(f"augment: expected a callable or None, got {augment!r}")


def _positions(index: int | slice, length: int) -> Sequence[int]:
    if isinstance(index, slice):
        return range(*index.indices(length))
    if not -length <= index < length:
        raise IndexError(f"index: expected one of {length} images, got {index}")
    return [index % length]
