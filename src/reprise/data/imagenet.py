"""ImageNet-1k (ILSVRC 2012) from class folders, for recipes at the published scale."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from reprise.data.folder import FolderDataModule, FolderSource, Sample, subset
from reprise.data.images import Normalisation
from reprise.data.spec import DataSpec
from reprise.data.splits import limited, stratified_parts
from reprise.errors import ConfigError, DataError
from reprise.paths import data_root

COUNTS = {"train": 1_281_167, "val": 50_000}
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
NEXT_STEP = "reprise data fetch imagenet   (says how to get it; or set REPRISE_DATA to a folder that has it)"


@dataclass
class ImageFolderItems:
    """Items of a torchvision `ImageFolder`: image float [3, S, S] and label.

    Args:
        folder: has one folder of images for each class.
        classes: how many classes there must be.
        image_size: S. Training: a random resized crop. Evaluation: shorter side to `resize`, then the centre;
            with `resize` None the whole picture, scaled to the square whatever its shape.
        crop_scale: share of the area of random resized crops; the aspect ratio is 3/4 to 4/3.
        flip: mirror training images with probability one half.
    """

    folder: Path
    classes: int
    image_size: int
    resize: int | None
    crop_scale: tuple[float, float]
    flip: bool
    normalisation: Normalisation
    files: list[tuple[str, int]] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        from torchvision.datasets import ImageFolder

        if not self.folder.is_dir():
            raise DataError("ImageNet is not there", looked_at=self.folder, next_step=NEXT_STEP)
        try:
            listing = ImageFolder(str(self.folder))
        except (OSError, FileNotFoundError) as error:
            raise DataError(f"ImageNet is not complete: {error}", looked_at=self.folder, next_step=NEXT_STEP) from error
        if len(listing.classes) != self.classes:
            raise DataError(
                f"ImageNet has {len(listing.classes)} class folders, not {self.classes}",
                looked_at=self.folder,
                next_step="reprise data check imagenet",
            )
        self.files = listing.samples

    def __len__(self) -> int:
        return len(self.files)

    def item(self, index: int, augment: bool) -> Sample:
        from torchvision.transforms import v2
        from torchvision.transforms.v2 import functional as tvf

        path, label = self.files[index]
        image = read_image(Path(path))
        if augment:
            side = [self.image_size, self.image_size]
            image = v2.RandomResizedCrop(side, scale=self.crop_scale, antialias=True)(image)
            image = tvf.horizontal_flip(image) if self.flip and torch.rand(()) < 0.5 else image
        elif self.resize is None:
            image = tvf.resize(image, [self.image_size, self.image_size], antialias=True)
        else:
            image = tvf.resize(image, [self.resize], antialias=True)
            image = tvf.center_crop(image, [self.image_size, self.image_size])
        return {"image": self.normalisation.apply(image), "label": label}


def read_image(path: Path) -> torch.Tensor:
    """uint8 [3, H, W]; grey and CMYK pictures are converted.

    Raises:
        DataError: it is not a readable picture.
    """
    from PIL import Image

    try:
        with Image.open(path) as picture:
            pixels = np.array(picture.convert("RGB"))
    except (OSError, ValueError, SyntaxError) as error:
        raise DataError(
            f"{path.name} is not a readable image", looked_at=path, next_step="bring this file again"
        ) from error
    return torch.from_numpy(pixels).permute(2, 0, 1)


class ImageNet(FolderDataModule):
    """Classification at the published scale. Batches: image float [B, 3, S, S], label and index int64 [B].

    Args:
        image_size, resize, crop_scale, flip: see `ImageFolderItems`.
        val_size: images held out of train for validation, stratified by `split_seed`; with 0, validation uses the
            official validation images, which are also the test set.
        normalise: `standard` (ImageNet's mean and std), `symmetric` ([-1, 1]) or `unit` ([0, 1]).
        num_classes: class folders there must be.
    """

    def __init__(
        self,
        *,
        image_size: int = 224,
        resize: int | None = 256,
        crop_scale: Sequence[float] = (0.08, 1.0),
        flip: bool = True,
        val_size: int = 10_000,
        split_seed: int = 0,
        normalise: str = "standard",
        num_classes: int = 1000,
        **common: Any,
    ) -> None:
        super().__init__(**common)
        if resize is not None and resize < image_size:
            raise ConfigError(f"a centre of {image_size} does not fit a side of {resize}", looked_at="data.resize")
        if not 0 <= val_size < COUNTS["train"]:
            raise ConfigError(f"{val_size} validation images of {COUNTS['train']}", looked_at="data.val_size")
        self.image_size, self.resize, self.flip = image_size, resize, flip
        self.crop_scale = (crop_scale[0], crop_scale[1])
        self.val_size, self.split_seed, self.num_classes = val_size, split_seed, num_classes
        self.normalisation = Normalisation.named(normalise, MEAN, STD)

    @property
    def spec(self) -> DataSpec:
        from torchvision.models import ResNet18_Weights

        val = self.val_size or COUNTS["val"]
        sizes = {"train": COUNTS["train"] - self.val_size, "val": val, "test": COUNTS["val"]}
        names = tuple(ResNet18_Weights.IMAGENET1K_V1.meta["categories"])
        return DataSpec(
            name="imagenet",
            image_shape=(3, self.image_size, self.image_size),
            classes=names if self.num_classes == len(names) else tuple(map(str, range(self.num_classes))),
            sizes=limited(sizes, self.limit),
            licence="ImageNet terms of access (research)",
            source="https://image-net.org/challenges/LSVRC/2012",
        )

    def _items(self, part: str) -> ImageFolderItems:
        folder = data_root() / "imagenet" / part
        return ImageFolderItems(
            folder, self.num_classes, self.image_size, self.resize, self.crop_scale, self.flip, self.normalisation
        )

    def build_source(self, split: str) -> FolderSource:
        if split == "test" or (split == "val" and not self.val_size):
            return FolderSource(self._items("val"), limit=self.limit)
        items = self._items("train")
        if not self.val_size:
            return FolderSource(items, limit=self.limit)
        labels = [label for _, label in items.files]
        if self.val_size >= len(labels):
            raise DataError(
                f"ImageNet has only {len(labels)} training images", looked_at=items.folder, next_step=NEXT_STEP
            )
        sizes = [self.val_size, len(labels) - self.val_size]
        val, train = stratified_parts(labels, sizes, self.split_seed, "imagenet")
        return FolderSource(subset(items, (val if split == "val" else train).tolist()), limit=self.limit)
