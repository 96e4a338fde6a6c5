"""The vision transformers of torchvision. Letters: see `mhex_vision.vit.architecture`."""

from __future__ import annotations

from typing import Any

from torch import Tensor, cat, nn
from torch.nn import functional as F

from mhex_vision.vit.architecture import (
    Architecture,
    Grid,
    join_heads,
    one_hot,
    project,
    refuse_overridden,
    softmax_attention,
    split_heads,
)

_HOME = "torchvision.models.vision_transformer"
_MODEL, _ENCODER, _BLOCK = ((_HOME, name) for name in ("VisionTransformer", "Encoder", "EncoderBlock"))


class TorchvisionViT(Architecture):
    """vit_b_16 and its kin."""

    def check(self, model: Any) -> None:
        """See `Architecture.check`."""
        refuse_overridden(model, _MODEL)
        refuse_overridden(model.encoder, _ENCODER)
        block: Any
        for block in self.blocks(model):
            refuse_overridden(block, _BLOCK)
            refuse_overridden(block.self_attention, (nn.MultiheadAttention.__module__, "MultiheadAttention"))

    def block_names(self, model: Any) -> tuple[str, ...]:
        """See `Architecture.block_names`."""
        return tuple(f"encoder.layers.{name}" for name, _ in model.encoder.layers.named_children())

    def prefix(self, model: Any) -> int:  # noqa: ARG002
        """The class token."""
        return 1

    def image_size(self, model: Any) -> tuple[int, int]:
        """See `Architecture.image_size`."""
        return int(model.image_size), int(model.image_size)

    def grid(self, model: Any, size: tuple[int, int]) -> Grid:
        """See `Architecture.grid`."""
        return size[0] // model.patch_size, size[1] // model.patch_size

    def embed(self, model: Any, images: Tensor) -> tuple[Tensor, Grid]:
        """See `Architecture.embed`."""
        patches = model._process_input(images)
        hidden = cat([model.class_token.expand(images.shape[0], -1, -1), patches], dim=1)
        return model.encoder.dropout(hidden + model.encoder.pos_embedding), self.grid(model, _size(images))

    def normalize(self, block: Any, hidden: Tensor) -> Tensor:
        """See `Architecture.normalize`."""
        normed: Tensor = block.ln_1(hidden)
        return normed

    def attend(
        self, block: Any, normed: Tensor, *, weights: bool = False, queries: int | None = None, places: Any = None
    ) -> tuple[Tensor, Tensor | None]:
        """See `Architecture.attend`."""
        del places
        attention = block.self_attention
        if not weights:
            return block.dropout(attention(normed, normed, normed, need_weights=False)[0]), None
        # The weights that nn.MultiheadAttention returns are not those its output was computed from.
        projected = project(normed, attention.in_proj_weight, attention.in_proj_bias, queries)
        query, key, value = (split_heads(part, attention.num_heads) for part in projected)
        shown = softmax_attention(query, key, attention.head_dim**-0.5)
        mixed = F.dropout(shown, attention.dropout, attention.training) @ value
        return block.dropout(attention.out_proj(join_heads(mixed))), shown

    def feed_forward(self, block: Any, hidden: Tensor) -> Tensor:
        """See `Architecture.feed_forward`."""
        branch: Tensor = block.mlp(block.ln_2(hidden))
        return branch

    def features(self, model: Any, hidden: Tensor) -> Tensor:
        """The class token, (B, C)."""
        token: Tensor = model.encoder.ln(hidden)[:, 0]
        return token

    def classify(self, model: Any, features: Tensor) -> Tensor:
        """See `Architecture.classify`."""
        logits: Tensor = model.heads(features)
        return logits

    def readout(self, model: Any, tokens: int) -> Tensor:  # noqa: ARG002
        """See `Architecture.readout`."""
        return one_hot(tokens, 0)

    def classifiers(self, model: Any) -> tuple[str, ...]:  # noqa: ARG002
        """See `Architecture.classifiers`."""
        return ("heads.head",)

    def after_blocks(self, model: Any) -> tuple[str, ...]:  # noqa: ARG002
        """See `Architecture.after_blocks`."""
        return ("encoder.ln", "heads")


def _size(images: Tensor) -> tuple[int, int]:
    return images.shape[2], images.shape[3]


ARCHITECTURES: dict[tuple[str, str], Architecture] = {_MODEL: TorchvisionViT()}
