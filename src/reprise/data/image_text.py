"""Pairs of pictures and captions on disk, for recipes at the published scale, and ImageNet for zero-shot tests."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from reprise.data.byte_pair import BytePairTokenizer, official_tokenizer
from reprise.data.captions import Captioned
from reprise.data.folder import FolderDataModule, FolderSource, Sample, subset
from reprise.data.images import Normalisation
from reprise.data.spec import DataSpec
from reprise.data.splits import limited
from reprise.errors import ConfigError, DataError
from reprise.paths import data_root
from reprise.seeding import derive

if TYPE_CHECKING:
    from PIL import Image

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # openai/CLIP
TABLE = "captions.tsv"
NEXT_STEP = (
    "WIT was never released; put pairs of your own (CC3M, CC12M, LAION) into <data root>/image_text: images/ and "
    "captions.tsv (tab-separated: file, caption)"
)


def preprocess(picture: Image.Image, size: int) -> Tensor:
    """The released evaluation input, float [3, size, size].

    The shorter side is resized to `size` on 8-bit pixels (PIL, bicubic), the centre is cut out and normalised.
    """
    from torchvision.transforms.v2 import InterpolationMode
    from torchvision.transforms.v2 import functional as tvf

    resized = tvf.resize(picture.convert("RGB"), [size], interpolation=InterpolationMode.BICUBIC)
    return _normalised(tvf.center_crop(resized, [size, size]))


def random_square(picture: Image.Image, size: int) -> Tensor:
    """The published augmentation, float [3, size, size]: a random square of the resized picture (section 2.4)."""
    from torchvision.transforms.v2 import InterpolationMode
    from torchvision.transforms.v2 import functional as tvf

    resized = tvf.resize(picture.convert("RGB"), [size], interpolation=InterpolationMode.BICUBIC)
    top, left = (int(torch.randint(0, side - size + 1, ())) for side in (resized.height, resized.width))
    return _normalised(tvf.crop(resized, top, left, size, size))


def _normalised(picture: Image.Image) -> Tensor:
    pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1)
    mean, std = torch.tensor(MEAN)[:, None, None], torch.tensor(STD)[:, None, None]
    return (pixels.float() / 255 - mean) / std


@dataclass
class PairItems:
    """Items of a table of pictures and captions: image float [3, S, S] and captions int64 [1, L], or text [L]."""

    folder: Path
    rows: list[tuple[str, str]]
    image_size: int
    context_length: int
    tokenizer: BytePairTokenizer

    def __len__(self) -> int:
        return len(self.rows)

    def item(self, index: int, augment: bool) -> Sample:
        name, caption = self.rows[index]
        picture = open_picture(self.folder / "images" / name)
        text = self.tokenizer([caption], self.context_length)
        if augment:
            return {"image": random_square(picture, self.image_size), "text": text[0]}
        return {"image": preprocess(picture, self.image_size), "captions": text}


@dataclass
class ClassItems:
    """Items of class folders, for zero-shot classification: image float [3, S, S] and label."""

    folder: Path
    image_size: int
    files: list[tuple[str, int]] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        from torchvision.datasets import ImageFolder

        if not self.folder.is_dir():
            raise DataError("ImageNet is not there", looked_at=self.folder, next_step="reprise data fetch imagenet")
        self.files = ImageFolder(str(self.folder)).samples

    def __len__(self) -> int:
        return len(self.files)

    def item(self, index: int, augment: bool) -> Sample:
        path, label = self.files[index]
        return {"image": preprocess(open_picture(Path(path)), self.image_size), "label": label}


def open_picture(path: Path) -> Image.Image:
    """A picture in RGB.

    Raises:
        DataError: it is missing or not readable.
    """
    from PIL import Image

    try:
        with Image.open(path) as picture:
            return picture.convert("RGB")
    except (OSError, ValueError, SyntaxError) as error:
        raise DataError(
            f"{path.name} is not a readable picture", looked_at=path, next_step="bring this file again"
        ) from error


def read_pairs(folder: Path) -> list[tuple[str, str]]:
    """(file, caption) of captions.tsv, in its order.

    Raises:
        DataError: the table is not there or lacks its columns.
    """
    path = folder / TABLE
    if not path.is_file():
        raise DataError("there are no image-text pairs", looked_at=path, next_step=NEXT_STEP)
    with path.open(encoding="utf-8", newline="") as handle:
        rows = list(csv.DictReader(handle, delimiter="\t", quoting=csv.QUOTE_NONE))
    if not rows or any(row.get("file") is None or row.get("caption") is None for row in rows):
        raise DataError(f"{TABLE} needs the columns file and caption", looked_at=path, next_step=NEXT_STEP)
    return [(row["file"], row["caption"]) for row in rows]


class ImageTextPairs(Captioned, FolderDataModule):
    """Training on pairs below the data root (`image_text`), zero-shot test on ImageNet's validation images.

    Batches: image float [B, 3, S, S]; text int64 [B, L] (training), captions [B, 1, L] (validation: retrieval of
    held-out pairs) or label int64 [B] (test).

    Args:
        image_size: S.
        val_size: pairs held out for validation, drawn by `split_seed`.
        bpe: the official merges file; None: `clip_bpe` below the data root.
        templates: prompts of the ImageNet classes, with {} for the name.
        class_names: a file with 1,000 names, one a line in the order of the class folders (the authors' edited names
            are worth 1.5 points); None: torchvision's.
        pairs: how many pairs the table has, for the plan (400 million in the paper).
    """

    def __init__(
        self,
        *,
        image_size: int = 224,
        context_length: int = 77,
        val_size: int = 10_000,
        split_seed: int = 0,
        bpe: str | None = None,
        templates: Sequence[str] = ("a photo of a {}.",),
        class_names: str | None = None,
        pairs: int = 400_000_000,
        **common: Any,
    ) -> None:
        super().__init__(**common)
        if not templates or any("{}" not in template for template in templates):
            raise ConfigError(f"prompts {list(templates)} need a {{}} for the name", looked_at="data.templates")
        self.image_size, self.context_length, self.val_size = image_size, context_length, val_size
        self.split_seed, self.bpe, self.templates, self.pairs = split_seed, bpe, list(templates), pairs
        self.class_names = class_names
        self.normalisation = Normalisation(MEAN, STD)
        self._tokenizer: BytePairTokenizer | None = None

    @property
    def spec(self) -> DataSpec:
        return DataSpec(
            name="image_text",
            image_shape=(3, self.image_size, self.image_size),
            classes=self._names(),
            sizes=limited({"train": self.pairs - self.val_size, "val": self.val_size, "test": 50_000}, self.limit),
            licence="that of the pairs",
            source="pairs of your own; WIT (Radford et al. 2021) was not released",
        )

    def _names(self) -> tuple[str, ...]:
        if self.class_names is None:
            from torchvision.models import ResNet18_Weights

            return tuple(ResNet18_Weights.IMAGENET1K_V1.meta["categories"])
        path = Path(self.class_names).expanduser()
        if not path.is_file():
            raise DataError("the class names are not there", looked_at=path, next_step="set data.class_names=null")
        return tuple(path.read_text(encoding="utf-8").splitlines())

    @property
    def tokenizer(self) -> BytePairTokenizer:
        if self._tokenizer is None:
            self._tokenizer = official_tokenizer(self.bpe)
        return self._tokenizer

    def prompts(self) -> Tensor:
        texts = [template.format(name) for name in self._names() for template in self.templates]
        return self.tokens(texts).unflatten(0, (-1, len(self.templates)))

    def build_source(self, split: str) -> FolderSource:
        if split == "test":
            return FolderSource(ClassItems(data_root() / "imagenet" / "val", self.image_size), limit=self.limit)
        folder = data_root() / "image_text"
        rows = read_pairs(folder)
        if self.val_size >= len(rows):
            raise DataError(f"only {len(rows)} pairs, {self.val_size} of them for validation", looked_at=folder / TABLE)
        items = PairItems(folder, rows, self.image_size, self.context_length, self.tokenizer)
        order = np.random.default_rng(derive(self.split_seed, "image_text")).permutation(len(rows))
        chosen = order[: self.val_size] if split == "val" else order[self.val_size :]
        return FolderSource(subset(items, chosen.tolist()), limit=self.limit)
