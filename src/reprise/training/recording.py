"""What a run tells: tidy metrics, progress, pictures."""

from __future__ import annotations

import time
from abc import abstractmethod
from argparse import Namespace
from collections.abc import Mapping
from typing import Any

from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.loggers.logger import Logger
from pytorch_lightning.utilities import rank_zero_only
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from reprise.seeding import seed_all
from reprise.training.checkpoint import current_step
from reprise.training.module import PaperModule
from reprise.training.runfolder import MetricsFile, RunFolder, write_json


class CurveLogger(Logger):
    """Keeps the curves that modules log, on rank 0; step n is the state after n training steps."""

    @property
    def version(self) -> str:
        return ""

    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """Nothing: the whole configuration is kept when the run begins."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        kept = {name: value for name, value in metrics.items() if name != "epoch" and not name.startswith("test/")}
        if kept:
            self.write((step or 0) + 1, kept)

    @abstractmethod
    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Keep the values of a step; those of the test are not among them."""


class RunLogger(CurveLogger):
    """Writes to `metrics.csv` of the run folder."""

    def __init__(self, metrics: MetricsFile) -> None:
        super().__init__()
        self.metrics = metrics

    @property
    def name(self) -> str:
        return "run"

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self.metrics.append(step, values)


class Reseed(Callback):
    """Gives every step its own random numbers, and the loggers the true step, also after a resume."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        trainer.fit_loop.epoch_loop._batches_that_stepped = current_step(trainer)
        self.reseed(trainer)

    def reseed(self, trainer: Trainer) -> None:
        """Put the generators where the step at hand began."""
        seed_all(self.seed, "step", current_step(trainer), "rank", trainer.global_rank)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        seed_all(self.seed, "test", "rank", trainer.global_rank)


class ProgressReport(Callback):
    """Keeps `progress.json` up to date and, for a single run in a terminal, shows a bar with the time left."""

    def __init__(self, folder: RunFolder, steps: int, title: str, show: bool) -> None:
        self.folder, self.steps, self.title, self.show = folder, steps, title, show
        self._began = self._written = time.monotonic()
        self._bar: Progress | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._began = time.monotonic()
        self._write(current_step(trainer), "train")
        if self.show and trainer.is_global_zero:
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("steps, left"),
                TimeRemainingColumn(),
                TextColumn("{task.fields[note]}"),
                console=Console(stderr=True),
            )
            self._task = self._bar.add_task(self.title, total=self.steps, completed=current_step(trainer), note="")
            self._bar.start()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if time.monotonic() - self._written >= 1.0 and trainer.is_global_zero:
            self._write(current_step(trainer) + 1, "train")
            if self._bar is not None:
                self._bar.update(self._task, completed=current_step(trainer) + 1)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._bar is not None:
            values = {name: float(v) for name, v in trainer.callback_metrics.items() if name.startswith("val/")}
            self._bar.update(self._task, note=" ".join(f"{name} {value:.4g}" for name, value in values.items()))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._bar is not None:
            self._bar.update(self._task, completed=self.steps)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._write(self.steps, "test")

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()

    def _write(self, step: int, phase: str) -> None:
        self._written = time.monotonic()
        self.folder.progress(step, self.steps, phase, self._written - self._began)


def save_pictures(module: PaperModule, folder: RunFolder) -> None:
    """Write the module's pictures as PNG files with a list of captions."""
    from matplotlib import pyplot

    target = folder.path / "pictures"
    target.mkdir(exist_ok=True)
    entries = []
    for picture in module.pictures():
        file = f"{picture.name}.png"
        picture.figure.savefig(target / file, dpi=130, bbox_inches="tight", metadata={"Software": None})
        pyplot.close(picture.figure)
        entries.append({"name": picture.name, "caption": picture.caption, "file": file})
    write_json(target / "pictures.json", entries)
