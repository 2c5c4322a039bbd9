"""Many runs: which remain to be done, running them through a Hydra launcher, and one live view of all."""

from __future__ import annotations

import signal
import threading
import time
import traceback
from collections.abc import Iterator, Sequence
from concurrent.futures import BrokenExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hydra.core.utils import JobReturn, JobStatus
from omegaconf import DictConfig
from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from reprise import config as configuration
from reprise.app import Failure, portable
from reprise.errors import ConfigError, DataError, InterruptedRunError, RepriseError, RunInUseError
from reprise.training.lost_jobs import lost_jobs_handed_back
from reprise.training.runfolder import RunFolder, now, write_json
from reprise.training.stopping import GraceIsOver, stop_of_the_sweep, stopping_gently

STARTS_TOGETHER = 2  # of jobs whose worker processes die; then each by itself


@dataclass(frozen=True)
class Job:
    """One run of a sweep; `after` is the earlier stage it continues from."""

    overrides: tuple[str, ...]
    folder: Path
    config_hash: str
    slug: str
    scale: str
    arm: str
    seed: int
    steps: int
    after: Job | None = None

    @classmethod
    def of(cls, overrides: Sequence[str], hydra_config: DictConfig) -> Job:
        """The job of complete overrides and of what Hydra composed from them."""
        return cls.of_resolved(overrides, configuration.resolve(hydra_config))

    @classmethod
    def of_resolved(cls, overrides: Sequence[str], cfg: DictConfig) -> Job:
        """The same of what `config.resolve` made of it."""
        earlier = configuration.earlier_stage(cfg)
        return cls(
            overrides=tuple(overrides),
            folder=configuration.run_dir(cfg),
            config_hash=configuration.config_hash(cfg),
            slug=cfg.slug,
            scale=configuration.scale_label(cfg),
            arm=str(cfg.arm),
            seed=int(cfg.seed),
            steps=int(cfg.steps),
            after=None if earlier is None else cls.of_resolved(cfg.start_from.overrides, earlier),
        )

    @property
    def name(self) -> str:
        return f"{self.slug}/{self.scale} {self.arm} seed={self.seed}"

    @property
    def finished(self) -> bool:
        return RunFolder(self.folder).is_finished(self.config_hash)


@dataclass
class SweepOutcome:
    """What became of the jobs of a sweep.

    Attributes:
        jobs: all, with the earlier stages that they need.
        asked: those that the sweep is about.
        stopped: the signal that ended it early.
        seconds: wall time.
        jobs_at_once: how many its launcher ran together; None where the launcher does not say.
    """

    jobs: list[Job]
    asked: list[Job]
    skipped: list[Job] = field(default_factory=list)
    failed: list[tuple[Job, str]] = field(default_factory=list)
    dry_run: bool = False
    stopped: signal.Signals | None = None
    seconds: float = 0.0
    jobs_at_once: int | None = None


def run_jobs(jobs: list[Job], launcher: Any, *, dry_run: bool = False, jobs_at_once: int | None = None) -> SweepOutcome:
    """Run what is not finished yet, earlier stages first; one failed job stops only those that continue from it."""
    _refuse_collisions(jobs)
    asked, waves = jobs, in_waves(jobs)
    jobs = [job for wave in waves for job in wave]
    skipped = [job for job in jobs if job.finished]
    todo = [job for job in jobs if not job.finished]
    outcome = SweepOutcome(jobs, asked, skipped, dry_run=dry_run, jobs_at_once=jobs_at_once)
    console = Console(stderr=True)
    if dry_run:
        _list_jobs(jobs, Console())
        return outcome
    if skipped:
        console.print(f"{len(skipped)} of {len(jobs)} runs are finished already; {len(todo)} to do")
    if not todo:
        return outcome
    began = time.monotonic()
    with live_view(todo, len(skipped), console), stopping_gently(console) as stop:
        for wave in waves:
            _run_wave([job for job in wave if not job.finished], launcher, outcome)
        outcome.stopped = stop.signal
    outcome.seconds = time.monotonic() - began
    return outcome


def in_waves(jobs: Sequence[Job]) -> list[list[Job]]:
    """The jobs and the earlier stages they need, each folder once, by how many stages come before them."""
    depth: dict[Path, tuple[int, Job]] = {}
    for job in jobs:
        chain = [job]
        while chain[0].after is not None:
            chain.insert(0, chain[0].after)
        for level, stage in enumerate(chain):
            depth.setdefault(stage.folder, (level, stage))
    levels = max((level for level, _ in depth.values()), default=0)
    return [[job for own, job in depth.values() if own == level] for level in range(levels + 1)]


def _run_wave(jobs: Sequence[Job], launcher: Any, outcome: SweepOutcome) -> None:
    """Run jobs whose earlier stages are over; those whose earlier stage failed are not started."""
    ready = []
    for job in jobs:
        if job.after is not None and not job.after.finished:
            outcome.failed.append((job, f"not started, because it continues from {job.after.name}, which did not end"))
        else:
            ready.append(job)
    for _ in range(STARTS_TOGETHER):
        if _launch(ready, launcher, outcome):
            return
    for job in ready:  # one of them kills its process each time, which must not cost the others
        if not _launch([job], launcher, outcome):
            outcome.failed.append((job, "its process died, every time it was started (killed, or out of memory)"))


def _launch(jobs: Sequence[Job], launcher: Any, outcome: SweepOutcome) -> bool:
    """Run what of the jobs is not finished; False where a process of joblib's pool died, and with it all the others."""
    todo = [job for job in jobs if not job.finished]
    if not todo or stop_of_the_sweep() is not None:
        return True
    try:
        with lost_jobs_handed_back(launcher):
            returns = launcher.launch([list(job.overrides) for job in todo], initial_job_idx=0)
    except BrokenExecutor:
        return False
    except GraceIsOver:
        return True
    except RepriseError:
        raise
    except Exception as error:  # whatever a launcher raises, it has not said what became of the jobs: the disk does
        failure = Failure(portable(error), traceback.format_exc())
        returns = [JobReturn(status=JobStatus.COMPLETED, _return_value={} if job.finished else failure) for job in todo]
    _note_failures(todo, returns, outcome)
    return True


def _note_failures(jobs: Sequence[Job], returns: Sequence[Any], outcome: SweepOutcome) -> None:
    for job, result in zip(jobs, returns, strict=True):
        value = _handed_back(result)
        if isinstance(value, Failure):
            outcome.failed.append((job, value.message))
            _leave_trace(job, value)


def _handed_back(result: JobReturn) -> Any:
    try:
        return result.return_value
    except Exception as error:  # Hydra's own, from before or after the job: it is kept until someone asks
        return Failure(portable(error), traceback.format_exc())


def _leave_trace(job: Job, failure: Failure) -> None:
    """A failed job's folder says why, also when the job died before it had one.

    Nothing is left of a mistake in the command, or of missing data, where no run of this configuration had begun.
    """
    if isinstance(failure.error, InterruptedRunError | RunInUseError):
        return  # the folder is as the last checkpoint left it, or the job never began, or it is another process's
    folder = RunFolder(job.folder)
    known = folder.read("run.json")
    is_mistake = isinstance(failure.error, ConfigError | DataError)
    if not folder.holds(job.config_hash) and (known is not None or is_mistake):
        return
    job.folder.mkdir(parents=True, exist_ok=True)
    (job.folder / "failure.txt").write_text(failure.trace)
    if known is not None and known.get("status") == "running":  # it died without a word
        folder.correct(status="failed", finished=now(), error=failure.message, exit_code=1)
    elif known is None:
        facts = {"paper": job.slug, "scale": job.scale, "arm": job.arm, "seed": job.seed}
        facts |= {"config_hash": job.config_hash, "status": "failed", "error": failure.message}
        write_json(job.folder / "run.json", facts)


def _refuse_collisions(jobs: Sequence[Job]) -> None:
    seen: dict[Path, Job] = {}
    for job in jobs:
        other = seen.setdefault(job.folder, job)
        if other is not job and other.config_hash != job.config_hash:
            raise ConfigError(f"two different runs of the sweep share a folder: {job.name}", looked_at=job.folder)


def _list_jobs(jobs: Sequence[Job], console: Console) -> None:
    table = Table("run", "state", "steps", "folder", title=f"{len(jobs)} runs")
    for job in jobs:
        state = "finished" if job.finished else ("started" if (job.folder / "run.json").exists() else "to do")
        table.add_row(job.name, state, str(job.steps), str(job.folder))
    console.print(table)


@contextmanager
def live_view(jobs: Sequence[Job], skipped: int, console: Console) -> Iterator[None]:
    """A table of all jobs with the time left, fed by the progress files; in a log file, a line now and then."""
    stop = threading.Event()
    view = _View(jobs, skipped)
    target = _animate if console.is_terminal else _log_lines
    thread = threading.Thread(target=target, args=(view, stop, console), name="reprise-live-view", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


class _View:
    """Reads progress files and turns them into a table and an estimate."""

    def __init__(self, jobs: Sequence[Job], skipped: int) -> None:
        self.jobs = jobs
        self.skipped = skipped
        self.began = time.monotonic()
        self.stale = {job.folder: RunFolder(job.folder).read("progress.json") for job in jobs}
        self.first = sum(self._fractions())

    def _fractions(self) -> list[float]:
        return [self._fraction(job) for job in self.jobs]

    def _fraction(self, job: Job) -> float:
        if job.finished:
            return 1.0
        progress = self._progress(job)
        return min(progress["step"] / max(progress["steps"], 1), 0.99) if progress else 0.0

    def _progress(self, job: Job) -> dict[str, Any] | None:
        """What the job says of this attempt, and not what an earlier one left."""
        progress = RunFolder(job.folder).read("progress.json")
        return None if progress == self.stale[job.folder] else progress

    def seconds_left(self, fractions: Sequence[float]) -> float | None:
        done = sum(fractions) - self.first
        elapsed = time.monotonic() - self.began
        return elapsed * (len(self.jobs) - sum(fractions)) / done if done > 0.01 else None

    def line(self) -> str:
        fractions = self._fractions()
        finished = sum(fraction == 1.0 for fraction in fractions) + self.skipped
        left = self.seconds_left(fractions)
        share = sum(fractions) / len(fractions)
        return f"{finished}/{len(self.jobs) + self.skipped} runs finished, {share:.0%} of the work, {_clock(left)} left"

    def __rich__(self) -> Group:
        table = Table.grid(padding=(0, 2))
        fractions = self._fractions()
        for job, fraction in zip(self.jobs, fractions, strict=True):
            if 0 < fraction < 1:
                progress = self._progress(job) or {}
                note = f"{progress.get('phase', '')} {progress.get('step', 0)}/{progress.get('steps', job.steps)}"
                table.add_row(job.name, ProgressBar(total=1, completed=fraction, width=30), note)
        total = Table.grid(padding=(0, 2))
        share = sum(fractions) / len(fractions)
        total.add_row(Text(self.line(), style="bold"), ProgressBar(total=1, completed=share, width=30))
        return Group(table, total)


def _animate(view: _View, stop: threading.Event, console: Console) -> None:
    with Live(view, console=console, refresh_per_second=2, transient=True):
        stop.wait()


def _log_lines(view: _View, stop: threading.Event, console: Console) -> None:
    while not stop.wait(30):
        console.print(view.line())


def _clock(seconds: float | None) -> str:
    if seconds is None:
        return "unknown time"
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes}:{rest:02d}"
