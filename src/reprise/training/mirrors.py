"""Loggers beside metrics.csv: each mirrors the run folder and is never the only place where a number lives."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from pytorch_lightning.loggers import Logger, WandbLogger

from reprise.training.instantiate import instantiate


def make_mirrors(cfg: DictConfig, folder: Path) -> list[Logger]:
    """The loggers of the group `logger`; each is configured as a factory and gets the run folder here."""
    made = []
    for name, node in cfg.logger.items():
        extra: dict[str, Any] = {"save_dir": str(folder)}
        if name == "wandb":
            extra["run_config"] = OmegaConf.to_container(cfg, resolve=True)
        made.append(instantiate(node, path=f"logger.{name}")(**extra))
    return made


@contextmanager
def finished_mirrors(loggers: Sequence[Logger]) -> Iterator[None]:
    """Close every W&B run on each way out, so that several runs in one process stay several runs."""
    code = 1
    try:
        yield
        code = 0
    finally:
        for logger in loggers:
            if isinstance(logger, WandbLogger):
                logger.experiment.finish(exit_code=code)
