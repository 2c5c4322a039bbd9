"""What ranks exchange; in a single process every function is the identity (or rank 0 of 1)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist


def is_distributed() -> bool:
    """Whether this process belongs to a process group."""
    return dist.is_available() and dist.is_initialized()


def world_size() -> int:
    """How many ranks train together."""
    return dist.get_world_size() if is_distributed() else 1


def rank() -> int:
    """This process's number among them."""
    return dist.get_rank() if is_distributed() else 0


def all_reduce_sum(value: Tensor) -> Tensor:
    """The sum over ranks, written into `value`; no gradient."""
    if is_distributed():
        dist.all_reduce(value)
    return value


def all_reduce_mean(value: Tensor) -> Tensor:
    """The mean over ranks, written into `value`; no gradient."""
    return all_reduce_sum(value).div_(world_size())


def all_reduce_sum_with_gradient(value: Tensor) -> Tensor:
    """The sum over ranks, differentiable: the gradient of a rank's addend is the sum of all ranks' gradients."""
    return _AllReduceSum.apply(value) if is_distributed() else value


def union_over_ranks(names: set[str]) -> list[str]:
    """What any rank names, sorted."""
    held: list[set[str]] = [names]
    if is_distributed():
        held = [set() for _ in range(world_size())]
        dist.all_gather_object(held, names)
    return sorted(set().union(*held))


def gather(value: Tensor) -> Tensor:
    """The rows of all ranks in rank order, [B, ...] -> [world * B, ...]; no gradient.

    Every rank must hold equally many rows.
    """
    if not is_distributed():
        return value.detach()
    parts = [torch.empty_like(value) for _ in range(world_size())]
    dist.all_gather(parts, value.detach().contiguous())
    return torch.cat(parts)


def gather_with_gradient(value: Tensor) -> Tensor:
    """The rows of all ranks in rank order, [B, ...] -> [world * B, ...], differentiable.

    The backward pass sums the gradients of all ranks and keeps this rank's rows. DDP averages parameter gradients over
    ranks; so where each rank's loss is the mean over ITS OWN rows (against everybody's columns), the averaged gradient
    is that of the mean over the global batch, as in one process. The same holds where every rank computes the whole
    global loss: the sum counts it `world` times and the average divides by `world`.
    """
    return _GatherWithGradient.apply(value) if is_distributed() else value


class _AllReduceSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        return all_reduce_sum(value.clone())

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return all_reduce_sum(gradients[0].clone())


class _GatherWithGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        ctx.rows = len(value)
        return gather(value)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        total = all_reduce_sum(gradients[0].contiguous().clone())
        return total[rank() * ctx.rows : (rank() + 1) * ctx.rows]
