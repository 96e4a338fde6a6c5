"""A Hugging Face text classifier with MHEX blocks on the feed-forward connections of its encoder.

Letters: B batch, T tokens, C channels, K classes, L blocks.
Source: Sun and Liò, "Multi-Head Explainer" (arXiv 2501.01311), the method's transformer blocks and training objectives.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, BatchEncoding, PreTrainedModel
from transformers.utils.generic import ModelOutput

from mhex_core import DeepSupervisionLoss, MHEXBlock, SaliencyOptions
from mhex_core.options import Sharpness
from mhex_text.adapters import Context, adapter_for
from mhex_text.configuration import Layers, MHEXTextConfig, Objective
from mhex_text.explaining import Texts, explain
from mhex_text.explanation import Explanation
from mhex_text.explanation import Layers as ExplainedLayers
from mhex_text.loading import checked, load_config, seal_checkpoint


@dataclass
class MHEXTextOutput(ModelOutput):
    """What one forward pass gives. What was not asked for is None.

    Attributes:
        loss: A scalar, where labels were given.
        logits: (B, K), the prediction.
        head_logits: L tensors (B, K), shallow to deep.
        gate_logits: L tensors (B, C), h before the sigmoid of the gate.
        activations: L tensors (B, T, C), what saliency reads.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    head_logits: tuple[Tensor, ...] | None = None
    gate_logits: tuple[Tensor, ...] | None = None
    activations: tuple[Tensor, ...] | None = None


class MHEXForSequenceClassification(PreTrainedModel):  # type: ignore[no-untyped-call]  # its __init_subclass__
    """A text classifier that carries its own explanation. Build one with `from_encoder` or `from_pretrained`.

    Fresh blocks draw W1 and W2 from a normal distribution with the encoder's own `initializer_range`. Gates then start
    out near 1/2 for every channel, which the normalisation after the gate undoes almost wholly: a gated BERT begins
    close to the encoder it was made from. ModernBERT has no such normalisation, and must first learn to live with its
    gates.

    Args:
        config: The settings.
        encoder: The encoder, which becomes part of the classifier. None builds one with fresh weights.

    Attributes:
        encoder: The encoder, without a pooler.
        blocks: L `MHEXBlock`s, shallow to deep.
    """

    config_class = MHEXTextConfig
    base_model_prefix = "encoder"
    supports_gradient_checkpointing = True
    _supports_sdpa = True

    def __init__(self, config: MHEXTextConfig, encoder: PreTrainedModel | None = None) -> None:
        super().__init__(config)
        self._adapter = adapter_for(config.encoder)
        if encoder is None:
            encoder = self._adapter.build(config.encoder)
        else:
            for module in encoder.modules():
                # The library's own mark: these weights are not to be drawn anew.
                setattr(module, "_is_hf_initialized", True)  # noqa: B010  # modules take tensors only, says mypy
        self.encoder: Any = encoder
        config.encoder = self.encoder.config
        config._attn_implementation_internal = config.encoder._attn_implementation
        self.layer_indices = config.block_layers
        width = self._adapter.width(config.encoder)
        self.blocks = nn.ModuleList(
            MHEXBlock(width, len(config.id2label or {}), gate=config.gate) for _ in self.layer_indices
        )
        like = next(self.encoder.parameters())
        self.blocks.to(device=like.device, dtype=like.dtype)
        self.objective = DeepSupervisionLoss(config.objective, config.decay, multi_label=config.multi_label)
        self.gradient_checkpointing = False
        self.post_init()  # type: ignore[no-untyped-call]
        self.train()

    @classmethod
    def from_encoder(
        cls,
        name_or_path_or_model: str | PreTrainedModel,
        num_labels: int,
        *,
        gate: bool = True,
        freeze_backbone: bool = False,
        layers: Layers = "all",
        objective: Objective = "layerwise",
        labels: Sequence[str] | None = None,
        multi_label: bool = False,
    ) -> Self:
        """Attach blocks to a pretrained encoder.

        Args:
            name_or_path_or_model: A folder or a name on the Hugging Face hub, or a model of yours, which is copied and
                stays as it is. Of a model with a head only the encoder is taken.
            num_labels: K.
            gate: Whether connections are gated. Without, blocks watch and change nothing.
            freeze_backbone: Whether the encoder's weights stay as they are in training, and its dropout off.
            layers: Which layers carry a block, see `MHEXTextConfig`.
            objective: "layerwise" or "joint", see `mhex_core.DeepSupervisionLoss`.
            labels: K names of the classes.
            multi_label: Whether classes are independent of each other.

        Returns:
            The classifier, in evaluation mode, as `from_pretrained` returns it. Only the blocks' weights are fresh.

        Raises:
            TypeError: An argument is of another type.
            ValueError: The architecture has no adapter, or a value does not fit.
        """
        settings: dict[str, Any] = {"num_labels": num_labels}
        if labels is not None:
            settings |= _named_labels(labels, num_labels)
        if not isinstance(multi_label, bool):
            raise TypeError(f"multi_label must be a bool, got {type(multi_label).__name__}")
        if multi_label:
            settings["problem_type"] = "multi_label_classification"
        settings |= {"gate": gate, "freeze_backbone": freeze_backbone, "layers": layers, "objective": objective}
        if isinstance(name_or_path_or_model, str):
            own_config = load_config(name_or_path_or_model)
            MHEXTextConfig(own_config, **settings)  # what is wrong shows before the weights are loaded
            encoder = adapter_for(own_config).load(name_or_path_or_model, own_config)
        elif isinstance(name_or_path_or_model, PreTrainedModel):
            given: Any = name_or_path_or_model.base_model
            MHEXTextConfig(given.config, **settings)
            encoder = copy.deepcopy(given)
            if getattr(encoder, "pooler", None) is not None:
                encoder.pooler = None
        else:
            raise TypeError(
                f"name_or_path_or_model must be a name, a path or a PreTrainedModel, "
                f"got {type(name_or_path_or_model).__name__}"
            )
        model = cls(MHEXTextConfig(encoder.config, **settings), encoder)
        return model.train(mode=False)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *model_args: Any, **options: Any) -> Any:
        """Load what `save_pretrained` wrote, in evaluation mode.

        Args:
            pretrained_model_name_or_path: A folder, or a name on the Hugging Face hub.
            *model_args: As the base class takes them.
            **options: As the base class takes them. Code of the checkpoint's own is never run, nor a pickle read.

        Raises:
            OSError: There is no such checkpoint, or a file is missing from it.
            ValueError: A file is damaged, or not what it should be.
        """
        return checked(super().from_pretrained, pretrained_model_name_or_path, *model_args, **options)

    def save_pretrained(self, save_directory: Any, *arguments: Any, push_to_hub: bool = False, **options: Any) -> None:
        """Write config.json, which holds digests of settings and weights, and model.safetensors.

        Args:
            save_directory: The folder; made if it is not there.
            *arguments: As the base class takes them.
            push_to_hub: Whether to upload as well.
            **options: As the base class takes them.
        """
        super().save_pretrained(save_directory, *arguments, **options)
        if arguments[0] if arguments else options.get("is_main_process", True):
            seal_checkpoint(Path(save_directory))
        if push_to_hub:
            # By way of this method again, into a folder of its own.
            model: Any = self
            model.push_to_hub(options.get("repo_id") or Path(save_directory).name, token=options.get("token"))

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        output_heads: bool = False,
        output_activations: bool = False,
        return_dict: bool | None = None,
    ) -> MHEXTextOutput | tuple[Any, ...]:
        """Classify.

        Args:
            input_ids: (B, T), or None where `inputs_embeds` is given.
            attention_mask: (B, T), 1 for real tokens and 0 for padding; None means that all are real.
            token_type_ids: (B, T). Architectures without segments leave them aside.
            position_ids: (B, T).
            inputs_embeds: (B, T, E), embeddings in place of `input_ids`.
            labels: (B,) class indices or (B, K) probabilities; with independent classes (B, K) labels in [0, 1].
            output_heads: Whether to return `head_logits` and `gate_logits`.
            output_activations: Whether to return `activations`. Without, they need not be kept.
            return_dict: False returns a tuple; None means what the configuration says.

        Raises:
            ValueError: Not exactly one of `input_ids` and `inputs_embeds` is given, or a shape does not fit.
        """
        self._check_inputs(input_ids, inputs_embeds, attention_mask)
        if attention_mask is None and input_ids is not None:
            self.encoder.warn_if_padding_and_no_attention_mask(input_ids, attention_mask)
        hidden, context = self._adapter.embed(
            self.encoder,
            input_ids=input_ids,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            token_type_ids=token_type_ids,
            position_ids=position_ids,
        )
        gate_logits, heads, activations = self._run_layers(
            hidden, context, attention_mask, keep_activations=output_activations
        )
        result = MHEXTextOutput(
            loss=None if labels is None else self.objective(heads, labels),
            logits=self.objective.prediction(heads),
            head_logits=heads if output_heads else None,
            gate_logits=gate_logits if output_heads else None,
            activations=activations if output_activations else None,
        )
        as_dict = self.config.return_dict if return_dict is None else return_dict
        return result if as_dict else result.to_tuple()

    def equivalent_matrices(self) -> tuple[Tensor, ...]:
        """M_l = W2 W1 of each block: L tensors (K, C)."""
        blocks: Any = self.blocks
        return tuple(block.equivalent_matrix() for block in blocks)

    def explain(
        self,
        texts_or_batch: Texts | BatchEncoding,
        target: int | str | Sequence[int | str] | Tensor | None = None,
        *,
        texts: Texts | None = None,
        tokenizer: Any = None,
        max_length: int | None = None,
        batch_size: int = 32,
        layers: ExplainedLayers = 3,
        layer_weights: Sequence[float] | None = None,
        decay: float = 1.0,
        attention: bool = False,
        beta: float = 1.0,
        tau_pos: float | None = None,
        tau_neg: float = 0.1,
        sharpness: Sharpness = "hard",
        exponent: float = 1.0,
        progress: bool = False,
    ) -> Explanation:
        """Predict, and show the evidence token by token: one forward pass, no gradients.

        score(t) = sum_l lambda_l sum_k w^l_{c,k} A_l(t, k). Special tokens and padding have no score, and neither
        padding nor the batch a text comes in changes one. The model is in evaluation mode for the call, and in its
        own mode again afterwards.

        Args:
            texts_or_batch: A text, N texts, or N pairs of texts; or a batch that a fast tokenizer made of them.
            target: The class to explain, a number or a name: None for the predicted one, one for all, or one for each.
            texts: The texts of a batch, which itself does not hold the words as they were written.
            tokenizer: The model's own, a fast one; None loads the one that was saved beside the model.
            max_length: The most tokens of a text; what is longer is cut, which the explanation says. None means as many
                as tokenizer and encoder take.
            batch_size: Texts at a time; those of like length go together.
            layers: How many of the first blocks are added up (later ones over-smooth), or their places among the
                blocks, or "all".
            layer_weights: lambda_l, one number for each block that is added up; None means decay^(count - place).
            decay: See `layer_weights`; 1 counts them alike.
            attention: Whether the evidence at a token is multiplied by the attention that the token receives, see
                `mhex_core.attention.attention_received`. The encoder then runs its eager attention for the call.
            beta: How much negative evidence counts, in [0, 1]. (The paper recommends 0; on texts 1 did better, see
                docs/results/texts.md.)
            tau_pos: Smallest positive sharpness that is kept; None means 1/K + 0.1.
            tau_neg: Smallest negative sharpness that is kept.
            sharpness: "hard" or "soft", see `mhex_core.adjusted_weights`.
            exponent: The power of a soft sharpness.
            progress: Whether a terminal shows a bar while there is more than one batch. Elsewhere there is none.

        Returns:
            The explanation of each text, in their order. It holds the evidence of all blocks, so that
            `Explanation.reweighted` needs no model.

        Raises:
            TypeError: An argument is of another type than stated.
            ValueError: A value does not fit, or there is no tokenizer to be found.
        """
        options = SaliencyOptions(
            beta=beta,
            tau_pos=tau_pos,
            tau_neg=tau_neg,
            sharpness=sharpness,
            exponent=exponent,
            rectify=False,
        )
        return explain(
            self,
            texts_or_batch,
            target,
            texts=texts,
            tokenizer=tokenizer,
            max_length=max_length,
            batch_size=batch_size,
            layers=layers,
            layer_weights=layer_weights,
            decay=decay,
            attention=attention,
            options=options,
            progress=progress,
        )

    def train(self, mode: bool = True) -> Self:
        """Set the mode; a frozen encoder stays in evaluation mode and without gradients."""
        super().train(mode)
        if self.config.freeze_backbone:
            self.encoder.eval()
            # Here too, since weights come out of `from_pretrained` wanting gradients again.
            self.encoder.requires_grad_(requires_grad=False)
        return self

    def get_input_embeddings(self) -> nn.Module:
        """The encoder's word embeddings."""
        embeddings: nn.Module = self.encoder.get_input_embeddings()
        return embeddings

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Put other word embeddings into the encoder."""
        self.encoder.set_input_embeddings(value)

    def _init_weights(self, module: nn.Module) -> None:
        # The encoder sees to its own weights; the only other ones are the blocks' two matrices.
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=getattr(self.config.encoder, "initializer_range", 0.02))

    def _run_layers(
        self, hidden: Tensor, context: Context, mask: Tensor | None, *, keep_activations: bool
    ) -> tuple[tuple[Tensor, ...], ...]:
        gate_logits, head_logits, activations = [], [], []
        for index in range(self.layer_indices[-1] + 1):
            # Without a gradient there is nothing to save, and torch's older checkpoints would lose the block's own.
            if self.gradient_checkpointing and self.training and hidden.requires_grad:
                # Tensors one by one: inside another object those older checkpoints would not see them.
                results = self._gradient_checkpointing_func(self._run_layer, index, hidden, mask, *context)
            else:
                results = self._run_layer(index, hidden, mask, *context)
            hidden = results[0]
            if len(results) > 1:
                gate_logits.append(results[1])
                head_logits.append(results[2])
                if keep_activations:
                    activations.append(results[3])
        return tuple(gate_logits), tuple(head_logits), tuple(activations)

    def _run_layer(
        self, index: int, hidden: Tensor, mask: Tensor | None, *context: Tensor | None
    ) -> tuple[Tensor, ...]:
        block: Any = self.blocks[self.layer_indices.index(index)] if index in self.layer_indices else None
        hidden, output = self._adapter.run_layer(self.encoder, index, hidden, context, block, mask)
        return (hidden,) if output is None else (hidden, *output)

    def _check_inputs(
        self, input_ids: Tensor | None, inputs_embeds: Tensor | None, attention_mask: Tensor | None
    ) -> None:
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("exactly one of input_ids and inputs_embeds must be given")
        name, given, ndim = (
            ("input_ids", input_ids, 2) if input_ids is not None else ("inputs_embeds", inputs_embeds, 3)
        )
        if given is None or given.ndim != ndim:
            shape = "(B, T)" if ndim == 2 else "(B, T, E)"
            raise ValueError(f"{name} must have shape {shape}, got {None if given is None else tuple(given.shape)}")
        if attention_mask is not None and attention_mask.shape != given.shape[:2]:
            raise ValueError(
                f"attention_mask must have shape {tuple(given.shape[:2])}, got {tuple(attention_mask.shape)}"
            )


def _named_labels(labels: Sequence[str], num_labels: int) -> dict[str, Any]:
    if isinstance(labels, str) or not isinstance(labels, Sequence) or not all(isinstance(n, str) for n in labels):
        raise TypeError(f"labels must be a sequence of texts, got {labels!r}")
    if len(labels) != num_labels or len(set(labels)) != num_labels:
        raise ValueError(f"labels must hold {num_labels} different names, got {tuple(labels)!r}")
    return {"id2label": dict(enumerate(labels)), "label2id": {name: index for index, name in enumerate(labels)}}


AutoModelForSequenceClassification.register(MHEXTextConfig, MHEXForSequenceClassification, exist_ok=True)
