"""What follows from a model's equivalent matrices, computed once for batch after batch.

Letters: K classes, L layers, C_l channels.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import overload

import torch
from torch import Tensor

from mhex_core import _checks
from mhex_core.matrix import compute_dtype


class SaliencyPlan(Sequence[Tensor]):
    """Equivalent matrices, ready for the kernels; given in place of `matrices` it saves their preparation per call.

    Compiled kernels need each channel's sum over classes, which belongs to the model and not to the batch. A plan is a
    snapshot: after a training step, make another.

        plan = SaliencyPlan(model.equivalent_matrices())
        for images in loader:
            maps = saliency_maps(activations_of(images), plan, target, size=224)

    Attributes:
        matrices: M_l, L tensors (K, C_l), detached, in the accumulation dtype: float64 stays, all else is float32.
        sums: L tensors (2, C_l): per channel, the sum over classes of max(M, 0) and of max(-M, 0).
    """

    def __init__(self, matrices: Sequence[Tensor]) -> None:
        """Prepare `matrices`, L tensors (K, C_l).

        Raises:
            TypeError: They are no tensors of a floating-point dtype.
            ValueError: They differ in K.
        """
        checked = _checks.tensors("matrices", matrices, ndim=2)
        for index, matrix in enumerate(checked):
            if matrix.shape[0] != checked[0].shape[0]:
                raise ValueError(
                    f"matrices[{index}] must have K = {checked[0].shape[0]} rows like the first, got {matrix.shape[0]}"
                )
        self.matrices, self.sums = prepare([matrix.detach().clone() for matrix in checked])

    def __len__(self) -> int:
        return len(self.matrices)

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self.matrices)

    @overload
    def __getitem__(self, index: int) -> Tensor: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[Tensor, ...]: ...
    def __getitem__(self, index: int | slice) -> Tensor | tuple[Tensor, ...]:
        return self.matrices[index]

    def __repr__(self) -> str:
        classes, channels = self.matrices[0].shape[0], [matrix.shape[1] for matrix in self.matrices]
        return f"SaliencyPlan({len(self)} layers, K = {classes}, C = {channels})"

    def chosen(self, layers: Sequence[int]) -> SaliencyPlan:
        """The plan of some of the layers, in the order given."""
        part = object.__new__(SaliencyPlan)
        part.matrices = tuple(self.matrices[index] for index in layers)
        part.sums = tuple(self.sums[index] for index in layers)
        return part


def prepare(
    matrices: Sequence[Tensor], dtypes: Sequence[torch.dtype] | None = None
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Matrices in the accumulation dtype (of the matching `dtypes`, or their own), and their sums per channel."""
    if dtypes is None:
        dtypes = [matrix.dtype for matrix in matrices]
    wide = tuple(matrix.to(compute_dtype(dtype)).contiguous() for matrix, dtype in zip(matrices, dtypes, strict=True))
    return wide, tuple(_sums(matrix) for matrix in wide)


def _sums(matrix: Tensor) -> Tensor:
    return torch.stack([matrix.clamp(min=0).sum(dim=0), (-matrix).clamp(min=0).sum(dim=0)])
