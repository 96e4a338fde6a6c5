"""What a classifier was built from: enough, with the weights, to build it again."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import TYPE_CHECKING, Any, Literal, TypeVar, get_args

from mhex_core.weights import SEAL, kind_of
from mhex_vision.data import Preprocessing
from mhex_vision.outputs import ONE_LOGIT
from mhex_vision.surgery import Placement

if TYPE_CHECKING:
    from mhex_vision.plain import PlainConfig

Config = TypeVar("Config", "MHEXConfig", "PlainConfig")
Classifier = Literal["drop", "keep"]
Objective = Literal["layerwise", "joint"]
Activation = Literal["sum", "shortcut"]

FORMAT_VERSION = 1
LARGEST_SIDE = 4096
"""Of the images that a network is probed with, whose memory a configuration from elsewhere decides on."""
_CHOICES = {"at": Placement, "classifier": Classifier, "objective": Objective, "activation": Activation}


@dataclass(frozen=True, kw_only=True)
class MHEXConfig:
    """Settings of an `MHEXClassifier`.

    Attributes:
        backbone: A torchvision name ("resnet18"), a timm name with its prefix ("timm/resnet18"), or None for a module
            that the user built.
        num_classes: K.
        at: Which residual additions carry a block: "all", "downsample" or "stage"; None is settled when the network is
            known, see `MHEXClassifier.from_backbone`. Of a vision transformer the latter
            two name at most the last.
        gate: Whether shortcuts are multiplied by their gate.
        freeze_backbone: Whether the backbone's weights and statistics stay as they are in training.
        classifier: Whether the backbone's own classifier goes ("drop") or stays and predicts ("keep").
        objective: "layerwise": the last head (or the kept classifier) predicts. "joint": the decayed sum of all does.
        decay: Of that sum.
        activation: What saliency reads: the "sum" of a residual addition or its gated "shortcut".
        multi_label: Whether classes are independent of each other (sigmoid instead of softmax).
        image_size: Side of the images a convolutional network is probed with once, to learn the shapes inside it.
        class_names: K names, or empty.
        preprocessing: How image files become network inputs, where it is known.
    """

    backbone: str | None
    num_classes: int
    at: Placement | None = "all"
    gate: bool = True
    freeze_backbone: bool = False
    classifier: Classifier = "drop"
    objective: Objective = "layerwise"
    decay: float = 0.8
    activation: Activation = "sum"
    multi_label: bool = False
    image_size: int = 224
    class_names: tuple[str, ...] = ()
    preprocessing: Preprocessing | None = field(default=None)

    def __post_init__(self) -> None:
        if self.backbone is not None and not isinstance(self.backbone, str):
            raise TypeError(f"backbone must be a name or None, got {type(self.backbone).__name__}")
        for name in ("num_classes", "image_size"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"{name} must be an int, got {type(value).__name__}")
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if self.image_size > LARGEST_SIDE:
            raise ValueError(f"image_size must be at most {LARGEST_SIDE}, got {self.image_size}")
        for name in ("gate", "freeze_backbone", "multi_label"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name} must be a bool, got {type(getattr(self, name)).__name__}")
        if self.num_classes == 1 and not self.multi_label:
            raise ValueError(f"num_classes must be at least 2 where classes exclude each other, got 1; {ONE_LOGIT}")
        for name, options in _CHOICES.items():
            if getattr(self, name) not in get_args(options) and not (name == "at" and self.at is None):
                allowed = ", ".join(repr(option) for option in get_args(options))
                raise ValueError(f"{name} must be one of {allowed}, got {getattr(self, name)!r}")
        if isinstance(self.decay, bool) or not isinstance(self.decay, (int, float)) or not 0 <= self.decay <= 1:
            raise ValueError(f"decay must be a number in [0, 1], got {self.decay!r}")
        object.__setattr__(self, "class_names", checked_class_names(self.class_names, self.num_classes))
        checked_preprocessing(self.preprocessing)

    def to_json(self) -> str:
        """The text of config.json."""
        values = asdict(self)
        values["preprocessing"] = None if self.preprocessing is None else self.preprocessing.to_dict()
        return json.dumps({"mhex_vision_format": FORMAT_VERSION, **values}, indent=2, sort_keys=True) + "\n"

    @classmethod
    def from_json(cls, text: str) -> MHEXConfig:
        """Read the text of config.json.

        Raises:
            ValueError: It is not JSON, not such a configuration, or of a newer format.
        """
        return settings_of(cls, text, "mhex_vision_format", FORMAT_VERSION, kind="an MHEX classifier")


def checked_class_names(names: object, num_classes: int) -> tuple[str, ...]:
    """K names, or none.

    Raises:
        TypeError: They are no sequence of texts.
        ValueError: They are neither none nor K.
    """
    if isinstance(names, str) or not isinstance(names, Sequence) or not all(isinstance(n, str) for n in names):
        raise TypeError(f"class_names must be a sequence of texts, got {names!r}")
    if names and len(names) != num_classes:
        raise ValueError(f"class_names must hold {num_classes} names, got {len(names)}")
    return tuple(names)


def checked_preprocessing(preprocessing: object) -> None:
    """Refuse what is neither None nor a `Preprocessing`."""
    if preprocessing is not None and not isinstance(preprocessing, Preprocessing):
        raise TypeError(f"preprocessing must be a Preprocessing or None, got {type(preprocessing).__name__}")


def settings_of(kind_of_config: type[Config], text: str, key: str, version: int, *, kind: str) -> Config:
    """Make a configuration of the text of a config.json, of which `key` says the format.

    Raises:
        ValueError: It is not JSON, not such a configuration, or of another format.
    """
    try:
        values: Any = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not JSON ({error})") from error
    if not isinstance(values, Mapping) or key not in values:
        other = f"but of {kind_of(values)}" if isinstance(values, Mapping) else "but a list or a value"
        raise ValueError(f"not the configuration of {kind} (no key {key!r}), {other}")
    if type(values[key]) is not int or values[key] != version:
        raise ValueError(f"format {values[key]!r} is not {version}, the one this version reads")
    known = {entry.name for entry in fields(kind_of_config)}
    missing = sorted({"backbone", "num_classes"} - set(values))
    if missing:
        raise ValueError(f"keys {', '.join(missing)} are missing")
    unknown = sorted(set(values) - known - {key, SEAL})
    if unknown:
        raise ValueError(f"unknown keys {', '.join(unknown)}")
    chosen = {name: value for name, value in values.items() if name in known}
    try:
        if chosen.get("preprocessing") is not None:
            chosen["preprocessing"] = Preprocessing.from_dict(chosen["preprocessing"])
        return kind_of_config(**chosen)
    except TypeError as error:
        raise ValueError(str(error)) from error
