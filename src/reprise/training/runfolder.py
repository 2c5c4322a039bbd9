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
        except OSError as error:
            raise RepriseError(
                f"the run folder cannot be written: {error.strerror or error}",
                looked_at=self.path.resolve(),
                next_step="free space or choose another folder with REPRISE_RUNS=DIR",
            ) from error

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

    def is_finished(self, config_hash: str) -> bool:
        """Whether this folder holds the finished run of this configuration."""
        run, summary = self.read("run.json"), self.read("summary.json")
        return bool(run and summary and run.get("status") == "finished" and run.get("config_hash") == config_hash)

    def start(self, facts: Mapping[str, Any]) -> None:
        """Write run.json for a run that begins or continues (the first start time and the seconds so far are kept)."""
        before = self.read("run.json") or {}
        content = {
            **facts,
            "status": "running",
            "started": before.get("started", now()),
            "finished": None,
            "seconds": before.get("seconds", 0.0),
            "error": None,
            "exit_code": None,
            "git_commit": git_commit(),
            "versions": versions(),
            "machine": machine(),
            "command": os.environ.get("REPRISE_COMMAND") or shlex.join(sys.argv),
        }
        write_json(self.path / "run.json", content)

    def end(self, status: str, *, seconds: float, error: str | None = None, exit_code: int = 0) -> None:
        """Record how the run ended; `exit_code` is that of its process."""
        content = self.read("run.json") or {}
        total = content.get("seconds", 0.0) + seconds
        content.update(status=status, finished=now(), seconds=round(total, 3), error=error, exit_code=exit_code)
        write_json(self.path / "run.json", content)

    def progress(self, step: int, steps: int, phase: str, seconds: float) -> None:
        """Say how far the run is; the live view of `reprise reproduce` reads it."""
        content = {"step": step, "steps": steps, "phase": phase, "seconds": round(seconds, 3), "updated": time.time()}
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
