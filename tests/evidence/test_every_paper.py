"""Every paper's claim, card and results, by discovery."""

from __future__ import annotations

import pytest

from reprise import discovery
from reprise.evidence.cards import load_card
from reprise.evidence.claims import load_claim
from reprise.evidence.report import SYMBOLS
from reprise.evidence.results_file import check_results, read_results
from reprise.evidence.statistics import MIN_SEEDS
from reprise.evidence.verdict import Verdict

PAPERS = discovery.papers()


def test_papers_are_found():
    assert PAPERS


@pytest.mark.parametrize("slug", PAPERS)
def test_the_claim_covers_the_recipes_with_enough_seeds(slug):
    claim = load_claim(slug)
    for scale in set(discovery.recipes(slug)) & set(discovery.SCALES):
        assert len(claim.at(scale).seeds) >= MIN_SEEDS


@pytest.mark.parametrize("slug", PAPERS)
def test_the_card_is_right(slug):
    named = {arm for exception in load_card(slug).rank_exceptions for arm in exception.arms or ()}
    assert named <= set(load_claim(slug).arms), "rank_exceptions names arms that the claim does not have"


@pytest.mark.parametrize("slug", PAPERS)
def test_results_are_as_generated(slug):
    path = discovery.results_path(slug)
    if not path.exists():
        pytest.skip(f"{slug} has no RESULTS.md yet: reprise report --write")
    assert check_results(path), f"{path} was edited by hand"
    for scale, content in read_results(path).items():
        verdict = Verdict.model_validate(content)
        assert verdict.scale == scale
        assert verdict.verdict in SYMBOLS
