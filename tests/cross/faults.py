"""Faults that a child prepares before its run: each is a picklable callable that breaks one chosen moment."""

from __future__ import annotations

import os
import resource
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

WRITES = {"os.rename", "os.remove", "os.mkdir"}


@dataclass(frozen=True)
class SignalAfterStep:
    """The process gets a signal once `step` steps are complete (on `rank`, where there are several)."""

    step: int
    number: signal.Signals = signal.SIGKILL
    rank: int = 0

    def __call__(self) -> None:
        after_step(self.step, lambda: os.kill(os.getpid(), self.number), self.rank)


@dataclass(frozen=True)
class SignalInTest:
    """The process gets a signal in the test, after its first batch."""

    number: signal.Signals

    def __call__(self) -> None:
        from reprise.training.interrupt import StopBetweenSteps

        def hook(self: Any, trainer: Any, module: Any, outputs: Any, batch: Any, index: int, loader: int = 0) -> None:
            if index == 0:
                os.kill(os.getpid(), number)

        number, patched = self.number, StopBetweenSteps
        vars_of: Any = patched
        vars_of.on_test_batch_end = hook


@dataclass(frozen=True)
class KillDuringWrite:
    """SIGKILL in the middle of writing the `call`-th checkpoint."""

    call: int

    def __call__(self) -> None:
        import torch

        save, calls = torch.save, []

        def half(content: Any, handle: Any) -> None:
            calls.append(1)
            if len(calls) == self.call:
                handle.write(b"half a checkpoint")
                handle.flush()
                os.kill(os.getpid(), signal.SIGKILL)
            save(content, handle)

        torch.save = half


@dataclass(frozen=True)
class KillAtFileOperation:
    """SIGKILL before the `count`-th operation that changes the folder `below`.

    What a run leaves behind changes only there, so a kill between any two instructions equals one of these.
    """

    count: int
    below: Path

    def __call__(self) -> None:
        seen, prefix = [], str(self.below)

        def watch(event: str, arguments: tuple[Any, ...]) -> None:
            if event == "open":
                changing = isinstance(arguments[1], str) and bool(set("wax+") & set(arguments[1]))
            else:
                changing = event in WRITES
            if changing and str(arguments[0]).startswith(prefix):
                seen.append(event)
                if len(seen) == self.count:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(watch)


@dataclass(frozen=True)
class NoRoom:
    """Once `step` steps are complete no file can grow beyond a size, as when the disk or the quota is full."""

    step: int
    size: int = 4096

    def __call__(self) -> None:
        after_step(self.step, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (self.size, self.size)), 0)


@dataclass(frozen=True)
class SlowOwner:
    """Rank 0 takes its time to prepare a run folder and to say that the run has ended."""

    seconds: float

    def __call__(self) -> None:
        from reprise.training.runfolder import RunFolder

        for name in ("prepare", "end"):
            setattr(RunFolder, name, self._slow(getattr(RunFolder, name)))

    def _slow(self, method: Any) -> Any:
        def slow(*arguments: Any, **options: Any) -> Any:
            time.sleep(self.seconds)
            return method(*arguments, **options)

        return slow


def after_step(step: int, do: Any, rank: int) -> None:
    """Call `do` when `step` steps are complete."""
    from reprise.training.checkpoint import current_step
    from reprise.training.interrupt import StopBetweenSteps

    def hook(self: Any, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if current_step(trainer) + 1 == step and trainer.global_rank == rank:
            do()

    patched: Any = StopBetweenSteps
    patched.on_train_batch_end = hook


def truncate(path: Path) -> None:
    """Lose the end of a file."""
    path.write_bytes(path.read_bytes()[:-40])


def overwrite(path: Path) -> None:
    """Garbage of the same length."""
    path.write_bytes(os.urandom(path.stat().st_size))


def flip_a_bit(path: Path) -> None:
    """One wrong bit in the middle, which changes a weight or an optimizer's moment."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def empty(path: Path) -> None:
    """A file without content."""
    path.write_bytes(b"")


DAMAGES = (truncate, overwrite, flip_a_bit, empty)
