"""What the attention of an encoder says about its tokens: numbers in, numbers out, in plain torch.

Everything here takes tensors that somebody captured from a model: attention weights of all layers, their gradients, or
what enters the last block. Padding takes no part anywhere: real tokens get the numbers that they would have without it.

Letters: B batch, H heads, T tokens, C channels, L layers, A^l the weights of layer l after the softmax: A^l_qi is what
query q takes of key i, and each row sums to 1 over the real tokens.

Summing A over its keys says nothing, since every token then scores 1; what can be told apart is what a token receives
(`attention_received`) or what one query gives (a row).
"""

from mhex_core.attention.cdam import cdam
from mhex_core.attention.flow import attention_flow
from mhex_core.attention.gradients import (
    aggregated_attention,
    attcat,
    attention_gradcam,
    generic_relevance,
    gmar,
    grad_sam,
    head_importance,
    target_gradients,
)
from mhex_core.attention.rollout import attention_received, attention_rollout
from mhex_core.attention.shapley import (
    ShapleyEstimate,
    coalition_values,
    shapley_enumerated,
    shapley_sampled,
    shapley_values,
)

__all__ = [
    "ShapleyEstimate",
    "aggregated_attention",
    "attcat",
    "attention_flow",
    "attention_gradcam",
    "attention_received",
    "attention_rollout",
    "cdam",
    "coalition_values",
    "generic_relevance",
    "gmar",
    "grad_sam",
    "head_importance",
    "shapley_enumerated",
    "shapley_sampled",
    "shapley_values",
    "target_gradients",
]
