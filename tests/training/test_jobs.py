"""Sweeps whose launcher, jobs or own process come to a bad end; no training is needed for that."""

from __future__ import annotations

import os
import pickle
import signal
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from hydra.core.utils import JobReturn, JobStatus

from reprise.app import Failure, portable
from reprise.config import compose
from reprise.errors import ConfigError, InterruptedRunError, PreemptedRunError, RepriseError, RunInUseError
from reprise.training import stopping
from reprise.training.jobs import Job, SweepOutcome, run_jobs
from reprise.training.launch import _progress
from reprise.training.runfolder import RunFolder, write_json
from reprise.training.stopping import begin_as_job, stop_of_the_sweep

Run = Callable[[Path], Any]


class FakeLauncher:
    """Calls a function in place of each job, one after the other."""

    def __init__(self, *runs: Run) -> None:
        self.runs = runs

    def launch(self, overrides: Sequence[Sequence[str]], initial_job_idx: int) -> list[JobReturn]:
        values = [run(Path(item[0])) for run, item in zip(self.runs, overrides, strict=True)]
        return [JobReturn(status=JobStatus.COMPLETED, _return_value=value) for value in values]


def finish(folder: Path) -> dict[str, float]:
    folder.mkdir(parents=True)
    write_json(folder / "summary.json", {"metrics": {}})
    write_json(folder / "run.json", {"status": "finished", "config_hash": "hash"})
    return {}


def sweep(tmp_path: Path, *runs: Run) -> SweepOutcome:
    jobs = [
        Job((str(tmp_path / f"seed={n}"),), tmp_path / f"seed={n}", "hash", "demo", "small", "a", n, 1)
        for n in range(len(runs))
    ]
    return run_jobs(jobs, FakeLauncher(*runs), jobs_at_once=1)


def status(folder: Path) -> Any:
    return (RunFolder(folder).read("run.json") or {}).get("status")


def test_a_launcher_that_raises_costs_only_what_is_not_finished(tmp_path: Path) -> None:
    def lose(folder: Path) -> None:
        raise OSError("the cluster is gone")

    outcome = sweep(tmp_path, finish, lose)
    assert [(job.seed, reason) for job, reason in outcome.failed] == [(1, "OSError: the cluster is gone")]
    assert status(tmp_path / "seed=0") == "finished"
    assert status(tmp_path / "seed=1") == "failed"


def test_a_job_that_died_without_a_word_is_not_running_any_more(tmp_path: Path) -> None:
    def die(folder: Path) -> Failure:
        folder.mkdir(parents=True)
        write_json(folder / "run.json", {"status": "running", "config_hash": "hash", "seconds": 1.0})
        RunFolder(folder).progress(1, 2, "train", seconds=5, cpu_seconds=4)
        return Failure(RepriseError("its node died"), "")

    sweep(tmp_path, die)
    run = RunFolder(tmp_path / "seed=0").read("run.json")
    assert run is not None
    assert (run["status"], run["seconds"], run["error"]) == ("failed", 6.0, "its node died")


def test_a_mistake_leaves_nothing_and_touches_no_other_run(tmp_path: Path) -> None:
    def refuse(folder: Path) -> Failure:
        return Failure(ConfigError("data.batch_size must be 1 or more"), "trace")

    def lose(folder: Path) -> Failure:
        folder.mkdir(parents=True)
        write_json(folder / "run.json", {"status": "finished", "config_hash": "of another configuration"})
        return Failure(RepriseError("its node died"), "trace")

    sweep(tmp_path, refuse, lose)
    assert not (tmp_path / "seed=0").exists()
    assert not (tmp_path / "seed=1" / "failure.txt").exists()


def test_the_run_of_another_process_is_left_alone(tmp_path: Path) -> None:
    def meet(folder: Path) -> Failure:
        folder.mkdir(parents=True)
        write_json(folder / "run.json", {"status": "running"})
        return Failure(RunInUseError("process 1 is running this run already"), "")

    assert len(sweep(tmp_path, meet).failed) == 1
    assert [path.name for path in (tmp_path / "seed=0").iterdir()] == ["run.json"]
    assert status(tmp_path / "seed=0") == "running"


@pytest.mark.parametrize(
    ("number", "kind"), [(signal.SIGINT, InterruptedRunError), (signal.SIGTERM, PreemptedRunError)]
)
def test_a_signal_to_the_sweep_reaches_its_jobs(tmp_path: Path, number: signal.Signals, kind: type[Exception]) -> None:
    seen: list[Any] = []

    def stop(folder: Path) -> dict[str, float]:
        os.kill(os.getpid(), number)
        seen.append((stop_of_the_sweep(), Path(os.environ["REPRISE_STOP_FILE"])))
        return {}

    def not_any_more(folder: Path) -> dict[str, float]:
        with pytest.raises(kind, match="not started"):
            begin_as_job()
        return {}

    outcome = sweep(tmp_path, stop, not_any_more)
    assert outcome.stopped == number
    assert seen[0][0] == number
    assert Path(os.environ["REPRISE_RUNS"]) in seen[0][1].parents, "where workers elsewhere see it"
    assert not seen[0][1].exists()
    assert stop_of_the_sweep() is None
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_pre_empted_sweep_does_not_wait_for_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stopping, "GRACE_SECONDS", 0.2)
    files: list[Path] = []

    def hang(folder: Path) -> None:
        files.append(Path(os.environ["REPRISE_STOP_FILE"]))
        os.kill(os.getpid(), signal.SIGUSR1)
        time.sleep(30)

    began = time.monotonic()
    assert sweep(tmp_path, hang).stopped == signal.SIGUSR1
    assert time.monotonic() - began < 10
    assert files[0].read_text() == "SIGUSR1", "a job that its cluster starts later finds it"


def test_a_job_does_not_begin_for_a_sweep_that_has_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(stopping.SWEEP_VARIABLE, f"{stopping.place()} 99999999")
    with pytest.raises(InterruptedRunError, match="its sweep has ended"):
        begin_as_job()
    monkeypatch.setenv(stopping.SWEEP_VARIABLE, "elsewhere/pid:[1] 99999999")
    begin_as_job()


def test_a_run_of_several_ranks_is_shown_while_it_lasts() -> None:
    with _progress(compose(["experiment=vit/small", "smoke=true", "trainer=ddp_cpu"]), show=True):
        assert any(thread.name == "reprise-live-view" for thread in threading.enumerate())


class UnpicklableError(RepriseError):
    def __init__(self, first: str, second: str) -> None:
        super().__init__(f"{first} {second}")


class LoseWhatTheyHoldError(Exception):
    def __init__(self, value: object, more: object) -> None:
        super().__init__("cannot be made again")
        self.value = lambda: (value, more)


@pytest.mark.parametrize("error", [LoseWhatTheyHoldError(1, 2), UnpicklableError("a", "b"), ValueError("plain")])
def test_what_a_job_hands_back_survives_the_way(error: Exception) -> None:
    sent = portable(error)
    back = pickle.loads(pickle.dumps(Failure(sent, "trace")))
    assert type(back.error) is RepriseError
    assert str(error) in back.message


def test_a_users_error_stays_what_it_is() -> None:
    error = PreemptedRunError("stopped", looked_at="x", next_step="y")
    assert portable(error) is error
