"""Batch norm over all processes and in groups, against torch's in one process; the queue of keys."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

from reprise.errors import ConfigError
from reprise.nn.batch_norm import SplitBatchNorm, SyncBatchNorm
from reprise.nn.queue import KeyQueue

STATISTICS = ("running_mean", "running_var")


def _data() -> tuple[Tensor, Tensor]:
    rng = torch.Generator().manual_seed(1)
    return torch.randn(12, 3, 4, 5, generator=rng), torch.randn(12, 3, 4, 5, generator=rng)


def _layers() -> list[nn.Module]:
    layers = [SyncBatchNorm(3), SplitBatchNorm(3, splits=2), SplitBatchNorm(3, splits=4)]
    for layer in layers:
        with torch.no_grad():
            layer.weight.copy_(torch.tensor([0.5, 1.0, 2.0]))
            layer.bias.copy_(torch.tensor([0.1, 0.2, 0.3]))
    return layers


def _run(mine: slice) -> list[dict[str, Tensor]]:
    value, cotangent = _data()
    results = []
    for layer in _layers():
        part = value[mine].clone().requires_grad_()
        output = layer(part)
        (output * cotangent[mine]).sum().backward()
        result = {"output": output.detach(), "gradient": part.grad, "weight": layer.weight.grad}
        results.append({**result, **{name: getattr(layer, name).clone() for name in STATISTICS}})
    return results


def _rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    torch.save(_run(slice(6 * rank, 6 * rank + 6)), Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_normalise_as_one() -> None:
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_rank, args=(folder,), nprocs=2)
        ranks = [torch.load(Path(folder) / f"{rank}.pt", weights_only=True) for rank in range(2)]
    for one, first, second in zip(_run(slice(0, 12)), *ranks, strict=True):
        for name in ("output", "gradient"):
            torch.testing.assert_close(torch.cat([first[name], second[name]]), one[name], atol=2e-6, rtol=1e-5)
        torch.testing.assert_close(first["weight"] + second["weight"], one["weight"], atol=1e-5, rtol=1e-5)
        for name in STATISTICS:
            torch.testing.assert_close(first[name], one[name], atol=1e-6, rtol=1e-5)
            torch.testing.assert_close(second[name], one[name], atol=1e-6, rtol=1e-5)


def test_groups_are_devices() -> None:
    value, _ = _data()
    split, plain = SplitBatchNorm(3, splits=3), [nn.BatchNorm2d(3) for _ in range(3)]
    theirs = torch.cat([layer(part) for layer, part in zip(plain, value.chunk(3), strict=True)])
    torch.testing.assert_close(split(value), theirs)
    for name in STATISTICS:
        mean = torch.stack([getattr(layer, name) for layer in plain]).mean(0)
        torch.testing.assert_close(getattr(split, name), mean)
    torch.testing.assert_close(split.eval()(value[:1]), _evaluated(split, value[:1]))


def _evaluated(norm: SplitBatchNorm, value: Tensor) -> Tensor:
    plain = nn.BatchNorm2d(3).eval()
    plain.load_state_dict(norm.state_dict())
    return plain(value)


def test_interleaved_groups() -> None:
    value, _ = _data()
    split = SplitBatchNorm(3, splits=3, interleaved=True)
    torch.testing.assert_close(split(value)[1::3], nn.BatchNorm2d(3)(value[1::3]))


def test_sync_batch_norm_alone_is_batch_norm() -> None:
    value = torch.randn(8, 5)
    ours, theirs = SyncBatchNorm(5, affine=False), nn.BatchNorm1d(5, affine=False)
    torch.testing.assert_close(ours(value), theirs(value))
    assert torch.equal(ours.running_var, theirs.running_var)
    torch.testing.assert_close(ours.eval()(value), theirs.eval()(value))


def test_sync_batch_norm_sums_in_float32() -> None:
    value = torch.randn(64, 5)
    ours, theirs = SyncBatchNorm(5), nn.BatchNorm1d(5)
    found = ours._over_all_ranks(value.bfloat16())
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), theirs(value), atol=0.03, rtol=0.02)
    assert ours.running_mean is not None
    torch.testing.assert_close(ours.running_mean, theirs.running_mean, atol=1e-3, rtol=0)


def test_groups_that_do_not_divide_the_batch() -> None:
    with pytest.raises(ConfigError, match="cannot be dealt"):
        SplitBatchNorm(3, splits=5)(_data()[0])


def test_queue_keeps_the_last_keys() -> None:
    queue = KeyQueue(4, 6)
    torch.testing.assert_close(queue.keys.norm(dim=0), torch.ones(6))
    batches = [torch.randn(2, 4) for _ in range(4)]
    for batch in batches:
        queue.enqueue(batch)
    torch.testing.assert_close(queue.keys.T, torch.cat([batches[3], batches[1], batches[2]]))
    assert queue.position.item() == 2


def test_queue_refuses_batches_that_it_would_tear() -> None:
    with pytest.raises(ConfigError, match="not a multiple"):
        KeyQueue(4, 6).enqueue(torch.randn(4, 4))
