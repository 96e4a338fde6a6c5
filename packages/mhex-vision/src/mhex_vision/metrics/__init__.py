"""How good is an explanation of an image? Each metric is a function of a batch, and most are `torchmetrics` too."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mhex_vision.metrics.attribution import (
        HeadCompleteness,
        completeness,
        head_completeness,
        infidelity,
        sensitivity_n,
    )
    from mhex_vision.metrics.faithfulness import (
        Curve,
        area_drop,
        avg_drop,
        confidence_increase,
        deletion,
        ead,
        insertion,
        perturbation_curve,
        road,
        road_curve,
        sad,
    )
    from mhex_vision.metrics.judge import Judge
    from mhex_vision.metrics.localization import mask_iou, masks_from_boxes, mass_inside, pointing_game
    from mhex_vision.metrics.logits import FidelityCurves, box_sensitivity, fidelity, fidelity_curves
    from mhex_vision.metrics.modules import (
        EAD,
        ROAD,
        SAD,
        AreaDrop,
        AvgDrop,
        BoxSensitivity,
        Compactness,
        Completeness,
        ConfidenceIncrease,
        Deletion,
        Fidelity,
        Infidelity,
        Insertion,
        MaskIoU,
        MassInside,
        PointingGame,
        SensitivityN,
    )
    from mhex_vision.metrics.sanity import (
        Randomized,
        label_randomization,
        layers_of,
        parameter_randomization,
        shuffled_labels,
        similarity,
    )
    from mhex_vision.metrics.specificity import class_sensitivity, compactness

_HOMES = {
    "attribution": ("HeadCompleteness", "completeness", "head_completeness", "infidelity", "sensitivity_n"),
    "faithfulness": (
        "Curve",
        "area_drop",
        "avg_drop",
        "confidence_increase",
        "deletion",
        "ead",
        "insertion",
        "perturbation_curve",
        "road",
        "road_curve",
        "sad",
    ),
    "judge": ("Judge",),
    "localization": ("mask_iou", "masks_from_boxes", "mass_inside", "pointing_game"),
    "logits": ("FidelityCurves", "box_sensitivity", "fidelity", "fidelity_curves"),
    # Apart from the functions, because torchmetrics takes a second to import.
    "modules": (
        "EAD",
        "ROAD",
        "SAD",
        "AreaDrop",
        "AvgDrop",
        "BoxSensitivity",
        "Compactness",
        "Completeness",
        "ConfidenceIncrease",
        "Deletion",
        "Fidelity",
        "Infidelity",
        "Insertion",
        "MaskIoU",
        "MassInside",
        "PointingGame",
        "SensitivityN",
    ),
    "sanity": (
        "Randomized",
        "label_randomization",
        "layers_of",
        "parameter_randomization",
        "shuffled_labels",
        "similarity",
    ),
    "specificity": ("class_sensitivity", "compactness"),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "EAD",
    "ROAD",
    "SAD",
    "AreaDrop",
    "AvgDrop",
    "BoxSensitivity",
    "Compactness",
    "Completeness",
    "ConfidenceIncrease",
    "Curve",
    "Deletion",
    "Fidelity",
    "FidelityCurves",
    "HeadCompleteness",
    "Infidelity",
    "Insertion",
    "Judge",
    "MaskIoU",
    "MassInside",
    "PointingGame",
    "Randomized",
    "SensitivityN",
    "area_drop",
    "avg_drop",
    "box_sensitivity",
    "class_sensitivity",
    "compactness",
    "completeness",
    "confidence_increase",
    "deletion",
    "ead",
    "fidelity",
    "fidelity_curves",
    "head_completeness",
    "infidelity",
    "insertion",
    "label_randomization",
    "layers_of",
    "mask_iou",
    "masks_from_boxes",
    "mass_inside",
    "parameter_randomization",
    "perturbation_curve",
    "pointing_game",
    "road",
    "road_curve",
    "sad",
    "sensitivity_n",
    "shuffled_labels",
    "similarity",
]


def __getattr__(name: str) -> object:
    """Import a public name on first use."""
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value: object = getattr(import_module(f"{__name__}.{_HOME_OF[name]}"), name)
    globals()[name] = value
    return value
