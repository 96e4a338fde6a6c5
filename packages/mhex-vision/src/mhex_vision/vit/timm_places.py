"""The transformers of timm whose attention is told of places: EVA-02 and DINOv3 by rotation, BEiT by a sum.

Letters: see `mhex_vision.vit.architecture`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mhex_vision.vit.architecture import Architecture, Grid, evenly, join_heads, one_hot, refuse_overridden, split_heads
from mhex_vision.vit.timm import RUNS, TimmViT

_EVA, _BEIT = ("timm.models.eva", "Eva"), ("timm.models.beit", "Beit")


class _Told(TimmViT):
    """What the two have in common: layer scales that are parameters of the block, and plain pooling."""

    def feed_forward(self, block: Any, hidden: Tensor) -> Tensor:
        """See `Architecture.feed_forward`."""
        branch: Tensor = block.drop_path2(_scaled(block.gamma_2, block.mlp(block.norm2(hidden))))
        return branch

    def readout(self, model: Any, tokens: int) -> Tensor:
        """See `Architecture.readout`."""
        return evenly(tokens, self.prefix(model)) if model.global_pool == "avg" else one_hot(tokens, 0)

    def after_blocks(self, model: Any) -> tuple[str, ...]:
        """See `Architecture.after_blocks`."""
        return ("norm", "fc_norm", "head_drop", *self.classifiers(model))


class TimmEva(_Told):
    """`Eva` with blocks that normalise first: EVA, EVA-02, DINOv3, and other transformers with rotated places."""

    def check(self, model: Any) -> None:
        """See `Architecture.check`."""
        refuse_overridden(model, _EVA, (*RUNS, "pool"))
        block: Any
        for block in self.blocks(model):
            refuse_overridden(block, (_EVA[0], "EvaBlock"))
            rotated = type(block.attn).__name__ == "AttentionRope"
            refuse_overridden(
                block.attn, ("timm.layers.attention", "AttentionRope") if rotated else (_EVA[0], "EvaAttention")
            )
            if getattr(block.attn, "num_kv_groups", 1) != 1:
                raise ValueError("model must have keys and values for each head, got groups of heads that share them")
        if isinstance(model.patch_drop, nn.Module) and type(model.patch_drop) is not nn.Identity:
            raise ValueError("model must keep all of its patches, got one with patch_drop_rate above 0")
        if getattr(model.rope, "aug_active", False):
            raise ValueError("model must know its places, got one that moves them at random in training")
        if model.global_pool not in ("token", "avg"):
            raise ValueError(f"global_pool must be 'token' or 'avg', got {model.global_pool!r}")

    def embed(self, model: Any, images: Tensor) -> tuple[Tensor, Grid]:
        """See `Architecture.embed`."""
        hidden, _ = model._pos_embed(model.patch_embed(images))
        return model.norm_pre(hidden), self.grid(model, (images.shape[2], images.shape[3]))

    def places(self, model: Any, grid: Grid) -> tuple[Any, ...]:
        """Sines and cosines by which queries and keys are rotated, one tensor for each block."""
        if model.rope is None:
            return super().places(model, grid)
        if model.dynamic_img_size or not hasattr(model.rope, "feat_shape"):
            turns = model.rope.get_embed(shape=list(grid))
        else:
            turns = model.rope.get_embed()
        return tuple(turns) if getattr(model, "rope_mixed", False) else (turns,) * len(self.blocks(model))

    def attend(
        self, block: Any, normed: Tensor, *, weights: bool = False, queries: int | None = None, places: Any = None
    ) -> tuple[Tensor, Tensor | None]:
        """See `Architecture.attend`."""
        attention = block.attn
        if not weights:
            return block.drop_path1(_scaled(block.gamma_1, attention(normed, rope=places))), None
        query, key, value = _projected(attention, normed, queries)
        query, key = attention.q_norm(query), attention.k_norm(key)
        if places is not None:
            query, key = (_turned(attention, part, places).type_as(value) for part in (query, key))
        shown = ((query * attention.scale) @ key.transpose(-2, -1)).softmax(dim=-1)
        mixed = attention.norm(join_heads(attention.attn_drop(shown) @ value))
        if attention.gate is not None:
            mixed = mixed * attention.gate(normed[:, :queries]).sigmoid()
        return block.drop_path1(_scaled(block.gamma_1, attention.proj_drop(attention.proj(mixed)))), shown


class TimmBeit(_Told):
    """`Beit`: BEiT and BEiT v2."""

    def check(self, model: Any) -> None:
        """See `Architecture.check`."""
        refuse_overridden(model, _BEIT, RUNS)
        block: Any
        for block in self.blocks(model):
            refuse_overridden(block, (_BEIT[0], "Block"))
            refuse_overridden(block.attn, (_BEIT[0], "Attention"))
        if not model.global_pool:
            raise ValueError("model must pool its tokens, got one with global_pool=''")

    def embed(self, model: Any, images: Tensor) -> tuple[Tensor, Grid]:
        """See `Architecture.embed`."""
        patches = model.patch_embed(images)
        hidden = torch.cat((model.cls_token.expand(patches.shape[0], -1, -1), patches), dim=1)
        if model.pos_embed is not None:
            hidden = hidden + model.pos_embed
        return model.pos_drop(hidden), self.grid(model, (images.shape[2], images.shape[3]))

    def places(self, model: Any, grid: Grid) -> tuple[Any, ...]:
        """What relative positions add to all attention before its softmax, where blocks share it."""
        shared = None if model.rel_pos_bias is None else model.rel_pos_bias()
        return super().places(model, grid) if shared is None else (shared,) * len(self.blocks(model))

    def attend(
        self, block: Any, normed: Tensor, *, weights: bool = False, queries: int | None = None, places: Any = None
    ) -> tuple[Tensor, Tensor | None]:
        """See `Architecture.attend`."""
        attention = block.attn
        if not weights:
            return block.drop_path1(_scaled(block.gamma_1, attention(normed, shared_rel_pos_bias=places))), None
        query, key, value = _projected(attention, normed, queries)
        scores = (query * attention.scale) @ key.transpose(-2, -1)
        if attention.relative_position_bias_table is not None:
            scores = scores + attention._get_rel_pos_bias()[..., :queries, :]
        if places is not None:
            scores = scores + places[..., :queries, :]
        shown = scores.softmax(dim=-1)
        mixed = attention.proj(join_heads(attention.attn_drop(shown) @ value))
        return block.drop_path1(_scaled(block.gamma_1, attention.proj_drop(mixed))), shown

    def features(self, model: Any, hidden: Tensor) -> Tensor:
        """The class token or the mean of the patches, (B, C)."""
        tokens = model.norm(hidden)
        pooled = tokens[:, self.prefix(model) :].mean(dim=1) if model.global_pool == "avg" else tokens[:, 0]
        normed: Tensor = model.fc_norm(pooled)
        return normed


def _scaled(scale: Tensor | None, branch: Tensor) -> Tensor:
    return branch if scale is None else scale * branch


def _projected(attention: Any, normed: Tensor, queries: int | None) -> tuple[Tensor, Tensor, Tensor]:
    """Queries of the first tokens (None: of all), keys and values, by head."""
    asking = normed[:, :queries]
    parts: tuple[Tensor, ...]
    if attention.qkv is None:
        parts = attention.q_proj(asking), attention.k_proj(normed), attention.v_proj(normed)
    else:
        bias = attention.qkv.bias
        if getattr(attention, "q_bias", None) is not None:
            bias = torch.cat((attention.q_bias, attention.k_bias, attention.v_bias))
        biases = (None,) * 3 if bias is None else bias.chunk(3)
        rows = zip((asking, normed, normed), attention.qkv.weight.chunk(3), biases, strict=True)
        parts = tuple(F.linear(*row) for row in rows)
    query, key, value = (split_heads(part, attention.num_heads) for part in parts)
    return query, key, value


def _turned(attention: Any, tokens: Tensor, turns: Tensor) -> Tensor:
    """Queries or keys (B, H, m, D) with those of the patches among them rotated."""
    from timm.layers.pos_embed_sincos import apply_rot_embed_cat

    before = attention.num_prefix_tokens
    patches = tokens[:, :, before:]
    turned = apply_rot_embed_cat(
        patches, turns[..., : patches.shape[2], :], half=getattr(attention, "rotate_half", False)
    )
    return torch.cat([tokens[:, :, :before], turned], dim=2)


ARCHITECTURES: dict[tuple[str, str], Architecture] = {_EVA: TimmEva(), _BEIT: TimmBeit()}
