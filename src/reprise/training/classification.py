"""Image classification: the module that papers about architectures, optimizers and losses share."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torchmetrics.classification import MulticlassAccuracy

from reprise.data.loader import Batch
from reprise.training.module import OptimizerFactory, PaperModule, ScheduleFactory

Criterion = Callable[[Tensor, Tensor], Tensor]


class Classifier(PaperModule):
    """Cross-entropy training and top-1 accuracy.

    Args:
        model: images [B, C, H, W] to logits [B, num_classes].
        criterion: (logits [B, C], label [B]) to a scalar; mean cross-entropy by default.
        num_classes: number of classes.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: OptimizerFactory,
        schedule: ScheduleFactory | None = None,
        *,
        num_classes: int,
        criterion: Criterion | None = None,
    ) -> None:
        super().__init__(optimizer, schedule)
        self.model = model
        self.criterion = criterion or nn.functional.cross_entropy
        self.val_accuracy = MulticlassAccuracy(num_classes, average="micro")
        self.test_accuracy = MulticlassAccuracy(num_classes, average="micro")

    def forward(self, image: Tensor) -> Tensor:
        return self.model(image)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        loss = self.criterion(self(batch["image"]), batch["label"])
        self.log("train/loss", loss, sync_dist=True)
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self._evaluate(batch, "val")

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        self._evaluate(batch, "test")

    def _evaluate(self, batch: Batch, split: str) -> None:
        logits = self(batch["image"])
        loss = nn.functional.cross_entropy(logits, batch["label"])
        accuracy = self.val_accuracy if split == "val" else self.test_accuracy
        accuracy(logits, batch["label"])
        size = len(batch["label"])
        self.log(f"{split}/loss", loss, batch_size=size, sync_dist=True, on_epoch=True)
        self.log(f"{split}/accuracy", accuracy, batch_size=size, on_step=False, on_epoch=True)

    @torch.no_grad()
    def predict(self, image: Tensor) -> Tensor:
        """Class probabilities [B, num_classes] in evaluation mode."""
        return self.eval()(image.to(self.device)).softmax(-1)
