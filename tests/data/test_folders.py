"""Data on disk at the published scale, on tiny fake trees: loaders, ImageNet, COCO."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from reprise import paths
from reprise.data.coco import COCO, read_annotations, resized_size
from reprise.data.folder import FolderDataModule, FolderSource, StepRequests
from reprise.data.imagenet import ImageNet
from reprise.data.loader import Batch, step_indices
from reprise.errors import ConfigError, DataError


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("REPRISE_DATA", str(tmp_path))
    return tmp_path


def picture(path: Path, height: int, width: int, seed: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path, format="JPEG")


@pytest.fixture
def imagenet(root: Path) -> Path:
    """Two classes with 6 training and 2 validation images each."""
    for part, count in (("train", 6), ("val", 2)):
        for label, wnid in enumerate(("n01", "n02")):
            for number in range(count):
                picture(root / "imagenet" / part / wnid / f"{number}.JPEG", 20 + number, 30, 10 * label + number)
    return root / "imagenet"


@pytest.fixture
def coco(root: Path) -> Path:
    """Three training and two validation images; image 7 has a crowd and a box without an area, image 9 has nothing."""
    for part, ids in (("train2017", (3, 7, 9)), ("val2017", (1, 2))):
        images, notes = [], []
        for number in ids:
            picture(root / "coco" / part / f"{number:012}.jpg", 40, 60, number)
            images.append({"id": number, "file_name": f"{number:012}.jpg", "height": 40, "width": 60})
            if number != 9:
                notes.append({"image_id": number, "category_id": 90, "bbox": [10, 10, 20, 10], "iscrowd": 0})
                notes.append({"image_id": number, "category_id": 1, "bbox": [50, 30, 30, 30], "iscrowd": 0})
        if part == "train2017":
            notes.append({"image_id": 7, "category_id": 1, "bbox": [0, 0, 60, 40], "iscrowd": 1})
            notes.append({"image_id": 7, "category_id": 1, "bbox": [5, 5, 0, 10], "iscrowd": 0})
        path = root / "coco" / "annotations" / f"instances_{part}.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps({"images": images[::-1], "annotations": notes}))
    return root / "coco"


def make_imagenet(**options: object) -> ImageNet:
    small = {"batch_size": 4, "steps": 3, "image_size": 16, "resize": 20, "val_size": 4, "num_classes": 2}
    return ImageNet(**{**small, **options})


def make_coco(**options: object) -> COCO:
    small = {"batch_size": 2, "steps": 4, "scales": (32, 48), "max_size": 64, "eval_size": 40, "crop": False}
    return COCO(**{**small, **options})


def same(one: Batch, other: Batch) -> bool:
    if not torch.equal(one["image"], other["image"]) or not torch.equal(one["index"], other["index"]):
        return False
    pairs = zip(one.get("targets", []), other.get("targets", []), strict=True)
    return all(torch.equal(a[name], b[name]) for a, b in pairs for name in a)


def test_requests_are_a_pure_function_of_seed_and_step():
    whole = list(StepRequests(10, 4, 6, seed=1))
    assert list(StepRequests(10, 4, 6, seed=1, start=4)) == whole[4:]
    assert [[item for item, _ in batch] for batch in whole] == [
        step_indices(10, 4, 1, step).tolist() for step in range(6)
    ]
    left, right = (list(StepRequests(10, 4, 6, seed=1, rank=rank, world=2)) for rank in range(2))
    assert [a + b for a, b in zip(left, right, strict=True)] == whole
    seeds = [seed for batch in whole for _, seed in batch]
    assert len(set(seeds)) == len(seeds)


@pytest.mark.parametrize("kind", ["imagenet", "coco"])
def test_resume_workers_and_the_global_generator_do_not_matter(kind: str, imagenet: Path, coco: Path):
    make = make_imagenet if kind == "imagenet" else make_coco
    torch.manual_seed(0)
    state = torch.get_rng_state()
    whole = list(make().train_dataloader())
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(77)
    resumed = make(workers=2)
    resumed.start_step = 1
    loader = resumed.train_dataloader()
    assert len(loader) == len(whole)
    late = list(loader)
    assert len(late) == len(whole) - 1
    assert all(same(a, b) for a, b in zip(whole[1:], late, strict=True))
    assert same(loader.batch(2), whole[2])
    assert not same(make(seed=1).train_dataloader().batch(0), whole[0])


def test_imagenet_splits_and_batches(imagenet: Path):
    module = make_imagenet()
    sources = {split: module.source(split) for split in ("train", "val", "test")}
    assert {split: len(source) for split, source in sources.items()} == {"train": 8, "val": 4, "test": 4}
    batch = next(iter(module.train_dataloader()))
    assert batch["image"].shape == (4, 3, 16, 16)
    assert batch["label"].dtype == torch.int64
    test = list(make_imagenet(eval_batch_size=3).test_dataloader())
    assert [len(batch["label"]) for batch in test] == [3, 1]
    assert torch.cat([batch["label"] for batch in test]).tolist() == [0, 0, 1, 1]
    assert same(sources["test"].fetch(torch.arange(3)), test[0])
    assert len(make_imagenet(val_size=0).source("train")) == 12
    assert len(make_imagenet(val_size=0).source("val")) == 4
    assert len(make_imagenet(limit=2).source("train")) == 2


def test_imagenet_pictures_may_be_scaled_to_the_square_whole(imagenet: Path):
    pixels = np.zeros((20, 60, 3), np.uint8)
    pixels[:, 40:] = 255
    Image.fromarray(pixels).save(imagenet / "val" / "n01" / "0.JPEG", format="JPEG", quality=95)
    cropped, whole = (
        make_imagenet(resize=side, normalise="unit").source("test").fetch(torch.tensor([0]))["image"]
        for side in (20, None)
    )
    assert whole.shape == cropped.shape == (1, 3, 16, 16)
    assert whole[..., -3:].min() > 0.9
    assert cropped.max() < 0.1


def test_imagenet_evaluation_of_two_ranks_covers_every_item(imagenet: Path):
    module = make_imagenet(eval_batch_size=2)
    loader = module.test_dataloader()
    parts = [type(loader)(module.source("test"), 2, rank, 2, workers=0) for rank in range(2)]
    assert sorted(int(i) for part in parts for batch in part for i in batch["index"]) == [0, 1, 2, 3]


def test_ranks_have_equally_many_evaluation_batches(imagenet: Path):
    module = make_imagenet(limit=5)
    loader, source = module.test_dataloader(), module.source("train")
    parts = [type(loader)(source, 2, rank, 2, workers=0) for rank in range(2)]  # three items and two
    assert [len(list(part)) for part in parts] == [2, 2] == [len(part) for part in parts]
    assert sorted(int(i) for part in parts for batch in part for i in batch["index"]) == list(range(5))


def test_missing_and_foreign_imagenet(root: Path, imagenet: Path):
    with pytest.raises(DataError, match="2 class folders, not 1000"):
        make_imagenet(num_classes=1000).source("train")
    with pytest.raises(DataError, match="only 12"):
        make_imagenet(val_size=50).source("train")
    (imagenet / "val" / "n01" / "0.JPEG").write_bytes(b"no image")
    with pytest.raises(DataError, match="not a readable image"):
        list(make_imagenet().test_dataloader())
    for path in (imagenet / "val" / "n01").iterdir():
        path.unlink()
    with pytest.raises(DataError, match="not complete"):
        make_imagenet().source("test")


def test_coco_annotations(coco: Path):
    records = read_annotations(coco / "annotations" / "instances_train2017.json")
    assert [record.image_id for record in records] == [3, 7, 9]
    assert [record.labels for record in records] == [[90, 1], [90, 1], []]
    assert records[0].boxes == [(10, 10, 30, 20), (50, 30, 60, 40)]


def test_coco_evaluation_batches(coco: Path):
    (batch,) = make_coco(eval_batch_size=2).test_dataloader()
    assert batch["image"].shape == (2, 3, 40, 60)
    target = batch["targets"][0]
    assert target["labels"].tolist() == [90, 1]
    assert target["boxes"][0].tolist() == pytest.approx([20 / 60, 15 / 40, 20 / 60, 10 / 40])
    assert (target["size"].tolist(), target["orig_size"].tolist(), int(target["image_id"])) == ([40, 60], [40, 60], 1)


def test_coco_training_batches_are_padded_and_flipped_with_their_boxes(coco: Path):
    centres, sizes = set(), set()
    for batch in make_coco(steps=12).train_dataloader():
        assert batch["image"].shape[0] == 2
        for image, mask, target in zip(batch["image"], batch["mask"], batch["targets"], strict=True):
            height, width = target["size"].tolist()
            sizes.add((height, width))
            assert not mask[:height, :width].any()
            assert int((~mask).sum()) == height * width
            assert not image[:, height:].any()
            centres |= {round(float(box[0]), 2) for box in target["boxes"][:1]}
    assert sizes == {(32, 48), (43, 64)}  # 48 x 72 is limited by the longest side of 64
    assert centres == {0.33, 0.67}


def test_coco_crops_keep_boxes_inside(coco: Path):
    module = make_coco(crop=True, flip=False, steps=8)
    counts = set()
    for batch in module.train_dataloader():
        for target in batch["targets"]:
            low, high = (
                target["boxes"][:, :2] - target["boxes"][:, 2:] / 2,
                target["boxes"][:, :2] + target["boxes"][:, 2:] / 2,
            )
            assert (low >= -1e-5).all()
            assert (high <= 1 + 1e-5).all()
            assert (target["boxes"][:, 2:] > 0).all()
            assert len(target["labels"]) == len(target["boxes"])
            counts.add(len(target["labels"]))
    assert counts <= {0, 1, 2}


def test_missing_and_foreign_coco(root: Path, coco: Path):
    (coco / "annotations" / "instances_val2017.json").write_text('{"images": [')
    with pytest.raises(DataError, match="not a COCO annotation file"):
        make_coco().source("test")
    (coco / "annotations" / "instances_val2017.json").unlink()
    with pytest.raises(DataError, match="reprise data fetch coco"):
        make_coco().source("test")
    (coco / "train2017" / f"{3:012}.jpg").unlink()
    with pytest.raises(DataError, match="not a readable image"):
        make_coco().source("train").fetch(torch.tensor([0]))


@pytest.mark.parametrize("make", [make_imagenet, make_coco])
def test_specs_need_no_data_and_missing_data_is_an_error(make, root: Path):
    module = make()
    assert isinstance(module, FolderDataModule)
    assert set(module.spec.sizes) == {"train", "val", "test"}
    with pytest.raises(DataError) as caught:
        module.train_dataloader()
    assert str(root) in str(caught.value)
    assert "reprise data fetch" in str(caught.value)


def test_wrong_options_are_refused(imagenet: Path):
    for options in ({"resize": 10}, {"val_size": -1}, {"workers": -1}, {"normalise": "none"}):
        with pytest.raises(ConfigError):
            make_imagenet(**options)
    with pytest.raises(ConfigError):
        make_coco(scales=(), max_size=10)
    with pytest.raises(ConfigError, match="split evenly"):
        make_imagenet(batch_size=5).train_dataloader().__class__(make_imagenet().source("train"), 5, 1, 0, world=2)
    assert isinstance(make_imagenet().source("train"), FolderSource)


@pytest.mark.parametrize(("name", "kind"), [("imagenet", ImageNet), ("coco", COCO)])
def test_the_configuration_files_have_every_option(name: str, kind: type):
    config = yaml.safe_load((paths.conf_dir() / "data" / f"{name}.yaml").read_text())
    assert config.pop("_target_").endswith(kind.__name__)
    module = kind(**{**config, "steps": 1, "seed": 0})
    assert module.spec.num_classes == (1000 if kind is ImageNet else 91)


@pytest.mark.parametrize(
    ("height", "width", "expected"),
    [(480, 640, (800, 1066)), (640, 480, (1066, 800)), (300, 900, (444, 1332)), (500, 500, (800, 800))],
)
def test_detr_sizes(height: int, width: int, expected: tuple[int, int]):
    assert resized_size(height, width, 800, 1333) == expected
