"""Smoke, determinism and exact resume of every paper; each run is a process of its own, which a fault may kill.

Every paper bears the common faults in every test run; the rare ones are spread over the papers, and `make test-dist`
lets every paper bear all of them.
"""

from __future__ import annotations

import json
import signal
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from reprise.evidence import children
from reprise.evidence.claims import load_claim
from reprise.evidence.states import run_differences
from tests.cross import faults
from tests.cross.support import PAPERS, STAGES, Reference, References, in_every_run, spread

pytestmark = [pytest.mark.slow, pytest.mark.dist]
FIRST_ARMS = [(slug, next(iter(load_claim(slug).arms))) for slug in PAPERS]


def spread_over(cases: Mapping[str, object], *, start: int) -> list[object]:
    """(slug, arm, case) for all papers and cases; case i is in every test run for the paper `spread(start + i)`."""
    return [
        in_every_run(slug == spread(start + i), slug, arm, name)
        for slug, arm in FIRST_ARMS
        for i, name in enumerate(cases)
    ]


@pytest.fixture
def reference(slug: str, arm: str, references: References) -> Reference:
    """An uninterrupted smoke run with a checkpoint at every step."""
    return references(slug, arm)


def continue_and_compare(reference: Reference, runs: Path) -> None:
    """The next start ends the run as if nothing had happened."""
    again = children.run(reference.config, runs)
    assert again.code == 0, again.messages
    run = runs / reference.run.relative_to(reference.runs)
    assert run_differences(run, reference.run) == []


@pytest.mark.parametrize(("slug", "arm"), STAGES)
def test_smoke_leaves_a_complete_run_folder(reference: Reference) -> None:
    run = reference.run
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


@pytest.mark.proves("resume", "same seed, same bits")
@pytest.mark.parametrize(("slug", "arm"), STAGES)
def test_same_seed_gives_identical_bits(reference: Reference, tmp_path: Path) -> None:
    reference.give_earlier_stages(tmp_path)
    continue_and_compare(reference, tmp_path)


COMMON = {
    "killed after step 3": faults.SignalAfterStep(3),
    "killed during a checkpoint's write": faults.KillDuringWrite(3),
}


@pytest.mark.proves("resume")
@pytest.mark.parametrize("fault", COMMON)
@pytest.mark.parametrize(("slug", "arm"), STAGES)
def test_a_killed_run_ends_as_if_nothing_had_happened(reference: Reference, tmp_path: Path, fault: str) -> None:
    reference.give_earlier_stages(tmp_path)
    killed = children.run(reference.config, tmp_path, before=COMMON[fault])
    assert killed.code == -signal.SIGKILL, killed.messages
    continue_and_compare(reference, tmp_path)


@pytest.mark.proves("resume", "killed again and again, at file operations")
@pytest.mark.parametrize(("slug", "arm"), [in_every_run(slug == spread(0), slug, arm) for slug, arm in FIRST_ARMS])
def test_kills_at_many_file_operations(reference: Reference, tmp_path: Path) -> None:
    run = reference.give_earlier_stages(tmp_path)
    kills = 0
    for count in range(1, 400, 7):
        ended = children.run(reference.config, tmp_path, before=faults.KillAtFileOperation(count, run))
        if ended.code == 0:
            break
        assert ended.code == -signal.SIGKILL, ended.messages
        kills += 1
    assert 4 <= kills < 50
    continue_and_compare(reference, tmp_path)


DAMAGES: dict[str, Callable[[Path], None]] = {
    f"newest checkpoint: {damage.__name__}": damage for damage in faults.DAMAGES
}


@pytest.mark.proves("resume")
@pytest.mark.parametrize(("slug", "arm", "damage"), spread_over(DAMAGES, start=1))
def test_a_damaged_checkpoint_is_passed_over(reference: Reference, tmp_path: Path, damage: str) -> None:
    run = reference.give_earlier_stages(tmp_path)
    children.run(reference.config, tmp_path, before=faults.SignalAfterStep(4))
    files = sorted((run / "checkpoints").glob("step=*.ckpt"))
    assert [file.name for file in files] == ["step=000000002.ckpt", "step=000000003.ckpt"]
    DAMAGES[damage](files[-1])
    continue_and_compare(reference, tmp_path)
    assert len(list((run / "checkpoints").iterdir())) == 2


STOPS = {"SIGTERM": signal.SIGTERM, "SIGUSR1": signal.SIGUSR1}


@pytest.mark.proves("resume")
@pytest.mark.parametrize(("slug", "arm", "stop"), spread_over(STOPS, start=5))
def test_preemption_saves_and_asks_for_another_start(reference: Reference, tmp_path: Path, stop: str) -> None:
    run = reference.give_earlier_stages(tmp_path)
    ended = children.run(reference.config, tmp_path, before=faults.SignalAfterStep(2, STOPS[stop]))
    assert ended.code == 75, ended.messages
    assert f"stopped by {stop} at step 2; everything is saved" in ended.messages
    told = json.loads((run / "run.json").read_text())
    assert (told["status"], told["exit_code"]) == ("interrupted", 75)
    continue_and_compare(reference, tmp_path)


@pytest.mark.proves("resume", "stopped in the test")
@pytest.mark.parametrize("stop", STOPS)
@pytest.mark.parametrize(("slug", "arm"), [in_every_run(slug == spread(4), slug, arm) for slug, arm in FIRST_ARMS])
def test_preemption_in_the_test(reference: Reference, tmp_path: Path, stop: str) -> None:
    run = reference.give_earlier_stages(tmp_path)
    ended = children.run(reference.config, tmp_path, before=faults.SignalInTest(STOPS[stop]))
    if ended.code == 0:  # its test has one batch
        return
    assert ended.code == 75, ended.messages
    assert f"stopped by {stop} in the test" in ended.messages
    assert json.loads((run / "run.json").read_text())["status"] == "interrupted"
    continue_and_compare(reference, tmp_path)


def complains_once(ended: children.Ended) -> bool:
    """One clear message and no traceback."""
    return ended.code == 1 and "Traceback" not in ended.messages and ended.messages.count("next step: free ") == 1


@pytest.mark.proves("resume", "no room for a file")
@pytest.mark.parametrize(("slug", "arm"), [in_every_run(slug == spread(7), slug, arm) for slug, arm in FIRST_ARMS])
def test_no_room_for_a_checkpoint(reference: Reference, tmp_path: Path) -> None:
    run = reference.give_earlier_stages(tmp_path)
    ended = children.run(reference.config, tmp_path, before=faults.NoRoom(step=2))
    assert complains_once(ended), ended.messages
    assert [file.name for file in (run / "checkpoints").iterdir()] == ["step=000000001.ckpt"]
    continue_and_compare(reference, tmp_path)


@pytest.fixture
def small_disk(tmp_path: Path) -> object:
    """A file system that a few checkpoints fill; needs the right to mount."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def mount(kilobytes: int) -> Path:
        options = ["-o", f"size={kilobytes}k", "tmpfs", str(folder)]
        if subprocess.run(["mount", "-t", "tmpfs", *options], capture_output=True).returncode:
            pytest.skip("this user may not mount a file system")
        return folder

    yield mount
    subprocess.run(["umount", str(folder)], capture_output=True)


@pytest.mark.proves("resume", "full disk")
@pytest.mark.parametrize(("slug", "arm"), [in_every_run(slug == spread(8), slug, arm) for slug, arm in FIRST_ARMS])
@pytest.mark.parametrize("checkpoints", [0.0, 1.5])
def test_a_full_disk(reference: Reference, small_disk: Callable[[int], Path], checkpoints: float) -> None:
    size = max(file.stat().st_size for file in (reference.run / "checkpoints").iterdir())
    disk = small_disk(int(checkpoints * size / 1024) + 12 + 36 * bool(checkpoints))
    reference.give_earlier_stages(disk)
    ended = children.run(reference.config, disk)
    assert complains_once(ended), ended.messages
    subprocess.run(["mount", "-o", f"remount,size={int(9 * size / 1024) + 4096}k", str(disk)], check=True)
    continue_and_compare(reference, disk)


def test_every_paper_was_collected() -> None:
    assert {slug for slug, _ in STAGES} == {slug for slug, _ in FIRST_ARMS} == set(PAPERS)
    assert len(PAPERS) >= 4
