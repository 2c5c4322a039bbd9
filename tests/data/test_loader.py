"""Batches are functions of (seed, step): complete epochs, ranks that share a global batch, resumable at any step."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from reprise.data.loader import Batch, EvalLoader, StepLoader, TensorSource, step_indices
from reprise.errors import ConfigError


class AddNoise:
    """A transform whose numbers are one per item."""

    def draw(self, count: int, rng: torch.Generator) -> dict[str, Tensor]:
        return {"noise": torch.rand(count, generator=rng)}

    def apply(self, batch: Batch, params: Mapping[str, Tensor]) -> Batch:
        return {**batch, "value": batch["value"] + params["noise"]}


def source(count: int) -> TensorSource:
    return TensorSource(value=torch.arange(count, dtype=torch.float32))


@settings(max_examples=50, deadline=None)
@given(count=st.integers(1, 40), batch=st.integers(1, 50), seed=st.integers(0, 5))
def test_every_epoch_holds_every_item_once(count: int, batch: int, seed: int) -> None:
    steps = -(-3 * count // batch)
    row = torch.cat([step_indices(count, batch, seed, step) for step in range(steps)])
    for epoch in range(3):
        assert sorted(row[epoch * count : (epoch + 1) * count].tolist()) == list(range(count))


@settings(max_examples=25, deadline=None)
@given(world=st.sampled_from([1, 2, 3, 6]), step=st.integers(0, 20))
def test_ranks_share_the_global_batch(world: int, step: int) -> None:
    whole = StepLoader(source(17), 12, 21, seed=1, transform=AddNoise()).batch(step)
    parts = [
        StepLoader(source(17), 12, 21, seed=1, rank=rank, world=world, transform=AddNoise()).batch(step)
        for rank in range(world)
    ]
    for name in ("index", "value"):
        assert torch.equal(torch.cat([part[name] for part in parts]), whole[name])


def test_a_later_start_gives_the_same_batches() -> None:
    whole = list(StepLoader(source(10), 4, 9, seed=3, transform=AddNoise()))
    rest = list(StepLoader(source(10), 4, 9, seed=3, start=5, transform=AddNoise()))
    assert len(rest) == 4
    assert all(torch.equal(a["value"], b["value"]) for a, b in zip(whole[5:], rest, strict=True))


def test_seeds_give_other_orders() -> None:
    assert not torch.equal(step_indices(100, 50, 0, 0), step_indices(100, 50, 1, 0))


def test_an_uneven_split_is_refused() -> None:
    with pytest.raises(ConfigError, match="cannot be split evenly over 2 ranks"):
        StepLoader(source(10), 5, 1, seed=0, world=2)


@pytest.mark.parametrize("world", [1, 2, 3])
def test_evaluation_sees_every_item_once(world: int) -> None:
    loaders = [EvalLoader(source(10), 3, rank, world) for rank in range(world)]
    seen = [int(i) for loader in loaders for batch in loader for i in batch["index"]]
    assert sorted(seen) == list(range(10))
    assert all(len(list(loader)) == len(loader) for loader in loaders)


def test_fields_of_unequal_length_are_refused() -> None:
    with pytest.raises(ValueError, match="differ in length"):
        TensorSource(a=torch.zeros(3), b=torch.zeros(4))
