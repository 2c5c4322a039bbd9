"""What the library costs per training step, against a bare PyTorch loop over the same module and the same batches.

Both run in this process, in turns, so that a noisy machine disturbs both alike; the medians' ratio is printed.
    python bench/step_overhead.py [experiment=vit/public ...]
"""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
from omegaconf import OmegaConf

from reprise.config import compose
from reprise.training.interrupt import StopRequest
from reprise.training.recording import ProgressReport
from reprise.training.run import Parts, build, make_trainer
from reprise.training.runfolder import MetricsFile, RunFolder

STEPS, ROUNDS = 40, 5


def bare_loop(parts: Parts) -> float:
    """Seconds per step of forward, backward and update, without any of ours."""
    parts.module.train()
    parts.module.log = lambda *args, **kwargs: None  # type: ignore[method-assign]
    configured = parts.module.configure_optimizers()
    optimizer, schedule = (
        (configured["optimizer"], configured["lr_scheduler"]["scheduler"])
        if isinstance(configured, dict)
        else (configured, None)
    )
    began = time.perf_counter()
    for number, batch in enumerate(parts.data.train_dataloader()):
        loss = parts.module.training_step(batch, number)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if schedule is not None:
            schedule.step()
    return (time.perf_counter() - began) / STEPS


def our_run(parts: Parts, cfg: object, folder: Path) -> float:
    """Seconds per step of `trainer.fit` with every standard callback, set-up left out."""
    run = RunFolder(folder)
    run.prepare("bench")
    times: list[float] = []
    progress = ProgressReport(run, STEPS, "bench", False)
    trainer = make_trainer(cfg, run, {}, MetricsFile(folder / "metrics.csv"), StopRequest(), progress)  # type: ignore[arg-type]
    before = progress.on_train_start
    progress.on_train_start = lambda *args: (before(*args), times.append(time.perf_counter()))[0]  # type: ignore[method-assign]
    after = progress.on_train_end
    progress.on_train_end = lambda *args: (times.append(time.perf_counter()), after(*args))[1]  # type: ignore[method-assign]
    trainer.limit_val_batches = 0
    trainer.fit(parts.module, datamodule=parts.data)
    return (times[1] - times[0]) / STEPS


def main(overrides: list[str]) -> None:
    cfg = compose([*overrides, f"steps={STEPS}"])
    OmegaConf.set_struct(cfg, False)
    torch.set_num_threads(cfg.threads)
    bare, ours = [], []
    with tempfile.TemporaryDirectory() as folder:
        for turn in range(ROUNDS):
            bare.append(bare_loop(build(cfg)))
            ours.append(our_run(build(cfg), cfg, Path(folder) / str(turn)))
    ratio = statistics.median(ours) / statistics.median(bare)
    medians = [statistics.median(times) * 1e3 for times in (bare, ours)]
    print(f"{' '.join(overrides)}: bare {medians[0]:.2f} ms, ours {medians[1]:.2f} ms a step")
    print(
        f"ratio {ratio:.3f} (spread of the pairs: {min(o / b for o, b in zip(ours, bare, strict=True)):.3f} to "
        f"{max(o / b for o, b in zip(ours, bare, strict=True)):.3f}); cores: {os.cpu_count()}"
    )


if __name__ == "__main__":
    main(sys.argv[1:] or ["experiment=detr/small"])
