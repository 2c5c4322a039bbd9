"""Two processes with half of the batch each take the steps that one takes: queue, ShuffleBN, v3's gathered keys."""

from __future__ import annotations

import tempfile
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

from reprise.nn.batch_norm import SplitBatchNorm, SyncBatchNorm
from reprise.papers.moco.encoders import ResNet, VisionTransformer
from reprise.papers.moco.model import Contrast, MoCo, MoCoV3

STEPS, BATCH = 3, 12


def _models() -> dict[str, MoCo | MoCoV3]:
    torch.manual_seed(0)
    groups = partial(SplitBatchNorm, splits=4)
    tokens = VisionTransformer(image_size=16, patch=8, width=8, depth=1, num_heads=2)
    return {
        "queue": MoCo(
            ResNet("basic", [1, 1, 1, 1], width=4, stem="cifar_stride", norm=groups),
            dim=6,
            queue_size=2 * BATCH,
            momentum=0.9,
            symmetric=True,
        ),
        "residual": MoCoV3(
            ResNet("basic", [1, 1, 1, 1], width=4, stem="cifar_stride", norm=SyncBatchNorm), dim=6, mlp_dim=8
        ),
        "transformer": MoCoV3(tokens, dim=6, mlp_dim=8),
    }


def _step(model: MoCo | MoCoV3, step: int, mine: slice) -> Contrast:
    rng = torch.Generator().manual_seed(step)
    view1, view2 = (torch.randn(BATCH, 3, 16, 16, generator=rng)[mine] for _ in range(2))
    if isinstance(model, MoCo):
        return model.contrast(view1, view2, [torch.randperm(BATCH, generator=rng) for _ in range(2)])
    return model.contrast(view1, view2, 0.9)


def _train(mine: slice, ranks: int) -> dict[str, dict[str, Tensor]]:
    states = {}
    for name, model in _models().items():
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.SGD(trained, lr=0.05)
        for step in range(STEPS):
            optimizer.zero_grad()
            _step(model, step, mine).loss.backward()
            _average(trained, ranks)
            optimizer.step()
        states[name] = model.state_dict()
    return states


def _average(trained: list[nn.Parameter], ranks: int) -> None:
    for parameter in trained if ranks > 1 else []:
        assert parameter.grad is not None
        dist.all_reduce(parameter.grad)
        parameter.grad /= ranks


def _rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    half = BATCH // 2
    torch.save(_train(slice(half * rank, half * (rank + 1)), 2), Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_end_as_one() -> None:
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_rank, args=(folder,), nprocs=2)
        ranks = [torch.load(Path(folder) / f"{rank}.pt", weights_only=True) for rank in range(2)]
    for name, state in _train(slice(0, BATCH), 1).items():
        for key, value in state.items():
            for one in ranks:
                torch.testing.assert_close(
                    one[name][key], value, atol=2e-5, rtol=2e-4, msg=lambda m, k=key, n=name: f"{n} {k}: {m}"
                )
