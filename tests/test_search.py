"""`reprise search`: what it refuses, how it chooses, prunes and goes on after a kill."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from reprise.app import Failure
from reprise.cli import main
from reprise.errors import ConfigError, DivergedError, RepriseError
from reprise.search.loop import SearchOutcome, Settings, run_search
from reprise.search.space import Space, read_space
from reprise.training.jobs import Job
from reprise.training.runfolder import write_json

pytest.importorskip("optuna", reason="the extra `search` is not installed")

FIXED = ("experiment=vit/small", "arm=vit_100")
STEPS = 9


def space(*overrides: str) -> Space:
    return read_space(OverridesParser.create().parse_overrides([*FIXED, *overrides]))


def test_hydras_sweeps_are_read_as_distributions() -> None:
    found = space("a=interval(0,1)", "b=tag(log,interval(1e-4,1e-1))", "c=int(interval(1,9))", "d=x,y", "e=range(1,4)")
    a, b, c, d, e = (found.distributions[key] for key in "abcde")
    assert (a.low, a.high, a.log) == (0.0, 1.0, False)
    assert (b.low, b.high, b.log) == (1e-4, 1e-1, True)
    assert (c.low, c.high, type(c.low)) == (1, 9, int)
    assert d.choices == ("x", "y")
    assert e.choices == ("1", "2", "3")
    assert found.seeds == (100,)
    assert found.fixed == FIXED


@pytest.mark.parametrize(
    ("overrides", "problem"),
    [
        (("a=1,2", "seed=0"), "seed 0 is not for tuning"),
        (("a=1,2", "seed=100,7"), "seed 7 is not for tuning"),
        (("a=3",), "nothing is searched"),
        (("a=1,2", "arm=vit_100,cnn_100"), "a search tunes one arm"),
        (("a=tag(log,interval(0,1))",), "low"),
    ],
)
def test_a_search_that_would_not_be_fair_is_refused(overrides: Sequence[str], problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        space(*overrides)


def test_only_validation_may_choose() -> None:
    with pytest.raises(ConfigError, match="decided by validation, not by 'test/accuracy'"):
        Settings("test/accuracy")


class KilledError(BaseException):
    """Stands for the death of the searching process."""


class FakeLauncher:
    """Runs that need no training: validation peaks at x = 3; the test metric says the opposite."""

    def __init__(self, dies_at: int | None = None, diverges_below: float = -1.0) -> None:
        self.dies_at, self.diverges_below, self.started = dies_at, diverges_below, 0

    def launch(self, overrides: Sequence[Sequence[str]], initial_job_idx: int) -> list[SimpleNamespace]:
        return [SimpleNamespace(return_value=self._run(item)) for item in overrides]

    def _run(self, overrides: Sequence[str]) -> dict[str, float] | Failure:
        if self.started == self.dies_at:
            raise KilledError
        self.started += 1
        params = read(overrides)
        if params["x"] < self.diverges_below:
            return Failure(DivergedError("the loss became NaN"), "")
        try:
            return self._train(overrides, params)
        except RepriseError as error:
            return Failure(error, "")

    def _train(self, overrides: Sequence[str], params: Mapping[str, float]) -> dict[str, float]:
        final = 1 - abs(params["x"] - 3) / 10 + params["seed"] * 1e-5
        rows = []
        for step in (3, 6, 9):
            value = final * step / STEPS
            rows.append((step, "val/score", value))
            report(overrides, step, value)
        folder = folder_of(overrides)
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / "metrics.csv").open("w") as handle:
            csv.writer(handle).writerows([("step", "metric", "value"), *rows, (STEPS, "test/score", -final)])
        write_json(folder / "summary.json", {"metrics": {"test/score": -final}})
        write_json(folder / "run.json", {"status": "finished", "config_hash": "hash"})
        return {"test/score": -final}


def report(overrides: Sequence[str], step: int, value: float) -> None:
    """What Lightning does with the callback that the search added, after a validation."""
    from reprise.search.pruning import PruneTrial

    for override in OverridesParser.create().parse_overrides([item for item in overrides if item[0] == "+"]):
        options: Any = override.value()
        assert options.pop("_target_") == "reprise.search.pruning.PruneTrial"
        callback = PruneTrial(**{**options, "journal": str(getattr(options["journal"], "text", options["journal"]))})
        callback.steps = STEPS
        progress = SimpleNamespace(current=SimpleNamespace(completed=step))
        module: Any = None
        trainer: Any = SimpleNamespace(
            fit_loop=SimpleNamespace(epoch_loop=SimpleNamespace(batch_progress=progress)),
            callback_metrics={"val/score": value},
            strategy=SimpleNamespace(broadcast=lambda answer: answer),
            is_global_zero=True,
        )
        callback.on_validation_end(trainer, module)


def read(overrides: Sequence[str]) -> dict[str, float]:
    return {key: float(value) for key, _, value in (item.partition("=") for item in overrides) if key in ("x", "seed")}


def folder_of(overrides: Sequence[str]) -> Path:
    values = read(overrides)
    return Path(os.environ["REPRISE_RUNS"]) / f"x={values['x']}" / f"seed={values['seed']:.0f}"


def make_job(overrides: Sequence[str], added: Sequence[str]) -> Job:
    complete = (*overrides, *added)
    return Job(complete, folder_of(overrides), "hash", "vit", "small", "vit_100", int(read(overrides)["seed"]), STEPS)


def search(launcher: FakeLauncher, trials: int = 16) -> SearchOutcome:
    settings = Settings("val/score", trials=trials, parallel=2)
    return run_search(settings, space("x=interval(0,10)", "seed=100,101"), make_job, launcher)


def facts(outcome: SearchOutcome) -> list[tuple[object, ...]]:
    return [(item.number, item.state.name, item.params["x"], item.value, item.user_attrs) for item in outcome.trials]


def test_the_best_by_validation_is_chosen_and_the_hopeless_are_pruned(monkeypatch: pytest.MonkeyPatch) -> None:
    launcher = FakeLauncher()
    outcome = search(launcher)
    complete = {item.params["x"]: item.value for item in outcome.trials if item.state.name == "COMPLETE"}
    pruned = [item for item in outcome.trials if item.state.name == "PRUNED"]
    assert len(complete) + len(pruned) == 16
    assert pruned
    assert outcome.best is not None
    assert abs(outcome.best.params["x"] - 3) == min(abs(x - 3) for x in complete)
    assert outcome.best.value == pytest.approx(1 - abs(outcome.best.params["x"] - 3) / 10 + 100.5e-5)
    assert all(item.user_attrs["pruned_at"] == 6 for item in pruned), "not in the first third, not at the end"
    assert launcher.started == 2 * len(complete) + len(pruned), "a pruned trial has no second seed"
    written = json.loads((outcome.folder / "search.json").read_text())
    assert (written["trial"], written["seeds"]) == (outcome.best.number, [100, 101])
    with (outcome.folder / "trials.csv").open() as handle:
        assert [row["state"] for row in csv.DictReader(handle)] == [item.state.name for item in outcome.trials]


def test_more_trials_go_on_where_the_search_ended() -> None:
    first = search(FakeLauncher(), trials=6)
    launcher = FakeLauncher()
    assert facts(search(launcher, trials=6)) == facts(first)
    assert launcher.started == 0
    assert facts(search(FakeLauncher(), trials=10))[:6] == facts(first)


@pytest.mark.parametrize("dies_at", [0, 1, 3, 14])
def test_a_killed_search_ends_as_if_nothing_had_happened(
    dies_at: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with pytest.raises(KilledError):
        search(FakeLauncher(dies_at))
    resumed = facts(search(FakeLauncher()))
    monkeypatch.setenv("REPRISE_RUNS", str(tmp_path))
    assert resumed == facts(search(FakeLauncher()))


def test_a_failed_run_is_a_failed_trial_and_the_search_goes_on() -> None:
    outcome = search(FakeLauncher(diverges_below=4.0))
    failed = [item for item in outcome.trials if item.state.name == "FAIL"]
    assert failed
    assert all(item.params["x"] < 4 for item in failed)
    assert len(outcome.failures) == len(failed)
    assert "the loss became NaN" in outcome.failures[0]
    assert outcome.best is not None
    assert outcome.best.params["x"] >= 4


def test_a_search_whose_first_trials_all_fail_stops() -> None:
    with pytest.raises(RepriseError, match=r"no run of the first trials ended: .*NaN"):
        search(FakeLauncher(diverges_below=11.0))


def test_a_search_runs_once_at_a_time() -> None:
    class Nested(FakeLauncher):
        def launch(self, overrides: Sequence[Sequence[str]], initial_job_idx: int) -> list[SimpleNamespace]:
            os.environ["REPRISE_RUNS"] = outer
            search(FakeLauncher())
            raise AssertionError("the second search was let in")

    outer = os.environ["REPRISE_RUNS"]
    with pytest.raises(RepriseError, match="running already"):
        search(Nested())


@pytest.mark.slow
def test_search_trains_through_the_launcher(capsys: pytest.CaptureFixture[str]) -> None:
    typed = [*FIXED, "smoke=true", "optimizer.lr=tag(log,interval(1e-4,1e-1))", "hydra/launcher=basic"]
    words = ["search", *typed, "--metric", "val/accuracy", "--parallel", "1"]
    assert main([*words, "--trials", "1"]) == 0
    folder = next((Path(os.environ["REPRISE_RUNS"]) / "searches").iterdir())
    times = {path: path.stat().st_mtime_ns for path in folder.rglob("summary.json")}
    assert main(["sweep", *typed, "search={metric:val/accuracy,trials:2,parallel:1}"]) == 0, "the same search goes on"
    shown = capsys.readouterr().out
    assert "best: optimizer.lr=" in shown
    assert "seeds 100" in shown
    assert all(path.stat().st_mtime_ns == before for path, before in times.items()), "finished runs are kept"
    assert len(list(folder.rglob("summary.json"))) == 2
    from reprise.search.study import open_study

    assert [list(trial.intermediate_values) for trial in open_study(folder / "journal.log").trials] == [[2, 4], [2, 4]]
    assert main([*words, "--metric", "val/acuracy", "--trials", "1"]) == 1
    message = capsys.readouterr().err
    assert "choose one of: val/accuracy" in message
    assert message.count("looked at: ") == 1
