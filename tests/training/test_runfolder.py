"""Run folders: tidy metrics that are cut back on resume, atomic files, nothing overwritten."""

from __future__ import annotations

from pathlib import Path

import pytest

from reprise.errors import RepriseError
from reprise.training.runfolder import MetricsFile, RunFolder, write_atomic


def test_metrics_are_cut_back_to_the_step(tmp_path: Path) -> None:
    metrics = MetricsFile(tmp_path / "metrics.csv")
    metrics.cut_back(0)
    for step in (1, 2, 3):
        metrics.append(step, {"train/loss": step / 3, "a": 1.0})
    metrics.cut_back(2)
    lines = metrics.path.read_text().splitlines()
    assert lines == ["step,metric,value", "1,a,1.0", f"1,train/loss,{1 / 3!r}", "2,a,1.0", f"2,train/loss,{2 / 3!r}"]


def test_a_test_that_is_repeated_is_told_once(tmp_path: Path) -> None:
    metrics = MetricsFile(tmp_path / "metrics.csv")
    metrics.cut_back(0)
    metrics.append(4, {"val/loss": 1.0})
    metrics.append(4, {"test/loss": 2.0})  # then killed, before summary.json was written
    metrics.cut_back(4)
    metrics.append(4, {"test/loss": 2.0})
    assert metrics.path.read_text().splitlines()[1:] == ["4,val/loss,1.0", "4,test/loss,2.0"]


def test_a_half_written_line_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    path.write_text("step,metric,value\n1,a,1.0\n2,a")
    MetricsFile(path).cut_back(5)
    assert path.read_text() == "step,metric,value\n1,a,1.0\n"


def test_another_configuration_moves_the_folder_aside(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "seed=0")
    for config_hash in ("aaaaaaaa1", "bbbbbbbb2", "aaaaaaaa1", "bbbbbbbb2"):
        folder.prepare(config_hash)
        folder.start({"config_hash": config_hash})
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["seed=0", "seed=0~old-aaaaaaaa", "seed=0~old-aaaaaaaa-2", "seed=0~old-bbbbbbbb"]


def test_finished_needs_the_same_hash_and_a_summary(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    folder.prepare("x")
    folder.start({"config_hash": "x"})
    assert not folder.is_finished("x")
    write_atomic(folder.path / "summary.json", '{"metrics": {}}')
    assert not folder.is_finished("x")
    folder.end("finished", seconds=1.5)
    assert folder.is_finished("x")
    assert not folder.is_finished("y")


def test_seconds_add_up_over_restarts(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    folder.prepare("x")
    folder.start({"config_hash": "x"})
    folder.end("interrupted", seconds=2)
    folder.start({"config_hash": "x"})
    folder.end("finished", seconds=3)
    run = folder.read("run.json")
    assert run is not None
    assert run["seconds"] == 5


def test_the_time_of_a_killed_start_counts(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    folder.prepare("x")
    for seconds in (7, 2):
        folder.start({"config_hash": "x"})
        folder.progress(1, 2, "train", seconds=seconds, cpu_seconds=seconds + 1)
    folder.start({"config_hash": "x"})  # the two before were killed
    folder.end("finished", seconds=3, cpu_seconds=4)
    run = folder.read("run.json")
    assert run is not None
    assert (run["seconds"], run["cpu_seconds"]) == (12, 15)
    folder.start({"config_hash": "x"})
    run = folder.read("run.json")
    assert run is not None
    assert run["seconds"] == 12


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RepriseError, match="cannot be written"):
        RunFolder(tmp_path / "file" / "run").prepare("x")


def test_damaged_json_reads_as_missing(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text("{")
    assert RunFolder(tmp_path).read("run.json") is None
