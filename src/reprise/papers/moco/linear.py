"""The second stage of the published evaluation: a linear classifier on the frozen encoder, trained on images."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics.classification import MulticlassAccuracy

from reprise.data.loader import Batch
from reprise.papers.moco.module import MomentumContrast
from reprise.papers.moco.probe import LinearClassifier
from reprise.papers.moco.weights import import_backbone
from reprise.training.module import Picture


class LinearClassification(MomentumContrast):
    """Trains only a linear layer on `image`; logs `<split>/accuracy`.

    The trunk comes from `weights`, or from the arm's earlier stage.

    Args:
        arguments: those of `MomentumContrast`; of the model only the encoder is used.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.add_module("model", LinearClassifier(self.model.encoder, self.num_classes))
        names = ("val", "test")
        self.accuracies = nn.ModuleDict({name: MulticlassAccuracy(self.num_classes, average="micro") for name in names})

    @property
    def classifier(self) -> LinearClassifier:
        """The model, typed."""
        model = self.get_submodule("model")
        assert isinstance(model, LinearClassifier)
        return model

    def continue_from(self, state: Mapping[str, Tensor]) -> None:
        kept = {name: value for name, value in state.items() if name.startswith("model.")}
        self.load_trunk(kept)

    def load_trunk(self, state: Mapping[str, Any]) -> None:
        self.classifier.encoder.load_state_dict(import_backbone(state, self.classifier.encoder))

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        loss = F.cross_entropy(self(batch["image"]), batch["label"])
        self.log("train/loss", loss, sync_dist=True)
        return loss

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Nothing: the first layer does not train."""

    def fit_probes(self) -> None:
        """Nothing: the classifier is trained."""

    def _evaluate(self, batch: Batch, split: str) -> None:
        logits = self(batch["image"])
        accuracy = self.accuracies[split]
        assert isinstance(accuracy, MulticlassAccuracy)
        accuracy(logits, batch["label"])
        self.log(f"{split}/accuracy", accuracy, batch_size=len(logits), on_step=False, on_epoch=True)

    def pictures(self) -> Iterator[Picture]:
        return iter(())
