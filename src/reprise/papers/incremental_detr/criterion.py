"""The losses of the three stages: set loss, set loss of pseudo objects, distillation of the paper.

Legend: L layers, B images, Q queries, C class outputs, M most objects in an image.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import sigmoid_focal_loss

from reprise.distributed import all_reduce_sum, world_size
from reprise.nn.matching import Matches, PaddedTargets, Target, match, matching_cost, pad_targets
from reprise.nn.set_loss import SetLoss, box_sums, cardinality_error, class_error, class_targets, named_by_layer
from reprise.papers.incremental_detr.distillation import (
    Divergence,
    away_from,
    class_divergence,
    covered_cells,
    feature_distillation,
    pseudo_queries,
    released_class_distillation,
    released_distilled_cells,
    released_feature_distillation,
)
from reprise.papers.incremental_detr.model import DetectorOutput

COST_ALPHA, COST_GAMMA, TINY = 0.25, 2.0, 1e-8  # of the matching, whatever the loss uses


def focal_class_score(logits: Tensor) -> Tensor:
    """Minus the focal cost of each class: (1 - alpha) p^2 (-log(1 - p)) - alpha (1 - p)^2 (-log p), shape kept."""
    p = logits.sigmoid()
    negative = (1 - COST_ALPHA) * p**COST_GAMMA * -(1 - p + TINY).log()
    positive = COST_ALPHA * (1 - p) ** COST_GAMMA * -(p + TINY).log()
    return negative - positive


def focal_sums(logits: Tensor, target: Tensor, *, alpha: float, gamma: float) -> Tensor:
    """Sigmoid focal loss summed over images, queries and classes, [L].

    Args:
        logits: [L, B, Q, C].
        target: int64 [L, B, Q], C for a query without an object.
        alpha: weight of the positive class; below 0: no weighting.
    """
    wanted = F.one_hot(target, logits.shape[-1] + 1)[..., :-1].to(logits.dtype)
    loss = sigmoid_focal_loss(logits, wanted, alpha=alpha if alpha >= 0 else -1, gamma=gamma)
    return loss.sum((1, 2, 3))


def kept_proposals(proposals: Sequence[Tensor], targets: PaddedTargets, overlap: float) -> list[Tensor]:
    """Boxes [p, 4] (cxcywh) of each image whose generalised IoU with every object is below `overlap`."""
    padded = pad_targets([{"boxes": boxes, "labels": boxes.new_zeros(len(boxes)).long()} for boxes in proposals])
    away = away_from(padded.boxes, targets, overlap)
    return [boxes[away[image, : len(boxes)]] for image, boxes in enumerate(proposals)]


class Predictions(NamedTuple):
    """A detector's view of a batch.

    Attributes:
        logits: [L, B, Q, C]; boxes: [L, B, Q, 4] cxcywh.
        projected: the transformer's inputs [B, D, H, W] of each level.
        paddings: bool [B, H, W] of each level.
    """

    logits: Tensor
    boxes: Tensor
    projected: Sequence[Tensor]
    paddings: Sequence[Tensor]


def predictions(output: DetectorOutput) -> Predictions:
    """What the criterion needs of a detector's output."""
    return Predictions(output.logits, output.boxes, output.projected, output.paddings)


class IncrementalCriterion(nn.Module):
    """Set losses and distillation; sums are divided by counts of the whole global batch (see `_per_rank`).

    Args:
        class_cost, l1_cost, giou_cost: of the matching.
        class_coef, l1_coef, giou_coef: of the set loss.
        focal_alpha, focal_gamma: of the class term.
        aux_loss: also train the decoder layers before the last.
        pseudo_coef: lambda', of the pseudo objects' set loss.
        pseudo_coefs: weights of its terms where they are not lambda' times those of the set loss, by their names
            (`loss_ce`, `loss_bbox`, `loss_giou`), as the released options `loss_*_select_coef` allow.
        overlap: generalised IoU from which a proposal, or a base model's detection, counts as a known object.
        feature_kd_coef, class_kd_coef: lambda_feat and lambda_cls.
        masked: leave features inside novel boxes free; False: distil all cells.
        sure: class probability above which a base model's detection is a pseudo target.
        divergence: `softmax` (published) or `sigmoid`, see `class_divergence`.
        as_released: as the released code does: proposals train the last layer alone, the feature distillation is
            reported but not optimised, class distillation pairs other rows, counts are clamped for each process.
    """

    def __init__(
        self,
        *,
        class_cost: float = 2.0,
        l1_cost: float = 5.0,
        giou_cost: float = 2.0,
        class_coef: float = 2.0,
        l1_coef: float = 5.0,
        giou_coef: float = 2.0,
        focal_alpha: float = 0.25,
        focal_gamma: float = 2.0,
        aux_loss: bool = True,
        pseudo_coef: float = 1.0,
        pseudo_coefs: Mapping[str, float] | None = None,
        overlap: float = 0.1,
        feature_kd_coef: float = 0.1,
        class_kd_coef: float = 2.0,
        masked: bool = True,
        sure: float = 0.5,
        divergence: Divergence = "softmax",
        as_released: bool = False,
    ) -> None:
        super().__init__()
        if divergence not in ("softmax", "sigmoid"):
            raise ValueError(f"divergence is {divergence!r}; choose softmax or sigmoid")
        if unknown := set(pseudo_coefs or ()) - {"loss_ce", "loss_bbox", "loss_giou"}:
            raise ValueError(f"pseudo_coefs names no term {', '.join(sorted(unknown))}")
        self.costs = {"class_weight": class_cost, "l1_weight": l1_cost, "giou_weight": giou_cost}
        self.coefs = {"loss_ce": class_coef, "loss_bbox": l1_coef, "loss_giou": giou_coef}
        self.focal_alpha, self.focal_gamma = focal_alpha, focal_gamma
        self.aux_loss = aux_loss
        scaled = {name: pseudo_coef * coef for name, coef in self.coefs.items()}
        self.pseudo_coefs = scaled | dict(pseudo_coefs or {})
        self.overlap, self.sure = overlap, sure
        self.feature_kd_coef, self.class_kd_coef = feature_kd_coef, class_kd_coef
        self.masked, self.divergence = masked, divergence
        self.as_released = as_released

    @property
    def distils(self) -> bool:
        """Whether the base model is needed at all."""
        return self.feature_kd_coef != 0 or self.class_kd_coef != 0

    @torch.no_grad()
    def match(self, logits: Tensor, boxes: Tensor, targets: PaddedTargets) -> Matches:
        """Pairs of queries and objects, for logits [L, B, Q, C] and boxes [L, B, Q, 4]."""
        return match(matching_cost(focal_class_score(logits), boxes, targets, **self.costs), targets.counts)

    def set_loss(self, logits: Tensor, boxes: Tensor, targets: PaddedTargets) -> tuple[SetLoss, Matches]:
        """L_hg: the detection loss of all layers, for logits [L, B, Q, C] and boxes [L, B, Q, 4]."""
        losses, matches, assigned = self._set_losses(logits, boxes, targets)
        total = torch.stack([self.coefs[name] * values.sum() for name, values in losses.items()]).sum()
        with torch.no_grad():
            parts = named_by_layer({**losses, "cardinality_error": cardinality_error(logits, targets.counts)})
            parts["class_error"] = class_error(logits[-1], assigned[-1], logits.shape[-1])
        return SetLoss(total, parts), matches

    def _set_losses(
        self, logits: Tensor, boxes: Tensor, targets: PaddedTargets
    ) -> tuple[dict[str, Tensor], Matches, Tensor]:
        """Unweighted losses [L] by name, the matching, and the class of each query."""
        no_object = logits.shape[-1]
        matches = self.match(logits, boxes, targets)
        assigned = class_targets(matches, targets.labels, logits.shape[:3], no_object)
        class_sum = focal_sums(logits, assigned, alpha=self.focal_alpha, gamma=self.focal_gamma)
        l1_sum, giou_sum = box_sums(boxes, targets, matches)
        count = self._per_rank(class_sum.new_tensor(float(sum(targets.counts))))
        losses = {"loss_ce": class_sum / count, "loss_bbox": l1_sum / count, "loss_giou": giou_sum / count}
        return losses, matches, assigned

    def base(self, found: Predictions, targets: Sequence[Target]) -> SetLoss:
        """Stage 1a, and the plain fine-tuning without distillation: L_hg(y, y^)."""
        logits, boxes = self._layers(found)
        return self.set_loss(logits, boxes, pad_targets(targets))[0]

    def self_supervised(
        self, found: Predictions, targets: Sequence[Target], proposals: Sequence[Tensor], label: int
    ) -> SetLoss:
        """Stage 1b: L_hg(y, y^) + lambda' L_hg(y', y^'), each matched on its own against the same predictions.

        Args:
            targets: base objects.
            proposals: boxes [p, 4] cxcywh of each image; those that overlap a base object are dropped.
            label: class of the pseudo objects.
        """
        logits, boxes = self._layers(found)
        known = pad_targets(targets)
        real, _ = self.set_loss(logits, boxes, known)
        kept = kept_proposals(proposals, known, self.overlap)
        pseudo = pad_targets([{"boxes": box, "labels": known.labels.new_full((len(box),), label)} for box in kept])
        losses, _, assigned = self._set_losses(logits, boxes, pseudo)
        trained = slice(-1, None) if self.as_released else slice(None)
        terms = [self.pseudo_coefs[name] * values[trained].sum() for name, values in losses.items()]
        with torch.no_grad():
            errors = [class_error(*layer, logits.shape[-1]) for layer in zip(logits, assigned, strict=True)]
            named = {f"{name}_select": values for name, values in losses.items()}
            parts = real.parts | named_by_layer({**named, "class_error_select": torch.stack(errors)})
        return SetLoss(real.total + torch.stack(terms).sum(), parts)

    def incremental(
        self, found: Predictions, teacher: Predictions, targets: Sequence[Target], image_sizes: Tensor
    ) -> SetLoss:
        """Stage 2: L_hg(y, y^) + lambda_feat L_feat^kd + lambda_cls L_cls^kd.

        Args:
            found, teacher: of the novel model, and of the frozen base model.
            targets: novel objects.
            image_sizes: int64 [B, 2] (h, w) without padding; only the released variant needs them.
        """
        logits, boxes = self._layers(found)
        known = pad_targets(targets)
        loss, matches = self.set_loss(logits, boxes, known)
        teacher_logits, teacher_boxes = self._layers(teacher)
        features = self.feature_kd(found, teacher, known, image_sizes)
        if self.as_released:
            classes, broken = self._released_class_kd(logits, boxes, teacher_logits, teacher_boxes, known, matches)
            total = loss.total + self.class_kd_coef * classes.sum()
        else:
            classes, broken = self.class_kd(logits, boxes, teacher_logits, teacher_boxes, known), None
            total = loss.total + self.feature_kd_coef * features + self.class_kd_coef * classes.sum()
        parts = loss.parts | {"loss_kd": features} | named_by_layer({"loss_cls_kd": classes})
        return SetLoss(total, parts if broken is None else parts | {"kd_errors": broken})

    def feature_kd(
        self, found: Predictions, teacher: Predictions, targets: PaddedTargets, image_sizes: Tensor
    ) -> Tensor:
        """L_feat^kd, the mean over levels; as released, of the first level alone."""
        losses = []
        levels = list(zip(found.projected, teacher.projected, found.paddings, strict=True))
        for ours, theirs, padding in levels[:1] if self.as_released else levels:
            size = ours.shape[-2:]
            if self.as_released:
                rows = zip(targets.boxes, targets.counts, image_sizes.tolist(), strict=True)
                cells = [released_distilled_cells(boxes[:count], image, size) for boxes, count, image in rows]
                losses.append(released_feature_distillation(ours, theirs, torch.stack(cells)))
                continue
            extent = torch.stack([(~padding[:, 0]).sum(-1), (~padding[:, :, 0]).sum(-1)], -1).to(ours.dtype)
            novel = covered_cells(targets.boxes, targets.counts, extent, size) if self.masked else padding
            losses.append(feature_distillation(ours, theirs, novel | padding))
        return torch.stack(losses).mean()

    def pseudo_targets(
        self, logits: Tensor, boxes: Tensor, targets: PaddedTargets
    ) -> tuple[PaddedTargets, list[Tensor]]:
        """Detections of the base model that stand for unlabelled base objects, and the queries that made them.

        Args:
            logits: [B, Q, C]; boxes: [B, Q, 4] cxcywh.
            targets: novel objects.
        """
        chosen = pseudo_queries(logits, boxes, targets, sure=self.sure, overlap=self.overlap)
        queries = [row.nonzero().flatten() for row in chosen]
        labels = logits.argmax(-1)
        rows = zip(labels, boxes, queries, strict=True)
        return pad_targets([{"labels": label[query], "boxes": box[query]} for label, box, query in rows]), queries

    def class_kd(
        self, logits: Tensor, boxes: Tensor, teacher_logits: Tensor, teacher_boxes: Tensor, targets: PaddedTargets
    ) -> Tensor:
        """L_cls^kd of each layer, [L]: the teacher's row is that of the query which made the pseudo target, the novel
        model's that of the query matched to it."""
        queries, matches = self._match_pseudo(logits, boxes, teacher_logits, teacher_boxes, targets)
        student = logits.flatten(0, 1)[matches.image, matches.query]
        origin = torch.nn.utils.rnn.pad_sequence(queries, batch_first=True)[matches.image, matches.object]
        teacher = teacher_logits.flatten(0, 1)[matches.image, origin]
        layer = matches.image.div(logits.shape[1], rounding_mode="floor")
        sums = logits.new_zeros(len(logits)).index_add(0, layer, class_divergence(student, teacher, self.divergence))
        pairs = logits.new_zeros(len(logits)).index_add(0, layer, torch.ones_like(layer, dtype=logits.dtype))
        return sums / self._per_rank(pairs)

    def _released_class_kd(
        self,
        logits: Tensor,
        boxes: Tensor,
        teacher_logits: Tensor,
        teacher_boxes: Tensor,
        targets: PaddedTargets,
        novel: Matches,
    ) -> tuple[Tensor, Tensor]:
        """The released pairing [L], and the share of layers where the released code would stop with an error."""
        _, matches = self._match_pseudo(logits, boxes, teacher_logits, teacher_boxes, targets)
        layer = matches.image.div(logits.shape[1], rounding_mode="floor")
        teacher = teacher_logits.flatten(0, 1)[matches.image, matches.query]
        student = logits[novel.layer, novel.image, novel.query]
        found = [
            released_class_distillation(student[novel.layer == index], teacher[layer == index])
            for index in range(len(logits))
        ]
        broken = logits.new_tensor([float(value is None) for value in found]).mean()
        return torch.stack([logits.sum() * 0 if value is None else value for value in found]), broken

    def _match_pseudo(
        self, logits: Tensor, boxes: Tensor, teacher_logits: Tensor, teacher_boxes: Tensor, targets: PaddedTargets
    ) -> tuple[list[Tensor], Matches]:
        """Queries of the pseudo targets of every layer, and their matching with the novel model's predictions of it.

        Each layer has its own, so layers times images are taken as images of one layer.
        """
        layers = len(logits)
        repeated = PaddedTargets(
            targets.labels.repeat(layers, 1), targets.boxes.repeat(layers, 1, 1), targets.counts * layers
        )
        with torch.no_grad():
            pseudo, queries = self.pseudo_targets(teacher_logits.flatten(0, 1), teacher_boxes.flatten(0, 1), repeated)
            matches = self.match(logits.flatten(0, 1)[None], boxes.flatten(0, 1)[None], pseudo)
        return queries, matches

    def _layers(self, found: Predictions) -> tuple[Tensor, Tensor]:
        return (found.logits, found.boxes) if self.aux_loss else (found.logits[-1:], found.boxes[-1:])

    def _per_rank(self, count: Tensor) -> Tensor:
        """What a rank's sums are divided by: the global count (at least 1) over the number of ranks, so that averaging
        gradients over ranks gives the gradient of one process with the global batch."""
        total, world = all_reduce_sum(count.detach().clone()), world_size()
        return (total / world).clamp(min=1) if self.as_released else total.clamp(min=1) / world
