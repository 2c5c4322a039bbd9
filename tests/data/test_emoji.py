"""Noto emoji: splits by kind, names in three languages, on a small fake and on the real pictures where they are."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from reprise.data.emoji import COLUMNS, Emoji, kind_of, read_table
from reprise.errors import ConfigError, DataError


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Twelve emoji, the first four with a skin tone as well."""
    monkeypatch.setenv("REPRISE_DATA", str(tmp_path))
    monkeypatch.setenv("REPRISE_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "noto_emoji"
    (folder / "images").mkdir(parents=True)
    rows = ["\t".join(COLUMNS)]
    for number in range(12):
        for tone in ("", "-1F3FB") if number < 4 else ("",):
            name = f"emoji_{number}{tone}.png"
            rows.append(f"{name}\t{number:X}{tone}\t{int(bool(tone))}\tname {number}\tName {number}\tnom {number}")
            pixels = np.zeros((72, 72, 4), np.uint8)
            pixels[:36] = (20 * number, 100, 200, 255)  # the lower half is transparent
            Image.fromarray(pixels).save(folder / "images" / name)
    (folder / "captions.tsv").write_text("\n".join(rows) + "\n")
    return tmp_path


def make(**options: object) -> Emoji:
    given = {"sizes": [6, 2, 3], "merges": 30, "context_length": 8, "batch_size": 4, "steps": 2, **options}
    return Emoji(**given)


def test_splits_share_no_emoji(root: Path) -> None:
    data = make(skin_tones=True)
    kinds = [{kind_of(row["codepoints"]) for row in data.rows(split)} for split in ("train", "val", "test")]
    assert [len(found) for found in kinds] == [6, 2, 3]
    assert not kinds[0] & kinds[1]
    assert not (kinds[0] | kinds[1]) & kinds[2]
    assert sum(len(data.rows(split)) for split in ("train", "val", "test")) > 11
    assert all(row["skin_tone"] == "0" for row in make().rows("train"))
    assert make(split_seed=1).rows("test") != make().rows("test")


def test_batches(root: Path) -> None:
    data = make()
    batch = next(iter(data.train_dataloader()))
    assert batch["image"].shape == (4, 3, 32, 32)
    assert batch["text"].shape == (4, 8)
    tested = data.source("test").fetch(torch.arange(3))
    assert tested["captions"].shape == (3, 3, 8)
    shown = data.normalisation.invert(tested["image"])
    assert torch.allclose(shown[:, :, 20:], torch.ones(()), atol=1e-5)  # transparent is white
    assert data.prompts() is None
    assert make(languages=["de"]).source("test").fields["captions"].shape == (3, 1, 8)


def test_what_is_missing_or_damaged_is_said(root: Path) -> None:
    (root / "noto_emoji" / "images" / "emoji_7.png").unlink()
    with pytest.raises(DataError, match="emoji_7"):
        make().source("train")
    table = root / "noto_emoji" / "captions.tsv"
    table.write_text("file\ten\nx.png\tx\n")
    with pytest.raises(DataError, match="columns"):
        read_table(root / "noto_emoji")
    table.unlink()
    with pytest.raises(DataError, match="not there"):
        make().rows("train")


@pytest.mark.parametrize("options", [{"languages": ["it"]}, {"sizes": [1, 2]}, {"sizes": [1600, 40, 40]}])
def test_wrong_options_are_refused(options: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        make(**options)


def test_the_real_emoji() -> None:
    root = Path(os.environ.get("REPRISE_DATA", "/nowhere"))
    if not (root / "noto_emoji" / "captions.tsv").is_file():
        pytest.skip("noto_emoji is not below REPRISE_DATA")
    data = Emoji(batch_size=4, steps=1)
    assert len(data.source("test")) == 400
    assert len(data.tokenizer.ranks) == 1000
