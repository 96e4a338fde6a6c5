"""The vision transformers of timm: ViT, DeiT with and without distillation, DINOv2 with and without registers.

Letters: see `mhex_vision.vit.architecture`.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, cat, nn

from mhex_vision.vit.architecture import (
    Architecture,
    Grid,
    evenly,
    join_heads,
    one_hot,
    project,
    refuse_overridden,
    softmax_attention,
    split_heads,
)

_HOME = "timm.models.vision_transformer"
_MODEL, _BLOCK = (_HOME, "VisionTransformer"), (_HOME, "Block")
_DISTILLED = ("timm.models.deit", "VisionTransformerDistilled")
_ATTENTION = ("timm.layers.attention", "Attention")
RUNS = ("forward", "forward_features", "forward_head")


class TimmViT(Architecture):
    """`VisionTransformer` with blocks of the kind `Block` and their plain `Attention`."""

    def check(self, model: Any) -> None:
        """See `Architecture.check`."""
        refuse_overridden(model, _MODEL, RUNS)
        _check_parts(model, self.blocks(model))

    def block_names(self, model: Any) -> tuple[str, ...]:
        """See `Architecture.block_names`."""
        return tuple(f"blocks.{name}" for name, _ in model.blocks.named_children())

    def prefix(self, model: Any) -> int:
        """See `Architecture.prefix`."""
        return int(model.num_prefix_tokens)

    def image_size(self, model: Any) -> tuple[int, int]:
        """See `Architecture.image_size`."""
        height, width = model.patch_embed.img_size
        return int(height), int(width)

    def grid(self, model: Any, size: tuple[int, int]) -> Grid:
        """See `Architecture.grid`."""
        rows, columns = model.patch_embed.dynamic_feat_size(size)
        return int(rows), int(columns)

    def embed(self, model: Any, images: Tensor) -> tuple[Tensor, Grid]:
        """See `Architecture.embed`."""
        hidden = model.norm_pre(model._pos_embed(model.patch_embed(images)))
        return hidden, self.grid(model, (images.shape[2], images.shape[3]))

    def normalize(self, block: Any, hidden: Tensor) -> Tensor:
        """See `Architecture.normalize`."""
        normed: Tensor = block.norm1(hidden)
        return normed

    def attend(
        self, block: Any, normed: Tensor, *, weights: bool = False, queries: int | None = None, places: Any = None
    ) -> tuple[Tensor, Tensor | None]:
        """See `Architecture.attend`."""
        del places
        attention = block.attn
        if not weights:
            return block.drop_path1(block.ls1(attention(normed))), None
        qkv = attention.qkv
        projected = qkv(normed).chunk(3, dim=-1) if queries is None else project(normed, qkv.weight, qkv.bias, queries)
        query, key, value = (split_heads(part, attention.num_heads) for part in projected)
        shown = softmax_attention(attention.q_norm(query), attention.k_norm(key), attention.scale)
        mixed = attention.norm(join_heads(attention.attn_drop(shown) @ value))
        gate = getattr(attention, "gate", None)  # not there in early versions
        if gate is not None:
            mixed = mixed * gate(normed[:, :queries]).sigmoid()
        return block.drop_path1(block.ls1(attention.proj_drop(attention.proj(mixed)))), shown

    def feed_forward(self, block: Any, hidden: Tensor) -> Tensor:
        """See `Architecture.feed_forward`."""
        branch: Tensor = block.drop_path2(block.ls2(block.mlp(block.norm2(hidden))))
        return branch

    def features(self, model: Any, hidden: Tensor) -> Tensor:
        """The class token or the pooled tokens, (B, C)."""
        pooled: Tensor = model.fc_norm(model.pool(model.norm(hidden)))
        return pooled

    def classify(self, model: Any, features: Tensor) -> Tensor:
        """See `Architecture.classify`."""
        logits: Tensor = model.head(model.head_drop(features))
        return logits

    def readout(self, model: Any, tokens: int) -> Tensor:
        """See `Architecture.readout`."""
        if model.global_pool == "token":
            return one_hot(tokens, 0)
        if model.global_pool != "avg":
            raise ValueError(f"global_pool must be 'token' or 'avg', got {model.global_pool!r}")
        return evenly(tokens, 0 if model.pool_include_prefix else self.prefix(model))

    def classifiers(self, model: Any) -> tuple[str, ...]:  # noqa: ARG002
        """See `Architecture.classifiers`."""
        return ("head",)

    def after_blocks(self, model: Any) -> tuple[str, ...]:
        """See `Architecture.after_blocks`."""
        pool = ("attn_pool",) if model.attn_pool is not None else ()
        return ("norm", *pool, "fc_norm", "head_drop", *self.classifiers(model))


class TimmDistilledViT(TimmViT):
    """`VisionTransformerDistilled`, where a class and a distillation token have a classifier each."""

    def check(self, model: Any) -> None:
        """See `Architecture.check`."""
        refuse_overridden(model, _DISTILLED, RUNS)
        if model.distilled_training:
            raise ValueError("model must give one prediction, got one with distilled_training=True")
        _check_parts(model, self.blocks(model))

    def features(self, model: Any, hidden: Tensor) -> Tensor:
        """Class and distillation token, (B, 2C)."""
        tokens = model.norm(hidden)
        return cat([tokens[:, 0], tokens[:, 1]], dim=-1)

    def classify(self, model: Any, features: Tensor) -> Tensor:
        """See `Architecture.classify`."""
        # Versions differ in their dropout; the model knows its own, and reads these two tokens only.
        logits: Tensor = model.forward_head(features.reshape(features.shape[0], 2, features.shape[1] // 2))
        return logits

    def readout(self, model: Any, tokens: int) -> Tensor:  # noqa: ARG002
        """See `Architecture.readout`."""
        return one_hot(tokens, 0, 1)

    def classifiers(self, model: Any) -> tuple[str, ...]:  # noqa: ARG002
        """See `Architecture.classifiers`."""
        return ("head", "head_dist")


def _check_parts(model: Any, blocks: tuple[Any, ...]) -> None:
    for block in blocks:
        refuse_overridden(block, _BLOCK)
        refuse_overridden(block.attn, _ATTENTION)
    if type(model.patch_drop) is not nn.Identity:
        raise ValueError("model must keep all of its patches, got one with patch_drop_rate above 0")
    if not model.global_pool:
        raise ValueError("model must pool its tokens, got one with global_pool=''")


ARCHITECTURES: dict[tuple[str, str], Architecture] = {_MODEL: TimmViT(), _DISTILLED: TimmDistilledViT()}
