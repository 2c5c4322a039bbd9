"""The published difference beside ours at the scale of the paper."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from reprise.evidence.report import build_report

from .conftest import CARD, CLAIM

ROW = {
    "dataset": "COCO",
    "setting": "500 epochs",
    "metric": "ap %",
    "baseline": 40.0,
    "method": 42.5,
    "source": "Table 1, Control and Sets (from memory)",
}
GAINS = [0.10, 0.12, 0.11, 0.09, 0.10]


def page(workshop: Any, row: dict[str, Any], scales: tuple[str, ...] = ("paper",)) -> str:
    claim = copy.deepcopy(CLAIM)
    claim["scales"]["paper"] = {"seeds": [0, 1, 2, 3, 4]}
    claim["arms"]["method"]["label"], claim["arms"]["control"]["label"] = "Sets", "Control"
    workshop.write_claim(claim)
    workshop.write_card(CARD | {"published": [row, ROW | {"method": 99.0, "metric": "recall %"}]})
    for scale in scales:
        workshop.fill(GAINS, scale=scale)
    return " ".join(build_report(workshop.runs, "toy_paper").read_text().split())


def test_the_published_difference_stands_beside_ours(workshop):
    html = page(workshop, ROW)
    assert (
        "AP without NMS: published +0.0250 (COCO, 500 epochs; Table 1, Control and Sets (from memory)), "
        "ours at the scale “paper” +0.1200 [+0.1004, +0.1396], 5 seeds" in html
    )


@pytest.mark.parametrize(
    "change",
    [
        {"baseline": "40.0 (Faster R-CNN)"},
        {"baseline": None},
        {"dataset": "LVIS"},
        {"metric": "PQ"},
        {"source": "Table 1, Sets and another method"},
    ],
)
def test_a_row_that_compares_something_else_is_not_set_beside_ours(workshop, change):
    assert "ours at the scale “paper” +" not in page(workshop, ROW | change)


def test_a_scale_that_is_not_the_papers_has_no_published_difference(workshop):
    assert "published +" not in page(workshop, ROW, scales=("small",))


def test_sentences_on_the_scales_are_apart(workshop):
    assert "listed below. At the scale “small”" in page(workshop, ROW, scales=("paper", "small"))


@pytest.mark.parametrize(
    ("scales", "said", "unsaid"),
    [
        (("paper",), "At the scale “paper” ours come from the published recipe and data", "compare directions"),
        (("small",), "At the scale “small” the data and the size are others: compare directions", "published recipe"),
        (("small", "public"), "At the scales “small” and “public” the data and the size are others", "“paper”"),
    ],
)
def test_what_is_said_of_our_numbers_depends_on_the_scale(workshop, scales, said, unsaid):
    section = page(workshop, ROW, scales).partition("Published numbers beside ours")[2].partition("<table>")[0]
    assert said in section
    assert unsaid not in section
