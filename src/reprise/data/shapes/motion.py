"""Scenes over time, with exact optical flow: objects move and turn at constant rates, the background stands still."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from reprise.data.shapes.render import render
from reprise.data.shapes.scenes import SceneOptions, Scenes

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Video:
    """N clips of T frames.

    Attributes:
        image: uint8 [N, T, 3, S, S]; instances: uint8 [N, T, S, S] as in `Rendered`.
        flow: float32 [N, T - 1, 2, S, S], (x, y) in pixels from a pixel centre in frame t to its place in frame t + 1.
        occluded: bool [N, T - 1, S, S], that place is outside the image or shows another object.
        boxes_visible: float32 [N, T, K, 4] as in `Rendered`.
    """

    image: Array
    instances: Array
    flow: Array
    occluded: Array
    boxes_visible: Array


def at_frame(scenes: Scenes, frame: int) -> Scenes:
    """The scenes `frame` frames later."""
    centre = scenes.centre + np.float32(frame) * scenes.velocity
    return replace(scenes, centre=centre, angle=scenes.angle + np.float32(frame) * scenes.spin)


def render_video(options: SceneOptions, scenes: Scenes, frames: int) -> Video:
    """Render `frames` frames of every scene."""
    steps = [render(options, at_frame(scenes, frame), frame) for frame in range(frames)]
    flows = [flow(at_frame(scenes, frame), steps[frame].instances) for frame in range(frames - 1)]
    hidden = [occluded(flows[k], steps[k].instances, steps[k + 1].instances) for k in range(frames - 1)]
    shape = steps[0].instances.shape
    return Video(
        image=np.stack([step.image for step in steps], 1),
        instances=np.stack([step.instances for step in steps], 1),
        flow=np.stack(flows, 1) if flows else np.zeros((shape[0], 0, 2, *shape[1:]), np.float32),
        occluded=np.stack(hidden, 1) if hidden else np.zeros((shape[0], 0, *shape[1:]), bool),
        boxes_visible=np.stack([step.boxes_visible for step in steps], 1),
    )


def flow(scenes: Scenes, instances: Array) -> Array:
    """Rigid motion of what each pixel shows, float32 [N, 2, S, S]: p' = c + v + R(spin) (p - c)."""
    item, row, column = np.nonzero(instances)
    slot = instances[item, row, column].astype(np.int64) - 1
    offset = np.stack([column + 0.5, row + 0.5], -1) - scenes.centre[item, slot]
    cosine, sine = np.cos(scenes.spin[item, slot]), np.sin(scenes.spin[item, slot])
    turned = np.stack([cosine * offset[:, 0] - sine * offset[:, 1], sine * offset[:, 0] + cosine * offset[:, 1]], -1)
    field = np.zeros((*instances.shape, 2), np.float32)
    field[item, row, column] = turned - offset + scenes.velocity[item, slot]
    return np.ascontiguousarray(field.transpose(0, 3, 1, 2))


def occluded(motion: Array, now: Array, later: Array) -> Array:
    """bool [N, S, S]: the pixel each point moves into lies outside, or does not show the same instance."""
    side = now.shape[-1]
    item, row, column = np.indices(now.shape)
    x = np.floor(column + 0.5 + motion[:, 0]).astype(np.int64)
    y = np.floor(row + 0.5 + motion[:, 1]).astype(np.int64)
    inside = (x >= 0) & (x < side) & (y >= 0) & (y < side)
    return ~inside | (later[item, y.clip(0, side - 1), x.clip(0, side - 1)] != now)
