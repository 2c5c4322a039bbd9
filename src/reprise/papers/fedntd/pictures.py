"""Figures of FedNTD: who holds what, and which classes the global model forgets from round to round."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from reprise.papers.fedntd.measures import forgetting
from reprise.training.module import Picture


def partition(counts: Tensor, classes: Sequence[str]) -> Picture:
    """Items of each class at each client; counts int64 [clients, classes]."""
    figure = Figure(figsize=(max(4.0, 0.28 * len(counts)), 3.2), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(counts.T.numpy(), aspect="auto", cmap="Blues", interpolation="nearest")
    _name_classes(axes, classes)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set(xlabel="client", ylabel="class")
    figure.colorbar(image, ax=axes, label="training items")
    return Picture("partition", figure, "Training items of each class at each client.")


def class_history(history: Tensor, classes: Sequence[str]) -> Picture:
    """Class-wise accuracy of the global model by round; history [rounds, classes], NaN where not measured."""
    measured = history.isfinite().any(1).nonzero()[:, 0]
    figure = Figure(figsize=(7, 3.2), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(
        history[measured].T.numpy(), aspect="auto", cmap="viridis", vmin=0, vmax=1, interpolation="nearest"
    )
    _name_classes(axes, classes)
    ticks = range(0, len(measured), max(1, len(measured) // 8))
    axes.set_xticks(list(ticks), [str(int(measured[tick]) + 1) for tick in ticks])
    axes.set(xlabel="round", ylabel="class")
    figure.colorbar(image, ax=axes, label="accuracy")
    caption = (
        "Validation accuracy of the global model on each class after each round. A row that turns dark again is a "
        f"class that was known and then forgotten; forgetting F = {float(forgetting(history)):.3f}."
    )
    return Picture("class_history", figure, caption)


def accuracy_history(history: Tensor) -> Picture:
    """Mean class accuracy of the global model by round, with the range over the classes."""
    measured = history.isfinite().any(1).nonzero()[:, 0]
    rows = history[measured]
    figure = Figure(figsize=(7, 3.2), layout="constrained")
    axes = figure.subplots()
    finite = rows.nan_to_num(nan=0.0)
    axes.fill_between(measured + 1, finite.amin(1), finite.amax(1), alpha=0.15, label="range over classes")
    axes.plot(measured + 1, rows.nanmean(1), label="mean over classes")
    axes.set(xlabel="round", ylabel="validation accuracy", ylim=(0, 1))
    axes.legend()
    caption = "Validation accuracy of the global model by round: the mean over classes, and the worst and best class."
    return Picture("accuracy_history", figure, caption)


def _name_classes(axes: Axes, classes: Sequence[str]) -> None:
    if len(classes) <= 20:
        axes.set_yticks(range(len(classes)), classes)
