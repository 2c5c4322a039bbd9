"""Federated data: any data module's training items dealt out to clients; the training batch of a step is one round.

A round is a pure function of its number: the clients are sampled by NumPy's legacy generator seeded with the round (so
every method sees the same clients, whatever its seed), and a client's local order and augmentation are seeded by
(seed, round, client).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from reprise.data.loader import Batch, Source, Transform
from reprise.data.module import DataModule
from reprise.data.partition import IntArray, Partition, class_counts
from reprise.data.spec import DataSpec
from reprise.errors import ConfigError
from reprise.seeding import generator


def sample_clients(num_clients: int, ratio: float, round_index: int) -> IntArray:
    """max(int(ratio * K), 1) distinct clients of one round, int64, in the order drawn."""
    rng = np.random.RandomState(round_index)
    return rng.choice(num_clients, max(int(num_clients * ratio), 1), replace=False)


def labels_of(source: Source, chunk: int = 2000) -> Tensor:
    """The label of every item, int64 [N]."""
    return torch.cat([source.fetch(index)["label"] for index in torch.arange(len(source)).split(chunk)])


def minibatch_sizes(items: int, batch_size: int, epochs: int) -> list[int]:
    """Lengths of a client's successive mini-batches; the last one of each epoch may be smaller."""
    full, rest = divmod(items, batch_size)
    return ([batch_size] * full + [rest] * (rest > 0)) * epochs


@dataclass
class RoundLoader:
    """Communication rounds `start .. steps-1` as one rank sees them.

    A batch holds, equal on all ranks, `round` (int), `sample_ratio` (float) and for the S sampled clients `clients`,
    `sizes` (items) and `steps` (local mini-batches), int64 [S]; and under `local` this rank's clients, slots rank, rank
    + world, ... of `clients` (so any number of ranks works, and a rank may have none). A client is a dict: `slot`,
    `client`, `size` (ints); `image` [U, C, H, W], `label` [U] and `index` [U], its items; `order` int64 [V], the rows
    of all its visits, epoch after epoch; `splits`, the lengths of the mini-batches that `order` is cut into. With
    augmentation every visit has its own row (U = V), otherwise U is the client's number of items. `index` at the top is
    all of this rank's item indices.

    Args:
        source: the training items.
        parts: item indices of every client.
        batch_size, epochs: of a client's local training.
        steps: rounds of the whole run.
        seed: of local order and augmentation.
    """

    source: Source
    parts: list[Tensor]
    batch_size: int
    epochs: int
    sample_ratio: float
    steps: int
    seed: int
    start: int = 0
    rank: int = 0
    world: int = 1
    transform: Transform | None = None

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[Batch]:
        for step in range(self.start, self.steps):
            yield self.batch(step)

    def batch(self, step: int) -> Batch:
        """The round `step`, with the data of this rank's clients."""
        clients = sample_clients(len(self.parts), self.sample_ratio, step)
        sizes = [len(self.parts[client]) for client in clients]
        mine = range(self.rank, len(clients), self.world)
        local = [self.client(step, slot, int(clients[slot])) for slot in mine]
        steps = [len(minibatch_sizes(size, self.batch_size, self.epochs)) for size in sizes]
        index = [part["index"] for part in local]
        return {
            "round": step,
            "sample_ratio": self.sample_ratio,
            "clients": torch.from_numpy(clients),
            "sizes": torch.tensor(sizes),
            "steps": torch.tensor(steps),
            "local": local,
            "index": torch.cat(index) if index else torch.empty(0, dtype=torch.int64),
        }

    def client(self, step: int, slot: int, client: int) -> Batch:
        """One client's items, and its mini-batches in the round `step`."""
        items = self.parts[client]
        rng = generator(self.seed, "client", step, client)
        order = torch.cat([torch.randperm(len(items), generator=rng) for _ in range(self.epochs)])
        if self.transform is not None:
            batch = self.source.fetch(items[order])
            batch = self.transform.apply(batch, self.transform.draw(len(order), rng))
            order = torch.arange(len(order))
        else:
            batch = self.source.fetch(items)
        own = {name: batch[name] for name in ("image", "label", "index")}
        splits = minibatch_sizes(len(items), self.batch_size, self.epochs)
        return {"slot": slot, "client": client, "size": len(items), "order": order, "splits": splits, **own}


class Federated(DataModule):
    """A base data module whose training items are held by clients.

    Args:
        base: says the items; its batch size, steps and seed are not used.
        partition: deals the training items out.
        num_clients: K.
        sample_ratio: share of the clients that take part in a round.
        local_epochs: passes of a sampled client over its items.
        batch_size: of a client's LOCAL mini-batches (a round has one model per client, so there is no global batch).
        steps: communication rounds of the run.
        augment: whether the base's training augmentation is applied.
        limit: at most this many items of each CLIENT and of the evaluation splits.

    Raises:
        ConfigError: a share or a number that makes no round.
    """

    def __init__(
        self,
        *,
        base: DataModule,
        partition: Partition,
        num_clients: int,
        sample_ratio: float,
        local_epochs: int,
        batch_size: int,
        steps: int,
        seed: int = 0,
        augment: bool = True,
        eval_batch_size: int = 500,
        limit: int | None = None,
    ) -> None:
        super().__init__(batch_size=batch_size, steps=steps, seed=seed, eval_batch_size=eval_batch_size, limit=limit)
        if num_clients < 1 or local_epochs < 1 or not 0 < sample_ratio <= 1:
            raise ConfigError(
                f"no rounds with {num_clients} clients, a ratio of {sample_ratio} and {local_epochs} local epochs",
                looked_at="data.num_clients, data.sample_ratio, data.local_epochs",
                next_step="use at least one client and one epoch, and a ratio in (0, 1]",
            )
        self.base = base
        self.partition = partition
        self.num_clients = num_clients
        self.sample_ratio = sample_ratio
        self.local_epochs = local_epochs
        self.augment = augment
        self._parts: list[Tensor] | None = None

    @property
    def spec(self) -> DataSpec:
        spec = self.base.spec
        if self.limit is None:
            return spec
        held_out = {split: min(size, self.limit) for split, size in spec.sizes.items() if split != "train"}
        return replace(spec, sizes={**spec.sizes, **held_out})

    @property
    def examples_per_step(self) -> int:
        clients = max(int(self.sample_ratio * self.num_clients), 1)
        return clients * self.local_epochs * (self.spec.sizes["train"] // self.num_clients)

    def build_source(self, split: str) -> Source:
        source = self.base.source(split)
        return source if split == "train" or self.limit is None else Head(source, self.limit)

    def train_transform(self) -> Transform | None:
        return self.base.train_transform() if self.augment else None

    def parts(self) -> list[Tensor]:
        """The item indices of every client, built once."""
        if self._parts is None:
            labels = labels_of(self.source("train")).numpy()
            dealt = self.partition(labels, self.num_clients)
            self._parts = [torch.from_numpy(np.asarray(part, dtype=np.int64))[: self.limit] for part in dealt]
        return self._parts

    def counts(self) -> Tensor:
        """Training items of each class at each client, int64 [num_clients, num_classes]."""
        labels = labels_of(self.source("train")).numpy()
        parts = [part.numpy() for part in self.parts()]
        return torch.from_numpy(class_counts(labels, parts, self.spec.num_classes))

    def train_dataloader(self) -> RoundLoader:
        rank, world = self._rank_and_world()
        return RoundLoader(
            self.source("train"),
            self.parts(),
            self.batch_size,
            self.local_epochs,
            self.sample_ratio,
            self.steps,
            self.seed,
            start=self.start_step,
            rank=rank,
            world=world,
            transform=self.train_transform(),
        )


@dataclass
class Head:
    """The first `count` items of a source."""

    source: Source
    count: int

    def __len__(self) -> int:
        return min(self.count, len(self.source))

    def fetch(self, index: Tensor) -> Batch:
        return self.source.fetch(index)
