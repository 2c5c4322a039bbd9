"""RECORDS.json: sealed, read into the table of papers, and written from marked tests."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from reprise import discovery, paths
from reprise.evidence.records import check_record, read_record, record_path, write_record
from reprise.evidence.table import paper_row

PAPERS = discovery.papers()


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project whose experiments may be written to."""
    shutil.copytree(paths.experiments_dir(), tmp_path / "experiments")
    monkeypatch.setenv("REPRISE_ROOT", str(tmp_path))
    return tmp_path


def is_recorded(slug: str) -> bool:
    """Whether a paper must have its record: it has results, and `make test-dist` has been run for some paper."""
    return discovery.results_path(slug).exists() and any(record_path(other).exists() for other in PAPERS)


def test_a_record_is_demanded_once_one_is_there_and_of_papers_with_results(project: Path) -> None:
    with_results = [slug for slug in PAPERS if discovery.results_path(slug).exists()]
    for slug in PAPERS:
        record_path(slug).unlink(missing_ok=True)
    assert not any(map(is_recorded, PAPERS))
    write_record(with_results[0], {"ranks": {"2 ranks": "passed"}}, "abc")
    discovery.results_path(with_results[1]).unlink()
    assert [slug for slug in PAPERS if is_recorded(slug)] == [with_results[0], *with_results[2:]]


@pytest.mark.parametrize("slug", PAPERS)
def test_records_are_as_generated(slug: str) -> None:
    if not record_path(slug).exists() and not is_recorded(slug):
        pytest.skip(f"{slug} has no RECORDS.json, and need not have one yet")
    assert record_path(slug).exists(), "its results are published without the record of its guarantees: make test-dist"
    assert check_record(record_path(slug)), "edited by hand; make test-dist writes it anew"
    assert read_record(slug)["resume"]["total"] >= 5
    assert read_record(slug)["ranks"]["total"] >= 3


def test_a_record_fills_the_table(project: Path) -> None:
    slug = PAPERS[0]
    cases = {"resume": {"a": "passed", "b": "failed", "c": "no right to mount"}, "ranks": {"2 ranks": "passed"}}
    path = write_record(slug, cases, "abc")
    assert check_record(path)
    row = paper_row(slug)
    assert (str(row.resume), str(row.ranks)) == ("1/2", "1/1")
    assert row.ranks is not None
    assert row.ranks.commit == "abc"
    path.write_text(path.read_text().replace('"passed": 1,', '"passed": 2,'))
    assert not check_record(path)


def test_without_a_record_nothing_is_claimed(project: Path) -> None:
    record_path(PAPERS[0]).unlink(missing_ok=True)
    assert paper_row(PAPERS[0]).resume is None


TESTS = """
import pytest
pytestmark = pytest.mark.dist

@pytest.mark.proves("resume", "a case")
@pytest.mark.parametrize(("slug", "number"), [("{slug}", 1), ("{slug}", 2)])
def test_resume(slug, number):
    assert number == 1

@pytest.mark.proves("ranks", "2 ranks")
@pytest.mark.parametrize("slug", ["{slug}"])
def test_ranks(slug):
    pytest.skip("reason")
"""


@pytest.mark.parametrize("processes", ["0", "2"])
def test_outcomes_of_marked_tests_are_written(project: Path, processes: str) -> None:
    slug = PAPERS[0]
    (project / "tests").mkdir()
    for name in ("conftest.py", "records.py", "__init__.py"):
        shutil.copy(Path(__file__).parents[1] / name, project / "tests")
    shutil.copy(Path(__file__).parents[2] / "pyproject.toml", project)
    (project / "tests" / "test_it.py").write_text(TESTS.format(slug=slug))
    command = [sys.executable, "-m", "pytest", "-m", "dist", "-n", processes, "--dist", "loadgroup", "--write-records"]
    done = subprocess.run(command, cwd=project, env={**os.environ}, capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    assert f"1 of {len(PAPERS)} papers covered" in done.stdout
    record = json.loads(record_path(slug).read_text())
    assert check_record(record_path(slug))
    assert record["resume"] == {"passed": 1, "total": 2, "cases": {"a case, 1": "passed", "a case, 2": "failed"}}
    assert record["ranks"] == {"passed": 0, "total": 0, "cases": {"2 ranks": "reason"}}
