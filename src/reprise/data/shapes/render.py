"""From scene tables to pixels: vectorised over objects of a shape, anti-aliased, with exact annotations.

Each object is drawn in a square patch just large enough for it (signed distance in pixels -> coverage), and the patches
of all scenes' k-th objects are blended into the images at once, back to front.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import numpy.typing as npt

from reprise.data.shapes.outlines import OUTLINES
from reprise.data.shapes.scenes import SceneOptions, Scenes

RENDERER_VERSION = 1  # part of every cache key: raise it whenever a pixel or an annotation changes
CHUNK = 125  # scenes rendered together: the working set stays in the processor's cache

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Rendered:
    """Images and annotations of N scenes with K slots.

    Boxes are x0, y0, x1, y1 in pixels around mask pixels, the far side exclusive: a one-pixel object at column 3 has
    x0 = 3, x1 = 4, so COCO's [x, y, width, height] is (x0, y0, x1 - x0, y1 - y0). Absent or hidden: all zero.

    Attributes:
        image: uint8 [N, 3, S, S].
        instances: uint8 [N, S, S]; 0 = background, k + 1 = slot k is in front (coverage of at least one half).
        boxes_visible: float32 [N, K, 4], around the visible pixels (what COCO annotates).
        boxes_full: float32 [N, K, 4], around the whole object within the image (amodal).
        area_visible, area_full: int64 [N, K], pixels.
    """

    image: Array
    instances: Array
    boxes_visible: Array
    boxes_full: Array
    area_visible: Array
    area_full: Array

    def tables(self) -> dict[str, Array]:
        """The arrays by name."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def masks(self, item: int) -> Array:
        """bool [K, S, S], the visible pixels of each slot."""
        return self.instances[item] == np.arange(1, self.area_full.shape[1] + 1)[:, None, None]

    def coco_boxes(self, *, visible: bool = True) -> Array:
        """[N, K, 4] as COCO's (x, y, width, height)."""
        boxes = self.boxes_visible if visible else self.boxes_full
        return np.concatenate([boxes[..., :2], boxes[..., 2:] - boxes[..., :2]], -1)


def render(options: SceneOptions, scenes: Scenes, frame: int = 0) -> Rendered:
    """Images and annotations of all scenes; `frame` only chooses the pixel noise (`at_frame` moves the objects)."""
    parts = [_render_chunk(options, scenes[first : first + CHUNK], frame) for first in range(0, len(scenes), CHUNK)]
    if not parts:
        parts = [_render_chunk(options, scenes, frame)]
    return Rendered(
        **{field.name: np.concatenate([getattr(part, field.name) for part in parts]) for field in fields(Rendered)}
    )


def semantic(rendered: Rendered, scenes: Scenes) -> Array:
    """uint8 [N, S, S]: 0 = background, label + 1 where an object is visible."""
    table = np.concatenate([np.zeros((len(scenes), 1), np.int64), np.where(scenes.present, scenes.shape + 1, 0)], 1)
    return table[np.arange(len(scenes))[:, None, None], rendered.instances].astype(np.uint8)


def _render_chunk(options: SceneOptions, scenes: Scenes, frame: int) -> Rendered:
    side, count, slots = options.image_size, *scenes.present.shape
    patch = int(np.ceil(2 * scenes.radius.max(initial=1.0))) + 3
    canvas = np.zeros((count, side + 2 * patch, side + 2 * patch, 3), np.float32)
    inner = slice(patch, patch + side)
    canvas[:, inner, inner] = _background(scenes, side)
    instances = np.zeros(canvas.shape[:3], np.uint8)
    boxes_full, area_full = np.zeros((count, slots, 4), np.float32), np.zeros((count, slots), np.int64)
    for slot in range(slots):
        who = np.flatnonzero(scenes.present[:, slot])
        corner, coverage, colour = _patches(options, scenes, who, slot, patch)
        row = (corner[:, 1, None] + np.arange(patch))[:, :, None]
        column = (corner[:, 0, None] + np.arange(patch))[:, None, :]
        place = (who[:, None, None], row + patch, column + patch)
        behind = canvas[place]
        canvas[place] = behind + coverage[..., None] * (colour - behind)
        solid = np.greater_equal(coverage, 0.5)
        instances[place] = np.where(solid, slot + 1, instances[place])
        solid &= (row >= 0) & (row < side) & (column >= 0) & (column < side)
        area_full[who, slot] = solid.sum((1, 2))
        boxes_full[who, slot] = _boxes(solid) + np.tile(corner, 2) * (area_full[who, slot] > 0)[:, None]
    seen = np.ascontiguousarray(instances[:, inner, inner])
    visible = [seen == slot + 1 for slot in range(slots)]
    return Rendered(
        image=_quantise(options, scenes, canvas[:, inner, inner], frame),
        instances=seen,
        boxes_visible=np.stack([_boxes(mask) for mask in visible], 1),
        boxes_full=boxes_full,
        area_visible=np.stack([mask.sum((1, 2)) for mask in visible], 1),
        area_full=area_full,
    )


def _patches(options: SceneOptions, scenes: Scenes, who: Array, slot: int, patch: int) -> tuple[Array, Array, Array]:
    """Upper left corners (x, y) int64 [M, 2], coverage [M, P, P] and colours [M, P, P, 3] of one slot's objects."""
    centre, radius = scenes.centre[who, slot], scenes.radius[who, slot]
    corner = (
        np.floor(centre - patch / 2).astype(np.int64).clip(-patch, options.image_size)
    )  # far outside: in the margin
    grid = np.arange(patch, dtype=np.float32) + np.float32(0.5)
    x = (corner[:, 0] - centre[:, 0]).astype(np.float32)[:, None, None] + grid
    y = (corner[:, 1] - centre[:, 1]).astype(np.float32)[:, None, None] + grid[:, None]
    cosine, sine = np.cos(scenes.angle[who, slot])[:, None, None], np.sin(scenes.angle[who, slot])[:, None, None]
    along, across = cosine * x + sine * y, cosine * y - sine * x
    size = radius[:, None, None]
    coverage = np.empty_like(along)
    for label in np.unique(scenes.shape[who, slot]):
        same = scenes.shape[who, slot] == label
        outline = OUTLINES[options.shapes[label]]
        distance = outline(along[same] / size[same], across[same] / size[same]) * size[same]
        coverage[same] = np.clip(0.5 - distance, 0, 1)
    tint = scenes.tint[who, slot][:, None, None]
    shade = _texture(options, scenes.texture[who, slot], along, across, size)
    return corner, coverage, tint * (1 - 0.5 * shade)[..., None]


def _texture(options: SceneOptions, texture: Array, along: Array, across: Array, size: Array) -> Array:
    """How much darker each pixel is, in [0, 1]; fixed to the object, with a period of about half its radius."""
    shade = np.zeros_like(along)
    wave = (2 * np.pi / np.maximum(0.55 * size, 4.0)).astype(np.float32)
    for kind in np.unique(texture):
        name, same = options.textures[kind], texture == kind
        if name == "plain":
            continue
        first = np.cos(wave[same] * along[same])
        if name == "stripes":
            shade[same] = np.clip(0.5 + 1.5 * first, 0, 1)
            continue
        second = np.cos(wave[same] * across[same])
        shade[same] = (
            np.clip(3 * (first + second) - 2, 0, 1) if name == "dots" else np.clip(0.5 + 3 * first * second, 0, 1)
        )
    return shade


def _background(scenes: Scenes, side: int) -> Array:
    """float32 [N, S, S, 3]: the grid of ground colours, interpolated linearly, with the strokes on it."""
    points = scenes.ground.shape[1]
    at = np.linspace(0, points - 1, side)
    weight = np.maximum(0, 1 - np.abs(at[:, None] - np.arange(points))).astype(np.float32)
    ground = np.einsum("yi,xj,nijc->nyxc", weight, weight, scenes.ground, optimize=True)
    grid = np.arange(side, dtype=np.float32) + np.float32(0.5)
    for stroke in range(scenes.strokes.shape[1]):
        x0, y0, x1, y1, width = (scenes.strokes[:, stroke, k, None, None] for k in range(5))
        dx, dy = x1 - x0, y1 - y0
        x, y = grid - x0, grid[:, None] - y0
        nearest = np.clip((x * dx + y * dy) / np.maximum(dx * dx + dy * dy, 1e-6), 0, 1)
        coverage = np.clip(0.5 + width - np.hypot(x - nearest * dx, y - nearest * dy), 0, 1)[..., None]
        ground += coverage * (scenes.strokes[:, stroke, None, None, 5:8] - ground)
    return ground


def _boxes(mask: Array) -> Array:
    """float32 [M, 4] around the true pixels of bool [M, H, W] (x0, y0, x1, y1; zeros where there are none)."""
    columns, rows = np.any(mask, 1), np.any(mask, 2)
    left, top = columns.argmax(1), rows.argmax(1)
    right, bottom = mask.shape[2] - columns[:, ::-1].argmax(1), mask.shape[1] - rows[:, ::-1].argmax(1)
    boxes = np.stack([left, top, right, bottom], 1).astype(np.float32)
    return boxes * columns.any(1)[:, None]


def _quantise(options: SceneOptions, scenes: Scenes, image: Array, frame: int) -> Array:
    """uint8 [N, 3, S, S] from float [N, S, S, 3] in [0, 1], with every scene's own pixel noise."""
    pixels = image.transpose(0, 3, 1, 2) * np.float32(255)
    if options.noise:
        pixels = np.ascontiguousarray(pixels)
        for item, seed in enumerate(scenes.noise_seed):
            rng = np.random.Generator(np.random.SFC64([int(seed), frame]))
            pixels[item] += np.float32(255 * options.noise) * rng.standard_normal(pixels.shape[1:], dtype=np.float32)
    return np.clip(np.rint(pixels), 0, 255).astype(np.uint8)
