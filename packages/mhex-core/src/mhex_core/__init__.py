"""Networks that carry their own explanation.

Attention gates and supervision heads on residual connections, the equivalent matrices they amount to, and the saliency
that follows from one forward pass. It needs torch and numpy only; `mhex_vision` and `mhex_text` attach it to
networks.
"""

from importlib.metadata import version

from mhex_core import native
from mhex_core.blocks import BlockOutput, MHEXBlock
from mhex_core.collaboration import collaboration
from mhex_core.explanation import Explanation
from mhex_core.losses import DeepSupervisionLoss, joint_logits
from mhex_core.matrix import adjusted_weights, equivalent_matrix, salience_sharpness
from mhex_core.options import SaliencyOptions
from mhex_core.plan import SaliencyPlan
from mhex_core.saliency import SignedMaps, combine_maps, saliency_maps, signed_maps, token_saliency

__version__ = version("mhex-core")

__all__ = [
    "BlockOutput",
    "DeepSupervisionLoss",
    "Explanation",
    "MHEXBlock",
    "SaliencyOptions",
    "SaliencyPlan",
    "SignedMaps",
    "adjusted_weights",
    "collaboration",
    "combine_maps",
    "equivalent_matrix",
    "joint_logits",
    "native",
    "salience_sharpness",
    "saliency_maps",
    "signed_maps",
    "token_saliency",
]
