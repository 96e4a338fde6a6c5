"""From texts to their explanation: tokenize, one forward pass per batch, evidence of every token in every layer.

Letters: B batch, T tokens, C channels, K classes, L blocks, N texts.
Source: Sun and Liò, "Multi-Head Explainer" (arXiv 2501.01311), saliency equations for text.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias, cast

import torch
from torch import Tensor
from transformers import BatchEncoding

from mhex_core import SaliencyOptions, _checks, signed_maps
from mhex_core.attention import attention_received
from mhex_core.modes import in_evaluation_mode
from mhex_text.capture import attention_shown
from mhex_text.explanation import Explanation, Layers, TextExplanation
from mhex_text.loading import load_tokenizer
from mhex_text.progress import bar

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from mhex_text.modeling import MHEXForSequenceClassification

Texts: TypeAlias = str | Sequence[str] | Sequence[tuple[str, str]]

# Of tokenizers that were never told how much their model takes, the library says 10^30.
_NO_LIMIT = 10**9


def explain(
    model: MHEXForSequenceClassification,
    texts_or_batch: Texts | BatchEncoding,
    target: int | str | Sequence[int | str] | Tensor | None,
    *,
    texts: Texts | None,
    tokenizer: Any,
    max_length: int | None,
    batch_size: int,
    layers: Layers,
    layer_weights: Sequence[float] | None,
    decay: float,
    attention: bool,
    options: SaliencyOptions,
    progress: bool,
) -> Explanation:
    """What `MHEXForSequenceClassification.explain` does; its arguments are described there."""
    _checks.positive_int("batch_size", batch_size)
    _checks.flag("attention", attention)
    _checks.flag("progress", progress)
    shared: dict[str, Any] = {
        "layer_names": layer_names(model),
        "class_names": class_names(model),
        "beta": options.beta,
        "layers": layers,
        "layer_weights": layer_weights,
        "decay": decay,
    }
    if isinstance(texts_or_batch, BatchEncoding):
        if texts is None:
            raise ValueError("texts must be given beside a batch: a batch does not hold the words as they were written")
        listed, batch = listed_texts("texts", texts), texts_or_batch
    else:
        if texts is not None:
            raise ValueError("texts must be given once, got them beside texts_or_batch")
        listed = listed_texts("texts_or_batch", texts_or_batch)
        if not listed:
            return Explanation.of_no_texts(**shared)
        chosen = tokenizer_of(model) if tokenizer is None else tokenizer
        batch = _tokenized(chosen, listed, most_tokens(model, chosen, max_length))
    encodings = batch.encodings
    if encodings is None or len(encodings) != len(listed):
        count = "none" if encodings is None else len(encodings)
        raise ValueError(
            f"texts_or_batch must hold one encoding of a fast tokenizer per text ({len(listed)}), got {count}; slow "
            "tokenizers do not say where a token lies in its text"
        )
    targets = targets_of(target, len(listed), class_names(model))
    # Texts of like length together: the less padding, the less to compute.
    order = sorted(range(len(listed)), key=lambda index: -_real(encodings[index]))
    found: list[TextExplanation] = []
    with (
        in_evaluation_mode(model),
        torch.no_grad(),
        bar(len(order), shown=progress and len(order) > batch_size) as shown,
    ):
        matrices = model.equivalent_matrices()
        for start in range(0, len(order), batch_size):
            part = order[start : start + batch_size]
            rows = [_Row(encodings[index]) for index in part]
            wanted = None if targets is None else targets[part]
            some = [listed[index] for index in part]
            found += _explained(model, matrices, some, rows, wanted, options, shared, attention=attention)
            shown.update(len(part))
    places = {index: place for place, index in enumerate(order)}
    return Explanation(tuple(found[places[index]] for index in range(len(listed))), found[0].settings)


class _Row:
    """One encoding without its padding."""

    def __init__(self, encoding: Any) -> None:
        kept = [place for place, real in enumerate(encoding.attention_mask) if real]
        self.ids = [encoding.ids[place] for place in kept]
        self.types = [encoding.type_ids[place] for place in kept]
        self.offsets = [tuple(encoding.offsets[place]) for place in kept]
        self.words = [encoding.word_ids[place] for place in kept]
        self.parts = [encoding.sequence_ids[place] for place in kept]

    def __len__(self) -> int:
        return len(self.ids)


def _explained(
    model: MHEXForSequenceClassification,
    matrices: tuple[Tensor, ...],
    texts: Sequence[str | tuple[str, str]],
    rows: list[_Row],
    target: Tensor | None,
    options: SaliencyOptions,
    shared: dict[str, Any],
    *,
    attention: bool,
) -> list[TextExplanation]:
    longest = max(1, *(len(row) for row in rows))  # an empty text may have no token at all
    device = next(model.parameters()).device

    def padded(values: list[list[Any]], filler: Any) -> list[list[Any]]:
        return [row + [filler] * (longest - len(row)) for row in values]

    found = evidence(
        model,
        matrices,
        {
            "input_ids": torch.tensor(padded([row.ids for row in rows], padding_id(model)), device=device),
            "attention_mask": torch.tensor(padded([[1] * len(row) for row in rows], 0), device=device),
            "token_type_ids": torch.tensor(padded([row.types for row in rows], 0), device=device),
        },
        target,
        options,
        attention=attention,
        heads=True,
    )
    made = Explanation.from_evidence(
        cast("Sequence[str]", texts),
        offsets=padded([row.offsets for row in rows], (0, 0)),
        word_ids=padded([row.words for row in rows], None),
        sequence_ids=padded([row.parts for row in rows], None),
        positive=found.positive,
        negative=found.negative,
        probabilities=found.probabilities,
        target=found.target,
        head_probabilities=found.heads,
        **shared,
    )
    return list(made)


class Evidence(NamedTuple):
    """What one forward pass says, on the model's device.

    Attributes:
        probabilities: (B, K), float32.
        target: int64 (B,), the class explained.
        positive: L tensors (B, T), evidence for it, before beta and the layer weights.
        negative: The same for evidence against it; values carry their sign.
        heads: What each head predicts, L tensors (B, K), float32; empty where that was not asked for.
    """

    probabilities: Tensor
    target: Tensor
    positive: Sequence[Tensor]
    negative: Sequence[Tensor]
    heads: Sequence[Tensor] = ()


def evidence(
    model: MHEXForSequenceClassification,
    matrices: tuple[Tensor, ...],
    inputs: dict[str, Tensor],
    target: Tensor | None,
    options: SaliencyOptions,
    *,
    attention: bool,
    autocast: torch.dtype | None = None,
    heads: bool = False,
) -> Evidence:
    """Predict, and read the evidence of every token: one forward pass.

    Args:
        model: In evaluation mode.
        matrices: Its equivalent matrices, L tensors (K, C).
        inputs: What it takes, each (B, T), on its device; with the mask.
        target: (B,), or None for the predicted classes.
        options: Of the evidence.
        attention: Whether it is multiplied by the attention that a token receives; no other thread may use the model
            meanwhile.
        autocast: The type that the forward pass computes in where that is safe; None leaves it to the caller.
        heads: Whether each head's prediction is kept.
    """
    showing: AbstractContextManager[dict[int, Tensor]] = attention_shown(model) if attention else nullcontext({})
    kind = inputs["input_ids"].device.type
    casting = nullcontext() if autocast is None else torch.autocast(kind, dtype=autocast)
    with showing as seen, casting:
        asked = {"output_heads": True} if heads else {}
        output = model(**inputs, output_activations=True, **asked, return_dict=True)
    probabilities = _chances(model, output.logits)
    wanted = probabilities.argmax(dim=1) if target is None else target.to(probabilities.device)
    # Tokens are the positions of a map one pixel wide, and their channels lie next to each other, as kernels like it.
    columns = [layer.transpose(1, 2).unsqueeze(-1) for layer in output.activations]
    maps = signed_maps(columns, matrices, wanted, options=options)
    positive, negative = ([layer.squeeze(-1) for layer in part] for part in maps)
    if attention:
        received = attention_received([seen[index].float() for index in sorted(seen)], mask=inputs["attention_mask"])
        positive, negative = ([layer * received for layer in part] for part in (positive, negative))
    each = [_chances(model, logits) for logits in output.head_logits] if heads else []
    return Evidence(probabilities, wanted, positive, negative, each)


def _chances(model: MHEXForSequenceClassification, logits: Tensor) -> Tensor:
    wide = logits.float()
    return wide.sigmoid() if model.config.multi_label else wide.softmax(dim=1)


def layer_names(model: MHEXForSequenceClassification) -> tuple[str, ...]:
    """What each block is called: by the layer of the encoder that it sits in, counted from 0."""
    return tuple(f"layer {index}" for index in model.layer_indices)


def class_names(model: PreTrainedModel) -> tuple[str, ...]:
    """The names of the K classes."""
    return names_in(model.config)


def names_in(config: Any) -> tuple[str, ...]:
    """The names of the K classes that a classifier's configuration holds."""
    named: dict[Any, Any] = config.id2label or {}
    return tuple(str(named[index]) for index in range(len(named)))


def listed_texts(name: str, texts: object) -> list[str] | list[tuple[str, str]]:
    """One text, texts or pairs as a list of either.

    Raises:
        TypeError: They are something else, or some of both.
    """
    if isinstance(texts, str):
        return [texts]
    if not isinstance(texts, Sequence):
        raise TypeError(f"{name} must be a text, or a sequence of texts or of pairs, got {type(texts).__name__}")
    singles = [text for text in texts if isinstance(text, str)]
    pairs = [
        (text[0], text[1])
        for text in texts
        if isinstance(text, tuple) and len(text) == 2 and all(isinstance(part, str) for part in text)
    ]
    if len(singles) == len(texts):
        return singles
    if len(pairs) == len(texts):
        return pairs
    other = next((text for text in texts if not isinstance(text, str)), None)
    raise TypeError(f"{name} must hold texts alone or pairs (text, text) alone, got {other!r} among them")


def tokenizer_of(model: PreTrainedModel) -> Any:
    """The tokenizer that was saved beside the model.

    Raises:
        ValueError: There is none to be found.
    """
    place = str(getattr(model.config, "_name_or_path", "") or "")
    reason = "this model was made in memory"
    if place:
        try:
            return load_tokenizer(place)
        except (OSError, ValueError, KeyError) as error:
            reason = f"none was found where the model came from, {place!r} ({_first_line(error)})"
    raise ValueError(f"tokenizer must be given: {reason}; save it beside the model with tokenizer.save_pretrained")


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]


def _tokenized(tokenizer: Any, texts: list[str] | list[tuple[str, str]], max_length: int | None) -> BatchEncoding:
    if not callable(tokenizer) or not getattr(tokenizer, "is_fast", False):
        raise TypeError(
            f"tokenizer must be a fast tokenizer, which says where a token lies in its text, "
            f"got {type(tokenizer).__name__}"
        )
    first = [text if isinstance(text, str) else text[0] for text in texts]
    second = [text[1] for text in texts if not isinstance(text, str)] or None
    limited = {"truncation": True, "max_length": max_length} if max_length is not None else {"truncation": False}
    found: BatchEncoding = tokenizer(first, second, **limited)
    return found


def most_tokens(model: PreTrainedModel, tokenizer: Any, max_length: int | None) -> int | None:
    """How many tokens a text may have: what was asked for, within what tokenizer and encoder take."""
    return most_tokens_of(model.config, tokenizer, max_length)


def most_tokens_of(config: Any, tokenizer: Any, max_length: int | None) -> int | None:
    """`most_tokens` by a classifier's configuration."""
    limits = []
    if max_length is not None:
        limits.append(_checks.positive_int("max_length", max_length))
    told = getattr(tokenizer, "model_max_length", None)
    if isinstance(told, int) and told < _NO_LIMIT:
        limits.append(told)
    config = getattr(config, "encoder", config)
    positions = getattr(config, "max_position_embeddings", None)
    if isinstance(positions, int) and positions > 0:
        # RoBERTa and its kin begin to count positions behind the padding's number.
        behind = (config.pad_token_id or 0) + 1 if "roberta" in config.model_type else 0
        limits.append(positions - behind)
    return min(limits) if limits else None


def targets_of(target: object, count: int, names: Sequence[str]) -> Tensor | None:
    """The class to explain of each of `count` texts, int64 on the CPU; None for the predicted ones.

    Raises:
        TypeError: It is of another type.
        ValueError: It does not fit.
    """
    if target is None:
        return None
    indices = _checks.class_indices(
        "target", target, batch=count, num_classes=len(names), device=torch.device("cpu"), class_names=names
    )
    if indices.ndim != 1:
        raise ValueError(f"target must hold one class per text, ({count},), got shape {tuple(indices.shape)}")
    return indices


def padding_id(model: MHEXForSequenceClassification) -> int:
    """The number of the encoder's padding token."""
    found = getattr(model.config.encoder, "pad_token_id", None)
    return found if isinstance(found, int) else 0


def _real(encoding: Any) -> int:
    return int(sum(encoding.attention_mask))
