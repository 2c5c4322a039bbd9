"""Pre-training with MoCo, watched by nearest neighbours and a linear classifier on the frozen features."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics.classification import MulticlassAccuracy

from reprise import distributed
from reprise.data.loader import Batch, Source
from reprise.papers.moco.model import Contrast, Framework, MoCo
from reprise.papers.moco.weights import import_backbone
from reprise.seeding import generator
from reprise.training.checkpoint import require_file
from reprise.training.module import OptimizerFactory, PaperModule, Picture, ScheduleFactory
from reprise.training.probes import Features, extract, knn_scores, linear_probe
from reprise.training.weights import read_weights


@dataclass(frozen=True)
class Evaluation:
    """How frozen features are judged.

    Attributes:
        knn_k, knn_temperature: of the weighted nearest-neighbour vote (released CIFAR-10 demo: 200 and 0.1).
        bank_items: training images, evenly spaced, whose labels the probes may see; None: all.
        shots: the first so many of them in each class; None: all.
        decay: L2 penalty of the linear classifier on standardised features.
    """

    knn_k: int = 200
    knn_temperature: float = 0.1
    bank_items: int | None = None
    shots: int | None = None
    decay: float = 1e-3


@dataclass
class Chosen:
    """Some items of a source."""

    source: Source
    index: Tensor

    def __len__(self) -> int:
        return len(self.index)

    def fetch(self, index: Tensor) -> Batch:
        return self.source.fetch(self.index[index])


class MomentumContrast(PaperModule):
    """Trains on `view1` and `view2` of each batch; logs `<split>/knn` and `<split>/linear` accuracies.

    `train/accuracy` is the share of queries whose own key is the most similar one; `train/first_layer_gradient` the
    norm of the gradient of the first layer that trains (MoCo v3, section 4: its spikes precede dips of accuracy).

    Args:
        model: the framework with its encoders.
        num_classes: of the labels that evaluation uses; training uses none.
        image_size: side of the views, pixels.
        evaluation: see `Evaluation`.
        weights: a pre-training checkpoint (official, or a run's own) whose trunk training starts from, or None.
        seed: of the order in which keys are computed.
        as_released: judge the output of the head, not the features before it (the released CIFAR-10 demo).
    """

    refuses = {
        "accumulation": "the queue, the shuffling and the batch norm of a step work on its whole batch",
        "sharding": "the momentum encoder follows whole parameters",
    }

    def __init__(
        self,
        model: Framework,
        optimizer: OptimizerFactory,
        schedule: ScheduleFactory | None = None,
        *,
        num_classes: int,
        image_size: int,
        evaluation: Mapping[str, Any] | None = None,
        weights: str | None = None,
        seed: int = 0,
        as_released: bool = False,
    ) -> None:
        super().__init__(optimizer, schedule)
        self.model = model
        self.num_classes, self.image_size = num_classes, image_size
        self.evaluation = Evaluation(**(evaluation or {}))
        self.weights, self.seed, self.as_released = weights, seed, as_released
        self.steps_done = 0
        names = [f"{split}_{probe}" for split in ("val", "test") for probe in ("knn", "linear")]
        self.accuracies = nn.ModuleDict({name: MulticlassAccuracy(num_classes, average="micro") for name in names})
        self._bank: Features | None = None
        self._classify: Callable[[Tensor], Tensor] | None = None

    def forward(self, image: Tensor) -> Tensor:
        return self.model(image)

    def setup(self, stage: str) -> None:
        """Load the trunk; a checkpoint of an interrupted run is restored after this."""
        if stage == "fit" and self.weights is not None:
            require_file(Path(self.weights).expanduser(), "the pre-training checkpoint")
            self.load_trunk(read_weights(Path(self.weights).expanduser()))

    def load_trunk(self, state: Mapping[str, Any]) -> None:
        """Take the kept encoder of a pre-training state, all but its head."""
        encoder = self.model.encoder
        encoder.load_state_dict({**encoder.state_dict(), **import_backbone(state, encoder)})

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        result = self._contrast(batch["view1"], batch["view2"])
        self.steps_done += 1
        self.log("train/loss", result.loss, sync_dist=True)
        found = (result.logits.argmax(1) == result.label).float().mean()
        self.log("train/accuracy", found, sync_dist=True)
        return result.loss

    def _contrast(self, view1: Tensor, view2: Tensor) -> Contrast:
        if not isinstance(self.model, MoCo):
            return self.model.contrast(view1, view2, self.model.momentum_at(self.steps_done))
        count = len(view1) * distributed.world_size()
        orders = [
            torch.randperm(count, generator=generator(self.seed, "shuffle", self.steps_done, direction), device="cpu")
            for direction in range(1 + self.model.symmetric)
        ]
        return self.model.contrast(view1, view2, orders)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        gradient = self.model.encoder.first_layer.grad
        if gradient is not None:
            self.log("train/first_layer_gradient", gradient.norm())

    def encode(self, image: Tensor) -> Tensor:
        """What is judged: features [B, width] (or embeddings, as released)."""
        encoder = self.model.encoder
        return encoder(image) if self.as_released else encoder.features(image)

    def fit_probes(self) -> None:
        """Features of the labelled training images, and a linear classifier on them; the same on every rank."""
        with torch.inference_mode(False), torch.no_grad():
            source = self.data.source("train")
            count = min(self.evaluation.bank_items or len(source), len(source))
            chosen = Chosen(source, torch.arange(count) * len(source) // count)
            bank = extract(self.encode, chosen, self.data.eval_batch_size, self.device).few(self.evaluation.shots)
        self._bank = bank
        self._classify = linear_probe(bank, self.num_classes, decay=self.evaluation.decay)

    def judge(self, image: Tensor) -> dict[str, Tensor]:
        """Scores [B, num_classes] of both probes."""
        assert self._bank is not None
        assert self._classify is not None
        feature, options = self.encode(image).float(), self.evaluation
        votes = knn_scores(feature, self._bank, self.num_classes, k=options.knn_k, temperature=options.knn_temperature)
        return {"knn": votes, "linear": self._classify(feature)}

    def on_validation_epoch_start(self) -> None:
        self.fit_probes()

    def on_test_epoch_start(self) -> None:
        self.fit_probes()

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self._evaluate(batch, "val")

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        self._evaluate(batch, "test")

    def _evaluate(self, batch: Batch, split: str) -> None:
        for probe, score in self.judge(batch["image"]).items():
            accuracy = self.accuracies[f"{split}_{probe}"]
            assert isinstance(accuracy, MulticlassAccuracy)
            accuracy(score, batch["label"])
            self.log(f"{split}/{probe}", accuracy, batch_size=len(score), on_step=False, on_epoch=True)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["moco_steps"] = self.steps_done

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.steps_done = checkpoint["moco_steps"]

    def example_batch(self, batch_size: int) -> Batch:
        """A random training batch on torch's default device."""
        shape = (batch_size, 3, self.image_size, self.image_size)
        return {name: torch.randn(shape) for name in ("image", "view1", "view2")} | {
            "label": torch.zeros(batch_size, dtype=torch.int64)
        }

    def pictures(self) -> Iterator[Picture]:
        from reprise.papers.moco import pictures

        self.eval()
        loader = self.data.train_dataloader()
        batch = {name: value.to(self.device) for name, value in loader.batch(0).items()}
        yield pictures.views(batch["view1"], batch["view2"])
        with torch.inference_mode(False), torch.no_grad():
            source = self.data.source("test")
            index = torch.arange(min(500, len(source)))
            shown = source.fetch(index)
            features = Features(self.encode(shown["image"].to(self.device)).cpu(), shown["label"])
            similarity = pictures.Similarities.of(self.model, batch["view1"], batch["view2"])
        yield pictures.neighbours(shown["image"], features)
        yield pictures.map_of(features, self.data.spec.classes)
        yield pictures.similarities(similarity)
