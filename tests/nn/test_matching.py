"""Matching against brute force, within images only, and its failures."""

from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from reprise.errors import DivergedError
from reprise.nn.boxes import cxcywh_to_xyxy, pairwise_giou
from reprise.nn.matching import hungarian, match, matching_cost, one_to_many, pad_targets


def _targets(counts: list[int], classes: int = 4) -> list[dict[str, torch.Tensor]]:
    return [
        {"labels": torch.randint(0, classes, (count,)), "boxes": 0.2 + 0.3 * torch.rand(count, 4)} for count in counts
    ]


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 5), st.integers(0, 4), st.integers(0, 10_000))
def test_hungarian_is_the_cheapest_assignment(queries: int, objects: int, seed: int) -> None:
    cost = np.random.default_rng(seed).random((queries, objects))
    rows, columns = hungarian(cost)
    small, large = sorted((queries, objects))
    table = cost if objects <= queries else cost.T
    best = min(
        sum(table[row, column] for column, row in enumerate(order)) for order in permutations(range(large), small)
    )
    assert len(rows) == small
    assert cost[rows, columns].sum() == pytest.approx(best)
    assert (np.diff(rows) > 0).all()


def test_cost_formula_within_each_image() -> None:
    targets = _targets([3, 0, 1])
    probability, boxes = torch.rand(2, 3, 5, 4), 0.2 + 0.3 * torch.rand(2, 3, 5, 4)
    cost = matching_cost(probability, boxes, pad_targets(targets), class_weight=1.5, l1_weight=4.0, giou_weight=3.0)
    for layer in range(2):
        for image, target in enumerate(targets):
            for column, (label, box) in enumerate(zip(target["labels"], target["boxes"], strict=True)):
                found = boxes[layer, image]
                giou = pairwise_giou(cxcywh_to_xyxy(found), cxcywh_to_xyxy(box[None]))[:, 0]
                wanted = 4 * (found - box).abs().sum(1) - 1.5 * probability[layer, image, :, label] - 3 * giou
                assert torch.allclose(cost[layer, image, :, column], wanted, atol=1e-5)


def test_layers_and_images_are_matched_on_their_own() -> None:
    counts = [2, 0, 3]
    cost = torch.rand(2, 3, 4, 3)
    matches = match(cost, counts)
    assert matches.per_layer == (5, 5)
    for layer in range(2):
        for image, count in enumerate(counts):
            rows, columns = hungarian(cost[layer, image, :, :count].numpy())
            query, found = matches.of(layer, image)
            assert query.tolist() == rows.tolist()
            assert found.tolist() == columns.tolist()


def test_more_objects_than_queries() -> None:
    matches = match(torch.rand(1, 1, 3, 7), [7])
    assert matches.per_layer == (3,)


def test_no_objects_at_all() -> None:
    targets = pad_targets(_targets([0, 0]))
    cost = matching_cost(torch.rand(1, 2, 3, 4), torch.rand(1, 2, 3, 4), targets)
    assert match(cost, targets.counts).per_layer == (0,)


def test_nan_is_a_clear_error() -> None:
    cost = torch.full((1, 1, 2, 1), float("nan"))
    with pytest.raises(DivergedError, match="not finite"):
        match(cost, [1])


def test_one_to_many_keeps_the_assignment_and_adds_the_cheapest() -> None:
    cost = np.array([[0.1, 5.0], [0.2, 6.0], [0.3, 7.0], [9.0, 0.5], [9.5, 0.4]])
    queries, objects = one_to_many(cost, 3)
    assert queries.tolist() == [0, 1, 2, 3, 4]
    assert objects.tolist() == [0, 0, 0, 1, 1]


def test_one_to_many_with_one_claim_is_one_to_one_when_nothing_conflicts() -> None:
    cost = np.array([[0.1, 5.0], [6.0, 0.2], [3.0, 3.0]])
    for ours, wanted in zip(one_to_many(cost, 1), hungarian(cost), strict=True):
        assert ours.tolist() == wanted.tolist()


def test_one_to_many_never_takes_a_matched_query_from_its_object() -> None:
    cost = np.array([[0.1, 0.2], [5.0, 6.0]])
    queries, objects = one_to_many(cost, 2)
    assert sorted(zip(queries.tolist(), objects.tolist(), strict=True)) == [(0, 1), (1, 0)]
