"""CLIP's tokenizer against the rules it follows, on learned merges and small files."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest
import torch

from reprise.data.byte_pair import BytePairTokenizer, byte_symbols, clean, learn_merges, official_tokenizer, split_words
from reprise.errors import DataError

MERGES = [("l", "o"), ("lo", "w</w>"), ("e", "r</w>"), ("a", "a")]


def test_ids_are_bytes_then_merges_then_specials() -> None:
    made = BytePairTokenizer(MERGES)
    assert made.vocab_size == 514 + 4
    assert (made.start_token, made.end_token) == (516, 517)
    assert made.encode("low") == [513]
    assert made.encode("lower") == [512, made.encode("w")[0] - 256, 514]
    assert made.encode("!") == [256]
    assert len(byte_symbols()) == len(set(byte_symbols().values())) == 256


def test_merges_do_not_overlap() -> None:
    made = BytePairTokenizer(MERGES)
    single = made.encode("a")[0] - 256
    assert made.encode("aaaaa") == [515, 515, single + 256]
    assert made.encode("aaa") == [515, single + 256]


def test_text_is_cleaned_and_split() -> None:
    assert clean("  A &amp;amp; B\n c ") == "a & b c"
    assert split_words("it's 42 dogs!?") == ["it", "'s", "4", "2", "dogs", "!?"]
    assert split_words("<|startoftext|>hi") == ["<|startoftext|>", "hi"]


def test_decoding_gives_the_words_back() -> None:
    made = BytePairTokenizer(learn_merges(["ein hübsches Gesicht", "un cœur"], 40))
    assert made.decode(made.encode("Ein cœur, hübsches 😀")) == "ein cœur , hübsches 😀 "


def test_batches_are_padded_and_truncated() -> None:
    made = BytePairTokenizer(MERGES)
    ids = made(["low", "low low low"], 4)
    assert ids.dtype == torch.int64
    assert ids.tolist() == [[516, 513, 517, 0], [516, 513, 513, 517]]
    with pytest.raises(ValueError, match="do not fit"):
        made(["low low low"], 4, truncate=False)


def test_learned_merges_make_frequent_words_single_tokens() -> None:
    merges = learn_merges(["red circle", "red square", "blue circle"] * 3, 100)
    made = BytePairTokenizer(merges, 100)
    assert len(made.encode("blue red circle square")) == 4
    assert made.vocab_size == 614
    assert merges == learn_merges(["red circle", "red square", "blue circle"] * 3, 100)


@pytest.mark.parametrize("name", ["merges.txt", "merges.txt.gz"])
def test_a_file_of_merges(tmp_path: Path, name: str) -> None:
    text = "#version\n" + "\n".join(" ".join(pair) for pair in MERGES) + "\n"
    path = tmp_path / name
    path.write_bytes(gzip.compress(text.encode()) if name.endswith("gz") else text.encode())
    assert BytePairTokenizer.from_file(path, 4).encode("low") == [513]
    with pytest.raises(DataError, match="does not hold"):
        BytePairTokenizer.from_file(path, 9)


def test_missing_official_merges_say_how_to_get_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REPRISE_DATA", str(tmp_path))
    with pytest.raises(DataError, match="reprise data fetch clip_bpe"):
        official_tokenizer()
    (tmp_path / "broken.gz").write_bytes(b"\x1f\x8b not gzip")
    with pytest.raises(DataError, match="cannot be read"):
        official_tokenizer(str(tmp_path / "broken.gz"))
