"""Random masks of patches: rectangular blocks (BEiT, iBOT) or single patches."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Mask = npt.NDArray[np.bool_]
ATTEMPTS = 10  # to place one block


@dataclass(frozen=True)
class MaskSampler:
    """Masks of patch grids; the share of hidden patches is drawn anew for each.

    Args:
        ratio: share of patches to hide, or several of which one is chosen with equal probability.
        spread: half-width of the uniform interval around each ratio.
        shape: `block` (rectangles until the share is reached; BEiT, algorithm 1) or `random` (single patches).
        aspect: smallest ratio of a block's sides; the largest is its inverse.

    Raises:
        ValueError: an unknown shape, lists of different lengths, or a spread beyond its ratio.
    """

    ratio: float | Sequence[float] = (0.0, 0.3)
    spread: float | Sequence[float] = (0.0, 0.2)
    shape: str = "block"
    aspect: float = 0.3

    def __post_init__(self) -> None:
        if self.shape not in ("block", "random"):
            raise ValueError(f"unknown shape of masks {self.shape!r}; one of block, random")
        if len(_listed(self.ratio)) != len(_listed(self.spread)):
            raise ValueError("each mask ratio needs its spread")
        if any(part > whole for whole, part in zip(_listed(self.ratio), _listed(self.spread), strict=True)):
            raise ValueError("a mask ratio's spread is larger than the ratio")

    def sample(self, count: int, height: int, width: int, seed: int) -> Tensor:
        """bool [count, height, width], true where a patch is hidden; a function of its arguments alone."""
        rng, shuffler = random.Random(seed), np.random.RandomState(seed % 2**32)
        masks = np.zeros((count, height, width), bool)
        for mask in masks:
            target = self._ratio(rng) * height * width
            if self.shape == "block":
                hide_blocks(mask, target, self.aspect, rng)
            else:
                mask[:] = shuffled_mask(height, width, int(target), shuffler)
        return torch.from_numpy(masks)

    def _ratio(self, rng: random.Random) -> float:
        drawn = [
            rng.uniform(ratio - spread, ratio + spread) if spread > 0 else ratio
            for ratio, spread in zip(_listed(self.ratio), _listed(self.spread), strict=True)
        ]
        return rng.choice(drawn) if isinstance(self.ratio, Sequence) and len(drawn) > 1 else drawn[0]


def hide_blocks(mask: Mask, target: float, aspect: float, rng: random.Random) -> None:
    """Set rectangles of `mask` [H, W] until `target` patches are hidden, or no further rectangle finds a place.

    A rectangle has between (min(H, W) // 3)^2 and the missing number of patches, is smaller than the grid in both
    directions, and is taken when it hides something new, but not more than is missing.
    """
    hidden = 0
    while hidden < target:
        added = next(filter(None, (_try_block(mask, target - hidden, aspect, rng) for _ in range(ATTEMPTS))), 0)
        if not added:
            return
        hidden += added


def _try_block(mask: Mask, room: float, aspect: float, rng: random.Random) -> int:
    """How many patches one random rectangle has newly hidden; 0 where it did not fit."""
    rows, columns = mask.shape
    area = rng.uniform((min(rows, columns) // 3) ** 2, room)
    ratio = math.exp(rng.uniform(math.log(aspect), math.log(1 / aspect)))
    height, width = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
    if height >= rows or width >= columns:
        return 0
    top, left = rng.randint(0, rows - height), rng.randint(0, columns - width)
    block = mask[top : top + height, left : left + width]
    new = height * width - int(block.sum())
    if not 0 < new <= room:
        return 0
    block[:] = True
    return new


def shuffled_mask(height: int, width: int, count: int, shuffler: np.random.RandomState) -> Mask:
    """`count` single patches of a grid [height, width], anywhere."""
    mask = np.arange(height * width) >= height * width - count
    shuffler.shuffle(mask)
    return mask.reshape(height, width)


def _listed(value: float | Sequence[float]) -> list[float]:
    return list(value) if isinstance(value, Sequence) else [value]
