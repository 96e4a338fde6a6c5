"""The vision transformers of Hugging Face transformers, versions 4 and 5: ViT, DeiT, DINOv2 with and without registers.

Letters: see `mhex_vision.vit.architecture`.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, cat
from torch.nn import functional as F

from mhex_vision.vit.architecture import (
    Architecture,
    Grid,
    evenly,
    join_heads,
    one_hot,
    refuse_overridden,
    softmax_attention,
    split_heads,
)


class HuggingFaceViT(Architecture):
    """An image classifier of one family.

    Args:
        family: The package of the family, such as "vit".
        name: What the names of its classes begin with, such as "ViT".
        classifier: What its name ends in.
    """

    def __init__(self, family: str, name: str, classifier: str = "ForImageClassification") -> None:
        self.home = f"transformers.models.{family}.modeling_{family}"
        self.name = name
        self.kind = (self.home, f"{name}{classifier}")

    def check(self, model: Any) -> None:
        """See `Architecture.check`."""
        refuse_overridden(model, self.kind)
        encoder = _encoder(model)
        refuse_overridden(encoder, (self.home, f"{self.name}Model"))
        refuse_overridden(encoder.embeddings, (self.home, f"{self.name}Embeddings"))
        if hasattr(encoder, "encoder"):
            refuse_overridden(encoder.encoder, (self.home, f"{self.name}Encoder"))
        block: Any
        for block in self.blocks(model):
            refuse_overridden(block, (self.home, f"{self.name}Layer"))
            refuse_overridden(block.attention, (self.home, f"{self.name}Attention"))

    def block_names(self, model: Any) -> tuple[str, ...]:
        """See `Architecture.block_names`."""
        # Version 5 has done away with the encoder in between, though not everywhere.
        encoder = _encoder(model)
        layers = "layers" if hasattr(encoder, "layers") else "encoder.layer"
        return tuple(
            f"{model.base_model_prefix}.{layers}.{name}" for name, _ in encoder.get_submodule(layers).named_children()
        )

    def prefix(self, model: Any) -> int:  # noqa: ARG002
        """The class token."""
        return 1

    def image_size(self, model: Any) -> tuple[int, int]:
        """See `Architecture.image_size`."""
        height, width = _encoder(model).embeddings.patch_embeddings.image_size
        return int(height), int(width)

    def grid(self, model: Any, size: tuple[int, int]) -> Grid:
        """See `Architecture.grid`."""
        rows, columns = _encoder(model).embeddings.patch_embeddings.patch_size
        return size[0] // int(rows), size[1] // int(columns)

    def embed(self, model: Any, images: Tensor) -> tuple[Tensor, Grid]:
        """See `Architecture.embed`. Positions are interpolated where the images are of another size than the model."""
        embeddings, size = _encoder(model).embeddings, (images.shape[2], images.shape[3])
        images = images.to(embeddings.patch_embeddings.projection.weight.dtype)
        return self._embed(embeddings, images, resized=size != self.image_size(model)), self.grid(model, size)

    def normalize(self, block: Any, hidden: Tensor) -> Tensor:
        """See `Architecture.normalize`."""
        normed: Tensor = block.layernorm_before(hidden)
        return normed

    def attend(
        self, block: Any, normed: Tensor, *, weights: bool = False, queries: int | None = None, places: Any = None
    ) -> tuple[Tensor, Tensor | None]:
        """See `Architecture.attend`."""
        del places
        attended, shown = _attend(block.attention, normed, weights=weights, queries=queries)
        # In version 4 the dropout is inside.
        return (block.dropout(attended) if hasattr(block, "dropout") else attended), shown

    def feed_forward(self, block: Any, hidden: Tensor) -> Tensor:
        """See `Architecture.feed_forward`."""
        normed = block.layernorm_after(hidden)
        branch: Tensor
        if hasattr(block, "intermediate"):  # version 4
            branch = block.output.dropout(block.output.dense(block.intermediate(normed)))
        else:
            branch = block.dropout(block.mlp(normed))
        return branch

    def features(self, model: Any, hidden: Tensor) -> Tensor:
        """The class token, (B, C)."""
        token: Tensor = _encoder(model).layernorm(hidden)[:, 0]
        return token

    def classify(self, model: Any, features: Tensor) -> Tensor:
        """See `Architecture.classify`."""
        logits: Tensor = model.classifier(features)
        return logits

    def readout(self, model: Any, tokens: int) -> Tensor:  # noqa: ARG002
        """See `Architecture.readout`."""
        return one_hot(tokens, 0)

    def classifiers(self, model: Any) -> tuple[str, ...]:  # noqa: ARG002
        """See `Architecture.classifiers`."""
        return ("classifier",)

    def after_blocks(self, model: Any) -> tuple[str, ...]:
        """See `Architecture.after_blocks`."""
        return (f"{model.base_model_prefix}.layernorm", *self.classifiers(model))

    def idle(self, model: Any) -> tuple[str, ...]:
        """What only masked pre-training computes with."""
        return (f"{model.base_model_prefix}.embeddings.mask_token",)

    def note_num_classes(self, model: Any, num_classes: int) -> None:
        """See `Architecture.note_num_classes`."""
        model.num_labels = num_classes
        model.config.num_labels = num_classes

    def _embed(self, embeddings: Any, images: Tensor, *, resized: bool) -> Tensor:
        hidden: Tensor = embeddings(images, interpolate_pos_encoding=resized)
        return hidden


class HuggingFaceDeiT(HuggingFaceViT):
    """DeiT: a class and a distillation token, of which the classifier reads the first."""

    def prefix(self, model: Any) -> int:  # noqa: ARG002
        """The class and the distillation token."""
        return 2


class HuggingFaceDeiTWithTeacher(HuggingFaceDeiT):
    """DeiT where both tokens have a classifier."""

    def features(self, model: Any, hidden: Tensor) -> Tensor:
        """Class and distillation token, (B, 2C)."""
        tokens = _encoder(model).layernorm(hidden)
        return cat([tokens[:, 0], tokens[:, 1]], dim=-1)

    def classify(self, model: Any, features: Tensor) -> Tensor:
        """See `Architecture.classify`."""
        token, distilled = features.chunk(2, dim=-1)
        logits: Tensor = (model.cls_classifier(token) + model.distillation_classifier(distilled)) / 2
        return logits

    def readout(self, model: Any, tokens: int) -> Tensor:  # noqa: ARG002
        """See `Architecture.readout`."""
        return one_hot(tokens, 0, 1)

    def classifiers(self, model: Any) -> tuple[str, ...]:  # noqa: ARG002
        """See `Architecture.classifiers`."""
        return ("cls_classifier", "distillation_classifier")


class HuggingFaceDinov2(HuggingFaceViT):
    """DINOv2, whose classifier reads the class token and the mean of the patches side by side."""

    def prefix(self, model: Any) -> int:
        """The class token and the registers."""
        return 1 + int(getattr(model.config, "num_register_tokens", 0))

    def normalize(self, block: Any, hidden: Tensor) -> Tensor:
        """See `Architecture.normalize`."""
        normed: Tensor = block.norm1(hidden)
        return normed

    def attend(
        self, block: Any, normed: Tensor, *, weights: bool = False, queries: int | None = None, places: Any = None
    ) -> tuple[Tensor, Tensor | None]:
        """See `Architecture.attend`."""
        del places
        attended, shown = _attend(block.attention, normed, weights=weights, queries=queries)
        return block.drop_path(block.layer_scale1(attended)), shown

    def feed_forward(self, block: Any, hidden: Tensor) -> Tensor:
        """See `Architecture.feed_forward`."""
        branch: Tensor = block.drop_path(block.layer_scale2(block.mlp(block.norm2(hidden))))
        return branch

    def features(self, model: Any, hidden: Tensor) -> Tensor:
        """Class token and mean of the patches, (B, 2C)."""
        tokens = _encoder(model).layernorm(hidden)
        return cat([tokens[:, 0], tokens[:, self.prefix(model) :].mean(dim=1)], dim=1)

    def readout(self, model: Any, tokens: int) -> Tensor:
        """See `Architecture.readout`."""
        return (one_hot(tokens, 0) + evenly(tokens, self.prefix(model))) / 2

    def _embed(self, embeddings: Any, images: Tensor, *, resized: bool) -> Tensor:
        del resized  # it interpolates whenever it has to
        hidden: Tensor = embeddings(images)
        return hidden


def _encoder(model: Any) -> Any:
    return getattr(model, model.base_model_prefix)


def _attend(attention: Any, normed: Tensor, *, weights: bool, queries: int | None) -> tuple[Tensor, Tensor | None]:
    if not weights:
        result = attention(normed)
        return (result[0] if isinstance(result, tuple) else result), None  # a tensor in version 4
    if hasattr(attention, "q_proj"):
        parts, names, dropout = attention, ("q_proj", "k_proj", "v_proj"), attention.attention_dropout
    else:  # version 4
        parts, names, dropout = attention.attention, ("query", "key", "value"), attention.attention.dropout_prob
    asking = normed[:, :queries]
    query, key, value = (
        split_heads(getattr(parts, name)(tokens), parts.num_attention_heads)
        for name, tokens in zip(names, (asking, normed, normed), strict=True)
    )
    shown = softmax_attention(query, key, parts.scaling)
    mixed = join_heads(F.dropout(shown, dropout, parts.training) @ value)
    return (attention.o_proj(mixed) if parts is attention else attention.output(mixed, asking)), shown


_KNOWN: tuple[HuggingFaceViT, ...] = (
    HuggingFaceViT("vit", "ViT"),
    HuggingFaceDeiT("deit", "DeiT"),
    HuggingFaceDeiTWithTeacher("deit", "DeiT", "ForImageClassificationWithTeacher"),
    HuggingFaceDinov2("dinov2", "Dinov2"),
    HuggingFaceDinov2("dinov2_with_registers", "Dinov2WithRegisters"),
)

ARCHITECTURES: dict[tuple[str, str], Architecture] = {architecture.kind: architecture for architecture in _KNOWN}
