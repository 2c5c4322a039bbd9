"""What the rank tests look at inside a run, and the data that they disturb; picklable callables for children."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

NOT_PER_OBJECT = ("size", "orig_size", "image_id")  # of a detection target


@dataclass(frozen=True)
class Probe:
    """Keeps, per rank, the gradients at each optimizer call of the first step, and the state after training.

    Args:
        folder: where `rank=<n>.pt` is written.
        empty_half: whether the second half of every training batch loses its objects (detection).
    """

    folder: Path
    empty_half: bool = False

    def __call__(self) -> None:
        from reprise.training.recording import Reseed

        self.folder.mkdir(parents=True, exist_ok=True)
        gradients: list[dict[str, Any]] = []

        def keep_gradients(callback: Any, trainer: Any, module: Any, optimizer: Any) -> None:
            from reprise.training.checkpoint import current_step

            if current_step(trainer) == 0:
                named = module.named_parameters()
                gradients.append({name: p.grad.clone() for name, p in named if p.grad is not None})

        def keep_state(callback: Any, trainer: Any, module: Any) -> None:
            import torch

            state = {"module": module.state_dict(), "optimizers": [o.state_dict() for o in trainer.optimizers]}
            torch.save({"gradients": gradients, **state}, self.folder / f"rank={trainer.global_rank}.pt")

        def forget(callback: Any, trainer: Any, module: Any) -> None:  # what an earlier stage in this process left
            gradients.clear()

        patched: Any = Reseed
        patched.on_fit_start = forget
        patched.on_before_optimizer_step = keep_gradients
        patched.on_train_end = keep_state
        if self.empty_half:
            _empty_half_of_each_batch()


@dataclass(frozen=True)
class CountCompiledCalls:
    """In place of compiling a module, count in `file` how often it is called."""

    file: Path

    def __call__(self) -> None:
        from torch import nn

        def count(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            with self.file.open("a") as handle:
                handle.write(".")
            return module._call_impl(*args, **kwargs)

        def instead_of_compiling(module: nn.Module, **options: Any) -> None:
            module._compiled_call_impl = functools.partial(count, module)

        patched: Any = nn.Module
        patched.compile = instead_of_compiling


def _empty_half_of_each_batch() -> None:
    from reprise.data.loader import StepLoader

    whole = StepLoader.batch

    def batch(self: StepLoader, step: int) -> Any:
        made = whole(self, step)
        part = self.batch_size // self.world
        for place, target in enumerate(made["targets"], start=self.rank * part):
            if place >= self.batch_size // 2:
                target.update({name: value[:0] for name, value in target.items() if name not in NOT_PER_OBJECT})
        return made

    patched: Any = StepLoader
    patched.batch = batch
