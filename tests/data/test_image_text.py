"""Pairs on disk and ImageNet for zero-shot tests, on small fakes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from reprise.data import image_text
from reprise.data.byte_pair import BytePairTokenizer
from reprise.data.image_text import ImageTextPairs, preprocess, random_square
from reprise.errors import ConfigError, DataError


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("REPRISE_DATA", str(tmp_path))
    rng = np.random.default_rng(0)
    places = [tmp_path / "image_text" / "images" / f"{n}.jpg" for n in range(9)]
    places += [tmp_path / "imagenet" / "val" / f"n{n}" / "0.JPEG" for n in range(2)]
    for place in places:
        place.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (40, 60, 3), dtype=np.uint8)).save(place)
    rows = "".join(f"{n}.jpg\tcaption {n}\n" for n in range(9))
    (tmp_path / "image_text" / "captions.tsv").write_text(f"file\tcaption\n{rows}")
    (tmp_path / "names.txt").write_text("cat\ndog\n")
    monkeypatch.setattr(image_text, "official_tokenizer", lambda path: BytePairTokenizer([]))
    return tmp_path


def make(root: Path, **options: object) -> ImageTextPairs:
    given = {"image_size": 16, "context_length": 20, "val_size": 3, "batch_size": 4, "steps": 2, **options}
    return ImageTextPairs(class_names=str(root / "names.txt"), **given)


def test_pairs_for_training_and_retrieval_and_classes_for_the_test(root: Path) -> None:
    data = make(root)
    batch = next(iter(data.train_dataloader()))
    assert batch["image"].shape == (4, 3, 16, 16)
    assert batch["text"].shape == (4, 20)
    assert torch.equal(data.train_dataloader().batch(1)["image"], make(root).train_dataloader().batch(1)["image"])
    assert next(iter(data.val_dataloader()))["captions"].shape == (3, 1, 20)
    assert next(iter(data.test_dataloader()))["label"].tolist() == [0, 1]
    assert data.prompts().shape == (2, 1, 20)


def test_squares() -> None:
    picture = Image.fromarray(np.arange(40 * 60 * 3, dtype=np.uint8).reshape(40, 60, 3))
    assert preprocess(picture, 16).shape == random_square(picture, 16).shape == (3, 16, 16)
    white = preprocess(Image.new("RGB", (30, 20), "white"), 10)
    assert torch.allclose(white[:, 0, 0], (1 - torch.tensor(image_text.MEAN)) / torch.tensor(image_text.STD))


def test_what_is_missing_is_said(root: Path) -> None:
    with pytest.raises(DataError, match="only 9 pairs"):
        make(root, val_size=9).source("train")
    with pytest.raises(ConfigError, match="for the name"):
        make(root, templates=["a photo"])
    (root / "image_text" / "captions.tsv").unlink()
    with pytest.raises(DataError, match="never released"):
        make(root).source("train")
