"""Figures that show SMKD at work: where the class token looks, which patches match, novel classes, one episode."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import ConnectionPatch
from torch import Tensor
from torch.nn import functional as F

from reprise.papers.smkd.model import VisionTransformer, patch_weights
from reprise.training.episodes import prototype_logits
from reprise.training.figures import displayable
from reprise.training.module import Picture

PAIRS, LINES = 3, 8


def attention(backbone: VisionTransformer, image: Tensor) -> Picture:
    """Novel images [B, C, S, S] above the class token's attention to their patches, averaged over heads."""
    weight = patch_weights(backbone.with_attention(image)[1]).unflatten(1, (backbone.grid, backbone.grid)).cpu()
    figure = Figure(figsize=(1.3 * len(image), 2.7), layout="constrained")
    axes = figure.subplots(2, len(image), squeeze=False)
    for column, (picture, heat) in enumerate(zip(displayable(image), weight, strict=True)):
        _show(axes[0, column], picture)
        axes[1, column].imshow(heat, cmap="viridis")
        axes[1, column].axis("off")
    caption = "Images of novel classes, and which patches the teacher's class token attends to in its last block."
    return Picture("attention", figure, caption)


def matches(backbone: VisionTransformer, image: Tensor, label: Tensor) -> Picture:
    """Pairs of images of one novel class with the patches that match best: k+ = argmax_l cos(f_k, f_l)."""
    figure = Figure(figsize=(6, 2.6 * PAIRS), layout="constrained")
    axes = figure.subplots(PAIRS, 2, squeeze=False)
    for row in range(PAIRS):
        members = (label == label.unique()[row % len(label.unique())]).nonzero().flatten()[:2]
        pair = image[members[[0, -1]].to(image.device)]
        tokens, maps = backbone.with_attention(pair)
        feature = F.normalize(tokens[:, 1:], dim=-1)
        found = (feature[0] @ feature[1].t()).argmax(-1).cpu()
        strongest = patch_weights(maps)[0].topk(min(LINES, feature.shape[1])).indices.cpu()
        for axis, picture in zip(axes[row], displayable(pair), strict=True):
            _show(axis, picture)
        for number, patch in enumerate(strongest.tolist()):
            _connect(figure, axes[row], _centre(patch, backbone), _centre(int(found[patch]), backbone), f"C{number}")
    caption = (
        "Two images of a novel class: the patches the class token attends to most (left), each joined to the patch "
    )
    return Picture("matches", figure, caption + "of the other image with the most similar token (right).")


def _centre(patch: int, backbone: VisionTransformer) -> tuple[float, float]:
    row, column = divmod(patch, backbone.grid)
    return (column + 0.5) * backbone.patch - 0.5, (row + 0.5) * backbone.patch - 0.5


def _connect(
    figure: Figure, axes: Sequence[Axes], left: tuple[float, float], right: tuple[float, float], colour: str
) -> None:
    line = ConnectionPatch(left, right, "data", "data", axesA=axes[0], axesB=axes[1], color=colour, lw=1.2)
    figure.add_artist(line)
    for axis, (x, y) in zip(axes, (left, right), strict=True):
        axis.plot(x, y, "o", color=colour, ms=4)


def embedding(feature: Tensor, label: Tensor, most: int = 10) -> Picture:
    """The features [N, D] of novel classes on their two first principal components, coloured by class."""
    chosen = label < most
    points = feature[chosen] - feature[chosen].mean(0)
    plane = points @ torch.linalg.svd(points, full_matrices=False).Vh[:2].t()
    figure = Figure(figsize=(5, 4.4), layout="constrained")
    axis = figure.add_subplot()
    axis.scatter(plane[:, 0], plane[:, -1], c=label[chosen], cmap="tab10", s=9)
    axis.set(xlabel="first principal component", ylabel="second")
    caption = "Images of novel classes in the teacher's feature space, one colour a class."
    return Picture("embedding", figure, caption)


def episode(image: Tensor, feature: Tensor, table: Tensor, shots: int) -> Picture:
    """One episode: a support image of each class, then its queries, framed green where the prototype is right.

    Args:
        table: item indices int64 [W, K + Q].
    """
    queries = min(8, table.shape[1] - shots)
    guess = prototype_logits(feature, table[None], shots)[0].argmax(-1).unflatten(0, (len(table), -1))
    figure = Figure(figsize=(1.05 * (queries + 1), 1.1 * len(table)), layout="constrained")
    axes = figure.subplots(len(table), queries + 1, squeeze=False)
    for row in range(len(table)):
        shown = displayable(image[torch.cat([table[row, :1], table[row, shots : shots + queries]])])
        for column, picture in enumerate(shown):
            axis = axes[row, column]
            axis.imshow(picture.squeeze(-1), cmap="gray")
            axis.set(xticks=[], yticks=[])
            right = column == 0 or guess[row, column - 1] == row
            for spine in axis.spines.values():
                spine.set(color="0.6" if column == 0 else "C2" if right else "C3", linewidth=2.5)
        axes[row, 0].set_ylabel(f"class {row + 1}", fontsize=8)
    caption = (
        f"An episode of novel classes with {shots} support image(s) of each: the first one (grey frame), and queries "
    )
    return Picture("episode", figure, caption + "that the nearest prototype gets right (green) or wrong (red).")


def _show(axis: Axes, picture: Tensor) -> None:
    axis.imshow(picture.squeeze(-1), cmap="gray")
    axis.axis("off")
