"""Every golden case of every paper we have passes, and every paper with goldens has its cases collected."""

from __future__ import annotations

from pathlib import Path

import pytest

from reprise.evidence.parity import run_parity
from reprise.golden import find_cases
from tests.cross.support import PAPERS


@pytest.mark.parametrize("slug", PAPERS)
def test_golden_cases_pass(slug: str, goldens: Path) -> None:
    cases = find_cases(goldens / slug) if (goldens / slug).is_dir() else []
    if not cases:
        pytest.skip(f"no golden cases of official code exist for {slug}")
    results = run_parity(goldens, slug)
    assert len(results) == len(cases)
    failed = [result for result in results if not result.passed]
    assert not failed, [(result.case, result.message) for result in failed]
