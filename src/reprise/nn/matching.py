"""Bipartite matching of predictions and objects (DETR, 2005.12872, section 3.1), within each image.

Shapes: L layers (or any other leading dimension), B images, Q queries, M = most objects in an image of the batch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from reprise.errors import DivergedError
from reprise.nn.boxes import cxcywh_to_xyxy, pairwise_giou

Target = Mapping[str, Any]


@dataclass(frozen=True)
class PaddedTargets:
    """The objects of a batch as rectangular tensors.

    Attributes:
        labels: int64 [B, M], 0 where there is no object.
        boxes: float [B, M, 4] cxcywh, the whole image where there is no object (so that no cost is NaN).
        counts: objects of each image.
    """

    labels: Tensor
    boxes: Tensor
    counts: tuple[int, ...]


def pad_targets(targets: Sequence[Target]) -> PaddedTargets:
    """Lists of `labels` int64 [m] and `boxes` float [m, 4] to tensors of equal length."""
    counts = tuple(len(target["labels"]) for target in targets)
    labels = torch.nn.utils.rnn.pad_sequence([target["labels"] for target in targets], batch_first=True)
    boxes = torch.nn.utils.rnn.pad_sequence([target["boxes"] for target in targets], batch_first=True)
    absent = torch.arange(labels.shape[1]) >= torch.tensor(counts).unsqueeze(1)
    whole_image = boxes.new_tensor([0.5, 0.5, 1.0, 1.0])
    return PaddedTargets(labels, torch.where(absent.unsqueeze(-1).to(boxes.device), whole_image, boxes), counts)


def matching_cost(
    probability: Tensor,
    boxes: Tensor,
    targets: PaddedTargets,
    *,
    class_weight: float = 1.0,
    l1_weight: float = 5.0,
    giou_weight: float = 2.0,
) -> Tensor:
    """Cost of giving query i object j: -class * p_i(c_j) + l1 * |b_i - b_j|_1 - giou * GIoU(b_i, b_j).

    The probability itself is used, not its logarithm, so that the class term has the scale of the box terms.

    Args:
        probability: [..., B, Q, C] class probabilities, or another score of each class (minus a focal cost).
        boxes: [..., B, Q, 4] cxcywh.

    Returns:
        [..., B, Q, M]; columns from `targets.counts[b]` on mean nothing.
    """
    batch, queries = probability.shape[-3:-1]
    index = targets.labels.unsqueeze(-2).expand(*probability.shape[:-3], batch, queries, -1)
    class_cost = -probability.gather(-1, index)
    l1_cost = (boxes.unsqueeze(-2) - targets.boxes.unsqueeze(-3)).abs().sum(-1)
    giou_cost = -pairwise_giou(cxcywh_to_xyxy(boxes), cxcywh_to_xyxy(targets.boxes))
    return l1_weight * l1_cost + class_weight * class_cost + giou_weight * giou_cost


def hungarian(cost: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The cheapest one-to-one assignment of one image, cost [Q, m] to (queries ascending, their objects).

    Raises:
        DivergedError: when a cost is not finite.
    """
    if not np.isfinite(cost).all():
        raise DivergedError(
            "the matching cost is not finite: the network's outputs have diverged",
            looked_at=f"a cost matrix of {cost.shape[0]} queries x {cost.shape[1]} objects",
            next_step="lower the learning rate, or keep gradient clipping on (the recipe uses 0.1)",
        )
    return linear_sum_assignment(cost)


def one_to_many(cost: np.ndarray, claims: int) -> tuple[np.ndarray, np.ndarray]:
    """The one-to-one assignment, and each object also claims its `claims` cheapest queries.

    A query that two objects claim goes to the cheaper one; a query of the one-to-one assignment keeps its object.

    Args:
        cost: [Q, m] of one image.

    Returns:
        (queries ascending, their objects).
    """
    matched_queries, matched_objects = hungarian(cost)
    owner = np.full(cost.shape[0], -1)
    if cost.shape[1]:
        cheapest = np.argsort(cost, axis=0, kind="stable")[:claims]
        claimed = np.full(cost.shape, np.inf)
        np.put_along_axis(claimed, cheapest, np.take_along_axis(cost, cheapest, axis=0), axis=0)
        owner = np.where(np.isfinite(claimed).any(axis=1), claimed.argmin(axis=1), -1)
    owner[matched_queries] = matched_objects
    queries = np.flatnonzero(owner >= 0)
    return queries, owner[queries]


@dataclass(frozen=True)
class Matches:
    """Matched pairs of all layers and images, flat, ordered by layer, image, query.

    Attributes:
        layer, image, query, object: int64 [P] indices.
        per_layer: pairs of each layer; their sum is P.
    """

    layer: Tensor
    image: Tensor
    query: Tensor
    object: Tensor
    per_layer: tuple[int, ...]

    def of(self, layer: int, image: int) -> tuple[Tensor, Tensor]:
        """(queries, objects) of one layer and image."""
        chosen = (self.layer == layer) & (self.image == image)
        return self.query[chosen], self.object[chosen]


@torch.no_grad()
def match(cost: Tensor, counts: Sequence[int], *, claims: int = 0) -> Matches:
    """Assign every layer and image on its own; the costs travel to the CPU once.

    Args:
        cost: [L, B, Q, M].
        counts: objects of each image.
        claims: 0 for one-to-one, else the number of cheapest queries that each object also claims.

    Raises:
        DivergedError: when a cost is not finite.
    """
    matrices = cost.float().cpu().numpy()
    layers: list[np.ndarray] = []
    per_layer = []
    for layer, images in enumerate(matrices):
        pairs = []
        for image, count in enumerate(counts):
            matrix = images[image][:, :count]
            query, found = one_to_many(matrix, claims) if claims else hungarian(matrix)
            pairs.append(np.stack([np.full_like(query, layer), np.full_like(query, image), query, found]))
        layers.extend(pairs)
        per_layer.append(sum(pair.shape[1] for pair in pairs))
    flat = torch.from_numpy(np.concatenate(layers, axis=1).astype(np.int64)).to(cost.device)
    layer_index, image_index, query_index, object_index = flat.unbind(0)
    return Matches(layer_index, image_index, query_index, object_index, tuple(per_layer))
