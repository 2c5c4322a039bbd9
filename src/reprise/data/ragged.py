"""Sequences of unequal length: ragged arrays, padded batches of pairs, and batches of about equal token counts.

Batches: `source` int64 [B, S] and `target` int64 [B, T], padded with 0 after the end, and `index` int64 [B].
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from reprise.data.loader import Batch
from reprise.seeding import generator

PAD = 0

IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Ragged:
    """Sequences of unequal length in one array: sequence i is `flat[offsets[i] : offsets[i + 1]]`."""

    flat: Tensor
    offsets: Tensor

    @classmethod
    def of(cls, sequences: Sequence[Sequence[int]]) -> Ragged:
        return cls(*map(torch.from_numpy, ragged_arrays([sequences])))

    @property
    def lengths(self) -> Tensor:
        return self.offsets[1:] - self.offsets[:-1]

    def padded(self, index: Tensor) -> Tensor:
        """The sequences at `index` int64 [B] as int64 [B, L], padded with 0 to the longest of them."""
        start, length = self.offsets[index], (self.offsets[index + 1] - self.offsets[index])
        place = torch.arange(int(length.max()))
        inside = place < length.unsqueeze(1)
        found = self.flat[torch.where(inside, start.unsqueeze(1) + place, 0)].long()
        return found.masked_fill_(~inside, PAD)


def ragged_arrays(chunks: Iterable[Sequence[Sequence[int]]]) -> tuple[npt.NDArray[np.int32], IntArray]:
    """(flat int32, offsets int64 [N + 1]) of sequences that come in chunks."""
    parts: list[npt.NDArray[np.int32]] = []
    lengths: list[npt.NDArray[np.int64]] = []
    for chunk in chunks:
        lengths.append(np.fromiter(map(len, chunk), np.int64, len(chunk)))
        parts.append(np.fromiter((number for item in chunk for number in item), np.int32, int(lengths[-1].sum())))
    offsets = np.concatenate([np.zeros(1, np.int64), *lengths]).cumsum()
    return np.concatenate([np.zeros(0, np.int32), *parts]), offsets


class ParallelSource:
    """Pairs of sequences as padded batches.

    Args:
        source, target: the two sides, pair i in both.
        rows: which pairs, in which order; `index` of a batch is the number of the pair.
        fields: further tensors with an entry a pair.
    """

    def __init__(self, source: Ragged, target: Ragged, rows: Tensor | None = None, **fields: Tensor) -> None:
        self.source, self.target, self.fields = source, target, fields
        self.rows = torch.arange(len(source.lengths)) if rows is None else rows

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def lengths(self) -> tuple[Tensor, Tensor]:
        """Tokens of source and target of each item, end symbols included."""
        return self.source.lengths[self.rows], self.target.lengths[self.rows]

    def fetch(self, index: Tensor) -> Batch:
        rows = self.rows[index]
        batch: Batch = {"index": rows, "source": self.source.padded(rows), "target": self.target.padded(rows)}
        return batch | {name: value[rows] for name, value in self.fields.items()}


def bucket_borders(longest: Tensor, tokens: int) -> list[int]:
    """Where batches begin and end among items sorted by length, so that items * longest item <= tokens.

    Args:
        longest: int64 [N], not decreasing: the longer side of each pair.

    Returns:
        0, ..., N. An item that is longer than `tokens` is a batch of its own.
    """
    values, borders = longest.numpy(), [0]
    while (first := borders[-1]) < len(values):
        low, high = 1, max(1, min(tokens // max(int(values[first]), 1), len(values) - first))
        while low < high:  # the largest count whose last item still fits
            middle = (low + high + 1) // 2
            low, high = (middle, high) if middle * int(values[first + middle - 1]) <= tokens else (low, middle - 1)
        borders.append(first + low)
    return borders


@dataclass
class BucketLoader:
    """Training batches of pairs of like length with about equally many tokens, as functions of (seed, step).

    Pairs are sorted by the length of the longer side, then by that of the target, in random order among equals; cut
    into batches of at most `tokens` padded tokens on either side; and the batches are served in random order. The cuts
    depend on the lengths alone, so every epoch has the same number of batches and step t is batch t mod that number.

    A rank gets every `world`-th pair of a batch. Where a batch has fewer pairs than ranks, the others get its first
    pair with an empty target, which counts nothing.
    """

    source: ParallelSource
    tokens: int
    steps: int
    seed: int
    start: int = 0
    rank: int = 0
    world: int = 1
    _orders: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict, repr=False)

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[Batch]:
        for step in range(self.start, self.steps):
            yield self.batch(step)

    @cached_property
    def borders(self) -> list[int]:
        """Where the batches of an epoch begin and end."""
        lengths = torch.maximum(*self.source.lengths)
        return bucket_borders(lengths.sort().values, self.tokens)

    @property
    def batches_per_epoch(self) -> int:
        return len(self.borders) - 1

    def batch(self, step: int) -> Batch:
        """This rank's part of the batch of `step`."""
        epoch, position = divmod(step, self.batches_per_epoch)
        items, batches = self._order(epoch)
        number = int(batches[position])
        index = items[self.borders[number] : self.borders[number + 1]]
        if self.rank < len(index):
            return self.source.fetch(index[self.rank :: self.world])
        batch = self.source.fetch(index[:1])
        return batch | {"target": torch.full_like(batch["target"], PAD)}

    def _order(self, epoch: int) -> tuple[Tensor, Tensor]:
        """The sorted items and the order of the batches in an epoch."""
        if epoch not in self._orders:
            self._orders.clear()
            source, target = self.source.lengths
            draw = generator(self.seed, "order", epoch)
            shuffled = torch.randperm(len(source), generator=draw)
            keys = (shuffled.numpy(), target.numpy(), torch.maximum(source, target).numpy())
            batches = torch.randperm(self.batches_per_epoch, generator=draw)
            self._orders[epoch] = torch.from_numpy(np.lexsort(keys)), batches
        return self._orders[epoch]


def by_length(source: Ragged, target: Ragged, limit: int | None) -> Tensor:
    """The first `limit` pairs in order of their lengths: batches of an evaluation then need little padding."""
    longest = torch.maximum(source.lengths, target.lengths)[:limit]
    return longest.argsort(stable=True)
