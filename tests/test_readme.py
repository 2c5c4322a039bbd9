"""Every command in the README does what it says; runs are cut to smoke size."""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from reprise import paths
from reprise.cli import main

pytestmark = pytest.mark.slow

README = (paths.root() / "README.md").read_text()
BLOCKS = [line.strip() for block in re.findall(r"```sh\n(.*?)```", README, re.DOTALL) for line in block.splitlines()]
PROSE = re.sub(r"```.*?```", "", README, flags=re.DOTALL)
SPANS = [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", PROSE)]
COMMANDS = list(dict.fromkeys(text for text in BLOCKS + SPANS if text.split()[0] in ("make", "reprise", "python")))
# How a command begins -> why it is not run here.
NOT_RUN = {
    "make new-paper": "test_new_paper.py runs it in a copy of the project",
    "make setup": "it builds the environment that the tests run in",
    "make test": "it is this very suite",
    "make bench": "it takes minutes; test_benchmarks.py runs what writes the page",
    "make parity DIR=<": "the folder is a placeholder; tests/cross/test_parity.py runs the golden cases at hand",
    'make reproduce PAPER=vit ARGS="trainer=gpu': "it needs a GPU; test_config.py composes it",
    "make reproduce PAPER=fedntd SCALE=paper": "it needs a GPU and all of CIFAR-10; docs/gpu.md says when it was run",
    "reprise weights import": "the file is a placeholder; tests/training/test_weights.py imports files",
    "python scripts/dashboard.py": "it publishes to W&B; test_dashboard.py builds what it sends",
}
BARE = (
    "make",
    "reprise",
    "reprise search",
)  # named in a sentence; `make` has a test below, and search is tested as one


def runnable(command: str) -> bool:
    return command not in BARE and not command.startswith(tuple(NOT_RUN))


def test_commands_were_found() -> None:
    assert sum(map(runnable, COMMANDS)) >= 20
    assert any(command.startswith("make reproduce") for command in COMMANDS)
    assert "reprise papers --markdown" in COMMANDS, "in a sentence, outside tables and blocks"


@pytest.mark.parametrize("start", NOT_RUN)
def test_what_is_not_run_stands_in_the_readme(start: str) -> None:
    assert any(command.startswith(start) for command in COMMANDS), "remove the exception"


def test_the_table_of_papers_is_the_generated_one() -> None:
    path = paths.root() / "scripts" / "readme.py"
    spec = importlib.util.spec_from_file_location("readme_script", path)
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    assert script.with_table(README) == README, "run: python scripts/readme.py"


def expand(command: str) -> list[str]:
    """The `reprise` words behind a make command."""
    if not command.startswith("make"):
        return shlex.split(command)[1:]
    dry = subprocess.run(
        ["make", "-s", "-n", "-o", ".venv/.installed", *shlex.split(command)[1:]],
        cwd=paths.root(),
        env={name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "ARGS")},  # of `make test`
        capture_output=True,
        text=True,
        check=True,
    )
    return shlex.split(dry.stdout.strip().splitlines()[-1])[1:]


def smoke_sized(words: list[str]) -> list[str]:
    """The command with its runs cut to a few steps."""
    if "--cfg" in words or "--dry-run" in words:
        return words
    if words[0] == "reproduce":
        return [*words, "smoke=true", "seed=0"]
    if any(word.startswith("search=") for word in words):
        return [*words[:-1], "smoke=true", f"search={{metric:{words[-1].removeprefix('search=')},trials:1}}"]
    return [*words, "smoke=true"] if words[0] == "train" else words


@pytest.mark.parametrize("command", filter(runnable, COMMANDS))
def test_readme_command(command: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    words = expand(command)
    if "/public" in command + " ".join(words) and not os.environ.get("REPRISE_DATA"):
        pytest.skip("REPRISE_DATA is not set: no public data at hand")
    monkeypatch.setenv("WANDB_MODE", "offline")
    if words[0] == "report":
        assert main(["train", "experiment=vit/small", "smoke=true"]) == 0
    if "shapes.png" in words:
        words[words.index("shapes.png")] = str(tmp_path / "shapes.png")
    assert main(smoke_sized(words)) == 0


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_make_lists_itself() -> None:
    listed = subprocess.run(["make"], cwd=paths.root(), capture_output=True, text=True, check=True).stdout
    targets = re.findall(r"^([a-z-]+):.*## ", (paths.root() / "Makefile").read_text(), re.MULTILINE)
    assert len(targets) >= 16
    for target in targets:
        assert f"make {target}" in listed
