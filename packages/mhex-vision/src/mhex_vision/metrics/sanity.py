"""Does an explanation depend on what the network has learnt at all?

Two sanity checks: an explanation of a network whose weights are random, or which was trained on random labels, should
not look like that of the trained one. Low similarity is what an explanation should show.

Letters: B batch, H x W map size, N = H W positions.
Sources: Adebayo et al. 2018 (arXiv 1810.03292); SSIM, Wang et al. 2004 (doi 10.1109/TIP.2003.819861).
"""

from __future__ import annotations

import copy
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mhex_core import _checks
from mhex_core.matrix import compute_dtype
from mhex_core.metrics import min_max
from mhex_core.modes import in_evaluation_mode
from mhex_vision.classifier import MHEXClassifier
from mhex_vision.data.sets import ArrayImages, DataBundle, ImageSet
from mhex_vision.metrics.judge import check_maps

Kind = Literal["spearman", "ssim", "pearson"]
KINDS: tuple[Kind, ...] = ("spearman", "ssim", "pearson")

M = TypeVar("M", bound=nn.Module)
Explainer = Callable[[M, Tensor, Tensor], Tensor]
"""Takes a network, images (B, C, H, W) and int64 classes (B,), gives maps (B, H, W)."""

_WINDOW, _SIGMA = 11, 1.5
_K1, _K2 = 0.01, 0.03


class Randomized(NamedTuple):
    """How much of the original maps is left once a layer is random.

    Attributes:
        layer: The layer's name.
        similarity: (B,), between the map now and the original one.
    """

    layer: str
    similarity: Tensor


@dataclass(frozen=True)
class Layer:
    """Modules that become random together.

    Attributes:
        name: What the layer is called.
        modules: The names of the modules whose own parameters and statistics it is made of.
    """

    name: str
    modules: tuple[str, ...]


def similarity(first: Tensor, second: Tensor, *, kind: Kind = "spearman") -> Tensor:
    """How alike two maps are.

    Args:
        first: (B, H, W), of any sign; the absolute values are for the caller to take, should signs not count.
        second: (B, H, W).
        kind: "spearman", the rank correlation, equal values sharing the mean of their ranks; "pearson", the correlation
            of the values; "ssim", the mean structural similarity of the two maps, each brought to [0, 1] by its own
            extremes, under a Gaussian window of 11 x 11 (standard deviation 1.5, K1 = 0.01, K2 = 0.03) at every place
            where it lies wholly inside. Where a map is smaller than the window, the window is cut to the largest odd
            size that fits.

    Returns:
        (B,) in [-1, 1], 1 for the same map. A correlation is NaN where a map is constant.

    Raises:
        TypeError: An argument is of another type.
        ValueError: The shapes differ, or a value is not finite.
    """
    _checks.choice("kind", kind, KINDS)
    first = _check_map("first", first)
    second = _check_map("second", second).to(first.device)
    if first.shape != second.shape:
        raise ValueError(f"second must have the shape of first, {tuple(first.shape)}, got {tuple(second.shape)}")
    dtype = torch.promote_types(first.dtype, second.dtype)
    if not first.numel():
        return first.new_full((first.shape[0],), torch.nan, dtype=dtype)
    first, second = first.to(dtype), second.to(dtype)
    if kind == "ssim":
        return _ssim(min_max(first), min_max(second))
    rows = [each.flatten(1) for each in (first, second)]
    if kind == "spearman":
        rows = [_average_ranks(each) for each in rows]
    return _pearson(rows[0], rows[1]).to(dtype)


def parameter_randomization(
    model: M,
    explainer: Explainer[M],
    images: Tensor,
    target: int | Tensor,
    *,
    order: Literal["cascading", "independent"] = "cascading",
    layers: Sequence[str] | None = None,
    kind: Kind = "spearman",
    seed: int = 0,
) -> tuple[Randomized, ...]:
    """Make one layer after the other random, from the output to the input, and watch how alike the maps stay.

    Layers get the values their `reset_parameters` draws, running statistics included; parameters of a module that has
    none are shuffled, each tensor among itself, so that their distribution stays (and one of equal values stays, too).
    Everything happens to a copy of the network, in evaluation mode, and torch's random state is left as it was. A
    layer's values depend on `seed` and on its name only, and so are the same in either order.

    Args:
        model: The network; it stays as it is.
        explainer: Takes (model, images, classes) and gives maps (B, H, W) of the images' size; for an `MHEXClassifier`
            `lambda model, images, target: model.explain(images, target).saliency`.
        images: (B, C, H, W), as the network expects them.
        target: int64 (B,), or one class for all; the same for every map.
        order: Whether layers stay random while the next ones follow ("cascading"), or each is alone ("independent").
        layers: Names, in the order they are to become random; None means all of `layers_of`. Each is one of those, or a
            module by its qualified name, with all that is inside it.
        kind: See `similarity`.
        seed: Of the random values.

    Returns:
        One entry per layer, in order.

    Raises:
        TypeError: An argument is of another type.
        ValueError: A layer is unknown, or has no parameters; or an argument's shape or value does not fit.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a network, got {type(model).__name__}")
    _check_explainer(explainer)
    _checks.choice("order", order, ("cascading", "independent"))
    _checks.choice("kind", kind, KINDS)
    seed = _check_seed(seed)
    images, classes = _check_inputs(images, target)
    subject = copy.deepcopy(model).eval()
    chosen = _chosen(subject, layers, images)
    original = _maps(explainer, subject, images, classes)
    results = []
    for layer in chosen:
        saved = _states(subject, layer) if order == "independent" else []
        _randomize(subject, layer, seed)
        results.append(
            Randomized(layer.name, similarity(original, _maps(explainer, subject, images, classes), kind=kind))
        )
        with torch.no_grad():
            for tensor, before in saved:
                tensor.copy_(before)
    return tuple(results)


def layers_of(model: nn.Module, images: Tensor) -> tuple[Layer, ...]:
    """What `parameter_randomization` makes random, from the output to the input.

    Every module with parameters of its own, in reverse order of first execution; what does not run is left out. In an
    `MHEXClassifier` a layer is a block, gate and head, with the modules of the backbone that ran since the block
    before, under the block's name, such as "layer3.1"; what runs before the first block's own module is the "stem",
    what runs after the last block the "classifier".

    Args:
        model: The network; it is run once, in evaluation mode.
        images: (B, C, H, W), B at least 1.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a network, got {type(model).__name__}")
    images = _checks.tensor("images", images, ndim=4)
    with torch.no_grad(), in_evaluation_mode(model):
        ran = _in_order_of_execution(model, images[:1])
    if not isinstance(model, MHEXClassifier):
        return tuple(Layer(name or type(model).__name__, (name, *also)) for name, *also in reversed(ran))
    return _grouped(model, [name for names in ran for name in names])[::-1]


def label_randomization(
    trained: M,
    trained_on_random_labels: M,
    explainer: Explainer[M],
    images: Tensor,
    target: int | Tensor,
    *,
    kind: Kind = "spearman",
) -> Tensor:
    """How alike the maps of a network are to those of one trained on labels without meaning.

    The second is trained with `mhex_vision.train` on `shuffled_labels(data, seed=...)`, long enough to know its
    training labels by heart.

    Args:
        trained: The network.
        trained_on_random_labels: Another of the same architecture.
        explainer: See `parameter_randomization`.
        images: (B, C, H, W), as the networks expect them.
        target: int64 (B,), or one class for all.
        kind: See `similarity`.

    Returns:
        (B,) in [-1, 1].

    Raises:
        TypeError: An argument is of another type.
        ValueError: An argument's shape or value does not fit.
    """
    _check_explainer(explainer)
    _checks.choice("kind", kind, KINDS)
    images, classes = _check_inputs(images, target)
    maps = []
    for name, model in (("trained", trained), ("trained_on_random_labels", trained_on_random_labels)):
        if not isinstance(model, nn.Module):
            raise TypeError(f"{name} must be a network, got {type(model).__name__}")
        with in_evaluation_mode(model):
            maps.append(_maps(explainer, model, images, classes))
    return similarity(maps[0], maps[1], kind=kind)


def shuffled_labels(bundle: DataBundle, *, seed: int = 0) -> DataBundle:
    """The data with the labels of its training images shuffled among them: as many of each class, without meaning.

    There is no validation split in what is returned: the epoch that does best on true labels is the one that has learnt
    the shuffled ones least, and training would keep that one. The test split is as it was.

    Args:
        bundle: The data; it stays as it is.
        seed: Of the shuffling.
    """
    if not isinstance(bundle, DataBundle):
        raise TypeError(f"bundle must be a DataBundle, got {type(bundle).__name__}")
    images = bundle.train
    order = torch.from_numpy(np.random.default_rng(_check_seed(seed)).permutation(len(images)))
    labels = images.labels[order]
    train: ImageSet
    if isinstance(images, ArrayImages):
        train = ArrayImages(images.images, labels, images.masks)
    else:
        train = copy.copy(images)
        train.labels = labels
    return replace(bundle, train=train, validation=None)


def _average_ranks(rows: Tensor) -> Tensor:
    """Ranks from 0 of each row's values, equal ones sharing their mean: float64 (B, N)."""
    values, order = rows.sort(dim=1)
    places = torch.arange(rows.shape[1], device=rows.device).expand_as(order)
    fresh = torch.ones_like(values, dtype=torch.bool)
    fresh[:, 1:] = values[:, 1:] != values[:, :-1]
    first = torch.where(fresh, places, 0).cummax(dim=1).values
    ends = torch.ones_like(fresh)
    ends[:, :-1] = fresh[:, 1:]
    last = torch.where(ends, places, rows.shape[1]).flip(1).cummin(dim=1).values.flip(1)
    ranks = (first + last).to(_exact(rows)) / 2
    return torch.empty_like(ranks).scatter_(1, order, ranks)


def _pearson(first: Tensor, second: Tensor) -> Tensor:
    constant = (first == first[:, :1]).all(dim=1) | (second == second[:, :1]).all(dim=1)
    units = []
    for rows in (first.to(_exact(first)), second.to(_exact(second))):
        centred = rows - rows.mean(dim=1, keepdim=True)
        # Squares of very small values would be lost.
        scaled = centred / centred.abs().amax(dim=1, keepdim=True).clamp(min=torch.finfo(rows.dtype).tiny)
        length = torch.linalg.vector_norm(scaled, dim=1, keepdim=True)
        units.append(scaled / length.clamp(min=torch.finfo(rows.dtype).tiny))
    return torch.where(constant, torch.nan, (units[0] * units[1]).sum(dim=1).clamp(-1, 1))


def _exact(values: Tensor) -> torch.dtype:
    """float64 where there is one; Apple's accelerator has none."""
    return torch.float32 if values.device.type == "mps" else torch.float64


def _ssim(first: Tensor, second: Tensor) -> Tensor:
    """Mean structural similarity of maps in [0, 1]: (B,)."""
    kernels = [_bell(size, first) for size in first.shape[1:]]

    def local_mean(maps: Tensor) -> Tensor:
        down = F.conv2d(maps.unsqueeze(1), kernels[0].view(1, 1, -1, 1))
        return F.conv2d(down, kernels[1].view(1, 1, 1, -1)).squeeze(1)

    means = local_mean(first), local_mean(second)
    variances = [local_mean(maps * maps) - mean * mean for maps, mean in zip((first, second), means, strict=True)]
    covariance = local_mean(first * second) - means[0] * means[1]
    c1, c2 = _K1**2, _K2**2  # of a range of 1
    above = (2 * means[0] * means[1] + c1) * (2 * covariance + c2)
    below = (means[0] ** 2 + means[1] ** 2 + c1) * (variances[0].clamp(min=0) + variances[1].clamp(min=0) + c2)
    return (above / below).mean(dim=(1, 2))


def _bell(size: int, like: Tensor) -> Tensor:
    window = min(_WINDOW, size - (size + 1) % 2)
    offsets = torch.arange(window, dtype=like.dtype, device=like.device) - window // 2
    bell = torch.exp(-(offsets**2) / (2 * _SIGMA**2))
    return bell / bell.sum()


def _chosen(model: nn.Module, layers: Sequence[str] | None, images: Tensor) -> tuple[Layer, ...]:
    if layers is not None and (isinstance(layers, str) or not isinstance(layers, Sequence)):
        raise TypeError(f"layers must be a sequence of names, got {type(layers).__name__}")
    known = layers_of(model, images)
    if layers is None:
        return known
    by_name = {layer.name: layer for layer in known}
    modules = dict(model.named_modules())
    chosen = []
    for name in layers:
        if name in by_name:
            chosen.append(by_name[name])
        elif name in modules:
            inside = tuple(inner for inner in modules if _is_inside(inner, name) and _owns(modules[inner]))
            if not inside:
                raise ValueError(f"layers must have parameters, got {name!r}, which has none")
            chosen.append(Layer(name, inside))
        else:
            raise ValueError(f"layers must be modules or among {', '.join(map(repr, by_name))}, got {name!r}")
    return tuple(chosen)


def _in_order_of_execution(model: nn.Module, images: Tensor) -> list[list[str]]:
    """The modules with parameters of their own, by first execution; each with those that run as a part of it unseen.

    A parent may use a child's parameters without running the child (`nn.MultiheadAttention` does), or be taken apart,
    as torch.fx does it with a backbone: then only its children run, and its own parameters go with the first of them.
    """
    names = {module: name for name, module in model.named_modules()}
    ran: dict[str, None] = {}

    def note(module: nn.Module, given: tuple[Any, ...]) -> None:
        del given
        ran.setdefault(names[module])

    hooks = [module.register_forward_pre_hook(note) for module in names]
    try:
        model(images)
    finally:
        for hook in hooks:
            hook.remove()
    modules = dict(model.named_modules())
    layers = {name: [name] for name in ran if _owns(modules[name])}
    for name, module in modules.items():
        if not _owns(module) or name in layers:
            continue
        parent = name.rpartition(".")[0]
        first_child = next((each for each in layers if _is_inside(each, name)), None)
        home = parent if parent in layers and name else first_child
        if home is not None:
            layers[home].append(name)
    return list(layers.values())


def _grouped(model: MHEXClassifier, ran: list[str]) -> tuple[Layer, ...]:
    """The layers of a classifier, from the input to the output."""
    scopes = [f"backbone.{name.partition('#')[0]}" for name in model.layer_names]
    groups: list[list[str]] = [[] for _ in range(len(scopes) + 2)]  # the stem, one per block, the classifier
    at = 1
    stem = any(_is_inside(name, scopes[0]) for name in ran)
    for name in ran:
        block = next((index for index in range(len(scopes)) if _is_inside(name, f"blocks.{index}")), None)
        if block is not None:
            groups[block + 1].append(name)
            at = max(at, block + 2)
            continue
        stem = stem and not _is_inside(name, scopes[0])
        groups[0 if stem else at].append(name)
    named = zip(("stem", *model.layer_names, "classifier"), groups, strict=True)
    return tuple(Layer(name, tuple(modules)) for name, modules in named if modules)


def _is_inside(name: str, scope: str) -> bool:
    return name == scope or scope == "" or name.startswith(f"{scope}.")


def _owns(module: nn.Module) -> bool:
    return next(module.parameters(recurse=False), None) is not None


def _randomize(model: nn.Module, layer: Layer, seed: int) -> None:
    number = np.random.SeedSequence([seed, zlib.crc32(layer.name.encode())]).generate_state(1)[0]
    # On the CPU, so that every device gets the same values and no other generator is touched.
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.default_generator.manual_seed(int(number))
        for name in layer.modules:
            module = model.get_submodule(name)
            if callable(getattr(module, "reset_parameters", None)):
                _reset(module)
            else:
                for parameter in module.parameters(recurse=False):
                    order = torch.randperm(parameter.numel()).to(parameter.device)
                    parameter.copy_(parameter.flatten()[order].view_as(parameter))


def _reset(module: nn.Module) -> None:
    """Give the module's own parameters and buffers fresh values, drawn on the CPU."""
    fresh: Any = copy.deepcopy(module).cpu()
    fresh.reset_parameters()
    for own, new in ((module._parameters, fresh._parameters), (module._buffers, fresh._buffers)):
        for name, tensor in own.items():
            if tensor is not None:
                tensor.copy_(new[name])


def _states(model: nn.Module, layer: Layer) -> list[tuple[Tensor, Tensor]]:
    modules = [model.get_submodule(name) for name in layer.modules]
    tensors = [
        each for module in modules for each in (*module.parameters(recurse=False), *module.buffers(recurse=False))
    ]
    return [(tensor, tensor.detach().clone()) for tensor in tensors]


def _maps(explainer: Explainer[M], model: M, images: Tensor, target: Tensor) -> Tensor:
    maps = explainer(model, images, target)
    if not isinstance(maps, Tensor):
        raise TypeError(f"explainer must give a tensor, got {type(maps).__name__}")
    return check_maps(images, maps)[1]


def _check_map(name: str, value: object) -> Tensor:
    maps = _checks.tensor(name, value, ndim=3).detach()
    if not bool(maps.isfinite().all()):
        raise ValueError(f"{name} must be finite, got NaN or infinity among its values")
    return maps.to(compute_dtype(maps.dtype))


def _check_inputs(images: object, target: object) -> tuple[Tensor, Tensor]:
    pictures = _checks.tensor("images", images, ndim=4)
    batch = pictures.shape[0]
    if not batch:
        raise ValueError("images must hold at least one, got none")
    most = torch.iinfo(torch.int64).max  # how many classes there are, only the explainer knows
    classes = _checks.class_indices("target", target, batch=batch, num_classes=most, device=pictures.device)
    if classes.ndim != 1:
        raise ValueError(f"target must have shape ({batch},), got {tuple(classes.shape)}")
    return pictures, classes


def _check_explainer(explainer: object) -> None:
    if not callable(explainer):
        raise TypeError(f"explainer must be a function, got {type(explainer).__name__}")


def _check_seed(seed: object) -> int:
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise TypeError(f"seed must be an int, got {type(seed).__name__}")
    if seed < 0:
        raise ValueError(f"seed must be at least 0, got {seed}")
    return seed
