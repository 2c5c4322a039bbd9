"""`reprise new-paper` makes a paper that every cross-paper test collects; removing its folders removes it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from reprise import paths

pytestmark = pytest.mark.slow
SLUG = "scaffolded"


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the project, so that the new paper never touches this one."""
    target = tmp_path_factory.mktemp("copy")
    for name in ("conf", "experiments", "src", "tests", "docs"):
        shutil.copytree(paths.root() / name, target / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "constraints.txt", "environment.yml", "README.md", "Makefile"):
        shutil.copy(paths.root() / name, target / name)
    return target


def run(copy: Path, *command: str) -> subprocess.CompletedProcess[str]:
    own = {"PYTHONPATH": copy / "src", "REPRISE_ROOT": copy, "REPRISE_RUNS": copy / "runs"}
    environment = {**os.environ, **{name: str(path) for name, path in own.items()}}
    return subprocess.run([sys.executable, *command], cwd=copy, env=environment, capture_output=True, text=True)


def papers(copy: Path) -> set[str]:
    done = run(copy, "-m", "reprise.cli", "papers", "--json")
    return {row["slug"] for row in json.loads(done.stdout)}


def test_a_new_paper_is_complete(copy: Path) -> None:
    before = papers(copy)
    made = run(copy, "-m", "reprise.cli", "new-paper", SLUG)
    assert made.returncode == 0, made.stderr
    assert papers(copy) == before | {SLUG}
    tests = run(copy, "-m", "pytest", "-q", "-x", "tests/cross", "tests/test_structure.py", "-k", SLUG)
    assert tests.returncode == 0, tests.stdout[-3000:]
    assert int(tests.stdout.strip().splitlines()[-1].split()[0]) >= 15, "collected by every cross-paper test"
    again = run(copy, "-m", "reprise.cli", "new-paper", SLUG)
    assert again.returncode == 1
    assert "already" in again.stderr
    for folder in (copy / "src/reprise/papers" / SLUG, copy / "experiments" / SLUG):
        shutil.rmtree(folder)
    (copy / "conf/paper" / f"{SLUG}.yaml").unlink()
    assert papers(copy) == before
