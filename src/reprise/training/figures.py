"""Drawing images with boxes, for the pictures of detectors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor

from reprise.nn.detection import Detection


def detections_figure(
    image: Tensor,
    found: Sequence[Detection],
    truth: Sequence[Detection],
    classes: Sequence[str],
    *,
    sure_above: float = 0.5,
) -> Figure:
    """Images [B, 3, H, W] with the boxes of the sure detections (coloured) and of the objects (dashed), in pixels.

    Args:
        sure_above: the score from which a detection is shown.
    """
    columns = min(4, len(image))
    rows = -(-len(image) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(2.6 * columns, 2.6 * rows), squeeze=False)
    without_frames(axes.flat)
    for axis, picture, detection, objects in zip(axes.flat, displayable(image), found, truth, strict=False):
        axis.imshow(picture)
        for box in objects["boxes"].tolist():
            draw_box(axis, box, "white", style="--")
        sure = detection["scores"] > sure_above
        chosen = (detection[name][sure].tolist() for name in ("boxes", "scores", "labels"))
        for box, score, label in zip(*chosen, strict=True):
            draw_box(axis, box, f"C{label % 10}", f"{class_name(classes, label)} {score:.2f}")
    figure.tight_layout()
    return figure


def displayable(image: Tensor) -> Tensor:
    """Normalised images [B, 3, H, W] to [B, H, W, 3] in [0, 1], each stretched to its own range."""
    image = image.cpu().permute(0, 2, 3, 1)
    low, high = image.amin((1, 2, 3), keepdim=True), image.amax((1, 2, 3), keepdim=True)
    return (image - low) / (high - low).clamp(min=1e-6)


def draw_box(axis: Axes, box: Sequence[float], colour: str, text: str = "", style: str = "-") -> None:
    left, top, right, bottom = box
    axis.add_patch(
        Rectangle((left, top), right - left, bottom - top, fill=False, edgecolor=colour, linestyle=style, linewidth=1.3)
    )
    if text:
        axis.text(left, top, text, color=colour, fontsize=6, va="bottom")


def class_name(classes: Sequence[str], label: int) -> str:
    return classes[label] if label < len(classes) else str(label)


def without_frames(axes: Any) -> None:
    for axis in axes:
        axis.axis("off")
