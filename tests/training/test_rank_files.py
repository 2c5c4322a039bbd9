"""What ranks leave for each other: the cause of an end, and when rank 0 has begun and ended."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest

from reprise.errors import CheckpointError, DivergedError, InterruptedRunError, PreemptedRunError, RepriseError
from reprise.training.ranks import await_end, await_start, first_error, write_rank_error
from reprise.training.runfolder import RunFolder, write_json


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    folder = RunFolder(tmp_path / "run")
    folder.prepare("hash")
    return folder


def begin(folder: RunFolder, start: str) -> None:
    write_json(folder.path / "run.json", {"status": "running", "config_hash": "hash", "start": start})


def test_the_cause_goes_before_what_followed_from_it(folder: RunFolder) -> None:
    assert first_error(folder) is None
    write_rank_error(folder, 0, RuntimeError("connection closed by peer"))
    write_rank_error(folder, 2, PreemptedRunError("stopped by SIGTERM"))
    cause = DivergedError("NaN at step 1", looked_at=folder.path, next_step="lower the learning rate")
    write_rank_error(folder, 1, cause)
    found = first_error(folder)
    assert type(found) is DivergedError
    assert str(found) == str(cause)


def test_of_unforeseen_errors_the_first_one_counts(folder: RunFolder) -> None:
    write_rank_error(folder, 1, KeyError("cause"))
    time.sleep(0.01)
    write_rank_error(folder, 0, RuntimeError("connection closed by peer"))
    found = first_error(folder)
    assert found is not None
    assert found.problem == "rank 1: KeyError: 'cause'"
    assert "ranks.log" in str(found)


def test_a_second_ctrl_c_is_a_stop_and_no_failure(folder: RunFolder) -> None:
    write_rank_error(folder, 0, KeyboardInterrupt())
    write_rank_error(folder, 1, RuntimeError("connection closed by peer"))
    assert type(first_error(folder)) is InterruptedRunError


def test_errors_of_an_earlier_start_are_forgotten(folder: RunFolder) -> None:
    write_rank_error(folder, 1, CheckpointError("old"))
    folder.prepare("hash")
    assert first_error(folder) is None


def test_other_ranks_wait_for_rank_0_of_their_own_start(folder: RunFolder) -> None:
    begin(folder, "yesterday")
    threading.Timer(0.3, begin, (folder, "today")).start()
    began = time.monotonic()
    assert not await_start(folder, "hash", "today")
    assert time.monotonic() - began > 0.25


def test_a_rank_that_comes_late_hears_that_rank_0_has_failed(folder: RunFolder) -> None:
    begin(folder, "today")
    folder.end("failed", seconds=1, error="no such key")
    with pytest.raises(RepriseError, match="rank 0 has failed: no such key"):
        await_start(folder, "hash", "today")


def test_other_ranks_wait_for_the_results(folder: RunFolder) -> None:
    begin(folder, "today")

    def finish() -> None:
        write_json(folder.path / "summary.json", {"metrics": {}})
        folder.end("finished", seconds=1)

    threading.Timer(0.3, finish).start()
    await_end(folder, "hash")
    assert folder.is_finished("hash")
    assert await_start(folder, "hash", "tomorrow"), "a finished run does not begin again"


def test_other_ranks_hear_that_rank_0_failed(folder: RunFolder) -> None:
    begin(folder, "today")
    folder.end("failed", seconds=1, error="the disk is full", exit_code=1)
    with pytest.raises(RepriseError, match="rank 0 has failed: the disk is full"):
        await_end(folder, "hash")
