"""Vocabularies, ragged arrays, token buckets, the made-up sequences and parallel files, damaged ones too."""

from __future__ import annotations

import gzip
import os
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from reprise.data.multi30k import Multi30k
from reprise.data.ragged import BucketLoader, ParallelSource, Ragged, bucket_borders
from reprise.data.sequences import Sequences, transduce
from reprise.data.text import END, SPECIAL, Vocabulary, until_end
from reprise.data.wmt14 import WMT14
from reprise.errors import ConfigError, DataError

LINES = ["Ein Mann fährt Rad.", "A man rides a bike.", "Zwei Hunde; größer als Katzen!", "Two dogs  with spaces"] * 5


def test_vocabulary_gives_the_text_back_and_is_the_same_every_time() -> None:
    vocabulary = Vocabulary.learn(LINES, 120)
    again = Vocabulary.from_array(Vocabulary.learn(LINES, 120).to_array())
    for line, ids in zip(LINES, vocabulary.encode(LINES), strict=True):
        assert ids[-1] == END
        assert vocabulary.decode(ids) == line
    assert again.encode(LINES) == vocabulary.encode(LINES)
    assert [vocabulary.tokenizer.id_to_token(number) for number in range(3)] == list(SPECIAL)
    assert len(vocabulary) <= 120
    assert len(vocabulary.symbols(vocabulary.encode(LINES)[0])) == len(vocabulary.encode(LINES)[0]) - 1


def test_until_end_stops_at_end_and_padding() -> None:
    assert until_end([5, 6, 1, 7]) == [5, 6]
    assert until_end([5, 0, 7]) == [5]


def pairs(count: int = 200) -> ParallelSource:
    torch.manual_seed(1)
    lengths = torch.randint(1, 30, (2, count)).tolist()
    sides = [Ragged.of([[number + 2] * length for number, length in enumerate(side)]) for side in lengths]
    return ParallelSource(*sides)


def test_ragged_padding() -> None:
    ragged = Ragged.of([[5, 6, 1], [7, 1], [1]])
    assert ragged.padded(torch.tensor([1, 0])).tolist() == [[7, 1, 0], [5, 6, 1]]
    assert ragged.padded(torch.tensor([2])).tolist() == [[1]]


def test_borders_are_greedy() -> None:
    longest = torch.tensor([1, 1, 2, 3, 3, 3, 8, 20])
    borders = bucket_borders(longest, 8)
    assert borders[-1] == 8
    for first, last in pairwise(borders):
        count = last - first
        assert count == 1 or count * int(longest[last - 1]) <= 8
        if last < len(longest):
            assert (count + 1) * int(longest[last]) > 8


def test_an_epoch_of_buckets_has_every_pair_once() -> None:
    loader = BucketLoader(pairs(), tokens=120, steps=1000, seed=3)
    for epoch in range(2):
        steps = range(epoch * loader.batches_per_epoch, (epoch + 1) * loader.batches_per_epoch)
        batches = [loader.batch(step) for step in steps]
        assert sorted(torch.cat([batch["index"] for batch in batches]).tolist()) == list(range(200))
        for batch in batches:
            assert batch["source"].numel() <= 120
            assert batch["target"].numel() <= 120


def test_buckets_are_functions_of_seed_and_step() -> None:
    one, other = (BucketLoader(pairs(), tokens=120, steps=50, seed=3) for _ in range(2))
    order = [other.batch(step)["index"].tolist() for step in reversed(range(50))][::-1]
    assert [batch["index"].tolist() for batch in one] == order
    resumed = BucketLoader(pairs(), tokens=120, steps=50, seed=3, start=31)
    assert [batch["index"].tolist() for batch in resumed] == order[31:]
    different = BucketLoader(pairs(), tokens=120, steps=50, seed=4)
    assert [batch["index"].tolist() for batch in different] != order


def test_ranks_share_a_batch_and_an_empty_share_counts_nothing() -> None:
    whole = BucketLoader(pairs(), tokens=40, steps=100, seed=3)
    ranks = [BucketLoader(pairs(), tokens=40, steps=100, seed=3, rank=rank, world=3) for rank in range(3)]
    some_empty = False
    for step in range(100):
        parts = [loader.batch(step) for loader in ranks]
        counted = [part["index"][part["target"].any(1)] for part in parts]
        assert sorted(torch.cat(counted).tolist()) == sorted(whole.batch(step)["index"].tolist())
        some_empty |= any(not part["target"].any() for part in parts)
        assert all(len(part["source"]) for part in parts)
    assert some_empty


@pytest.mark.parametrize(
    ("task", "source", "target"),
    [
        ("copy", [3, 9, 4], [3, 9, 4]),
        ("reverse", [3, 9, 4], [4, 9, 3]),
        ("sort", [3, 9, 4], [3, 4, 9]),
        ("lookup", [3, 7, 5, 8, 5, 3], [8, 7]),
    ],
)
def test_transduction(task: str, source: list[int], target: list[int]) -> None:
    assert transduce(task, source) == target


@pytest.mark.parametrize("task", ["reverse", "lookup"])
def test_sequences(task: str) -> None:
    data = Sequences(
        task=task, lengths=(3, 5), far_lengths=(6, 8), sizes=(50, 20, 30, 10), batch_size=7, steps=3, limit=None
    )
    assert data.spec.sizes == {"train": 50, "val": 20, "test": 40}
    test = data.source("test").fetch(torch.arange(40))
    lengths = (test["target"] != 0).sum(1) - 1
    assert torch.equal(test["far"], lengths > 5)
    for source, target in zip(test["source"].tolist(), test["target"].tolist(), strict=True):
        assert transduce(task, until_end(source)) == until_end(target)
    assert data.reference("test", 3) == data.decode(test["target"][3].tolist())
    limited = Sequences(task=task, lengths=(3, 5), far_lengths=(6, 8), batch_size=7, steps=3, limit=8)
    assert limited.source("test").fetch(torch.arange(8))["far"].tolist() == [False] * 4 + [True] * 4
    other = Sequences(task=task, lengths=(3, 5), far_lengths=(6, 8), batch_size=7, steps=3, train_seed=1)
    assert other.strings("train") != limited.strings("train")
    assert other.strings("val") == limited.strings("val")


@pytest.mark.parametrize(
    "wrong",
    [{"task": "shuffle"}, {"lengths": (9, 3)}, {"num_symbols": 99}, {"task": "lookup", "far_lengths": (25, 90)}],
)
def test_impossible_sequences(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        Sequences(batch_size=2, steps=1, **wrong)


@pytest.fixture
def wmt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("REPRISE_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("REPRISE_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "data" / "wmt14" / "en-de"
    folder.mkdir(parents=True)
    for name in ("train", "newstest2013", "newstest2014"):
        (folder / f"{name}.en").write_text("\n".join(LINES[1::2]) + "\n", encoding="utf-8")
        (folder / f"{name}.de").write_text("\n".join(LINES[0::2]) + "\n", encoding="utf-8")
    return folder


def test_parallel_files(wmt: Path) -> None:
    data = WMT14(vocab_size=60, max_length=20, batch_size=2, steps=5)
    test = data.source("test")
    batch = test.fetch(torch.arange(len(test)))
    for number, source, target in zip(*(batch[name].tolist() for name in ("index", "source", "target")), strict=True):
        assert data.decode(target) == data.reference("test", number) == LINES[0::2][number]
        assert data.decode(source) == LINES[1::2][number]
    lengths = (batch["target"] != 0).sum(1)
    assert lengths.max() >= lengths[0]
    train = data.source("train")
    assert isinstance(train, ParallelSource)
    assert all(int(side.max()) <= 20 for side in train.lengths)


def test_missing_short_and_damaged_files(wmt: Path) -> None:
    with pytest.raises(ConfigError, match="vocabulary of"):
        WMT14(vocab_size=5000, batch_size=2, steps=5).source("train")
    (wmt / "newstest2013.de").write_text("nur eine Zeile\n")
    with pytest.raises(DataError, match="10 and 1 lines"):
        WMT14(vocab_size=60, batch_size=2, steps=5).source("val")
    (wmt / "train.en").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(DataError, match="cannot be read as text"):
        WMT14(vocab_size=60, batch_size=2, steps=5).source("val")
    (wmt / "newstest2014.en").unlink()
    with pytest.raises(DataError, match="missing"):
        WMT14(vocab_size=60, batch_size=2, steps=5).source("test")


def test_wrong_names() -> None:
    with pytest.raises(ConfigError, match="en-it"):
        WMT14(pair="en-it", batch_size=2, steps=5)
    with pytest.raises(ConfigError, match="test set"):
        Multi30k(test="test_2031", batch_size=2, steps=5)
    with pytest.raises(ConfigError, match="Multi30k is in"):
        Multi30k(source_language="fr", batch_size=2, steps=5)


def test_truncated_gzip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REPRISE_DATA", str(tmp_path))
    monkeypatch.setenv("REPRISE_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "multi30k"
    folder.mkdir()
    for name in ("train", "val", "test_2016_flickr"):
        for language in ("en", "de"):
            (folder / f"{name}.{language}.gz").write_bytes(gzip.compress("\n".join(LINES).encode())[:-12])
    with pytest.raises(DataError, match=r"train\.en\.gz"):
        Multi30k(batch_size=2, steps=5).source("train")


def test_multi30k_itself() -> None:
    if not os.environ.get("REPRISE_DATA") or not Multi30k(batch_size=2, steps=1).files["train"][0].is_file():
        pytest.skip("REPRISE_DATA is not set or has no multi30k")
    data = Multi30k(vocab_size=1000, max_length=256, batch_size=64, steps=10)
    assert {split: len(data.source(split)) for split in ("train", "val", "test")} == data.spec.sizes
    loader = data.train_dataloader()
    batch = loader.batch(3)
    assert batch["source"].numel() <= 64 * 16
    assert (batch["target"] != 0).float().mean() > 0.8  # buckets need little padding
