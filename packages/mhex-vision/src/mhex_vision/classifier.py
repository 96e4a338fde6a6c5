"""A residual network with MHEX blocks on its connections: a convolutional one, or a vision transformer.

Letters: B batch, K classes, L blocks, C_l channels, h_l x w_l size of block l's feature maps (for a vision transformer
its patch grid), H x W image size, n targets per sample.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self

import torch
from huggingface_hub import ModelHubMixin
from torch import Tensor, nn

from mhex_core import (
    BlockOutput,
    DeepSupervisionLoss,
    MHEXBlock,
    SaliencyOptions,
    SignedMaps,
    _checks,
    collaboration,
    combine_maps,
    signed_maps,
)
from mhex_core.attention import attention_received
from mhex_core.modes import in_evaluation_mode
from mhex_vision import backbones, checkpoint, instrumentation, outputs, surgery, tracing
from mhex_vision.config import Classifier, MHEXConfig, Objective
from mhex_vision.deployment import DeployedClassifier
from mhex_vision.explanation import Explanation
from mhex_vision.surgery import Placement
from mhex_vision.vit import architecture_of, capture

Target = int | str | Sequence[int | str] | Tensor | None


class ClassifierOutput(NamedTuple):
    """What one forward pass gives.

    Attributes:
        logits: (B, K), the prediction.
        head_logits: L tensors (B, K), shallow to deep.
        activations: L tensors (B, C_l, h_l, w_l), what saliency reads.
    """

    logits: Tensor
    head_logits: tuple[Tensor, ...]
    activations: tuple[Tensor, ...]


class MHEXClassifier(nn.Module, ModelHubMixin, library_name="mhex-vision", tags=["mhex", "explainability"]):
    """A classifier that carries its own explanation. Build one with `from_backbone` or `from_pretrained`.

    Args:
        config: The settings.
        backbone: The network; it becomes part of the classifier and is changed in place, so hand over a copy.

    Attributes:
        config: The settings, frozen.
        backbone: The network the blocks were attached to.
        blocks: L `MHEXBlock`s, shallow to deep.
        layer_names: Where they sit, such as "layer1.0".
    """

    def __init__(self, config: MHEXConfig, backbone: nn.Module) -> None:
        super().__init__()
        size, frozen = config.image_size, config.freeze_backbone
        network = instrumentation.examine(backbone, image_size=size, frozen=frozen)
        keep = config.classifier == "keep"
        if keep and network.set_num_classes(backbone, config.num_classes):
            if config.freeze_backbone and not config.gate:
                raise ValueError(
                    f"num_classes is {config.num_classes}, and the backbone to be frozen has another number of "
                    "outputs; a frozen classifier keeps its classes"
                )
            network = instrumentation.examine(backbone, image_size=size, frozen=frozen)
        at = surgery.placement_for(network.additions) if config.at is None else config.at
        config = replace(config, at=at)
        unchanged = keep and config.freeze_backbone and not config.gate and config.objective == "layerwise"
        expected = instrumentation.output_of(backbone, network.image_size) if unchanged else None
        self._additions = surgery.choose(network.additions, at, with_last=not keep)
        surgery.forbid_in_place(backbone)
        self.config = config
        self.backbone = backbone
        self._channels = tracing.probe_of(backbone, 1).shape[1]
        self._ending = network.ending if keep else "logits"
        independent = {"softmax": False, "sigmoid": True}.get(self._ending, config.multi_label)
        if independent != config.multi_label and not (self._ending == "sigmoid" and config.num_classes == 2):
            raise ValueError(
                f"multi_label must be {independent} for {type(backbone).__name__}, which ends in a {self._ending}, got "
                f"{config.multi_label}"
            )
        self._adopt(network.compile(backbone, self._additions, keep_output=keep))
        like = next(backbone.parameters())
        self.blocks = nn.ModuleList(
            MHEXBlock(addition.channels, config.num_classes, gate=config.gate, activation=config.activation).to(
                device=like.device, dtype=like.dtype
            )
            for addition in self._additions
        )
        self.layer_names = tuple(addition.name for addition in self._additions)
        if config.freeze_backbone:
            backbone.requires_grad_(requires_grad=False)
        self.train()
        if expected is not None:
            expected = outputs.own_logits(expected, self._ending, config.num_classes)
            instrumentation.check_unchanged(expected, self, backbone, network.image_size)

    @classmethod
    def from_backbone(
        cls,
        name_or_module: str | nn.Module,
        num_classes: int,
        *,
        weights: str | None = None,
        at: Placement | None = None,
        gate: bool = True,
        freeze_backbone: bool = False,
        classifier: Classifier = "drop",
        objective: Objective = "layerwise",
        decay: float = 0.8,
        activation: Literal["sum", "shortcut"] = "sum",
        multi_label: bool = False,
        image_size: int = 224,
    ) -> Self:
        """Attach blocks to a residual network.

        In a vision transformer the connection is that of the feed-forward part of each transformer block: the shortcut
        is the stream after the attention, the gate multiplies all tokens, and averages are over patches only.

        Args:
            name_or_module: A torchvision name, "timm/" and a timm name, or a network of your own, which is copied and
                stays as it is: one that torch.fx can trace, or a vision transformer of torchvision, timm or
                transformers. Of a `PlainClassifier` the name stays known.
            num_classes: K.
            weights: Pretrained weights to start from (with a name only): "DEFAULT" or a name the library knows.
            at: Which residual additions get a block: "all"; "downsample", those that change channels or resolution (the
                paper's recommended bottlenecks); "stage", the last one at each resolution. None means all of them, and
                above a dozen "stage". Without a classifier of its own the network predicts from its last addition,
                which then always has a block. A vision transformer has one resolution and no bottlenecks.
            gate: Whether shortcuts are gated. Without, blocks watch and change nothing.
            freeze_backbone: Whether the backbone's weights and statistics stay as they are in training.
            classifier: "drop" the network's own classifier (the last head predicts) or "keep" it (it predicts).
            objective: "layerwise" or "joint", see `mhex_core.DeepSupervisionLoss`.
            decay: Of the joint objective.
            activation: What saliency reads, the "sum" or the gated "shortcut".
            multi_label: Whether classes are independent of each other.
            image_size: Side of the images the network is probed with; for networks that insist on one size. A vision
                transformer is not probed.

        Returns:
            The classifier, in training mode. With `freeze_backbone=True, gate=False, classifier="keep"` its logits are
            those of the backbone, bit for bit.

        Raises:
            ValueError: The network has no residual addition, cannot be traced (or, if it is a vision transformer, run
                block by block), or does not fit the options.
        """
        from mhex_vision.plain import PlainClassifier  # which imports this module

        name: str | None = None
        if isinstance(name_or_module, str):
            name, backbone = name_or_module, backbones.build(name_or_module, num_classes, weights=weights)
        elif isinstance(name_or_module, nn.Module):
            if weights is not None:
                raise ValueError("weights belong to a backbone given by name; load your module's weights yourself")
            if isinstance(name_or_module, PlainClassifier):
                name, name_or_module = name_or_module.config.backbone, name_or_module.backbone
            backbone = tracing.copied(tracing.unwrapped(name_or_module))
        else:
            raise TypeError(f"name_or_module must be a name or an nn.Module, got {type(name_or_module).__name__}")
        config = MHEXConfig(
            backbone=name,
            num_classes=num_classes,
            at=at,
            gate=gate,
            freeze_backbone=freeze_backbone,
            classifier=classifier,
            objective=objective,
            decay=decay,
            activation=activation,
            multi_label=multi_label,
            image_size=image_size,
        )
        model = cls(config, backbone)
        if model._ending != "logits":
            outputs.say_probabilities(backbone, model._ending)
        return model

    def forward(self, images: Tensor) -> ClassifierOutput:
        """Classify.

        Args:
            images: (B, 3, H, W), normalised as the backbone expects.
        """
        own, blocks = self._run(images)
        heads = tuple(block.logits for block in blocks)
        return ClassifierOutput(self._predict(own, heads), heads, tuple(block.activation for block in blocks))

    def loss(
        self, *, head_weights: tuple[float, ...] | None = None, label_smoothing: float = 0.0, **weights: Any
    ) -> DeepSupervisionLoss:
        """The training loss of this classifier's objective, to be applied to `supervised_logits`.

        Args:
            head_weights: Of each head; None means 1.
            label_smoothing: In [0, 1].
            **weights: `weight` and `pos_weight` of the classes, as of `DeepSupervisionLoss`.
        """
        return DeepSupervisionLoss(
            self.config.objective,
            self.config.decay,
            head_weights,
            label_smoothing=label_smoothing,
            multi_label=self.config.multi_label,
            **weights,
        )

    def supervised_logits(self, output: ClassifierOutput) -> tuple[Tensor, ...]:
        """The logits that training supervises: every head, and a kept classifier as one more; or the joint sum."""
        if self.config.objective == "joint":
            return (output.logits,)
        return (*output.head_logits, output.logits) if self.config.classifier == "keep" else output.head_logits

    def probabilities(self, logits: Tensor) -> Tensor:
        """Softmax, or sigmoid where classes are independent: (B, K)."""
        return logits.sigmoid() if self.config.multi_label else logits.softmax(dim=-1)

    def equivalent_matrices(self) -> tuple[Tensor, ...]:
        """M_l = W2 W1 of each block: L tensors (K, C_l)."""
        return tuple(block.equivalent_matrix() for block in self._mhex_blocks())

    def explain(
        self,
        images: Tensor,
        target: Target = None,
        *,
        size: int | tuple[int, int] | None = None,
        keep_images: bool = True,
        attention: bool | None = None,
        **options: Any,
    ) -> Explanation:
        """Predict, and show the evidence: one forward pass, no gradients.

        The network is in evaluation mode for the call, and in its own mode again afterwards.

        Args:
            images: (B, 3, H, W), normalised as in training.
            target: The classes to explain: None for the predicted ones; one for all images, or one for each, by number
                or by name; an int tensor (B,) or (B, n); or "all".
            size: (H, W) of the maps; None means the images' own.
            keep_images: Whether the explanation carries the images, for `overlay` and `plot`.
            attention: Whether a patch's evidence is multiplied by the attention it receives, added up over all blocks.
                None means yes for vision transformers, whose attention spreads what the class rests on over all
                patches, so that evidence alone hardly says where it came from; others have none. It is not in the
                paper.
            **options: The fields of `mhex_core.SaliencyOptions`: beta, tau_pos, tau_neg, sharpness, exponent,
                layer_weights, decay, normalize, floor, rectify.

        Raises:
            TypeError: An argument is of another type, or an option is unknown.
            ValueError: An argument's shape or value does not fit.
        """
        if not isinstance(images, Tensor) or not images.is_floating_point():
            kind = images.dtype if isinstance(images, Tensor) else type(images).__name__
            raise TypeError(f"images must be a normalised floating-point tensor (B, 3, H, W), got {kind}")
        if images.ndim != 4 or images.shape[1] != self._channels:
            raise ValueError(f"images must have shape (B, {self._channels}, H, W), got {tuple(images.shape)}")
        chosen = SaliencyOptions(**options)
        with torch.no_grad(), in_evaluation_mode(self):
            output, received = self._attended(images) if self._attends(attention) else (self(images), None)
            probabilities = self.probabilities(output.logits.float())
            classes = probabilities.shape[1]
            wanted = self._wanted(target, probabilities)
            maps = signed_maps(output.activations, self.equivalent_matrices(), wanted, options=chosen)
            if received is not None:
                weights = received if maps.positive[0].ndim == 3 else received.unsqueeze(1)
                maps = SignedMaps(*(tuple(layer * weights for layer in part) for part in maps))
            height_width = (images.shape[2], images.shape[3]) if size is None else size
            saliency = combine_maps(maps, size=height_width, options=chosen)
        return Explanation(
            saliency=saliency,
            target=wanted
            if isinstance(wanted, Tensor)
            else torch.arange(classes, device=images.device).expand(len(images), -1),
            probabilities=probabilities,
            head_logits=torch.stack(output.head_logits).float(),
            positive=maps.positive,
            negative=maps.negative,
            options=chosen,
            layer_names=self.layer_names,
            class_names=self.config.class_names,
            images=self._displayable(images) if keep_images else None,
            method="mhex" if received is None else "mhex:attention=true",
        )

    def collaboration(self, images: Tensor, target: Tensor | None = None) -> Tensor:
        """Whether gate and supervision of each block agree, per sample: (B, L - 1), see `mhex_core.collaboration`.

        Args:
            images: (B, 3, H, W), normalised.
            target: (B,) true classes, or (B, K) labels of a multi-label classifier; None means the prediction.
        """
        with torch.enable_grad(), in_evaluation_mode(self):
            own, blocks = self._run(images)
            heads = [block.logits for block in blocks]
            if target is None:
                logits = self._predict(own, tuple(heads)).detach()
                target = (logits > 0).to(logits.dtype) if self.config.multi_label else logits.argmax(dim=1)
            return collaboration([block.hidden for block in blocks], heads, target, multi_label=self.config.multi_label)

    def strip_heads(self) -> DeployedClassifier:
        """The network to deploy: (B, K) logits only, without what they do not need, the same to the bit.

        Heads that only supervised go. Gates stay, and with them W1. With the joint objective every head is part of the
        prediction and stays.
        """
        return DeployedClassifier.of(self)

    def with_metadata(self, **changes: Any) -> Self:
        """Set `class_names` or `preprocessing` in the configuration; returns the classifier itself."""
        unknown = set(changes) - {"class_names", "preprocessing"}
        if unknown:
            raise ValueError(f"only class_names and preprocessing can be changed, got {', '.join(sorted(unknown))}")
        self.config = replace(self.config, **changes)
        return self

    def train(self, mode: bool = True) -> Self:
        """Set the mode; a frozen backbone stays in evaluation mode, so that its statistics stay too."""
        super().train(mode)
        if self.config.freeze_backbone:
            self.backbone.eval()
        return self

    @classmethod
    def from_pretrained(  # type: ignore[override]  # the mixin's signature swallows what cannot be meant
        cls,
        path_or_repo: str | Path,
        *,
        backbone: nn.Module | None = None,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
    ) -> Self:
        """Load what `save_pretrained` wrote, in evaluation mode, on the CPU.

        Args:
            path_or_repo: A folder, or the name of a repository on the Hugging Face hub.
            backbone: The network, for a classifier that was built from a module instead of a name.
            revision: Of the repository.
            token: For a private repository.
            cache_dir: Where downloads are kept.
            local_files_only: Whether downloading is forbidden.

        Raises:
            FileNotFoundError: There is no such folder, or a file is missing from it.
            ValueError: A file is damaged, or not what it should be.
        """
        folder = checkpoint.locate(
            path_or_repo, revision=revision, token=token, cache_dir=cache_dir, local_files_only=local_files_only
        )
        return checkpoint.restore(folder, lambda text: cls._built(MHEXConfig.from_json(text), backbone))

    def save_pretrained(
        self,
        save_directory: str | Path,
        *,
        config: object = None,
        repo_id: str | None = None,
        push_to_hub: bool = False,
        model_card_kwargs: dict[str, Any] | None = None,
        **push_to_hub_kwargs: Any,
    ) -> str | None:
        """Write config.json, model.safetensors and, where there is none, a README.md.

        A failure leaves the files of an earlier call as they were.

        Args:
            save_directory: The folder; made if it is not there.
            config: Not used; the classifier's own configuration is written.
            repo_id: With `push_to_hub`, the name of the repository on the hub; None means the folder's name.
            push_to_hub: Whether to upload as well.
            model_card_kwargs: What `huggingface_hub` is to fill the README.md with.
            **push_to_hub_kwargs: Passed on to `push_to_hub`.

        Returns:
            The address of the upload, or None.
        """
        # Not the mixin's own, which deletes config.json before it writes anything.
        del config
        folder = Path(save_directory)
        self._save_pretrained(folder)
        card = folder / "README.md"
        if not card.exists():
            checkpoint.write_text(card, str(self.generate_model_card(**(model_card_kwargs or {}))))
        if not push_to_hub:
            return None
        name = repo_id if repo_id is not None else folder.name
        address: str = self.push_to_hub(repo_id=name, model_card_kwargs=model_card_kwargs, **push_to_hub_kwargs)
        return address

    @classmethod
    def _built(cls, config: MHEXConfig, backbone: nn.Module | None) -> Self:
        if backbone is not None:
            return cls(config, tracing.copied(tracing.unwrapped(backbone)))
        if config.backbone is None:
            raise ValueError("it was saved from a module of your own; pass the network as backbone=...")
        return cls(config, backbones.build(config.backbone, config.num_classes))

    def _save_pretrained(self, save_directory: Path) -> None:
        checkpoint.write(self, save_directory)

    @property
    def evaluation_forward(self) -> surgery.CompiledForward:
        """The compiled forward pass of evaluation mode, a function of (backbone, images, blocks)."""
        return self._evaluate

    def _mhex_blocks(self) -> Iterator[MHEXBlock]:
        for block in self.blocks:
            if not isinstance(block, MHEXBlock):
                raise TypeError(f"blocks must hold MHEXBlock modules, got {type(block).__name__}")
            yield block

    def _adopt(self, compiled: instrumentation.Compiled) -> None:
        self._evaluate, self._train = (self._with_own_logits(one) for one in (compiled.evaluate, compiled.train))
        if self.config.classifier == "drop":
            surgery.drop_unused(self.backbone, compiled.used)

    def _with_own_logits(self, forward: surgery.CompiledForward) -> surgery.CompiledForward:
        if self.config.classifier == "drop":
            return forward
        ending, classes = self._ending, self.config.num_classes

        def read(backbone: nn.Module, images: Tensor, blocks: Any) -> tuple[Any, tuple[BlockOutput | None, ...]]:
            own, given = forward(backbone, images, blocks)
            return outputs.own_logits(own, ending, classes), given

        return read

    def _run(self, images: Tensor) -> tuple[Tensor | None, tuple[BlockOutput, ...]]:
        forward = self._train if self.backbone.training else self._evaluate
        own, given = forward(self.backbone, images, self.blocks)  # type: ignore[arg-type]  # ModuleList is indexable
        return own, tuple(output for output in given if output is not None)

    def _attends(self, wanted: bool | None) -> bool:
        """Whether evidence is multiplied by attention."""
        transformer = architecture_of(self.backbone) is not None
        if wanted is None:
            return transformer
        if _checks.flag("attention", wanted) and not transformer:
            name = type(self.backbone).__name__
            raise ValueError(f"attention must be False or None for {name}, which is no vision transformer")
        return wanted

    def _attended(self, images: Tensor) -> tuple[ClassifierOutput, Tensor]:
        """The output, and the attention (B, h, w) that each patch receives, added up over all blocks."""
        seen = capture(self, images, graph=False)
        wide = torch.promote_types(seen.logits.dtype, torch.float32)
        received = attention_received([weights.to(wide) for weights in seen.attentions])
        activations = tuple(seen.maps(block.activation.transpose(1, 2)) for block in seen.blocks)
        heads = tuple(block.logits for block in seen.blocks)
        return ClassifierOutput(seen.logits, heads, activations), seen.maps(received)

    def _predict(self, own: Tensor | None, heads: tuple[Tensor, ...]) -> Tensor:
        supervised = heads if own is None else (*heads, own)
        return DeepSupervisionLoss(self.config.objective, self.config.decay).prediction(supervised)

    def _displayable(self, images: Tensor) -> Tensor | None:
        """The images as uint8, or None where it is not known how they were normalised."""
        preprocessing = self.config.preprocessing
        if preprocessing is None or images.shape[1] != 3:
            return None
        return preprocessing.denormalize(images)

    def _wanted(self, target: Target, probabilities: Tensor) -> Tensor | Literal["all"]:
        """The classes to explain: int64 (B,) or (B, n), or all of them."""
        if target is None:
            return probabilities.argmax(dim=1)
        if isinstance(target, str) and target == "all":
            return "all"
        batch, classes = probabilities.shape
        names, device = self.config.class_names, probabilities.device
        return _checks.class_indices(
            "target", target, batch=batch, num_classes=classes, device=device, class_names=names
        )

    def __getstate__(self) -> dict[str, Any]:
        # Generated functions cannot be copied or sent to another process; the backbone can be compiled again.
        return {key: value for key, value in self.__dict__.items() if key not in ("_evaluate", "_train")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        keep = self.config.classifier == "keep"
        self._adopt(
            instrumentation.compile_copy(
                self.backbone,
                self._additions,
                image_size=self.config.image_size,
                frozen=self.config.freeze_backbone,
                keep_output=keep,
            )
        )
