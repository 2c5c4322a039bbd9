"""Figures that show what SAM does: flat surroundings, and labels that are not memorised."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from matplotlib.figure import Figure
from torch import Tensor

from reprise.papers.sam.criterion import LossOfWeights, Weights, gradient_direction, moved, random_direction
from reprise.seeding import generator
from reprise.training.module import Picture

CURVES = {
    "val/accuracy": "validation accuracy",
    "accuracy_given": "training accuracy, labels as given",
    "accuracy_clean": "training accuracy, true labels",
    "memorised": "wrong labels reproduced",
}


def memorisation(history: Sequence[Mapping[str, float]]) -> Picture:
    """Accuracy on given and true training labels, and memorised wrong labels, over the training steps."""
    figure = Figure(figsize=(6, 3.6), layout="constrained")
    axes = figure.add_subplot()
    for key, label in CURVES.items():
        points = [(entry["step"], entry[key]) for entry in history if key in entry]
        if points:
            axes.plot(*zip(*points, strict=True), label=label, marker="." if len(points) < 40 else None)
    axes.set(xlabel="training step", ylabel="fraction", ylim=(0, 1.02))
    axes.legend(fontsize=8)
    return Picture(
        "memorisation",
        figure,
        "Memorising starts where wrong training labels are reproduced; validation accuracy falls with it.",
    )


def landscape(loss: LossOfWeights, weights: Weights, reach: float = 1.0, points: int = 21) -> Picture:
    """The training loss on lines through the solution: along its gradient and along five random directions."""
    distances = torch.linspace(-reach, reach, points)
    figure = Figure(figsize=(6, 3.6), layout="constrained")
    axes = figure.add_subplot()
    directions = [random_direction(weights, generator(0, "landscape", number)) for number in range(5)]
    for number, direction in enumerate(directions):
        values = _along(loss, weights, direction, distances)
        axes.plot(distances, values, color="0.7", lw=1, label="random directions" if number == 0 else None)
    ascent = gradient_direction(loss, weights)
    axes.plot(distances, _along(loss, weights, ascent, distances), color="C3", label="direction of the gradient")
    axes.set(xlabel="distance from the solution", ylabel="training loss")
    axes.legend(fontsize=8)
    return Picture(
        "landscape",
        figure,
        "Training loss around the solution: the flatter along its gradient, the smaller the sharpness.",
    )


@torch.no_grad()
def _along(loss: LossOfWeights, weights: Weights, direction: Weights, distances: Tensor) -> list[float]:
    return [float(loss(moved(weights, direction, float(distance)))) for distance in distances]


def mislabelled(batch: Mapping[str, Tensor], guess: Tensor, classes: Sequence[str]) -> Picture:
    """Wrongly labelled training images with their given label and the prediction.

    Args:
        batch: image [N, C, H, W], label and clean_label [N].
        guess: predicted classes [N].
        classes: names in label order.
    """
    columns = 8
    rows = -(-len(guess) // columns)
    figure = Figure(figsize=(columns * 1.15, rows * 1.5), layout="constrained")
    for number, (image, given, true, found) in enumerate(
        zip(batch["image"], batch["label"], batch["clean_label"], guess, strict=True)
    ):
        axes = figure.add_subplot(rows, columns, number + 1)
        low, high = image.min(), image.max()
        pixels = ((image - low) / (high - low).clamp_min(1e-6)).permute(1, 2, 0)
        axes.imshow(pixels.squeeze(-1), cmap="gray")
        axes.set_axis_off()
        colour = "C2" if found == true else "C3" if found == given else "0.4"
        axes.set_title(f"given {classes[int(given)]}\nsays {classes[int(found)]}", fontsize=7, color=colour)
    return Picture(
        "mislabelled",
        figure,
        "Training images with wrong labels: green where the network says the true class all the same, red where it has "
        "memorised the wrong one.",
    )
