"""Stops a run whose loss is not finite, and says which batch did it."""

from __future__ import annotations

from typing import Any

import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from torch import Tensor

from reprise.errors import DivergedError
from reprise.training.checkpoint import ExactCheckpoint, current_step


class DivergenceGuard(Callback):
    """Watches the training loss without waiting for the device at every step.

    Args:
        check_every: steps between two looks at the flag on an accelerator; on the CPU every step is checked.
            Before a checkpoint is written the flag is always read, so no checkpoint holds a diverged state.
    """

    def __init__(self, check_every: int = 10) -> None:
        self.check_every = check_every
        self._first_bad = torch.tensor(-1)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        loss = outputs["loss"] if isinstance(outputs, dict) else outputs
        if not isinstance(loss, Tensor):
            return
        step = current_step(trainer)
        first = self._first_bad.to(loss.device)
        bad = ~torch.isfinite(loss.detach()).all() & (first < 0)
        self._first_bad = torch.where(bad, torch.full_like(first, step), first)
        if loss.device.type == "cpu" or (step + 1) % self.check_every == 0:
            self._check(trainer)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self._check(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._check(trainer)

    def _check(self, trainer: Trainer) -> None:
        step = int(self._first_bad)
        if step < 0:
            return
        raise DivergedError(
            f"the training loss became NaN or infinite at step {step}{_batch_of(trainer, step)}",
            looked_at=_last_checkpoint(trainer),
            next_step="lower the learning rate or clip gradients (trainer.gradient_clip_val); "
            "the last good checkpoint is kept",
        )


def _batch_of(trainer: Trainer, step: int) -> str:
    """The items of the batch, found again because batches are functions of (seed, step)."""
    loader = trainer.train_dataloader
    if loader is None or not hasattr(loader, "batch"):
        return ""
    index = loader.batch(step).get("index")
    return "" if index is None else f", with the training items {index.flatten().tolist()[:64]}"


def _last_checkpoint(trainer: Trainer) -> str:
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, ExactCheckpoint):
            files = sorted(callback.folder.glob("step=*.ckpt"))
            return str(files[-1]) if files else f"{callback.folder} (no checkpoint was due before the failure)"
    return "no checkpoints are kept in this run"
