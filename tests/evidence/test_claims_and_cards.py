"""claim.yaml and card.yaml: what they mean, and messages that name file and key."""

from __future__ import annotations

import copy

import pytest

from reprise.errors import ConfigError
from reprise.evidence.cards import load_card
from reprise.evidence.claims import Contrast, load_claim

from .conftest import CARD, CLAIM


def changed(content, **changes):
    return copy.deepcopy(content) | changes


def test_claim_at_a_scale_takes_its_margin_and_arms(workshop):
    claim = load_claim("toy_paper")
    assert claim.at("small").primary.margin == 0.02
    assert claim.at("public").primary.margin == 0.01
    assert claim.at("small~steps=3").scale == "small"
    assert claim.at("smoke").seeds == [0, 1, 2, 3, 4]
    assert [claim.at(label).scale for label in ("smoke-public", "smoke-finetune")] == ["public", "small"]
    assert claim.at("small").metrics() == ["test/nms_gain", "test/ap"]
    with pytest.raises(ConfigError, match="no scale 'paper'"):
        claim.at("paper")


def test_a_scale_may_replace_the_contrasts(workshop):
    other = CLAIM["secondary"][0] | {"name": "AP alone", "minus": []}
    scales = {"small": {"seeds": [0], "primary": other, "secondary": [], "arms": ["method"]}}
    workshop.write_claim(changed(CLAIM, scales=scales))
    claim = load_claim("toy_paper").at("small")
    assert list(claim.arms) == ["method"]
    assert claim.primary.value({"method": {"test/ap": 0.5}}) == 0.5


def test_a_scale_may_test_a_statement_of_its_own(workshop):
    scales = {"small": {"seeds": [0]}, "paper": {"seeds": [0], "statement": "Something narrower."}}
    workshop.write_claim(changed(CLAIM, scales=scales))
    claim = load_claim("toy_paper")
    assert claim.at("small").statement == CLAIM["statement"]
    assert claim.at("paper").statement == "Something narrower."


def test_a_scale_has_the_paragraphs_on_tuning_that_are_not_of_another_scale(workshop):
    text = "On seeds 100 and 101.\nsmall: rate 0.1.\npublic: nothing tuned.\nSmall steps: more so at paper: scale.\n"
    workshop.write_claim(changed(CLAIM, tuning=text))
    claim = load_claim("toy_paper")
    last = "Small steps: more so at paper: scale."
    assert claim.at("small").tuning == f"On seeds 100 and 101. small: rate 0.1. {last}"
    assert claim.at("public~steps=3").tuning == f"On seeds 100 and 101. public: nothing tuned. {last}"


def test_every_scale_of_fedntd_tells_its_own_tuning_alone():
    claim = load_claim("fedntd")
    for scale in ("small", "public", "paper"):
        assert claim.at(scale).tuning.startswith(f"{scale}: ")
        assert claim.at(scale).tuning.count("not tuned") == (scale != "small")


def test_contrast_sums_terms_and_reads_other_metrics():
    contrast = Contrast(
        name="interaction", metric="a", plus=["x", "y:b"], minus=["z", "x:b"], direction="higher", margin=0
    )
    metrics = {"x": {"a": 1.0, "b": 2.0}, "y": {"b": 30.0}, "z": {"a": 400.0}}
    assert contrast.value(metrics) == 1 + 30 - 400 - 2
    assert contrast.arms() == ["x", "y", "z"]
    with pytest.raises(KeyError, match="no run of the arm z"):
        contrast.value({"x": metrics["x"], "y": metrics["y"]})
    with pytest.raises(KeyError, match="has no metric b"):
        contrast.value(metrics | {"y": {}})


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"statment": "x"}, "statment: unknown key"),
        ({"primary": CLAIM["primary"] | {"direction": "up"}}, "primary.direction"),
        ({"primary": CLAIM["primary"] | {"margin": -1}}, "primary.margin"),
        ({"primary": CLAIM["primary"] | {"plus": ["nobody"]}}, "names no arm: 'nobody'"),
        ({"secondary": [CLAIM["primary"]]}, "same name"),
        ({"scales": {"small": {"seeds": [0, 0]}}}, "scales.small: seeds are given twice"),
        ({"scales": {"small": {"seeds": [100]}}}, "scales.small.seeds.0"),
        ({"scales": {"small": {"seeds": [0], "arms": ["method"]}}}, "leaves out"),
        ({"scales": {"small": {"seeds": [0], "arms": ["ghost"]}}}, "no arm 'ghost'"),
    ],
)
def test_wrong_claims_are_named(workshop, changes, expected):
    workshop.write_claim(changed(CLAIM, **changes))
    with pytest.raises(ConfigError, match=r"toy_paper/claim\.yaml") as caught:
        load_claim("toy_paper")
    assert expected in str(caught.value)


def test_missing_broken_and_doubled_files(workshop):
    path = workshop.experiment / "claim.yaml"
    path.write_text("statement: [")
    with pytest.raises(ConfigError, match="not valid YAML"):
        load_claim("toy_paper")
    path.write_text("statement: a\nstatement: b\n")
    with pytest.raises(ConfigError, match="'statement' is given twice"):
        load_claim("toy_paper")
    path.unlink()
    with pytest.raises(ConfigError, match="missing"):
        load_claim("toy_paper")


def test_card_is_read(workshop):
    card = load_card("toy_paper")
    assert card.sizes[0].tolerance == 0.01
    assert card.published[0].method == "42.0"


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"arxiv": 2005.12872}, "in quotes"),
        ({"arxiv": "detr"}, "arxiv"),
        ({"year": "soon"}, "year"),
        ({"sizes": CARD["sizes"] * 2}, "same name"),
        ({"sizes": [CARD["sizes"][0] | {"parameters": 0}]}, "sizes.0.parameters"),
        ({"traps": [{"trap": "x"}]}, "traps.0.avoided_by: missing"),
        ({"data": {"small": "shapes", "public": "bccd"}}, "does not name the data of the recipe paper"),
    ],
)
def test_wrong_cards_are_named(workshop, changes, expected):
    workshop.write_card(changed(CARD, **changes))
    with pytest.raises(ConfigError, match=r"toy_paper/card\.yaml") as caught:
        load_card("toy_paper")
    assert expected in str(caught.value)
