"""Who holds which data: partitions of labelled items over the clients of federated learning.

Each function takes labels int [N] (class numbers 0 .. C-1) and returns one index array per client. They draw from
Python's and NumPy's legacy generators seeded by `seed`, in the order of the FedNTD release, so its splits are
reproduced exactly; nothing is drawn from the global generators.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

from reprise.errors import ConfigError

IntArray = npt.NDArray[np.int64]

PUBLISHED_SEED = 19940817  # the release seeds every partition with this, apart from the seed of the model
MAX_REDRAWS = 2000


class Partition(Protocol):
    """A rule that deals items out: labels int [N] and a number of clients to the item indices of each client."""

    def __call__(self, labels: npt.ArrayLike, num_clients: int) -> list[IntArray]: ...


def iid(labels: npt.ArrayLike, num_clients: int, *, seed: int = PUBLISHED_SEED) -> list[IntArray]:
    """Equal parts at random; the items left over (fewer than `num_clients`) stay unused."""
    rng = np.random.RandomState(seed)
    rest = np.arange(len(np.asarray(labels)))
    size = len(rest) // num_clients
    parts = []
    for _ in range(num_clients):
        rng.shuffle(rest)
        parts.append(rest[:size].copy())
        rest = rest[size:]
    return parts


def sharding(
    labels: npt.ArrayLike, num_clients: int, *, shards_per_client: int, seed: int = PUBLISHED_SEED
) -> list[IntArray]:
    """Every client gets `shards_per_client` shards of one class each (possibly the same class twice).

    Every class is cut into shards_per_client * num_clients / C equal shards.

    Raises:
        ConfigError: the shards cannot be dealt evenly over the classes.
    """
    num_classes = len(np.unique(np.asarray(labels)))
    classes = draw_shard_classes(num_classes, num_clients, shards_per_client, random.Random(seed))
    return deal_shards(labels, classes, np.random.RandomState(seed))


def draw_shard_classes(num_classes: int, num_clients: int, shards_per_client: int, rng: random.Random) -> IntArray:
    """The class of every shard of every client, int64 [num_clients, shards_per_client].

    Raises:
        ConfigError: shards_per_client * num_clients is not a multiple of the number of classes.
    """
    shards_per_class, rest = divmod(shards_per_client * num_clients, num_classes)
    if rest or not shards_per_class:
        raise ConfigError(
            f"{num_clients} clients x {shards_per_client} shards cannot be dealt evenly over {num_classes} classes",
            looked_at="data.partition.shards_per_client and data.num_clients",
            next_step=f"make their product a multiple of {num_classes}",
        )
    classes = list(range(num_classes)) * shards_per_class
    rng.shuffle(classes)
    return np.array(classes).reshape(num_clients, shards_per_client)


def deal_shards(labels: npt.ArrayLike, shard_classes: IntArray, rng: np.random.RandomState) -> list[IntArray]:
    """Give each client one random remaining shard for each of its classes.

    The left-over items of a class go to its first shards, one each. With the same `shard_classes` the test items can be
    dealt like the training items.
    """
    label = np.asarray(labels)
    shards = {
        value: _shards_of(np.flatnonzero(label == value), int((shard_classes == value).sum()))
        for value in np.unique(shard_classes).tolist()
    }
    parts = []
    for classes in shard_classes.tolist():
        drawn = [shards[value].pop(rng.choice(len(shards[value]), replace=False)) for value in classes]
        parts.append(np.concatenate(drawn))
    return parts


def _shards_of(items: IntArray, count: int) -> list[IntArray]:
    size, rest = divmod(len(items), count)
    body, left_over = items[: len(items) - rest], items[len(items) - rest :]
    return [np.concatenate([body[i * size : (i + 1) * size], left_over[i : i + 1]]) for i in range(count)]


def dirichlet(
    labels: npt.ArrayLike, num_clients: int, *, alpha: float, min_items: int = 10, seed: int = PUBLISHED_SEED
) -> list[IntArray]:
    """LDA: the shares of each class over the clients are drawn from Dirichlet(alpha); small alpha is strong skew.

    A client that already holds N / num_clients items gets nothing of the next class. The whole draw is repeated until
    every client holds `min_items`.

    Raises:
        ConfigError: no draw gave every client `min_items`.
    """
    label, rng = np.asarray(labels), np.random.RandomState(seed)
    if min_items * num_clients > len(label):
        raise _too_few(len(label), num_clients, min_items, alpha)
    for _ in range(MAX_REDRAWS):
        parts = _dirichlet_draw(label, num_clients, alpha, rng)
        if min(map(len, parts)) >= min_items:
            break
    else:
        raise _too_few(len(label), num_clients, min_items, alpha)
    for part in parts:
        rng.shuffle(part)
    return [np.array(part, dtype=np.int64) for part in parts]


def _dirichlet_draw(label: IntArray, num_clients: int, alpha: float, rng: np.random.RandomState) -> list[list[int]]:
    parts: list[list[int]] = [[] for _ in range(num_clients)]
    fair = len(label) / num_clients
    for value in np.unique(label):
        items = np.flatnonzero(label == value)
        rng.shuffle(items)
        share = rng.dirichlet(np.repeat(alpha, num_clients))
        share = share * np.array([len(part) < fair for part in parts])
        cuts = (np.cumsum(share / share.sum()) * len(items)).astype(int)[:-1]
        for part, more in zip(parts, np.split(items, cuts), strict=True):
            part.extend(more.tolist())
    return parts


def _too_few(items: int, num_clients: int, min_items: int, alpha: float) -> ConfigError:
    return ConfigError(
        f"no Dirichlet({alpha}) draw of {items} items gives each of {num_clients} clients at least {min_items}",
        looked_at="data.partition.alpha, data.partition.min_items and data.num_clients",
        next_step="raise alpha, or lower min_items or the number of clients",
    )


def sharding_max(
    labels: npt.ArrayLike, num_clients: int, *, shards_per_client: int, seed: int = PUBLISHED_SEED
) -> list[IntArray]:
    """Shards of a fixed size, int(int(N / num_clients) / shards_per_client), of randomly drawn classes.

    Left-over items may stay unused.

    Raises:
        ConfigError: the shards run out.
    """
    label, rng = np.asarray(labels), np.random.RandomState(seed)
    size = len(label) // num_clients // shards_per_client
    values = np.unique(label)
    shards = {value: _shards_of_size(np.flatnonzero(label == value), size) for value in values.tolist()}
    if sum(map(len, shards.values())) < num_clients * shards_per_client:
        raise ConfigError(
            f"{len(label)} items do not give {num_clients} x {shards_per_client} shards of {size}",
            looked_at="data.partition",
            next_step="use fewer shards or clients",
        )
    parts = []
    for _ in range(num_clients):
        part = np.concatenate(_draw_shards(shards, values, shards_per_client, rng))
        rng.shuffle(part)
        parts.append(part)
    return parts


def _shards_of_size(items: IntArray, size: int) -> list[IntArray]:
    """Consecutive shards; a last one of at least half the size is kept."""
    shards = [items[:size]]
    rest = items[size:]
    while len(rest) and len(rest) >= size / 2:
        shards.append(rest[:size])
        rest = rest[size:]
    return shards


def _draw_shards(
    shards: dict[int, list[IntArray]], values: IntArray, count: int, rng: np.random.RandomState
) -> list[IntArray]:
    drawn: list[IntArray] = []
    while len(drawn) < count:
        left = shards[rng.choice(values, 1, replace=False)[0]]
        if left:
            drawn.append(left.pop(rng.choice(len(left), 1, replace=False)[0]))
    return drawn


def class_counts(labels: npt.ArrayLike, parts: Sequence[IntArray], num_classes: int) -> IntArray:
    """Items of each class at each client, int64 [num_clients, num_classes]."""
    label = np.asarray(labels)
    return np.stack([np.bincount(label[part], minlength=num_classes) for part in parts])
