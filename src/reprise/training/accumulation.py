"""Gradient accumulation inside a step: the global batch is gone through in parts, so that less memory is needed.

Lightning's `accumulate_grad_batches` counts each part as a batch and so multiplies the global batch; here
`data.batch_size` stays what an optimizer step sees, and steps, schedules, checkpoints and resume know nothing of parts.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from pytorch_lightning import Trainer
from pytorch_lightning.loops.optimization.automatic import Closure, ClosureResult, _AutomaticOptimization
from pytorch_lightning.strategies import ParallelStrategy
from torch import Tensor
from torch.optim import Optimizer

from reprise.errors import ConfigError
from reprise.training.module import PaperModule


def accumulate(trainer: Trainer, module: PaperModule, parts: int) -> None:
    """Make each step of a trainer go through its batch in `parts` parts of equal size.

    Raises:
        ConfigError: fewer than one part, or the module optimizes by hand.
    """
    if parts == 1:
        return
    if parts < 1 or not module.automatic_optimization:
        by_hand = "" if module.automatic_optimization else f": {type(module).__name__} optimizes by hand"
        raise ConfigError(
            f"gradients cannot be accumulated over {parts} parts{by_hand}",
            looked_at="trainer.accumulate_grad_batches",
            next_step="set it to 1",
        )
    module.parts = parts
    trainer.fit_loop.epoch_loop.automatic_optimization = _InParts(trainer, module)


class _InParts(_AutomaticOptimization):
    """Lightning's step, in whose forward pass all parts but the last go backward too."""

    def __init__(self, trainer: Trainer, module: PaperModule) -> None:
        super().__init__(trainer)
        self._module = module

    def _make_closure(self, kwargs: OrderedDict[str, Any], optimizer: Optimizer, batch_idx: int) -> Closure:
        clear = self._make_zero_grad_fn(batch_idx, optimizer)
        assert clear is not None
        return Closure(partial(self._forward, kwargs, optimizer, clear), self._make_backward_fn(optimizer))

    def _forward(self, kwargs: OrderedDict[str, Any], optimizer: Optimizer, clear: Callable[[], None]) -> ClosureResult:
        """The last part's result, its value the mean loss over all parts."""
        clear()
        self._module.whole_batch = kwargs["batch"]
        *early, last = split_batch(kwargs["batch"], self._module.parts)
        losses = [self._backward_here(OrderedDict(kwargs, batch=part), optimizer) for part in early]
        loss = self._loss(OrderedDict(kwargs, batch=last))
        self._module.whole_batch = None
        result = ClosureResult(loss)
        result.loss = torch.stack([*losses, loss.detach()]).sum()
        return result

    def _backward_here(self, kwargs: OrderedDict[str, Any], optimizer: Optimizer) -> Tensor:
        """Add a part's gradients to those at hand, without sending them to other ranks; its share of the loss."""
        strategy = self.trainer.strategy
        with strategy.block_backward_sync() if isinstance(strategy, ParallelStrategy) else nullcontext():
            loss = self._loss(kwargs)
            strategy.backward(loss, optimizer)
        return loss.detach()

    def _loss(self, kwargs: OrderedDict[str, Any]) -> Tensor:
        """A part's share of the loss, with its graph."""
        loss = self._training_step(kwargs).closure_loss
        if loss is None:
            raise ValueError(f"{type(self._module).__name__}.training_step returned no loss")
        return loss / self._module.parts


def split_batch(batch: Mapping[str, Any], parts: int) -> list[dict[str, Any]]:
    """A batch, cut along the first dimension of its tensors and lists.

    Raises:
        ConfigError: the parts cannot be equal, or an entry is not one of items.
    """
    lengths = {name: len(value) for name, value in batch.items() if _has_items(value)}
    items = next(iter(lengths.values()), 0)
    odd = sorted(name for name in batch if lengths.get(name) != items)
    if odd or items % parts:
        why = f"its entries {', '.join(odd)} are not per item" if odd else f"there are {items} items on this device"
        raise ConfigError(
            f"a batch cannot be gone through in {parts} equal parts: {why}",
            looked_at="trainer.accumulate_grad_batches",
            next_step="choose a number that divides data.batch_size over the devices, or 1",
        )
    size = items // parts
    return [{name: value[n * size : (n + 1) * size] for name, value in batch.items()} for n in range(parts)]


def _has_items(value: Any) -> bool:
    return isinstance(value, list) or (isinstance(value, Tensor) and value.dim() > 0)
