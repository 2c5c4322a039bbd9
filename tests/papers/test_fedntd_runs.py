"""Whole runs of FedNTD's stateful baselines: exact continuation, and clients split over more ranks than there are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from tests.cross.support import smoke_config
from tests.papers.test_fedntd import clients
from torch import Tensor

from reprise.config import run_dir
from reprise.evidence.states import differences
from reprise.papers.fedntd.algorithms import FedAvg, FedAvgM, FedCurv, FedDyn, FedNova, FedNTD, Moon, Scaffold
from reprise.papers.fedntd.model import fedavg_digits
from reprise.papers.fedntd.module import FederatedClassifier
from reprise.training.federated import ClientTraining, FlatModel, LocalSGD, Round
from reprise.training.run import train

STATEFUL = ["scaffold", "moon", "feddyn", "fedavgm", "fedcurv"]
SPLIT = [FedAvg, FedNTD, FedAvgM, FedNova, Scaffold, Moon, FedDyn, FedCurv]


class PowerCutError(Exception):
    pass


def final_state(cfg: Any) -> dict[str, Any]:
    newest = sorted((run_dir(cfg) / "checkpoints").glob("step=*.ckpt"))[-1]
    return torch.load(newest, weights_only=True)


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", STATEFUL)
def test_memory_of_the_server_survives(algorithm: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = smoke_config(
        "fedntd", f"paper.algorithm={algorithm}", "callbacks.checkpoint.every_steps=1", "paper.local_every=2"
    )
    monkeypatch.setenv("REPRISE_RUNS", str(tmp_path / "whole"))
    expected = train(cfg, show_progress=False)
    whole = final_state(cfg)

    step = FederatedClassifier.training_step

    def cut(self: FederatedClassifier, batch: Any, batch_idx: int) -> Tensor:
        if batch["round"] == 2:
            raise PowerCutError
        return step(self, batch, batch_idx)

    monkeypatch.setenv("REPRISE_RUNS", str(tmp_path / "cut"))
    with monkeypatch.context() as broken:
        broken.setattr(FederatedClassifier, "training_step", cut)
        with pytest.raises(PowerCutError):
            train(cfg, show_progress=False)
    assert train(cfg, show_progress=False) == expected
    assert differences(final_state(cfg), whole) == []


def play(algorithm: FedAvg, rank: int = 0, world: int = 1) -> tuple[Tensor, dict[str, Tensor]]:
    """Two rounds of four clients (one without data), of which this rank trains every `world`-th."""
    torch.manual_seed(0)
    flat, sgd = FlatModel(fedavg_digits()), LocalSGD(0.05, 0.9, 1e-5)
    training, state = ClientTraining(flat, algorithm), algorithm.init_state(flat.vector(), 8)
    for number in range(2):
        sampled = clients(number)
        chosen = torch.tensor([client["client"] for client in sampled])
        mine = sampled[rank::world]
        contexts = [algorithm.context(state, chosen, client["slot"]) for client in mine]
        results = training(flat.vector(), mine, contexts, sgd)
        for result, client in zip(results, mine, strict=True):
            result.uploads = algorithm.upload(training, client, result)
        sizes = torch.tensor([client["size"] for client in sampled])
        steps = torch.tensor([len(client["splits"]) for client in sampled])
        finished = Round(flat.vector(), chosen, sizes, steps, sgd, results, 8, len(chosen) / 8)
        flat.load(algorithm.aggregate(state, finished))
    return flat.vector(), state


def _rank(rank: int, world: int, store: str, out: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    results = {algorithm.__name__: play(algorithm(), rank, world) for algorithm in SPLIT}
    torch.save(results, f"{out}.{rank}")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_clients_split_over_more_ranks_than_there_are(tmp_path: Path) -> None:
    world = 5  # the fifth rank has no client
    mp.spawn(_rank, (world, str(tmp_path / "store"), str(tmp_path / "out")), nprocs=world)
    for algorithm in SPLIT:
        weights, state = play(algorithm())
        for rank in (0, world - 1):
            split, memory = torch.load(tmp_path / f"out.{rank}", weights_only=True)[algorithm.__name__]
            torch.testing.assert_close(split, weights, rtol=1e-5, atol=1e-6)
            for name, value in state.items():
                torch.testing.assert_close(memory[name], value, rtol=1e-4, atol=1e-5)
