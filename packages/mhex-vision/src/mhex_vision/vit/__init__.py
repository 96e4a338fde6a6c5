"""Vision transformers: how each family is run block by block, and one forward pass with all that explanations read."""

from mhex_vision.vit.architecture import Architecture, Grid, architecture_of
from mhex_vision.vit.capture import Captured, Tail, capture

__all__ = ["Architecture", "Captured", "Grid", "Tail", "architecture_of", "capture"]
