"""Devices and nodes that a configuration asks for and the machine has not, and who starts the ranks."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from reprise.errors import ConfigError
from reprise.training import machine
from reprise.training.machine import rank, ranks_are_there, ranks_to_start

SLURM = {"SLURM_NTASKS": "16", "SLURM_PROCID": "5", "SLURM_JOB_ID": "17"}


@pytest.fixture(autouse=True)
def nothing_around(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_STEP_ID"):
        monkeypatch.delenv(name, raising=False)


def environment(monkeypatch: pytest.MonkeyPatch, **variables: str) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)


def config(accelerator: str = "cpu", devices: Any = 1, num_nodes: int = 1, precision: Any = "32-true") -> Any:
    options = {"accelerator": accelerator, "devices": devices, "num_nodes": num_nodes, "precision": precision}
    return SimpleNamespace(trainer=SimpleNamespace(**options))


def test_a_process_for_each_device() -> None:
    assert ranks_to_start(config(devices=3)) == 3


@pytest.mark.parametrize("precision", ["bf16-mixed", 32, "bf16", None])
def test_lightnings_precisions(precision: Any) -> None:
    assert ranks_to_start(config(precision=precision)) == 1


def test_an_unknown_precision_is_answered_with_those_there_are() -> None:
    with pytest.raises(ConfigError, match="no precision 12") as caught:
        ranks_to_start(config(precision=12))
    assert "bf16-mixed" in str(caught.value)


@pytest.mark.parametrize("devices", [0, -1, "auto", True, [0, 1]])
def test_devices_must_be_a_number_from_1_up(devices: object) -> None:
    with pytest.raises(ConfigError, match="must be a number from 1 up"):
        ranks_to_start(config(devices=devices))


def test_more_gpus_than_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "gpus", lambda: 2)
    assert ranks_to_start(config("gpu", 2)) == 2
    with pytest.raises(ConfigError, match=r"asks for 8 GPUs of this machine, which has 2(.|\n)*trainer.devices=2"):
        ranks_to_start(config("gpu", 8))


def test_no_gpu_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "gpus", lambda: 0)
    with pytest.raises(ConfigError, match=r"wants a GPU(.|\n)*trainer=cpu"):
        ranks_to_start(config("gpu"))


def test_several_nodes_need_someone_who_starts_them() -> None:
    with pytest.raises(ConfigError, match="nothing has started the processes of the other nodes") as refused:
        ranks_to_start(config(devices=8, num_nodes=2))
    assert "trainer.num_nodes=1" in str(refused.value)
    assert "scripts/slurm/train_nodes.sbatch" in str(refused.value)


def test_tasks_of_srun_are_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    environment(monkeypatch, **SLURM, SLURM_STEP_ID="0")
    assert ranks_are_there()
    assert rank() == 5
    assert ranks_to_start(config(devices=8, num_nodes=2)) == 1
    with pytest.raises(ConfigError, match=r"srun started 16 processes, and .* is 8"):
        ranks_to_start(config(devices=8))


def test_a_batch_script_is_no_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    environment(monkeypatch, **SLURM)
    assert not ranks_are_there()
    assert rank() == 0
    with pytest.raises(ConfigError, match="put srun before the command"):
        ranks_to_start(config(devices=8))
    assert ranks_to_start(config()) == 1


def test_ranks_of_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    environment(monkeypatch, RANK="3", **SLURM)
    assert rank() == 3
    assert ranks_to_start(config(devices=8, num_nodes=2)) == 1
