"""Classification with SAM: what is memorised, what early stopping would have given, how sharp the minimum is."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torchmetrics.classification import MulticlassAccuracy

from reprise.data.loader import Batch
from reprise.errors import ConfigError
from reprise.papers.sam import criterion as measures
from reprise.seeding import generator
from reprise.training.checkpoint import current_step
from reprise.training.classification import Classifier, Criterion
from reprise.training.module import OptimizerFactory, Picture, ScheduleFactory
from reprise.training.sharpness import SAM

RELEASED_CLIP_NORM = 5.0  # google-research/sam, flag gradient_clipping


class SharpnessAwareClassifier(Classifier):
    """Cross-entropy training whose optimizer is meant to be SAM; with rho 0 it is the SGD baseline.

    Beside `test/accuracy` it logs, at each validation and on a fixed part of the training set in evaluation mode,
    `train/accuracy_given` (labels as trained on), `train/accuracy_clean` (true labels) and `train/memorised` (fraction
    of the wrongly labelled items that are predicted as their wrong label); and at the test these three as `test/...`,
    `test/accuracy_early_stopped` (the weights of the best validation so far), `test/sharpness` and
    `test/top_eigenvalue` of the training loss.

    Args:
        model, optimizer, schedule, num_classes, criterion: see `Classifier`.
        as_released: run the update as google-research/sam does: weight decay inside both gradients, and the descent
            gradient clipped to norm 5. Needs `optimizer=sam`.
        decay_vectors: weight decay also on parameters with one dimension (norms, biases).
        radius: of the ball in `test/sharpness`.
        probe_items: size of that part of the training set.
    """

    refuses = {
        "sharding": "the norm of the gradient that SAM climbs is that of the whole, of which each rank has a part"
    }

    def __init__(
        self,
        model: nn.Module,
        optimizer: OptimizerFactory,
        schedule: ScheduleFactory | None = None,
        *,
        num_classes: int,
        criterion: Criterion | None = None,
        as_released: bool = False,
        decay_vectors: bool = True,
        radius: float = 0.1,
        probe_items: int = 1000,
    ) -> None:
        if as_released:
            optimizer = _released(optimizer)
        super().__init__(model, optimizer, schedule, num_classes=num_classes, criterion=criterion)
        self.early_accuracy = MulticlassAccuracy(num_classes, average="micro")
        self.decay_vectors = decay_vectors
        self.radius = radius
        self.probe_items = probe_items
        self.best_accuracy = -1.0
        self.best_state: dict[str, Tensor] = {}
        self.history: list[dict[str, float]] = []

    def parameter_groups(self) -> Iterable[nn.Parameter] | list[dict[str, Any]]:
        trainable = [p for p in self.parameters() if p.requires_grad]
        if self.decay_vectors:
            return trainable
        matrices: dict[str, Any] = {"params": [p for p in trainable if p.ndim > 1]}
        vectors: dict[str, Any] = {"params": [p for p in trainable if p.ndim <= 1], "weight_decay": 0.0}
        return [matrices, vectors]

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        optimizer = self.optimizers(use_pl_optimizer=False)
        if isinstance(optimizer, SAM):
            batch = optimizer.select(batch)
        return super().training_step(batch, batch_idx)

    def on_validation_epoch_end(self) -> None:
        accuracy = float(self.val_accuracy.compute())
        if accuracy > self.best_accuracy:
            self.best_accuracy = accuracy
            self.best_state = {name: value.detach().clone() for name, value in self.model.state_dict().items()}
        fitted = self.fit_to_labels()
        for name, value in fitted.items():
            self.log(f"train/{name}", value, sync_dist=True)
        self.history.append({"step": current_step(self.trainer), "val/accuracy": accuracy} | fitted)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        super().test_step(batch, batch_idx)
        if self.best_state:
            state = {name: value.to(self.device) for name, value in self.best_state.items()}
            size = len(batch["label"])
            self.early_accuracy(functional_call(self.model, state, (batch["image"],)), batch["label"])
            self.log("test/accuracy_early_stopped", self.early_accuracy, on_epoch=True, batch_size=size)

    def on_test_epoch_end(self) -> None:
        found = self.fit_to_labels() | self.measure_sharpness()
        for name, value in found.items():
            self.log(f"test/{name}", value, sync_dist=True)

    def probe(self) -> Batch:
        """The first `probe_items` training items on this device, with `clean_label` [N] beside `label` [N]."""
        with torch.inference_mode(False):
            source = self.data.source("train")
            batch = source.fetch(torch.arange(min(self.probe_items, len(source))))
            clean = batch["clean_label"] if "clean_label" in batch else batch["label"]
            moved = {"image": batch["image"], "label": batch["label"], "clean_label": clean}
            return {name: value.to(self.device) for name, value in moved.items()}

    @torch.no_grad()
    def fit_to_labels(self) -> dict[str, float]:
        """Training accuracy on given and on true labels, and which share of the wrong labels is reproduced."""
        batch = self.probe()
        guess = torch.cat([self.model(part).argmax(-1) for part in batch["image"].split(500)])
        wrong = batch["label"] != batch["clean_label"]
        fitted = {
            "accuracy_given": (guess == batch["label"]).float().mean().item(),
            "accuracy_clean": (guess == batch["clean_label"]).float().mean().item(),
        }
        if wrong.any():
            fitted["memorised"] = (guess == batch["label"])[wrong].float().mean().item()
        return fitted

    def measure_sharpness(self) -> dict[str, float]:
        """Sharpness at `radius` and the Hessian's top eigenvalue, of the training loss on the probe."""
        with torch.inference_mode(False), torch.enable_grad():
            batch = self.probe()
            loss = measures.loss_of_weights(self.model, batch["image"], batch["label"])
            weights = measures.trainable_weights(self.model)
            rng = generator(0, "power iteration")
            return {
                "sharpness": float(measures.sharpness(loss, weights, self.radius)),
                "top_eigenvalue": float(measures.top_eigenvalue(loss, weights, rng)),
            }

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["sam"] = {"accuracy": self.best_accuracy, "state": self.best_state, "history": self.history}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        kept = checkpoint["sam"]
        self.best_accuracy, self.best_state, self.history = kept["accuracy"], kept["state"], kept["history"]

    def pictures(self) -> Iterator[Picture]:
        from reprise.papers.sam import pictures

        batch = self.probe()
        yield pictures.memorisation(self.history)
        with torch.inference_mode(False), torch.enable_grad():
            loss = measures.loss_of_weights(self.model, batch["image"], batch["label"])
            yield pictures.landscape(loss, measures.trainable_weights(self.model))
        wrong = (batch["label"] != batch["clean_label"]).nonzero().flatten()[:24]
        if len(wrong):
            chosen = {name: value[wrong].cpu() for name, value in batch.items()}
            guess = self.predict(batch["image"][wrong]).argmax(-1).cpu()
            yield pictures.mislabelled(chosen, guess, self.data.spec.classes)


def _released(optimizer: OptimizerFactory) -> OptimizerFactory:
    if not isinstance(optimizer, partial) or optimizer.func is not SAM:
        raise ConfigError(
            "paper.as_released=true changes how SAM updates, but the optimizer is another one",
            looked_at="optimizer",
            next_step="choose optimizer=sam (optimizer.rho=0 is the SGD baseline of the released code)",
        )
    return partial(optimizer, decay_in_perturbation=True, clip_norm=RELEASED_CLIP_NORM)
