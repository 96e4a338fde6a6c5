"""What a text classifier with MHEX blocks was built from.

Letters: K classes, L blocks.
"""

from __future__ import annotations

import copy
import importlib
from collections.abc import Sequence
from typing import Any, Literal, get_args

from transformers import AutoConfig, BertConfig

from mhex_core.weights import SEAL
from mhex_text.adapters import adapter_for

try:
    from transformers import PreTrainedConfig
except ImportError:  # transformers 4 spells it otherwise
    from transformers import PretrainedConfig as PreTrainedConfig

Objective = Literal["layerwise", "joint"]
Layers = Literal["all"] | Sequence[int]


class MHEXTextConfig(PreTrainedConfig):  # type: ignore[no-untyped-call]  # the library's __init_subclass__
    """Settings of an `MHEXForSequenceClassification`.

    Args:
        encoder: The configuration of the encoder, as an object or as a dictionary with its `model_type`. None means
            that of BERT with its defaults.
        gate: Whether connections are multiplied by their gate. Without, blocks watch and the encoder computes what it
            computed before.
        layers: Which layers carry a block: "all", or their indices from 0, in any order. The prediction comes from the
            last of them (with `objective="joint"` from the decayed sum of all); layers after it are not run.
        objective: "layerwise": the last head predicts. "joint": the decayed sum of all heads does.
        decay: Of that sum, in [0, 1].
        freeze_backbone: Whether the encoder's weights stay as they are in training, and its dropout off.
        **settings: What every configuration takes: num_labels, id2label, label2id, problem_type and so on. The problem
            is single-label unless problem_type is "multi_label_classification".

    Raises:
        TypeError: A setting is of another type.
        ValueError: A value does not fit, or the encoder is of an architecture without an adapter.
    """

    model_type = "mhex_text"
    # Not annotated: an annotation would make it a field in transformers 5.
    sub_configs = {"encoder": AutoConfig}  # noqa: RUF012

    def __init__(
        self,
        encoder: PreTrainedConfig | dict[str, Any] | None = None,
        *,
        gate: bool = True,
        layers: Layers = "all",
        objective: Objective = "layerwise",
        decay: float = 0.8,
        freeze_backbone: bool = False,
        **settings: Any,
    ) -> None:
        settings.pop(SEAL, None)  # of the file, and not of the classifier
        labels, names = settings.get("num_labels"), settings.get("id2label")
        if labels is not None and (isinstance(labels, bool) or not isinstance(labels, int)):
            raise TypeError(f"num_labels must be an int, got {type(labels).__name__}")
        if labels is not None and names is not None and len(names) != labels:
            raise ValueError(f"id2label must hold num_labels = {labels} names, got {len(names)}")
        super().__init__(**settings)
        # After the base class, which would put its own attention in place of that of a nested configuration.
        self.encoder = _encoder_config(encoder)
        if self._attn_implementation is not None:
            self._attn_implementation = self._attn_implementation
        adapter = adapter_for(self.encoder)
        for name, value in (("gate", gate), ("freeze_backbone", freeze_backbone)):
            if not isinstance(value, bool):
                raise TypeError(f"{name} must be a bool, got {type(value).__name__}")
        if not isinstance(objective, str):
            raise TypeError(f"objective must be a string, got {type(objective).__name__}")
        if objective not in get_args(Objective):
            raise ValueError(f"objective must be one of 'layerwise', 'joint', got {objective!r}")
        if isinstance(decay, bool) or not isinstance(decay, (int, float)):
            raise TypeError(f"decay must be a number, got {type(decay).__name__}")
        if not 0 <= decay <= 1:
            raise ValueError(f"decay must be in [0, 1], got {decay!r}")
        self.gate = gate
        self.layers = _checked_layers(layers, adapter.depth(self.encoder))
        self.objective = objective
        self.decay = float(decay)
        self.freeze_backbone = freeze_backbone
        if self.problem_type == "regression":
            raise ValueError("problem_type must be that of a classification, got 'regression'")
        count, least = len(self.id2label or {}), 1 if self.multi_label else 2
        if count < least:
            raise ValueError(f"num_labels must be at least {least} for this problem_type, got {count}")
        # The library's modelling code is slow to import and comes with others; the Auto classes need it from here on.
        importlib.import_module("mhex_text.modeling")

    def __eq__(self, other: object) -> bool:
        return isinstance(other, MHEXTextConfig) and self.to_dict() == other.to_dict()

    __hash__ = None  # type: ignore[assignment]  # settings can be changed

    @property
    def multi_label(self) -> bool:
        """Whether classes are independent of each other."""
        return bool(self.problem_type == "multi_label_classification")

    @property
    def block_layers(self) -> tuple[int, ...]:
        """The L indices of the layers with a block, ascending."""
        if isinstance(self.layers, str):
            return tuple(range(adapter_for(self.encoder).depth(self.encoder)))
        return tuple(self.layers)

    @property
    def hidden_size(self) -> int:
        """The width of the encoder."""
        return adapter_for(self.encoder).width(self.encoder)

    @property
    def vocab_size(self) -> int:
        """The size of the encoder's vocabulary, which resizing its embeddings changes."""
        return int(self.encoder.vocab_size)

    @vocab_size.setter
    def vocab_size(self, size: int) -> None:
        self.encoder.vocab_size = size


def _encoder_config(encoder: object) -> Any:
    if encoder is None:
        return BertConfig()
    if isinstance(encoder, PreTrainedConfig):
        return encoder
    if not isinstance(encoder, dict):
        raise TypeError(f"encoder must be a configuration or a dictionary, got {type(encoder).__name__}")
    values = copy.deepcopy(encoder)
    model_type = values.pop("model_type", None)
    if model_type is None:
        raise ValueError(
            f"encoder must hold a model_type, got the keys {', '.join(sorted(map(str, encoder))) or 'none'}"
        )
    return AutoConfig.for_model(model_type, **values)


def _checked_layers(layers: object, depth: int) -> Literal["all"] | tuple[int, ...]:
    if isinstance(layers, str):
        if layers != "all":
            raise ValueError(f"layers must be 'all' or a sequence of indices, got {layers!r}")
        return "all"
    if not isinstance(layers, Sequence):
        raise TypeError(f"layers must be 'all' or a sequence of indices, got {type(layers).__name__}")
    for position, index in enumerate(layers):
        if isinstance(index, bool) or not isinstance(index, int):
            raise TypeError(f"layers[{position}] must be an int, got {type(index).__name__}")
        if not 0 <= index < depth:
            raise ValueError(f"layers[{position}] must lie in [0, {depth - 1}], got {index}")
    if not layers or len(set(layers)) != len(layers):
        raise ValueError(f"layers must hold at least one index and none twice, got {tuple(layers)!r}")
    return tuple(sorted(layers))


AutoConfig.register(MHEXTextConfig.model_type, MHEXTextConfig, exist_ok=True)
