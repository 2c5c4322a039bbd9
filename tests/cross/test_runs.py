"""Smoke, determinism and exact resume of every paper; each run is a process of its own, as for a user."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.cross.support import (
    PAPERS,
    STAGES,
    copy_earlier_stages,
    differences,
    final_state,
    only_run,
    run_child,
    smoke_config,
    write_config,
)

pytestmark = pytest.mark.slow

KILL_AFTER_STEP = """
from reprise.training.interrupt import StopBetweenSteps
from reprise.training.checkpoint import current_step
def kill(self, trainer, module, outputs, batch, batch_idx):
    if current_step(trainer) + 1 == {step}:
        os.kill(os.getpid(), signal.SIGKILL)
StopBetweenSteps.on_train_batch_end = kill
"""

KILL_DURING_WRITE = """
import torch
save, calls = torch.save, []
def half(content, handle):
    calls.append(1)
    if len(calls) == {call}:
        handle.write(b"half a checkpoint"); handle.flush()
        os.kill(os.getpid(), signal.SIGKILL)
    save(content, handle)
torch.save = half
"""

KILL_DURING_TEST = """
from reprise.training.recording import Reseed
def kill(self, trainer, module): os.kill(os.getpid(), signal.SIGKILL)
Reseed.on_test_start = kill
"""


@pytest.fixture(scope="module", params=STAGES, ids="-".join)
def reference(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(configuration file, run folders) of an uninterrupted smoke run."""
    slug, arm = request.param
    folder = tmp_path_factory.mktemp(f"{slug}-{arm}")
    config = write_config(smoke_config(slug, f"arm={arm}", "callbacks.checkpoint.every_steps=1"), folder)
    done = run_child(config, folder / "reference")
    assert done.returncode == 0, done.stderr
    return config, folder / "reference"


def metrics_text(runs: Path) -> str:
    return (only_run(runs) / "metrics.csv").read_text()


def test_smoke_leaves_a_complete_run_folder(reference: tuple[Path, Path]) -> None:
    run = only_run(reference[1])
    summary = json.loads((run / "summary.json").read_text())
    assert json.loads((run / "run.json").read_text())["status"] == "finished"
    assert summary["metrics"]
    assert all(name.startswith("test/") for name in summary["metrics"])
    names = {line.split(",")[1] for line in (run / "metrics.csv").read_text().splitlines()[1:]}
    assert "train/loss" in names
    assert any(name.startswith("val/") for name in names)
    pictures = json.loads((run / "pictures" / "pictures.json").read_text())
    assert pictures
    assert all((run / "pictures" / picture["file"]).stat().st_size > 0 for picture in pictures)


def test_same_seed_gives_identical_bits(reference: tuple[Path, Path], tmp_path: Path) -> None:
    config, runs = reference
    copy_earlier_stages(runs, tmp_path)
    assert run_child(config, tmp_path).returncode == 0
    assert metrics_text(tmp_path) == metrics_text(runs)
    assert differences(final_state(tmp_path), final_state(runs)) == []


FAULTS = {
    "killed after step 1": KILL_AFTER_STEP.format(step=1),
    "killed after step 3": KILL_AFTER_STEP.format(step=3),
    "killed during a checkpoint's write": KILL_DURING_WRITE.format(call=3),
    "killed before the test": KILL_DURING_TEST,
}


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS.keys())
def test_a_killed_run_ends_as_if_nothing_had_happened(reference: tuple[Path, Path], tmp_path: Path, fault: str) -> None:
    config, runs = reference
    copy_earlier_stages(runs, tmp_path)
    killed = run_child(config, tmp_path, fault=fault)
    assert killed.returncode == -9, killed.stderr
    again = run_child(config, tmp_path)
    assert again.returncode == 0, again.stderr
    assert metrics_text(tmp_path) == metrics_text(runs)
    assert differences(final_state(tmp_path), final_state(runs)) == []


def test_every_paper_was_collected() -> None:
    assert {slug for slug, _ in STAGES} == set(PAPERS)
    assert len(PAPERS) >= 4
