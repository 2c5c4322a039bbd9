"""The soak on one paper with two kills; the whole of it is scripts/soak.py."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from reprise import discovery, paths
from reprise.evidence.soak import PaperSoak, closing_line, passed, soak, to_markdown


@pytest.mark.slow
@pytest.mark.dist
def test_killed_runs_end_with_the_same_bits(tmp_path: Path) -> None:
    told: list[PaperSoak] = []
    results = soak(discovery.papers()[-1:], 2, 0, tmp_path, tell=told.append)
    assert results == told
    assert (results[0].kills, results[0].lost, results[0].mismatches) == (2, [], [])
    assert results[0].runs >= 1
    assert passed(results)


def test_what_went_wrong_is_counted_and_shown() -> None:
    results = [PaperSoak("one", 3, 2, ["one: exit code 1"], [], 4.0), PaperSoak("two", 2, 1)]
    assert not passed(results)
    assert closing_line(results) == "5 kills over 2 papers, 3 runs: 1 lost, 0 with other final bits"
    page = to_markdown(results, "command")
    assert "- one: exit code 1" in page
    assert "| two | 2 | 1 | 0 | 0 | 0 |" in page


def test_the_page_tells_of_every_paper_and_of_enough_kills() -> None:
    page = (paths.root() / "docs" / "soak.md").read_text()
    found = re.search(r"\*\*(\d+) kills over (\d+) papers, \d+ runs: (\d+) lost, (\d+) with other final bits", page)
    assert found is not None
    kills, papers, lost, different = map(int, found.groups())
    rows = set(re.findall(r"^\| (\w+) \|", page, re.MULTILINE)) - {"paper"}
    assert (lost, different) == (0, 0)
    published = {slug for slug in discovery.papers() if discovery.results_path(slug).exists()}
    assert published <= rows, "python scripts/soak.py --kills 50"
    assert papers == len(rows)
    assert kills >= 50
