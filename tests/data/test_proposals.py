"""Selective search finds plain things, is deterministic, and is cached by content."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from reprise.data import proposals
from reprise.data.images import DetectionSource, Normalisation
from reprise.data.proposals import SearchOptions, neighbours, proposals_of, selective_search
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


def test_boxes_are_relative_to_the_content_and_cached(monkeypatch: pytest.MonkeyPatch) -> None:
    image = torch.zeros(2, 3, 50, 70, dtype=torch.uint8)
    image[:, :, :40, :60] = torch.from_numpy(_picture()).permute(2, 0, 1)
    source = DetectionSource(
        image,
        Normalisation((0.0,) * 3, (1.0,) * 3),
        size=torch.tensor([[40, 60], [40, 60]]),
        first=torch.tensor([0, 0, 0]),
        labels=torch.zeros(0, dtype=torch.int64),
        boxes=torch.zeros(0, 4),
    )
    found = proposals_of(source, FAST)
    assert torch.equal(found[0], found[1])  # the seed is the picture, not its place in the set
    red = torch.tensor([16 / 60, 12.5 / 40, 16 / 60, 15 / 40])
    assert ((found[0] - red).abs().sum(1) < 0.15).any()

    def refuse(*args: object) -> None:
        raise AssertionError("searched again")

    monkeypatch.setattr(proposals, "selective_search", refuse)
    assert torch.equal(proposals_of(source, FAST)[0], found[0])


@pytest.mark.parametrize("options", [{"spaces": ("cmyk",)}, {"strategies": ()}, {"count": 0}, {"min_side": 2.0}])
def test_wrong_options_are_named(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        SearchOptions(**options)
