"""Made-up sequence transduction that is always there: copy, reverse or sort strings of symbols, or look symbols up."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch

from reprise.data.ragged import ParallelSource, Ragged
from reprise.data.spec import DataSpec
from reprise.data.splits import limited
from reprise.data.text import END, SPECIAL, SequencePairs, until_end
from reprise.errors import ConfigError
from reprise.seeding import derive

TASKS = ("copy", "reverse", "sort", "lookup")
ALPHABET = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"


def transduce(task: str, symbols: Sequence[int]) -> list[int]:
    """The target of a source: the same symbols as they are, from the last to the first, or in ascending order.

    `lookup`: the source is n keys and values (k1 v1 k2 v2 ...), then the n keys in another order; the target is their
    values in that order.
    """
    if task == "lookup":
        keys = 2 * len(symbols) // 3
        table = dict(zip(symbols[:keys:2], symbols[1:keys:2], strict=True))
        return [table[key] for key in symbols[keys:]]
    return {"copy": list(symbols), "reverse": list(reversed(symbols)), "sort": sorted(symbols)}[task]


class Sequences(SequencePairs):
    """Strings of random symbols. Batches: source and target int64 [B, L] (end symbol, padding), index int64 [B].

    Test batches have `far` bool [B] as well: True where the string is longer than any in training.

    Args:
        task: copy, reverse, sort or lookup, see `transduce`.
        num_symbols: different symbols, drawn uniformly; keys of a lookup are drawn without repetition.
        lengths: shortest and longest string of training, validation and most of the test, drawn uniformly; of a lookup:
            how many keys.
        far_lengths: of the far part of the test.
        sizes: strings of train, val, test and the far part of the test.
        train_seed: draws the training strings; validation and test strings are the same for every run.
        bucket_length: see `SequencePairs`.
    """

    def __init__(
        self,
        *,
        task: str = "reverse",
        num_symbols: int = 16,
        lengths: Sequence[int] = (8, 24),
        far_lengths: Sequence[int] = (25, 32),
        sizes: Sequence[int] = (20_000, 1000, 2000, 2000),
        train_seed: int = 0,
        bucket_length: int | None = None,
        batch_size: int,
        steps: int,
        seed: int = 0,
        eval_batch_size: int = 500,
        limit: int | None = None,
    ) -> None:
        super().__init__(
            bucket_length=bucket_length,
            batch_size=batch_size,
            steps=steps,
            seed=seed,
            eval_batch_size=eval_batch_size,
            limit=limit,
        )
        if task not in TASKS:
            raise ConfigError(f"no task {task!r}", looked_at="data.task", next_step=f"one of {', '.join(TASKS)}")
        if not 2 <= num_symbols <= len(ALPHABET):
            raise ConfigError(f"{num_symbols} symbols, not 2 to {len(ALPHABET)}", looked_at="data.num_symbols")
        if not 1 <= lengths[0] <= lengths[1] < far_lengths[0] <= far_lengths[1]:
            raise ConfigError(
                f"lengths {list(lengths)} and far lengths {list(far_lengths)} must ascend", looked_at="data.lengths"
            )
        if task == "lookup" and far_lengths[1] > num_symbols:
            raise ConfigError(f"{far_lengths[1]} keys, but {num_symbols} symbols", looked_at="data.far_lengths")
        self.task, self.num_symbols, self.lengths, self.far_lengths = task, num_symbols, lengths, far_lengths
        self.sizes = dict(zip(("train", "val", "test", "far"), sizes, strict=True))
        self.train_seed = train_seed

    @property
    def vocab_size(self) -> int:
        return len(SPECIAL) + self.num_symbols

    @property
    def spec(self) -> DataSpec:
        sizes = {name: self.sizes[name] for name in ("train", "val")} | {"test": self.sizes["test"] + self.sizes["far"]}
        return DataSpec(
            name="sequences",
            image_shape=None,
            classes=(),
            sizes=limited(sizes, self.limit),
            licence="Apache-2.0",
            source="reprise.data.sequences",
        )

    def strings(self, part: str) -> list[list[int]]:
        """The sources of train, val, test or far, without end symbols."""
        low, high = self.far_lengths if part == "far" else self.lengths
        rng = np.random.default_rng(derive(self.train_seed if part == "train" else 0, "sequences", part))
        lengths = rng.integers(low, high + 1, self.sizes[part])
        if self.task == "lookup":
            return [self._table(rng, length) for length in lengths]
        symbols = rng.integers(len(SPECIAL), self.vocab_size, (self.sizes[part], high))
        return [row[:length].tolist() for row, length in zip(symbols, lengths, strict=True)]

    def _table(self, rng: np.random.Generator, keys: int) -> list[int]:
        """Keys and values in turn, then the keys in another order."""
        key = rng.permutation(self.num_symbols)[:keys]
        value = rng.integers(0, self.num_symbols, keys)
        found = np.concatenate([np.stack([key, value], axis=1).flatten(), rng.permutation(key)])
        return (found + len(SPECIAL)).tolist()

    def build_source(self, split: str) -> ParallelSource:
        near = self.strings(split)[: self.limit]
        far = self.strings("far")[: self.limit] if split == "test" else []
        strings = near + far
        source = Ragged.of([[*string, END] for string in strings])
        target = Ragged.of([[*transduce(self.task, string), END] for string in strings])
        if split != "test":
            return ParallelSource(source, target)
        rows = torch.arange(len(strings))
        half = len(strings) if self.limit is None else self.limit // 2
        chosen = torch.cat([rows[: len(near)][:half], rows[len(near) :][:half]])
        return ParallelSource(source, target, chosen, far=rows >= len(near))

    def symbols(self, ids: Iterable[int]) -> list[str]:
        """Letters; a special symbol shows by its name."""
        names = (*SPECIAL, *ALPHABET)
        return [names[number] for number in until_end(ids)]

    def decode(self, ids: Iterable[int]) -> str:
        return " ".join(self.symbols(ids))

    def reference(self, split: str, index: int) -> str:
        source = self.source(split)
        assert isinstance(source, ParallelSource)
        return self.decode(source.target.padded(torch.tensor([index]))[0].tolist())
