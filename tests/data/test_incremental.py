"""Base and novel classes, exact shots, proposals among the objects, in memory and for COCO's files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast, get_args

import numpy as np
import pytest
import torch
from PIL import Image

from reprise.data.coco import COCO
from reprise.data.images import DetectionSource
from reprise.data.incremental import (
    IncrementalDetection,
    Stage,
    annotations_of,
    base_selection,
    shots_selection,
)
from reprise.data.shapes.dataset import ShapesDetection
from reprise.errors import ConfigError, DataError

SCENE = {"max_objects": 3, "max_overlap": 0.0, "image_size": 32, "shapes": ("circle", "square", "star")}
LABELS = [torch.tensor(row, dtype=torch.int64) for row in ([0, 2], [2, 2], [1], [], [2, 3, 3], [3, 0], [2])]


def _data(stage: Stage, *, seed: int = 0, shots: int = 3, novel: tuple[str, ...] = ("star",)) -> IncrementalDetection:
    options: dict[str, Any] = {"batch_size": 4, "steps": 3, "seed": seed, "eval_batch_size": 8}
    base = ShapesDetection(sizes=(40, 8, 8), scene=SCENE, flip=True, **options)
    search = {"count": 5, "spaces": ["lab"], "scales": [150.0], "strategies": ["all"], "min_region": 8}
    return IncrementalDetection(base=base, novel=novel, stage=stage, shots=shots, proposals=search, **options)


def test_base_images_have_a_base_object_and_keep_only_those() -> None:
    chosen = base_selection(LABELS, torch.tensor([2, 3]))
    assert chosen.items == [0, 2, 5]
    assert [row.tolist() for row in chosen.rows] == [[0], [0], [1]]


@pytest.mark.parametrize("seed", range(5))
def test_shots_are_exact_for_each_class(seed: int) -> None:
    chosen = shots_selection(LABELS, torch.tensor([2, 3]), 3, seed)
    kept = torch.cat([LABELS[item][row] for item, row in zip(*chosen, strict=True)])
    assert kept.bincount(minlength=4).tolist() == [0, 0, 3, 3]
    for item, rows in zip(*chosen, strict=True):  # all boxes that an image has of a drawn class
        for name in LABELS[item][rows].unique():
            assert (LABELS[item][rows] == name).sum() == (LABELS[item] == name).sum()


def test_shots_depend_on_the_seed_alone() -> None:
    draws = [shots_selection(LABELS, torch.tensor([2]), 2, seed).items for seed in range(12)]
    assert draws[0] == shots_selection(LABELS, torch.tensor([2]), 2, 0).items
    assert len({tuple(items) for items in draws}) > 1


def test_too_many_shots_are_an_error() -> None:
    with pytest.raises(DataError, match="boxes of the novel class 3 could be drawn, not 9"):
        shots_selection(LABELS, torch.tensor([3]), 9, 0)


def test_stages_of_a_data_set_in_memory() -> None:
    base, pseudo, novel = (_data(stage) for stage in get_args(Stage))
    assert base.base_labels.tolist() == [0, 1]
    assert base.novel_labels.tolist() == [2]
    for batch in base.train_dataloader():
        assert all(len(target["labels"]) > 0 and (target["labels"] < 2).all() for target in batch["targets"])
    seen = torch.cat([target["labels"] for batch in pseudo.train_dataloader() for target in batch["targets"]])
    assert set(seen.tolist()) == {0, 1, 3}
    shots = annotations_of(novel.source("train"))
    assert torch.cat(shots).tolist() == [2, 2, 2]
    tested = torch.cat([target["labels"] for batch in novel.test_dataloader() for target in batch["targets"]])
    assert set(tested.tolist()) == {0, 1, 2}


def test_annotations_survive_the_proposals() -> None:
    base, pseudo = _data("base").source("train"), _data("self_supervised").source("train")
    assert isinstance(base, DetectionSource)
    assert isinstance(pseudo, DetectionSource)
    assert len(base) == len(pseudo)
    for item in range(len(base)):
        known, both = base.target(item), pseudo.target(item)
        count = len(known["labels"])
        assert torch.equal(known["boxes"], both["boxes"][:count])
        assert (both["labels"][count:] == 3).all()
        assert len(both["labels"]) - count <= 5


def test_batches_are_those_of_the_base_module_in_form_and_order() -> None:
    loader = _data("base", seed=4).train_dataloader()
    again = _data("base", seed=4).train_dataloader()
    assert len(loader) == 3
    assert all(torch.equal(a["image"], b["image"]) for a, b in zip(loader, again, strict=True))
    assert not torch.equal(_data("base", seed=5).train_dataloader().batch(0)["index"], loader.batch(0)["index"])


@pytest.mark.parametrize(("options", "message"), [({"novel": ("whale",)}, "whale"), ({"shots": 0}, "0 shots")])
def test_wrong_options_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        _data("incremental", **options)


def test_an_unknown_stage_and_search_option_are_named() -> None:
    with pytest.raises(ConfigError, match="later"):
        _data(cast(Stage, "later"))
    base = ShapesDetection(sizes=(4, 4, 4), scene=SCENE, batch_size=2, steps=1)
    with pytest.raises(ConfigError, match="depth"):
        IncrementalDetection(base=base, novel=["star"], proposals={"depth": 2}, batch_size=2, steps=1)


def _write_coco(root: Path) -> None:
    """Two images, each with a person (novel) and a zebra (base, id 24)."""
    for split in ("train2017", "val2017"):
        (root / "coco" / split).mkdir(parents=True)
        (root / "coco" / "annotations").mkdir(exist_ok=True)
        images, notes = [], []
        for number in (1, 2):
            pixels = np.full((60, 80, 3), 60, np.uint8)
            pixels[10:40, 10:30] = (220, 30, 30)
            pixels[20:50, 45:75] = (30, 200, 40)
            Image.fromarray(pixels).save(root / "coco" / split / f"{number}.png")
            images.append({"id": number, "file_name": f"{number}.png", "width": 80, "height": 60})
            for category, box in ((1, [45, 20, 30, 30]), (24, [10, 10, 20, 30])):
                notes.append({"image_id": number, "category_id": category, "bbox": box, "iscrowd": 0})
        text = json.dumps({"images": images, "annotations": notes})
        (root / "coco" / "annotations" / f"instances_{split}.json").write_text(text)


@pytest.mark.parametrize("stage", ["base", "self_supervised", "incremental"])
def test_stages_of_coco(stage: Stage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REPRISE_DATA", str(tmp_path))
    _write_coco(tmp_path)
    base = COCO(scales=(48, 64), max_size=120, eval_size=60, crop=False, batch_size=2, steps=2)
    search = {"count": 4, "min_region": 20, "max_side": 0.8}
    data = IncrementalDetection(
        base=base, novel=["person"], stage=stage, shots=2, proposals=search, batch_size=2, steps=2, eval_batch_size=1
    )
    labels = {int(label) for batch in data.train_dataloader() for t in batch["targets"] for label in t["labels"]}
    assert labels == {"base": {24}, "self_supervised": {24, 91}, "incremental": {1}}[stage]
    tested = {int(label) for batch in data.test_dataloader() for t in batch["targets"] for label in t["labels"]}
    assert tested == {1, 24}
    if stage == "self_supervised":
        target = data.train_dataloader().batch(0)["targets"][0]
        person = torch.tensor([0.75, 35 / 60, 30 / 80, 0.5])
        mirrored = torch.tensor([0.25, 35 / 60, 30 / 80, 0.5])
        near = [(target["boxes"] - box).abs().sum(1).min() for box in (person, mirrored)]
        assert min(near) < 0.15  # flipped and resized with the picture
