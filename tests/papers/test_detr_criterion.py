"""DETR's set losses against slow formulas, and the traps of the fact sheet."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch
from torch import Tensor

from reprise.nn.boxes import cxcywh_to_xyxy, pairwise_giou
from reprise.nn.matching import hungarian, matching_cost, pad_targets
from reprise.papers.detr.criterion import (
    SetCriterion,
    cardinality_error,
    class_error,
    dice_loss,
    focal_loss,
)

LAYERS, QUERIES, CLASSES = 3, 6, 4


def _batch(counts: list[int], seed: int = 0) -> tuple[Tensor, Tensor, list[dict[str, Tensor]]]:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(LAYERS, len(counts), QUERIES, CLASSES + 1, generator=generator)
    boxes = 0.2 + 0.3 * torch.rand(LAYERS, len(counts), QUERIES, 4, generator=generator)
    targets = [
        {
            "labels": torch.randint(0, CLASSES, (count,), generator=generator),
            "boxes": 0.2 + 0.3 * torch.rand(count, 4, generator=generator),
        }
        for count in counts
    ]
    return logits, boxes, targets


def _slow_layer(
    logits: Tensor, boxes: Tensor, targets: list[dict[str, Tensor]], eos: float
) -> tuple[float, float, float]:
    """(loss_ce, loss_bbox, loss_giou) of one layer, query by query."""
    nll = weights = l1 = giou = 0.0
    for image, target in enumerate(targets):
        cost = matching_cost(logits[image, None].softmax(-1), boxes[image, None], pad_targets([target]))[0]
        rows, columns = hungarian(cost.numpy())
        owner = dict(zip(rows.tolist(), columns.tolist(), strict=True))
        for query in range(QUERIES):
            label = int(target["labels"][owner[query]]) if query in owner else CLASSES
            weight = eos if label == CLASSES else 1.0
            nll -= weight * float(logits[image, query].log_softmax(-1)[label])
            weights += weight
        for query, found in owner.items():
            box, wanted = boxes[image, query], target["boxes"][found]
            l1 += float((box - wanted).abs().sum())
            giou += 1 - float(pairwise_giou(cxcywh_to_xyxy(box[None]), cxcywh_to_xyxy(wanted[None])))
    objects = max(sum(len(target["labels"]) for target in targets), 1)
    return nll / weights, l1 / objects, giou / objects


@pytest.mark.parametrize("counts", [[3, 0, 1], [0, 0], [8, 2], [1]])
@pytest.mark.parametrize("eos", [0.1, 1.0])
def test_losses_of_every_layer(counts: list[int], eos: float) -> None:
    logits, boxes, targets = _batch(counts)
    loss = SetCriterion(CLASSES, eos_coef=eos)(logits, boxes, targets)
    total = 0.0
    for layer in range(LAYERS):
        suffix = "" if layer == LAYERS - 1 else f"_{layer}"
        wanted = _slow_layer(logits[layer], boxes[layer], targets, eos)
        for name, value in zip(("loss_ce", "loss_bbox", "loss_giou"), wanted, strict=True):
            assert loss.parts[name + suffix].item() == pytest.approx(value, rel=1e-4, abs=1e-5)
        total += wanted[0] + 5 * wanted[1] + 2 * wanted[2]
    assert loss.total.item() == pytest.approx(total, rel=1e-4)


def test_without_auxiliary_losses_only_the_last_layer_learns() -> None:
    logits, boxes, targets = _batch([2, 1])
    logits.requires_grad_()
    SetCriterion(CLASSES, aux_loss=False)(logits, boxes, targets).total.backward()
    assert logits.grad is not None
    assert not logits.grad[:-1].any()
    assert logits.grad[-1].abs().sum() > 0


def test_one_to_many_has_more_pairs_and_means_over_them() -> None:
    logits, boxes, targets = _batch([1, 2])
    criterion = SetCriterion(CLASSES, assignment="one_to_many", claims=2)
    matches = criterion.match(logits, boxes, pad_targets(targets))
    assert min(matches.per_layer) >= 3
    loss = criterion(logits, boxes, targets)
    chosen = matches.layer == LAYERS - 1
    padded = pad_targets(targets)
    found = boxes[-1][matches.image[chosen], matches.query[chosen]]
    wanted = padded.boxes[matches.image[chosen], matches.object[chosen]]
    assert loss.parts["loss_bbox"].item() == pytest.approx((found - wanted).abs().sum(-1).mean().item(), rel=1e-5)


def test_as_released_is_the_same_in_one_process() -> None:
    batch = _batch([2, 0, 3])
    assert SetCriterion(CLASSES)(*batch).total == SetCriterion(CLASSES, as_released=True)(*batch).total


def test_wrong_options() -> None:
    with pytest.raises(ValueError, match="one_to_some"):
        SetCriterion(CLASSES, assignment=cast(Any, "one_to_some"))
    with pytest.raises(ValueError, match="at least 1"):
        SetCriterion(CLASSES, assignment="one_to_many", claims=0)


def test_logged_errors() -> None:
    logits = torch.tensor([[[5.0, 0.0, 0.0], [0.0, 5.0, 0.0], [0.0, 0.0, 5.0]]])
    assert class_error(logits, torch.tensor([[0, 0, 2]]), no_object=2).item() == 0.5
    assert class_error(logits, torch.tensor([[2, 2, 2]]), no_object=2).item() == 1.0
    assert cardinality_error(logits[None], [1]).tolist() == [1.0]


def test_dice_and_focal_by_formula() -> None:
    logits, target = torch.randn(2, 9), torch.randint(0, 2, (2, 9)).float()
    p = logits.sigmoid()
    dice = sum(1 - (2 * (p[i] * target[i]).sum() + 1) / (p[i].sum() + target[i].sum() + 1) for i in range(2)) / 3
    assert dice_loss(logits, target, 3.0).item() == pytest.approx(float(dice), rel=1e-5)
    right = p * target + (1 - p) * (1 - target)
    alpha = 0.25 * target + 0.75 * (1 - target)
    focal = -(alpha * (1 - right) ** 2 * right.log()).mean(1).sum() / 3
    assert focal_loss(logits, target, 3.0).item() == pytest.approx(float(focal), rel=1e-4)
    plain = -((1 - right) ** 2 * right.log()).mean(1).sum() / 3
    assert focal_loss(logits, target, 3.0, alpha=-1).item() == pytest.approx(float(plain), rel=1e-4)


def test_masks_without_any_object() -> None:
    logits, boxes, targets = _batch([0, 0])
    for target in targets:
        target["masks"] = torch.zeros(0, 16, 16, dtype=torch.bool)
    loss = SetCriterion(CLASSES)(logits, boxes, targets, torch.randn(2, QUERIES, 4, 4))
    assert loss.parts["loss_mask"].item() == 0
    assert loss.parts["loss_dice"].item() == 0
