"""`reprise reproduce` and sweeps, end to end at smoke size."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from joblib.externals.loky import get_reusable_executor

from reprise.cli import main
from reprise.evidence.claims import load_claim

pytestmark = pytest.mark.slow

SMOKE = ("experiment=vit/small", "smoke=true")
ARMS = list(load_claim("vit").at("small").arms)


def reproduce(*more: str) -> int:
    return main(["reproduce", *SMOKE, *more])


def summaries(runs: Path) -> dict[str, dict[str, float]]:
    return {
        str(path.parent.relative_to(runs)): json.loads(path.read_text())["metrics"]
        for path in runs.rglob("summary.json")
    }


@pytest.fixture(autouse=True)
def fresh_workers() -> None:
    """joblib keeps its worker processes, with the environment of an earlier test."""
    get_reusable_executor().shutdown(wait=True)


@pytest.fixture
def runs() -> Path:
    return Path(os.environ["REPRISE_RUNS"])


def test_dry_run_lists_every_job_and_starts_none(capsys: pytest.CaptureFixture[str], runs: Path) -> None:
    assert reproduce("--dry-run") == 0
    assert f"{len(ARMS) * 5} runs" in capsys.readouterr().out
    assert not list(runs.rglob("run.json"))


def test_a_claim_ends_in_a_verdict_and_a_report(capsys: pytest.CaptureFixture[str], runs: Path) -> None:
    assert reproduce("seed=0,1") == 0
    assert len(summaries(runs)) == 2 * len(ARMS)
    verdict = json.loads((runs / "vit" / "smoke" / "verdict.json").read_text())
    assert verdict["primary"]["verdict"] == "inconclusive", "two seeds can never be enough"
    assert verdict["wall_seconds"] > 0
    assert verdict["jobs_at_once"] >= 1
    assert verdict["cpu_seconds"] > 0
    html = (runs / "vit" / "report.html").read_text()
    assert "<html" in html
    assert "of processor time" in html
    assert "http://" not in html.replace("http://www.w3.org", ""), "self-contained"
    times = {path: path.stat().st_mtime_ns for path in runs.rglob("summary.json")}
    assert reproduce("seed=0,1") == 0
    assert f"{2 * len(ARMS)} of {2 * len(ARMS)} runs are finished already" in capsys.readouterr().err
    assert times == {path: path.stat().st_mtime_ns for path in runs.rglob("summary.json")}


def test_an_interrupted_reproduce_finishes_with_the_same_numbers(runs: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "reprise.cli", "reproduce", *SMOKE, "seed=0"]
    other = {**os.environ, "REPRISE_RUNS": str(tmp_path)}
    child = subprocess.Popen(
        command, env=other, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    deadline = time.monotonic() + 240
    while not list(tmp_path.rglob("summary.json")):
        assert time.monotonic() < deadline, "no run finished in time"
        assert child.poll() is None
        time.sleep(0.05)
    os.killpg(child.pid, signal.SIGKILL)
    child.wait()
    assert subprocess.run(command, env=other, capture_output=True).returncode == 0
    assert reproduce("seed=0") == 0
    assert summaries(tmp_path) == summaries(runs)


def test_ctrl_c_saves_the_running_jobs_and_starts_no_other(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "reprise.cli", "reproduce", *SMOKE, "seed=0,1,2", "steps=400", "val_every=400"]
    other = {**os.environ, "REPRISE_RUNS": str(tmp_path), "REPRISE_JOBS": "1"}
    child = subprocess.Popen(command, env=other, stderr=subprocess.PIPE, text=True, start_new_session=True)
    deadline = time.monotonic() + 240
    while not list(tmp_path.rglob("progress.json")):
        assert time.monotonic() < deadline, "no run began in time"
        time.sleep(0.02)
    os.killpg(child.pid, signal.SIGINT)
    _, errors = child.communicate(timeout=240)
    assert child.returncode == 130, errors
    assert "run the same command again to go on" in errors
    assert len(list(tmp_path.rglob("step=*.ckpt"))) == 1
    assert not list(tmp_path.rglob("verdict.json"))


def test_a_changed_configuration_moves_the_old_run_aside(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert main(["train", *SMOKE]) == 0
    assert main(["train", *SMOKE, "variant=null", "optimizer.lr=0.123"]) == 0
    names = sorted(path.parent.name for path in runs.rglob("run.json"))
    assert len(names) == 2
    assert names[0] == "seed=0"
    assert names[1].startswith("seed=0~old-")


def test_changed_options_get_a_folder_of_their_own(runs: Path) -> None:
    assert main(["train", *SMOKE, "optimizer.lr=0.5"]) == 0
    assert [path.name for path in (runs / "vit").iterdir()] == ["smoke~optimizer.lr-0.5"]


def test_several_ranks_work_inside_a_multirun(runs: Path) -> None:
    argv = ["train", "-m", *SMOKE, "seed=0,1", "trainer=ddp_cpu", "hydra/launcher=basic"]
    assert main(argv) == 0
    assert len(summaries(runs)) == 2


def test_submitit_runs_the_same_jobs(runs: Path, tmp_path: Path) -> None:
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    argv = ["reproduce", *SMOKE, "seed=0", "hydra/launcher=submitit_local"]
    assert main([*argv, f"hydra.launcher.submitit_folder={tmp_path}", "hydra.launcher.timeout_min=5"]) == 0
    assert len(summaries(runs)) == len(ARMS)
