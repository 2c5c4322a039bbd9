"""COCO 2017 detection from its JSON annotations, with DETR's augmentation, for recipes at the published scale."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torchvision import tv_tensors

from reprise.data.folder import FolderDataModule, FolderSource, Sample
from reprise.data.imagenet import MEAN, STD, read_image
from reprise.data.images import Normalisation
from reprise.data.loader import Batch
from reprise.data.spec import DataSpec
from reprise.data.splits import limited
from reprise.errors import ConfigError, DataError
from reprise.paths import data_root

COUNTS = {"train": 118_287, "val": 5000}
NEXT_STEP = "reprise data fetch coco   (or set REPRISE_DATA to a folder that has it)"


@dataclass(frozen=True)
class Record:
    """One image: labels are COCO's raw category ids, boxes x0, y0, x1, y1 in pixels."""

    file: str
    image_id: int
    labels: list[int]
    boxes: list[tuple[float, float, float, float]]


def read_annotations(path: Path) -> list[Record]:
    """All images of an `instances_*.json`, in order of id; crowds and boxes without an area are left out.

    Boxes are cut at the image border, as in DETR's conversion of COCO targets.

    Raises:
        DataError: the file is missing, or is not COCO JSON.
    """
    if not path.is_file():
        raise DataError("COCO is not there", looked_at=path, next_step=NEXT_STEP)
    try:
        content = json.loads(path.read_text())
        sizes = {int(image["id"]): (float(image["width"]), float(image["height"])) for image in content["images"]}
        records = {
            int(image["id"]): Record(Path(image["file_name"]).name, int(image["id"]), [], [])
            for image in content["images"]
        }
        for note in content["annotations"]:
            _add(records[int(note["image_id"])], note, sizes[int(note["image_id"])])
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{path.name} is not a COCO annotation file: {error!r}", looked_at=path, next_step=NEXT_STEP
        ) from error
    return [records[key] for key in sorted(records)]


def _add(record: Record, note: dict[str, Any], size: tuple[float, float]) -> None:
    x, y, width, height = (float(value) for value in note["bbox"])
    box = (max(x, 0.0), max(y, 0.0), min(x + width, size[0]), min(y + height, size[1]))
    if not note.get("iscrowd", 0) and box[2] > box[0] and box[3] > box[1]:
        record.labels.append(int(note["category_id"]))
        record.boxes.append(box)


@dataclass
class CocoItems:
    """Images with their objects: image float [3, h, w] and a target of labels, boxes (cxcywh, relative), sizes and id.

    Args:
        scales: shorter sides, one of which is drawn for each training image.
        max_size: limit of the longer side.
        eval_size: shorter side in evaluation.
        crop: also crop at random with probability one half before the last resizing (DETR, section A.4).
    """

    folder: Path
    records: list[Record]
    scales: tuple[int, ...]
    max_size: int
    eval_size: int
    flip: bool
    crop: bool
    normalisation: Normalisation

    def __len__(self) -> int:
        return len(self.records)

    def item(self, index: int, augment: bool) -> Sample:
        record = self.records[index]
        image = read_image(self.folder / record.file)
        original = torch.tensor(image.shape[1:])
        canvas = (int(original[0]), int(original[1]))
        corners = torch.tensor(record.boxes, dtype=torch.float32).reshape(-1, 4)
        boxes = tv_tensors.BoundingBoxes(corners, format="XYXY", canvas_size=canvas)
        labels = torch.tensor(record.labels, dtype=torch.int64)
        if augment:
            image, boxes, labels = self._augment(image, boxes, labels)
        else:
            image, boxes = _resize(image, boxes, self.eval_size, self.max_size)
        size = torch.tensor(image.shape[1:])
        target = {
            "labels": labels,
            "boxes": relative_boxes(boxes, size),
            "size": size,
            "orig_size": original,
            "image_id": torch.tensor(record.image_id),
        }
        return {"image": self.normalisation.apply(image), "target": target}

    def _augment(
        self, image: Tensor, boxes: tv_tensors.BoundingBoxes, labels: Tensor
    ) -> tuple[Tensor, tv_tensors.BoundingBoxes, Tensor]:
        from torchvision.transforms.v2 import functional as tvf

        if self.flip and torch.rand(()) < 0.5:
            image, boxes = tvf.horizontal_flip(image), tvf.horizontal_flip(boxes)
        if self.crop and torch.rand(()) < 0.5:
            image, boxes = _resize(image, boxes, _choose((400, 500, 600)), None)
            height, width = (_between(384, min(int(side), 600)) for side in image.shape[1:])
            top, left = _between(0, image.shape[1] - height), _between(0, image.shape[2] - width)
            image, boxes = tvf.crop(image, top, left, height, width), tvf.crop(boxes, top, left, height, width)
            kept = (boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])
            boxes, labels = tv_tensors.wrap(boxes[kept], like=boxes), labels[kept]
        image, boxes = _resize(image, boxes, _choose(self.scales), self.max_size)
        return image, boxes, labels


def _choose(values: Sequence[int]) -> int:
    return values[int(torch.randint(len(values), ()))]


def _between(low: int, high: int) -> int:
    """Uniform in low..high; `high` where the range is empty (an image smaller than the smallest crop)."""
    return high if high <= low else int(torch.randint(low, high + 1, ()))


def _resize(
    image: Tensor, boxes: tv_tensors.BoundingBoxes, shorter: int, longest: int | None
) -> tuple[Tensor, tv_tensors.BoundingBoxes]:
    """Both resized as `resized_size` says."""
    from torchvision.transforms.v2 import functional as tvf

    size = list(resized_size(image.shape[1], image.shape[2], shorter, longest))
    return tvf.resize(image, size, antialias=True), tvf.resize(boxes, size)


def resized_size(height: int, width: int, shorter: int, longest: int | None) -> tuple[int, int]:
    """(h, w) with the shorter side at `shorter`, or less so that the longer is about `longest`; rounded as by DETR."""
    low, high = min(height, width), max(height, width)
    if longest is not None and shorter * high / low > longest:
        shorter = max(1, round(longest * low / high))
    longer = max(1, int(shorter * high / low))
    return (shorter, longer) if height <= width else (longer, shorter)


def relative_boxes(boxes: Tensor, size: Tensor) -> Tensor:
    """x0, y0, x1, y1 in pixels to cxcywh relative to (h, w), float32 [M, 4]."""
    corners = boxes.as_subclass(Tensor)
    centre, extent = (corners[:, :2] + corners[:, 2:]) / 2, corners[:, 2:] - corners[:, :2]
    return torch.cat([centre, extent], 1) / size.flip(0).repeat(2)


def collate(samples: list[Sample]) -> Batch:
    """Images padded (0) at the right and below to the largest of the batch, with the mask of the padding."""
    height, width = (max(sample["image"].shape[side] for sample in samples) for side in (1, 2))
    image = torch.zeros(len(samples), 3, height, width)
    mask = torch.ones(len(samples), height, width, dtype=torch.bool)
    for position, sample in enumerate(samples):
        _, h, w = sample["image"].shape
        image[position, :, :h, :w] = sample["image"]
        mask[position, :h, :w] = False
    index = torch.tensor([sample["index"] for sample in samples])
    return {"index": index, "image": image, "mask": mask, "targets": [sample["target"] for sample in samples]}


class COCO(FolderDataModule):
    """Detection at the published scale; val and test are both val2017, as in the literature.

    Batches: image float [B, 3, H, W] padded to the largest of the batch, mask bool [B, H, W] (True = padding), index,
    and targets: a list of dicts labels int64 [M] (raw category ids, 1..90), boxes float [M, 4] (cxcywh, relative to the
    unpadded image), size and orig_size int64 [2] (h, w), image_id.

    Args:
        scales, max_size, eval_size, crop: see `CocoItems`.
        flip: mirror training images with probability one half.
    """

    def __init__(
        self,
        *,
        scales: Sequence[int] = tuple(range(480, 801, 32)),
        max_size: int = 1333,
        eval_size: int = 800,
        flip: bool = True,
        crop: bool = True,
        normalise: str = "standard",
        **common: Any,
    ) -> None:
        super().__init__(**common)
        if not scales or min(scales) < 1 or max_size < max(scales):
            raise ConfigError(
                f"shorter sides {list(scales)} under a longest side of {max_size}", looked_at="data.scales"
            )
        self.scales, self.max_size, self.eval_size = tuple(scales), max_size, eval_size
        self.flip, self.crop = flip, crop
        self.normalisation = Normalisation.named(normalise, MEAN, STD)

    @property
    def spec(self) -> DataSpec:
        from torchvision.models.detection import FasterRCNN_ResNet50_FPN_Weights

        return DataSpec(
            name="coco",
            image_shape=(3, self.eval_size, self.max_size),
            classes=tuple(FasterRCNN_ResNet50_FPN_Weights.COCO_V1.meta["categories"]),  # by raw id; gaps are "N/A"
            sizes=limited({"train": COUNTS["train"], "val": COUNTS["val"], "test": COUNTS["val"]}, self.limit),
            licence="CC BY 4.0 (annotations); Flickr terms (images)",
            source="https://cocodataset.org (Lin et al. 2014)",
        )

    def build_source(self, split: str) -> FolderSource:
        name = "train2017" if split == "train" else "val2017"
        folder = data_root() / "coco"
        records = read_annotations(folder / "annotations" / f"instances_{name}.json")
        if not (folder / name).is_dir():
            raise DataError("COCO's images are not there", looked_at=folder / name, next_step=NEXT_STEP)
        items = CocoItems(
            folder / name,
            records,
            self.scales,
            self.max_size,
            self.eval_size,
            self.flip,
            self.crop,
            self.normalisation,
        )
        return FolderSource(items, collate, self.limit)
