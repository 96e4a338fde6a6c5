"""How a transformer encoder is run layer by layer, so that MHEX blocks can sit on its feed-forward connections.

Letters: B batch, T tokens, C channels.
Source: Sun and Liò, "Multi-Head Explainer" (arXiv 2501.01311), the method's transformer blocks.

An adapter knows one family of architectures. It calls the encoder's own sub-modules in the encoder's own order and
hands every intermediate result back: no hooks, nothing written on modules. Without blocks it computes what the encoder
computes.

Another architecture takes a class of about twenty lines:

    from mhex_text import PostNormAdapter, key_mask, register_adapter

    class BertGenerationAdapter(PostNormAdapter):
        def embed(self, encoder, **inputs):
            wanted = {name: inputs[name] for name in ("input_ids", "inputs_embeds", "position_ids")}
            hidden = encoder.embeddings(**wanted)
            return hidden, (key_mask(encoder, hidden, inputs["attention_mask"]),)

        def attend(self, encoder, index, hidden, context):
            (mask,) = context
            layer = encoder.encoder.layer[index]
            shortcut = layer.attention(hidden, attention_mask=mask)[0]
            return shortcut, layer.output.dense(layer.intermediate(shortcut))

        def tail(self, encoder, index):
            output = encoder.encoder.layer[index].output
            return output.dropout, output.LayerNorm

    register_adapter("bert-generation", BertGenerationAdapter())

An encoder that normalises before its sub-layers derives from `PreNormAdapter` and needs no `tail`.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, TypedDict, Unpack

import torch
from torch import Tensor
from transformers import AutoModel
from transformers.models.auto.modeling_auto import MODEL_MAPPING

from mhex_core import BlockOutput, MHEXBlock
from mhex_text.loading import checked
from mhex_text.running import of_rows

Context = tuple[Tensor | None, ...]
"""What every layer of one forward pass needs besides its input, in an order that is the adapter's own affair."""

Step = Callable[[Tensor], Tensor]
"""A dropout or a normalisation: (B, T, C) to (B, T, C)."""

_ATTENTION = ("eager", "sdpa")


class EncoderInputs(TypedDict):
    """What the model was called with; exactly one of `input_ids` and `inputs_embeds` is there.

    Attributes:
        input_ids: (B, T), or None where `inputs_embeds` is given.
        inputs_embeds: (B, T, E), or None where `input_ids` is given.
        attention_mask: (B, T), not 0 where a token is real, or None where all are.
        token_type_ids: (B, T) or None. An architecture without segments leaves them aside.
        position_ids: (B, T) or None.
    """

    input_ids: Tensor | None
    inputs_embeds: Tensor | None
    attention_mask: Tensor | None
    token_type_ids: Tensor | None
    position_ids: Tensor | None


def key_mask(encoder: Any, hidden: Tensor, attention_mask: Tensor | None) -> Tensor | None:
    """The mask that attention takes: who may be looked at.

    Args:
        encoder: The encoder; its configuration says which attention runs.
        hidden: (B, T, C), for dtype and device.
        attention_mask: (B, T), not 0 where a token is real, or None where all are.

    Returns:
        (B, 1, 1, T): bool for scaled-dot-product attention, else 0 and the lowest number, to be added. None for None.

    Raises:
        ValueError: The encoder runs another attention than "eager" or "sdpa".
    """
    if attention_mask is None:
        attention_form(encoder)
        return None
    return _masked(encoder, hidden, attention_mask[:, None, None, :] != 0)


def attention_form(encoder: Any) -> str:
    """The attention the encoder runs, "eager" or "sdpa".

    Raises:
        ValueError: It is another one.
    """
    form = str(encoder.config._attn_implementation)
    if form not in _ATTENTION:
        raise ValueError(
            f"attn_implementation must be one of {', '.join(map(repr, _ATTENTION))} for an encoder with MHEX blocks, "
            f"got {form!r}"
        )
    return form


def _masked(encoder: Any, hidden: Tensor, allowed: Tensor) -> Tensor:
    # A bool mask has no dtype that autocast could round to minus infinity; eager attention can only add.
    if attention_form(encoder) == "sdpa":
        return allowed
    return torch.zeros_like(allowed, dtype=hidden.dtype).masked_fill(~allowed, torch.finfo(hidden.dtype).min)


class Adapter(ABC):
    """One family of encoders. Derive from `PostNormAdapter` or `PreNormAdapter`, which know where the gate belongs.

    Adapters hold no state: one object serves all models of its family.
    """

    def depth(self, config: Any) -> int:
        """The number of layers of an encoder with this configuration."""
        return int(config.num_hidden_layers)

    def width(self, config: Any) -> int:
        """C of an encoder with this configuration."""
        return int(config.hidden_size)

    def check(self, config: Any) -> None:
        """Refuse a configuration that this adapter would run differently from the encoder.

        Raises:
            ValueError: The configuration asks for something that is not supported.
        """
        if getattr(config, "is_decoder", False):
            raise ValueError("encoder must look both ways, got a configuration with is_decoder=True")
        if getattr(config, "position_embedding_type", "absolute") != "absolute":
            raise ValueError(f"position_embedding_type must be 'absolute', got {config.position_embedding_type!r}")

    def build(self, config: Any) -> Any:
        """A new encoder with fresh weights and without a pooler, which no head reads."""
        return AutoModel.from_config(config, **self._without_pooler(config))  # type: ignore[no-untyped-call]

    def load(self, name_or_path: str, config: Any) -> Any:
        """A pretrained encoder without a pooler, also out of a checkpoint of a model with a head."""
        chosen = self._without_pooler(config)
        return checked(AutoModel.from_pretrained, name_or_path, fresh_head=True, config=config, **chosen)

    @abstractmethod
    def embed(self, encoder: Any, **inputs: Unpack[EncoderInputs]) -> tuple[Tensor, Context]:
        """What the first layer reads.

        Args:
            encoder: The encoder.
            **inputs: All of `EncoderInputs`. A class may name those it needs, and take the others as `**rest`.

        Returns:
            The embeddings (B, T, C), and the tensors every layer needs besides: masks, positions.
        """

    @abstractmethod
    def attend(self, encoder: Any, index: int, hidden: Tensor, context: Context) -> tuple[Tensor, Tensor]:
        """Both sides of the feed-forward connection of layer `index`.

        Args:
            encoder: The encoder.
            index: Of the layer, from 0.
            hidden: (B, T, C), what the layer reads.
            context: What `embed` returned.

        Returns:
            x (B, T, C), the shortcut, what the feed-forward part reads before a normalisation of its own; r (B, T, C),
            what the feed-forward part adds to it, before dropout.
        """

    @abstractmethod
    def run_layer(
        self, encoder: Any, index: int, hidden: Tensor, context: Context, block: MHEXBlock | None, mask: Tensor | None
    ) -> tuple[Tensor, BlockOutput | None]:
        """One layer, with or without a block on its feed-forward connection.

        Args:
            encoder: The encoder.
            index: Of the layer, from 0.
            hidden: (B, T, C), what the layer reads.
            context: What `embed` returned.
            block: The layer's block, or None.
            mask: (B, T), the tokens the block averages over; None means all.

        Returns:
            (B, T, C), what the next layer reads, and what the block hands out.
        """

    def rows_of(self, context: Context, rows: Tensor) -> Context:
        """The context for rows that are each one of the B texts, any text several times.

        Args:
            context: What `embed` returned for the B texts.
            rows: int64 (N,), the text of each row.
        """
        return tuple(of_rows(value, rows) for value in context)

    def _without_pooler(self, config: Any) -> dict[str, bool]:
        kind: Any = MODEL_MAPPING[type(config)]
        parameters = inspect.signature(kind.__init__).parameters
        return {"add_pooling_layer": False} if "add_pooling_layer" in parameters else {}


class PostNormAdapter(Adapter):
    """Encoders that normalise after the addition: LayerNorm(x + dropout(r)), gated LayerNorm(dropout(g (x + r)))."""

    @abstractmethod
    def tail(self, encoder: Any, index: int) -> tuple[Step, Step]:
        """The dropout and the normalisation that end layer `index`."""

    def after(self, encoder: Any, index: int, hidden: Tensor, context: Context) -> Tensor:  # noqa: ARG002
        """What an architecture does to the output of layer `index` besides; nothing, as a rule."""
        return hidden

    def run_layer(
        self, encoder: Any, index: int, hidden: Tensor, context: Context, block: MHEXBlock | None, mask: Tensor | None
    ) -> tuple[Tensor, BlockOutput | None]:
        """One layer; see `Adapter.run_layer`."""
        shortcut, branch = self.attend(encoder, index, hidden, context)
        dropout, norm = self.tail(encoder, index)
        output = None
        if block is not None:
            gated, output = block.gate_sum(shortcut + branch, mask, channels_last=True)
        # A block that only watches must leave the encoder's own order of dropout and addition alone.
        result = norm(dropout(gated)) if block is not None and block.gated else norm(shortcut + dropout(branch))
        return self.after(encoder, index, result, context), output


class PreNormAdapter(Adapter):
    """Encoders that normalise before their sub-layers: x + r; with a gate g x + r, as in a convolutional network."""

    def run_layer(
        self, encoder: Any, index: int, hidden: Tensor, context: Context, block: MHEXBlock | None, mask: Tensor | None
    ) -> tuple[Tensor, BlockOutput | None]:
        """One layer; see `Adapter.run_layer`."""
        shortcut, branch = self.attend(encoder, index, hidden, context)
        if block is None:
            return shortcut + branch, None
        _, output = block(shortcut, branch, mask, channels_last=True)
        return output.activation, output


def _without_mask(inputs: EncoderInputs) -> dict[str, Tensor | None]:
    """What embeddings built like BERT's take."""
    return {
        "input_ids": inputs["input_ids"],
        "inputs_embeds": inputs["inputs_embeds"],
        "token_type_ids": inputs["token_type_ids"],
        "position_ids": inputs["position_ids"],
    }


class BertAdapter(PostNormAdapter):
    """BERT and what is built like it: MiniLM, RoBERTa, XLM-RoBERTa, CamemBERT, ELECTRA."""

    def embed(self, encoder: Any, **inputs: Unpack[EncoderInputs]) -> tuple[Tensor, Context]:
        """See `Adapter.embed`."""
        hidden = encoder.embeddings(**_without_mask(inputs))
        if hasattr(encoder, "embeddings_project"):  # ELECTRA, where embeddings are narrower than C
            hidden = encoder.embeddings_project(hidden)
        return hidden, (key_mask(encoder, hidden, inputs["attention_mask"]),)

    def attend(self, encoder: Any, index: int, hidden: Tensor, context: Context) -> tuple[Tensor, Tensor]:
        """See `Adapter.attend`."""
        (mask,) = context
        layer = encoder.encoder.layer[index]
        shortcut = layer.attention(hidden, attention_mask=mask)[0]
        return shortcut, layer.output.dense(layer.intermediate(shortcut))

    def tail(self, encoder: Any, index: int) -> tuple[Step, Step]:
        """See `PostNormAdapter.tail`."""
        output = encoder.encoder.layer[index].output
        return output.dropout, output.LayerNorm


class DistilBertAdapter(PostNormAdapter):
    """DistilBERT, which has no segments: token types are left aside."""

    def embed(self, encoder: Any, **inputs: Unpack[EncoderInputs]) -> tuple[Tensor, Context]:
        """See `Adapter.embed`."""
        # Piece by piece: the embeddings of transformers 4 take no positions.
        parts, attention_mask, position_ids = encoder.embeddings, inputs["attention_mask"], inputs["position_ids"]
        words = inputs["inputs_embeds"]
        if words is None:
            words = parts.word_embeddings(inputs["input_ids"])
        if position_ids is None:
            position_ids = torch.arange(words.shape[1], device=words.device)[None]
        hidden = parts.dropout(parts.LayerNorm(words + parts.position_embeddings(position_ids)))
        if _takes_query(encoder) and attention_form(encoder) == "eager":
            # The eager attention of transformers 4 makes the mask itself, and insists on one.
            real = hidden.new_ones(hidden.shape[:2]) if attention_mask is None else attention_mask
            return hidden, (real,)
        return hidden, (key_mask(encoder, hidden, attention_mask),)

    def attend(self, encoder: Any, index: int, hidden: Tensor, context: Context) -> tuple[Tensor, Tensor]:
        """See `Adapter.attend`."""
        (mask,) = context
        layer = encoder.transformer.layer[index]
        if _takes_query(encoder):
            attended = layer.attention(query=hidden, key=hidden, value=hidden, mask=mask)[0]
        else:
            attended = layer.attention(hidden, attention_mask=mask)[0]
        shortcut = layer.sa_layer_norm(attended + hidden)
        feed_forward = layer.ffn
        return shortcut, feed_forward.lin2(feed_forward.activation(feed_forward.lin1(shortcut)))

    def tail(self, encoder: Any, index: int) -> tuple[Step, Step]:
        """See `PostNormAdapter.tail`."""
        layer = encoder.transformer.layer[index]
        return layer.ffn.dropout, layer.output_layer_norm


def _takes_query(encoder: Any) -> bool:
    """Whether DistilBERT's attention is that of transformers 4, called with query, key and value."""
    return hasattr(encoder.transformer.layer[0].attention, "pruned_heads")


class DebertaV2Adapter(PostNormAdapter):
    """DeBERTa-v2 and v3, with their relative positions and, where there is one, their convolution."""

    def embed(self, encoder: Any, **inputs: Unpack[EncoderInputs]) -> tuple[Tensor, Context]:
        """See `Adapter.embed`."""
        embeds, attention_mask = inputs["inputs_embeds"], inputs["attention_mask"]
        given = inputs["input_ids"] if embeds is None else embeds[..., 0]
        assert given is not None  # noqa: S101  # the model has seen to it
        real = torch.ones_like(given, dtype=torch.long) if attention_mask is None else (attention_mask != 0).long()
        hidden = encoder.embeddings(**_without_mask(inputs), mask=real)
        layers = encoder.encoder
        return hidden, (layers.get_attention_mask(real), layers.get_rel_pos(hidden), real, hidden)

    def attend(self, encoder: Any, index: int, hidden: Tensor, context: Context) -> tuple[Tensor, Tensor]:
        """See `Adapter.attend`."""
        mask, relative, _, _ = context
        layer = encoder.encoder.layer[index]
        shortcut = layer.attention(
            hidden, mask, relative_pos=relative, rel_embeddings=encoder.encoder.get_rel_embedding()
        )[0]
        return shortcut, layer.output.dense(layer.intermediate(shortcut))

    def rows_of(self, context: Context, rows: Tensor) -> Context:
        """See `Adapter.rows_of`: relative positions (1, T, T) are of no text, and attention takes them once."""
        mask, relative, real, embeddings = context
        return of_rows(mask, rows), relative, of_rows(real, rows), of_rows(embeddings, rows)

    def tail(self, encoder: Any, index: int) -> tuple[Step, Step]:
        """See `PostNormAdapter.tail`."""
        output = encoder.encoder.layer[index].output
        return output.dropout, output.LayerNorm

    def after(self, encoder: Any, index: int, hidden: Tensor, context: Context) -> Tensor:
        """The convolution over the embeddings, which some checkpoints add to the first layer's output."""
        convolution = encoder.encoder.conv
        if index != 0 or convolution is None:
            return hidden
        _, _, real, embeddings = context
        result: Tensor = convolution(embeddings, hidden, real)
        return result


class ModernBertAdapter(PreNormAdapter):
    """ModernBERT, which normalises first, turns queries and keys by their positions, and mostly looks nearby.

    Its final normalisation is not run: heads read the layers, and nothing reads what comes after the last one. It has
    no segments: token types are left aside.
    """

    def embed(self, encoder: Any, **inputs: Unpack[EncoderInputs]) -> tuple[Tensor, Context]:
        """See `Adapter.embed`."""
        parts, attention_mask, position_ids = encoder.embeddings, inputs["attention_mask"], inputs["position_ids"]
        words = inputs["inputs_embeds"]
        if words is None:
            words = parts.tok_embeddings(inputs["input_ids"])
        hidden = parts.drop(parts.norm(words))
        tokens = torch.arange(hidden.shape[1], device=hidden.device)
        if position_ids is None:
            position_ids = tokens[None]
        real = hidden.new_ones(hidden.shape[:2], dtype=torch.bool) if attention_mask is None else attention_mask != 0
        anywhere = real[:, None, None, :]
        distance = (tokens[:, None] - tokens[None]).abs()
        # Each token may look at itself, so that no padded one is left with nothing to look at.
        nearby = (anywhere & (distance <= encoder.config.local_attention // 2)) | (distance == 0)
        masks = _masked(encoder, hidden, anywhere), _masked(encoder, hidden, nearby)
        turns: tuple[Tensor, ...] = ()
        if hasattr(encoder, "rotary_emb"):
            for kind in _ATTENTION_TYPES:
                if kind in encoder.config.layer_types:
                    turns += tuple(encoder.rotary_emb(hidden, position_ids, kind))
                else:
                    turns += (position_ids, position_ids)
        return hidden, (*masks, position_ids, *turns)

    def attend(self, encoder: Any, index: int, hidden: Tensor, context: Context) -> tuple[Tensor, Tensor]:
        """See `Adapter.attend`."""
        everywhere, nearby, positions, *turns = context
        layer = encoder.layers[index]
        normed = layer.attn_norm(hidden)
        near = bool(turns) and layer.attention_type == _ATTENTION_TYPES[1]
        wanted: dict[str, Any] = {"attention_mask": nearby if near else everywhere}
        if turns:
            wanted["position_embeddings"] = tuple(turns[2:] if near else turns[:2])
        if hasattr(layer.attn, "local_attention"):
            # Up to transformers 5.0 a layer chooses between the masks itself, and in version 4 turns itself, too.
            wanted |= {"sliding_window_mask": nearby, "position_ids": positions}
        attended = layer.attn(normed, **wanted)[0]
        shortcut = hidden + attended
        return shortcut, layer.mlp(layer.mlp_norm(shortcut))


_ATTENTION_TYPES = ("full_attention", "sliding_attention")
_BERT = BertAdapter()
_adapters: dict[str, Adapter] = {
    "bert": _BERT,
    "camembert": _BERT,
    "electra": _BERT,
    "roberta": _BERT,
    "xlm-roberta": _BERT,
    "distilbert": DistilBertAdapter(),
    "deberta-v2": DebertaV2Adapter(),
    "modernbert": ModernBertAdapter(),
}


def supported_encoders() -> tuple[str, ...]:
    """The `model_type` of every architecture that has an adapter, sorted."""
    return tuple(sorted(_adapters))


def register_adapter(model_type: str, adapter: Adapter, *, replace: bool = False) -> None:
    """Make another architecture known; the module's documentation has an example.

    Args:
        model_type: The `model_type` of the architecture's configuration.
        adapter: An object of a class derived from `PostNormAdapter` or `PreNormAdapter`.
        replace: Whether it may take the place of one that is there.

    Raises:
        TypeError: An argument is of another type.
        ValueError: There is an adapter for this architecture, and `replace` is false.
    """
    if not isinstance(model_type, str):
        raise TypeError(f"model_type must be a string, got {type(model_type).__name__}")
    if not isinstance(adapter, Adapter):
        raise TypeError(f"adapter must be an object of a class derived from Adapter, got {adapter!r}")
    if not isinstance(replace, bool):
        raise TypeError(f"replace must be a bool, got {type(replace).__name__}")
    if model_type in _adapters and not replace:
        raise ValueError(f"model_type must be new, got {model_type!r}; replace=True puts another adapter in its place")
    _adapters[model_type] = adapter


def adapter_for(config: Any) -> Adapter:
    """The adapter of an encoder's configuration.

    Raises:
        ValueError: There is none, or the configuration asks for something it does not support.
    """
    model_type = getattr(config, "model_type", None)
    adapter = _adapters.get(str(model_type))
    if adapter is None:
        raise ValueError(
            f"encoder must be one of {', '.join(supported_encoders())}, got {model_type!r}; for another architecture "
            "write an adapter and call mhex_text.register_adapter (help(mhex_text.adapters) has an example)"
        )
    adapter.check(config)
    return adapter
