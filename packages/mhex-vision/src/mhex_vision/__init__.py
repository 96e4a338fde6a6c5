"""Image classifiers that give a class-specific saliency map with every prediction."""

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mhex_vision.classifier import ClassifierOutput, MHEXClassifier
    from mhex_vision.config import MHEXConfig
    from mhex_vision.data import Preprocessing, load_data
    from mhex_vision.deployment import DeployedClassifier
    from mhex_vision.evaluation import Metrics, evaluate
    from mhex_vision.explaining import explain_by
    from mhex_vision.explanation import Explanation
    from mhex_vision.outputs import TwoClasses
    from mhex_vision.plain import PlainClassifier, load_classifier
    from mhex_vision.recipes import RECIPES, Recipe
    from mhex_vision.reporting import report
    from mhex_vision.training import TrainingResult, train

__version__ = version("mhex-vision")

__all__ = [
    "RECIPES",
    "ClassifierOutput",
    "DeployedClassifier",
    "Explanation",
    "MHEXClassifier",
    "MHEXConfig",
    "Metrics",
    "PlainClassifier",
    "Preprocessing",
    "Recipe",
    "TrainingResult",
    "TwoClasses",
    "evaluate",
    "explain_by",
    "load_classifier",
    "load_data",
    "report",
    "train",
]

# Loaded when first asked for: torch takes seconds to import, and `mhex-vision --help` comes through here.
_HOMES = {
    "ClassifierOutput": "classifier",
    "DeployedClassifier": "deployment",
    "Explanation": "explanation",
    "MHEXClassifier": "classifier",
    "MHEXConfig": "config",
    "Metrics": "evaluation",
    "PlainClassifier": "plain",
    "Preprocessing": "data",
    "RECIPES": "recipes",
    "Recipe": "recipes",
    "TrainingResult": "training",
    "TwoClasses": "outputs",
    "evaluate": "evaluation",
    "explain_by": "explaining",
    "load_classifier": "plain",
    "load_data": "data",
    "report": "reporting",
    "train": "training",
}


def __getattr__(name: str) -> object:
    """Import a public name on first use."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value: object = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
