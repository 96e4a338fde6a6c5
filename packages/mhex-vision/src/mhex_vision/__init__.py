"""Image classifiers that give a class-specific saliency map with every prediction."""

from importlib.metadata import version

from mhex_vision.classifier import ClassifierOutput, MHEXClassifier
from mhex_vision.config import MHEXConfig
from mhex_vision.data import Preprocessing, load_data
from mhex_vision.deployment import DeployedClassifier
from mhex_vision.explanation import Explanation

__version__ = version("mhex-vision")

__all__ = [
    "ClassifierOutput",
    "DeployedClassifier",
    "Explanation",
    "MHEXClassifier",
    "MHEXConfig",
    "Preprocessing",
    "load_data",
]
