"""Training and evaluation of encoder-decoders: token-weighted smoothed loss, averaged weights, beam search and BLEU."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, cast

import torch
from pytorch_lightning.utilities import rank_zero_info
from torch import Tensor

from reprise.data.loader import Batch
from reprise.data.text import SequencePairs
from reprise.distributed import all_reduce_sum, world_size
from reprise.papers.transformer.criterion import label_smoothed_loss
from reprise.papers.transformer.model import PAD, Transformer
from reprise.papers.transformer.networks import Network
from reprise.papers.transformer.scores import CorpusBleu, TokenScores, prefixed
from reprise.training.averaging import CheckpointAverage
from reprise.training.beam import beam_search
from reprise.training.checkpoint import current_step
from reprise.training.module import OptimizerFactory, PaperModule, Picture, ScheduleFactory

EXAMPLE_LENGTH = 25  # tokens of a sentence in `reprise plan`: 25,000 a batch of 1,000 (section 5.1)


class TransformerModule(PaperModule):
    """An encoder-decoder on pairs of sequences.

    Args:
        model: the Transformer or the recurrent network.
        optimizer, schedule: factories.
        label_smoothing: eps_ls (section 5.4).
        average: arguments of `CheckpointAverage` (last, every, total_steps), or None to evaluate the final weights.
        bleu: translate the test set with beam search and log test/bleu_points.
        val_bleu: the same at each validation.
        beam_size, alpha: of the beam search (section 6.1).
        extra_length: a translation has at most this many symbols more than its source.
        as_released: the released position signal, label smoothing and extra length (100 instead of 50).
    """

    refuses = {"sharding": "the average of checkpoints is made of whole parameters, and the big model fits one device"}

    def __init__(
        self,
        model: Network,
        optimizer: OptimizerFactory,
        schedule: ScheduleFactory | None = None,
        *,
        label_smoothing: float = 0.1,
        average: Mapping[str, int] | None = None,
        bleu: bool = False,
        val_bleu: bool = False,
        beam_size: int = 4,
        alpha: float = 0.6,
        extra_length: int = 50,
        as_released: bool = False,
    ) -> None:
        super().__init__(optimizer, schedule)
        if as_released and isinstance(model, Transformer) and model.positions == "sinusoid":
            model.positions = "timing"
        self.model = model
        self.average = CheckpointAverage(model, **average) if average else None
        self.label_smoothing, self.as_released = label_smoothing, as_released
        self.beam_size, self.alpha = beam_size, alpha
        self.extra_length = 100 if as_released else extra_length
        self.bleu, self.val_bleu = bleu, val_bleu
        self.token_scores, self.far_scores = TokenScores(), TokenScores()
        self.corpus_bleu: CorpusBleu | None = None
        self.last_bleu: float | None = None  # of the last test, for the pictures

    @property
    def pairs(self) -> SequencePairs:
        """The data module, which can turn ids into text."""
        return cast(SequencePairs, self.data)

    @property
    def best_model(self) -> Network:
        """What is evaluated: the averaged weights where averaging has begun."""
        return cast(Network, self.average.current(self.model)) if self.average else self.model

    def example_batch(self, batch_size: int) -> Batch:
        """Random sentence pairs for `reprise plan`."""
        shape = (batch_size, EXAMPLE_LENGTH)
        return {name: torch.randint(1, self.model.vocab_size, shape) for name in ("source", "target")}

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        """Logits [B, T, V] under teacher forcing."""
        return self.model(source, target)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        target = batch["target"]
        losses = label_smoothed_loss(
            self(batch["source"], target), target, self.label_smoothing, as_released=self.as_released
        )
        loss = losses.sum() / self._share(target)
        self.log("train/loss", loss.detach(), sync_dist=True, batch_size=len(target))
        return loss

    def _share(self, target: Tensor) -> Tensor:
        """Tokens of the global batch over the ranks (and parts): their average is then the mean over all tokens."""
        target = target if self.whole_batch is None else self.whole_batch["target"]
        return all_reduce_sum((target != PAD).sum().float()) / (world_size() * self.parts)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self.average is not None:
            self.average.update(self.model, current_step(self.trainer) + 1)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self._score(batch)
        if self.val_bleu:
            self._translate_and_score(batch, "val")

    def on_validation_epoch_end(self) -> None:
        self._log_scores("val")

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        self._score(batch)
        if self.bleu:
            self._translate_and_score(batch, "test")

    def on_test_epoch_end(self) -> None:
        self._log_scores("test")

    def _score(self, batch: Batch) -> None:
        logits, target = self.best_model(batch["source"], batch["target"]), batch["target"]
        if "far" not in batch:
            self.token_scores.update(logits, target)
            return
        for scores, chosen in ((self.token_scores, ~batch["far"]), (self.far_scores, batch["far"])):
            scores.update(logits[chosen], target[chosen])

    def _translate_and_score(self, batch: Batch, split: str) -> None:
        if self.corpus_bleu is None:
            self.corpus_bleu = CorpusBleu()
        references = [self.pairs.reference(split, number) for number in batch["index"].tolist()]
        self.corpus_bleu.update(self.translate(batch["source"]), references)

    def _log_scores(self, stage: str) -> None:
        found = self.token_scores.compute(self.device)
        found |= prefixed("far_", self.far_scores.compute(self.device))
        self.token_scores.reset()
        self.far_scores.reset()
        if self.corpus_bleu is not None:
            self.last_bleu = self.corpus_bleu.compute(self.device)
            self.corpus_bleu.reset()
            found["bleu_points"] = torch.tensor(self.last_bleu)
            rank_zero_info(f"{stage} BLEU {self.last_bleu:.2f} ({self.corpus_bleu.describe()})")
        self.log_dict(prefixed(f"{stage}/", found))

    def translate(self, source: Tensor) -> list[str]:
        """The best translation of each source int64 [B, S] that beam search finds, as text."""
        return [self.pairs.decode(ids) for ids in self.search(source).tolist()]

    @torch.no_grad()
    def search(self, source: Tensor) -> Tensor:
        """Ids of the best translations, int64 [B, generated]."""
        step, state = self.best_model.begin(source, self.beam_size)
        found = beam_search(
            step,
            state,
            len(source),
            beam_size=self.beam_size,
            max_length=source.shape[1] + self.extra_length,
            alpha=self.alpha,
            device=source.device,
        )
        return found.best()

    def pictures(self) -> Iterator[Picture]:
        from reprise.papers.transformer.pictures import pictures

        return pictures(self)
