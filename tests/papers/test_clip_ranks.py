"""Two processes with half of the batch each give the loss and the gradients of one process with the whole batch."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from reprise.papers.clip.evaluation import gather_interleaved
from reprise.papers.clip.model import clip
from reprise.papers.clip.objectives import objective

BATCH, TOTAL = 6, 7


QUEUED = {"name": "queued_contrastive", "queue_size": 2 * BATCH, "momentum": 0.5}


def _gradients(mine: slice, options: dict[str, Any]) -> dict[str, Tensor]:
    torch.manual_seed(0)
    model = clip(
        embed_dim=8, image_size=16, vision_layers=1, vision_width=8, vision_patch_size=8, vision_heads=2, text_width=8,
        text_layers=1, text_heads=2, context_length=5, vocab_size=12,
    )  # fmt: skip
    image, text = torch.randn(BATCH, 3, 16, 16), torch.randint(1, 10, (BATCH, 5))
    text[:, -1] = 11
    text[4] = text[1]  # equal captions on different ranks
    contrast = objective(**options)
    contrast.prepare(model)
    contrast.loss(model, image[mine].flip(-1), text[mine])  # so that a queue is filled
    loss = contrast.loss(model, image[mine], text[mine])
    loss.backward()
    found = {name: value.grad for name, value in model.named_parameters() if value.grad is not None}
    return {**found, "loss": loss.detach(), **{f"state.{name}": value for name, value in contrast.named_buffers()}}


def _rank(rank: int, folder: str, options: dict[str, Any]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    gradients = {name: value.float() for name, value in _gradients(slice(3 * rank, 3 * rank + 3), options).items()}
    for value in gradients.values():
        dist.all_reduce(value)
    rows = gather_interleaved(torch.arange(rank, TOTAL, 2)[:, None], TOTAL)
    if rank == 0:
        torch.save({name: value / 2 for name, value in gradients.items()}, Path(folder) / "gradients.pt")
        torch.save(rows, Path(folder) / "rows.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize(
    "options", [{"name": "contrastive"}, {"name": "contrastive", "positives": "same_caption"}, QUEUED]
)
def test_the_contrastive_matrix_is_global(options: dict[str, Any]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_rank, args=(folder, options), nprocs=2)
        two = torch.load(Path(folder) / "gradients.pt", weights_only=True)
        rows = torch.load(Path(folder) / "rows.pt", weights_only=True)
    one = _gradients(slice(0, BATCH), options)
    assert two.keys() == one.keys()
    for name, value in one.items():
        assert torch.allclose(two[name], value.float(), atol=1e-6, rtol=1e-4), name
    assert rows.flatten().tolist() == list(range(TOTAL))
