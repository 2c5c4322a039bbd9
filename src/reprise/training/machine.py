"""The processes and devices that a configuration asks for, and those that are there."""

from __future__ import annotations

import os

import torch
from omegaconf import DictConfig

from reprise.errors import ConfigError

TEMPLATE = "scripts/slurm/train_nodes.sbatch"
PRECISIONS = ("32-true", "bf16-mixed", "16-mixed", "bf16-true", "16-true", "64-true")
OTHER_PRECISIONS = ("32", "bf16", "16", "64", "transformer-engine", "transformer-engine-float16")  # Lightning has them
# What differs between two starts of the same run by torchrun or srun, and is the same for all ranks of one start.
START_VARIABLES = (
    "TORCHELASTIC_RUN_ID",
    "TORCHELASTIC_RESTART_COUNT",
    "SLURM_JOB_ID",
    "SLURM_STEP_ID",
    "SLURM_RESTART_COUNT",
)


def ranks_are_there() -> bool:
    """Whether someone else (torchrun, srun) has started one process per rank, of which this is one."""
    return "RANK" in os.environ or _is_srun_task()


def _is_srun_task() -> bool:
    """A task of a step; the batch script and an interactive shell have the number of tasks in their environment too."""
    return _slurm_tasks() > 1 and "SLURM_STEP_ID" in os.environ and "SLURM_PROCID" in os.environ


def _slurm_tasks() -> int:
    return int(os.environ.get("SLURM_NTASKS", "1"))


def rank() -> int:
    """This process's rank, as torchrun or srun numbers it; 0 where there is only one."""
    if "RANK" in os.environ:
        return int(os.environ["RANK"])
    return int(os.environ["SLURM_PROCID"]) if _is_srun_task() else 0


def start_name() -> str:
    """The same for all ranks that were started together, and another one for the next start."""
    return "/".join(os.environ.get(name, "") for name in START_VARIABLES)


def ranks_to_start(cfg: DictConfig) -> int:
    """How many processes to start on this machine; 1 where they are there already.

    Raises:
        ConfigError: the devices asked for are not there, nobody has started the processes of other nodes, or there is
            no such precision.
    """
    _check_precision(cfg)
    devices = _devices(cfg)
    _check_gpus(cfg, devices)
    if ranks_are_there():
        _check_tasks(devices * cfg.trainer.num_nodes)
        return 1
    if cfg.trainer.num_nodes > 1:
        raise ConfigError(
            f"trainer.num_nodes is {cfg.trainer.num_nodes}, and nothing has started the processes of the other nodes",
            looked_at="trainer.num_nodes",
            next_step=f"trainer.num_nodes=1 uses this machine alone; `sbatch {TEMPLATE}` starts all, by srun",
        )
    if devices > 1 and _slurm_tasks() > 1:
        raise ConfigError(
            f"this Slurm job has {_slurm_tasks()} tasks, and srun has not started them",
            looked_at="SLURM_NTASKS",
            next_step=f"put srun before the command ({TEMPLATE}), or ask Slurm for one task with all GPUs of the node",
        )
    return devices


def _devices(cfg: DictConfig) -> int:
    devices = cfg.trainer.devices
    if isinstance(devices, int) and not isinstance(devices, bool) and devices >= 1:
        return devices
    raise ConfigError(
        f"trainer.devices must be a number from 1 up, not {devices!r}",
        looked_at="trainer.devices",
        next_step="say how many devices of this machine to use, e.g. trainer.devices=8",
    )


def _check_precision(cfg: DictConfig) -> None:
    precision = cfg.trainer.precision
    if precision is not None and str(precision) not in PRECISIONS + OTHER_PRECISIONS:
        raise ConfigError(
            f"there is no precision {precision!r}",
            looked_at="trainer.precision",
            next_step=f"choose one of: {', '.join(PRECISIONS)}",
        )


def _check_gpus(cfg: DictConfig, devices: int) -> None:
    if cfg.trainer.accelerator not in ("gpu", "cuda"):
        return
    there = gpus()
    if there == 0:
        raise ConfigError(
            "the trainer wants a GPU, and PyTorch finds none on this machine",
            looked_at="trainer.accelerator (and CUDA_VISIBLE_DEVICES)",
            next_step="trainer=cpu, or trainer=ddp_cpu trainer.devices=N, runs without one",
        )
    if devices > there:
        raise ConfigError(
            f"trainer.devices asks for {devices} GPUs of this machine, which has {there}",
            looked_at="trainer.devices (and CUDA_VISIBLE_DEVICES)",
            next_step=f"trainer.devices={there}; the global batch and the learning rate stay as they are",
        )


def gpus() -> int:
    """How many GPUs this process may use."""
    return torch.cuda.device_count() or int(torch.backends.mps.is_available())


def _check_tasks(wanted: int) -> None:
    if "RANK" not in os.environ and wanted != _slurm_tasks():
        raise ConfigError(
            f"srun started {_slurm_tasks()} processes, and trainer.devices times trainer.num_nodes is {wanted}",
            looked_at="trainer.devices, trainer.num_nodes",
            next_step="make --ntasks-per-node equal to trainer.devices, and --nodes to trainer.num_nodes",
        )
