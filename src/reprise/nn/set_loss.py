"""Parts of set losses over all decoder layers at once (DETR, 2005.12872, section 3.1; used by its descendants too).

Legend: L layers, B images, Q queries, C class outputs, M most objects in an image.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from reprise.nn.boxes import cxcywh_to_xyxy, paired_giou
from reprise.nn.matching import Matches, PaddedTargets


class SetLoss(NamedTuple):
    """The weighted sum to minimise, and every part under its official name (suffix `_i` = auxiliary layer i).

    `class_error` and `cardinality_error` are for the log only; the first is a fraction.
    """

    total: Tensor
    parts: dict[str, Tensor]


def class_targets(matches: Matches, labels: Tensor, shape: Sequence[int], no_object: int) -> Tensor:
    """The class of each query: its object's label [B, M] where matched, else `no_object`; int64 [L, B, Q]."""
    target = labels.new_full(tuple(shape), no_object)
    target[matches.layer, matches.image, matches.query] = labels[matches.image, matches.object]
    return target


def box_sums(boxes: Tensor, targets: PaddedTargets, matches: Matches) -> tuple[Tensor, Tensor]:
    """Sums over matched pairs of |b - b^|_1 (cxcywh, normalised) and of 1 - GIoU(b, b^), both [L]."""
    found = boxes[matches.layer, matches.image, matches.query]
    wanted = targets.boxes[matches.image, matches.object]
    l1 = (found - wanted).abs().sum(-1)
    giou = 1 - paired_giou(cxcywh_to_xyxy(found), cxcywh_to_xyxy(wanted))
    return _sum_by_layer(l1, matches.per_layer), _sum_by_layer(giou, matches.per_layer)


def _sum_by_layer(values: Tensor, per_layer: Sequence[int]) -> Tensor:
    return torch.stack([part.sum() for part in values.split(list(per_layer))])


def class_error(logits: Tensor, target: Tensor, no_object: int) -> Tensor:
    """Share of matched queries of one layer whose most likely class is wrong; 1 when nothing is matched."""
    matched = target != no_object
    wrong = (logits.argmax(-1) != target) & matched
    return torch.where(matched.any(), wrong.sum() / matched.sum().clamp(min=1), 1.0)


def cardinality_error(logits: Tensor, counts: Sequence[int]) -> Tensor:
    """Mean difference between queries that do not say "no object" and objects in the image, [L]."""
    predicted = (logits.argmax(-1) != logits.shape[-1] - 1).sum(-1).float()
    return (predicted - predicted.new_tensor(counts)).abs().mean(-1)


def named_by_layer(losses: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """{name: [L]} to {name: scalar of the last layer, name_i: scalar of auxiliary layer i}."""
    parts = {}
    for name, values in losses.items():
        for layer, value in enumerate(values.unbind()):
            parts[name if layer == len(values) - 1 else f"{name}_{layer}"] = value
    return parts
