"""What a run notes at its steps, cheaply: nothing is collected at a step that no logger will see."""

from __future__ import annotations

import time
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.profilers import PassThroughProfiler
from torch import Tensor

from reprise.training.checkpoint import current_step
from reprise.training.module import PaperModule

_NOTHING: AbstractContextManager[None] = nullcontext()


def is_logged(trainer: Trainer) -> bool:
    """Whether the loggers see the step at hand: every `log_every_n_steps`-th, and only where the optimizer steps."""
    every = trainer.log_every_n_steps  # type: ignore[attr-defined]
    return (current_step(trainer) + 1) % every == 0 and not trainer.fit_loop._should_accumulate()


class StepMetrics(Callback):
    """Takes what is logged during a training step straight to the loggers, with the learning rate as `lr`.

    Lightning's own collection copies and inspects every value at every step, which costs small models several percent
    of their time; on several ranks it also reduces values that are then dropped. Must be the last callback.
    """

    def __init__(self) -> None:
        self.is_wanted = False
        self._in_parts = False
        self._values: dict[str, list[float | Tensor]] = {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._trainer = trainer
        if isinstance(pl_module, PaperModule):
            pl_module.step_log = self
            self._in_parts = pl_module.parts > 1

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self.is_wanted = is_logged(trainer)
        self._values = {}
        if self.is_wanted and trainer.optimizers:
            self._values["lr"] = [float(trainer.optimizers[0].param_groups[0]["lr"])]

    def add(self, name: str, value: float | Tensor, *, sync_dist: bool) -> None:
        """Note a value of this step; with `sync_dist` its mean over the ranks.

        What a step logs again replaces it (SAM's second pass); from a batch in parts it is their mean.
        """
        value = value.detach().clone() if isinstance(value, Tensor) else value  # it is reduced in place
        value = self._trainer.strategy.reduce(value, reduce_op="mean") if sync_dist else value
        self._values[name] = [*self._values.get(name, []), value] if self._in_parts else [value]

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not self._values:
            return
        values = {name: sum(map(float, seen)) / len(seen) for name, seen in self._values.items()}
        for logger in trainer.loggers:
            logger.log_metrics(values, current_step(trainer))
            logger.save()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if isinstance(pl_module, PaperModule):
            pl_module.step_log = None


class StepClock(PassThroughProfiler):
    """Measures how long training waits for its data, and nothing else: Lightning announces a hundred actions a step."""

    def __init__(self) -> None:
        super().__init__()
        self.data_seconds = 0.0
        self._began = 0.0

    def start(self, action_name: str) -> None:
        if action_name.endswith("train_dataloader_next"):
            self._began = time.perf_counter()

    def stop(self, action_name: str) -> None:
        if action_name.endswith("train_dataloader_next"):
            self.data_seconds += time.perf_counter() - self._began

    def profile(self, action_name: str) -> AbstractContextManager[None]:  # type: ignore[override]
        return _NOTHING
