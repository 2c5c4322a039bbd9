"""ViT and its convolutional baseline as one Lightning module: everything but the network is shared."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from reprise.data.loader import Batch
from reprise.nn.ema import momentum_copy, update_momentum
from reprise.papers.vit.cnn import ConvNet
from reprise.papers.vit.criterion import LOSSES
from reprise.papers.vit.fewshot import few_shot_accuracy
from reprise.papers.vit.model import VisionTransformer
from reprise.papers.vit.networks import Network
from reprise.papers.vit.weights import adapt_for_fine_tuning, import_weights
from reprise.training.classification import Classifier
from reprise.training.module import OptimizerFactory, Picture, ScheduleFactory
from reprise.training.probes import Features, extract
from reprise.training.weights import find_weights, read_weights


class ViTModule(Classifier):
    """Supervised training of one of two networks, from scratch or from official weights.

    Args:
        model: the ViT or the CNN.
        loss: "softmax" or "sigmoid" (see `criterion`).
        decay_all: let weight decay reach biases, norms, positions and the class token too, not only kernels.
        pretrained: official weights (.npz or .safetensors) to fine-tune from, a path or a name below the data root's
            `vit/`, read when training starts; or None to train from scratch.
        few_shot: shots per class of the closed-form evaluations that follow the test (`test/few_shot_<k>`).
        polyak: factor by which a running average of the weights is kept at each step (0.9999 behind the paper's best
            ImageNet numbers), which is then what is evaluated; or None to evaluate the weights themselves.

    Raises:
        ValueError: an unknown loss, or a factor outside (0, 1).
    """

    def __init__(
        self,
        model: Network,
        optimizer: OptimizerFactory,
        schedule: ScheduleFactory | None = None,
        *,
        num_classes: int,
        loss: str = "softmax",
        decay_all: bool = False,
        pretrained: str | None = None,
        few_shot: list[int] | None = None,
        polyak: float | None = None,
    ) -> None:
        if polyak is not None and not 0 < polyak < 1:
            raise ValueError(f"an average that keeps {polyak} of itself; choose a factor between 0 and 1")
        if loss not in LOSSES:
            raise ValueError(f"unknown loss {loss!r}; one of {', '.join(LOSSES)}")
        super().__init__(model, optimizer, schedule, num_classes=num_classes, criterion=LOSSES[loss])
        self.num_classes = num_classes
        self.decay_all = decay_all
        self.pretrained = pretrained
        self.few_shot = few_shot or []
        self.polyak = polyak
        self.average = None if polyak is None else momentum_copy(self.network)
        if polyak is not None:
            self.refuses = {**self.refuses, "sharding": "the average is made of whole parameters"}

    @property
    def network(self) -> Network:
        """The model, typed."""
        assert isinstance(self.model, VisionTransformer | ConvNet)
        return self.model

    @property
    def evaluated(self) -> Network:
        """The average of the weights where one is kept, else the model."""
        return self.network if self.average is None else self.average

    def forward(self, image: Tensor) -> Tensor:
        return (self.network if self.training else self.evaluated)(image)

    @torch.no_grad()
    def on_train_batch_end(self, outputs: Any, batch: Batch, batch_idx: int) -> None:
        """The average takes the new weights in; statistics of batch norm are taken as they are."""
        if self.average is None or self.polyak is None:
            return
        update_momentum(self.average, self.network, self.polyak)
        for kept, current in zip(self.average.buffers(), self.network.buffers(), strict=True):
            kept.copy_(current)

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Kernels, and (without weight decay, unless `decay_all`) everything else."""
        chosen = dict(self.network.named_parameters())
        kernels = [value for name, value in chosen.items() if self.decay_all or is_kernel(name, value)]
        decayed = {id(value) for value in kernels}
        others = [value for value in chosen.values() if id(value) not in decayed]
        groups: list[dict[str, Any]] = [{"params": kernels}]
        return [*groups, {"params": others, "weight_decay": 0.0}] if others else groups

    def setup(self, stage: str) -> None:
        """Load the pre-trained weights; a checkpoint of an interrupted run is restored after this."""
        if stage == "fit" and self.pretrained is not None:
            state = adapt_for_fine_tuning(read_weights(self._official()), self.network)
            self.network.load_state_dict(import_weights(state, self.network))
            if self.average is not None:
                self.average.load_state_dict(self.network.state_dict())

    def _official(self) -> Path:
        assert self.pretrained is not None
        step = "download an official .npz (google-research/vision_transformer) and name it in paper.pretrained"
        return find_weights(self.pretrained, "vit", next_step=step)

    def on_test_epoch_end(self) -> None:
        if not self.few_shot:
            return
        train, test = (self._features(split) for split in ("train", "test"))
        for shots in self.few_shot:
            accuracy = few_shot_accuracy(train, test, self.num_classes, shots)
            self.log(f"test/few_shot_{shots}", accuracy, sync_dist=True)

    def _features(self, split: str) -> Features:
        return extract(self.evaluated.features, self.data.source(split), self.data.eval_batch_size, self.device)

    def pictures(self) -> Iterator[Picture]:
        from reprise.papers.vit import pictures

        source = self.data.source("test")
        batch = source.fetch(torch.arange(min(8, len(source))))
        network = self.evaluated.eval()
        if isinstance(network, ConvNet):
            first = network.convolutions[0].weight
            assert isinstance(first, Tensor)
            yield Picture("filters", pictures.filters_figure(first[:28]), "Filters of the CNN's first convolution.")
            return
        yield self._attention(network, batch["image"].to(self.device))
        yield Picture(
            "filters",
            pictures.filters_figure(pictures.principal_filters(network.embedding.weight)),
            "Principal components of the patch embedding's filters, the strongest first (figure 7, left).",
        )
        if network.positions is not None:
            caption = "Cosine similarity of each patch's position embedding with all others: near ones are alike where "
            caption += "the model has learned the 2-D layout (figure 7, centre)."
            yield Picture("positions", pictures.position_figure(network), caption)

    def _attention(self, network: VisionTransformer, image: Tensor) -> Picture:
        from reprise.papers.vit import pictures

        probability, answer = self.predict(image).max(-1)
        names = self.data.spec.classes
        titles = [f"{names[a]} {p:.0%}" for a, p in zip(answer.tolist(), probability.tolist(), strict=True)]
        figure = pictures.attention_figure(network, image, titles)
        return Picture(
            "attention", figure, "Test images, and what reaches the classifier: attention rollout over all layers."
        )


def is_kernel(name: str, parameter: nn.Parameter) -> bool:
    """Whether a parameter multiplies activations: convolutions and dense layers, not biases, norms or embeddings."""
    return parameter.ndim >= 2 and name.endswith("weight")
