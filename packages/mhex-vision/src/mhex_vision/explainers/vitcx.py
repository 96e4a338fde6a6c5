"""ViT-CX: causal explanation of vision transformers by the masks that their own features draw.

Letters: B batch, C channels, N masks, h x w patch grid, H x W image size.
Source: ViT-CX, Xie, Li, Cao and Zhang, IJCAI 2023 (arXiv 2211.03064).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mhex_core import _checks
from mhex_core.modes import in_evaluation_mode
from mhex_vision.explainers.attention import observed
from mhex_vision.explainers.interface import load, require
from mhex_vision.explainers.view import LogitsView, wide

LIBRARY = "sklearn.cluster"


@dataclass(frozen=True, kw_only=True)
class ViTCX:
    """How the target's probability answers to masks, which are the feature maps of the last block, alike ones joined.

    Two forward passes for every mask, of which there are as many as the features draw different pictures.

    Attributes:
        distance: Masks whose cosine distance stays below it are one (complete linkage).
        noise: Standard deviation, in the units of normalised images, of what is put where a mask is dark.
        seed: Of the noise, which is the same for every image.
        batch_size: Masked images at a time.
    """

    distance: float = 0.1
    noise: float = 0.1
    seed: int = 0
    batch_size: int = 64

    def __post_init__(self) -> None:
        _checks.number("distance", self.distance, low=0, high=2)
        _checks.number("noise", self.noise, low=0)
        if isinstance(self.seed, bool) or not isinstance(self.seed, int):
            raise TypeError(f"seed must be an int, got {type(self.seed).__name__}")
        _checks.positive_int("batch_size", self.batch_size)
        require("sklearn", needed_by="vit-cx", distribution="scikit-learn")

    def __call__(self, model: nn.Module, images: Tensor, targets: Tensor) -> Tensor:
        """Explain."""
        seen = observed(model, images, targets, graph=False)
        features = seen.maps(wide(seen.normed[-1]).detach().transpose(1, 2))
        with torch.no_grad(), in_evaluation_mode(model):
            view = LogitsView(model, images, targets)
            maps = [
                self._map(view, image, int(target), self._masks(feature, (image.shape[1], image.shape[2])))
                for image, target, feature in zip(images, targets, features, strict=True)
            ]
        return torch.stack(maps).float()

    def _masks(self, features: Tensor, size: tuple[int, int]) -> Tensor:
        """The features (C, h, w) of one image as masks (N, H, W) in [0, 1]."""
        resized = F.interpolate(features.unsqueeze(0), size=size, mode="bilinear", align_corners=False)[0]
        masks = _min_max(resized)
        if len(masks) == 1:
            return masks
        flat = F.normalize(masks.flatten(1).double(), dim=1)
        apart = (1 - flat @ flat.T).clamp(min=0)
        library = load(LIBRARY, needed_by="vit-cx", distribution="scikit-learn")
        clusters = library.AgglomerativeClustering(
            n_clusters=None, metric="precomputed", linkage="complete", distance_threshold=self.distance
        )
        labels = torch.from_numpy(clusters.fit_predict(apart.cpu().numpy())).to(masks.device)
        joined = masks.new_zeros(int(labels.max()) + 1, *size)
        return _min_max(joined.index_add(0, labels, masks))

    def _map(self, view: LogitsView, image: Tensor, target: int, masks: Tensor) -> Tensor:
        """What the masks' effects on one image (C, H, W) add up to, (H, W)."""
        generator = torch.Generator().manual_seed(self.seed)
        pixels = wide(image.detach())
        whole = self._probability(view, pixels.unsqueeze(0), target)
        total = torch.zeros_like(masks[0])
        for part in torch.split(masks, self.batch_size):
            # Mask by mask, so that the noise is the same however many go at a time.
            grain = torch.stack([torch.randn(pixels.shape, generator=generator) for _ in part]).to(pixels)
            added = self.noise * grain * (1 - part.unsqueeze(1))
            effect = self._probability(view, pixels * part.unsqueeze(1) + added, target)
            effect = effect - self._probability(view, pixels + added, target) + whole
            total += torch.einsum("n,nhw->hw", effect.to(part), part)
        covered = masks.sum(dim=0)
        return torch.where(covered > 0, total / torch.where(covered > 0, covered, 1.0), 0.0) / len(masks)

    @staticmethod
    def _probability(view: LogitsView, images: Tensor, target: int) -> Tensor:
        probability: Tensor = view(images).softmax(dim=1)[:, target]
        return probability


def _min_max(maps: Tensor) -> Tensor:
    """Each of (N, H, W) between its own extremes; a constant one becomes zeros."""
    low, high = maps.amin(dim=(1, 2), keepdim=True), maps.amax(dim=(1, 2), keepdim=True)
    return (maps - low) / torch.where(high > low, high - low, 1.0)
