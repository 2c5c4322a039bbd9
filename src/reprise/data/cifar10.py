"""CIFAR-10, from the official pickles or from a folder of images, decoded once into a memory-mapped cache."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from reprise.data.augment import Compose, Cutout, RandomCrop, RandomHorizontalFlip
from reprise.data.cache import Arrays, cached_arrays
from reprise.data.images import ImageSource, Normalisation
from reprise.data.loader import Transform
from reprise.data.module import DataModule
from reprise.data.pickles import load_pickle
from reprise.data.spec import DataSpec
from reprise.data.splits import limited, noisy_labels, stratified_order, stratified_parts
from reprise.errors import ConfigError, DataError
from reprise.paths import data_root

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
COUNTS = {"train": 50_000, "test": 10_000}
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)  # of the training images
PICKLES = {"train": [f"data_batch_{number}" for number in range(1, 6)], "test": ["test_batch"]}
CACHE_VERSION = 1


def find_folder(root: Path) -> tuple[str, Path]:
    """The layout (`pickles` or `folder`) and its place below the data root.

    Raises:
        DataError: neither is there.
    """
    places = {
        "pickles": [root / "cifar-10-batches-py", root / "cifar10" / "cifar-10-batches-py"],
        "folder": [root / "cifar10"],
    }
    for place in places["pickles"]:
        if (place / "data_batch_1").is_file():
            return "pickles", place
    if (root / "cifar10" / "train").is_dir():
        return "folder", root / "cifar10"
    raise DataError(
        "CIFAR-10 is not there",
        looked_at=f"{places['pickles'][0]} (official pickles) and {places['folder'][0]}/train/<class>/*.jpg",
        next_step="reprise data fetch cifar10   (or set REPRISE_DATA to a folder that has it)",
    )


def read_split(split: str) -> Arrays:
    """`image` uint8 [N, 3, 32, 32] and `label` int64 [N] of the official train or test images, memory-mapped.

    The order is that of the layout (official, or by class and file name): splits drawn by seed differ between layouts.

    Raises:
        DataError: the data is missing, truncated or foreign.
    """
    layout, folder = find_folder(data_root())
    parts = [folder / name for name in PICKLES[split]] if layout == "pickles" else _class_folders(folder / split)
    missing = [part for part in parts if not part.exists()]
    if missing:
        raise _damaged(f"CIFAR-10 lacks {', '.join(part.name for part in missing)}", folder)
    stamp = [(str(part.resolve()), part.stat().st_mtime_ns, part.stat().st_size) for part in parts]
    key = {"version": CACHE_VERSION, "layout": layout, "split": split, "stamp": stamp}
    read = _read_pickles if layout == "pickles" else _read_images
    return cached_arrays("cifar10", key, lambda: _checked(read(parts), split, folder))


def _class_folders(folder: Path) -> list[Path]:
    return [folder / name for name in CLASSES]


def _read_pickles(files: list[Path]) -> Arrays:
    images, labels = [], []
    for file in files:
        content = load_pickle(file)
        try:
            images.append(np.asarray(content[b"data"], np.uint8).reshape(-1, 3, 32, 32))
            labels.append(np.asarray(content[b"labels"], np.int64))
        except (KeyError, TypeError, ValueError) as error:
            raise _damaged(f"{file.name} is not a CIFAR-10 batch", file) from error
    return {"image": np.concatenate(images), "label": np.concatenate(labels)}


def _read_images(folders: list[Path]) -> Arrays:
    from reprise.data.progress import track

    files = [
        (path, label) for label, folder in enumerate(folders) for path in sorted(folder.iterdir()) if path.is_file()
    ]
    image = np.empty((len(files), 3, 32, 32), np.uint8)
    for position, (path, _) in enumerate(track(files, "decoding CIFAR-10")):
        image[position] = _decode(path)
    return {"image": image, "label": np.array([label for _, label in files], np.int64)}


def _decode(path: Path) -> npt.NDArray[Any]:
    from PIL import Image

    try:
        with Image.open(path) as picture:
            pixels = np.asarray(picture.convert("RGB"))
    except (OSError, ValueError, SyntaxError) as error:
        raise _damaged(f"{path.name} is not a readable image", path) from error
    if pixels.shape != (32, 32, 3):
        raise _damaged(f"{path.name} is {pixels.shape[1]}x{pixels.shape[0]} pixels, not 32x32", path)
    return pixels.transpose(2, 0, 1)


def _checked(arrays: Arrays, split: str, folder: Path) -> Arrays:
    count, label = len(arrays["image"]), arrays["label"]
    if count != COUNTS[split] or len(label) != count:
        raise _damaged(f"CIFAR-10 {split} has {count} images and {len(label)} labels, not {COUNTS[split]}", folder)
    per_class = np.bincount(label.clip(0), minlength=len(CLASSES))
    if label.min() < 0 or (per_class != COUNTS[split] // len(CLASSES)).any():
        raise _damaged(f"CIFAR-10 {split} has {per_class.tolist()} images a class", folder)
    return arrays


def _damaged(problem: str, place: Path) -> DataError:
    step = f"remove {place if place.is_dir() else place.parent} and run: reprise data fetch cifar10"
    return DataError(problem, looked_at=place, next_step=step)


class CIFAR10(DataModule):
    """Classification of 32x32 photographs. Batches: image float [B, 3, 32, 32], label, clean_label, index int64 [B].

    Args:
        val_size: images held out of the 50,000 for validation, stratified, drawn by `split_seed`; test is the official
            one. With 0, validation uses the official test images as well: nothing may be chosen by it.
        train_size: a stratified subset of what remains, drawn by `subset_seed` (the same for every run unless the
            recipe says `subset_seed: ${seed}`), or None for all.
        label_noise: fraction of TRAIN labels replaced by a wrong class, drawn by `noise_seed`.
        crop: augmentation: random crop after padding by this many black pixels (0: none).
        flip: augmentation: mirror with probability one half.
        cutout: augmentation: side of a blanked square (the mean colour under `standard`), or None.
        normalise: `standard` (training mean and std), `symmetric` ([-1, 1]) or `unit` ([0, 1]).
    """

    def __init__(
        self,
        *,
        val_size: int = 5000,
        split_seed: int = 0,
        train_size: int | None = None,
        subset_seed: int = 0,
        label_noise: float = 0.0,
        noise_seed: int = 0,
        crop: int = 4,
        flip: bool = True,
        cutout: int | None = None,
        normalise: str = "standard",
        batch_size: int,
        steps: int,
        seed: int = 0,
        eval_batch_size: int = 500,
        limit: int | None = None,
    ) -> None:
        super().__init__(batch_size=batch_size, steps=steps, seed=seed, eval_batch_size=eval_batch_size, limit=limit)
        left = COUNTS["train"] - val_size
        if not 0 <= val_size < COUNTS["train"]:
            raise ConfigError(f"{val_size} validation images of {COUNTS['train']}", looked_at="data.val_size")
        if train_size is not None and not 0 < train_size <= left:
            raise ConfigError(f"{train_size} training images, but {left} are left", looked_at="data.train_size")
        if not 0 <= label_noise <= 1:
            raise ConfigError(f"a label noise of {label_noise} is not in [0, 1]", looked_at="data.label_noise")
        self.val_size, self.train_size = val_size, left if train_size is None else train_size
        self.split_seed, self.subset_seed, self.noise_seed = split_seed, subset_seed, noise_seed
        self.label_noise = label_noise
        self.crop, self.flip, self.cutout = crop, flip, cutout
        self.normalisation = Normalisation.named(normalise, MEAN, STD)

    @property
    def spec(self) -> DataSpec:
        sizes = {"train": self.train_size, "val": self.val_size or COUNTS["test"], "test": COUNTS["test"]}
        return DataSpec(
            name="cifar10",
            image_shape=(3, 32, 32),
            classes=CLASSES,
            sizes=limited(sizes, self.limit),
            licence="not stated by the authors; for research",
            source="https://www.cs.toronto.edu/~kriz/cifar.html (Krizhevsky 2009)",
        )

    def is_official_test(self, split: str) -> bool:
        """Whether a split is made of the official test images."""
        return split == "test" or (split == "val" and not self.val_size)

    def _chosen(self, split: str, label: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Indices of a split in stratified order, so that every beginning of it holds the classes evenly."""
        if self.is_official_test(split):
            return stratified_order(label, self.split_seed, "cifar10/test")
        sizes = [self.val_size, COUNTS["train"] - self.val_size]
        val, train = stratified_parts(label, sizes, self.split_seed, "cifar10")
        if split == "val":
            return val
        return train[stratified_order(label[train], self.subset_seed, "subset")[: self.train_size]]

    def build_source(self, split: str) -> ImageSource:
        arrays = read_split("test" if self.is_official_test(split) else "train")
        label = np.asarray(arrays["label"])
        chosen = self._chosen(split, label)
        fraction = self.label_noise if split == "train" else 0.0
        noisy = noisy_labels(label[chosen], fraction, len(CLASSES), self.noise_seed)[: self.limit]
        chosen = chosen[: self.limit]
        return ImageSource(
            torch.from_numpy(arrays["image"])[torch.from_numpy(chosen)],
            self.normalisation,
            label=torch.from_numpy(noisy),
            clean_label=torch.from_numpy(label[chosen]),
        )

    def train_transform(self) -> Transform | None:
        steps: list[Transform] = []
        if self.crop:
            steps.append(RandomCrop(self.crop, fill=self.normalisation.value(0.0)))
        if self.flip:
            steps.append(RandomHorizontalFlip())
        if self.cutout:
            steps.append(Cutout(self.cutout))
        return Compose(steps) if steps else None
