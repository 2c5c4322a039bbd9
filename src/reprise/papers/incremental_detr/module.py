"""Incremental-DETR as a LightningModule: base training, self-supervised fine-tuning, and incremental fine-tuning."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from reprise.data.incremental import IncrementalDetection
from reprise.data.loader import Batch
from reprise.errors import ConfigError
from reprise.nn.backbone import load_imagenet
from reprise.nn.detection import (
    AveragePrecision,
    Detection,
    evaluation_sizes,
    ground_truth,
    of_classes,
    padding_of,
    top_detections,
)
from reprise.nn.ema import momentum_copy
from reprise.nn.set_loss import SetLoss
from reprise.nn.state import fitting_state
from reprise.papers.incremental_detr.build import STAGES, Stage
from reprise.papers.incremental_detr.criterion import IncrementalCriterion, predictions
from reprise.papers.incremental_detr.model import DeformableDETR, DetectorOutput, Trainable
from reprise.papers.incremental_detr.weights import without_pseudo_class
from reprise.training.module import OptimizerFactory, PaperModule, Picture, ScheduleFactory

LOGGED_PARTS = (
    "loss_ce",
    "loss_bbox",
    "loss_giou",
    "class_error",
    "loss_ce_select",
    "loss_kd",
    "loss_cls_kd",
    "kd_errors",
)
LOCATIONS = ("reference_points", "sampling_offsets")  # layers with a learning rate of their own


def parameter_groups(model: nn.Module, lr_backbone: float | None, lr_locations: float | None) -> list[dict[str, Any]]:
    """Trainable parameters in up to three groups: the backbone, the layers that say where to look, and the rest.

    Args:
        lr_backbone, lr_locations: None for the rate of the rest.
    """
    kinds: dict[str, list[nn.Parameter]] = {"rest": [], "backbone": [], "locations": []}
    for name, parameter in model.named_parameters():
        located = any(layer in name for layer in LOCATIONS)
        kind = "backbone" if name.startswith("backbone.") else "locations" if located else "rest"
        if parameter.requires_grad:
            kinds[kind].append(parameter)
    rates = {"rest": None, "backbone": lr_backbone, "locations": lr_locations}
    groups = [(kind, {"params": parameters}) for kind, parameters in kinds.items() if parameters]
    return [group if rates[kind] is None else {**group, "lr": rates[kind]} for kind, group in groups]


class IncrementalDetrModule(PaperModule):
    """One stage of training, and its evaluation on base and novel classes.

    Args:
        model: the detector, with one class output more in the stage `self_supervised`.
        criterion: the losses.
        optimizer, schedule: factories; gradients are clipped by the trainer (`trainer.gradient_clip_val`, 0.1).
        stage: `base` trains everything; `self_supervised` and `incremental` only what `trainable` says, starting from
            an earlier stage (`continue_from`).
        trainable: the class-specific parts in the paper (`projection_and_class_head`).
        lr_backbone, lr_locations: learning rates of the backbone and of the layers that say where to look, None for
            that of the rest.
        backbone_weights: torchvision's ImageNet weights to start the stage `base` from, None for a random backbone.
        score_threshold: detections above it are shown in pictures.
        as_released: the losses of the released code (see `IncrementalCriterion`), and a teacher with dropout.
    """

    refuses = {
        "accumulation": "its losses are divided by the objects and pseudo objects found in the whole batch",
        "sharding": "its later stages train a few small parts, of which some ranks would hold nothing",
    }

    def __init__(
        self,
        model: DeformableDETR,
        criterion: IncrementalCriterion,
        optimizer: OptimizerFactory,
        schedule: ScheduleFactory | None = None,
        *,
        stage: Stage = "incremental",
        trainable: Trainable = "projection_and_class_head",
        lr_backbone: float | None = None,
        lr_locations: float | None = None,
        backbone_weights: str | None = None,
        score_threshold: float = 0.3,
        as_released: bool = False,
    ) -> None:
        super().__init__(optimizer, schedule)
        if stage not in STAGES:
            raise ValueError(f"stage is {stage!r}; choose one of {', '.join(STAGES)}")
        self.model, self.criterion, self.stage = model, criterion, stage
        self.criterion.as_released = as_released
        self.as_released = as_released
        self.lr_backbone, self.lr_locations = lr_backbone, lr_locations
        self.backbone_weights = backbone_weights
        self.score_threshold = score_threshold
        self.trainable: Trainable = "all" if stage == "base" else trainable
        self.model.train_only(self.trainable)
        self.teacher = momentum_copy(model) if stage == "incremental" and criterion.distils else None
        self.real_classes = model.num_classes - (stage == "self_supervised")
        self.base_ap, self.novel_ap = AveragePrecision(), AveragePrecision()

    @property
    def classes(self) -> IncrementalDetection:
        """The data module, which knows base and novel classes.

        Raises:
            ConfigError: another kind of data.
        """
        data = self.data
        if not isinstance(data, IncrementalDetection):
            raise ConfigError(
                f"{type(data).__name__} does not tell base from novel classes",
                looked_at="data",
                next_step="data=incremental_shapes, incremental_bccd or incremental_coco",
            )
        return data

    def continue_from(self, state: Mapping[str, Tensor]) -> None:
        """Take over the detector of the earlier stage.

        The class head starts anew in the stage `self_supervised`; in the stage `incremental` the row of the pseudo
        objects is left out, and the teacher becomes what the novel model starts from.
        """
        own = self.model.state_dict()
        source = {name.removeprefix("model."): value for name, value in state.items() if name.startswith("model.")}
        if self.stage == "self_supervised":
            source |= {name: value for name, value in own.items() if name.startswith("class_embed.")}
        fitted = fitting_state(
            without_pseudo_class(source, own),
            own,
            looked_at="the final checkpoint of the earlier stage",
            next_step="give all stages the same paper.model",
        )
        self.model.load_state_dict(fitted)
        if self.teacher is not None:
            self.teacher.load_state_dict(fitted)

    def setup(self, stage: str) -> None:
        """Load the pretrained backbone before base training; a checkpoint that is restored later overrides it."""
        if stage == "fit" and self.stage == "base" and self.backbone_weights is not None:
            load_imagenet(self.model.backbone[0], self.backbone_weights)

    def train(self, mode: bool = True) -> IncrementalDetrModule:
        """Training mode for all but the teacher, whose dropout stays off (not so in the released code)."""
        super().train(mode)
        if self.teacher is not None:
            self.teacher.train(mode and self.as_released)
        return self

    def parameter_groups(self) -> list[dict[str, Any]]:
        return parameter_groups(self.model, self.lr_backbone, self.lr_locations)

    def forward(self, image: Tensor, mask: Tensor | None = None) -> DetectorOutput:
        """Predictions of every decoder layer for images [B, 3, H, W] and padding mask bool [B, H, W] or None."""
        return self.model(image, mask)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        loss = self.loss(batch)
        parts = {f"train/{name}": loss.parts[name].detach() for name in LOGGED_PARTS if name in loss.parts}
        self.log_dict({"train/loss": loss.total.detach(), **parts}, sync_dist=True, batch_size=len(batch["image"]))
        return loss.total

    def loss(self, batch: Batch) -> SetLoss:
        """The loss of this stage for a batch."""
        features = self.model.features(batch["image"], padding_of(batch))
        found = predictions(self.model.detect(features))
        targets = batch["targets"]
        if self.stage == "self_supervised" and self.classes.search.count:
            known = [_of(target, target["labels"] < self.real_classes) for target in targets]
            proposals = [target["boxes"][target["labels"] == self.real_classes] for target in targets]
            return self.criterion.self_supervised(found, known, proposals, self.real_classes)
        if self.teacher is None:  # no distillation, or no pseudo objects at all
            return self.criterion.base(found, targets)
        with torch.no_grad():
            if self.trainable == "all":  # else both backbones are the same and frozen
                features = self.teacher.features(batch["image"], padding_of(batch))
            teacher = predictions(self.teacher.detect(features))
        sizes = torch.stack([target["size"] for target in targets])
        return self.criterion.incremental(found, teacher, targets, sizes)

    def detections(self, batch: Batch) -> list[Detection]:
        """The top 100 of each image, base and novel classes in competition; pseudo objects are not reported."""
        output = self(batch["image"], padding_of(batch))
        logits = output.logits[-1, ..., : self.real_classes]
        return top_detections(logits, output.boxes[-1], evaluation_sizes(batch))

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self._evaluate(batch)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        self._evaluate(batch)

    def on_validation_epoch_end(self) -> None:
        self._report("val")

    def on_test_epoch_end(self) -> None:
        self._report("test")

    def _evaluate(self, batch: Batch) -> None:
        found = self.detections(batch)
        truth = ground_truth(batch["targets"], evaluation_sizes(batch))
        for metric, labels in ((self.base_ap, self.classes.base_labels), (self.novel_ap, self.classes.novel_labels)):
            chosen = labels.to(self.device)
            metric.update([of_classes(one, chosen) for one in found], [of_classes(one, chosen) for one in truth])

    def _report(self, split: str) -> None:
        values = {}
        for name, metric in (("base", self.base_ap), ("novel", self.novel_ap)):
            result = metric.compute()
            metric.reset()
            values[f"{name}_ap"], values[f"{name}_ap50"] = (result[key].clamp(min=0) for key in ("map", "map_50"))
        base, novel = values["base_ap50"], values["novel_ap50"]
        values["harmonic_ap50"] = 2 * base * novel / (base + novel).clamp(min=1e-6)
        self.log_dict({f"{split}/{name}": value for name, value in values.items()}, sync_dist=True)

    def pictures(self) -> Iterator[Picture]:
        from reprise.papers.incremental_detr.pictures import pictures

        return pictures(self)


def _of(target: Mapping[str, Any], chosen: Tensor) -> dict[str, Tensor]:
    """Labels and boxes of some objects."""
    return {"labels": target["labels"][chosen], "boxes": target["boxes"][chosen]}
