"""Ctrl-C once saves and stops (exit code 130), twice stops at once.

SIGTERM and SIGUSR1 are pre-emption: they save and stop with exit code 75, which says "start me again"
(`scripts/slurm/train.sbatch` requeues the job on it).
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from pytorch_lightning import Callback, LightningModule, Trainer

from reprise.errors import InterruptedRunError, PreemptedRunError
from reprise.training.checkpoint import ExactCheckpoint, current_step

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
STOP_VARIABLE = "REPRISE_STOP_FILE"  # names a file; a job of a sweep that finds it does not start


def tell_the_sweep() -> None:
    """Let the waiting jobs of the sweep that this process belongs to (if any) know that they shall not start."""
    if name := os.environ.get(STOP_VARIABLE):
        with contextlib.suppress(OSError):
            Path(name).touch()


def sweep_is_stopped() -> bool:
    """Whether the sweep that this process belongs to (if any) was asked to stop."""
    return Path(os.environ.get(STOP_VARIABLE, "")).is_file()


class StopRequest:
    """Remembers that someone asked the run to stop."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None

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
        if number == signal.SIGINT:
            tell_the_sweep()


class StopBetweenSteps(Callback):
    """Ends the run between two steps once a stop was requested on any rank, after writing a checkpoint."""

    def __init__(self, request: StopRequest, checkpoint: ExactCheckpoint | None) -> None:
        self.request = request
        self.checkpoint = checkpoint

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.request.listen()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if not self._requested(trainer):
            return
        step = current_step(trainer)
        number = self._signal_of_any_rank(trainer)
        kind = InterruptedRunError if number == signal.SIGINT else PreemptedRunError
        if self.checkpoint is None:
            raise kind(f"stopped by {number.name} at step {step}; this run keeps no checkpoints")
        path = self.checkpoint.save(trainer, step)
        raise kind(
            f"stopped by {number.name} at step {step}; everything is saved",
            looked_at=path,
            next_step="run the same command again to go on from there",
        )

    def _requested(self, trainer: Trainer) -> bool:
        mine = self.request.signal is not None
        if trainer.world_size == 1:
            return mine
        flag = torch.tensor(float(mine), device=trainer.strategy.root_device)
        return bool(trainer.strategy.reduce(flag, reduce_op="sum") > 0)

    def _signal_of_any_rank(self, trainer: Trainer) -> signal.Signals:
        """The same signal on all ranks; the highest number where they got different ones."""
        mine = torch.tensor(float(self.request.signal or 0), device=trainer.strategy.root_device)
        return signal.Signals(int(trainer.strategy.reduce(mine, reduce_op="max")))
