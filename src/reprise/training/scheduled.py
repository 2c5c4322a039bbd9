"""DINO's way of training: schedules whose warm-up includes its end, scheduled weight decay, clipping per tensor."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from reprise.training.schedules import cosine_value


def warmup_cosine_value(
    step: int, total_steps: int, base: float, final: float, warmup_steps: int = 0, start: float = 0.0
) -> float:
    """A straight line from `start` to `base` over the warm-up steps, both ends included, then half a cosine to `final`.

    `base` is met twice: at the last warm-up step and at the first after it. The last step, `total_steps - 1`, is one
    before `final` is reached (facebookresearch/dino, `cosine_scheduler`).
    """
    if step < warmup_steps:
        return start + (base - start) * step / max(warmup_steps - 1, 1)
    return cosine_value(step - warmup_steps, total_steps - warmup_steps, base, final)


def warmup_cosine(
    optimizer: Optimizer, *, total_steps: int, warmup_steps: int = 0, final_factor: float = 0.0
) -> LambdaLR:
    """The learning rate along `warmup_cosine_value`, from its base rate to `final_factor` times that."""
    return LambdaLR(optimizer, lambda step: warmup_cosine_value(step, total_steps, 1.0, final_factor, warmup_steps))


def decay_groups(module: nn.Module) -> list[dict[str, Any]]:
    """Two optimizer groups of the trainable parameters: those with weight decay, then biases and vectors without."""
    chosen = [(name, value) for name, value in module.named_parameters() if value.requires_grad]
    kept = [value for name, value in chosen if name.endswith(".bias") or value.ndim == 1]
    free = {id(value) for value in kept}
    decayed = [value for _, value in chosen if id(value) not in free]
    return [{"params": decayed}, {"params": kept, "weight_decay": 0.0}]


def set_weight_decay(optimizer: Optimizer, value: float) -> None:
    """Weight decay of the first group of `decay_groups`; the second keeps none."""
    optimizer.param_groups[0]["weight_decay"] = value


def clip_each(parameters: Iterable[nn.Parameter], max_norm: float) -> None:
    """Scale EACH parameter's gradient to at most this norm by itself: g <- g * min(1, max_norm / (|g| + 1e-6))."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if gradients:
        factors = [(max_norm / (norm + 1e-6)).clamp(max=1.0) for norm in torch._foreach_norm(gradients)]
        torch._foreach_mul_(gradients, factors)
