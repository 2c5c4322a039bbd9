"""Two processes with half of the batch each give the gradient of one process with the whole batch."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from reprise.papers.detr.criterion import SetCriterion

CLASSES = 3
COUNTS = [4, 0, 1, 0]  # unbalanced on purpose: per-process normalisation would differ


def _batch(counts: list[int]) -> tuple[Tensor, Tensor, list[dict[str, Tensor]]]:
    generator = torch.Generator().manual_seed(3)
    images = len(counts)
    logits = torch.randn(2, images, 6, CLASSES + 1, generator=generator)
    boxes = 0.2 + 0.3 * torch.rand(2, images, 6, 4, generator=generator)
    targets = [
        {"labels": torch.arange(count) % CLASSES, "boxes": 0.2 + 0.3 * torch.rand(count, 4, generator=generator)}
        for count in counts
    ]
    return logits, boxes, targets


def _gradient(mine: slice, counts: list[int], options: dict[str, Any]) -> Tensor:
    """Gradient with respect to an offset that all queries share (a stand-in for a parameter)."""
    logits, boxes, targets = _batch(counts)
    offset = torch.zeros(CLASSES + 1 + 4, requires_grad=True)
    shifted = (logits[:, mine] + offset[: CLASSES + 1], boxes[:, mine] + 0.1 * offset[CLASSES + 1 :])
    SetCriterion(CLASSES, **options)(*shifted, targets[mine]).total.backward()
    assert offset.grad is not None
    return offset.grad


def _rank(rank: int, folder: str, counts: list[int], options: dict[str, Any]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    gradient = _gradient(slice(2 * rank, 2 * rank + 2), counts, options)
    dist.all_reduce(gradient)
    if rank == 0:
        torch.save(gradient / 2, Path(folder) / "gradient.pt")
    dist.destroy_process_group()


def _two_ranks(counts: list[int], options: dict[str, Any]) -> Tensor:
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_rank, args=(folder, counts, options), nprocs=2)
        return torch.load(Path(folder) / "gradient.pt", weights_only=True)


def test_gradient_does_not_depend_on_the_number_of_processes() -> None:
    whole = _gradient(slice(0, 4), COUNTS, {})
    assert torch.allclose(_two_ranks(COUNTS, {}), whole, atol=1e-6, rtol=1e-5)


def test_one_object_in_the_whole_batch() -> None:
    counts = [0, 0, 1, 0]
    assert torch.allclose(_two_ranks(counts, {}), _gradient(slice(0, 4), counts, {}), atol=1e-6, rtol=1e-5)


def test_one_to_many_too() -> None:
    options = {"assignment": "one_to_many"}
    assert torch.allclose(_two_ranks(COUNTS, options), _gradient(slice(0, 4), COUNTS, options), atol=1e-6, rtol=1e-5)
