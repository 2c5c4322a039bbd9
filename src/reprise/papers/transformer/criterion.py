"""Label-smoothed cross-entropy over the symbols of the targets; padding counts nothing (section 5.4)."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

PAD = 0


def label_smoothed_loss(logits: Tensor, target: Tensor, smoothing: float, *, as_released: bool = False) -> Tensor:
    """Cross-entropy with a softened target, 0 where the target is padding.

    Default: 1 - eps goes to the true symbol and eps is spread over all V symbols, the true one included (Szegedy et al.
    2015, section 7, which the paper cites). `as_released`: eps / (V - 1) goes to each OTHER symbol, and the entropy of
    the soft target is subtracted, so that a perfect prediction costs nothing (tensor2tensor, padded_cross_entropy).

    Args:
        logits: [B, T, V].
        target: int64 [B, T].
        smoothing: eps.

    Returns:
        [B, T] in nats, float32.
    """
    vocabulary = logits.shape[-1]
    spread = smoothing * vocabulary / (vocabulary - 1) if as_released else smoothing
    loss = F.cross_entropy(logits.flatten(0, -2).float(), target.flatten(), reduction="none", label_smoothing=spread)
    loss = loss.view(target.shape)
    if as_released:
        loss = loss - soft_target_entropy(smoothing, vocabulary)
    return loss * (target != PAD)


def soft_target_entropy(smoothing: float, vocabulary: int) -> float:
    """Entropy, in nats, of 1 - eps on one symbol and eps / (V - 1) on each other."""
    if smoothing == 0:
        return 0.0
    rest = smoothing / (vocabulary - 1)
    return -((1 - smoothing) * math.log(1 - smoothing) + smoothing * math.log(rest))


def token_log_probs(logits: Tensor, target: Tensor) -> Tensor:
    """log P of each target symbol, float32 [B, T], 0 at padding; perplexity is exp of minus their mean."""
    found = logits.float().log_softmax(-1).gather(-1, target.unsqueeze(-1)).squeeze(-1)
    return torch.where(target != PAD, found, 0.0)
