"""Gathering rows of all ranks, with the gradients that DDP's averaging needs; two gloo processes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, multiprocessing, nn
from torch import distributed as dist

from reprise.distributed import all_reduce_mean, gather, gather_with_gradient, rank, world_size

WORLD, ROWS = 2, 3


def contrastive(layer: nn.Module, rows: Tensor) -> Tensor:
    """A loss of this rank's rows against everybody's columns."""
    features = layer(rows)
    logits = features @ gather_with_gradient(features).T
    target = torch.arange(len(rows)) + rank() * len(rows)
    return nn.functional.cross_entropy(logits, target)


def problem() -> tuple[nn.Linear, Tensor]:
    torch.manual_seed(0)
    return nn.Linear(4, 5), torch.randn(WORLD * ROWS, 4)


def work(number: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=number, world_size=WORLD)
    layer, rows = problem()
    mine = rows[number * ROWS : (number + 1) * ROWS]
    contrastive(layer, mine).backward()
    assert layer.weight.grad is not None
    torch.save((gather(mine), all_reduce_mean(layer.weight.grad)), f"{folder}/{number}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_averaged_gradients_of_two_ranks_are_those_of_one_process(tmp_path: Path) -> None:
    multiprocessing.spawn(work, args=(str(tmp_path),), nprocs=WORLD)
    layer, rows = problem()
    contrastive(layer, rows).backward()
    for number in range(WORLD):
        gathered, gradient = torch.load(tmp_path / f"{number}.pt", weights_only=True)
        assert torch.equal(gathered, rows)
        torch.testing.assert_close(gradient, layer.weight.grad)


def test_one_process_is_rank_0_of_1() -> None:
    value = torch.ones(2, requires_grad=True)
    assert (rank(), world_size()) == (0, 1)
    assert gather_with_gradient(value) is value
    assert not gather(value).requires_grad
