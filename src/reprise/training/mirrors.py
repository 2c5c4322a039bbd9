"""Loggers beside metrics.csv: each mirrors the run folder and is never the only place where a number lives."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from pytorch_lightning.loggers import Logger

from reprise import config as configuration
from reprise.training.instantiate import instantiate
from reprise.training.wandb_mirror import WandbMirror, mirror_verdict


def make_mirrors(cfg: DictConfig, folder: Path) -> list[Logger]:
    """The loggers of the group `logger`; each is configured as a factory and gets the run folder here."""
    made = []
    for name, node in cfg.logger.items():
        extra: dict[str, Any] = {"save_dir": str(folder)}
        if name == "wandb":
            extra["run_config"] = OmegaConf.to_container(cfg, resolve=True)
            extra["scale"] = configuration.scale_label(cfg)
        made.append(instantiate(node, path=f"logger.{name}")(**extra))
    return made


class Outcome:
    """What a run ended with; `metrics` stays None where it failed or was stopped."""

    metrics: Mapping[str, float] | None = None


@contextmanager
def finished_mirrors(loggers: Sequence[Logger]) -> Iterator[Outcome]:
    """Close every W&B run on each way out, so that several runs in one process stay several runs."""
    outcome = Outcome()
    try:
        yield outcome
    finally:
        for logger in loggers:
            if isinstance(logger, WandbMirror):
                logger.close(outcome.metrics)


def mirror_conclusion(cfg: DictConfig, verdict: Mapping[str, Any], folder: Path) -> None:
    """Send the verdict of a claim where its runs were mirrored, if anywhere."""
    if "wandb" in cfg.logger:
        node = cfg.logger.wandb
        mirror_verdict(verdict, folder, project=node.project, entity=node.entity, tags=list(node.tags))
