"""Always on: gradient norms by part of the model, throughput, share of the time spent waiting for data, peak memory.

Gradient norms are functions of the run and stand in `metrics.csv`; what depends on the clock or the machine stands in
`timing.csv`, which may differ between two runs of the same seed.
"""

from __future__ import annotations

import re
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.strategies import FSDPStrategy
from torch import Tensor, nn
from torch.optim import Optimizer

from reprise.training.checkpoint import current_step
from reprise.training.recording import RunLogger
from reprise.training.runfolder import MetricsFile
from reprise.training.steps import StepClock, is_logged

Part = nn.Module | nn.Parameter
_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def parameter_parts(module: nn.Module, max_parts: int) -> dict[str, list[nn.Parameter]]:
    """The trained parameters by part of the model, named like the module that holds them.

    The largest part is split into its children for as long as there are at most `max_parts` parts; so a deep network
    is seen block by block.
    """
    parts: dict[str, Part] = {"": module}
    while True:
        name = max(parts, key=lambda key: (_is_divisible(parts[key]), _count(parts[key])))
        children = _children(parts[name], name)
        if not _is_divisible(parts[name]) or (len(parts) - 1 + len(children) > max_parts and len(children) > 1):
            break
        parts = {k: v for key, value in parts.items() for k, v in (children if key == name else {key: value}).items()}
    return {name: _trained(part) for name, part in parts.items() if _trained(part)}


def _trained(part: Part) -> list[nn.Parameter]:
    own = [part] if isinstance(part, nn.Parameter) else list(part.parameters())
    return [parameter for parameter in own if parameter.requires_grad]


def _count(part: Part) -> int:
    return sum(parameter.numel() for parameter in _trained(part))


def _is_divisible(part: Part) -> bool:
    """Layers whose parameters are their own (a weight and its bias) stay whole."""
    return isinstance(part, nn.Module) and any(True for child in part.children() if _count(child))


def _children(part: Part, name: str) -> dict[str, Part]:
    if isinstance(part, nn.Parameter):
        return {}
    found: list[tuple[str, Part]] = [*part.named_parameters(recurse=False), *part.named_children()]
    return {f"{name}.{child}".lstrip("."): value for child, value in found if _count(value)}


class GradientNorms(Callback):
    """Logs the gradient's norm by part of the model, `grad_norm/<part>`, and in all, `grad_norm`, before clipping.

    Measured at the steps that the loggers see, with one fused call. Papers whose optimizer gets no gradients (servers
    of federated learning) log none.

    Args:
        max_parts: how finely the model is divided (see `parameter_parts`).
    """

    def __init__(self, max_parts: int = 16) -> None:
        self.max_parts = max_parts
        self._parts: list[tuple[str, list[nn.Parameter]]] = []

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":  # before the model is sharded: ranks then hold different numbers of a part
            self._parts = list(parameter_parts(pl_module, self.max_parts).items())

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        if not is_logged(trainer):
            return
        groups = [parameters for _, parameters in self._parts]
        sharded = isinstance(trainer.strategy, FSDPStrategy)
        if sharded and not trainer.is_global_zero:  # each rank holds a part of every tensor, and scalars as a whole
            groups = [[parameter for parameter in group if parameter.dim()] for group in groups]
        squares = squared_norms(groups)
        if sharded:
            own = torch.zeros(len(groups), device=pl_module.device) if squares is None else squares
            squares = trainer.strategy.reduce(own, reduce_op="sum")
        if squares is None:
            return
        norms = [*squares.sqrt().tolist(), squares.sum().sqrt().item()]
        names = [*(f"grad_norm/{name}" for name, _ in self._parts), "grad_norm"]
        for name, value in zip(names, norms, strict=True):
            pl_module.log(name, value)


def squared_norms(groups: list[list[nn.Parameter]]) -> Tensor | None:
    """The squared norm of each group's gradients, [groups]; None where no parameter has one."""
    held = [(index, p.grad) for index, group in enumerate(groups) for p in group if p.grad is not None]
    if not held:
        return None
    device = held[0][1].device
    norms = torch.stack([norm.to(device, torch.float32) for norm in torch._foreach_norm([grad for _, grad in held])])
    places = torch.tensor([index for index, _ in held], device=device)
    return torch.zeros(len(groups), device=device).index_add_(0, places, norms.square())


class Timing(Callback):
    """Writes `timing.csv`: `items_per_second` (all ranks), `data_wait` (share of the time) and `memory_bytes` (peak).

    Each row covers the steps since the row before, without validation.

    Args:
        file: where to write; opened on the first rank only.
        items_per_step: what one step goes through.
    """

    def __init__(self, file: MetricsFile, items_per_step: int) -> None:
        self.file = file
        self.items_per_step = items_per_step
        self.clock = StepClock()  # the trainer's profiler

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._peak = memory_meter(pl_module.device)
        self._restart()

    def _restart(self) -> None:
        self._steps, self._began, self._waited = 0, time.perf_counter(), self.clock.data_seconds

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._paused = time.perf_counter()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._began += time.perf_counter() - self._paused

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._steps += 1
        if not (is_logged(trainer) and trainer.is_global_zero):
            return
        seconds = max(time.perf_counter() - self._began, 1e-9)
        values = {
            "items_per_second": self._steps * self.items_per_step / seconds,
            "data_wait": min((self.clock.data_seconds - self._waited) / seconds, 1.0),
            "memory_bytes": self._peak(),
        }
        step = current_step(trainer)
        self.file.append(step + 1, values)
        for logger in trainer.loggers:
            if not isinstance(logger, RunLogger):  # the mirrors show both files
                logger.log_metrics({f"timing/{name}": value for name, value in values.items()}, step)
        self._restart()


def memory_meter(device: torch.device) -> Callable[[], float]:
    """A function that says the most memory in use since now: of the GPU, else of this process."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return lambda: float(torch.cuda.max_memory_allocated(device))
    try:
        _CLEAR.write_text("5")  # Linux: begin the peak anew; other runs may have used this process before
        return _resident_peak
    except OSError:
        unit = 1 if sys.platform == "darwin" else 1024
        return lambda: float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit)


def _resident_peak() -> float:
    found = re.search(r"VmHWM:\s+(\d+) kB", _STATUS.read_text())
    return float(found.group(1)) * 1024 if found else float("nan")
