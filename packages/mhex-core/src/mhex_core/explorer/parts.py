"""What an explorer page is made of.

Letters: K classes, L layers, h_l x w_l layer size, H x W map size, T tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from mhex_core import _checks
from mhex_core.explorer.packing import packed


@dataclass(frozen=True, kw_only=True)
class Method:
    """How a method's layers are weighed, until a reader says otherwise.

    Attributes:
        name: Of the method, as it was asked for.
        layer_names: L names, shallow to deep.
        layer_weights: lambda_l, L numbers.
        beta: How much negative evidence counts, in [0, 1].
        normalize: Whether each map is brought to [0, 1] by its own extremes; of another method's map, which is shown
            between its extremes anyway, the page then says that its scale is its own.
        floor: As in `SaliencyOptions`.
        signed: Whether values below zero are evidence against the class, and shown so.
        unit: What a score of a token is measured in, as words.
        fixed: Whether a map is what somebody stored, and nothing is known of what it was added up from: no sliders.
    """

    name: str
    layer_names: tuple[str, ...]
    layer_weights: tuple[float, ...]
    beta: float = 0.0
    normalize: bool = True
    floor: float = 0.0
    signed: bool = False
    unit: str = ""
    fixed: bool = False

    def __post_init__(self) -> None:
        set_field = object.__setattr__
        set_field(self, "layer_names", tuple(self.layer_names))
        set_field(self, "layer_weights", _checks.numbers("layer_weights", self.layer_weights))
        set_field(self, "beta", _checks.number("beta", self.beta, low=0, high=1))
        set_field(self, "floor", _checks.number("floor", self.floor, low=0, high=1))
        if not self.layer_names or len(self.layer_names) != len(self.layer_weights):
            raise ValueError(
                f"layer_weights must hold one number for each of {len(self.layer_names)} layers, "
                f"got {len(self.layer_weights)}"
            )


@dataclass(frozen=True)
class Evidence:
    """What a method found in a sample, for and against one class.

    Attributes:
        method: Its place among the page's methods.
        target: The class.
        shapes: L shapes, (h_l, w_l) or (T,).
        data: Packed, see `mhex_core.explorer.packing`.
        size: (H, W) of the map in pixels; None for tokens.
    """

    method: int
    target: int
    shapes: tuple[tuple[int, ...], ...]
    data: bytes = field(repr=False)
    size: tuple[int, int] | None = None

    @classmethod
    def of_layers(
        cls,
        positive: Sequence[Tensor],
        negative: Sequence[Tensor],
        *,
        method: int,
        target: int,
        size: tuple[int, int] | None = None,
    ) -> Evidence:
        """Pack the evidence of L layers, each (h_l, w_l) or (T,).

        Raises:
            ValueError: There are no layers, shapes differ between the two, or a value is not finite.
        """
        shapes = tuple(tuple(layer.shape) for layer in positive)
        if not shapes or shapes != tuple(tuple(layer.shape) for layer in negative):
            raise ValueError("positive and negative must hold the same layers, at least one")
        return cls(method, target, shapes, packed(positive, negative), size)


@dataclass(frozen=True)
class Picture:
    """An image file as it is shown below its map.

    Attributes:
        data: The file's bytes.
        media_type: "image/png" or "image/jpeg".
        width: In pixels.
        height: In pixels.
    """

    data: bytes = field(repr=False)
    media_type: str
    width: int
    height: int

    def __post_init__(self) -> None:
        _checks.choice("media_type", self.media_type, ("image/png", "image/jpeg"))


@dataclass(frozen=True)
class Piece:
    """A piece of a text: a word, or what lies between words. The pieces of a text put together are the text.

    Attributes:
        text: As it stands in the text.
        tokens: Places in [0, T) of the tokens whose scores it sums up; none for what lies between words.
        seen: Whether the model read it.
    """

    text: str
    tokens: tuple[int, ...] = ()
    seen: bool = True


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One image or text (or pair of texts), what was predicted, and the evidence.

    Attributes:
        name: What it is called in the gallery.
        probabilities: K numbers.
        evidence: At least one. The first of each method is always shown; a page that must stay small leaves out later
            ones.
        label: The true class, or None where it is not known.
        heads: For each of L heads its class and that class's probability; empty where there are none.
        picture: The image, for images.
        texts: One or two texts in pieces, for texts.
        tokens: T strings, what each token covers, for texts.
        note: What else is to be said about it (that it was cut, say).
    """

    name: str
    probabilities: tuple[float, ...]
    evidence: tuple[Evidence, ...]
    label: int | None = None
    heads: tuple[tuple[int, float], ...] = ()
    picture: Picture | None = None
    texts: tuple[tuple[Piece, ...], ...] = ()
    tokens: tuple[str, ...] = ()
    note: str = ""

    def __post_init__(self) -> None:
        for name in ("probabilities", "evidence"):
            if not getattr(self, name):
                raise ValueError(f"{name} must not be empty")
        if (self.picture is None) == (not self.texts):
            raise ValueError("a sample must have either a picture or texts")

    @property
    def prediction(self) -> int:
        """The class of the highest probability, the first of several."""
        return self.probabilities.index(max(self.probabilities))
