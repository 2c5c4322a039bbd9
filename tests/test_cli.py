"""The command line around the commands: tracebacks, the recorded command, what a search is called."""

from __future__ import annotations

import json
import os
import shlex
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from reprise import app
from reprise.cli import main
from reprise.errors import ConfigError
from reprise.search.options import read_options

WRONG = [  # a mistake for each command that can be given one
    ["train", "experiment=vit/small", "steps=many"],
    ["train", "-m", "experiment=vit/small", "steps=many", "seed=0,1"],
    ["sweep", "experiment=vit/none"],
    ["reproduce", "experiment=vit/none"],
    ["search", "--metric", "val/accuracy", "experiment=vit/none"],
    ["plan", "experiment=vit/none"],
    ["weights", "import", "experiment=vit/paper"],
    ["report", "no-such-folder"],
    ["parity", "no-such-folder"],
    ["data", "check", "nothing"],
    ["new-paper", "Not A Slug"],
]


@pytest.mark.parametrize("words", WRONG, ids=lambda words: " ".join(words[:2]))
def test_traceback_may_stand_anywhere(
    words: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for typed in (words, ["--traceback", *words], [*words, "--traceback"]):
        monkeypatch.setenv("REPRISE_TRACEBACK", "")
        assert main(typed) != 0
        message = capsys.readouterr().err
        assert ("Traceback (most recent call last)" in message) == (typed is not words), typed
        assert "reprise: " in message


def test_traceback_does_no_harm_to_what_succeeds(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REPRISE_TRACEBACK", "")
    assert main(["data", "list", "--traceback"]) == 0
    assert main(["train", "experiment=vit/small", "--cfg", "job", "--traceback"]) == 0
    assert "slug: vit" in capsys.readouterr().out


@pytest.mark.slow
def test_the_recorded_command_is_what_was_typed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REPRISE_COMMAND", "of another process")
    words = ["train", "-m", "experiment=vit/small", "smoke=true", "seed=0", "optimizer.lr=choice( 0.01 )"]
    assert main(words) == 0
    (path,) = Path(os.environ["REPRISE_RUNS"]).rglob("run.json")
    assert shlex.split(json.loads(path.read_text())["command"]) == ["reprise", *words]
    assert os.environ["REPRISE_COMMAND"] == "of another process", "put back for what comes after"


def test_a_finished_run_is_named_and_not_run_again(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["train", "experiment=vit/small", "smoke=true"]
    assert main(words) == 0
    first = capsys.readouterr()
    assert "already finished" not in first.err
    (path,) = Path(os.environ["REPRISE_RUNS"]).rglob("run.json")
    date = json.loads(path.read_text())["finished"]
    assert main(words) == 0
    again = capsys.readouterr()
    assert again.out == first.out
    assert again.err == f"reprise: already finished on {date} in {path.parent}; nothing was run\n"
    assert main([*words, "logger=tensorboard"]) == 0
    assert "nothing was run (logger=tensorboard applies to new runs only)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("search=val/accuracy", {"metric": "val/accuracy", "direction": "maximize", "trials": 20, "parallel": None}),
        (
            "search={metric:val/loss,direction:minimize,trials:5,parallel:2}",
            {"metric": "val/loss", "direction": "minimize", "trials": 5, "parallel": 2},
        ),
    ],
)
def test_a_search_is_read_from_a_metric_or_from_options(override: str, expected: dict[str, Any]) -> None:
    assert read_options(override) == expected


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        ("search=", "names no metric"),
        ("search={trials:5}", "names no metric"),
        ("search={metric:val/a,trails:5}", "no option trails"),
        ("search={metric:val/a,trials:many}", "is not a search"),
        ("search={metric:val/a,direction:up}", "is not a search"),
        ("search={metric", "cannot be read"),
    ],
)
def test_a_wrong_search_is_refused(override: str, problem: str) -> None:
    with pytest.raises(ConfigError, match=problem) as caught:
        read_options(override)
    assert "search=val/accuracy" in str(caught.value)


def test_sweep_with_search_is_search(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("optuna", reason="the extra `search` is not installed")
    calls: list[tuple[list[str], list[str]]] = []

    def run_hydra(overrides: list[str], flags: list[str]) -> SimpleNamespace:
        calls.append((overrides, flags))
        return SimpleNamespace(folder="f", failures=[], stopped=False, best=object())

    monkeypatch.setattr(app, "run_hydra", run_hydra)
    monkeypatch.setattr("reprise.search.loop.render", lambda outcome: "table")
    words = ["experiment=vit/small", "optimizer.lr=interval(1e-4,1e-2)"]
    assert main(["sweep", *words, "search={metric:val/loss,direction:minimize,trials:5}"]) == 0
    assert main(["search", *words, "--metric", "val/loss", "--minimize", "--trials", "5"]) == 0
    assert calls[0] == calls[1]
    assert calls[0][0][-1].startswith("+hydra.sweeper.search={")
    assert main(["sweep", *words, "search=val/loss", "--dry-run"]) == 1
    assert "a search cannot list its runs" in capsys.readouterr().err
    assert len(calls) == 2


def test_a_report_of_a_folder_without_runs_says_what_it_must_hold(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "vit" / "small" / "vit" / "seed=0"
    run.mkdir(parents=True)
    for folder in (tmp_path / "vit", run):
        assert main(["report", str(folder)]) == 1
        message = capsys.readouterr().err
        assert "no report was built" in message
        assert str(folder) in message
        assert "<paper>/<scale>/<arm>/seed=<n>" in message
        assert not (folder / "index.html").exists()
