"""`reprise doctor`: what a run would find on this machine."""

from __future__ import annotations

import os
import shutil
from typing import Any

from reprise import paths


def diagnose() -> dict[str, Any]:
    """Versions, devices, folders, free space and loggers, by name."""
    import torch

    from reprise.training.runfolder import git_commit, machine, versions

    runs = paths.runs_dir().resolve()
    existing = next(path for path in (runs, *runs.parents) if path.exists())
    return {
        **versions(),
        **machine(),
        "threads": torch.get_num_threads(),
        "bfloat16 on CPU": torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported(),
        "project": str(paths.root()),
        "git commit": git_commit(),
        "data root": str(paths.data_root()),
        "cache": str(paths.cache_dir()),
        "run folders": str(runs),
        "free space (GB)": round(shutil.disk_usage(existing).free / 1e9, 1),
        "writable": os.access(existing, os.W_OK),
        "wandb key": "set" if _has_wandb_key() else "not set (logger=wandb works offline)",
    }


def _has_wandb_key() -> bool:
    from reprise.training.wandb_mirror import has_key

    return has_key()
