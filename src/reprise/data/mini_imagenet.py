"""Few-shot photographs from class folders, `<folder>/{train,val,test}/<class>/*`: miniImageNet and its like."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from reprise.data.fewshot import mask_grids
from reprise.data.folder import FolderDataModule, FolderSource, Sample
from reprise.data.imagenet import MEAN, STD
from reprise.data.imagenet_views import ViewItems
from reprise.data.images import Normalisation
from reprise.data.spec import DataSpec
from reprise.data.splits import limited
from reprise.data.views import ViewOptions, view_options
from reprise.errors import ConfigError, DataError
from reprise.nn.masks import MaskSampler
from reprise.paths import data_root
from reprise.seeding import derive

IMAGES_PER_CLASS = 600
# Of CIFAR-FS and FC100 (released SMKD code, in 8-bit levels).
CIFAR_MEAN = tuple(level / 255 for level in (129.4, 124.1, 112.5))
CIFAR_STD = tuple(level / 255 for level in (68.2, 65.4, 70.5))
SPLITS = ("train", "val", "test")


@dataclass
class MaskedViewItems(ViewItems):
    """`ViewItems` with one block mask for each global view: `mask` bool [G, h/P, w/P]."""

    masks: MaskSampler
    grids: Sequence[int]

    def item(self, index: int, augment: bool) -> Sample:
        sample = super().item(index, augment)
        if not augment:
            return sample
        seed = int(torch.randint(2**62, (1,)))
        return {**sample, "mask": self.masks.sample(len(self.grids), self.grids[0], self.grids[0], seed)}


class FewShotFolders(FolderDataModule):
    """Base, validation and novel classes of photographs at the published scale.

    Batches: training: label, index, an entry for each view, `mask`; evaluation: image [B, 3, S, S], label, index.

    Args:
        folder: below the data root, with train, val and test.
        classes: class folders of the three.
        image_size, resize: evaluation: shorter side to `resize`, then the centre of `image_size`.
        views, masks, patch: see `fewshot.FewShotImages`.
        stage: 1 or 2; stage 2 draws other batches than a stage 1 of `stage1_steps`.
        normalise: `standard` (ImageNet's mean and std), `cifar` (those of CIFAR-FS and FC100), `symmetric` or `unit`.
    """

    def __init__(
        self,
        *,
        folder: str = "mini_imagenet",
        classes: Sequence[int] = (64, 16, 20),
        image_size: int = 224,
        resize: int = 256,
        views: Mapping[str, Mapping[str, Any]],
        masks: MaskSampler,
        patch: int = 16,
        stage: int = 1,
        stage1_steps: int = 0,
        normalise: str = "standard",
        **common: Any,
    ) -> None:
        super().__init__(**common)
        if stage == 2:
            self.seed = derive(self.seed, "after", stage1_steps)
        if resize < image_size:
            raise ConfigError(f"a centre of {image_size} does not fit a side of {resize}", looked_at="data.resize")
        self.folder, self.classes = folder, list(classes)
        self.image_size, self.resize, self.masks = image_size, resize, masks
        self.views: dict[str, ViewOptions] = view_options(views)
        self.grids = mask_grids(self.views, patch)
        self.normalisation = (
            Normalisation(CIFAR_MEAN, CIFAR_STD) if normalise == "cifar" else Normalisation.named(normalise, MEAN, STD)
        )

    @property
    def spec(self) -> DataSpec:
        sizes = {split: count * IMAGES_PER_CLASS for split, count in zip(SPLITS, self.classes, strict=True)}
        return DataSpec(
            name=self.folder,
            image_shape=(3, self.image_size, self.image_size),
            classes=tuple(f"class {number}" for number in range(self.classes[0])),
            sizes=limited(sizes, self.limit),
            licence="ImageNet terms of access (research)",
            source="Vinyals et al. 2016, split of Ravi and Larochelle 2017",
        )

    def build_source(self, split: str) -> FolderSource:
        place: Path = data_root() / self.folder / split
        if not place.is_dir():
            raise DataError(
                f"{self.folder} is not there", looked_at=place, next_step=f"reprise data fetch {self.folder}"
            )
        items = MaskedViewItems(
            place,
            self.classes[SPLITS.index(split)],
            self.image_size,
            self.resize,
            (1.0, 1.0),  # the views have crops of their own
            False,
            self.normalisation,
            self.views,
            self.masks,
            self.grids,
        )
        return FolderSource(items, limit=self.limit)
