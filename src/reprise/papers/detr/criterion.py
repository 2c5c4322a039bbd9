"""DETR's set losses (paper section 3.1, appendix A.2) as functions of tensors, for all decoder layers at once.

Legend: L layers, B images, Q queries, C classes, P matched pairs (over all layers), N masks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import sigmoid_focal_loss

from reprise.distributed import all_reduce_sum, world_size
from reprise.errors import ConfigError
from reprise.nn.matching import Matches, PaddedTargets, Target, match, matching_cost, pad_targets
from reprise.nn.set_loss import SetLoss, box_sums, cardinality_error, class_error, class_targets, named_by_layer


def classification_sums(logits: Tensor, target: Tensor, class_weight: Tensor) -> tuple[Tensor, Tensor]:
    """Weighted cross-entropy over ALL queries, as numerator and denominator of the weighted mean.

    Args:
        logits: [L, B, Q, C + 1].
        target: int64 [L, B, Q].
        class_weight: [C + 1], `eos_coef` for the last ("no object"), 1 for the others.

    Returns:
        sum of w * (-log p) and sum of w, both [L].
    """
    negative_log = F.cross_entropy(logits.flatten(0, 2), target.flatten(), class_weight, reduction="none")
    return negative_log.view(len(logits), -1).sum(1), class_weight[target].sum((1, 2))


def dice_loss(logits: Tensor, target: Tensor, num_boxes: Tensor | float) -> Tensor:
    """1 - (2 sum p q + 1) / (sum p + sum q + 1) of each mask, summed over masks, over `num_boxes`; [N, pixels] each."""
    probability = logits.sigmoid()
    overlap = 2 * (probability * target).sum(-1)
    total = probability.sum(-1) + target.sum(-1)
    return (1 - (overlap + 1) / (total + 1)).sum() / num_boxes


def focal_loss(
    logits: Tensor, target: Tensor, num_boxes: Tensor | float, *, alpha: float = 0.25, gamma: float = 2.0
) -> Tensor:
    """Sigmoid focal loss (Lin et al., 2017): mean over pixels, summed over masks, over `num_boxes`.

    Args:
        logits, target: [N, pixels].
        alpha: weight of the foreground; below 0: no weighting.
    """
    loss = sigmoid_focal_loss(logits, target, alpha=alpha if alpha >= 0 else -1, gamma=gamma)
    return loss.mean(1).sum() / num_boxes


def matched_mask_logits(
    pred_masks: Tensor, targets: Sequence[Target], matches: Matches, layer: int
) -> tuple[Tensor, Tensor]:
    """Predicted and true masks of the matched pairs of one layer.

    Predictions are upsampled (bilinear) to the largest size of the batch's masks; padding counts as background.

    Args:
        pred_masks: logits [B, Q, h, w].
        targets: with `masks` [m, H_i, W_i] of each image.

    Returns:
        logits and targets, float [N, H * W].
    """
    chosen = matches.layer == layer
    image, query, found = matches.image[chosen], matches.query[chosen], matches.object[chosen]
    sizes = [target["masks"].shape[-2:] for target in targets]
    height, width = max(size[0] for size in sizes), max(size[1] for size in sizes)
    logits = F.interpolate(pred_masks[image, query].unsqueeze(1), size=(height, width), mode="bilinear")
    wanted = logits.new_zeros(len(image), height, width)
    pairs = zip(image.tolist(), found.tolist(), strict=True)
    for row, (in_image, in_object) in enumerate(pairs):
        mask = targets[in_image]["masks"][in_object]
        wanted[row, : mask.shape[0], : mask.shape[1]] = mask.to(wanted.dtype)
    return logits.flatten(1), wanted.flatten(1)


class SetCriterion(nn.Module):
    """Match, then sum the losses over all decoder layers (equal weights); each layer is matched on its own.

    Every sum is divided by a number that counts the whole global batch (number of objects, at least 1, for boxes and
    masks; sum of the class weights for the class term) over the number of processes, so that averaging gradients over
    processes gives the gradient of one process with the global batch.

    Args:
        num_classes: index of "no object".
        class_cost, l1_cost, giou_cost: of the matching.
        class_coef, l1_coef, giou_coef: of the loss.
        mask_coef, dice_coef: of the mask losses, used when masks are given.
        eos_coef: class weight of "no object".
        aux_loss: also train the decoder layers before the last.
        assignment: `one_to_one` (the paper), or `one_to_many`: each object also claims its `claims` cheapest queries
            (the box losses are then means over the pairs).
        as_released: normalise as the released code does: the class term by the local batch of each process, and the
            number of objects clamped after its division by the number of processes.
    """

    class_weight: Tensor

    def __init__(
        self,
        num_classes: int,
        *,
        class_cost: float = 1.0,
        l1_cost: float = 5.0,
        giou_cost: float = 2.0,
        class_coef: float = 1.0,
        l1_coef: float = 5.0,
        giou_coef: float = 2.0,
        mask_coef: float = 1.0,
        dice_coef: float = 1.0,
        eos_coef: float = 0.1,
        aux_loss: bool = True,
        assignment: Literal["one_to_one", "one_to_many"] = "one_to_one",
        claims: int = 3,
        as_released: bool = False,
    ) -> None:
        super().__init__()
        if assignment not in ("one_to_one", "one_to_many"):
            raise ValueError(f"assignment is {assignment!r}; choose one_to_one or one_to_many")
        if assignment == "one_to_many" and claims < 1:
            raise ValueError(f"with one_to_many each object must claim at least 1 query, not {claims}")
        self.num_classes = num_classes
        self.costs = {"class_weight": class_cost, "l1_weight": l1_cost, "giou_weight": giou_cost}
        self.coefs = {"loss_ce": class_coef, "loss_bbox": l1_coef, "loss_giou": giou_coef}
        self.mask_coefs = {"loss_mask": mask_coef, "loss_dice": dice_coef}
        self.aux_loss, self.as_released = aux_loss, as_released
        self.claims = claims if assignment == "one_to_many" else 0
        weight = torch.ones(num_classes + 1)
        weight[-1] = eos_coef
        self.register_buffer("class_weight", weight, persistent=False)

    @torch.no_grad()
    def match(self, logits: Tensor, boxes: Tensor, targets: PaddedTargets) -> Matches:
        """Pairs of queries and objects, for logits [L, B, Q, C + 1] and boxes [L, B, Q, 4]."""
        cost = matching_cost(logits.softmax(-1), boxes, targets, **self.costs)
        return match(cost, targets.counts, claims=self.claims)

    def forward(
        self,
        logits: Tensor,
        boxes: Tensor,
        targets: Sequence[Target],
        pred_masks: Tensor | None = None,
        whole: Sequence[Target] | None = None,
    ) -> SetLoss:
        """The losses of all layers.

        Args:
            logits: [L, B, Q, C + 1], last layer last.
            boxes: [L, B, Q, 4] cxcywh in [0, 1].
            targets: per image `labels` int64 [m], `boxes` [m, 4] and, with `pred_masks`, `masks` [m, H, W].
            pred_masks: mask logits of the last layer [B, Q, h, w], or None.
            whole: where these images are a part of what a step goes through on this process, the targets of all of it;
                losses are then divided so that their mean over the parts is the loss of the whole.

        Raises:
            ConfigError: parts of a batch with one_to_many, whose number of pairs only the whole batch knows.
            DivergedError: when a prediction is not finite.
        """
        if not self.aux_loss:
            logits, boxes = logits[-1:], boxes[-1:]
        padded = pad_targets(targets)
        matches = self.match(logits, boxes, padded)
        target = class_targets(matches, padded.labels, logits.shape[:3], self.num_classes)
        ce_sum, weight_sum = classification_sums(logits, target, self.class_weight)
        l1_sum, giou_sum = box_sums(boxes, padded, matches)
        if whole is None:
            pairs: Sequence[float] = matches.per_layer if self.claims else (sum(padded.counts),) * len(weight_sum)
        else:
            weight_sum, pairs = self._expected_sums(whole, len(targets) / len(whole), weight_sum, logits.shape[2])
        ce_divisor, pair_divisor = self._divisors(weight_sum, pairs)
        losses = {
            "loss_ce": ce_sum / ce_divisor,
            "loss_bbox": l1_sum / pair_divisor,
            "loss_giou": giou_sum / pair_divisor,
        }
        total = torch.stack([self.coefs[name] * value.sum() for name, value in losses.items()]).sum()
        with torch.no_grad():
            losses["cardinality_error"] = cardinality_error(logits, padded.counts)
            parts = named_by_layer(losses)
            parts["class_error"] = class_error(logits[-1], target[-1], self.num_classes)
        if pred_masks is not None:
            last = len(logits) - 1
            pair = matched_mask_logits(pred_masks, targets, matches, last)
            parts["loss_mask"] = focal_loss(*pair, pair_divisor[last])
            parts["loss_dice"] = dice_loss(*pair, pair_divisor[last])
            total = total + sum(coef * parts[name] for name, coef in self.mask_coefs.items())
        return SetLoss(total, parts)

    def _expected_sums(
        self, whole: Sequence[Target], share: float, weight_sum: Tensor, queries: int
    ) -> tuple[Tensor, tuple[float, ...]]:
        """Class weights and pairs per layer that a part of the batch would have if all parts were alike."""
        if self.claims:
            raise ConfigError(
                "with one_to_many the loss of a batch is not the mean over its parts",
                looked_at="trainer.accumulate_grad_batches",
                next_step="set it to 1",
            )
        counts = [len(target["labels"]) for target in whole]
        matched = sum(min(count, queries) for count in counts)
        weights = matched + float(self.class_weight[-1]) * (len(whole) * queries - matched)
        return torch.full_like(weight_sum, weights * share), (sum(counts) * share,) * len(weight_sum)

    def _divisors(self, weight_sum: Tensor, pairs: Sequence[float]) -> tuple[Tensor, Tensor]:
        """What the class sums and the box sums are divided by, both [L]."""
        sums = all_reduce_sum(torch.stack([weight_sum.detach(), weight_sum.new_tensor(pairs)]))
        world = world_size()
        if self.as_released:
            return weight_sum.detach(), (sums[1] / world).clamp(min=1)
        return sums[0] / world, sums[1].clamp(min=1) / world
