"""CLIP and its rivals as one Lightning module: the same image tower, another use of the captions."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from reprise.data.captions import Captioned
from reprise.data.loader import Batch, EvalLoader
from reprise.errors import ConfigError
from reprise.papers.clip import evaluation
from reprise.papers.clip.model import CLIP
from reprise.papers.clip.objectives import Objective
from reprise.papers.clip.weights import import_weights
from reprise.training.module import OptimizerFactory, PaperModule, Picture, ScheduleFactory
from reprise.training.probes import Features
from reprise.training.weights import find_weights, read_weights

RECALLS = (1, 5)


class CLIPModule(PaperModule):
    """Training on pairs; zero-shot classification, retrieval and probes.

    Args:
        objective: what is learned from the captions.
        max_scale: exp(logit_scale) is kept at or below this after every step (section 2.5).
        probe_shots: images of each class for linear probes after the test; probes are fitted to validation images.
        pretrained: official weights to start from, a path or a name below the data root's `clip/`; or None.
        as_released: what released code does instead of the paper: text features at the largest token id instead of
            the end token, exp(logit_scale) kept at or above 1 (open_clip), probes on features after the projection.
    """

    refuses = {"accumulation": "every text of the batch is a negative of every image, so parts have another loss"}

    def __init__(
        self,
        model: CLIP,
        objective: Objective,
        optimizer: OptimizerFactory,
        schedule: ScheduleFactory | None = None,
        *,
        max_scale: float = 100.0,
        probe_shots: Sequence[int] = (),
        pretrained: str | None = None,
        as_released: bool = False,
    ) -> None:
        super().__init__(optimizer, schedule)
        self.model, self.objective = model, objective
        self.max_scale, self.probe_shots = max_scale, list(probe_shots)
        self.pretrained, self.as_released = pretrained, as_released
        if as_released:
            model.text.end_token = None
        objective.prepare(model)
        self.refuses = {**self.refuses, **objective.refuses}
        self._rows: dict[str, list[Tensor]] = {}

    @property
    def captions(self) -> Captioned:
        """The data module, typed.

        Raises:
            ConfigError: the data has no captions.
        """
        data = self.data
        if not isinstance(data, Captioned):
            raise ConfigError(f"{type(data).__name__} has no captions", looked_at="data", next_step="data=noto_emoji")
        return data

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Weights, and (without decay) gains, biases, the class embedding and the temperature."""
        trained = [value for value in self.parameters() if value.requires_grad]
        groups: list[dict[str, Any]] = [
            {"params": [value for value in trained if value.ndim >= 2]},
            {"params": [value for value in trained if value.ndim < 2], "weight_decay": 0.0},
        ]
        return [group for group in groups if group["params"]]

    def setup(self, stage: str) -> None:
        """Check the vocabulary and load pre-trained weights; a checkpoint of an interrupted run is restored later.

        Raises:
            ConfigError: the data has another vocabulary than the model, or no captions.
        """
        found, expected = self.captions.tokenizer.vocab_size, self.model.text.vocab_size
        if found != expected:
            raise ConfigError(
                f"the data has {found} tokens, the model {expected}",
                looked_at="data.merges and paper.model.vocab_size",
                next_step="vocab_size is merges + 514",
            )
        if self.pretrained is not None:
            step = "download an official archive (openai/CLIP, clip.py lists them) and name it in paper.pretrained"
            official = find_weights(self.pretrained, "clip", next_step=step)
            self.model.load_state_dict(import_weights(read_weights(official), self.model))
            self.objective.restart(self.model)

    def forward(self, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        return self.model(image, text)

    def example_batch(self, batch_size: int) -> Batch:
        """Random pairs of the model's sizes, on torch's default device."""
        text, side = self.model.text, self.model.visual.image_size
        return {
            "image": torch.randn(batch_size, 3, side, side),
            "text": torch.randint(1, text.vocab_size - 2, (batch_size, text.context_length)).clamp(min=1),
        }

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        loss = self.objective.loss(self.model, batch["image"], batch["text"])
        self.log("train/loss", loss, sync_dist=True)
        self.log("train/scale", self.model.logit_scale.detach().exp())
        return loss

    @torch.no_grad()
    def on_train_batch_end(self, outputs: Any, batch: Batch, batch_idx: int) -> None:
        lowest = 0.0 if self.as_released else None
        self.model.logit_scale.clamp_(min=lowest, max=math.log(self.max_scale))

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self._collect(batch)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        self._collect(batch)

    def on_validation_epoch_end(self) -> None:
        self._evaluate("val")

    def on_test_epoch_end(self) -> None:
        test = self._evaluate("test")
        if self.probe_shots and "label" in test:
            self._probe(test)

    def _collect(self, batch: Batch) -> None:
        for name, value in self._features(batch).items():
            self._rows.setdefault(name, []).append(value)

    def _features(self, batch: Batch) -> dict[str, Tensor]:
        """Embeddings, what a probe reads (both float32, also under autocast), and the batch's own labels."""
        embedding = self.model.visual(batch["image"])
        probed = embedding if self.as_released else self.model.visual.features(batch["image"])
        kept: dict[str, Tensor] = {name: batch[name] for name in ("captions", "label", "unseen") if name in batch}
        return {"embedding": embedding.float(), "probed": probed.float(), **kept}

    def _evaluate(self, split: str) -> dict[str, Tensor]:
        """Log the metrics of a split whose features were collected; every rank computes them from all items."""
        total = len(self.data.source(split))
        found = {name: evaluation.gather_interleaved(torch.cat(rows), total) for name, rows in self._rows.items()}
        self._rows = {}
        metrics = {**self._zero_shot(found), **self._retrieval(found)}
        for name, value in metrics.items():
            self.log(f"{split}/{name}", value, sync_dist=True)
        return found

    def _zero_shot(self, found: dict[str, Tensor]) -> dict[str, float]:
        prompts = self.captions.prompts()
        if prompts is None or "label" not in found:
            return {}
        scores = self.objective.scores(self.model, found["embedding"], prompts.to(self.device))
        parts = {"zero_shot": torch.ones_like(found["label"], dtype=torch.bool)}
        if "unseen" in found:
            parts |= {"zero_shot_unseen": found["unseen"], "zero_shot_seen": ~found["unseen"]}
        return {name: evaluation.accuracy(scores[rows], found["label"][rows]) for name, rows in parts.items()}

    def _retrieval(self, found: dict[str, Tensor]) -> dict[str, float]:
        """Recall at 1 and 5, both ways, the mean over the kinds of captions (templates, languages)."""
        if not self.objective.retrieves or "captions" not in found:
            return {}
        recalls: dict[str, list[float]] = {}
        for captions in found["captions"].unbind(1):
            texts, relevant = evaluation.distinct_texts(captions)
            scores = self.objective.scores(self.model, found["embedding"], texts[:, None])
            for k in RECALLS:
                recalls.setdefault(f"image_to_text_r{k}", []).append(evaluation.recall_at(scores, relevant, k))
                recalls.setdefault(f"text_to_image_r{k}", []).append(evaluation.recall_at(scores.T, relevant.T, k))
        return {name: evaluation.average(values) for name, values in recalls.items()}

    @torch.no_grad()
    def _probe(self, test: dict[str, Tensor]) -> None:
        parts = [self._features(_moved(batch, self.device)) for batch in self._everything("val")]
        fitted = Features(*(torch.cat([part[name] for part in parts]) for name in ("probed", "label")))
        tested = Features(test["probed"], test["label"])
        for shots in self.probe_shots:
            value = evaluation.probe_accuracy(fitted, tested, self.data.spec.num_classes, shots)
            self.log(f"test/probe_{shots}", value, sync_dist=True)

    def _everything(self, split: str) -> EvalLoader:
        return EvalLoader(self.data.source(split), self.data.eval_batch_size)

    def pictures(self) -> Iterator[Picture]:
        from reprise.papers.clip import pictures

        yield from pictures.all_pictures(self)


def _moved(batch: Batch, device: torch.device) -> Batch:
    return {name: value.to(device) for name, value in batch.items()}
