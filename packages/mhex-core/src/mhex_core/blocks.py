"""One MHEX block: an attention gate and a deep-supervision head that share their first matrix.

Letters: B batch, C channels, K classes, T tokens, `*` any spatial sizes.
Source: Sun and Liò, "Multi-Head Explainer" (arXiv 2501.01311), the method's block equations.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from mhex_core import _checks
from mhex_core.matrix import compute_dtype, equivalent_matrix

Activation = Literal["sum", "shortcut"]


class BlockOutput(NamedTuple):
    """What a block hands out besides the gated shortcut.

    Attributes:
        hidden: (B, C), h = z W1^T, before the sigmoid of the gate.
        logits: (B, K), the supervision head's logits h W2^T.
        activation: what saliency reads, in the layout of the inputs and before the backbone's own activation function.
    """

    hidden: Tensor
    logits: Tensor
    activation: Tensor


class MHEXBlock(nn.Module):
    """Attention gate and supervision head on one residual connection.

    Tensors are channels-first, (B, C, *), unless a call says `channels_last`: sequences of tokens are (B, T, C), and a
    rank does not tell them from signals (B, C, length).

    Args:
        channels: C, the width of the residual connection.
        num_classes: K.
        gate: Whether the shortcut is multiplied by sigmoid(h). Without it (g = 1) the block only watches, and the
            network computes what it computed before.
        activation: What saliency reads: "sum" is branch + gated shortcut, "shortcut" the gated shortcut alone.

    Attributes:
        gate: W1, a bias-free (C, C) `nn.Linear`, used by the gate and by the head.
        head: W2, a bias-free (K, C) `nn.Linear`.
    """

    def __init__(self, channels: int, num_classes: int, *, gate: bool = True, activation: Activation = "sum") -> None:
        super().__init__()
        self.channels = _checks.positive_int("channels", channels)
        self.num_classes = _checks.positive_int("num_classes", num_classes)
        self.gated = _checks.flag("gate", gate)
        self.activation: Activation = _checks.choice("activation", activation, ("sum", "shortcut"))
        self.gate = nn.Linear(channels, channels, bias=False)
        self.head = nn.Linear(channels, num_classes, bias=False)

    def forward(
        self,
        shortcut: Tensor,
        branch: Tensor,
        mask: Tensor | None = None,
        *,
        channels_last: bool = False,
        prefix: int = 0,
        reuse_branch: bool = False,
        shortcut_first: bool = False,
    ) -> tuple[Tensor, BlockOutput]:
        """Gate the shortcut and read the head.

        Args:
            shortcut: x, (B, C, *), after the projection if the connection has one.
            branch: r, of the same shape, the residual branch before the addition.
            mask: (B, *), true (or 1) where a position is real. Others take no part in the averages.
            channels_last: Whether shortcut and branch are (B, *, C), as tokens (B, T, C) are.
            prefix: How many of the first tokens take no part in the averages either, such as a class token. Tokens
                only, and without a mask.
            reuse_branch: Whether the sum may be written over `branch`, for callers who need it no more: it saves a
                tensor's memory and the time to fetch it.
            shortcut_first: Whether the sum is shortcut + branch and lies in memory as the shortcut does, where the two
                lie differently; else as the branch does.

        Returns:
            The gated shortcut (the shortcut itself when `gate=False`), and a `BlockOutput`.

        Raises:
            ValueError: The shapes do not fit each other or the block.
        """
        self._check(shortcut, branch, mask, channels_last=channels_last)
        tokens = channels_last and shortcut.ndim == 3
        if prefix and (mask is not None or not tokens or not 0 < prefix < shortcut.shape[1]):
            raise ValueError(
                "prefix must be less than the number of tokens of (B, T, C), with channels_last and without a mask, "
                f"got {prefix} with shape {tuple(shortcut.shape)} and channels_last={channels_last}"
            )
        if not self.gated and self.activation == "sum":
            # The mean of the sum is the sum of the means, and one pass instead of two.
            activation = residual_sum(branch, shortcut, reuse_branch=reuse_branch, shortcut_first=shortcut_first)
            mean = mean_over_positions(activation, mask, prefix=prefix, channels_last=channels_last)
            hidden = self.gate(torch.relu(mean))
            return shortcut, BlockOutput(hidden, self.head(hidden), activation)
        pooled = torch.relu(
            mean_over_positions(shortcut, mask, prefix=prefix, channels_last=channels_last)
            + mean_over_positions(branch, mask, prefix=prefix, channels_last=channels_last)
        )
        hidden = self.gate(pooled)
        gated = shortcut
        if self.gated:
            gated = shortcut * as_positions(torch.sigmoid(hidden), shortcut, channels_last=channels_last)
        activation = gated
        if self.activation == "sum":
            activation = residual_sum(branch, gated, reuse_branch=reuse_branch, shortcut_first=shortcut_first)
        return gated, BlockOutput(hidden, self.head(hidden), activation)

    def gate_sum(
        self, total: Tensor, mask: Tensor | None = None, *, channels_last: bool = False
    ) -> tuple[Tensor, BlockOutput]:
        """Gate the sum of shortcut and branch and read the head, for transformers that normalise after the addition.

        With total = x + r: z = ReLU(mean of total), h = z W1^T, gated = sigmoid(h) * total, logits = h W2^T. The layer
        goes on with LayerNorm(dropout(gated)), and saliency reads the sum before its gate. (Source: the method's
        transformer blocks. Where the normalisation comes first, `forward` is the right one.)

        Args:
            total: x + r, (B, C, *).
            mask: (B, *), true (or 1) where a position is real. Others take no part in the averages.
            channels_last: Whether `total` is (B, *, C), as tokens (B, T, C) are.

        Returns:
            The gated sum (the sum itself when `gate=False`), and a `BlockOutput` whose activation is `total`.

        Raises:
            ValueError: The shapes do not fit each other or the block, or the block's activation is "shortcut", which a
                sum no longer shows.
        """
        if self.activation != "sum":
            raise ValueError(f"activation must be 'sum' where the gate multiplies the sum, got {self.activation!r}")
        self._check_layout("total", total, mask, channels_last=channels_last)
        hidden = self.gate(torch.relu(mean_over_positions(total, mask, channels_last=channels_last)))
        gated = total
        if self.gated:
            gated = total * as_positions(torch.sigmoid(hidden), total, channels_last=channels_last)
        return gated, BlockOutput(hidden, self.head(hidden), total)

    def equivalent_matrix(self) -> Tensor:
        """M = W2 W1, (K, C): what one unit of pooled channel k adds to the logit of class c."""
        return equivalent_matrix(self.gate.weight, self.head.weight)

    def extra_repr(self) -> str:
        """Show what the two matrices do not."""
        return f"gated={self.gated}, activation={self.activation!r}"

    def _check(self, shortcut: Tensor, branch: Tensor, mask: Tensor | None, *, channels_last: bool) -> None:
        if shortcut.shape != branch.shape:
            raise ValueError(
                f"branch must have the shortcut's shape {tuple(shortcut.shape)}, got {tuple(branch.shape)}"
            )
        self._check_layout("shortcut", shortcut, mask, channels_last=channels_last)

    def _check_layout(self, name: str, features: Tensor, mask: Tensor | None, *, channels_last: bool) -> None:
        channels = features.shape[-1 if channels_last else 1] if features.ndim >= 2 else -1
        if channels != self.channels:
            layout = f"(B, *, {self.channels})" if channels_last else f"(B, {self.channels}, *)"
            hint = "" if channels_last else "; tokens (B, T, C) need channels_last=True"
            raise ValueError(f"{name} must have shape {layout}, got {tuple(features.shape)}{hint}")
        positions = features.shape[:-1] if channels_last else (features.shape[0], *features.shape[2:])
        if mask is not None and mask.shape != positions:
            raise ValueError(f"mask must have shape {tuple(positions)}, got {tuple(mask.shape)}")


def residual_sum(
    branch: Tensor, shortcut: Tensor, *, reuse_branch: bool = False, shortcut_first: bool = False
) -> Tensor:
    """branch + shortcut, written over `branch` where that is allowed and changes no dtype."""
    if reuse_branch and torch.promote_types(branch.dtype, shortcut.dtype) == branch.dtype:
        return branch.add_(shortcut)
    return shortcut + branch if shortcut_first else branch + shortcut


def mean_over_positions(
    features: Tensor, mask: Tensor | None = None, *, prefix: int = 0, channels_last: bool = False
) -> Tensor:
    """GAP over real positions of (B, C, *) or (B, *, C), without the first tokens: (B, C)."""
    if prefix:
        features = features[:, prefix:]
    if features.ndim == 2:
        return features
    if mask is None:
        return features.flatten(1, -2).mean(dim=1) if channels_last else features.flatten(2).mean(dim=2)
    by_position = features.flatten(1, -2) if channels_last else features.flatten(2).transpose(1, 2)
    real = mask.flatten(1).unsqueeze(2).to(torch.bool)
    # `where`, not a product: a padded position may hold anything, NaN included, and must not be felt.
    kept = torch.where(real, by_position, torch.zeros((), dtype=features.dtype, device=features.device))
    # The sum of many half-precision values may be infinite where their mean is not.
    dtype = compute_dtype(features.dtype)
    return (kept.sum(dim=1, dtype=dtype) / real.sum(dim=1).clamp(min=1).to(dtype)).to(features.dtype)


def as_positions(values: Tensor, like: Tensor, *, channels_last: bool = False) -> Tensor:
    """View (B, C) so that it multiplies `like`, (B, C, *) or (B, *, C), channel by channel."""
    ones = (1,) * (like.ndim - 2)
    samples, channels = values.shape
    return values.reshape(samples, *ones, channels) if channels_last else values.reshape(samples, channels, *ones)
