"""A network that classifies and explains nothing: the judge of explanations, and what a classifier is compared with.

Letters: B batch, K classes.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Self

from torch import Tensor, nn

from mhex_core import _checks
from mhex_core.weights import read_settings
from mhex_vision import backbones, checkpoint, instrumentation
from mhex_vision.classifier import MHEXClassifier
from mhex_vision.config import checked_class_names, checked_preprocessing, settings_of
from mhex_vision.data import Preprocessing
from mhex_vision.outputs import ONE_LOGIT

FORMAT_KEY = "mhex_vision_plain_format"
FORMAT_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class PlainConfig:
    """Settings of a `PlainClassifier`.

    Attributes:
        backbone: A torchvision name, or a timm name with its prefix "timm/".
        num_classes: K.
        multi_label: Whether classes are independent of each other.
        class_names: K names, or empty.
        preprocessing: How image files become network inputs, where it is known.
    """

    backbone: str
    num_classes: int
    multi_label: bool = False
    class_names: tuple[str, ...] = ()
    preprocessing: Preprocessing | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.backbone, str):
            raise TypeError(f"backbone must be a name, got {type(self.backbone).__name__}")
        _checks.positive_int("num_classes", self.num_classes)
        if not _checks.flag("multi_label", self.multi_label) and self.num_classes == 1:
            raise ValueError(f"num_classes must be at least 2 where classes exclude each other, got 1; {ONE_LOGIT}")
        object.__setattr__(self, "class_names", checked_class_names(self.class_names, self.num_classes))
        checked_preprocessing(self.preprocessing)

    def to_json(self) -> str:
        """The text of config.json."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        values["preprocessing"] = None if self.preprocessing is None else self.preprocessing.to_dict()
        return json.dumps({FORMAT_KEY: FORMAT_VERSION, **values}, indent=2, sort_keys=True) + "\n"

    @classmethod
    def from_json(cls, text: str) -> PlainConfig:
        """Read the text of config.json.

        Raises:
            ValueError: It is not JSON, not such a configuration, or of a newer format.
        """
        return settings_of(cls, text, FORMAT_KEY, FORMAT_VERSION, kind="a plain classifier")


class PlainClassifier(nn.Module):
    """A network without blocks, saved and loaded like an `MHEXClassifier`. Its output is (B, K) logits.

    Args:
        config: The settings.
        backbone: The network, with K outputs.

    Attributes:
        config: The settings, frozen.
        backbone: The network.
    """

    def __init__(self, config: PlainConfig, backbone: nn.Module) -> None:
        super().__init__()
        self.config = config
        self.backbone = backbone

    @classmethod
    def from_name(cls, name: str, num_classes: int, *, weights: str | None = None, multi_label: bool = False) -> Self:
        """Build a network by name.

        Args:
            name: A torchvision name such as "resnet34", or "timm/" and a timm name.
            num_classes: K.
            weights: Pretrained weights to start from; the classifier is then fresh if K differs from theirs.
            multi_label: Whether classes are independent of each other.

        Raises:
            ValueError: No such network or weights, or its last layer cannot be given K outputs.
        """
        config = PlainConfig(backbone=name, num_classes=num_classes, multi_label=multi_label)
        network = backbones.build(name, num_classes, weights=weights)
        if weights is not None:
            instrumentation.examine(network).set_num_classes(network, num_classes)
        return cls(config, network)

    def forward(self, images: Tensor) -> Tensor:
        """Classify images (B, 3, H, W), normalised as the network expects: (B, K) logits."""
        logits: Tensor = self.backbone(images)
        return logits

    def with_metadata(self, **changes: Any) -> Self:
        """Set `class_names` or `preprocessing` in the configuration; returns the classifier itself."""
        unknown = set(changes) - {"class_names", "preprocessing"}
        if unknown:
            raise ValueError(f"only class_names and preprocessing can be changed, got {', '.join(sorted(unknown))}")
        self.config = replace(self.config, **changes)
        return self

    def save_pretrained(self, save_directory: str | Path) -> None:
        """Write config.json and model.safetensors; a failure leaves the files of an earlier call as they were."""
        checkpoint.write(self, Path(save_directory))

    @classmethod
    def from_pretrained(cls, path: str | Path) -> Self:
        """Load what `save_pretrained` wrote, in evaluation mode, on the CPU.

        Raises:
            FileNotFoundError: There is no such folder, or a file is missing from it.
            ValueError: A file is damaged, or not what it should be.
        """
        return checkpoint.restore(checkpoint.locate(path), lambda text: cls._built(PlainConfig.from_json(text)))

    @classmethod
    def _built(cls, config: PlainConfig) -> Self:
        return cls(config, backbones.build(config.backbone, config.num_classes))


def load_classifier(path_or_repo: str | Path) -> MHEXClassifier | PlainClassifier:
    """Load a run of `train`, whichever kind of network it is.

    Raises:
        FileNotFoundError: There is no such folder, or a file is missing from it.
        ValueError: A file is damaged, or not what it should be.
    """
    folder = checkpoint.locate(path_or_repo)
    if FORMAT_KEY in read_settings(folder / checkpoint.CONFIG_FILE):
        return PlainClassifier.from_pretrained(folder)
    return MHEXClassifier.from_pretrained(folder)
