"""Batches as pure functions of (seed, step): the reason why any run can continue exactly, on any number of ranks.

Items live in memory as tensors. A training batch for step `t` takes items `t*B .. (t+1)*B` from the endless row of
epoch permutations, each seeded by (seed, epoch); augmentation draws its numbers for the whole global batch from a
generator seeded by (seed, step), and each rank keeps its own consecutive part. No state is carried between steps.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from reprise.errors import ConfigError
from reprise.seeding import generator

Batch = dict[str, Any]


class Source(Protocol):
    """A random-access collection that returns whole batches."""

    def __len__(self) -> int: ...

    def fetch(self, index: Tensor) -> Batch:
        """The items at `index` (int64 [B]) as one batch of tensors (or, for ragged fields, lists)."""
        ...


class Transform(Protocol):
    """Random augmentation of a batch, split into drawing numbers and applying them.

    `draw` must return tensors whose first dimension is `count`; `apply` gets the rows that belong to its items.
    """

    def draw(self, count: int, rng: torch.Generator) -> dict[str, Tensor]: ...

    def apply(self, batch: Batch, params: Mapping[str, Tensor]) -> Batch: ...


class TrainLoader(Protocol):
    """One rank's training batches: functions of the step, served from the step where a run continues."""

    def __len__(self) -> int:
        """Steps of the whole run, also after a resume."""
        ...

    def __iter__(self) -> Iterator[Batch]: ...

    def batch(self, step: int) -> Batch: ...


class TensorSource:
    """Items held as equally long tensors, e.g. `TensorSource(image=images, label=labels)`; adds `index`."""

    def __init__(self, **fields: Tensor) -> None:
        lengths = {name: len(value) for name, value in fields.items()}
        if len(set(lengths.values())) != 1:
            raise ValueError(f"fields differ in length: {lengths}")
        self.fields = fields

    def __len__(self) -> int:
        return len(next(iter(self.fields.values())))

    def fetch(self, index: Tensor) -> Batch:
        return {"index": index, **{name: value[index] for name, value in self.fields.items()}}


def epoch_order(count: int, seed: int, epoch: int) -> Tensor:
    """The order of `count` items in one epoch, int64 [count]."""
    return torch.randperm(count, generator=generator(seed, "order", epoch))


def step_indices(count: int, batch_size: int, seed: int, step: int) -> Tensor:
    """Indices of the global batch of one step, int64 [batch_size]; batches run on across epoch borders."""
    first, last = step * batch_size, (step + 1) * batch_size - 1
    parts = []
    for epoch in range(first // count, last // count + 1):
        start, stop = max(first - epoch * count, 0), min(last + 1 - epoch * count, count)
        parts.append(_cached_order(count, seed, epoch)[start:stop])
    return torch.cat(parts)


_orders: dict[tuple[int, int, int], Tensor] = {}


def _cached_order(count: int, seed: int, epoch: int) -> Tensor:
    key = (count, seed, epoch)
    if key not in _orders:
        if len(_orders) > 8:
            _orders.pop(next(iter(_orders)))
        _orders[key] = epoch_order(count, seed, epoch)
    return _orders[key]


@dataclass
class StepLoader:
    """Training batches for steps `start .. steps-1` of one rank.

    Args:
        source: the training items.
        batch_size: the GLOBAL batch size; each of `world` ranks gets `batch_size / world` items.
        steps: number of steps of the whole run (the length, also after a resume).
        seed: of the data order and the augmentation.
        start: first step to deliver.
        transform: augmentation, or None.
    """

    source: Source
    batch_size: int
    steps: int
    seed: int
    start: int = 0
    rank: int = 0
    world: int = 1
    transform: Transform | None = None

    def __post_init__(self) -> None:
        if self.batch_size % self.world:
            raise ConfigError(
                f"a global batch of {self.batch_size} cannot be split evenly over {self.world} ranks",
                looked_at="data.batch_size",
                next_step="choose a batch size that the number of ranks divides, or other devices",
            )

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[Batch]:
        for step in range(self.start, self.steps):
            yield self.batch(step)

    def indices(self, step: int) -> Tensor:
        """Items of the global batch of `step`, int64 [batch_size]."""
        return step_indices(len(self.source), self.batch_size, self.seed, step)

    def batch(self, step: int) -> Batch:
        """This rank's part of the batch of `step`."""
        part = self.batch_size // self.world
        mine = slice(self.rank * part, (self.rank + 1) * part)
        batch = self.source.fetch(self.indices(step)[mine])
        if self.transform is None:
            return batch
        params = self.transform.draw(self.batch_size, generator(self.seed, "augment", step))
        return self.transform.apply(batch, {name: value[mine] for name, value in params.items()})


@dataclass
class EvalLoader:
    """Every item once, in order; rank r of w gets items r, r+w, ... (so parts may differ in length by one).

    All ranks have equally many batches, as a model that is divided over them (FSDP) needs; not so where a batch is one
    item and the ranks do not divide the items.
    """

    source: Source
    batch_size: int
    rank: int = 0
    world: int = 1

    def _batches(self) -> list[Tensor]:
        """The items of each batch of this rank; one more than the last full ones where the first rank has one more."""
        mine = torch.arange(self.rank, len(self.source), self.world)
        batches = list(mine.split(self.batch_size))
        if len(batches) < self._most_batches() and len(batches[-1]) > 1:
            batches[-1:] = batches[-1].tensor_split(2)
        return batches

    def _most_batches(self) -> int:
        return -(-len(range(0, len(self.source), self.world)) // self.batch_size)

    def __len__(self) -> int:
        return len(self._batches())

    def __iter__(self) -> Iterator[Batch]:
        for index in self._batches():
            yield self.source.fetch(index)
