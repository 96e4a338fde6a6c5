"""Images to train on: MedMNIST sets, folders of images, and synthetic lesions with known places."""

from pathlib import Path

from mhex_vision.data.folders import folder_bundle
from mhex_vision.data.lesions import LESION_CLASSES, lesions_bundle, synthetic_lesions
from mhex_vision.data.medmnist import MEDMNIST_2D, is_medmnist, medmnist_bundle
from mhex_vision.data.preprocessing import Preprocessing, UnreadableImageError
from mhex_vision.data.sets import Batch, DataBundle, UnreadableImageWarning, keep_batch

__all__ = [
    "LESION_CLASSES",
    "Batch",
    "DataBundle",
    "Preprocessing",
    "UnreadableImageError",
    "UnreadableImageWarning",
    "keep_batch",
    "load_data",
    "synthetic_lesions",
]

_LESIONS = "synthetic-lesions"


def load_data(
    name: str | Path,
    *,
    root: str | Path | None = None,
    size: int | None = None,
    download: bool = True,
    seed: int = 0,
) -> DataBundle:
    """Load a data set by its name or its folder.

    Args:
        name: ``"synthetic-lesions"``, a two-dimensional MedMNIST set such as ``"bloodmnist"``, or a folder of images
            with one sub-folder per class (see `mhex_vision.data.folders`). A `Path` is always a folder.
        root: Where MedMNIST files lie (None for ``~/.medmnist``); a folder is looked for here too.
        size: Side of the images in pixels; None for 64 (lesions), 28 (MedMNIST) or 224 (folders).
        download: Whether a MedMNIST file that is absent may be fetched.
        seed: Which lesions are made, or which images of a folder are set aside.

    Raises:
        ValueError: ``name`` is neither a known set nor a folder.
    """
    if not isinstance(name, str | Path):
        raise TypeError(f"name: expected a data set's name or a folder, got {name!r}")
    if name == _LESIONS:
        return lesions_bundle(size=64 if size is None else size, seed=seed)
    # The sets of volumes go there for its error, which lists the sets of images.
    if isinstance(name, str) and (is_medmnist(name) or name.lower().endswith("mnist3d")):
        return medmnist_bundle(name, root=root, size=28 if size is None else size, download=download)
    candidates = [Path(name).expanduser()]
    if root is not None:
        candidates.append(Path(root).expanduser() / name)
    for candidate in candidates:
        if str(name) and candidate.is_dir():
            return folder_bundle(candidate, size=224 if size is None else size, seed=seed)
    raise ValueError(
        f"name: expected {_LESIONS}, a MedMNIST set ({', '.join(MEDMNIST_2D)}) or a folder of images; got "
        f"{str(name)!r}, and there is no folder {' or '.join(map(str, candidates))}"
    )
