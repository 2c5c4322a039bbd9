"""The search itself: batches of trials through a Hydra launcher, asked and told, resumable at any moment."""

from __future__ import annotations

import csv
import json
import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any, Literal

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from reprise import paths
from reprise.errors import ConfigError, RepriseError
from reprise.search.space import Space, no_such_metric
from reprise.search.study import PRUNED_AT, only_search, open_study, propose
from reprise.training.jobs import Job, run_jobs
from reprise.training.runfolder import cannot_be_written, write_atomic, write_json

if TYPE_CHECKING:
    from optuna import Study
    from optuna.trial import FrozenTrial

MakeJob = Callable[[Sequence[str], Sequence[str]], Job]  # of what a user would type, and of what is added to that


@dataclass(frozen=True)
class Settings:
    """How a search runs.

    Attributes:
        metric: the validation metric that chooses.
        direction: `maximize` or `minimize`.
        trials: how many in all.
        parallel: trials of a batch, which run at the same time; the proposals depend on it.
    """

    metric: str
    direction: Literal["maximize", "minimize"] = "maximize"
    trials: int = 20
    parallel: int = 1

    def __post_init__(self) -> None:
        if not self.metric.startswith("val/"):
            raise ConfigError(
                f"a search is decided by validation, not by {self.metric!r}",
                looked_at="--metric",
                next_step="name a validation metric, e.g. --metric val/accuracy",
            )
        if self.trials < 1 or self.parallel < 1:
            raise ConfigError("a search needs one trial or more, and one at a time or more", looked_at="--trials")


@dataclass(frozen=True)
class SearchOutcome:
    """What a search found.

    Attributes:
        folder: where its journal, its table and its runs lie.
        trials: all of them, in order.
        best: the best finished one, or None.
        failures: a line for each run that failed.
        stopped: the signal that ended it early, or None.
    """

    folder: Path
    metric: str
    space: Space
    trials: list[FrozenTrial]
    best: FrozenTrial | None
    failures: list[str]
    stopped: signal.Signals | None


def run_search(settings: Settings, space: Space, make_job: MakeJob, launcher: Any) -> SearchOutcome:
    """Search, or go on with a search that the same command began.

    The run folders lie in the search's own folder, so that they never mix with those of a claim.
    """
    folder = paths.runs_dir() / "searches" / space.name(settings.metric, settings.direction, settings.parallel)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise cannot_be_written(folder, error) from error
    with only_search(folder), paths.environment_variable("REPRISE_RUNS", str(folder.resolve())):
        search = _Search(settings, space, make_job, launcher, folder.resolve() / "journal.log")
        search.go_on()
        outcome = search.outcome(folder)
    _write(outcome)
    return outcome


class _Search:
    """One journal and what it takes to go on with it. Batch k holds the trials from k x parallel up."""

    def __init__(self, settings: Settings, space: Space, make_job: MakeJob, launcher: Any, journal: Path) -> None:
        self.settings, self.space, self.make_job, self.launcher = settings, space, make_job, launcher
        self.journal = journal
        self.study: Study = open_study(journal, settings.direction)
        self.failures: list[str] = []
        self.stopped: signal.Signals | None = None

    def go_on(self) -> None:
        """Run batches until all trials are told, or until the search is stopped."""
        while batch := self._batch():
            if not self._run(batch):
                return
            if batch[0].number == 0 and len(self.failures) == len(batch):
                raise self._nothing_ended(self.failures[0])

    def _nothing_ended(self, failure: str) -> RepriseError:
        """The failure says by itself where it looked and what to do, or this does."""
        return RepriseError(
            f"no run of the first trials ended: {failure}",
            looked_at=None if "\n  looked at: " in failure else self.journal.parent,
            next_step=None if "\n  next step: " in failure else "correct the cause, then run the command again",
        )

    def _trials(self) -> list[FrozenTrial]:
        return self.study.get_trials(deepcopy=False)

    def _batch(self) -> list[FrozenTrial]:
        """The trials that were asked for and not told, after the last batch that was begun is complete."""
        count = len(self._trials())
        running = [trial for trial in self._trials() if not trial.state.is_finished()]
        parallel = self.settings.parallel
        end = -(-count // parallel) * parallel if running or count % parallel else count + parallel
        for _ in range(count, min(end, self.settings.trials)):
            propose(self.study, self.space.distributions)
        return [trial for trial in self._trials() if not trial.state.is_finished()]

    def _run(self, batch: Sequence[FrozenTrial]) -> bool:
        """Each seed in turn for all trials of the batch that are still in the race; then tell the results."""
        racing: dict[int, list[Job]] = {trial.number: [] for trial in batch if PRUNED_AT not in trial.user_attrs}
        for position, seed in enumerate(self.space.seeds):
            jobs = {number: self._job(number, seed, prunable=position == 0) for number in racing}
            outcome = run_jobs(list(jobs.values()), self.launcher)
            self.stopped = outcome.stopped
            if self.stopped:
                return False
            racing = {number: [*racing[number], job] for number, job in jobs.items() if job.finished}
            pruned = self._pruned()
            losers = {job.folder: number for number, job in jobs.items() if number not in racing}
            for job, reason in outcome.failed:
                if self._params(losers[job.folder]) not in pruned:
                    self.failures.append(f"{job.name}: {reason}")
        for trial in batch:
            self._tell(trial.number, racing.get(trial.number, []))
        return True

    def _tell(self, number: int, jobs: Sequence[Job]) -> None:
        from optuna.trial import TrialState

        if jobs:
            self.study.tell(number, fmean(last_value(job.folder, self.settings.metric) for job in jobs))
        else:
            was_pruned = self._params(number) in self._pruned()
            self.study.tell(number, state=TrialState.PRUNED if was_pruned else TrialState.FAIL)

    def _params(self, number: int) -> dict[str, Any]:
        return self._trials()[number].params

    def _pruned(self) -> list[dict[str, Any]]:
        """By their parameters, because two trials with the same ones are one run."""
        return [trial.params for trial in self._trials() if PRUNED_AT in trial.user_attrs]

    def _job(self, number: int, seed: int, *, prunable: bool) -> Job:
        journal = json.dumps(str(self.journal))
        options = f"journal: {journal}, trial: {number}, metric: {self.settings.metric}, steps: ${{steps}}"
        callback = f"+callbacks.search={{_target_: reprise.search.pruning.PruneTrial, {options}}}"
        return self.make_job(self.space.overrides(self._params(number), seed), [callback] if prunable else [])

    def outcome(self, folder: Path) -> SearchOutcome:
        from optuna.trial import TrialState

        trials = self._trials()
        complete = any(trial.state == TrialState.COMPLETE for trial in trials)
        best = self.study.best_trial if complete else None
        return SearchOutcome(folder, self.settings.metric, self.space, trials, best, self.failures, self.stopped)


def last_value(folder: Path, metric: str) -> float:
    """The metric at the end of a finished run.

    Raises:
        ConfigError: the run logged no such metric.
    """
    with (folder / "metrics.csv").open(newline="") as handle:
        rows = list(csv.DictReader(handle))
    values = [float(row["value"]) for row in rows if row["metric"] == metric]
    if not values:
        raise no_such_metric(metric, {row["metric"] for row in rows})
    return values[-1]


def _write(outcome: SearchOutcome) -> None:
    """`trials.csv` with all trials and `search.json` with the best one and how to repeat it."""
    keys = list(outcome.space.distributions)
    lines = [",".join(["trial", "state", "value", "pruned_at", *map(json.dumps, keys)])]
    for trial in outcome.trials:
        cells = [trial.number, trial.state.name, trial.value, trial.user_attrs.get(PRUNED_AT)]
        cells += [trial.params.get(key) for key in keys]
        lines.append(",".join("" if cell is None else str(cell) for cell in cells))
    write_atomic(outcome.folder / "trials.csv", "\n".join(lines) + "\n")
    best = outcome.best
    facts: dict[str, Any] = {"metric": outcome.metric, "seeds": outcome.space.seeds, "fixed": outcome.space.fixed}
    facts |= {"trial": best.number, "value": best.value, "params": best.params} if best else {"trial": None}
    write_json(outcome.folder / "search.json", facts)


def render(outcome: SearchOutcome) -> RenderableType:
    """The trials, and the overrides of the best one."""
    keys = list(outcome.space.distributions)
    table = Table("trial", *keys, outcome.metric, "state", title=f"{len(outcome.trials)} trials")
    for trial in outcome.trials:
        at = trial.user_attrs.get(PRUNED_AT)
        value = "" if trial.value is None or at is not None else f"{trial.value:.4f}"
        state = trial.state.name.lower() + (f" at step {at}" if at is not None else "")
        is_best = outcome.best is not None and trial.number == outcome.best.number
        style = "bold" if is_best else None
        table.add_row(str(trial.number), *(_short(trial.params.get(key)) for key in keys), value, state, style=style)
    if outcome.best is None:
        return table
    chosen = " ".join(f"{key}={value}" for key, value in outcome.best.params.items())
    seeds = ", ".join(map(str, outcome.space.seeds))
    return Group(table, Text(f"best: {chosen}"), Text(f"{outcome.metric} {outcome.best.value:.4f}, seeds {seeds}"))


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
