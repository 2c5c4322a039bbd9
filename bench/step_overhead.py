"""What the library costs per training step, against a bare PyTorch loop over the same module and the same batches.

Both do the same work: data, forward, backward, the recipe's gradient clipping, optimizer and schedule. Both run in this
process, in turns, so that a noisy machine disturbs both alike; the ratio of the medians over the turns is printed, in
processor time (which other processes disturb little) and in wall time.
    python bench/step_overhead.py [experiment=vit/public ...]
"""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from pytorch_lightning import Callback

from reprise.config import compose
from reprise.training.diagnostics import Timing
from reprise.training.interrupt import StopRequest
from reprise.training.recording import ProgressReport
from reprise.training.run import Parts, build, make_trainer
from reprise.training.runfolder import MetricsFile, RunFolder

STEPS, WARM_UP, ROUNDS = 40, 5, 7
RECIPES = ("experiment=vit/small", "experiment=detr/small")


@dataclass(frozen=True)
class Cost:
    """Seconds a step: of this process's cores, and on the clock."""

    cpu: float
    wall: float


class Stopwatch:
    """Times the steps after the warm-up."""

    def __init__(self) -> None:
        self._began = self._ended = (0.0, 0.0)

    def start(self) -> None:
        self._began = (time.process_time(), time.perf_counter())

    def stop(self) -> None:
        self._ended = (time.process_time(), time.perf_counter())

    @property
    def cost(self) -> Cost:
        steps = STEPS - WARM_UP
        return Cost(*((end - begin) / steps for begin, end in zip(self._began, self._ended, strict=True)))


class Watch(Callback):
    """Starts the watch when a batch of ours begins, as the bare loop does, and stops it after the last step."""

    def __init__(self, watch: Stopwatch) -> None:
        self.watch = watch

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == WARM_UP - 1:
            self.watch.start()

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        self.watch.stop()


def bare_loop(parts: Parts, cfg: DictConfig) -> Cost:
    """Data, forward, backward, clipping, update and schedule, without any of ours."""
    torch.use_deterministic_algorithms(False)
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "0"  # importing Lightning sets it, which slows every optimizer
    module, watch = parts.module.train(), Stopwatch()
    module.log = module.log_dict = lambda *args, **kwargs: None  # type: ignore[method-assign,assignment]
    configured = module.configure_optimizers()
    optimizer, schedule = configured["optimizer"], configured["lr_scheduler"]["scheduler"]
    for number, batch in enumerate(batches(parts)):
        if number == WARM_UP:
            watch.start()
        optimizer.zero_grad()
        module.training_step(batch, number).backward()
        if cfg.trainer.gradient_clip_val:
            torch.nn.utils.clip_grad_norm_(module.parameters(), cfg.trainer.gradient_clip_val)
        optimizer.step()
        schedule.step()
    watch.stop()
    return watch.cost


def batches(parts: Parts) -> Iterator[Any]:
    return islice(iter(parts.data.train_dataloader()), STEPS)


def our_run(parts: Parts, cfg: DictConfig, folder: Path) -> Cost:
    """`trainer.fit` with every standard callback, set-up left out."""
    run, watch = RunFolder(folder), Stopwatch()
    run.prepare("bench")
    progress = ProgressReport(run, STEPS, "bench", False)
    timing = Timing(MetricsFile(folder / "timing.csv"), parts.data.examples_per_step)
    trainer = make_trainer(cfg, run, {}, MetricsFile(folder / "metrics.csv"), StopRequest(), progress, timing)
    trainer.callbacks.append(Watch(watch))  # type: ignore[attr-defined]
    trainer.limit_train_batches, trainer.limit_val_batches = STEPS, 0
    trainer.fit(parts.module, datamodule=parts.data)
    return watch.cost


def measure(overrides: list[str]) -> tuple[list[Cost], list[Cost]]:
    """The costs of each turn: of the bare loop and of ours."""
    cfg = compose(overrides)
    torch.set_num_threads(cfg.threads)
    bare, ours = [], []
    with tempfile.TemporaryDirectory() as folder:
        for turn in range(ROUNDS):
            bare.append(bare_loop(build(cfg), cfg))
            ours.append(our_run(build(cfg), cfg, Path(folder) / str(turn)))
    return bare, ours


def main(overrides: list[str]) -> None:
    bare, ours = measure(overrides)
    print(f"{' '.join(overrides)}; {ROUNDS} turns of {STEPS - WARM_UP} steps, cores: {os.cpu_count()}")
    for name in ("cpu", "wall"):
        left, right = ([getattr(cost, name) * 1e3 for cost in costs] for costs in (bare, ours))
        pairs = sorted(o / b for b, o in zip(left, right, strict=True))
        print(
            f"  {name:<5} bare {statistics.median(left):.2f} ms, ours {statistics.median(right):.2f} ms a step: "
            f"ratio {statistics.median(right) / statistics.median(left):.3f} (pairs {pairs[0]:.3f} to {pairs[-1]:.3f})"
        )


if __name__ == "__main__":
    for chosen in [sys.argv[1:]] if sys.argv[1:] else [[recipe] for recipe in RECIPES]:
        main(chosen)
