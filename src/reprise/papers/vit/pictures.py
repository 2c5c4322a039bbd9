"""What a ViT learned, as in the paper's figures 6 and 7 and appendix D.8."""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor

from reprise.papers.vit.model import VisionTransformer

Grid = tuple[int, int]


def attention_rollout(maps: Tensor, grid: Grid) -> Tensor:
    """How much of each patch reaches the classifier's input through all layers (appendix D.8).

    Heads are averaged, half of the residual path is mixed in, and the layers are multiplied.

    Args:
        maps: [depth, B, heads, T, T] attention weights.
        grid: (rows, columns) of patches; T may have a class token in front.

    Returns:
        [B, rows, columns], each image's largest value 1.
    """
    tokens = maps.shape[-1]
    identity = torch.eye(tokens, dtype=maps.dtype, device=maps.device)
    rollout = identity.expand(maps.shape[1], -1, -1)
    for layer in 0.5 * maps.mean(2) + 0.5 * identity:
        rollout = layer @ rollout
    patches = grid[0] * grid[1]
    to_patches = rollout[:, 0, 1:] if tokens > patches else rollout.mean(1)
    return (to_patches / to_patches.amax(1, keepdim=True)).unflatten(1, grid)


def attention_figure(model: VisionTransformer, image: Tensor, titles: Sequence[str]) -> Figure:
    """Each image [B, C, H, W] above the same image lit by its attention rollout."""
    with torch.no_grad():
        light = attention_rollout(model.attention_maps(image), model.grid)
    light = F.interpolate(light[:, None], size=image.shape[-2:], mode="bilinear")[:, 0].cpu()
    shown = _displayable(image)
    figure, axes = plt.subplots(2, len(shown), figsize=(1.3 * len(shown), 2.9), squeeze=False)
    for column, (picture, mask, title) in enumerate(zip(shown, light, titles, strict=True)):
        axes[0, column].imshow(picture, vmin=0, vmax=1)
        axes[0, column].set_title(title, fontsize=8)
        axes[1, column].imshow(picture * mask[..., None], vmin=0, vmax=1)
    return _without_axes(figure)


def position_similarity(model: VisionTransformer) -> Tensor:
    """Cosine similarity of each patch's position embedding with all others, [N, rows, columns].

    Raises:
        ValueError: the model has no positions.
    """
    if model.positions is None:
        raise ValueError("a model without positions has no position embeddings to compare")
    table = model.positions().detach()[0].cpu()
    patches = F.normalize(table[int(model.cls is not None) :], dim=1)
    return (patches @ patches.T).unflatten(1, model.grid)


def position_figure(model: VisionTransformer, most: int = 8) -> Figure:
    """One small map a patch, laid out as the patches are; at most `most` rows and columns, evenly chosen."""
    similarity = position_similarity(model).unflatten(0, model.grid)
    rows, columns = (_spread(count, most) for count in model.grid)
    figure, axes = plt.subplots(len(rows), len(columns), figsize=(4.2, 4.2), squeeze=False)
    for line, row in zip(axes, rows, strict=True):
        for axis, column in zip(line, columns, strict=True):
            axis.imshow(similarity[row, column], vmin=-1, vmax=1, cmap="viridis")
    return _without_axes(figure)


def principal_filters(weight: Tensor, count: int = 28) -> Tensor:
    """The leading principal components of the patch embedding's filters [D, C, P, Q], as images [k, C, P, Q]."""
    flat = weight.detach().cpu().flatten(1)
    _, _, components = torch.linalg.svd(flat - flat.mean(0), full_matrices=False)
    return components[:count].unflatten(1, weight.shape[1:])


def filters_figure(filters: Tensor) -> Figure:
    """Filters [k, C, P, Q] as a contact sheet, each scaled to its own range; many-channel filters show their mean."""
    images = _displayable(filters if filters.shape[1] in (1, 3) else filters.mean(1, keepdim=True))
    columns = min(7, len(images))
    rows = -(-len(images) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(0.7 * columns, 0.7 * rows), squeeze=False)
    for axis, image in zip(axes.flat, images, strict=False):
        axis.imshow(image, vmin=0, vmax=1)
    return _without_axes(figure)


def _displayable(image: Tensor) -> Tensor:
    """[B, C, H, W] of any range to [B, H, W, 3] in [0, 1], each image over its own range."""
    image = image.detach().cpu().float()
    low, high = image.amin(dim=(1, 2, 3), keepdim=True), image.amax(dim=(1, 2, 3), keepdim=True)
    scaled = (image - low) / (high - low).clamp(min=1e-12)
    return scaled.expand(-1, 3, -1, -1).permute(0, 2, 3, 1)


def _spread(count: int, most: int) -> list[int]:
    return torch.linspace(0, count - 1, min(count, most)).round().long().tolist()


def _without_axes(figure: Figure) -> Figure:
    for axis in figure.axes:
        axis.set_axis_off()
    figure.tight_layout(pad=0.3)
    return figure
