"""The two-dimensional MedMNIST data sets, read through the ``medmnist`` package."""

import tempfile
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from mhex_vision.data.preprocessing import Preprocessing
from mhex_vision.data.sets import ArrayImages, DataBundle

__all__ = ["MEDMNIST_2D", "MEDMNIST_SIZES", "is_medmnist", "medmnist_bundle"]

# Written out so that a name can be judged where the medmnist package is not installed.
MEDMNIST_2D = (
    "pathmnist",
    "chestmnist",
    "dermamnist",
    "octmnist",
    "pneumoniamnist",
    "retinamnist",
    "breastmnist",
    "bloodmnist",
    "tissuemnist",
    "organamnist",
    "organcmnist",
    "organsmnist",
)
MEDMNIST_SIZES = (28, 64, 128, 224)

# What reading a damaged zip archive, or a damaged array in one, is known to raise.
_ARCHIVE_ERRORS = (OSError, ValueError, EOFError, LookupError, NotImplementedError, zipfile.BadZipFile, zlib.error)


def is_medmnist(name: str) -> bool:
    """Whether ``name`` is a two-dimensional MedMNIST set, in capitals or not."""
    return name.lower() in MEDMNIST_2D


def medmnist_bundle(name: str, *, root: str | Path | None = None, size: int = 28, download: bool = True) -> DataBundle:
    """Read a two-dimensional MedMNIST set.

    A file that lies under ``root`` is used as it is, whatever its checksum; it is downloaded, and its checksum
    compared, only where it is absent.

    Args:
        name: Such as ``"bloodmnist"``.
        root: Folder of the npz files; None for medmnist's own, ``~/.medmnist``.
        size: Side of the images, one of 28, 64, 128 and 224.
        download: Whether to fetch a file that is absent.

    Raises:
        ImportError: The medmnist package is not installed.
        FileNotFoundError: The file is absent and ``download`` is False.
        OSError: The download failed.
        ValueError: The name or size is unknown, or the file is damaged or holds something else.
    """
    if not isinstance(name, str):
        raise TypeError(f"name: expected a string, got {name!r}")
    if not is_medmnist(name):
        raise ValueError(f"name: expected a 2-D MedMNIST set, one of {', '.join(MEDMNIST_2D)}; got {name!r}")
    if size not in MEDMNIST_SIZES or isinstance(size, bool):
        raise ValueError(f"size: expected one of {', '.join(map(str, MEDMNIST_SIZES))} for MedMNIST, got {size!r}")
    try:
        import medmnist
        from medmnist.info import DEFAULT_ROOT, INFO
    except ImportError as error:
        raise ImportError(
            f'MedMNIST sets need the medmnist package ({error}): pip install "mhex-vision[medmnist]"'
        ) from error
    name = name.lower()
    info: Mapping[str, Any] = INFO[name]
    folder = root if root is not None else DEFAULT_ROOT
    if folder is None:
        raise OSError("root: medmnist could not make its default folder ~/.medmnist; expected another folder, got None")
    path = Path(folder).expanduser() / (f"{name}.npz" if size == 28 else f"{name}_{size}.npz")
    if not path.is_file():
        if not download:
            raise FileNotFoundError(f"no such file: {path}; put {path.name} there or allow the download")
        _download(getattr(medmnist, info["python_class"]), path, size)
    class_names = tuple(str(info["label"][str(number)]) for number in range(len(info["label"])))
    multi_label = str(info["task"]).startswith("multi-label")
    splits = _read(path, size=size, classes=len(class_names), multi_label=multi_label)
    return DataBundle(
        name=path.stem,
        train=splits["train"],
        validation=splits["val"],
        test=splits["test"],
        class_names=class_names,
        multi_label=multi_label,
        preprocessing=Preprocessing(size=size),
    )


def _download(dataset: Any, path: Path, size: int) -> None:
    """Let medmnist fetch the file, and move it to ``path`` once it is complete."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # An interrupted download must not leave a file that the next run takes for the data set.
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=".download-") as scratch:
            dataset(split="val", download=True, size=size, root=scratch)
            (Path(scratch) / path.name).replace(path)
    except (OSError, RuntimeError, ValueError, AssertionError) as error:
        raise OSError(
            f"could not download {path.name}: get it from the MedMNIST project on another machine and put it into "
            f"{path.parent}"
        ) from error


def _read(path: Path, *, size: int, classes: int, multi_label: bool) -> dict[str, ArrayImages]:
    splits: dict[str, ArrayImages] = {}
    try:
        # Object arrays would be unpickled, which runs code from the file; allow_pickle=False refuses them.
        # Opened here, because numpy leaves the file open when the archive in it is damaged.
        with path.open("rb") as file:
            archive = np.load(file, allow_pickle=False)
            if not isinstance(archive, np.lib.npyio.NpzFile):
                raise ValueError("expected an npz archive, got a single array")  # noqa: TRY004 - the file is at fault
            for split in ("train", "val", "test"):
                for key in (f"{split}_images", f"{split}_labels"):
                    if key not in archive:
                        raise ValueError(f"expected an array {key}, got only {', '.join(sorted(archive)) or 'none'}")
                images = _images(archive[f"{split}_images"], f"{split}_images", size)
                labels = _labels(archive[f"{split}_labels"], f"{split}_labels", images.shape[0], classes, multi_label)
                splits[split] = ArrayImages(images, labels)
    except _ARCHIVE_ERRORS as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{path}: not a readable MedMNIST file: {reason}") from error
    return splits


def _images(array: NDArray[Any], key: str, size: int) -> torch.Tensor:
    if array.dtype != np.uint8:
        raise ValueError(f"{key}: expected dtype uint8, got {array.dtype}")
    if array.shape[1:] not in ((size, size), (size, size, 3)) or array.shape[0] == 0:
        raise ValueError(f"{key}: expected shape (N, {size}, {size}) or (N, {size}, {size}, 3), got {array.shape}")
    tensor = torch.from_numpy(array)
    # Views both: a grey set is not stored three times over, a colour set not copied.
    return tensor.permute(0, 3, 1, 2) if tensor.ndim == 4 else tensor.unsqueeze(1).expand(-1, 3, -1, -1)


def _labels(array: NDArray[Any], key: str, count: int, classes: int, multi_label: bool) -> torch.Tensor:
    columns = classes if multi_label else 1
    if array.shape != (count, columns):
        raise ValueError(f"{key}: expected shape {(count, columns)}, got {array.shape}")
    if array.dtype.kind not in "ui":
        raise ValueError(f"{key}: expected integers, got {array.dtype}")
    low, high, limit = int(array.min()), int(array.max()), 1 if multi_label else classes - 1
    if low < 0 or high > limit:
        raise ValueError(f"{key}: expected values from 0 to {limit}, got {low} to {high}")
    if multi_label:
        return torch.from_numpy(array.astype(np.float32))
    return torch.from_numpy(array[:, 0].astype(np.int64))
