"""CLIP's tokenizer: lower-cased byte-level byte-pair encoding with an end-of-word mark, official or learned merges.

Ids: 256 byte symbols, the same 256 with `</w>`, one for each merge in order, the start token, the end token. The end
token is the largest id; padding is 0.
"""

from __future__ import annotations

import gzip
import html
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from reprise.errors import DataError
from reprise.paths import data_root

START, END = "<|startoftext|>", "<|endoftext|>"
WORD_END = "</w>"
OFFICIAL_MERGES = 48_894
OFFICIAL_FILE = "clip_bpe/bpe_simple_vocab_16e6.txt.gz"
NEXT_STEP = (
    "reprise data fetch clip_bpe   (or copy bpe_simple_vocab_16e6.txt.gz from the wheel of open_clip_torch, "
    f"`pip download --no-deps open_clip_torch`, to <data root>/{OFFICIAL_FILE})"
)
# Special tokens, English clitics, runs of letters, single digits, runs of anything else that is not white space.
PIECES = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"

Pair = tuple[str, str]


@lru_cache(maxsize=1)
def byte_symbols() -> dict[int, str]:
    """A visible character for each byte, in vocabulary order: printable Latin-1 bytes first, as themselves."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    shown = {byte: chr(byte) for byte in printable}
    return shown | {byte: chr(256 + place) for place, byte in enumerate(others)}


def clean(text: str) -> str:
    """Broken encodings repaired (ftfy), HTML entities resolved twice, white space made single, lower case."""
    import ftfy

    repaired = html.unescape(html.unescape(ftfy.fix_text(text)))
    return " ".join(repaired.split()).strip().lower()


def split_words(text: str) -> list[str]:
    """The pieces of a cleaned text that merges never cross."""
    return _pattern().findall(text)


@lru_cache(maxsize=1)
def _pattern() -> Any:
    import regex

    return regex.compile(PIECES, regex.IGNORECASE)


class BytePairTokenizer:
    """Texts to ids and back.

    Args:
        merges: pairs of symbols by rank; ranks need not be complete, ids are 512 + rank.
        merge_count: how many ranks the vocabulary has room for; by default as many as there are merges.
    """

    def __init__(self, merges: Sequence[Pair] | Mapping[Pair, int], merge_count: int | None = None) -> None:
        ranks = merges if isinstance(merges, Mapping) else {pair: rank for rank, pair in enumerate(merges)}
        self.ranks = dict(ranks)
        self.merge_count = len(self.ranks) if merge_count is None else merge_count
        self.start_token, self.end_token = 512 + self.merge_count, 513 + self.merge_count
        symbols = list(byte_symbols().values())
        self._ids = {symbol: number for number, symbol in enumerate([*symbols, *(s + WORD_END for s in symbols)])}
        self._ids |= {first + second: 512 + rank for (first, second), rank in self.ranks.items()}
        self._ids |= {START: self.start_token, END: self.end_token}
        self._symbols = {number: symbol for symbol, number in self._ids.items()}
        self._known: dict[str, list[int]] = {START: [self.start_token], END: [self.end_token]}

    @property
    def vocab_size(self) -> int:
        return self.merge_count + 514

    @classmethod
    def from_file(cls, path: Path, merge_count: int = OFFICIAL_MERGES) -> BytePairTokenizer:
        """The merges of a file, plain or gzipped: a header line, then a pair a line, the most frequent first.

        Raises:
            DataError: the file is not there or holds too few merges.
        """
        if not path.is_file():
            raise DataError("the tokenizer's merges are not there", looked_at=path, next_step=NEXT_STEP)
        try:
            content = path.read_bytes()
            text = (gzip.decompress(content) if path.suffix == ".gz" else content).decode("utf-8")
        except (OSError, EOFError, UnicodeDecodeError) as error:
            raise DataError(f"the merges cannot be read: {error}", looked_at=path, next_step=NEXT_STEP) from error
        lines = [line.split() for line in text.split("\n")[1 : merge_count + 1]]
        if len(lines) < merge_count or any(len(line) != 2 for line in lines):
            raise DataError(f"the file does not hold {merge_count} merges", looked_at=path, next_step=NEXT_STEP)
        return cls([(first, second) for first, second in lines])

    def encode(self, text: str) -> list[int]:
        """Ids without start and end; special tokens that are written in the text are recognised."""
        return [number for word in split_words(clean(text)) for number in self._word(word)]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids; a space follows every word, bytes that are no text become replacement signs."""
        joined = "".join(self._symbols.get(int(number), "") for number in ids)
        back = {symbol: byte for byte, symbol in byte_symbols().items()}
        parts = joined.replace(WORD_END, " ")
        return bytes(back.get(sign, ord(" ")) for sign in parts).decode("utf-8", errors="replace")

    def __call__(self, texts: Sequence[str], context_length: int = 77, *, truncate: bool = True) -> Tensor:
        """Ids with start and end token, zero padded, int64 [N, context_length].

        Args:
            truncate: cut longer texts, their last id becoming the end token.

        Raises:
            ValueError: a text is too long and `truncate` is false.
        """
        result = torch.zeros(len(texts), context_length, dtype=torch.int64)
        for row, text in zip(result, texts, strict=True):
            ids = [self.start_token, *self.encode(text), self.end_token]
            if len(ids) > context_length:
                if not truncate:
                    raise ValueError(f"{len(ids)} tokens do not fit a context of {context_length}: {text!r}")
                ids = [*ids[: context_length - 1], self.end_token]
            row[: len(ids)] = torch.tensor(ids)
        return result

    def _word(self, word: str) -> list[int]:
        if word not in self._known:
            self._known[word] = [self._ids[symbol] for symbol in self._merge(spelled(word))]
        return self._known[word]

    def _merge(self, symbols: list[str]) -> list[str]:
        """Merge the pair of lowest rank everywhere, until no pair of neighbours has a rank."""
        while len(symbols) > 1:
            best = min(pairwise(symbols), key=lambda pair: self.ranks.get(pair, len(self.ranks) + self.merge_count))
            if best not in self.ranks:
                break
            merged: list[str] = []
            for symbol in symbols:
                if merged and (merged[-1], symbol) == best:
                    merged[-1] += symbol
                else:
                    merged.append(symbol)
            symbols = merged
        return symbols


def spelled(word: str) -> list[str]:
    """A word as byte symbols, the last one with the end-of-word mark."""
    symbols = [byte_symbols()[byte] for byte in word.encode("utf-8")]
    return [*symbols[:-1], symbols[-1] + WORD_END]


def learn_merges(texts: Iterable[str], count: int) -> list[Pair]:
    """At most `count` merges learned on texts, the most frequent pair first (Sennrich et al. 2016)."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    words = Counter(word for text in texts for word in split_words(clean(text)) if word not in (START, END))
    alphabet = list(byte_symbols().values())
    learner = Tokenizer(models.BPE(end_of_word_suffix=WORD_END))
    learner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    trainer = trainers.BpeTrainer(
        vocab_size=512 + count, initial_alphabet=alphabet, end_of_word_suffix=WORD_END, show_progress=False
    )
    lines = [" ".join(["".join(byte_symbols()[b] for b in word.encode())] * times) for word, times in words.items()]
    learner.train_from_iterator(sorted(lines), trainer)
    learned = json.loads(learner.to_str())["model"]["merges"]
    return [(first, second) for first, second in learned][:count]


def official_tokenizer(path: str | None = None) -> BytePairTokenizer:
    """The tokenizer of the released models.

    Args:
        path: the merges file, or None for the data set `clip_bpe` below the data root.

    Raises:
        DataError: it is not there.
    """
    return BytePairTokenizer.from_file(Path(path).expanduser() if path else data_root() / OFFICIAL_FILE)
