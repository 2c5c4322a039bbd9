"""W&B as a mirror of the run folder: grouped by paper and scale, job type = arm, offline without a key."""

from __future__ import annotations

import netrc
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pytorch_lightning.loggers import WandbLogger


def has_key() -> bool:
    """Whether a W&B key is configured by environment or netrc (its value is never read further)."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    path = Path(os.environ.get("NETRC", Path.home() / ".netrc"))
    try:
        return path.exists() and netrc.netrc(path).authenticators("api.wandb.ai") is not None
    except (netrc.NetrcParseError, OSError):
        return False


def make_logger(
    *,
    project: str,
    entity: str | None,
    tags: Sequence[str],
    save_dir: str,
    run_config: Mapping[str, Any],
) -> WandbLogger:
    """A logger whose run is named and grouped like the run folder; offline (and saying so) when no key is set.

    Args:
        save_dir: the run folder.
        run_config: the resolved configuration, which becomes the run's config.
    """
    offline = not has_key() or os.environ.get("WANDB_MODE") == "offline"
    if offline and os.environ.get("RANK", "0") == "0":
        print("wandb: no key is set, so this run is kept offline; `wandb sync` uploads it later", file=sys.stderr)
    return WandbLogger(
        project=project,
        entity=entity,
        offline=offline,
        save_dir=save_dir,
        name=f"{run_config['arm']} seed={run_config['seed']}",
        group=f"{run_config['slug']}/{run_config['scale']}",
        job_type=str(run_config["arm"]),
        tags=[str(run_config["slug"]), str(run_config["scale"]), *tags],
        config=dict(run_config),
    )
