"""The network that judges: what it believes of an image, and no more.

Letters: B batch, K classes, H x W image size.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from mhex_core import _checks
from mhex_core.modes import in_evaluation_mode
from mhex_vision.outputs import class_logits


class Judge:
    """How probable a network finds a class. It may be another than the one explained, and usually should be.

    Args:
        model: Takes (B, 3, H, W) and gives (B, K) logits, by themselves or as `logits` of what it returns. A module is
            in evaluation mode for each call, and in its own mode again afterwards.
        multi_label: Whether classes are independent of each other (sigmoid instead of softmax).
        batch_size: Images at a time, however many are asked about.
    """

    def __init__(self, model: Callable[[Tensor], object], *, multi_label: bool = False, batch_size: int = 256) -> None:
        if not callable(model):
            raise TypeError(f"model must be a network or a function, got {type(model).__name__}")
        self.model = model
        self.multi_label = _checks.flag("multi_label", multi_label)
        self.batch_size = _checks.positive_int("batch_size", batch_size)

    def logits(self, images: Tensor) -> Tensor:
        """(B, K), without gradients, in float32 or wider."""
        _checks.tensor("images", images, ndim=4)
        if isinstance(self.model, nn.Module):
            with in_evaluation_mode(self.model), torch.no_grad():
                return self._all(images)
        with torch.no_grad():
            return self._all(images)

    def probabilities(self, images: Tensor) -> Tensor:
        """(B, K)."""
        logits = self.logits(images)
        return logits.sigmoid() if self.multi_label else logits.softmax(dim=1)

    def probability(self, images: Tensor, target: Tensor) -> Tensor:
        """Of each image's target: (B,).

        Args:
            images: (B, 3, H, W), normalised as the judge expects.
            target: int64 (B,).
        """
        return _of_target(self.probabilities(images), target)

    def logit(self, images: Tensor, target: Tensor) -> Tensor:
        """Of each image's target: (B,).

        Args:
            images: See `probability`.
            target: See `probability`.
        """
        return _of_target(self.logits(images), target)

    def _all(self, images: Tensor) -> Tensor:
        parts = [self._some(part) for part in torch.split(images, self.batch_size)]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _some(self, images: Tensor) -> Tensor:
        logits = class_logits(self.model(images), images.shape[0], multi_label=self.multi_label)
        return logits if logits.dtype == torch.float64 else logits.float()


def _of_target(values: Tensor, target: Tensor) -> Tensor:
    batch, classes = values.shape
    target = _checks.class_indices("target", target, batch=batch, num_classes=classes, device=values.device)
    if target.ndim != 1:
        raise ValueError(f"target must have shape ({batch},), got {tuple(target.shape)}")
    return values.gather(1, target.unsqueeze(1)).squeeze(1)


def as_judge(judge: object) -> Judge:
    """A `Judge` as it is, a network as one."""
    if isinstance(judge, Judge):
        return judge
    if isinstance(judge, nn.Module):
        return Judge(judge)
    raise TypeError(f"judge must be a Judge or a network, got {type(judge).__name__}")


def check_maps(images: object, saliency: object) -> tuple[Tensor, Tensor]:
    """Images (B, C, H, W) and maps (B, H, W) of one size.

    Raises:
        TypeError: One is no floating-point tensor.
        ValueError: They do not fit each other, or a map holds NaN.
    """
    images = _checks.tensor("images", images, ndim=4)
    saliency = _checks.tensor("saliency", saliency, ndim=3)
    expected = (images.shape[0], *images.shape[2:])
    if tuple(saliency.shape) != expected:
        raise ValueError(f"saliency must have shape {expected} to go with images, got {tuple(saliency.shape)}")
    if bool(saliency.isnan().any()):
        raise ValueError("saliency must be numbers, got NaN among them")
    return images, saliency.detach().to(images.device)
