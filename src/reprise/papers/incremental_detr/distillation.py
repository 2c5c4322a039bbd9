"""What the novel model keeps from the base model: masked features and the classes of pseudo targets.

Legend: B images (or layers times images), Q queries, C classes, D channels, H x W cells, P pairs, M most objects.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from reprise.nn.boxes import cxcywh_to_xyxy, pairwise_giou
from reprise.nn.matching import PaddedTargets

Divergence = Literal["softmax", "sigmoid"]


def covered_cells(boxes: Tensor, counts: Sequence[int], extent: Tensor, size: Sequence[int]) -> Tensor:
    """Cells inside some box, with edges rounded as `cell_edges` says: mask^novel.

    Args:
        boxes: [B, M, 4] cxcywh, relative to the unpadded image.
        counts: boxes of each image; the rest of its rows mean nothing.
        extent: cells that the unpadded image covers, (width, height), float [B, 2].
        size: (H, W).

    Returns:
        bool [B, H, W].
    """
    low, high = cell_edges(boxes, extent.unsqueeze(1))
    column, row = (torch.arange(count, device=boxes.device) for count in (size[1], size[0]))
    in_columns = (column >= low[..., :1]) & (column < high[..., :1])  # [B, M, W]
    in_rows = (row >= low[..., 1:]) & (row < high[..., 1:])
    present = torch.arange(boxes.shape[1], device=boxes.device) < torch.tensor(counts, device=boxes.device)[:, None]
    return (in_rows[..., None] & in_columns[..., None, :] & present[..., None, None]).any(1)


def cell_edges(boxes: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """First cell (column, row), and one past the last, of boxes [..., 4] cxcywh, both [..., 2].

    Columns are rounded down and rows up at both ends, as in the released code (the paper does not say).

    Args:
        scale: what x and y are multiplied by, [..., 2].
    """
    corners = cxcywh_to_xyxy(boxes).unflatten(-1, (2, 2)) * scale.unsqueeze(-2)
    edges = torch.stack([corners[..., 0].floor(), corners[..., 1].ceil()], -1)
    return edges[..., 0, :], edges[..., 1, :]


def feature_distillation(features: Tensor, teacher: Tensor, free: Tensor) -> Tensor:
    """1 / (2 N) * sum over the N cells that are not free of |f^novel - f^base|^2, mean over images.

    Args:
        features, teacher: projected features [B, D, H, W].
        free: bool [B, H, W], cells that may change; an image without any other cell counts as 0.
    """
    kept = ~free
    square = (features - teacher).square().sum(1)
    return ((square * kept).sum((1, 2)) / (2 * kept.sum((1, 2)).clamp(min=1))).mean()


def released_distilled_cells(boxes: Tensor, image_size: Sequence[int], size: Sequence[int]) -> Tensor:
    """The cells that the released code distils: those in at most one box, with edges scaled by the stride.

    Args:
        boxes: of one image [m, 4] cxcywh.
        image_size: (height, width) of the image in pixels.
        size: (H, W).

    Returns:
        bool [H, W].
    """
    height, width = size
    scale = boxes.new_tensor([image_size[1] / width, image_size[0] / height])
    low, high = (edge.int().tolist() for edge in cell_edges(boxes, scale))
    count = torch.zeros(height, width, dtype=torch.int32, device=boxes.device)
    for (left, top), (right, bottom) in zip(low, high, strict=True):
        count[top:bottom, left:right] += 1
    return count <= 1


def released_feature_distillation(features: Tensor, teacher: Tensor, distilled: Tensor) -> Tensor:
    """As the released code reports it: every image's mask is applied to the sum over the whole batch.

    Args:
        distilled: bool [B, H, W].
    """
    square = (features - teacher).square().sum((0, 1))
    return ((square * distilled).sum((1, 2)) / (2 * distilled.sum((1, 2)).clamp(min=1))).mean()


def pseudo_queries(logits: Tensor, boxes: Tensor, targets: PaddedTargets, *, sure: float, overlap: float) -> Tensor:
    """Which of the base model's queries become pseudo targets: sure of a class, and away from every novel object.

    Args:
        logits: base model's [B, Q, C].
        boxes: [B, Q, 4] cxcywh.
        targets: novel objects.
        sure: the largest class probability must exceed it.
        overlap: the generalised IoU with every novel object must be below it.

    Returns:
        bool [B, Q].
    """
    return (logits.sigmoid().amax(-1) > sure) & away_from(boxes, targets, overlap)


def away_from(boxes: Tensor, targets: PaddedTargets, overlap: float) -> Tensor:
    """Whether the generalised IoU with every object of the image is below `overlap`; [B, Q, 4] to bool [B, Q]."""
    giou = pairwise_giou(cxcywh_to_xyxy(boxes), cxcywh_to_xyxy(targets.boxes))
    count = torch.tensor(targets.counts, device=boxes.device)
    absent = torch.arange(giou.shape[-1], device=boxes.device) >= count[:, None]
    return ((giou < overlap) | absent[:, None]).all(-1)


def class_divergence(student: Tensor, teacher: Tensor, kind: Divergence = "softmax") -> Tensor:
    """KL(q^base || q^novel) of each pair of rows [P, C], [P].

    Args:
        student, teacher: logits; the two may broadcast against each other.
        kind: `softmax`, one distribution over the classes (as published), or `sigmoid`, the sum over classes of the
            divergence of two outcomes, which is what these logits are trained as.
    """
    if kind == "softmax":
        log_novel, log_base = student.log_softmax(-1), teacher.log_softmax(-1)
        return (log_base.exp() * (log_base - log_novel)).sum(-1)
    yes = teacher.sigmoid() * (F.logsigmoid(teacher) - F.logsigmoid(student))
    no = (-teacher).sigmoid() * (F.logsigmoid(-teacher) - F.logsigmoid(-student))
    return (yes + no).sum(-1)


def released_class_distillation(student: Tensor, teacher: Tensor) -> Tensor | None:
    """KL as the released code pairs rows: those of the NOVEL targets [R, C] with those of the pseudo targets [P, C].

    Returns:
        the sum over R; 0 without rows; None where the released code stops with an error (R and P differ, none is 1).
    """
    rows, others = len(student), len(teacher)
    if rows == 0 or others == 0:
        return student.sum() * 0
    if rows != others and 1 not in (rows, others):
        return None
    return class_divergence(student, teacher).sum() / rows
