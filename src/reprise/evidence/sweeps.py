"""`runs/<paper>/<scale>/sweep.json`: the wall time that the runs of a scale took together."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

from reprise.evidence.files import read_json, write_json


@dataclass(frozen=True)
class SweepTime:
    """Wall time of all sweeps over the runs of a scale, and how many jobs the last of them ran at once.

    Sweeps that were stopped and went on later count; what one took that was killed does not, but its runs keep their
    own time.
    """

    seconds: float | None = None
    jobs_at_once: int | None = None


def read_sweep(runs_dir: Path, slug: str, scale: str) -> SweepTime:
    """What is recorded; nothing where no sweep has ended yet."""
    content = read_json(_path(runs_dir, slug, scale))
    try:
        return SweepTime(**content)
    except TypeError:
        return SweepTime()


def add_sweep(runs_dir: Path, slug: str, scale: str, *, seconds: float, jobs_at_once: int | None) -> None:
    """Count a sweep that has ended."""
    total = round((read_sweep(runs_dir, slug, scale).seconds or 0.0) + seconds, 3)
    write_json(_path(runs_dir, slug, scale), asdict(SweepTime(total, jobs_at_once)))


def _path(runs_dir: Path, slug: str, scale: str) -> Path:
    return runs_dir / slug / scale / "sweep.json"
