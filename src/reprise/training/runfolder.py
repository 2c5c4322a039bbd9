"""The run folder: the only place where the facts of a run live."""

from __future__ import annotations

import csv
import json
import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from reprise import paths
from reprise.errors import RepriseError

VERSIONED = (
    "reprise",
    "torch",
    "torchvision",
    "pytorch-lightning",
    "hydra-core",
    "omegaconf",
    "timm",
    "numpy",
    "scipy",
)

RANK_ERRORS = "error.rank=*.json"


def write_atomic(path: Path, text: str) -> None:
    """Write a file so that a reader sees the old or the new content, never a part."""
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        scratch.write_text(text)
        scratch.replace(path)
    except OSError:
        scratch.unlink(missing_ok=True)
        raise


def write_json(path: Path, content: Any) -> None:
    write_atomic(path, json.dumps(content, indent=1, sort_keys=False) + "\n")


def cannot_be_written(folder: Path, error: OSError) -> RepriseError:
    """The error for a place where no run folder can be made."""
    return RepriseError(
        f"the run folder cannot be written: {error.strerror or error}",
        looked_at=folder.resolve(),
        next_step="free space or choose another folder with REPRISE_RUNS=DIR",
    )


@dataclass
class RunFolder:
    """Reads and writes the files of one run (docs/architecture.md has the list)."""

    path: Path

    def prepare(self, config_hash: str) -> None:
        """Make the folder; one of another configuration is moved aside, so that nothing finished is lost.

        Raises:
            RepriseError: the folder cannot be written.
        """
        try:
            known = self.read("run.json")
            if known and known.get("config_hash") != config_hash:
                self._move_aside(str(known.get("config_hash")))
            (self.path / "checkpoints").mkdir(parents=True, exist_ok=True)
            write_atomic(self.path / ".writable", "")
            (self.path / ".writable").unlink()
            for old in self.path.glob(RANK_ERRORS):
                old.unlink(missing_ok=True)
        except OSError as error:
            raise cannot_be_written(self.path, error) from error

    def _move_aside(self, old_hash: str) -> None:
        target = self.path.with_name(f"{self.path.name}~old-{old_hash[:8]}")
        count = 1
        while target.exists():
            count += 1
            target = self.path.with_name(f"{self.path.name}~old-{old_hash[:8]}-{count}")
        self.path.rename(target)

    def read(self, name: str) -> dict[str, Any] | None:
        """A JSON file of the folder, or None where it is missing or damaged."""
        try:
            return json.loads((self.path / name).read_text())
        except (OSError, json.JSONDecodeError):
            return None

    def holds(self, config_hash: str) -> bool:
        """Whether a run of this configuration has begun here, however it ended."""
        return (self.read("run.json") or {}).get("config_hash") == config_hash

    def is_finished(self, config_hash: str) -> bool:
        """Whether this folder holds the finished run of this configuration."""
        run, summary = self.read("run.json"), self.read("summary.json")
        return bool(run and summary and run.get("status") == "finished" and run.get("config_hash") == config_hash)

    def metrics(self) -> dict[str, float]:
        """The test metrics of a finished run."""
        return (self.read("summary.json") or {})["metrics"]

    def start(self, facts: Mapping[str, Any]) -> None:
        """Write run.json for a run that begins or continues; the first start and the time used so far are kept."""
        before = self.read("run.json") or {}
        seconds, cpu_seconds = self.used_so_far(before)
        content = {
            **facts,
            "status": "running",
            "started": before.get("started", now()),
            "finished": None,
            "seconds": seconds,
            "cpu_seconds": cpu_seconds,
            "error": None,
            "exit_code": None,
            "git_commit": git_commit(),
            "versions": versions(),
            "machine": machine(),
            "command": os.environ.get("REPRISE_COMMAND") or shlex.join(sys.argv),
        }
        write_json(self.path / "run.json", content)
        (self.path / "progress.json").unlink(missing_ok=True)  # its time is counted now

    def used_so_far(self, run: Mapping[str, Any]) -> tuple[float, float]:
        """Wall and processor seconds; what was killed could tell them by its progress only."""
        left = self.read("progress.json") if run.get("status") == "running" else None
        wall, cpu = (run.get(key, 0.0) + (left or {}).get(key, 0.0) for key in ("seconds", "cpu_seconds"))
        return round(wall, 3), round(cpu, 3)

    def end(
        self, status: str, *, seconds: float, cpu_seconds: float = 0.0, error: str | None = None, exit_code: int = 0
    ) -> None:
        """Record how the run ended; `exit_code` is that of its process."""
        content = self.read("run.json") or {}
        for key, used in (("seconds", seconds), ("cpu_seconds", cpu_seconds)):
            content[key] = round(content.get(key, 0.0) + used, 3)
        content.update(status=status, finished=now(), error=error, exit_code=exit_code)
        write_json(self.path / "run.json", content)

    def correct(self, **changes: Any) -> None:
        """Change what run.json says of a run whose process has ended, without losing the time that it used."""
        content = self.read("run.json")
        if content is None or not changes:
            return
        seconds, cpu_seconds = self.used_so_far(content)
        content.update({"seconds": seconds, "cpu_seconds": cpu_seconds, **changes})
        write_json(self.path / "run.json", content)

    def progress(self, step: int, steps: int, phase: str, *, seconds: float, cpu_seconds: float) -> None:
        """Say how far the run is; the live view of `reprise reproduce` reads it, and the next start after a kill."""
        content = {"step": step, "steps": steps, "phase": phase, "seconds": round(seconds, 3)}
        content |= {"cpu_seconds": round(cpu_seconds, 3), "updated": time.time()}
        write_atomic(self.path / "progress.json", json.dumps(content))


class MetricsFile:
    """`metrics.csv`, tidy (`step,metric,value`), with values in full precision; cut back to a step on resume."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def cut_back(self, step: int) -> None:
        """Drop what a resumed run will write again: rows later than `step`, and those of the test."""
        rows = [row for row in self._rows() if int(row[0]) <= step and not row[1].startswith("test/")]
        lines = [",".join(("step", "metric", "value")), *(",".join(row) for row in rows)]
        write_atomic(self.path, "\n".join(lines) + "\n")

    def append(self, step: int, values: Mapping[str, float]) -> None:
        with self.path.open("a", newline="") as handle:
            csv.writer(handle, lineterminator="\n").writerows(
                (step, name, repr(float(value))) for name, value in sorted(values.items())
            )

    def _rows(self) -> list[list[str]]:
        if not self.path.exists():
            return []
        with self.path.open(newline="") as handle:
            rows = list(csv.reader(handle))[1:]
        return [row for row in rows if len(row) == 3 and row[0].isdigit() and row[2]]


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def git_commit() -> str | None:
    """The commit of the project, with `+changes` when the tree is not clean; None outside a checkout."""
    try:
        described = subprocess.run(
            ["git", "describe", "--always", "--abbrev=40", "--dirty=+changes", "--exclude=*"],
            cwd=paths.root(),
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return described.stdout.strip()


def versions() -> dict[str, str]:
    return {"python": platform.python_version(), **{name: metadata.version(name) for name in VERSIONED}}


def machine() -> dict[str, Any]:
    import torch

    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {"platform": platform.platform(), "processor": _processor(), "cores": os.cpu_count(), "gpus": gpus}


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()
