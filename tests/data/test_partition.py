"""Partitions of labelled items over clients."""

from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reprise.data.partition import (
    IntArray,
    class_counts,
    deal_shards,
    dirichlet,
    draw_shard_classes,
    iid,
    sharding,
    sharding_max,
)
from reprise.errors import ConfigError


def labels_of(per_class: int, classes: int = 10, seed: int = 0) -> IntArray:
    return np.random.default_rng(seed).permutation(np.repeat(np.arange(classes), per_class))


def assert_disjoint(parts: list[IntArray], items: int) -> None:
    joined = np.concatenate(parts)
    assert len(np.unique(joined)) == len(joined) <= items


@settings(max_examples=25, deadline=None)
@given(shards=st.integers(1, 5), per_class=st.integers(20, 60), seed=st.integers(0, 1000))
def test_sharding_deals_everything_in_few_classes(shards: int, per_class: int, seed: int) -> None:
    label = labels_of(per_class, seed=seed)
    parts = sharding(label, 20, shards_per_client=shards, seed=seed)
    assert_disjoint(parts, len(label))
    counts = class_counts(label, parts, 10)
    assert (counts.sum(0) == per_class).all()
    assert ((counts > 0).sum(1) <= shards).all()


def test_test_items_can_be_dealt_with_the_classes_of_the_training_items() -> None:
    train, test = labels_of(40), labels_of(12, seed=1)
    classes, rng = draw_shard_classes(10, 10, 2, random.Random(3)), np.random.RandomState(3)
    own, held_out = (class_counts(label, deal_shards(label, classes, rng), 10) for label in (train, test))
    assert ((own > 0) == (held_out > 0)).all()


def test_sharding_that_does_not_divide_is_refused() -> None:
    with pytest.raises(ConfigError, match="cannot be dealt evenly over 10 classes"):
        sharding(labels_of(20), 7, shards_per_client=2)


@pytest.mark.parametrize("alpha", [0.1, 0.5, 100.0])
def test_dirichlet_gives_everybody_something(alpha: float) -> None:
    label = labels_of(100)
    parts = dirichlet(label, 8, alpha=alpha)
    assert_disjoint(parts, len(label))
    assert sum(map(len, parts)) == len(label)
    assert min(map(len, parts)) >= 10


def test_small_alpha_is_more_skewed() -> None:
    label = labels_of(200)
    skew = [np.std(class_counts(label, dirichlet(label, 10, alpha=alpha), 10), axis=0).mean() for alpha in (0.1, 10.0)]
    assert skew[0] > 3 * skew[1]


def test_dirichlet_that_cannot_be_is_refused() -> None:
    with pytest.raises(ConfigError, match="at least 10"):
        dirichlet(labels_of(5), 8, alpha=0.5)


def test_iid_parts_are_equal_and_leave_less_than_one_item_a_client() -> None:
    parts = iid(labels_of(10), 7)
    assert {len(part) for part in parts} == {14}
    assert_disjoint(parts, 100)


def test_sharding_max_gives_every_client_its_shards() -> None:
    label = labels_of(60)
    parts = sharding_max(label, 6, shards_per_client=3)
    assert_disjoint(parts, 600)
    assert ((class_counts(label, parts, 10) > 0).sum(1) <= 3).all()


def test_partitions_leave_the_global_generators_alone() -> None:
    random.seed(0)
    np.random.seed(0)
    before = random.getstate(), np.random.get_state()[1].tolist()
    sharding(labels_of(20), 10, shards_per_client=2)
    dirichlet(labels_of(40), 4, alpha=0.5)
    assert (random.getstate(), np.random.get_state()[1].tolist()) == before
