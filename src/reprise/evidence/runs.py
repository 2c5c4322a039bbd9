"""Reading run folders `runs/<paper>/<scale>/<arm>/seed=<n>/`, also unfinished, damaged and moved-aside ones."""

from __future__ import annotations

import csv
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from reprise.config import smoked_scale
from reprise.discovery import SCALES
from reprise.evidence.files import read_json

Curves = dict[str, list[tuple[int, float]]]
STATUSES = ("finished", "running", "interrupted", "failed", "damaged", "moved aside")
_MOVED_ASIDE = "~old-"


@dataclass(frozen=True)
class RunPicture:
    """A picture that a run left: what to call it, what to see in it, and its PNG file."""

    name: str
    caption: str
    file: Path


@dataclass(frozen=True)
class RunRecord:
    """What a run folder says.

    Attributes:
        folder: where it lies.
        status: one of `STATUSES`; `finished` only when the summary is there and readable too.
        problem: what is wrong with a run that is not finished, else "".
        metrics: final metrics by name; NaN where the run logged none that is a number.
        info: all of run.json.
    """

    folder: Path
    paper: str
    scale: str
    arm: str
    seed: int | None
    status: str
    problem: str = ""
    metrics: Mapping[str, float] = field(default_factory=dict)
    info: Mapping[str, Any] = field(default_factory=dict)

    @property
    def is_finished(self) -> bool:
        return self.status == "finished"

    @property
    def name(self) -> str:
        """`arm/seed=n`."""
        return f"{self.arm}/{self.folder.name}"

    def text(self, key: str) -> str:
        """A field of run.json as text, "" when absent; a list (a command) is joined with blanks."""
        value = self.info.get(key)
        if isinstance(value, list):
            return " ".join(map(str, value))
        return "" if value is None else str(value)

    @property
    def seconds(self) -> float:
        value = self.info.get("seconds")
        return float(value) if isinstance(value, int | float) else 0.0

    @property
    def cpu_seconds(self) -> float | None:
        """Processor time; None for a run from before it was recorded."""
        value = self.info.get("cpu_seconds")
        return float(value) if isinstance(value, int | float) else None

    def curves(self) -> Curves:
        """Metric -> (step, value) in file order; a torn last line is left out."""
        return self._table("metrics.csv")

    def timing(self) -> Curves:
        """The same of what depends on the clock and the machine (throughput, waiting for data, memory)."""
        return self._table("timing.csv")

    def _table(self, name: str) -> Curves:
        curves: Curves = {}
        try:
            with (self.folder / name).open(newline="", encoding="utf-8") as file:
                for row in csv.DictReader(file):
                    point = _point(row)
                    if point is not None:
                        curves.setdefault(row["metric"], []).append(point)
        except (OSError, csv.Error, UnicodeDecodeError, KeyError):
            return curves
        return curves

    def pictures(self) -> list[RunPicture]:
        """The run's pictures whose files exist inside its folder."""
        base = self.folder / "pictures"
        listed = read_json(base / "pictures.json")
        entries = [entry for entry in listed if isinstance(entry, dict)] if isinstance(listed, list) else []
        pictures = [
            RunPicture(
                str(entry.get("name", "")), str(entry.get("caption", "")), base / Path(str(entry.get("file"))).name
            )
            for entry in entries
        ]
        return [picture for picture in pictures if picture.file.is_file()]


def _point(row: Mapping[str, str | None]) -> tuple[int, float] | None:
    try:
        return int(row["step"] or ""), float(row["value"] or "")
    except ValueError:
        return None


def read_run(folder: Path) -> RunRecord:
    """Read one run folder; never fails on what it finds there."""
    paper, scale, arm = folder.parts[-4:-1]
    info = read_json(folder / "run.json")
    summary = read_json(folder / "summary.json")
    matched = re.fullmatch(r"seed=(\d+)", folder.name)
    status, problem = _status(folder, info, summary, is_named=matched is not None)
    return RunRecord(
        folder=folder,
        paper=paper,
        scale=scale,
        arm=arm,
        seed=int(matched.group(1)) if matched else None,
        status=status,
        problem=problem,
        metrics=_metrics(summary),
        info=info if isinstance(info, dict) else {},
    )


def _status(folder: Path, info: Any, summary: Any, *, is_named: bool) -> tuple[str, str]:
    if any(_MOVED_ASIDE in part for part in folder.parts[-4:]):
        return "moved aside", "replaced by a run with another configuration"
    if not is_named:
        return "damaged", "the folder's name is not seed=<n>"
    if not isinstance(info, dict):
        return "damaged", "run.json is missing or not readable"
    status = info.get("status")
    if status == "finished":
        if isinstance(summary, dict) and isinstance(summary.get("metrics"), dict):
            return "finished", ""
        return "damaged", "summary.json is missing or not readable"
    if status in ("failed", "interrupted", "running"):
        return str(status), _first_line(info.get("error")) or str(status)
    return "damaged", f"run.json has the status {status!r}"


def _first_line(error: Any) -> str:
    lines = str(error).strip().splitlines() if error else []
    return lines[0] if lines else ""


def _metrics(summary: Any) -> dict[str, float]:
    values = summary.get("metrics") if isinstance(summary, dict) else None
    if not isinstance(values, dict):
        return {}
    return {str(name): _number(value) for name, value in values.items()}


def _number(value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        return float("nan")


def find_runs(runs_dir: Path, slug: str, scale: str | None = None) -> list[RunRecord]:
    """All runs of a paper (at one scale label, if given), sorted by scale, arm and seed."""
    scales = [scale] if scale is not None else scale_labels(runs_dir, slug)
    folders = [
        folder
        for label in scales
        for folder in (runs_dir / slug / label).glob("*/seed=*")
        if folder.is_dir() and not folder.name.startswith(".")
    ]
    records = [read_run(folder) for folder in folders]
    return sorted(
        records, key=lambda run: (_scale_order(run.scale), run.arm, run.seed is None, run.seed, run.folder.name)
    )


def scale_labels(runs_dir: Path, slug: str) -> list[str]:
    """The scale labels a paper has runs at: small, public, paper, then variants, and smoke last."""
    folders = {path.parent.parent.name for path in (runs_dir / slug).glob("*/*/seed=*") if path.is_dir()}
    return sorted((name for name in folders if _MOVED_ASIDE not in name), key=_scale_order)


def papers_with_runs(runs_dir: Path) -> list[str]:
    """The slugs below a runs folder that hold at least one run, sorted."""
    if not runs_dir.is_dir():
        return []
    return sorted(path.name for path in runs_dir.iterdir() if path.is_dir() and scale_labels(runs_dir, path.name))


def _scale_order(label: str) -> tuple[int, str]:
    if label in SCALES:
        return SCALES.index(label), label
    return len(SCALES) + (smoked_scale(label) is not None), label
