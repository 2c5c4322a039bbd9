"""BCCD: annotations, resizing and padding, damaged and hostile files; the real images where they are."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image

from reprise import paths
from reprise.data import bccd, registry
from reprise.data.bccd import BCCD, read_annotation
from reprise.errors import ConfigError, DataError

OBJECT = "<object><name>{}</name><bndbox><xmin>{}</xmin><ymin>{}</ymin><xmax>{}</xmax><ymax>{}</ymax></bndbox></object>"


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A fake of 4 + 2 + 2 images of 64x48 pixels, a cell in each; the last one has none."""
    monkeypatch.setenv("REPRISE_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("REPRISE_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "data" / "bccd"
    for name in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (folder / name).mkdir(parents=True)
    for split, count in (("train", 4), ("val", 2), ("test", 2)):
        monkeypatch.setitem(bccd.COUNTS, split, count)
        names = [f"{split}_{number}" for number in range(count)]
        (folder / "ImageSets" / "Main" / f"{split}.txt").write_text("\n".join(names) + "\n")
        for number, name in enumerate(names):
            picture = Image.new("RGB", (64, 48), (0, 0, 255))
            picture.paste((255, 0, 0), (0, 0, 32, 24))
            picture.save(folder / "JPEGImages" / f"{name}.jpg", quality=95)
            cell = OBJECT.format("WBC", 0, 0, 32, 24) if number or split != "test" else ""
            (folder / "Annotations" / f"{name}.xml").write_text(f"<annotation>{cell}</annotation>")
    return folder


def make(**options: object) -> BCCD:
    return BCCD(**{"batch_size": 4, "steps": 2, "size": (24, 48), "flip": False, "normalise": "unit", **options})


def test_images_fit_with_padding_and_boxes_are_relative_to_the_content(root: Path):
    batch = next(iter(make().train_dataloader()))
    assert batch["image"].shape == (4, 3, 24, 48)
    assert batch["mask"][:, :, 32:].all()
    assert not batch["mask"][:, :, :32].any()
    assert not batch["image"][:, :, :, 32:].any()
    target = batch["targets"][0]
    assert target["size"].tolist() == [24, 32]
    assert target["labels"].tolist() == [1]
    assert target["boxes"].tolist() == [[0.25, 0.25, 0.5, 0.5]]
    assert batch["image"][0, 0, :10, :14].mean() > 0.9
    assert batch["image"][0, 0, 14:, 18:32].mean() < 0.1


def test_flipping_moves_content_and_boxes_but_not_the_padding(root: Path):
    module = make(flip=True)
    flipped = [item for step in range(2) for item in zip(*unpack(module.train_dataloader().batch(step)), strict=True)]
    sides = {round(float(target["boxes"][0, 0]), 2) for _, target in flipped}
    assert sides == {0.25, 0.75}
    for image, target in flipped:
        assert not image[:, :, 32:].any()
        left = float(target["boxes"][0, 0]) < 0.5
        assert (image[0, :10, :14].mean() > 0.9) == left


def unpack(batch: dict) -> tuple[torch.Tensor, list]:
    return batch["image"], batch["targets"]


def test_images_without_objects_have_empty_targets(root: Path):
    target = next(iter(make().test_dataloader()))["targets"][0]
    assert target["labels"].shape == (0,)
    assert target["boxes"].shape == (0, 4)


def test_boxes_are_cut_at_the_border_and_empty_ones_dropped(tmp_path: Path):
    path = tmp_path / "a.xml"
    objects = [("RBC", -5, 3, 70, 20), ("RBC", 5, 5, 5, 9), ("Platelets", 60, 40, 90, 90), ("RBC", 80, 1, 90, 5)]
    path.write_text("<annotation>" + "".join(OBJECT.format(*item) for item in objects) + "</annotation>")
    annotation = read_annotation(path, (48, 64))
    assert annotation.labels == [0, 2]
    assert annotation.boxes == [(0, 3, 64, 20), (60, 40, 64, 48)]


BOMB = '<?xml version="1.0"?><!DOCTYPE a [<!ENTITY x "yyyy">]><annotation>&x;</annotation>'
LEAK = '<!DOCTYPE a [<!ENTITY x SYSTEM "file:///etc/passwd">]><annotation>&x;</annotation>'


@pytest.mark.parametrize(
    "content",
    [BOMB, LEAK, "<annotation>", "", "\x00\x01", "<annotation>" + OBJECT.format("Cat", 1, 1, 2, 2) + "</annotation>",
     "<annotation><object><name>RBC</name></object></annotation>", BOMB.encode("utf-16")],
)  # fmt: skip
def test_hostile_and_damaged_annotations(tmp_path: Path, content: str | bytes):
    path = tmp_path / "a.xml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError, match=r"a\.xml"):
        read_annotation(path, (48, 64))


def test_missing_truncated_and_foreign_data(root: Path):
    (root / "JPEGImages" / "train_1.jpg").write_bytes(b"no image")
    with pytest.raises(DataError, match="not a readable image"):
        make().source("train")
    (root / "JPEGImages" / "train_1.jpg").unlink()
    with pytest.raises(DataError, match="1 files of the train split are missing"):
        make().source("train")
    assert registry.check("bccd").state == "damaged"
    (root / "ImageSets" / "Main" / "val.txt").write_text("val_0\n")
    with pytest.raises(DataError, match="lists 1 images, not 2"):
        make().source("val")
    (root / "ImageSets" / "Main" / "val.txt").write_text("val_0\n../../secret\n")
    with pytest.raises(DataError, match="val split"):
        make().source("val")
    (root / "ImageSets" / "Main" / "train.txt").unlink()
    with pytest.raises(DataError, match="reprise data fetch bccd"):
        make().source("train")


def test_the_spec_needs_no_data_and_wrong_sizes_are_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("REPRISE_DATA", str(tmp_path))
    assert make().spec.classes == ("RBC", "WBC", "Platelets")
    with pytest.raises(ConfigError):
        make(size=(10,))


def test_the_configuration_file_has_every_option():
    config = yaml.safe_load((paths.conf_dir() / "data" / "bccd.yaml").read_text())
    assert config.pop("_target_") == "reprise.data.bccd.BCCD"
    BCCD(**{**config, "steps": 1, "seed": 0})


def test_the_real_images():
    if not os.environ.get("REPRISE_DATA") or registry.check("bccd").state == "missing":
        pytest.skip("BCCD is not below REPRISE_DATA")
    module = BCCD(batch_size=8, steps=1, size=(120, 160))
    assert {split: len(module.source(split)) for split in ("train", "val", "test")} == {
        "train": 205,
        "val": 87,
        "test": 72,
    }
    source = module.source("train")
    assert source.labels.unique().tolist() == [0, 1, 2]
    low, high = source.boxes[:, :2] - source.boxes[:, 2:] / 2, source.boxes[:, :2] + source.boxes[:, 2:] / 2
    assert low.min() >= -1e-6
    assert high.max() <= 1 + 1e-6
