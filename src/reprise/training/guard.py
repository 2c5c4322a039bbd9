"""Stops a run whose loss or gradient is not finite, and says which batch and which module did it."""

from __future__ import annotations

import math
from typing import Any

import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.optim import Optimizer

from reprise.errors import DivergedError
from reprise.training.checkpoint import ExactCheckpoint, callbacks_of, current_step
from reprise.training.recording import Reseed

ONE_BY_ONE = "callbacks.divergence.check_every=1"


class DivergenceGuard(Callback):
    """Watches the training loss, and now and then the gradients, and names the module that went wrong first.

    A bad loss is seen before it reaches the weights: the forward pass is repeated with the same random numbers and
    watched module by module. On an accelerator the loss is looked at every `check_every` steps, so as not to wait for
    the device; the run is deterministic, so repeating it from its last checkpoint with check_every=1 finds the module.

    Args:
        check_every: steps between two looks at the gradients (not those of float16, which are scaled), and on an
            accelerator at the loss (on the CPU the loss of every step is checked). Before a checkpoint is written loss
            and weights are always checked, so no checkpoint holds a diverged state.
    """

    def __init__(self, check_every: int = 10) -> None:
        self.check_every = check_every
        self._first_bad = torch.tensor(-1)
        self._batch: Any = None

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._batch = batch

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        self._look_at(trainer, pl_module, loss)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        if getattr(trainer.precision_plugin, "scaler", None) is not None:
            return  # float16: a scaled gradient that overflows is expected now and then, and its step is skipped
        step = current_step(trainer)
        if (step + 1) % self.check_every == 0 and (found := bad_gradient(pl_module)) is not None:
            reason = f"the gradient became NaN or infinite at step {step}, first (backwards) in {found}"
            self._stop(trainer, reason, step)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._batch = None
        loss = outputs["loss"] if isinstance(outputs, dict) and "loss" in outputs else outputs
        if isinstance(loss, Tensor) and not pl_module.automatic_optimization:
            self._look_at(trainer, pl_module, loss)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self._check(trainer, pl_module)
        if (found := bad_parameter(pl_module)) is not None:
            step = current_step(trainer) - 1
            self._stop(trainer, f"the weights of {found} became NaN or infinite at step {step}", step)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._check(trainer, pl_module)

    def _look_at(self, trainer: Trainer, module: LightningModule, loss: Tensor) -> None:
        step = current_step(trainer)
        if loss.device.type == "cpu":
            if not math.isfinite(loss.item()):
                self._first_bad = torch.tensor(step)
                self._check(trainer, module)
            return
        first = self._first_bad.to(loss.device)
        bad = ~torch.isfinite(loss.detach()).all() & (first < 0)
        self._first_bad = torch.where(bad, torch.full_like(first, step), first)
        if (step + 1) % self.check_every == 0:
            self._check(trainer, module)

    def _check(self, trainer: Trainer, module: LightningModule) -> None:
        step = int(self._first_bad)
        if step >= 0:
            where = self._where(trainer, module, step)
            self._stop(trainer, f"the training loss became NaN or infinite at step {step}{where}", step)

    def _where(self, trainer: Trainer, module: LightningModule, step: int) -> str:
        """What can be said about the origin while the weights and the batch of the step are still at hand."""
        if trainer.world_size > 1 or self._batch is None or current_step(trainer) != step:
            return ""
        if (weights := bad_parameter(module)) is not None:
            return f"; the weights of {weights} were not finite already, so a gradient before was not"
        found = first_bad_output(trainer, module, self._batch)
        return (
            f"; first in the output of {found}" if found else "; the output of every module is finite, the loss is not"
        )

    def _stop(self, trainer: Trainer, reason: str, step: int) -> None:
        alone = self.check_every == 1 and trainer.world_size == 1
        again = f"; the same command with {ONE_BY_ONE}, in one process, goes on from there and names the module"
        raise DivergedError(
            reason + _batch_of(trainer, step),
            looked_at=_last_checkpoint(trainer),
            next_step="lower the learning rate or clip gradients (trainer.gradient_clip_val); "
            f"the last good checkpoint is kept{'' if alone else again}",
        )


def first_bad_output(trainer: Trainer, module: LightningModule, batch: Any) -> str | None:
    """Repeat the forward pass of the step at hand; the first module, innermost first, whose output is not finite."""
    found: list[str] = []

    def watch(name: str) -> Any:
        def hook(layer: nn.Module, inputs: Any, output: Any) -> None:
            if not found and not _is_finite(output):
                found.append(f"{name} ({type(layer).__name__})")

        return hook

    handles = [layer.register_forward_hook(watch(name)) for name, layer in module.named_modules() if name]
    try:
        for callback in callbacks_of(trainer):
            if isinstance(callback, Reseed):
                callback.reseed(trainer)
        module.training_step(batch, current_step(trainer))
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else None


def _is_finite(value: Any) -> bool:
    """Whether every floating-point tensor in a (nested) output is finite."""
    if isinstance(value, Tensor):
        return not value.is_floating_point() or bool(torch.isfinite(value).all())
    if isinstance(value, dict):
        return all(map(_is_finite, value.values()))
    return all(map(_is_finite, value)) if isinstance(value, list | tuple) else True


def bad_gradient(module: nn.Module) -> str | None:
    """The last parameter, so the first in the backward pass, whose gradient is not finite."""
    held = [(name, parameter.grad) for name, parameter in module.named_parameters() if parameter.grad is not None]
    return _last_bad([name for name, _ in held], [gradient for _, gradient in held if gradient is not None])


def bad_parameter(module: nn.Module) -> str | None:
    """The last parameter that is not finite."""
    held = list(module.named_parameters())
    return _last_bad([name for name, _ in held], [parameter.detach() for _, parameter in held])


def _last_bad(names: list[str], tensors: list[Tensor]) -> str | None:
    names, tensors = [n for n, t in zip(names, tensors, strict=True) if t.numel()], [t for t in tensors if t.numel()]
    if not tensors:  # of a sharded model a rank may hold nothing
        return None
    device = tensors[0].device
    norms = torch.stack([norm.float().to(device) for norm in torch._foreach_norm(tensors, torch.inf)])
    bad = (~torch.isfinite(norms)).nonzero().flatten().tolist()
    return names[bad[-1]] if bad else None


def _batch_of(trainer: Trainer, step: int) -> str:
    """The items of the batch, found again because batches are functions of (seed, step)."""
    loader = trainer.train_dataloader
    if loader is None or not hasattr(loader, "batch"):
        return ""
    index = loader.batch(step).get("index")
    return "" if index is None else f", with the training items {index.flatten().tolist()[:64]}"


def _last_checkpoint(trainer: Trainer) -> str:
    for callback in callbacks_of(trainer):
        if isinstance(callback, ExactCheckpoint):
            files = sorted(callback.folder.glob("step=*.ckpt"))
            return str(files[-1]) if files else f"{callback.folder} (no checkpoint was due before the failure)"
    return "no checkpoints are kept in this run"
