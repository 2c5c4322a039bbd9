"""Ctrl-C once saves and stops (exit code 130), twice stops at once.

SIGTERM and SIGUSR1 are pre-emption: they save and stop with exit code 75, which says "start me again"
(`scripts/slurm/train.sbatch` requeues the job on it).
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch
from pytorch_lightning import Callback, LightningModule, Trainer

from reprise.training.checkpoint import ExactCheckpoint, current_step
from reprise.training.stopping import SIGNALS, kind_of_stop, stop_of_the_sweep, tell_the_sweep

LOOK_EVERY = 1.0  # seconds between two looks at whether the sweep was stopped, and at what the other ranks want
MOST_STEPS = 1000  # between two such looks at the other ranks


class StopRequest:
    """Remembers that someone asked the run to stop."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self._looked = time.monotonic()

    def look_at_the_sweep(self) -> None:
        """A sweep that was stopped asks its running jobs to stop, wherever they run."""
        if self.signal is None and time.monotonic() - self._looked >= LOOK_EVERY:
            self._looked = time.monotonic()
            self.signal = stop_of_the_sweep()

    def listen(self) -> None:
        """Install our handlers (again): Lightning puts its own in their place when a fit begins."""
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                signal.signal(number, self._on_signal)

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Catch the signals while the body runs (only possible in the main thread)."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.getsignal(number) for number in SIGNALS}
        self.listen()
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None and number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            raise KeyboardInterrupt
        self.signal = signal.Signals(number)
        tell_the_sweep(number)


class StopBetweenSteps(Callback):
    """Ends the run between two steps once a stop was requested on any rank, after writing a checkpoint.

    Several ranks agree about once a second, in one message that also says whether it is time for a checkpoint, and
    after how many steps they ask again.
    """

    def __init__(self, request: StopRequest, checkpoint: ExactCheckpoint | None) -> None:
        self.request = request
        self.checkpoint = checkpoint
        self._restart()

    def _restart(self) -> None:
        self._asked, self._asked_at, self._next = 0, time.monotonic(), 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.request.listen()
        self._restart()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        step = current_step(trainer)
        number = self._agreed(trainer, step)
        if number is None:
            return
        kind = kind_of_stop(number)
        if self.checkpoint is None:
            raise kind(f"stopped by {number.name} at step {step}; this run keeps no checkpoints")
        path = self.checkpoint.save(trainer, step)
        raise kind(
            f"stopped by {number.name} at step {step}; everything is saved",
            looked_at=path,
            next_step="run the same command again to go on from there",
        )

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.request.listen()
        self._restart()

    def on_test_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        number = self._agreed(trainer, batch_idx)
        if number is not None:
            raise kind_of_stop(number)(
                f"stopped by {number.name} in the test, after the last step; everything is saved",
                next_step="run the same command again: it repeats the test",
            )

    def _agreed(self, trainer: Trainer, count: int) -> signal.Signals | None:
        """The signal that stops all ranks, the highest number where they got different ones; None to go on.

        Args:
            count: steps or batches done, the same on all ranks.
        """
        self.request.look_at_the_sweep()
        if trainer.world_size == 1:
            return self.request.signal
        if count < self._next:
            return None
        now, leads = time.monotonic(), trainer.is_global_zero
        pace = (count - self._asked) / max(now - self._asked_at, 1e-6)
        wants_checkpoint = leads and self.checkpoint is not None and self.checkpoint.is_time()
        facts = torch.tensor(
            [float(self.request.signal or 0), float(wants_checkpoint), pace if leads else 0.0],
            device=trainer.strategy.root_device,
        )
        number, due, pace = trainer.strategy.reduce(facts, reduce_op="max").tolist()
        if self.checkpoint is not None:
            self.checkpoint.agreed = bool(due)
        self._asked, self._asked_at = count, now
        self._next = count + min(max(int(pace * LOOK_EVERY), 1), MOST_STEPS)
        return signal.Signals(int(number)) if number else None
