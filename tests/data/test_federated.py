"""Rounds as batches: pure in their number, complete over any number of ranks."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch

from reprise.data.digits import Digits
from reprise.data.federated import Federated, RoundLoader, minibatch_sizes, sample_clients
from reprise.data.partition import sharding
from reprise.errors import ConfigError


def make(shift: int = 0, **changes: Any) -> Federated:
    base = Digits(sizes=[400, 100, 100], shift=shift, batch_size=1, steps=1)
    options: dict[str, Any] = {
        "num_clients": 10,
        "sample_ratio": 0.3,
        "local_epochs": 2,
        "batch_size": 16,
        "steps": 5,
        "seed": 3,
    }
    return Federated(base=base, partition=partial(sharding, shards_per_client=2), **{**options, **changes})


def loader(data: Federated, rank: int = 0, world: int = 1) -> RoundLoader:
    made = data.train_dataloader()
    made.rank, made.world = rank, world
    return made


def test_clients_depend_on_the_round_alone() -> None:
    assert sample_clients(100, 0.1, 3).tolist() == sample_clients(100, 0.1, 3).tolist()
    assert len(sample_clients(100, 0.1, 3)) == 10
    assert len(sample_clients(10, 0.01, 0)) == 1
    first, second = (loader(make(seed=seed)).batch(2) for seed in (3, 4))
    assert torch.equal(first["clients"], second["clients"])
    assert not torch.equal(first["local"][0]["order"], second["local"][0]["order"])


def test_a_round_visits_every_item_of_a_client_once_an_epoch() -> None:
    data = make()
    for client in loader(data).batch(1)["local"]:
        items = data.parts()[client["client"]]
        assert torch.equal(client["index"], items)
        epochs = client["order"].view(2, -1)
        assert (epochs.sort(1).values == torch.arange(len(items))).all()
        assert not torch.equal(epochs[0], epochs[1])
        assert sum(client["splits"]) == len(client["order"])
        assert client["splits"] == minibatch_sizes(len(items), 16, 2)


def test_augmented_visits_have_rows_of_their_own() -> None:
    client = loader(make(shift=1)).batch(0)["local"][0]
    assert len(client["image"]) == len(client["order"]) == 2 * client["size"]
    plain = loader(make(shift=1, augment=False)).batch(0)["local"][0]
    assert len(plain["image"]) == plain["size"]


@pytest.mark.parametrize("world", [1, 2, 3, 5])
def test_ranks_share_the_clients_of_a_round(world: int) -> None:
    data = make(shift=1)
    whole = loader(data).batch(4)
    parts = [loader(data, rank, world).batch(4) for rank in range(world)]
    for part in parts:
        assert torch.equal(part["clients"], whole["clients"])
        assert torch.equal(part["sizes"], whole["sizes"])
        assert torch.equal(part["steps"], whole["steps"])
    local = sorted((client for part in parts for client in part["local"]), key=lambda client: client["slot"])
    assert [client["slot"] for client in local] == [0, 1, 2]
    for mine, theirs in zip(local, whole["local"], strict=True):
        assert torch.equal(mine["image"], theirs["image"])
        assert torch.equal(mine["order"], theirs["order"])


def test_a_loader_starts_anywhere() -> None:
    data = make(shift=1)
    data.start_step = 3
    batches = list(data.train_dataloader())
    assert [batch["round"] for batch in batches] == [3, 4]
    assert torch.equal(batches[0]["local"][0]["image"], loader(data).batch(3)["local"][0]["image"])


def test_limit_cuts_clients_and_held_out_items() -> None:
    data = make(limit=7)
    assert {len(part) for part in data.parts()} == {7}
    assert len(data.source("val")) == data.spec.sizes["val"] == 7
    assert int(data.counts().sum()) == 70


def test_a_round_without_clients_is_refused() -> None:
    with pytest.raises(ConfigError, match="no rounds"):
        make(sample_ratio=0.0)
