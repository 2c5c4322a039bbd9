"""From predictions to detections, and COCO-style evaluation of them with and without non-maximum suppression.

A detection of an image is a dict: `boxes` float [N, 4] xyxy in pixels, `scores` float [N], `labels` int64 [N].
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torchmetrics import MeanMetric
from torchmetrics.detection import MeanAveragePrecision
from torchvision.ops import batched_nms

from reprise.nn.boxes import cxcywh_to_xyxy, pairwise_iou, scale_to_pixels

Detection = dict[str, Tensor]


def set_detections(logits: Tensor, boxes: Tensor, sizes: Tensor, *, override_empty: bool = True) -> list[Detection]:
    """Every query becomes a detection: its best real class, scored by the softmax over all classes; nothing is sorted.

    Args:
        logits: [B, Q, C + 1], the last class is "no object".
        boxes: [B, Q, 4] cxcywh in [0, 1].
        sizes: int64 [B, 2] (height, width) that the boxes are scaled to.
        override_empty: a query that says "no object" still gives its best real class (DETR, section 4: worth about
            2 points of AP); False drops such queries.
    """
    probability = logits.softmax(-1)
    scores, labels = probability[..., :-1].max(-1)
    keep = torch.ones_like(labels, dtype=torch.bool) if override_empty else scores > probability[..., -1]
    pixels = scale_to_pixels(cxcywh_to_xyxy(boxes), sizes)
    rows = zip(pixels, scores, labels, keep, strict=True)
    return [{"boxes": box[kept], "scores": score[kept], "labels": label[kept]} for box, score, label, kept in rows]


def top_detections(logits: Tensor, boxes: Tensor, sizes: Tensor, *, most: int = 100) -> list[Detection]:
    """The best of all (query, class) pairs by sigmoid score, descending; one query can give several detections.

    For classifiers without a "no object" output, trained with a loss per class (Deformable DETR, 2010.04159).

    Args:
        logits: [B, Q, C].
        boxes: [B, Q, 4] cxcywh in [0, 1].
        sizes: int64 [B, 2] (height, width) that the boxes are scaled to.
        most: detections an image (fewer where there are not so many pairs).
    """
    classes = logits.shape[-1]
    probability = logits.sigmoid().flatten(1)
    scores, pair = probability.topk(min(most, probability.shape[1]), dim=1)
    query = pair.div(classes, rounding_mode="floor")
    corners = cxcywh_to_xyxy(boxes).gather(1, query.unsqueeze(-1).expand(-1, -1, 4))
    rows = zip(scale_to_pixels(corners, sizes), scores, pair % classes, strict=True)
    return [{"boxes": box, "scores": score, "labels": label} for box, score, label in rows]


def of_classes(detection: Detection, classes: Tensor) -> Detection:
    """The part of a detection (or of ground truth) whose labels are among `classes`, int64 [K]."""
    kept = torch.isin(detection["labels"], classes)
    return {name: value[kept] for name, value in detection.items()}


def ground_truth(targets: Sequence[Mapping[str, Any]], sizes: Tensor) -> list[Detection]:
    """Targets (cxcywh, relative) in pixels, in the form that `MeanAveragePrecision` takes.

    Args:
        targets: `labels` int64 [M], `boxes` [M, 4], optionally `iscrowd` and `area` [M] of each image.
        sizes: int64 [B, 2] (height, width).
    """
    truth = []
    for target, size in zip(targets, sizes, strict=True):
        optional = {key: target[key] for key in ("iscrowd", "area") if key in target}
        boxes = scale_to_pixels(cxcywh_to_xyxy(target["boxes"]), size)
        truth.append({"boxes": boxes, "labels": target["labels"], **optional})
    return truth


def padding_of(batch: Mapping[str, Any]) -> Tensor | None:
    """The padding mask of a batch, None when nothing is padded (then attention needs no mask)."""
    mask: Tensor = batch["mask"]
    return mask if bool(mask.any()) else None


def evaluation_sizes(batch: Mapping[str, Any]) -> Tensor:
    """(height, width) that each image is evaluated at: its own before any resizing where known; int64 [B, 2]."""
    return torch.stack([target.get("orig_size", target["size"]) for target in batch["targets"]])


def pad_images(images: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Images [3, h, w] of unequal sizes to [B, 3, H, W] padded at the bottom and right, and the padding mask."""
    height, width = (max(image.shape[axis] for image in images) for axis in (1, 2))
    batch = torch.zeros(len(images), 3, height, width)
    mask = torch.ones(len(images), height, width, dtype=torch.bool)
    for row, image in enumerate(images):
        batch[row, :, : image.shape[1], : image.shape[2]] = image
        mask[row, : image.shape[1], : image.shape[2]] = False
    return batch, mask


def suppress(detection: Detection, iou: float = 0.5) -> Detection:
    """Non-maximum suppression within each class: drops what overlaps a higher score by more than `iou`."""
    keep = batched_nms(detection["boxes"].float(), detection["scores"].float(), detection["labels"], iou)
    return {name: value[keep] for name, value in detection.items()}


def count_duplicates(detection: Detection, truth: Detection, *, iou: float = 0.5, score_threshold: float = 0.5) -> int:
    """Surplus detections: of an object's class, with IoU > `iou` and a score above the threshold, beyond the first.

    Returns:
        the sum over the objects of the image.
    """
    sure = detection["scores"] > score_threshold
    overlap = pairwise_iou(detection["boxes"][sure], truth["boxes"]) > iou
    same_class = detection["labels"][sure].unsqueeze(1) == truth["labels"].unsqueeze(0)
    return int(((overlap & same_class).sum(0) - 1).clamp(min=0).sum())


class AveragePrecision(MeanAveragePrecision):
    """COCO average precision as fractions; collects on every rank and gathers when computed."""

    def __init__(self) -> None:
        with torch.device("cpu"):  # its constructor reads values, which meta tensors do not have
            super().__init__(box_format="xyxy", iou_type="bbox", backend="faster_coco_eval")
        self.warn_on_many_detections = False  # DETR gives one detection a query; COCO's cut at 100 is meant

    def _sync_dist(self, dist_sync_fn: Any = None, process_group: Any = None) -> None:
        """Gather whole lists, in the order of the data set.

        torchmetrics exchanges image by image, so that ranks with different numbers of images wait for each other.
        """
        for name in self._reductions:
            parts: list[Any] = [None] * distributed.get_world_size(process_group)
            distributed.all_gather_object(parts, getattr(self, name), group=process_group)
            turns = itertools.zip_longest(*parts)  # rank r of w holds the images r, r + w, ...
            setattr(self, name, [item for turn in turns for item in turn if item is not None])


class DetectionScores(nn.Module):
    """AP without and with non-maximum suppression, and duplicates per object, of one stream of detections.

    Args:
        nms_iou: threshold of the suppression.
        score_threshold: of the detections that count as duplicates.
    """

    def __init__(self, *, nms_iou: float = 0.5, score_threshold: float = 0.5) -> None:
        super().__init__()
        self.nms_iou, self.score_threshold = nms_iou, score_threshold
        self.plain = AveragePrecision()
        self.suppressed = AveragePrecision()
        self.duplicates = MeanMetric()

    def update(self, detections: Sequence[Detection], truth: Sequence[Detection]) -> None:
        """Add a batch of images."""
        self.plain.update(list(detections), list(truth))
        self.suppressed.update([suppress(detection, self.nms_iou) for detection in detections], list(truth))
        for detection, objects in zip(detections, truth, strict=True):
            if count := len(objects["labels"]):
                surplus = count_duplicates(detection, objects, score_threshold=self.score_threshold)
                self.duplicates.update(surplus / count, weight=count)

    def compute(self) -> dict[str, Tensor]:
        """`ap` (mean over IoU .50:.95), `ap50`, `ap75`, `ap_small/medium/large`, `ap50_nms`, `nms_gain` = the
        difference, `duplicates` per object; a size without objects is left out."""
        plain, suppressed = self.plain.compute(), self.suppressed.compute()
        scores = {
            "ap": plain["map"],
            "ap50": plain["map_50"],
            "ap75": plain["map_75"],
            "ap50_nms": suppressed["map_50"],
        }
        sizes = {f"ap_{size}": plain[f"map_{size}"] for size in ("small", "medium", "large")}
        scores |= {name: value for name, value in sizes.items() if value >= 0}
        scores["nms_gain"] = scores["ap50_nms"] - scores["ap50"]
        return scores | {"duplicates": self.duplicates.compute()}

    def reset(self) -> None:
        """Forget all images."""
        for metric in (self.plain, self.suppressed, self.duplicates):
            metric.reset()
