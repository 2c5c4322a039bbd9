"""Selective search finds plain things, is deterministic, and is cached by content."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from reprise.data import proposals
from reprise.data.images import DetectionSource, Normalisation
from reprise.data.proposals import (
    SearchOptions,
    neighbours,
    proposals_of,
    random_boxes,
    relative_proposals,
    selective_search,
)
from reprise.errors import ConfigError
from reprise.nn.boxes import pairwise_iou

FAST = SearchOptions(
    count=10, spaces=("lab",), scales=(150.0,), strategies=("all",), min_region=10, min_side=0.1, max_side=0.8
)


def _picture() -> np.ndarray:
    """A red and a green rectangle on grey."""
    picture = np.full((40, 60, 3), 60, np.uint8)
    picture[5:20, 8:24] = (220, 40, 40)
    picture[22:36, 34:54] = (40, 200, 60)
    return picture


def test_finds_both_rectangles() -> None:
    found = torch.from_numpy(selective_search(_picture(), FAST))
    wanted = torch.tensor([[8.0, 5.0, 24.0, 20.0], [34.0, 22.0, 54.0, 36.0]])
    assert (pairwise_iou(found, wanted).amax(0) > 0.8).all()


def test_same_picture_same_boxes_and_no_repetitions() -> None:
    first, second = (
        selective_search(_picture(), SearchOptions(min_region=10)),
        selective_search(_picture(), SearchOptions(min_region=10)),
    )
    assert np.array_equal(first, second)
    assert len(np.unique(first, axis=0)) == len(first) <= 30


def test_a_picture_of_one_colour_gives_no_box() -> None:
    assert selective_search(np.full((16, 16, 3), 99, np.uint8), FAST).shape == (0, 4)


def test_neighbours_touch_side_by_side() -> None:
    assert neighbours(np.array([[0, 0, 1], [2, 2, 1]])) == {(0, 1), (0, 2), (1, 2)}
    assert neighbours(np.array([[0, 1], [1, 0]])) == {(0, 1)}


def _padded_twice() -> DetectionSource:
    """The picture twice, each padded to 50 x 70."""
    image = torch.zeros(2, 3, 50, 70, dtype=torch.uint8)
    image[:, :, :40, :60] = torch.from_numpy(_picture()).permute(2, 0, 1)
    return DetectionSource(
        image,
        Normalisation((0.0,) * 3, (1.0,) * 3),
        size=torch.tensor([[40, 60], [40, 60]]),
        first=torch.tensor([0, 0, 0]),
        labels=torch.zeros(0, dtype=torch.int64),
        boxes=torch.zeros(0, 4),
    )


def test_random_boxes_lie_inside_have_the_wanted_sides_and_belong_to_the_picture() -> None:
    options = replace(FAST, source="random", count=50)
    found = relative_proposals(_picture(), options)
    assert found.shape == (50, 4)
    centre, side = found[:, :2], found[:, 2:]
    assert ((side >= 0.1 - 1e-6) & (side <= 0.8 + 1e-6)).all()
    assert side.std() > 0.1
    assert ((centre - side / 2 >= -1e-6) & (centre + side / 2 <= 1 + 1e-6)).all()
    assert np.array_equal(random_boxes(_picture(), options), random_boxes(_picture(), options))
    assert not np.array_equal(random_boxes(_picture(), options), random_boxes(255 - _picture(), options))
    first, second = proposals_of(_padded_twice(), options)
    assert torch.equal(first, found)
    assert torch.equal(second, found)


def test_no_proposals_are_wanted_and_nothing_is_searched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(proposals, "selective_search", None)
    assert [len(boxes) for boxes in proposals_of(_padded_twice(), replace(FAST, count=0))] == [0, 0]


def test_the_search_does_not_depend_on_what_else_could_be_the_source() -> None:
    assert replace(FAST, source="novel").search_key() == FAST.search_key()
    assert sorted(FAST.search_key()) == [
        "count",
        "max_side",
        "min_region",
        "min_side",
        "scales",
        "spaces",
        "strategies",
    ]


def test_boxes_are_relative_to_the_content_and_cached(monkeypatch: pytest.MonkeyPatch) -> None:
    source = _padded_twice()
    found = proposals_of(source, FAST)
    assert torch.equal(found[0], found[1])  # the seed is the picture, not its place in the set
    red = torch.tensor([16 / 60, 12.5 / 40, 16 / 60, 15 / 40])
    assert ((found[0] - red).abs().sum(1) < 0.15).any()

    def refuse(*args: object) -> None:
        raise AssertionError("searched again")

    monkeypatch.setattr(proposals, "selective_search", refuse)
    assert torch.equal(proposals_of(source, FAST)[0], found[0])


@pytest.mark.parametrize(
    "options", [{"spaces": ("cmyk",)}, {"strategies": ()}, {"count": -1}, {"min_side": 2.0}, {"source": "x"}]
)
def test_wrong_options_are_named(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        SearchOptions(**options)
