"""DETR as a LightningModule: set loss, two learning rates, COCO-style evaluation of every decoder layer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor, nn

from reprise.data.loader import Batch
from reprise.nn.backbone import load_imagenet
from reprise.nn.detection import (
    AveragePrecision,
    Detection,
    DetectionScores,
    evaluation_sizes,
    ground_truth,
    padding_of,
    set_detections,
)
from reprise.nn.matching import Target
from reprise.papers.detr.criterion import SetCriterion
from reprise.papers.detr.model import DETR, DetrOutput
from reprise.papers.detr.segmentation import DETRSegmentation
from reprise.training.module import OptimizerFactory, PaperModule, Picture, ScheduleFactory

LOGGED_PARTS = ("loss_ce", "loss_bbox", "loss_giou", "class_error", "cardinality_error", "loss_mask", "loss_dice")


def parameter_groups(model: nn.Module, lr_backbone: float | None) -> list[dict[str, Any]]:
    """Trainable parameters in two groups: all but the backbone, and the backbone with its own learning rate.

    Args:
        lr_backbone: None for the rate of the others.
    """
    trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    groups: list[dict[str, Any]] = [
        {"params": [parameter for name, parameter in trained if "backbone" not in name]},
        {"params": [parameter for name, parameter in trained if "backbone" in name]},
    ]
    if lr_backbone is not None:
        groups[1]["lr"] = lr_backbone
    return [group for group in groups if group["params"]]


class DetrModule(PaperModule):
    """Training and evaluation of a detector, with or without masks.

    Args:
        model: the detector.
        criterion: its loss.
        optimizer, schedule: factories; gradients are clipped by the trainer (`trainer.gradient_clip_val`, 0.1).
        lr_backbone: learning rate of the backbone, None for that of the rest.
        backbone_weights: torchvision's ImageNet weights to start from (`IMAGENET1K_V1`), None for a random backbone.
        override_empty: score a query that says "no object" by its best real class (the paper's default).
        nms_iou: IoU of the non-maximum suppression that the evaluation compares with.
        score_threshold: detections above it count as duplicates and are shown in pictures.
        as_released: the normalisation of the released code (see `SetCriterion`).
    """

    def __init__(
        self,
        model: DETR | DETRSegmentation,
        criterion: SetCriterion,
        optimizer: OptimizerFactory,
        schedule: ScheduleFactory | None = None,
        *,
        lr_backbone: float | None = None,
        backbone_weights: str | None = None,
        override_empty: bool = True,
        nms_iou: float = 0.5,
        score_threshold: float = 0.5,
        as_released: bool = False,
    ) -> None:
        super().__init__(optimizer, schedule)
        self.model = model
        self.criterion = criterion
        self.criterion.as_released = as_released
        self.lr_backbone = lr_backbone
        self.backbone_weights = backbone_weights
        self.override_empty = override_empty
        self.score_threshold = score_threshold
        self.layer_scores: list[dict[str, float]] = []  # of the last test, one a decoder layer
        self.val_ap = AveragePrecision()
        layers = range(self.detector.transformer.num_layers)
        self.test_scores = [DetectionScores(nms_iou=nms_iou, score_threshold=score_threshold) for _ in layers]
        self.test_metrics = nn.ModuleList(self.test_scores)  # registered, so that they move to the device

    @property
    def detector(self) -> DETR:
        """The detector itself, also inside a segmentation model."""
        return self.model.detr if isinstance(self.model, DETRSegmentation) else self.model

    def setup(self, stage: str) -> None:
        """Load the pretrained backbone before training; a checkpoint that is restored later overrides it."""
        if stage == "fit" and self.backbone_weights is not None:
            load_imagenet(self.detector.backbone[0], self.backbone_weights)

    def parameter_groups(self) -> list[dict[str, Any]]:
        return parameter_groups(self.model, self.lr_backbone)

    def forward(self, image: Tensor, mask: Tensor | None = None) -> DetrOutput:
        """Predictions of every decoder layer for images [B, 3, H, W] and padding mask bool [B, H, W] or None."""
        return self.detector(image, mask)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        image, mask = batch["image"], padding_of(batch)
        if isinstance(self.model, DETRSegmentation):
            output, pred_masks, _ = self.model(image, mask)
        else:
            output, pred_masks = self.model(image, mask), None
        loss = self.criterion(output.logits, output.boxes, batch["targets"], pred_masks, self._whole_targets())
        parts = {f"train/{name}": loss.parts[name].detach() for name in LOGGED_PARTS if name in loss.parts}
        self.log_dict({"train/loss": loss.total.detach(), **parts}, sync_dist=True, batch_size=len(image))
        return loss.total

    def _whole_targets(self) -> Sequence[Target] | None:
        """The targets of all parts of the step at hand, where there is more than one."""
        return None if self.whole_batch is None else self.whole_batch["targets"]

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        output = self(batch["image"], padding_of(batch))
        self.val_ap.update(self._detections(output, batch)[-1], ground_truth(batch["targets"], evaluation_sizes(batch)))

    def on_validation_epoch_end(self) -> None:
        found = self.val_ap.compute()
        self.val_ap.reset()
        self.log_dict({"val/ap": found["map"], "val/ap50": found["map_50"]}, sync_dist=True)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        output = self(batch["image"], padding_of(batch))
        truth = ground_truth(batch["targets"], evaluation_sizes(batch))
        for scores, detections in zip(self.test_scores, self._detections(output, batch), strict=True):
            scores.update(detections, truth)

    def on_test_epoch_end(self) -> None:
        layers = [scores.compute() for scores in self.test_scores]
        for scores in self.test_scores:
            scores.reset()
        self.layer_scores = [{name: float(value) for name, value in layer.items()} for layer in layers]
        self.log_dict({f"test/{name}": value for name, value in self.layer_scores[-1].items()}, sync_dist=True)
        for index, layer in enumerate(self.layer_scores):
            own = {f"test/layer{index}_{name}": layer[name] for name in ("ap50", "ap50_nms", "nms_gain")}
            self.log_dict(own, sync_dist=True)

    def _detections(self, output: DetrOutput, batch: Batch) -> list[list[Detection]]:
        """Detections of every decoder layer."""
        sizes = evaluation_sizes(batch)
        layers: Sequence[tuple[Tensor, Tensor]] = list(zip(output.logits, output.boxes, strict=True))
        return [set_detections(*layer, sizes, override_empty=self.override_empty) for layer in layers]

    def pictures(self) -> Iterator[Picture]:
        from reprise.papers.detr.pictures import pictures

        return pictures(self)
