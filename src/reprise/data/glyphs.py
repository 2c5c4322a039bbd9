"""A world of written signs: each class is a set of curved strokes; each image draws them with another hand.

Images of a class differ in the places of the strokes' control points, in an affine map and in the width of the pen, and
where wanted in stray strokes of their own: a nuisance that views of one image share and images of a class do not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from reprise.data.cache import Arrays, cached_arrays
from reprise.data.fewshot import FewShotImages
from reprise.data.spec import DataSpec
from reprise.data.splits import limited
from reprise.errors import ConfigError
from reprise.seeding import derive, generator

RENDERER_VERSION = 1  # part of every cache key: raise it whenever a pixel changes
SPLITS = ("train", "val", "test")
CURVE_POINTS = 32  # drawn along each stroke
CHUNK = 100  # images rendered together


@dataclass(frozen=True)
class GlyphOptions:
    """How signs look and how they vary; lengths in half sides of the image, angles in degrees.

    Attributes:
        image_size: side, pixels.
        strokes: fewest and most strokes of a class.
        jitter: standard deviation of control points within a class.
        rotation, shear, shift: largest absolute values; `scale`: range.
        pen: range of the pen's half-width, pixels.
        stray: strokes that belong to the single image.
        noise: standard deviation of pixel noise, in units of the full range.
    """

    image_size: int = 28
    strokes: tuple[int, int] = (2, 4)
    jitter: float = 0.05
    rotation: float = 8.0
    shear: float = 0.08
    shift: float = 0.06
    scale: tuple[float, float] = (0.9, 1.08)
    pen: tuple[float, float] = (0.8, 1.3)
    stray: int = 0
    noise: float = 0.0

    def __post_init__(self) -> None:
        for name in ("strokes", "scale", "pen"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if self.image_size < 8 or not 1 <= self.strokes[0] <= self.strokes[1] or self.stray < 0:
            raise ConfigError("glyphs need at least 8 pixels and one stroke", looked_at="data.glyph")


def uniform(shape: Sequence[int], low: float, high: float, rng: torch.Generator) -> Tensor:
    return low + (high - low) * torch.rand(*shape, generator=rng)


def class_strokes(count: int, options: GlyphOptions, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """Control points [count, S, 4, 2] of cubic strokes in [-0.8, 0.8], and which strokes exist, bool [count, S]."""
    fewest, most = options.strokes
    points = uniform((count, most, 4, 2), -0.8, 0.8, rng)
    number = torch.randint(fewest, most + 1, (count, 1), generator=rng)
    return points, torch.arange(most) < number


def curve(points: Tensor) -> Tensor:
    """Cubic Bezier curves [..., 4, 2] as points [..., CURVE_POINTS, 2]."""
    t = torch.linspace(0, 1, CURVE_POINTS)[:, None]
    basis = torch.cat([(1 - t) ** 3, 3 * t * (1 - t) ** 2, 3 * t**2 * (1 - t), t**3], 1)
    return basis @ points


def drawn(points: Tensor, present: Tensor, options: GlyphOptions, rng: torch.Generator) -> Tensor:
    """Images uint8 [N, 1, S, S], dark ground and bright strokes, of control points [N, K, 4, 2]."""
    count, size = len(points), options.image_size
    points = points + options.jitter * torch.randn(points.shape, generator=rng)
    path = curve(points) @ affine_maps(count, options, rng)[:, None]
    path = path + uniform((count, 1, 1, 2), -options.shift, options.shift, rng)
    if options.stray:
        extra = curve(uniform((count, options.stray, 4, 2), -0.95, 0.95, rng))
        path = torch.cat([path, extra], 1)
        present = torch.cat([present, torch.ones(count, options.stray, dtype=torch.bool)], 1)
    path = torch.where(present[:, :, None, None], path, 10.0)  # absent strokes lie far away
    pen = uniform((count, 1), *options.pen, rng)
    noise = options.noise * torch.randn(count, size, size, generator=rng)
    axis = (torch.arange(size) + 0.5) / size * 2 - 1
    pixels = torch.cartesian_prod(axis, axis).flip(-1)
    distance = torch.cat(
        [torch.cdist(pixels, part.flatten(1, 2)).amin(-1) for part in path.split(CHUNK)]
    )  # in half sides
    ink = (pen + 0.5 - distance * size / 2).clamp(0, 1).unflatten(-1, (size, size))
    return ((ink + noise).clamp(0, 1) * 255).round().to(torch.uint8)[:, None]


def affine_maps(count: int, options: GlyphOptions, rng: torch.Generator) -> Tensor:
    """Random rotation, shear and scale as matrices [count, 2, 2] that multiply row vectors."""
    angle = uniform((count,), -options.rotation, options.rotation, rng).deg2rad()
    turn = torch.stack([angle.cos(), angle.sin(), -angle.sin(), angle.cos()], -1).unflatten(-1, (2, 2))
    stretch = torch.diag_embed(uniform((count, 2), *options.scale, rng))
    stretch[:, 0, 1] = uniform((count,), -options.shear, options.shear, rng)
    return stretch @ turn


def render_split(split: str, classes: Sequence[int], images: Sequence[int], seed: int, options: GlyphOptions) -> Arrays:
    """`image` and `label` of one split of a world; the classes of the splits never meet."""
    points, present = class_strokes(sum(classes), options, generator(seed, "glyph classes"))
    position = SPLITS.index(split)
    first, count = sum(classes[:position]), classes[position]
    label = torch.arange(count).repeat_interleave(images[position])
    rng = generator(seed, "glyph images", split)
    image = drawn(points[first + label], present[first + label], options, rng)
    return {"image": image.numpy(), "label": label.numpy().astype(np.int64)}


class Glyphs(FewShotImages):
    """Rendered signs, always there. Batches: image float [B, 1, S, S]; see `FewShotImages`.

    Args:
        classes: numbers of base, validation and novel classes.
        images: of each class of these three.
        world_seed: draws the classes and the images.
        glyph: options of `GlyphOptions`.
        common: of `FewShotImages`.
    """

    level = (0.18, 0.34)

    def __init__(
        self,
        *,
        classes: Sequence[int] = (40, 10, 20),
        images: Sequence[int] = (30, 50, 100),
        world_seed: int = 0,
        glyph: dict[str, Any] | None = None,
        **common: Any,
    ) -> None:
        super().__init__(**common)
        if len(classes) != 3 or len(images) != 3 or min(*classes, *images) < 1:
            raise ConfigError(
                f"{list(classes)} classes of {list(images)} images: three positive numbers each are needed",
                looked_at="data.classes and data.images",
            )
        self.classes, self.images, self.world_seed = list(classes), list(images), world_seed
        try:
            self.options = GlyphOptions(**(glyph or {}))
        except TypeError as error:
            raise ConfigError(f"unknown option of glyphs: {error}", looked_at="data.glyph") from error

    @property
    def spec(self) -> DataSpec:
        size = self.options.image_size
        sizes = {split: self.classes[i] * self.images[i] for i, split in enumerate(SPLITS)}
        return DataSpec(
            name="glyphs",
            image_shape=(1, size, size),
            classes=tuple(f"glyph {number}" for number in range(self.classes[0])),
            sizes=limited(sizes, self.limit),
            licence="Apache-2.0",
            source="reprise.data.glyphs",
        )

    def read(self, split: str) -> Arrays:
        key = {
            "version": RENDERER_VERSION,
            "split": split,
            "classes": self.classes,
            "images": self.images,
            "seed": derive(self.world_seed, "glyphs"),
            "options": asdict(self.options),
        }
        seed = derive(self.world_seed, "glyphs")
        return cached_arrays("glyphs", key, lambda: render_split(split, self.classes, self.images, seed, self.options))
