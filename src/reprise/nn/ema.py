"""Momentum (exponential moving average) copies of networks: the slowly moving teacher or key encoder."""

from __future__ import annotations

import copy
from typing import TypeVar

import torch
from torch import Tensor, nn

Network = TypeVar("Network", bound=nn.Module)


def momentum_copy(network: Network) -> Network:
    """A deep copy with equal weights and statistics that receives no gradients."""
    return copy.deepcopy(network).requires_grad_(False)


@torch.no_grad()
def update_momentum(target: nn.Module, source: nn.Module, momentum: float) -> None:
    """p_target <- momentum * p_target + (1 - momentum) * p_source over PARAMETERS; buffers stay the target's own.

    Raises:
        ValueError: the two networks do not have the same parameters in the same order.
    """
    ours, theirs = dict(target.named_parameters()), dict(source.named_parameters())
    if list(ours) != list(theirs):
        raise ValueError(f"parameters differ: {sorted(ours.keys() ^ theirs.keys()) or 'their order'}")
    kept: list[Tensor] = list(ours.values())
    moved: list[Tensor] = list(theirs.values())
    torch._foreach_mul_(kept, momentum)
    torch._foreach_add_(kept, moved, alpha=1.0 - momentum)
