"""What is in a scene: a table of objects (struct of arrays), drawn by seed before anything is rendered.

Scenes are drawn in blocks of `BLOCK`, each seeded by (seed, purpose, block), so the first n scenes of a larger
set are the same as a set of n.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import numpy.typing as npt

from reprise.data.splits import long_tail
from reprise.errors import ConfigError
from reprise.seeding import derive

SHAPES = (
    "circle", "square", "triangle", "star", "cross", "ring",
    "diamond", "heart", "crescent", "hexagon", "arrow", "tee",
)  # fmt: skip
COLOURS = {
    "red": (0.90, 0.15, 0.15),
    "green": (0.15, 0.75, 0.20),
    "blue": (0.20, 0.35, 0.95),
    "yellow": (0.95, 0.90, 0.15),
    "magenta": (0.85, 0.20, 0.85),
    "cyan": (0.15, 0.85, 0.90),
    "orange": (1.00, 0.55, 0.10),
    "white": (0.95, 0.95, 0.95),
}
TEXTURES = ("plain", "stripes", "dots", "checks")
BACKGROUNDS = ("plain", "mottled")
BLOCK = 500
PLACE_TRIES = 40

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class SceneOptions:
    """How scenes are drawn.

    Attributes:
        image_size: side of the square images, pixels.
        min_objects, max_objects: their number is uniform in this range; an object that finds no place within
            `max_overlap` after 40 tries is left out.
        min_size, max_size: diameter of the circumscribed circle as a fraction of the image side, uniform.
        max_overlap: largest intersection of two circumscribed squares, as a fraction of the smaller one (0: apart).
        truncation: share of an object's diameter that may lie outside of the image, on each side.
        shapes, colours, textures: names in use; the label of an object is the position of its shape in `shapes`.
        imbalance: how many times the first shape is as frequent as the last (exponential decay; 1: uniform).
        max_angle: objects are turned by up to this many degrees either way.
        colour_jitter: standard deviation of a common change to each object's red, green and blue.
        background: `plain` dark grey, or `mottled` (smooth random colours).
        clutter: number of distracting strokes and blobs behind the objects.
        noise: standard deviation of Gaussian pixel noise (fraction of the full range).
        max_speed, max_spin: for video: largest speed (pixels a frame) and rotation (degrees a frame), constant in time.
    """

    image_size: int = 64
    min_objects: int = 1
    max_objects: int = 5
    min_size: float = 0.2
    max_size: float = 0.45
    max_overlap: float = 0.2
    truncation: float = 0.0
    shapes: tuple[str, ...] = SHAPES[:8]
    colours: tuple[str, ...] = tuple(COLOURS)
    textures: tuple[str, ...] = TEXTURES[:3]
    imbalance: float = 1.0
    max_angle: float = 20.0
    colour_jitter: float = 0.05
    background: str = "plain"
    clutter: int = 0
    noise: float = 0.02
    max_speed: float = 0.0
    max_spin: float = 0.0

    def __post_init__(self) -> None:
        for name, known in (("shapes", SHAPES), ("colours", tuple(COLOURS)), ("textures", TEXTURES)):
            chosen = tuple(getattr(self, name))
            object.__setattr__(self, name, chosen)
            if not chosen or len(set(chosen)) != len(chosen) or not set(chosen) <= set(known):
                raise ConfigError(f"{name} {list(chosen)} are not distinct names", next_step=f"choose from {known}")
        if self.background not in BACKGROUNDS:
            raise ConfigError(f"unknown background {self.background!r}", next_step=f"choose from {BACKGROUNDS}")
        if not 0 < self.min_size <= self.max_size <= 1 or self.image_size < 8:
            raise ConfigError(f"object sizes {self.min_size}..{self.max_size} of an image of {self.image_size} pixels")
        if not 0 <= self.min_objects <= self.max_objects <= 254 or self.max_objects < 1:
            raise ConfigError(
                f"{self.min_objects} to {self.max_objects} objects: need 0 <= min <= max <= 254, max >= 1"
            )
        if self.imbalance < 1 or not 0 <= self.max_overlap <= 1 or not 0 <= self.truncation < 1 or self.noise < 0:
            raise ConfigError("imbalance must be >= 1, max_overlap in [0, 1], truncation in [0, 1), noise >= 0")


@dataclass(frozen=True)
class Scenes:
    """N scenes of up to K objects. Slots are in depth order: a later slot hides an earlier one.

    Attributes:
        present: bool [N, K].
        shape, colour, texture: int64 [N, K], positions in the options' lists.
        radius: float32 [N, K], of the circumscribed circle, pixels.
        centre: float32 [N, K, 2], (x, y) in pixels; pixel (i, j) covers [j, j+1] x [i, i+1].
        angle: float32 [N, K], radians, clockwise on screen.
        velocity: float32 [N, K, 2], pixels a frame; spin: float32 [N, K], radians a frame.
        tint: float32 [N, K, 3], the jittered colour in [0, 1].
        ground: float32 [N, 4, 4, 3], background colours at a grid of points, interpolated between.
        strokes: float32 [N, Q, 8]: x0, y0, x1, y1, half width (pixels), red, green, blue.
        noise_seed: int64 [N].
    """

    present: Array
    shape: Array
    colour: Array
    texture: Array
    radius: Array
    centre: Array
    angle: Array
    velocity: Array
    spin: Array
    tint: Array
    ground: Array
    strokes: Array
    noise_seed: Array

    def __len__(self) -> int:
        return len(self.present)

    def __getitem__(self, rows: slice | Array) -> Scenes:
        return Scenes(**{field.name: getattr(self, field.name)[rows] for field in fields(self)})

    def tables(self) -> dict[str, Array]:
        """The arrays by name."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


def concatenate(parts: Sequence[Scenes]) -> Scenes:
    """One table from several with the same options."""
    return Scenes(
        **{field.name: np.concatenate([getattr(part, field.name) for part in parts]) for field in fields(Scenes)}
    )


def draw_scenes(options: SceneOptions, count: int, seed: int, *purpose: object) -> Scenes:
    """`count` scenes; the purpose (e.g. the split) keeps independent sets apart."""
    blocks = range(-(-count // BLOCK)) if count else range(1)
    drawn = [_draw_block(options, np.random.default_rng(derive(seed, "scenes", *purpose, block))) for block in blocks]
    return concatenate(drawn)[:count]


def _draw_block(options: SceneOptions, rng: np.random.Generator) -> Scenes:
    size = (BLOCK, options.max_objects)
    count = rng.integers(options.min_objects, options.max_objects + 1, BLOCK)
    radius = 0.5 * options.image_size * rng.uniform(options.min_size, options.max_size, size)
    present = np.arange(options.max_objects) < count[:, None]
    centre, placed = _place(options, radius, present, rng)
    frequency = long_tail(len(options.shapes), options.imbalance)
    colour = rng.integers(0, len(options.colours), size)
    palette = np.array([COLOURS[name] for name in options.colours])
    tint = palette[colour] + options.colour_jitter * rng.standard_normal((*size, 1))
    speed = options.max_speed * rng.uniform(0, 1, size)
    heading = rng.uniform(0, 2 * np.pi, size)
    return Scenes(
        present=placed,
        shape=rng.choice(len(options.shapes), size, p=frequency),
        colour=colour,
        texture=rng.integers(0, len(options.textures), size),
        radius=radius.astype(np.float32),
        centre=centre.astype(np.float32),
        angle=np.deg2rad(options.max_angle * rng.uniform(-1, 1, size)).astype(np.float32),
        velocity=(speed[..., None] * np.stack([np.cos(heading), np.sin(heading)], -1)).astype(np.float32),
        spin=np.deg2rad(options.max_spin * rng.uniform(-1, 1, size)).astype(np.float32),
        tint=np.clip(tint, 0, 1).astype(np.float32),
        ground=_ground(options, rng),
        strokes=_strokes(options, rng),
        noise_seed=rng.integers(0, 2**62, BLOCK),
    )


def _place(options: SceneOptions, radius: Array, present: Array, rng: np.random.Generator) -> tuple[Array, Array]:
    """Centres [N, K, 2] that keep within `max_overlap`, object by object, and which objects found one, bool [N, K]."""
    count, slots = radius.shape
    centre = np.zeros((count, slots, 2))
    placed = np.zeros((count, slots), bool)
    row = np.arange(count)
    for slot in range(slots):
        reach = (radius[:, slot] * (1 - 2 * options.truncation))[:, None, None]
        tries = reach + (options.image_size - 2 * reach) * rng.random((count, PLACE_TRIES, 2))
        distance = np.abs(tries[:, :, None] - centre[:, None, :slot])
        both = (radius[:, slot, None] + radius[:, :slot])[:, None, :, None]
        smaller = 2 * np.minimum(radius[:, slot, None], radius[:, :slot])[:, None, :, None]
        shared = np.clip(both - distance, 0, smaller) / smaller
        free = (shared.prod(-1) <= options.max_overlap) | ~placed[:, None, :slot]
        good = free.all(-1)
        centre[:, slot] = tries[row, good.argmax(1)]
        placed[:, slot] = good.any(1) & present[:, slot]
    return centre, placed


def _ground(options: SceneOptions, rng: np.random.Generator) -> Array:
    level = rng.uniform(0.0, 0.3, (BLOCK, 1, 1, 1))
    mottle = rng.uniform(-0.15, 0.25, (BLOCK, 4, 4, 3))
    spread = mottle if options.background == "mottled" else np.zeros_like(mottle)
    return np.clip(level + spread, 0, 1).astype(np.float32)


def _strokes(options: SceneOptions, rng: np.random.Generator) -> Array:
    size = (BLOCK, options.clutter)
    start = options.image_size * rng.random((*size, 2))
    length = options.image_size * rng.uniform(0, 0.3, (*size, 1))
    heading = rng.uniform(0, 2 * np.pi, size)
    stop = start + length * np.stack([np.cos(heading), np.sin(heading)], -1)
    width = options.image_size * rng.uniform(0.008, 0.03, (*size, 1))
    return np.concatenate([start, stop, width, rng.uniform(0.1, 0.8, (*size, 3))], -1).astype(np.float32)
