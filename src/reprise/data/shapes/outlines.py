"""Signed distances to the outlines of the shapes, in the unit circle: negative inside, slope about 1 at the edge.

Coordinates u (right) and v (down) are arrays; every outline reaches the unit circle and stays inside it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Outline = Callable[[Array, Array], Array]


def _length(u: Array, v: Array) -> Array:
    return np.sqrt(u * u + v * v)


def _box(u: Array, v: Array, half_width: float, half_height: float) -> Array:
    return np.maximum(np.abs(u) - half_width, np.abs(v) - half_height)


def _normals(sides: int) -> list[tuple[float, float]]:
    """Edge normals of a regular polygon whose bottom edge is horizontal."""
    turns = [np.pi / 2 + 2 * np.pi * k / sides for k in range(sides)]
    return [(float(np.cos(turn)), float(np.sin(turn))) for turn in turns]


def _polygon(sides: int) -> Outline:
    normals = _normals(sides)

    def outline(u: Array, v: Array) -> Array:
        distance = normals[0][0] * u + normals[0][1] * v
        for x, y in normals[1:]:
            np.maximum(distance, x * u + y * v, out=distance)
        return distance - np.cos(np.pi / sides)

    return outline


def circle(u: Array, v: Array) -> Array:
    return _length(u, v) - 1


def star(u: Array, v: Array) -> Array:
    """A pentagram: the points inside at least four of the five half-planes of a pentagon."""
    largest = np.full_like(u, -np.inf)
    second = largest.copy()
    for x, y in _normals(5):
        distance = x * u + y * v
        np.maximum(second, np.minimum(largest, distance), out=second)
        np.maximum(largest, distance, out=largest)
    return second - np.cos(2 * np.pi / 5)


def cross(u: Array, v: Array) -> Array:
    return np.minimum(_box(u, v, 0.95, 0.3), _box(u, v, 0.3, 0.95))


def ring(u: Array, v: Array) -> Array:
    return np.abs(_length(u, v) - 0.77) - 0.23


def diamond(u: Array, v: Array) -> Array:
    half_width = 0.55
    return (np.abs(u) / half_width + np.abs(v) - 1) / np.hypot(1 / half_width, 1)


def heart(u: Array, v: Array) -> Array:
    """A square standing on a corner with a half-disc on each of its upper sides."""
    half = 0.52
    v = v + 0.26
    right, left = (u + v) * np.sqrt(0.5), (v - u) * np.sqrt(0.5)  # axes of the square; its corner points down
    right, left = right - half * 0.5, left - half * 0.5
    lobes = np.minimum(_length(right + half, left), _length(right, left + half)) - half
    return np.minimum(_box(right, left, half, half), lobes)


def crescent(u: Array, v: Array) -> Array:
    return np.maximum(_length(u, v) - 1, 0.8 - _length(u - 0.5, v))


def arrow(u: Array, v: Array) -> Array:
    """A triangular head on a shaft, pointing up."""
    head = np.maximum(v - 0.1, (np.abs(u) - 0.75 * (v + 1)) / np.hypot(1, 0.75))
    return np.minimum(head, _box(u, v - 0.5, 0.22, 0.46))


def tee(u: Array, v: Array) -> Array:
    return np.minimum(_box(u, v + 0.5, 0.7, 0.2), _box(u, v - 0.23, 0.2, 0.73))


OUTLINES: dict[str, Outline] = {
    "circle": circle,
    "square": _polygon(4),
    "triangle": _polygon(3),
    "star": star,
    "cross": cross,
    "ring": ring,
    "diamond": diamond,
    "heart": heart,
    "crescent": crescent,
    "hexagon": _polygon(6),
    "arrow": arrow,
    "tee": tee,
}
