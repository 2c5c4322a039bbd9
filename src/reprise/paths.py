"""Where things are: the project's own files, the data root, the run folders."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def environment_variable(name: str, value: str) -> Iterator[None]:
    """Set a variable for this process and those that it starts, and put back what it was."""
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        os.environ.pop(name)
        if before is not None:
            os.environ[name] = before


def root() -> Path:
    """The folder that holds `conf/` and `experiments/` (override: `REPRISE_ROOT`)."""
    if override := os.environ.get("REPRISE_ROOT"):
        return Path(override).resolve()
    return Path(__file__).resolve().parents[2]


def conf_dir() -> Path:
    return root() / "conf"


def experiments_dir() -> Path:
    return root() / "experiments"


def data_root() -> Path:
    """The folder of downloaded data sets: `REPRISE_DATA`, by default under the user's cache."""
    if override := os.environ.get("REPRISE_DATA"):
        return Path(override).expanduser()
    return cache_dir() / "data"


def cache_dir() -> Path:
    """The folder for things that can be made again: `REPRISE_CACHE`, by default `~/.cache/reprise`."""
    if override := os.environ.get("REPRISE_CACHE"):
        return Path(override).expanduser()
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "reprise"


def runs_dir() -> Path:
    """The folder of run folders: `REPRISE_RUNS`, by default `runs/` in the working directory."""
    return Path(os.environ.get("REPRISE_RUNS", "runs")).expanduser()
