"""Contrastive losses. Shapes: N queries of this process, D dimensions, K keys in the queue, B keys of all processes."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def info_nce_logits(query: Tensor, positive: Tensor, negatives: Tensor, temperature: float) -> Tensor:
    """Similarities to the positive key (column 0) and to the queue, over temperature (1911.05722, eq. 1), [N, 1 + K].

    Args:
        query, positive: unit vectors [N, D]; the key of the same image in the same row.
        negatives: unit vectors in columns, [D, K].
    """
    own = (query * positive).sum(1, keepdim=True)
    return torch.cat([own, query @ negatives], dim=1) / temperature


def info_nce(logits: Tensor) -> Tensor:
    """Cross-entropy of picking column 0 for each query (1911.05722, eq. 1), [N]. Chance level: ln(1 + K)."""
    return logits.logsumexp(1) - logits[:, 0]


def in_batch_logits(query: Tensor, keys: Tensor, temperature: float) -> Tensor:
    """Cosine similarities to the keys of the whole batch over temperature, [N, B]; vectors of any length."""
    return F.normalize(query, dim=1) @ F.normalize(keys, dim=1).T / temperature


def in_batch_contrast(query: Tensor, keys: Tensor, temperature: float, first: int = 0) -> Tensor:
    """2 * temperature * cross-entropy of picking the own image's key (2104.02057, algorithm 1, `ctr`), [N].

    The factor keeps the size of gradients, so that temperature does not change the effective rate.

    Args:
        query: [N, D]; keys: [B, D] of all processes.
        first: row of `keys` that belongs to the first query.
    """
    label = torch.arange(len(query), device=query.device) + first
    return 2 * temperature * F.cross_entropy(in_batch_logits(query, keys, temperature), label, reduction="none")
