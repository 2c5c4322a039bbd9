"""Few-shot image sets: splits without common classes, class batches, masked views, errors."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from reprise.data.class_batches import ClassLoader, class_batch
from reprise.data.fewshot import class_cyclic_order
from reprise.data.glyphs import Glyphs
from reprise.data.loader import TensorSource
from reprise.data.mini_imagenet import FewShotFolders
from reprise.data.omniglot import CHARACTERS, Omniglot
from reprise.errors import ConfigError, DataError
from reprise.nn.masks import MaskSampler

VIEWS: dict[str, Any] = {"global": {"count": 2, "size": 28, "flip_p": 0.0}, "local": {"count": 3, "size": 14}}
COMMON: dict[str, Any] = {"views": VIEWS, "masks": MaskSampler(), "patch": 7, "batch_size": 8, "steps": 3}


def glyphs(**options: Any) -> Glyphs:
    return Glyphs(**({"classes": [6, 3, 5], "images": [5, 4, 6]} | COMMON | options))


def test_a_class_batch_holds_whole_classes() -> None:
    label = torch.arange(5).repeat(6)
    members = [(label == value).nonzero().flatten() for value in range(5)]
    batch = class_batch(members, 12, 4, seed=3, step=7)
    assert len(batch.unique()) == 12
    assert sorted(torch.bincount(label[batch]).tolist())[-3:] == [4, 4, 4]
    assert torch.equal(batch, class_batch(members, 12, 4, seed=3, step=7))
    assert not torch.equal(batch, class_batch(members, 12, 4, seed=3, step=8))
    with pytest.raises(ValueError, match="do not fit"):
        class_batch(members, 24, 4, seed=0, step=0)


def test_ranks_share_one_class_batch() -> None:
    label = torch.arange(5).repeat(6)
    source = TensorSource(label=label)
    whole = ClassLoader(source, 8, 4, seed=1, label=label, per_class=2).batch(2)["index"]
    parts = [ClassLoader(source, 8, 4, seed=1, rank=r, world=2, label=label, per_class=2).batch(2) for r in (0, 1)]
    assert torch.equal(torch.cat([part["index"] for part in parts]), whole)


def test_a_later_stage_goes_on_where_the_earlier_one_ended() -> None:
    early, late = glyphs().train_dataloader(), glyphs(stage=2, stage1_steps=2).train_dataloader()
    for name, value in early.batch(2).items():
        assert torch.equal(value, late.batch(0)[name]), name


def test_too_many_classes_for_the_batch_is_an_error() -> None:
    with pytest.raises(ConfigError, match="do not fit"):
        glyphs(images_per_class=1).train_dataloader()
    with pytest.raises(ConfigError, match="do not fit"):
        glyphs(images_per_class=3).train_dataloader()


def test_training_batches_hold_views_and_masks() -> None:
    batch = glyphs(images_per_class=4).train_dataloader().batch(0)
    assert batch["image"].shape == batch["global_0"].shape == batch["global_1"].shape == (8, 1, 28, 28)
    assert batch["local_2"].shape == (8, 1, 14, 14)
    assert batch["mask"].shape == (8, 2, 4, 4)
    assert batch["mask"].dtype == torch.bool
    assert sorted(torch.bincount(batch["label"]).tolist())[-2:] == [4, 4]


def test_glyphs_are_a_function_of_the_world_and_classes_differ_between_splits() -> None:
    data, same, other = glyphs(), glyphs(), glyphs(world_seed=1)
    everything = torch.arange(30)
    first = data.source("train").fetch(everything)
    assert torch.equal(first["image"], same.source("train").fetch(everything)["image"])
    assert not torch.equal(first["image"], other.source("train").fetch(everything)["image"])
    assert {split: len(data.source(split)) for split in data.spec.sizes} == data.spec.sizes
    means = {split: data.source(split).fetch(torch.arange(3))["image"] for split in ("train", "val", "test")}
    assert not torch.equal(means["train"], means["test"])
    assert (first["image"].std() - 1).abs() < 0.3  # the stated level fits


def test_images_of_a_class_are_more_alike_than_images_of_two() -> None:
    batch = glyphs(images=[20, 4, 6]).source("train").fetch(torch.arange(120))
    image, label = batch["image"].flatten(1), batch["label"]
    distance = torch.cdist(image, image)
    same = label[:, None] == label
    assert distance[same & (distance > 0)].mean() < 0.95 * distance[~same].mean()


def test_a_limit_keeps_all_classes() -> None:
    assert glyphs(limit=6).source("train").fetch(torch.arange(6))["label"].tolist() == list(range(6))
    assert class_cyclic_order(torch.tensor([0, 0, 1, 1, 1])).tolist() == [0, 2, 1, 3, 4]


@pytest.mark.parametrize(
    "wrong", [{"classes": [6, 3]}, {"images": [5, 0, 6]}, {"glyph": {"colour": 1}}, {"glyph": {"image_size": 4}}]
)
def test_impossible_worlds_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        glyphs(**wrong)


@pytest.mark.parametrize("views", [{"left": {"size": 28}}, {"global": {"size": 27}}])
def test_views_must_fit_the_patches(views: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="patches of 7"):
        glyphs(views=views)


@pytest.fixture
def omniglot_root() -> Path:
    root = Path(os.environ.get("REPRISE_DATA", ""))
    if not (root / "omniglot" / "images_background_small1").is_dir():
        pytest.skip("Omniglot is not at hand (REPRISE_DATA)")
    return root


def test_omniglot_is_split_by_character(omniglot_root: Path) -> None:
    data = Omniglot(classes=[80, 20, 36], split_seed=3, **COMMON)
    assert {split: len(data.source(split)) for split in data.spec.sizes} == {"train": 1600, "val": 400, "test": 720}
    images = [data.read(split)["image"].reshape(-1, 784) for split in ("train", "val", "test")]
    keys = [{row.tobytes() for row in split} for split in images]
    assert not keys[0] & keys[2]
    assert not keys[0] & keys[1]
    batch = data.source("train").fetch(torch.arange(1600))["image"]
    assert abs(float(batch.mean())) < 0.1
    assert abs(float(batch.std()) - 1) < 0.1


def test_omniglot_has_136_characters() -> None:
    with pytest.raises(ConfigError, match=str(CHARACTERS)):
        Omniglot(classes=[100, 20, 20], **COMMON)


def test_missing_omniglot_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REPRISE_DATA", str(tmp_path))
    with pytest.raises(DataError, match="reprise data fetch omniglot"):
        Omniglot(**COMMON).source("train")
    (tmp_path / "omniglot" / "images_background_small1" / "Greek" / "character01").mkdir(parents=True)
    with pytest.raises(DataError, match="1 characters of 136"):
        Omniglot(**COMMON).source("train")


def test_photographs_in_class_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from PIL import Image

    monkeypatch.setenv("REPRISE_DATA", str(tmp_path))
    options: dict[str, Any] = COMMON | {"views": {"global": {"count": 2, "size": 28}}, "batch_size": 4}
    data = FewShotFolders(classes=[2, 2, 2], image_size=28, resize=32, **options)
    with pytest.raises(DataError, match="mini_imagenet is not there"):
        data.source("train")
    for split in ("train", "test"):
        for name in "ab":
            folder = tmp_path / "mini_imagenet" / split / name
            folder.mkdir(parents=True)
            for number in range(3):
                Image.new("RGB", (40, 36), (number * 60, 90, 30)).save(folder / f"{number}.jpg")
    batch = data.train_dataloader().batch(1)
    assert batch["global_1"].shape == (4, 3, 28, 28)
    assert batch["mask"].shape == (4, 2, 4, 4)
    image = next(iter(data.test_dataloader()))["image"]
    assert image.shape == (6, 3, 28, 28)
    cifar = FewShotFolders(classes=[2, 2, 2], image_size=28, resize=32, normalise="cifar", **options)
    level = 255 * data.normalisation.invert(image)
    expected = (level - torch.tensor([129.4, 124.1, 112.5])[:, None, None]) / torch.tensor([68.2, 65.4, 70.5])[
        :, None, None
    ]
    torch.testing.assert_close(next(iter(cifar.test_dataloader()))["image"], expected, atol=1e-4, rtol=1e-4)
