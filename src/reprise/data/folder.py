"""Data sets too large for memory: items are read and augmented by workers, still as pure functions of (seed, step).

A training batch of step t has the items `step_indices(N, B, seed, t)`; each item's augmentation is seeded by
(seed, step, index). So, as with `StepLoader`, a run can start at any step, on any number of ranks and workers.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from reprise.data.loader import Batch, EvalLoader, StepLoader, step_indices
from reprise.data.module import DataModule
from reprise.errors import ConfigError
from reprise.seeding import derive

Sample = dict[str, Any]


class ItemSource(Protocol):
    """A random-access collection of single items on disk."""

    def __len__(self) -> int: ...

    def item(self, index: int, augment: bool) -> Sample:
        """One item; with `augment`, randomly changed by torch's global generator (the caller seeds it)."""
        ...


Collate = Callable[[list[Sample]], Batch]


def stack(samples: list[Sample]) -> Batch:
    """A batch of samples whose fields are tensors of one shape or ints."""
    return {name: torch.stack([torch.as_tensor(sample[name]) for sample in samples]) for name in samples[0]}


def seeded_item(source: ItemSource, index: int, seed: int | None) -> Sample:
    """An item, augmented from its own seed (None: not augmented); the caller's random state is left alone."""
    if seed is None:
        return {"index": index, **source.item(index, augment=False)}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return {"index": index, **source.item(index, augment=True)}


@dataclass
class FolderSource:
    """An `ItemSource` as a `Source`: whole batches, not augmented, read in this process."""

    items: ItemSource
    collate: Collate = stack
    limit: int | None = None

    def __len__(self) -> int:
        return len(self.items) if self.limit is None else min(self.limit, len(self.items))

    def fetch(self, index: Tensor) -> Batch:
        return self.collate([seeded_item(self.items, int(position), None) for position in index])


class _Requests(Dataset[Sample]):
    """What workers see: a request (index, seed) to an item."""

    def __init__(self, items: ItemSource) -> None:
        self.items = items

    def __getitem__(self, request: tuple[int, int | None]) -> Sample:
        return seeded_item(self.items, *request)


@dataclass
class StepRequests:
    """This rank's requests for the batches of steps `start .. steps-1`: a batch sampler without a state."""

    count: int
    batch_size: int
    steps: int
    seed: int
    start: int = 0
    rank: int = 0
    world: int = 1

    def __len__(self) -> int:
        return self.steps - self.start

    def __iter__(self) -> Iterator[list[tuple[int, int | None]]]:
        part = self.batch_size // self.world
        for step in range(self.start, self.steps):
            index = step_indices(self.count, self.batch_size, self.seed, step)
            mine = index[self.rank * part : (self.rank + 1) * part].tolist()
            yield [(item, derive(self.seed, "augment", step, item)) for item in mine]


@dataclass
class FolderLoader(StepLoader):
    """`StepLoader` for a `FolderSource`, with worker processes; the same batches whatever their number."""

    source: FolderSource
    workers: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.transform is not None:
            raise ConfigError("folder data is augmented item by item, not by a batch transform", looked_at="data")

    def __iter__(self) -> Iterator[Batch]:
        requests = StepRequests(
            len(self.source), self.batch_size, self.steps, self.seed, self.start, self.rank, self.world
        )
        return iter(_torch_loader(self.source, requests, self.workers))

    def batch(self, step: int) -> Batch:
        requests = StepRequests(len(self.source), self.batch_size, step + 1, self.seed, step, self.rank, self.world)
        return self.source.collate([seeded_item(self.source.items, *request) for request in next(iter(requests))])


@dataclass
class FolderEvalLoader(EvalLoader):
    """`EvalLoader` for a `FolderSource`, with worker processes: every item once, in order, without augmentation."""

    source: FolderSource
    workers: int = 0

    def __iter__(self) -> Iterator[Batch]:
        requests = [[(item, None) for item in batch.tolist()] for batch in self._batches()]
        return iter(_torch_loader(self.source, requests, self.workers))


def _torch_loader(source: FolderSource, requests: Any, workers: int) -> DataLoader[Sample]:
    return DataLoader(
        _Requests(source.items),
        batch_sampler=requests,
        num_workers=workers,
        collate_fn=source.collate,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator().manual_seed(0),  # its own, so that the global one is not advanced
    )


class FolderDataModule(DataModule):
    """A data module over items on disk.

    Args:
        workers: processes that read and augment, for each rank (0: in the training process).
    """

    def __init__(self, *, workers: int = 0, **common: Any) -> None:
        super().__init__(**common)
        if workers < 0:
            raise ConfigError(f"{workers} workers", looked_at="data.workers")
        self.workers = workers

    @abstractmethod
    def build_source(self, split: str) -> FolderSource: ...

    def source(self, split: str) -> FolderSource:
        if split not in self._sources:
            self._sources[split] = self.build_source(split)
        found = self._sources[split]
        assert isinstance(found, FolderSource)
        return found

    def train_dataloader(self) -> FolderLoader:
        rank, world = self._rank_and_world()
        return FolderLoader(
            self.source("train"),
            self.batch_size,
            self.steps,
            self.seed,
            start=self.start_step,
            rank=rank,
            world=world,
            workers=self.workers,
        )

    def val_dataloader(self) -> FolderEvalLoader:
        return self._folder_eval_loader("val")

    def test_dataloader(self) -> FolderEvalLoader:
        return self._folder_eval_loader("test")

    def _folder_eval_loader(self, split: str) -> FolderEvalLoader:
        return FolderEvalLoader(self.source(split), self.eval_batch_size, *self._rank_and_world(), workers=self.workers)


def subset(items: ItemSource, chosen: Sequence[int]) -> ItemSource:
    """Some items of a source, in the given order."""
    return _Subset(items, list(chosen))


@dataclass
class _Subset:
    items: ItemSource
    chosen: list[int]

    def __len__(self) -> int:
        return len(self.chosen)

    def item(self, index: int, augment: bool) -> Sample:
        return self.items.item(self.chosen[index], augment)
