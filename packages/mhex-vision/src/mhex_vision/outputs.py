"""What the output of a network means: logits, or the probabilities that somebody made of them already.

Letters: B batch, K classes.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

Ending = Literal["logits", "softmax", "sigmoid"]

# What a network may end in. Logarithms of a softmax are logits: a softmax of them gives the same probabilities.
_ENDINGS: dict[object, Ending] = {
    **dict.fromkeys((nn.Softmax, F.softmax, torch.softmax, "softmax"), "softmax"),
    **dict.fromkeys((nn.Sigmoid, F.sigmoid, torch.sigmoid, "sigmoid"), "sigmoid"),
}
_RESHAPING = ("squeeze", "flatten", "view", "reshape", "contiguous", "float")

_MANY = 16  # values of which logits are not all in [0, 1] by chance

ONE_LOGIT = (
    "a network with one logit tells two classes apart: wrap it in mhex_vision.TwoClasses, or attach blocks with "
    "num_classes=2 and classifier='keep'"
)


class TwoClasses(nn.Module):
    """A network with one logit z as a classifier of two classes, with logits 0 and z.

    Softmax then gives what a sigmoid of z gives, for "no" (class 0) and for "yes" (class 1).

    Args:
        network: Takes images and gives (B, 1) or (B,) logits, or their sigmoid.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        """Classify images (B, C, H, W): (B, 2) logits."""
        return of_two_classes(as_logits(logits_in(self.network(images)), ending_of_module(self.network)))


def logits_in(output: Any) -> Any:
    """The logits in what a network returned: itself, its attribute `logits` or its entry "logits"."""
    if isinstance(output, Tensor | fx.Proxy):
        return output
    if isinstance(output, Mapping):
        return output.get("logits", output)
    return getattr(output, "logits", output)


def as_logits(values: Tensor, ending: Ending) -> Tensor:
    """Logits whose softmax or sigmoid gives back what a network that ends in one returns."""
    if ending == "logits":
        return values
    least = torch.finfo(values.dtype).tiny
    logarithm = values.clamp_min(least).log()
    return logarithm if ending == "softmax" else logarithm - (1 - values).clamp_min(least).log()


def of_two_classes(logit: Tensor) -> Tensor:
    """(B, 2) logits 0 and z of the one logit z, (B, 1) or (B,)."""
    column = logit.reshape(-1, 1)
    return torch.cat([torch.zeros_like(column), column], dim=1)


def own_logits(output: Tensor, ending: Ending, num_classes: int) -> Tensor:
    """The (B, K) logits in what a kept classifier gives, one logit or its sigmoid standing for two classes."""
    logits = as_logits(output, ending)
    return of_two_classes(logits) if num_classes == 2 and logits[:1].numel() == 1 else logits


def class_logits(output: object, batch: int, *, multi_label: bool = False) -> Tensor:
    """The (B, K) logits in what a network returned for B images.

    Rows that are probabilities of exclusive classes (none negative, their sum one) become their logarithms, so that no
    second softmax flattens them.

    Raises:
        ValueError: There are no such logits, or a single one where classes exclude each other.
    """
    logits = logits_in(output)
    if not isinstance(logits, Tensor) or logits.ndim != 2 or logits.shape[0] != batch:
        came = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ValueError(f"model must give logits of shape ({batch}, K), got {came}")
    if multi_label:
        return logits
    if logits.shape[1] == 1:
        raise ValueError(f"model must give logits of shape ({batch}, K) with K of at least 2, got one; {ONE_LOGIT}")
    return as_logits(logits, "softmax") if are_probabilities(logits) else logits


def are_probabilities(values: Tensor) -> bool:
    """Whether every row of (B, K) holds probabilities of exclusive classes. Half precision is too coarse to say."""
    if values.dtype not in (torch.float32, torch.float64) or not values.numel() or values.device.type == "meta":
        return False
    seen = values.detach()
    return bool((seen >= 0).all()) and bool(((seen.sum(dim=1) - 1).abs() < 1e-5).all())


def is_multi_label(model: object) -> bool:
    """Whether a classifier of ours says that its classes are independent of each other."""
    return getattr(getattr(model, "config", None), "multi_label", False) is True


def ending_of_graph(network: nn.Module, graph: fx.Graph) -> Ending:
    """What a traced network ends in."""
    node = next(node for node in reversed(list(graph.nodes)) if node.op == "output").args[0]
    while isinstance(node, fx.Node):
        kind: object = type(network.get_submodule(str(node.target))) if node.op == "call_module" else node.target
        if kind in _ENDINGS:
            return _ENDINGS[kind]
        name = kind if isinstance(kind, str) else getattr(kind, "__name__", "")
        if name not in _RESHAPING and kind not in (nn.Identity, nn.Flatten, nn.Dropout):
            break
        node = node.args[0] if node.args else None
    return "logits"


def ending_of_module(network: nn.Module) -> Ending:
    """What a chain of modules ends in, as far as its last module says; what is no chain gives logits."""
    while isinstance(network, nn.Sequential) and len(network):
        network = network[-1]
    return _ENDINGS.get(type(network), "logits")


def say_what_looks_like_probabilities(network: nn.Module, values: Tensor) -> None:
    """Warn where a network without a word about it gives probabilities, or what may be those of independent classes."""
    if are_probabilities(values):
        say_probabilities(network, "softmax")
    elif values.numel() >= _MANY and bool(((values >= 0) & (values <= 1)).all()):
        warnings.warn(
            f"all outputs of {type(network).__name__} lie in [0, 1], as those of a sigmoid do: they are read as logits "
            "of classes that exclude each other; without its sigmoid, and with multi_label=True, an MHEXClassifier or "
            "a PlainClassifier reads classes as independent",
            stacklevel=4,
        )


def say_probabilities(network: nn.Module, ending: Ending) -> None:
    """Warn that a network gives probabilities, and say what is done with them."""
    warnings.warn(
        f"{type(network).__name__} ends in a {ending}: its outputs are read as the probabilities they are, and their "
        f"{'logarithms' if ending == 'softmax' else 'log-odds'} as logits",
        stacklevel=4,
    )
