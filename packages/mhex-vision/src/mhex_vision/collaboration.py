"""Does the collaboration of gate and supervision go with explanations that matter, and with confidence?

Letters: N images, N' images with a spatial map, B batch, L blocks, H x W image size, g cells per side.
Source: Sun and Liò, "Multi-Head Explainer" (arXiv 2501.01311), collaboration between attention and deep supervision:
its correlation with SAD and with confidence, and its spatial map.
"""

from __future__ import annotations

import math
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from mhex_core import _checks
from mhex_core.files import write_atomically
from mhex_vision.classifier import MHEXClassifier
from mhex_vision.data.sets import ArrayImages, DataBundle, FolderImages, ImageSet
from mhex_vision.evaluation import IndexBatches, batch_loader
from mhex_vision.metrics.judge import Judge, as_judge

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_SPATIAL_STEP = 8  # images whose variants share batches: enough to fill those, few enough for a bar to move
_ARRAYS = ("collaboration", "sad", "confidence", "labels")


class Correlation(NamedTuple):
    """How two quantities go together.

    Attributes:
        r: Pearson's correlation, in [-1, 1].
        p: How likely one at least as strong is without any, in [0, 1].
    """

    r: float
    p: float


class Correlations(NamedTuple):
    """The correlations of collaboration.

    Attributes:
        sad: With the soft AVG Drop.
        confidence: With the probability of the true class.
    """

    sad: Correlation
    confidence: Correlation


class MutualInformation(NamedTuple):
    """What collaboration tells, in nats.

    Attributes:
        sad: About the soft AVG Drop.
        confidence: About the probability of the true class.
    """

    sad: float
    confidence: float


@dataclass(frozen=True, kw_only=True, eq=False)
class CollaborationStudy:
    """Collaboration over a set of images, with what it may go with. All tensors are on the CPU.

    Attributes:
        collaboration: (N, L - 1) in [-1, 1], of each block with the next one's head, see `mhex_core.collaboration`.
        sad: (N,) in [0, 1], the soft AVG Drop of the saliency of the true class, see `mhex_vision.metrics`.
        confidence: (N,) in [0, 1], the network's probability of the true class.
        labels: int64 (N,), the true classes.
        layer_names: Where the L - 1 blocks sit.
        spatial: (N', g, g), or None: the collaboration summed over blocks with one cell of the image replaced by the
            image's mean per channel.
    """

    collaboration: Tensor
    sad: Tensor
    confidence: Tensor
    labels: Tensor
    layer_names: tuple[str, ...]
    spatial: Tensor | None = None

    def __post_init__(self) -> None:
        _checks.tensor("collaboration", self.collaboration, ndim=2)
        count, blocks = self.collaboration.shape
        _checks.tensor("labels", self.labels, ndim=1, floating=False)
        for name in ("sad", "confidence"):
            _checks.tensor(name, getattr(self, name), ndim=1)
        for name in ("sad", "confidence", "labels"):
            if getattr(self, name).shape[0] != count:
                raise ValueError(f"{name} must have shape ({count},), got {tuple(getattr(self, name).shape)}")
        if len(self.layer_names) != blocks:
            raise ValueError(f"layer_names must hold {blocks} names, got {len(self.layer_names)}")
        if self.spatial is not None:
            shape = _checks.tensor("spatial", self.spatial, ndim=3).shape
            if shape[1] != shape[2]:
                raise ValueError(f"spatial must have shape (N', g, g), got {tuple(shape)}")

    def mean_collaboration(self, last: int = 3) -> Tensor:
        """The mean over the last blocks: (N,).

        Args:
            last: How many; all where there are fewer.
        """
        _checks.positive_int("last", last)
        return self.collaboration[:, -last:].mean(dim=1)

    def pearson(self, last: int = 3) -> Correlations:
        """Pearson's r and its p of the collaboration, the mean over the last blocks, with SAD and with confidence.

        Args:
            last: How many blocks; all where there are fewer.

        Returns:
            NaN where there are fewer than two images, or a quantity is the same for all (the collaboration of blocks
            without a gate is 0).

        Raises:
            ImportError: scipy is missing.
        """
        values = self.mean_collaboration(last)
        return Correlations(_pearson(values, self.sad), _pearson(values, self.confidence))

    def mutual_information(self, last: int = 3, *, neighbors: int = 3, seed: int = 0) -> MutualInformation:
        """How much the collaboration tells about SAD and about confidence, in nats, whatever the form of the relation.

        Kraskov's nearest-neighbour estimate (arXiv cond-mat/0305641), as scikit-learn has it.

        Args:
            last: Over how many blocks the mean is taken; all where there are fewer.
            neighbors: How many nearest neighbours; more give a steadier estimate with more bias.
            seed: Of the noise scikit-learn adds to tell equal values apart.

        Returns:
            Numbers of at least 0.

        Raises:
            ImportError: scikit-learn is missing.
            ValueError: There are not more images than neighbours.
        """
        _checks.positive_int("neighbors", neighbors)
        if len(self.sad) <= neighbors:
            raise ValueError(f"neighbors must be below {len(self.sad)}, the number of images, got {neighbors}")
        values = self.mean_collaboration(last).double().numpy().reshape(-1, 1)
        estimate = _scikit_learn()
        sad, confidence = (
            float(estimate(values, other.double().numpy(), n_neighbors=neighbors, random_state=seed)[0])
            for other in (self.sad, self.confidence)
        )
        return MutualInformation(sad, confidence)

    def plot(self, last: int = 3) -> Figure:
        """Collaboration against SAD and against confidence, per block, and its mean spatial map.

        Not registered with pyplot: nothing to close.

        Args:
            last: Over how many blocks the mean is taken; all where there are fewer.
        """
        from matplotlib.figure import Figure

        panels = 3 if self.spatial is None else 4
        figure = Figure(figsize=(3.4 * panels, 3.2), layout="constrained")
        axes = figure.subplots(1, panels)
        values = self.mean_collaboration(last).numpy()
        found = self.pearson(last)
        words = f"collaboration, mean of the last {min(last, len(self.layer_names))}"
        for axis, name, other, (r, p) in (
            (axes[0], "SAD", self.sad, found.sad),
            (axes[1], "confidence", self.confidence, found.confidence),
        ):
            axis.scatter(values, other.numpy(), s=6, alpha=0.4, linewidths=0)
            axis.set(xlabel=words, ylabel=name, title=f"{name}: r = {r:.3f}, p = {p:.2g}")
        places = range(1, len(self.layer_names) + 1)
        if len(values) and self.layer_names:
            axes[2].boxplot(self.collaboration.numpy(), positions=places, showfliers=False)
        axes[2].set_xticks(places, self.layer_names, rotation=90, fontsize=7)
        axes[2].set(ylabel="collaboration", title="per block", ylim=(-1.05, 1.05))
        if self.spatial is not None:
            mean = self.spatial.mean(dim=0).numpy()
            image = axes[3].imshow(mean, cmap="viridis")
            figure.colorbar(image, ax=axes[3], shrink=0.8)
            axes[3].set(title=f"cell replaced, mean of {len(self.spatial)}", xticks=(), yticks=())
        return figure

    def save(self, path: str | Path) -> Path:
        """Write the study as one npz file, in one step.

        Args:
            path: The file; one of that name is replaced.

        Returns:
            The path.
        """
        arrays = {name: getattr(self, name).numpy() for name in _ARRAYS}
        arrays["layer_names"] = np.array(self.layer_names, dtype=np.str_)
        if self.spatial is not None:
            arrays["spatial"] = self.spatial.numpy()

        def write(temporary: Path) -> None:
            with temporary.open("wb") as file:  # numpy would add ".npz" to a path
                np.savez(file, **arrays)

        return write_atomically(path, write)

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read what `save` wrote.

        Args:
            path: The file.

        Raises:
            FileNotFoundError: There is no such file.
            ValueError: The file is damaged, or holds something else.
        """
        try:
            # Opened here: numpy leaves a damaged file open.
            with Path(path).open("rb") as raw, np.load(raw, allow_pickle=False) as file:
                arrays = {name: file[name] for name in file.files}
            names = tuple(str(name) for name in arrays.pop("layer_names"))
            tensors = {name: torch.from_numpy(arrays[name]) for name in (*_ARRAYS, "spatial") if name in arrays}
            return cls(layer_names=names, **tensors)
        except (ValueError, TypeError, KeyError, AttributeError, EOFError, zipfile.BadZipFile) as error:
            raise ValueError(f"path must be a saved collaboration study, got {path}: {error}") from error


def collaboration_study(
    model: MHEXClassifier,
    images: ImageSet,
    data: DataBundle,
    *,
    judge: Judge | nn.Module,
    batch_size: int = 64,
    spatial: int | None = 7,
    spatial_images: int | None = 64,
    options: Mapping[str, Any] | None = None,
    workers: int = 0,
    progress: bool = True,
) -> CollaborationStudy:
    """Measure the collaboration of every block on a set of images, beside SAD and confidence.

    Everything is about the true class. Images that cannot be decoded are left out.

    Args:
        model: The classifier, on the device to compute on; in evaluation mode for the length of the study.
        images: The images, usually `data.test`.
        data: The bundle they belong to, for its preprocessing.
        judge: The network by whose belief SAD goes, on the same device; it should be another than `model`, and take
            images normalised in the same way.
        batch_size: Images at a time; also of the spatial map's variants.
        spatial: g, into how many cells each side is divided for the spatial map; None for no map.
        spatial_images: How many images get a spatial map, at g x g passes forward and backward each: so many, evenly
            spread over the set; None means all.
        options: Of the saliency that SAD judges: the fields of `mhex_core.SaliencyOptions`.
        workers: Processes that decode image files.
        progress: Whether to show a bar, where the output is a terminal.

    Raises:
        TypeError: An argument is of another type.
        ValueError: An argument does not fit; classes are not exclusive; or no image can be read.
    """
    if not isinstance(model, MHEXClassifier):
        raise TypeError(f"model must be an MHEXClassifier, got {type(model).__name__}")
    if not isinstance(images, ArrayImages | FolderImages):
        raise TypeError(f"images must be ArrayImages or FolderImages, got {type(images).__name__}")
    if not isinstance(data, DataBundle):
        raise TypeError(f"data must be a DataBundle, got {type(data).__name__}")
    if data.multi_label or model.config.multi_label:
        raise ValueError("data must have one true class per image, got several labels")
    judge = as_judge(judge)
    _checks.positive_int("batch_size", batch_size)
    if spatial is not None:
        _checks.positive_int("spatial", spatial)
    if spatial_images is not None:
        _checks.positive_int("spatial_images", spatial_images)
    hide = None if _checks.flag("progress", progress) else True
    device = next(model.parameters()).device
    found: dict[str, list[Tensor]] = {name: [] for name in _ARRAYS}
    batches = batch_loader(images, IndexBatches(len(images), batch_size), workers=workers)
    for batch in tqdm(batches, desc="collaboration", unit="batch", leave=False, disable=hide):
        if len(batch.images):
            pictures = data.preprocessing.normalize(batch.images.to(device))
            values = _measure(model, judge, pictures, batch.labels.to(device), options or {})
            for name, value in zip(_ARRAYS, values, strict=True):
                found[name].append(value.cpu())
    if not found["labels"]:
        raise ValueError("images must hold at least one that can be read, got none")
    maps = None
    if spatial is not None:
        count = len(images) if spatial_images is None else min(spatial_images, len(images))
        indices = np.linspace(0, len(images) - 1, count).round().astype(np.int64).tolist()
        maps = _spatial_maps(model, images, data, indices, cells=spatial, batch_size=batch_size, hide=hide)
    return CollaborationStudy(
        **{name: torch.cat(parts) for name, parts in found.items()},
        layer_names=model.layer_names[:-1],
        spatial=maps,
    )


def _measure(
    model: MHEXClassifier, judge: Judge, images: Tensor, labels: Tensor, options: Mapping[str, Any]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Collaboration, SAD, confidence and labels of one batch."""
    from mhex_vision.metrics.faithfulness import sad

    explanation = model.explain(images, labels, keep_images=False, **options)
    drop = sad(judge, images, explanation.saliency, labels)
    confidence = explanation.probabilities.gather(1, labels.unsqueeze(1)).squeeze(1)
    return model.collaboration(images, labels).detach(), drop, confidence, labels


def _spatial_maps(
    model: MHEXClassifier,
    images: ImageSet,
    data: DataBundle,
    indices: list[int],
    *,
    cells: int,
    batch_size: int,
    hide: bool | None,
) -> Tensor:
    """(N', g, g) of the images at `indices` that can be read."""
    device = next(model.parameters()).device
    maps = [torch.zeros(0, cells, cells)]
    for start in tqdm(range(0, len(indices), _SPATIAL_STEP), desc="spatial", unit="batch", leave=False, disable=hide):
        batch = images.__getitems__(indices[start : start + _SPATIAL_STEP])
        if len(batch.images):
            pictures = data.preprocessing.normalize(batch.images.to(device))
            found = spatial_collaboration(model, pictures, batch.labels.to(device), cells=cells, batch_size=batch_size)
            maps.append(found.cpu())
    return torch.cat(maps)


def spatial_collaboration(
    model: MHEXClassifier, images: Tensor, target: Tensor, *, cells: int = 7, batch_size: int = 64
) -> Tensor:
    """Collaboration summed over blocks, with one cell of the image after the other replaced by the image's mean.

    Cell (i, j) of an image covers rows floor(i H / g) to floor((i + 1) H / g), and columns alike: where a side cannot
    be divided evenly, cells differ by one pixel.

    Args:
        model: The classifier; in evaluation mode for the call.
        images: (B, 3, H, W), normalised.
        target: int64 (B,), the true classes.
        cells: g, cells per side.
        batch_size: Variants at a time.

    Returns:
        (B, g, g) in [1 - L, L - 1].

    Raises:
        TypeError: An argument is of another type.
        ValueError: An argument's shape or value does not fit.
    """
    if not isinstance(model, MHEXClassifier):
        raise TypeError(f"model must be an MHEXClassifier, got {type(model).__name__}")
    images = _checks.tensor("images", images, ndim=4)
    _checks.positive_int("cells", cells)
    _checks.positive_int("batch_size", batch_size)
    batch, _, height, width = images.shape
    target = _checks.class_indices(
        "target", target, batch=batch, num_classes=model.config.num_classes, device=images.device
    )
    if target.ndim != 1:
        raise ValueError(f"target must have shape ({batch},), got {tuple(target.shape)}")
    if cells > min(height, width):
        raise ValueError(f"cells must be at most {min(height, width)}, the shorter side of the images, got {cells}")
    if not batch:
        return images.new_zeros(0, cells, cells)
    members = _members(height, width, cells).to(images.device)
    mean = images.mean(dim=(2, 3), keepdim=True)
    sums = []
    total = batch * cells**2
    for start in range(0, total, batch_size):
        numbers = torch.arange(start, min(start + batch_size, total), device=images.device)
        image, cell = numbers // cells**2, numbers % cells**2
        variants = torch.where(members[cell].unsqueeze(1), mean[image], images[image])
        sums.append(model.collaboration(variants, target[image]).detach().sum(dim=1))
    return torch.cat(sums).view(batch, cells, cells)


def _members(height: int, width: int, cells: int) -> Tensor:
    """Which pixels each cell has: bool (g g, H, W)."""
    rows, columns = (
        torch.stack([(axis >= i * side // cells) & (axis < (i + 1) * side // cells) for i in range(cells)])
        for side, axis in ((height, torch.arange(height)), (width, torch.arange(width)))
    )
    return (rows[:, None, :, None] & columns[None, :, None, :]).flatten(0, 1)


def _pearson(first: Tensor, second: Tensor) -> Correlation:
    pearsonr = _scipy()
    rows = [each.double().numpy() for each in (first, second)]
    # scipy warns of a constant, and refuses a single number; here both mean that nothing can be said.
    if len(rows[0]) < 2 or any(bool((row == row[0]).all()) or not np.isfinite(row).all() for row in rows):
        return Correlation(math.nan, math.nan)
    result = pearsonr(rows[0], rows[1])
    return Correlation(float(result[0]), float(result[1]))


def _scipy() -> Callable[..., Any]:
    try:
        from scipy.stats import pearsonr
    except ImportError as error:
        raise ImportError("correlations need scipy: pip install 'mhex-vision[bench]'") from error
    found: Callable[..., Any] = pearsonr
    return found


def _scikit_learn() -> Callable[..., Any]:
    try:
        from sklearn.feature_selection import mutual_info_regression
    except ImportError as error:
        raise ImportError("mutual information needs scikit-learn: pip install 'mhex-vision[bench]'") from error
    found: Callable[..., Any] = mutual_info_regression
    return found
