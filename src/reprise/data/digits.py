"""scikit-learn's handwritten digits: 1,797 images of 8x8 that are always there, in a fixed stratified split."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from reprise.data.augment import RandomCrop
from reprise.data.loader import TensorSource, Transform
from reprise.data.module import DataModule
from reprise.data.spec import DataSpec
from reprise.data.splits import limited, noisy_labels, stratified_order, stratified_parts
from reprise.errors import ConfigError
from reprise.seeding import derive

TOTAL = 1797
CLASSES = tuple(str(digit) for digit in range(10))

FloatArray = npt.NDArray[np.float32]


def shifted_noisy_copies(image: FloatArray, copies: int, *, shift: int, noise: float, seed: int) -> FloatArray:
    """The images, then `copies - 1` randomly shifted and noised versions of all of them.

    Args:
        image: [N, 8, 8] in [0, 1].
        copies: total number of versions, at least 1; version 0 is the original.
        shift: largest shift in pixels, each way; what moves in is 0 (paper colour).
        noise: standard deviation of the Gaussian pixel noise; results are clipped to [0, 1].

    Returns:
        [copies * N, 8, 8]; item i of version c is at c * N + i.
    """
    rng = np.random.default_rng(derive(seed, "copies"))
    count, height, width = image.shape
    padded = np.pad(image, ((0, 0), (shift, shift), (shift, shift)))
    versions = [image]
    for _ in range(copies - 1):
        top, left = rng.integers(0, 2 * shift + 1, (2, count, 1, 1))
        rows, columns = top + np.arange(height)[:, None], left + np.arange(width)
        moved = padded[np.arange(count)[:, None, None], rows, columns]
        versions.append(np.clip(moved + noise * rng.standard_normal(moved.shape, dtype=np.float32), 0, 1))
    return np.concatenate(versions).astype(np.float32)


class Digits(DataModule):
    """Classification of 8x8 digits. Batches: image float [B, 1, 8, 8], label, clean_label and index int64 [B].

    Args:
        sizes: images of train, val and test, drawn stratified by `split_seed`.
        train_size: a stratified subset of train drawn by `subset_seed`, or None for all. The subset is the same for
            every run unless the recipe sets `subset_seed: ${seed}`.
        value_range: what the pixel values 0..16 are mapped to.
        label_noise: fraction of TRAIN labels replaced by a wrong class, drawn by `noise_seed`; `clean_label` keeps
            the truth.
        shift: augmentation: random shift of training images by up to this many pixels.
        copies: val and test hold this many versions of each image: itself, and copies shifted by up to `copy_shift`
            pixels with Gaussian noise of standard deviation `copy_noise` (in units of the full pixel range).
    """

    def __init__(
        self,
        *,
        sizes: Sequence[int] = (1000, 297, 500),
        split_seed: int = 0,
        train_size: int | None = None,
        subset_seed: int = 0,
        value_range: Sequence[float] = (0.0, 1.0),
        label_noise: float = 0.0,
        noise_seed: int = 0,
        shift: int = 0,
        copies: int = 1,
        copy_shift: int = 1,
        copy_noise: float = 0.1,
        batch_size: int,
        steps: int,
        seed: int = 0,
        eval_batch_size: int = 500,
        limit: int | None = None,
    ) -> None:
        super().__init__(batch_size=batch_size, steps=steps, seed=seed, eval_batch_size=eval_batch_size, limit=limit)
        self.sizes = list(sizes)
        self.split_seed, self.subset_seed, self.noise_seed = split_seed, subset_seed, noise_seed
        self.train_size = self.sizes[0] if train_size is None else train_size
        self.low, self.high = value_range
        self.label_noise = label_noise
        self.shift = shift
        self.copies, self.copy_shift, self.copy_noise = copies, copy_shift, copy_noise
        self._check()

    def _check(self) -> None:
        if len(self.sizes) != 3 or min(self.sizes) < 1 or sum(self.sizes) > TOTAL:
            raise ConfigError(
                f"train, val and test sizes {self.sizes} do not fit {TOTAL} digits", looked_at="data.sizes"
            )
        if not 1 <= self.train_size <= self.sizes[0]:
            raise ConfigError(f"a subset of {self.train_size} of {self.sizes[0]} images", looked_at="data.train_size")
        if not 0 <= self.label_noise <= 1:
            raise ConfigError(f"a label noise of {self.label_noise} is not in [0, 1]", looked_at="data.label_noise")
        if self.copies < 1:
            raise ConfigError(f"{self.copies} copies: at least 1 (the original) is needed", looked_at="data.copies")

    @property
    def spec(self) -> DataSpec:
        sizes = {"train": self.train_size, "val": self.sizes[1] * self.copies, "test": self.sizes[2] * self.copies}
        return DataSpec(
            name="digits",
            image_shape=(1, 8, 8),
            classes=CLASSES,
            sizes=limited(sizes, self.limit),
            licence="CC BY 4.0",
            source="UCI Optical Recognition of Handwritten Digits (Alpaydin and Kaynak 1998), as in scikit-learn",
        )

    def build_source(self, split: str) -> TensorSource:
        from sklearn.datasets import load_digits  # lazy: half a second

        digits = load_digits()
        image, label = digits.images.astype(np.float32) / 16, digits.target.astype(np.int64)
        part = stratified_parts(label, self.sizes, self.split_seed, "digits")[("train", "val", "test").index(split)]
        image, label = image[part], label[part]
        if split == "train":
            chosen = stratified_order(label, self.subset_seed, "subset")[: self.train_size]
            image, label = image[chosen], label[chosen]
            noisy = noisy_labels(label, self.label_noise, len(CLASSES), self.noise_seed)
        else:
            seed = derive(self.split_seed, split)
            image = shifted_noisy_copies(image, self.copies, shift=self.copy_shift, noise=self.copy_noise, seed=seed)
            label = np.tile(label, self.copies)
            noisy = label
        scaled = torch.from_numpy(image * (self.high - self.low) + self.low)[: self.limit, None]
        labels, clean = torch.from_numpy(noisy)[: self.limit], torch.from_numpy(label)[: self.limit]
        return TensorSource(image=scaled, label=labels, clean_label=clean)

    def train_transform(self) -> Transform | None:
        return RandomCrop(self.shift, fill=self.low) if self.shift else None
