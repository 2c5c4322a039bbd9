"""What the paper measures: forgetting of the global model, and accuracy inside and outside a client's distribution."""

from __future__ import annotations

import torch
from torch import Tensor


def class_hits(logits: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
    """Correct predictions and items of each class, float32 [C] each."""
    classes = logits.shape[1]
    hit = label[logits.argmax(1) == label]
    return hit.bincount(minlength=classes).float(), label.bincount(minlength=classes).float()


def forgetting(history: Tensor) -> Tensor:
    """F = mean over classes of max_{t < T} (A_c^t - A_c^T), the last row being round T (section 2).

    Args:
        history: class-wise accuracy of the global model by round, [rounds, C]; rows that are not finite in any class
            (not measured) are skipped, and so are classes without items.

    Returns:
        A scalar; 0 with fewer than two measured rounds. It is negative when the last round is the best of every class.
    """
    rows = history[history.isfinite().any(1)]
    if len(rows) < 2:
        return torch.zeros((), device=history.device)
    return (rows[:-1].amax(0) - rows[-1]).nanmean()


def out_local_distribution(distribution: Tensor) -> Tensor:
    """(1 - p_c) / (C - 1): the classes a client lacks; p [..., C] sums to 1 (section 3)."""
    return (1 - distribution) / (distribution.shape[-1] - 1)


def in_and_out_local(class_accuracy: Tensor, distribution: Tensor) -> tuple[Tensor, Tensor]:
    """Class-wise accuracy weighted by a client's own classes and by the others, [...] each."""
    accuracy = class_accuracy.nan_to_num()
    return (accuracy * distribution).sum(-1), (accuracy * out_local_distribution(distribution)).sum(-1)
