"""Parallel text: byte-pair vocabularies, and data modules of pairs of sequences.

Ids: 0 is padding, 1 the end of a sentence (every encoded sentence has it), 2 an unknown symbol. Batches: `source` int64
[B, S] and `target` int64 [B, T], padded with 0 after the end, and `index` int64 [B].
"""

from __future__ import annotations

import gzip
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from reprise.data.cache import Arrays, cached_arrays
from reprise.data.loader import TrainLoader
from reprise.data.module import DataModule
from reprise.data.ragged import PAD, BucketLoader, ParallelSource, Ragged, by_length, ragged_arrays
from reprise.errors import ConfigError, DataError

END, UNKNOWN = 1, 2
SPECIAL = ("<pad>", "</s>", "<unk>")
CHUNK = 100_000  # sentences that are encoded at once
CACHE_VERSION = 1


class Vocabulary:
    """A byte-pair vocabulary (Sennrich et al. 2016) on the bytes of words, learned and applied by `tokenizers`.

    Words keep the space in front of them, so that decoding gives back the text.

    Args:
        tokenizer: a `tokenizers.Tokenizer` whose first ids are those of `SPECIAL`.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    @classmethod
    def learn(cls, lines: Iterable[str], size: int) -> Vocabulary:
        """The byte-pair vocabulary of the lines, of at most `size` symbols; the same every time."""
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

        tokenizer = Tokenizer(models.BPE(unk_token=SPECIAL[UNKNOWN]))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=list(SPECIAL), show_progress=False)
        tokenizer.train_from_iterator(lines, trainer)
        return cls(tokenizer)

    @classmethod
    def from_array(cls, array: npt.NDArray[Any]) -> Vocabulary:
        """The inverse of `to_array`."""
        from tokenizers import Tokenizer

        return cls(Tokenizer.from_str(np.asarray(array).tobytes().decode()))

    def to_array(self) -> npt.NDArray[np.uint8]:
        return np.frombuffer(self.tokenizer.to_str().encode(), np.uint8)

    def __len__(self) -> int:
        return int(self.tokenizer.get_vocab_size())

    def encode(self, lines: Sequence[str]) -> list[list[int]]:
        """Ids of each line, with the end symbol."""
        return [[*found.ids, END] for found in self.tokenizer.encode_batch(list(lines))]

    def symbols(self, ids: Iterable[int]) -> list[str]:
        """Readable symbols up to the end symbol, one an id; a space in front of a word shows as `_`."""
        return [self.tokenizer.decode([number]).replace(" ", "_") for number in until_end(ids)]

    def decode(self, ids: Iterable[int]) -> str:
        """The text up to the end symbol."""
        return str(self.tokenizer.decode(until_end(ids))).strip()


def until_end(ids: Iterable[int]) -> list[int]:
    """The ids before the first end or padding symbol."""
    found = []
    for number in ids:
        if number in (END, PAD):
            break
        found.append(int(number))
    return found


class SequencePairs(DataModule):
    """The base of data modules whose items are pairs of sequences.

    Args:
        bucket_length: training batches hold at most batch_size * bucket_length padded tokens on either side, of pairs
            of like length: `batch_size` pairs of that length, more shorter ones, fewer longer ones. None: `batch_size`
            pairs, whatever their length.
    """

    def __init__(
        self,
        *,
        bucket_length: int | None,
        batch_size: int,
        steps: int,
        seed: int,
        eval_batch_size: int,
        limit: int | None,
    ) -> None:
        super().__init__(batch_size=batch_size, steps=steps, seed=seed, eval_batch_size=eval_batch_size, limit=limit)
        if bucket_length is not None and bucket_length < 1:
            raise ConfigError(f"a bucket length of {bucket_length}", looked_at="data.bucket_length")
        self.bucket_length = bucket_length

    @abstractmethod
    def build_source(self, split: str) -> ParallelSource: ...

    @abstractmethod
    def symbols(self, ids: Iterable[int]) -> list[str]:
        """Readable symbols up to the end symbol."""

    @abstractmethod
    def decode(self, ids: Iterable[int]) -> str:
        """The text up to the end symbol."""

    @abstractmethod
    def reference(self, split: str, index: int) -> str:
        """The target of a pair as text."""

    def train_dataloader(self) -> TrainLoader:
        if self.bucket_length is None:
            return super().train_dataloader()
        rank, world = self._rank_and_world()
        source = self.source("train")
        assert isinstance(source, ParallelSource)
        tokens = self.batch_size * self.bucket_length
        return BucketLoader(source, tokens, self.steps, self.seed, self.start_step, rank, world)


class ParallelText(SequencePairs):
    """Sentence pairs from text files, one sentence a line, with one byte-pair vocabulary for both languages.

    The vocabulary is learned on both sides of the training text; it and all ids are made once and cached.

    Args:
        files: {"train": (source, target), "val": ..., "test": ...}; `.gz` files are read as they are.
        vocab_size: symbols of the vocabulary, special ones included.
        max_length: training pairs with a longer side (in tokens, the end included) are left out.
        lower: lower-case everything.
        next_step: for error messages: how to get the data.
    """

    def __init__(
        self,
        files: dict[str, tuple[Path, Path]],
        *,
        vocab_size: int,
        max_length: int,
        lower: bool,
        next_step: str,
        bucket_length: int | None,
        batch_size: int,
        steps: int,
        seed: int,
        eval_batch_size: int,
        limit: int | None,
    ) -> None:
        super().__init__(
            bucket_length=bucket_length,
            batch_size=batch_size,
            steps=steps,
            seed=seed,
            eval_batch_size=eval_batch_size,
            limit=limit,
        )
        if vocab_size <= len(SPECIAL):
            raise ConfigError(f"a vocabulary of {vocab_size} symbols", looked_at="data.vocab_size")
        self.files, self.vocab_size, self.max_length, self.lower = files, vocab_size, max_length, lower
        self.next_step = next_step

    def build_source(self, split: str) -> ParallelSource:
        source, target = self._side(split, "source"), self._side(split, "target")
        if split != "train":
            return ParallelSource(source, target, by_length(source, target, self.limit))
        kept = torch.maximum(source.lengths, target.lengths) <= self.max_length
        return ParallelSource(source, target, kept.nonzero().flatten()[: self.limit])

    def _side(self, split: str, side: str) -> Ragged:
        names = f"{split}_{side}", f"{split}_{side}_offsets"
        return Ragged(*(torch.from_numpy(self._arrays[name]) for name in names))

    @cached_property
    def vocabulary(self) -> Vocabulary:
        return Vocabulary.from_array(self._arrays["vocabulary"])

    def symbols(self, ids: Iterable[int]) -> list[str]:
        return self.vocabulary.symbols(ids)

    def decode(self, ids: Iterable[int]) -> str:
        return self.vocabulary.decode(ids)

    def reference(self, split: str, index: int) -> str:
        return self._references(split)[index]

    def _references(self, split: str) -> list[str]:
        if not hasattr(self, "_lines"):
            self._lines: dict[str, list[str]] = {}
        if split not in self._lines:
            self._lines[split] = list(self._read(self.files[split][1]))
        return self._lines[split]

    @cached_property
    def _arrays(self) -> Arrays:
        """Ids of all splits and the vocabulary, from the cache."""
        paths = [path for pair in self.files.values() for path in pair]
        for path in paths:
            if not path.is_file():
                raise DataError("parallel text is missing", looked_at=path, next_step=self.next_step)
        key = {
            "version": CACHE_VERSION,
            "vocab_size": self.vocab_size,
            "lower": self.lower,
            "stamp": [(str(path.resolve()), path.stat().st_mtime_ns, path.stat().st_size) for path in paths],
        }
        return cached_arrays("text", key, self._encode_all)

    def _encode_all(self) -> Arrays:
        vocabulary = Vocabulary.learn(
            (line for path in self.files["train"] for line in self._read(path)), self.vocab_size
        )
        if len(vocabulary) != self.vocab_size:
            raise ConfigError(
                f"the training text yields a vocabulary of {len(vocabulary)} symbols, not {self.vocab_size}",
                looked_at="data.vocab_size",
                next_step=f"data.vocab_size={len(vocabulary)}",
            )
        arrays: Arrays = {"vocabulary": vocabulary.to_array()}
        for split, pair in self.files.items():
            for side, path in zip(("source", "target"), pair, strict=True):
                chunks = (vocabulary.encode(lines) for lines in _chunks(self._read(path)))
                arrays[f"{split}_{side}"], arrays[f"{split}_{side}_offsets"] = ragged_arrays(chunks)
            self._check_pairs(arrays, split, pair)
        return arrays

    def _check_pairs(self, arrays: Arrays, split: str, pair: tuple[Path, Path]) -> None:
        counts = [len(arrays[f"{split}_{side}_offsets"]) - 1 for side in ("source", "target")]
        if counts[0] != counts[1] or not counts[0]:
            raise DataError(
                f"the two sides of {split} have {counts[0]} and {counts[1]} lines",
                looked_at=f"{pair[0]}, {pair[1]}",
                next_step=self.next_step,
            )

    def _read(self, path: Path) -> Iterator[str]:
        """Lines of a text file without their ends."""
        try:
            opener = gzip.open if path.suffix == ".gz" else open
            with opener(path, "rt", encoding="utf-8") as handle:
                for line in handle:
                    text = line.rstrip("\r\n")
                    yield text.lower() if self.lower else text
        except (OSError, EOFError, UnicodeDecodeError) as error:
            raise DataError(
                f"{path.name} cannot be read as text: {error}", looked_at=path, next_step=self.next_step
            ) from error


def _chunks(lines: Iterator[str]) -> Iterator[list[str]]:
    while chunk := list(islice(lines, CHUNK)):
        yield chunk
