"""Figures that show MoCo at work: what it must tell apart, and what its features then find alike."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn import functional as F

from reprise.papers.moco.model import Framework, MoCo
from reprise.training.figures import displayable, without_frames
from reprise.training.module import Picture
from reprise.training.probes import Features


def views(view1: Tensor, view2: Tensor, columns: int = 10) -> Picture:
    """Pairs of views [N, 3, H, W] that must be recognised as the same image."""
    count = min(columns, len(view1))
    figure = Figure(figsize=(count * 0.9, 2.0), layout="constrained")
    axes = figure.subplots(2, count, squeeze=False)
    without_frames(axes.flat)
    for row, view in enumerate((view1, view2)):
        for axis, image in zip(axes[row], displayable(view[:count]), strict=True):
            axis.imshow(image)
    return Picture(
        "views", figure, "Two random views of each training image, one above the other: a query must find its key."
    )


def neighbours(image: Tensor, features: Features, rows: int = 6, columns: int = 7) -> Picture:
    """Test images [N, 3, H, W] with their nearest neighbours in the features."""
    unit = F.normalize(features.value, dim=1)
    rows, columns = min(rows, len(image)), min(columns, len(image) - 1)
    order = (unit[:rows] @ unit.T).argsort(dim=1, descending=True)[:, : columns + 1]
    figure = Figure(figsize=((columns + 1) * 0.95, rows * 1.0), layout="constrained")
    axes = figure.subplots(rows, columns + 1, squeeze=False)
    for row, found in enumerate(order.tolist()):
        pixels = displayable(image[found])
        for axis, item, picture in zip(axes[row], found, pixels, strict=True):
            axis.imshow(picture)
            axis.set(xticks=[], yticks=[])
            right = features.label[item] == features.label[found[0]]
            for spine in axis.spines.values():
                spine.set(color="0.2" if item == found[0] else "C2" if right else "C3", linewidth=2)
    return Picture(
        "neighbours",
        figure,
        "Test images (left) and their nearest neighbours in the frozen features: green frames have the same label.",
    )


def map_of(features: Features, classes: Sequence[str]) -> Picture:
    """The first two principal components of standardised features, coloured by class."""
    value = features.value - features.value.mean(0)
    value = value / value.std(0).clamp_min(1e-6)
    _, _, axes_of = torch.linalg.svd(value, full_matrices=False)
    plane = value @ axes_of[:2].T
    figure = Figure(figsize=(5.2, 4), layout="constrained")
    axis = figure.add_subplot()
    for label, name in enumerate(classes):
        mine = plane[features.label == label]
        axis.scatter(mine[:, 0], mine[:, 1], s=6, label=name, color=f"C{label % 10}")
    axis.set(xticks=[], yticks=[])
    axis.legend(fontsize=7, markerscale=2, loc="center left", bbox_to_anchor=(1, 0.5))
    return Picture("map", figure, "Test images in the plane of the two strongest directions of the features.")


@dataclass(frozen=True)
class Similarities:
    """Cosines of queries with their own key and with all others, flat."""

    positive: Tensor
    negative: Tensor

    @classmethod
    def of(cls, model: Framework, view1: Tensor, view2: Tensor) -> Similarities:
        """Of one batch of view pairs (and the queue, where there is one), in evaluation mode."""
        query = F.normalize(model(view1), dim=1)
        keys = F.normalize((model.encoder_k if isinstance(model, MoCo) else model.momentum_encoder)(view2), dim=1)
        table = query @ keys.T
        own = torch.eye(len(table), dtype=torch.bool, device=table.device)
        others = table[~own]
        if isinstance(model, MoCo) and model.queue is not None:
            others = (query @ model.queue.keys).flatten()
        return cls(table[own].cpu(), others.cpu())


def similarities(found: Similarities) -> Picture:
    """Histograms of both kinds of pairs."""
    figure = Figure(figsize=(5.2, 3), layout="constrained")
    axis = figure.add_subplot()
    bins = torch.linspace(-1, 1, 61).tolist()
    for value, label, colour in ((found.negative, "other images", "0.6"), (found.positive, "same image", "C0")):
        axis.hist(value.numpy(), bins=bins, density=True, alpha=0.7, label=label, color=colour)
    axis.set(xlabel="cosine of query and key", ylabel="density")
    axis.legend(fontsize=8)
    return Picture(
        "similarities",
        figure,
        "Similarity of queries with the key of the same image and with the keys of other images.",
    )
