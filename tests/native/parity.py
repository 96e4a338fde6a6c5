"""Run as a script on an installed mhex-core: says what runs, and fails unless kernels and reference agree.

It needs torch and mhex-core alone, so that it serves wherever a wheel was just installed.
"""

import itertools
import sys

import torch

import mhex_core

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
SHAPES = ((3, 9, 7), (17, 5, 5), (64, 4, 4), (130, 1, 1))  # C, h, w
CLASSES, BATCH, SIZE = 5, 3, (33, 21)


def worst_difference() -> float:
    """The largest difference between kernels and the float64 reference, relative to a map's range."""
    torch.manual_seed(0)
    worst = 0.0
    for dtype, channels_last, beta in itertools.product(DTYPES, (False, True), (0.0, 0.4)):
        layout = torch.channels_last if channels_last else torch.contiguous_format
        activations = [torch.randn(BATCH, *shape).to(dtype).contiguous(memory_format=layout) for shape in SHAPES]
        matrices = [torch.randn(CLASSES, shape[0]).double() for shape in SHAPES]
        target = torch.randint(CLASSES, (BATCH, 2))
        exact = mhex_core.saliency_maps(
            [layer.double() for layer in activations], matrices, target, size=SIZE, beta=beta, backend="reference"
        )
        fast = mhex_core.saliency_maps(activations, matrices, target, size=SIZE, beta=beta, backend="native")
        worst = max(worst, float((fast - exact).abs().max()))
        tokens = [layer.flatten(2).transpose(1, 2)[:, :1] for layer in activations]
        exact = mhex_core.token_saliency(
            [layer.double() for layer in tokens], matrices, target, beta=beta, backend="reference"
        )
        fast = mhex_core.token_saliency(tokens, matrices, target, beta=beta, backend="native")
        worst = max(worst, float((fast - exact).abs().max() / exact.abs().max()))
    return worst


if __name__ == "__main__":
    difference = worst_difference()
    print(f"torch {torch.__version__}, {mhex_core.native.status()}, worst difference {difference:.1e}")  # noqa: T201
    sys.exit(difference > 1e-5)
