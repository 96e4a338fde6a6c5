"""How a text classifier does on labelled texts: loss and accuracies, of the prediction and of each head.

Letters: N texts, L heads.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from mhex_core import _checks
from mhex_text.batching import TokenizedTexts
from mhex_text.history import TextMetrics
from mhex_text.modeling import MHEXForSequenceClassification
from mhex_text.progress import bar


def accuracies(
    model: PreTrainedModel,
    tokens: TokenizedTexts,
    collate: Any,
    batch_size: int,
    *,
    name: str,
    progress: bool,
    limit: int | None = None,
) -> TextMetrics:
    """Loss and accuracies. Draws no random number.

    Args:
        model: The classifier.
        tokens: Of N texts.
        collate: Makes a batch.
        batch_size: Texts at a time.
        name: What the texts are called.
        progress: Whether a terminal shows a bar.
        limit: How many texts, the longest ones; None means all.

    Raises:
        RuntimeError: The loss is no finite number.
    """
    device = next(model.parameters()).device
    order = np.argsort(-tokens.lengths, kind="stable").tolist()[:limit]
    own: Any = model if isinstance(model, MHEXForSequenceClassification) else None
    total, right, heads = 0.0, 0, np.zeros(len(own.blocks) if own is not None else 0)
    asked = {"output_heads": True} if own is not None else {}
    mode = model.training
    model.train(mode=False)
    try:
        with bar(len(order), description=name, shown=progress) as shown:
            for start in range(0, len(order), batch_size):
                batch = collate([tokens[index] for index in order[start : start + batch_size]]).to(device)
                with torch.no_grad():
                    output = model(**batch, **asked, return_dict=True)
                labels = batch["labels"]
                total += float(output.loss) * len(labels)
                right += int((output.logits.argmax(dim=1) == labels).sum())
                if own is not None:
                    heads += [int((logits.argmax(dim=1) == labels).sum()) for logits in output.head_logits]
                shown.update(len(labels))
    finally:
        model.train(mode=mode)
    count = len(order)
    _checks.finite_loss(f"the {name} texts", total / count)
    return TextMetrics(loss=total / count, accuracy=right / count, head_accuracy=tuple((heads / count).tolist()))
