"""Checkpoints that are the whole truth: written atomically between two steps, read without running code."""

from __future__ import annotations

import logging
import os
import pickle
import time
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.plugins.io import CheckpointIO

from reprise.errors import CheckpointError, RepriseError
from reprise.training.ownership import is_alive

FORMAT = "reprise-1"
logger = logging.getLogger(__name__)


class AtomicCheckpointIO(CheckpointIO):
    """Writes beside the target, flushes to the disk, then renames; reads with `weights_only=True`."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        target = Path(path)
        scratch = target.with_name(f".{target.name}.{os.getpid()}")
        try:
            with scratch.open("wb") as handle:
                torch.save(checkpoint, handle)
                handle.flush()
                os.fsync(handle.fileno())
            scratch.replace(target)
        except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
            scratch.unlink(missing_ok=True)
            raise CheckpointError(
                f"the checkpoint cannot be written: {error}",
                looked_at=target,
                next_step="free disk space and run the same command again; it continues from the last checkpoint",
            ) from error

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        return torch.load(path, map_location=map_location or "cpu", weights_only=True)

    def remove_checkpoint(self, path: Any) -> None:
        Path(path).unlink(missing_ok=True)


def newest_checkpoint(folder: Path, identity: Mapping[str, str]) -> tuple[Path, int] | None:
    """The newest complete checkpoint and its step, or None where there is none.

    Damaged files (a kill in the middle of a write leaves none, a broken disk may) are passed over, with a warning.

    Raises:
        CheckpointError: a checkpoint belongs to another paper or configuration.
    """
    for path in sorted(folder.glob("step=*.ckpt"), reverse=True):
        content = _content_if_complete(path)
        if content is not None:
            return path, check_identity(content, identity, path)
        logger.warning("%s is damaged; an older checkpoint is used, or the run begins anew", path)
    return None


def _content_if_complete(path: Path) -> dict[str, Any] | None:
    """The content (tensors stay on the disk), or None where any byte of it is not as it was written."""
    try:
        with zipfile.ZipFile(path) as archive:
            if archive.testzip() is not None:  # torch does not look at the checksums that it writes
                return None
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (OSError, RuntimeError, EOFError, ValueError, KeyError, pickle.UnpicklingError, zipfile.BadZipFile):
        return None


def check_identity(content: Mapping[str, Any], identity: Mapping[str, str], path: Path) -> int:
    """The step of a checkpoint, after making sure that it belongs to this run."""
    own = content.get("reprise")
    if not isinstance(own, dict) or own.get("format") != FORMAT:
        raise CheckpointError(
            "this file is not a checkpoint of reprise",
            looked_at=path,
            next_step="official weights are imported with `reprise weights import`",
        )
    wrong = {key: own.get(key) for key, value in identity.items() if own.get(key) != value}
    if wrong:
        expected = ", ".join(f"{key}={identity[key]}" for key in wrong)
        found = ", ".join(f"{key}={value}" for key, value in wrong.items())
        raise CheckpointError(
            f"the checkpoint belongs to another run: it has {found}, this run has {expected}",
            looked_at=path,
            next_step="move the file away, or run the configuration it was made with",
        )
    return int(own["step"])


class ExactCheckpoint(Callback):
    """Saves between two steps, where a run can continue bit-identically.

    The file is written just before a batch is processed: the previous step, its schedule and its validation are
    complete, and every random decision to come is a function of (seed, step).

    Args:
        every_seconds: wall time between two checkpoints, or None.
        every_steps: steps between two checkpoints, or None.
        keep: how many of the newest files to keep.
    """

    def __init__(self, every_seconds: float | None = 60, every_steps: int | None = None, keep: int = 2) -> None:
        if keep < 1:
            raise ValueError("keep must be at least 1")
        self.every_seconds = every_seconds
        self.every_steps = every_steps
        self.keep = keep
        self.folder = Path("checkpoints")  # set by the run
        self.identity: dict[str, str] = {}
        self.saved_step = 0
        self.agreed = False  # on several ranks: that it is time for a checkpoint (`StopBetweenSteps` asks rank 0)
        self._saved_at = time.monotonic()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        step = current_step(trainer)
        if step > self.saved_step and self._is_due(trainer, step):
            self.save(trainer, step)

    def _is_due(self, trainer: Trainer, step: int) -> bool:
        by_steps = self.every_steps is not None and step % self.every_steps == 0
        return by_steps or (self.agreed if trainer.world_size > 1 else self.is_time())

    def is_time(self) -> bool:
        """Whether the newest checkpoint of this process is `every_seconds` old."""
        return self.every_seconds is not None and time.monotonic() - self._saved_at >= self.every_seconds

    def save(self, trainer: Trainer, step: int) -> Path:
        """Write the checkpoint of a moment between two steps; collective over all ranks."""
        path = self.folder / f"step={step:09d}.ckpt"
        self._step = step
        trainer.save_checkpoint(path)
        self.saved_step, self._saved_at, self.agreed = step, time.monotonic(), False
        if trainer.is_global_zero:
            self._tidy(path)
        return path

    def _tidy(self, newest: Path) -> None:
        """Keep the newest files; later ones are damaged (the run did not continue from them), so they do not count."""
        files = sorted(self.folder.glob("step=*.ckpt"))
        good = [file for file in files if file <= newest]
        for file in {*files} - {*good[-self.keep :]}:
            file.unlink(missing_ok=True)
        for scratch in self.folder.glob(".step=*"):
            pid = scratch.suffix[1:]
            if not pid.isdigit() or not is_alive(int(pid)):  # it was killed in the middle of a write
                scratch.unlink(missing_ok=True)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        checkpoint["reprise"] = {"format": FORMAT, "step": self._step, **self.identity}
        progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
        for counters in (progress["total"], progress["current"]):  # the batch at hand has not been processed
            counters["ready"] = counters["started"] = counters["processed"] = counters["completed"]
        progress["is_last_batch"] = False


def current_step(trainer: Trainer) -> int:
    """How many steps are complete while a batch is being started or processed; counts batches, not optimizer calls."""
    return trainer.fit_loop.epoch_loop.batch_progress.current.completed


def callbacks_of(trainer: Trainer) -> list[Callback]:
    """The trainer's own list, which Lightning's types do not know."""
    return trainer.callbacks  # type: ignore[attr-defined]


def require_file(path: Path, what: str) -> None:
    """Raise a clear error where a file that the user named does not exist."""
    if not path.is_file():
        raise RepriseError(f"{what} does not exist", looked_at=path.resolve(), next_step="check the path")
