"""The first losses of every arm of every paper are those that were recorded."""

from __future__ import annotations

import json

import pytest

from reprise.training.golden_losses import RELATIVE_TOLERANCE, first_losses, path_of
from tests.cross.support import PAPERS

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("slug", PAPERS)
def test_first_losses_are_unchanged(slug: str) -> None:
    path = path_of(slug)
    assert path.exists(), f"record them with: python scripts/golden_losses.py {slug}"
    recorded = json.loads(path.read_text())
    now = first_losses(slug)
    assert now.keys() == recorded.keys()
    for arm, losses in recorded.items():
        assert len(losses) == 4
        assert now[arm] == pytest.approx(losses, rel=RELATIVE_TOLERANCE), arm


def test_every_paper_was_collected() -> None:
    assert len(PAPERS) >= 4
