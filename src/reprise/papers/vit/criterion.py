"""The two training losses: softmax for fine-tuning and ImageNet-1k, sigmoid for the released ImageNet-21k models."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor


def softmax_cross_entropy(logits: Tensor, label: Tensor) -> Tensor:
    """Mean over the batch of -log softmax(logits)[label]; logits [B, C], label int64 [B]."""
    return F.cross_entropy(logits, label)


def sigmoid_cross_entropy(logits: Tensor, label: Tensor) -> Tensor:
    """One binary problem a class, summed over the classes, averaged over the batch.

    The head's bias starts at -10, so that the C-1 negatives of an image cost nearly nothing at the start.

    Args:
        logits: [B, C].
        label: int64 [B], or a float multi-hot target [B, C].
    """
    target = label if label.ndim == 2 else F.one_hot(label, logits.shape[1])
    return F.binary_cross_entropy_with_logits(logits, target.to(logits.dtype), reduction="none").sum(1).mean()


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "softmax": softmax_cross_entropy,
    "sigmoid": sigmoid_cross_entropy,
}
