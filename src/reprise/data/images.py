"""Image collections held as 8-bit tensors (in memory or memory-mapped) and served as normalised float batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from reprise.data.loader import Batch
from reprise.errors import ConfigError


@dataclass(frozen=True)
class Normalisation:
    """(image - mean) / std for images in [0, 1], one value for each channel."""

    mean: tuple[float, ...]
    std: tuple[float, ...]

    @classmethod
    def named(cls, name: str, mean: Sequence[float], std: Sequence[float]) -> Normalisation:
        """`standard`: the data set's mean and std; `symmetric`: to [-1, 1]; `unit`: left in [0, 1].

        Raises:
            ConfigError: another name.
        """
        halves = (0.5,) * len(mean)
        known = {
            "standard": cls(tuple(mean), tuple(std)),
            "symmetric": cls(halves, halves),
            "unit": cls((0.0,) * len(mean), (1.0,) * len(mean)),
        }
        if name not in known:
            raise ConfigError(
                f"unknown normalisation {name!r}", looked_at="data.normalise", next_step=f"one of {', '.join(known)}"
            )
        return known[name]

    def apply(self, image: Tensor) -> Tensor:
        """8-bit images [..., C, H, W] as normalised float32."""
        mean = torch.tensor(self.mean, device=image.device).view(-1, 1, 1)
        std = torch.tensor(self.std, device=image.device).view(-1, 1, 1)
        return image.float().sub_(255 * mean).div_(255 * std)

    def invert(self, image: Tensor) -> Tensor:
        """Normalised images [..., C, H, W] back in [0, 1], for pictures."""
        mean = torch.tensor(self.mean, device=image.device).view(-1, 1, 1)
        std = torch.tensor(self.std, device=image.device).view(-1, 1, 1)
        return (image * std + mean).clamp(0, 1)

    def value(self, level: float) -> tuple[float, ...]:
        """A grey level in [0, 1] after normalisation, for each channel: what padding should hold."""
        return tuple((level - mean) / std for mean, std in zip(self.mean, self.std, strict=True))


class ImageSource:
    """Classification items: 8-bit images [N, C, H, W] and further fields of the same length."""

    def __init__(self, image: Tensor, normalisation: Normalisation, **fields: Tensor) -> None:
        if any(len(value) != len(image) for value in fields.values()):
            raise ValueError(f"{len(image)} images, but { ({name: len(value) for name, value in fields.items()}) }")
        self.image = image
        self.normalisation = normalisation
        self.fields = fields

    def __len__(self) -> int:
        return len(self.image)

    def fetch(self, index: Tensor) -> Batch:
        rest = {name: value[index] for name, value in self.fields.items()}
        return {"index": index, "image": self.normalisation.apply(self.image[index]), **rest}


class DetectionSource:
    """Detection items with a varying number of objects, stored flat.

    Args:
        image: 8-bit images [N, C, H, W], content in the upper left corner, the rest padding (0).
        size: int64 [N, 2], (h, w) of the content of each image.
        first: int64 [N + 1]; the objects of item i are rows first[i] .. first[i+1] - 1 of `labels` and `boxes`.
        labels: int64 [M].
        boxes: float32 [M, 4], cxcywh relative to the content.
        instances: int64-convertible [N, H, W] maps, 0 = background, k + 1 = the k-th object of the scene, or None.
        slots: int64 [M], the k of each object in `instances` (needed with it).
    """

    def __init__(
        self,
        image: Tensor,
        normalisation: Normalisation,
        *,
        size: Tensor,
        first: Tensor,
        labels: Tensor,
        boxes: Tensor,
        instances: Tensor | None = None,
        slots: Tensor | None = None,
    ) -> None:
        self.image, self.normalisation = image, normalisation
        self.size, self.first, self.labels, self.boxes = size, first, labels, boxes
        self.instances, self.slots = instances, slots

    def __len__(self) -> int:
        return len(self.image)

    def fetch(self, index: Tensor) -> Batch:
        image = self.normalisation.apply(self.image[index])
        size = self.size[index]
        height, width = image.shape[-2:]
        row, column = torch.arange(height), torch.arange(width)
        mask = (row >= size[:, :1])[:, :, None] | (column >= size[:, 1:])[:, None, :]
        image.masked_fill_(mask[:, None], 0.0)  # padding is 0 after normalisation, as in DETR's nested tensors
        batch: Batch = {"index": index, "image": image, "mask": mask, "targets": [self.target(int(i)) for i in index]}
        if self.instances is not None:
            batch["semantic"] = torch.stack([self._semantic(int(i)) for i in index])
        return batch

    def target(self, item: int) -> dict[str, Tensor]:
        """labels int64 [M], boxes float [M, 4], size int64 [2], and masks bool [M, H, W] if there are instance maps."""
        rows = slice(int(self.first[item]), int(self.first[item + 1]))
        target = {"labels": self.labels[rows], "boxes": self.boxes[rows], "size": self.size[item]}
        if self.instances is not None and self.slots is not None:
            target["masks"] = self.instances[item] == (self.slots[rows] + 1)[:, None, None]
        return target

    def _semantic(self, item: int) -> Tensor:
        """int64 [H, W]: 0 = background, class + 1 elsewhere."""
        target = self.target(item)
        return ((target["labels"] + 1)[:, None, None] * target["masks"]).sum(0)
