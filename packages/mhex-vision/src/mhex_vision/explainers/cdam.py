"""Class-discriminative attention maps of vision transformers.

Letters: B batch, n tokens, m targets per sample, E width of what the classifier reads, N rows, H x W image size.
Source: CDAM, Brocki, Binda and Chung (arXiv 2312.02364).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from mhex_core import _checks
from mhex_core.attention import cdam
from mhex_vision.explainers.attention import UPSAMPLING, Upsampling, to_pixels
from mhex_vision.explainers.interface import check
from mhex_vision.explainers.view import wide
from mhex_vision.vit import Captured, capture

Mode = Literal["vanilla", "smooth", "integrated", "integrated_complete"]
MODES = ("vanilla", "smooth", "integrated", "integrated_complete")
PLACES = ("block_input", "attention_input")


@dataclass(frozen=True, kw_only=True)
class CDAM:
    """How much each patch, as the last block's attention reads it, speaks for the target's logit: signed.

    S_i = sum_c T_ic dlogit/dT_ic, T the result of the last block's first norm. Only the last block is run again, all
    steps of all images in one batch. For a prediction that is read from the class token this is attention scaled by
    what the class makes of it; where it is read from the patches themselves, the way around attention is not counted.

    Attributes:
        mode: "vanilla"; "smooth", averaged over noise; "integrated", averaged over scaled inputs, as the authors'
            code does, whose scores add up to nothing in particular; "integrated_complete", ours, along a path on which
            the scores of all tokens, prefix tokens included, add up to the logit's change from T = 0 to T.
        steps: Of all modes but "vanilla".
        noise: Its standard deviation as a share of the range of what is perturbed; None means 0.05 for "smooth" and
            none for "integrated", which are the modes that take it.
        perturb_at: Whether "smooth" and "integrated" change what enters the block or, as another release of the
            authors does, what its attention reads.
        seed: Of the noise, which is the same for every image.
        concept: What is explained in place of the logit: the inner product of what the classifier reads with this (E,),
            such as `mhex_vision.concepts.mean_embedding` of some images gives; or a folder of such images, of which
            the mean is taken, once for each model. The targets then count for nothing.
        batch_size: Rows of the last block, steps times images, at a time.
        upsample: How the patches' scores become pixels: "bilinear", or "nearest", every pixel of a patch alike.
    """

    mode: Mode = "vanilla"
    steps: int = 50
    noise: float | None = None
    perturb_at: Literal["block_input", "attention_input"] = "block_input"
    seed: int = 0
    concept: Tensor | str | Path | None = None
    batch_size: int = 256
    upsample: Upsampling = "bilinear"
    _latents: WeakKeyDictionary[nn.Module, Tensor] = field(
        default_factory=WeakKeyDictionary, init=False, repr=False, compare=False
    )

    def __post_init__(self) -> None:
        _checks.choice("mode", self.mode, MODES)
        _checks.positive_int("steps", self.steps)
        _checks.choice("perturb_at", self.perturb_at, PLACES)
        if self.noise is not None:
            _checks.number("noise", self.noise, low=0)
            if self.mode not in ("smooth", "integrated"):
                raise ValueError(f"noise belongs to modes 'smooth' and 'integrated', got it with {self.mode!r}")
        if isinstance(self.seed, bool) or not isinstance(self.seed, int):
            raise TypeError(f"seed must be an int, got {type(self.seed).__name__}")
        if isinstance(self.concept, Tensor):
            _checks.tensor("concept", self.concept, ndim=1)
        elif isinstance(self.concept, str | Path):
            if not Path(self.concept).is_dir():
                raise FileNotFoundError(f"concept must be a tensor or a folder of images, got {str(self.concept)!r}")
        elif self.concept is not None:
            raise TypeError(f"concept must be a tensor or a folder, got {type(self.concept).__name__}")
        _checks.positive_int("batch_size", self.batch_size)
        _checks.choice("upsample", self.upsample, UPSAMPLING)

    def __call__(self, model: nn.Module, images: Tensor, targets: Tensor) -> Tensor:
        """Explain."""
        check(model, images, targets)
        return self.several(model, images, targets.unsqueeze(1))[:, 0]

    def several(self, model: nn.Module, images: Tensor, targets: Tensor) -> Tensor:
        """Explain several targets of each image, for hardly more than one of them.

        Args:
            model: The network.
            images: Normalised, (B, C, H, W).
            targets: int64 (B, m).

        Returns:
            float32 (B, m, H, W).

        Raises:
            TypeError: An argument is of another type.
            ValueError: The model is no vision transformer that is known, or an argument does not fit it.
        """
        check(model, images, targets[:, 0] if isinstance(targets, Tensor) and targets.ndim == 2 else targets)
        seen = capture(model, images, graph=False)
        batch, classes = seen.logits.shape
        _checks.class_indices("targets", targets, batch=batch, num_classes=classes, device=seen.logits.device)
        if self.concept is None:
            classify, wanted = seen.tail.logits, targets
        else:
            latent = self._latent(model, seen)

            def classify(hidden: Tensor, normed: Tensor, rows: Tensor) -> Tensor:
                del rows
                return (wide(seen.tail.features(hidden, normed)) @ latent).unsqueeze(1)

            wanted = torch.zeros_like(targets)
        scores = cdam(
            seen.inputs[-1],
            seen.tail.normalize,
            classify,
            wanted.to(seen.logits.device),
            mode=self.mode,
            steps=self.steps,
            noise=self.noise,
            perturb_at=self.perturb_at,
            seed=self.seed,
            rows_at_a_time=self.batch_size,
        )
        return to_pixels(seen.maps(scores), images, upsample=self.upsample)

    def _latent(self, model: nn.Module, seen: Captured) -> Tensor:
        """What the concept is, (E,), on the model's device."""
        if seen.features is None:
            raise ValueError(
                "model must have a classifier of its own for concepts, whose inputs they are compared with; "
                "got an MHEXClassifier whose network's classifier was dropped"
            )
        if isinstance(self.concept, Tensor):
            latent = self.concept
        else:
            from mhex_vision.concepts import folder_embedding

            if model not in self._latents:
                self._latents[model] = folder_embedding(model, Path(str(self.concept)))
            latent = self._latents[model]
        if latent.shape != seen.features.shape[1:]:
            raise ValueError(f"concept must have shape {tuple(seen.features.shape[1:])}, got {tuple(latent.shape)}")
        return latent.detach().clone().to(wide(seen.features))
