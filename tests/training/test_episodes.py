"""Episodes, and the classifiers on frozen features, against slow formulas."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from reprise.training import episodes as few


def world(classes: int = 8, items: int = 12, width: int = 6, spread: float = 0.3) -> tuple[torch.Tensor, torch.Tensor]:
    label = torch.arange(classes).repeat_interleave(items)
    return torch.randn(classes, width)[label] + spread * torch.randn(classes * items, width), label


def test_episodes_hold_distinct_classes_and_distinct_items() -> None:
    _, label = world()
    table = few.sample_episodes(label, 5, 2, 4, 30, seed=1)
    assert table.shape == (30, 5, 6)
    assert torch.equal(table, few.sample_episodes(label, 5, 2, 4, 30, seed=1))
    for episode in table:
        assert len(episode.flatten().unique()) == 30
        rows = label[episode]
        assert (rows == rows[:, :1]).all()
        assert len(rows[:, 0].unique()) == 5


def test_all_remaining_items_can_be_queries() -> None:
    _, label = world()
    assert few.sample_episodes(label, 3, 5, None, 2, seed=0).shape == (2, 3, 12)


@pytest.mark.parametrize(("ways", "shots", "queries"), [(9, 1, 1), (5, 6, 7), (5, 12, None)])
def test_episodes_that_do_not_fit_are_refused(ways: int, shots: int, queries: int | None) -> None:
    with pytest.raises(ValueError, match="do not fit"):
        few.sample_episodes(world()[1], ways, shots, queries, 1, seed=0)


def test_prototypes_are_plain_means() -> None:
    feature, label = world()
    table = few.sample_episodes(label, 4, 3, 5, 6, seed=2)
    logits = few.prototype_logits(feature, table, 3)
    for number, episode in enumerate(table):
        prototype = torch.stack([feature[row[:3]].mean(0) for row in episode])
        query = torch.cat([feature[row[3:]] for row in episode])
        expected = nn.functional.cosine_similarity(query[:, None], prototype[None], dim=-1)
        torch.testing.assert_close(logits[number], expected)


def test_one_neighbour_is_the_nearest_support_item() -> None:
    feature, label = world()
    table = few.sample_episodes(label, 4, 3, 5, 6, seed=2)
    guess = few.nearest_neighbour_logits(feature, table, 3, neighbours=1).argmax(-1)
    for number, episode in enumerate(table):
        support, query = feature[episode[:, :3].flatten()], feature[episode[:, 3:].flatten()]
        nearest = nn.functional.cosine_similarity(query[:, None], support[None], dim=-1).argmax(1) // 3
        assert torch.equal(guess[number], nearest)


def test_the_cosine_classifier_is_sgd_on_the_support() -> None:
    feature, label = world()
    table = few.sample_episodes(label, 3, 2, 4, 2, seed=3)
    logits = few.cosine_classifier_logits(feature, table, 2, seed=0, epochs=7)
    rng = few.generator(0, "cosine classifier")
    start = (torch.rand(3, 6, generator=rng) * 2 - 1) / 6**0.5
    orders = [torch.randperm(6, generator=rng) for _ in range(7)]
    for number, episode in enumerate(table):
        weight = nn.Parameter(start.clone())
        sgd = torch.optim.SGD([weight], lr=0.01, momentum=0.9, dampening=0.9, weight_decay=0.001)
        support, truth = feature[episode[:, :2].flatten()], torch.arange(3).repeat_interleave(2)
        for order in orders:
            for rows in order.split(4):
                scores = 2 * nn.functional.cosine_similarity(support[rows][:, None], weight[None], dim=-1)
                sgd.zero_grad()
                nn.functional.cross_entropy(scores, truth[rows]).backward()
                sgd.step()
        query = feature[episode[:, 2:].flatten()]
        expected = 2 * nn.functional.cosine_similarity(query[:, None], weight[None], dim=-1)
        torch.testing.assert_close(logits[number], expected.detach())


def test_accuracy_and_interval() -> None:
    logits = torch.tensor([[[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 1.0]], [[0.0, 1.0]] * 4])
    accuracy = few.episode_accuracy(logits)
    assert accuracy.tolist() == [1.0, 0.5]
    found = few.interval(accuracy)
    assert found.mean == pytest.approx(0.75)
    assert found.half_width == pytest.approx(1.96 * 0.25 / 2**0.5)
    assert few.interval(accuracy[:1]).half_width == 0
