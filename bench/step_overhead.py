"""What the library costs per training step, against a bare PyTorch loop over the same module and the same batches.

Both do the same work: data, forward, backward, the recipe's gradient clipping, optimizer and schedule. They take turns
after every single step in one process, so that a noisy machine disturbs both alike. Printed are the ratio of the mean
steps (without the slowest and fastest twentieth of each), in processor time and on the clock, and the share that the
diagnostics (gradient norms, timing, guard) take.
    python bench/step_overhead.py [experiment=vit/public ...]
"""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from pytorch_lightning import Callback

from reprise.config import compose
from reprise.training.checkpoint import callbacks_of
from reprise.training.diagnostics import GradientNorms, Timing
from reprise.training.guard import DivergenceGuard
from reprise.training.interrupt import StopRequest
from reprise.training.recording import ProgressReport
from reprise.training.run import Parts, build, make_trainer
from reprise.training.runfolder import MetricsFile, RunFolder

STEPS, WARM_UP, TRIMMED = 200, 10, 0.05
RECIPES = ("experiment=vit/small", "experiment=detr/small")
Moment = tuple[float, float]


def now() -> Moment:
    """Processor time of this process, and the clock."""
    return time.process_time(), time.perf_counter()


def since(moment: Moment) -> Moment:
    cpu, wall = now()
    return cpu - moment[0], wall - moment[1]


def bare_steps(parts: Parts, cfg: DictConfig) -> Iterator[None]:
    """One step each time: data, forward, backward, clipping, update and schedule, without any of ours."""
    module: Any = parts.module.train()
    module.log = module.log_dict = lambda *args, **kwargs: None
    configured = module.configure_optimizers()
    optimizer, schedule = configured["optimizer"], configured["lr_scheduler"]["scheduler"]
    for number, batch in enumerate(islice(iter(parts.data.train_dataloader()), STEPS)):
        optimizer.zero_grad()
        module.training_step(batch, number).backward()
        if cfg.trainer.gradient_clip_val:
            torch.nn.utils.clip_grad_norm_(module.parameters(), cfg.trainer.gradient_clip_val)
        optimizer.step()
        schedule.step()
        yield


class TakeTurns(Callback):
    """After each of our steps, one of the bare loop."""

    def __init__(self, bare: Iterator[None]) -> None:
        self.bare = bare
        self.ours: list[Moment] = []
        self.others: list[Moment] = []
        self.began: Moment | None = None

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self.began is not None:
            self.ours.append(since(self.began))
        torch.use_deterministic_algorithms(False)
        began = now()
        next(self.bare, None)
        self.others.append(since(began))
        torch.use_deterministic_algorithms(True)
        self.began = now()


class Shares:
    """Adds up the processor time of single hooks."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def watch(self, callback: Callback, *hooks: str) -> None:
        for hook in hooks:
            setattr(callback, hook, self._timed(getattr(callback, hook)))

    def _timed(self, call: Callable[..., None]) -> Callable[..., None]:
        def timed(*args: Any) -> None:
            began = time.process_time()
            call(*args)
            self.seconds += time.process_time() - began

        return timed


def measure(overrides: list[str], folder: Path) -> tuple[TakeTurns, float]:
    """The times of every step, and the seconds that diagnostics took in all."""
    cfg = compose(overrides)
    torch.set_num_threads(cfg.threads)
    parts, run, turns, shares = build(cfg), RunFolder(folder), TakeTurns(bare_steps(build(cfg), cfg)), Shares()
    run.prepare("bench")
    timing = Timing(MetricsFile(folder / "timing.csv"), parts.data.examples_per_step)
    progress = ProgressReport(run, STEPS, "bench", False)
    trainer = make_trainer(cfg, run, {}, MetricsFile(folder / "metrics.csv"), StopRequest(), progress, timing)
    for callback in callbacks_of(trainer):
        if isinstance(callback, GradientNorms | DivergenceGuard | Timing):
            shares.watch(callback, "on_before_backward", "on_before_optimizer_step", "on_train_batch_end")
    callbacks_of(trainer).append(turns)
    trainer.limit_train_batches, trainer.limit_val_batches = STEPS, 0
    trainer.fit(parts.module, datamodule=parts.data)
    return turns, shares.seconds


def trimmed_mean(times: list[float]) -> float:
    cut = int(len(times) * TRIMMED)
    return statistics.fmean(sorted(times)[cut : len(times) - cut])


def main(overrides: list[str]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        turns, diagnostics = measure(overrides, Path(folder))
    print(f"{' '.join(overrides)}: {STEPS} steps each, in turns; cores: {os.cpu_count()}")
    for index, name in enumerate(("processor", "clock")):
        bare, ours = (
            trimmed_mean([each[index] for each in times[WARM_UP:]]) * 1e3 for times in (turns.others, turns.ours)
        )
        print(f"  {name:<9} bare {bare:.2f} ms, ours {ours:.2f} ms a step: ratio {ours / bare:.3f}")
    total = sum(cpu for cpu, _ in turns.others) / len(turns.others)
    print(f"  of which diagnostics {diagnostics / STEPS / total:.2%} of a bare step")


if __name__ == "__main__":
    for chosen in [sys.argv[1:]] if sys.argv[1:] else [[recipe] for recipe in RECIPES]:
        main(chosen)
