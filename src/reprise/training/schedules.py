"""Learning-rate schedules as factors of the base rate, stepped once per training step (step counted from 0)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR


def warmup_factor(step: int, warmup_steps: int) -> float:
    """min(1, step / warmup_steps); 1 without a warm-up. The first step of a warm-up has rate 0."""
    return min(1.0, step / warmup_steps) if warmup_steps else 1.0


def constant(optimizer: Optimizer, *, warmup_steps: int = 0) -> LambdaLR:
    """The base rate after an optional linear warm-up."""
    return LambdaLR(optimizer, lambda step: warmup_factor(step, warmup_steps))


def cosine(optimizer: Optimizer, *, total_steps: int, warmup_steps: int = 0, final_factor: float = 0.0) -> LambdaLR:
    """Half a cosine from 1 to `final_factor` over the steps after the warm-up, times the warm-up factor."""

    def shape(progress: float) -> float:
        return final_factor + (1 - final_factor) * 0.5 * (1 + math.cos(math.pi * progress))

    return LambdaLR(optimizer, _after_warmup(shape, total_steps, warmup_steps))


def epoch_cosine(optimizer: Optimizer, *, total_steps: int, steps_per_epoch: int) -> LambdaLR:
    """Half a cosine from 1 that moves only at the start of an epoch, so that it never reaches 0."""

    def factor(step: int) -> float:
        return 0.5 * (1 + math.cos(math.pi * (step // steps_per_epoch) * steps_per_epoch / total_steps))

    return LambdaLR(optimizer, factor)


def linear(optimizer: Optimizer, *, total_steps: int, warmup_steps: int = 0, final_factor: float = 0.0) -> LambdaLR:
    """A straight line from 1 to `final_factor` over the steps after the warm-up, times the warm-up factor."""
    return LambdaLR(
        optimizer, _after_warmup(lambda progress: 1 + (final_factor - 1) * progress, total_steps, warmup_steps)
    )


def step(optimizer: Optimizer, *, milestones: Sequence[int], gamma: float = 0.1, warmup_steps: int = 0) -> LambdaLR:
    """The base rate times `gamma` for every milestone (in steps) that has been reached, times the warm-up factor."""

    def factor(step: int) -> float:
        return warmup_factor(step, warmup_steps) * gamma ** sum(step >= milestone for milestone in milestones)

    return LambdaLR(optimizer, factor)


def noam_rate(number: int, dim: int, warmup_steps: int) -> float:
    """dim^-0.5 * min(number^-0.5, number * warmup_steps^-1.5) (1706.03762, equation 3); updates are counted from 1.

    0 for `number` 0; without a warm-up dim^-0.5 * number^-0.5.
    """
    if number == 0:
        return 0.0
    rise = number * warmup_steps**-1.5 if warmup_steps else math.inf
    return dim**-0.5 * min(number**-0.5, rise)


def noam(optimizer: Optimizer, *, dim: int, warmup_steps: int) -> LambdaLR:
    """The Transformer's schedule: its base rate (the paper: 1) times `noam_rate` for a model of width `dim`."""
    return LambdaLR(optimizer, lambda step: noam_rate(step + 1, dim, warmup_steps))


def cosine_value(step: int, total_steps: int, start: float, end: float) -> float:
    """Half a cosine from `start` at step 0 to `end` at `total_steps`, e.g. of a momentum or a weight decay."""
    progress = min(max(step / max(total_steps, 1), 0.0), 1.0)
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * progress))


def _after_warmup(shape: Callable[[float], float], total_steps: int, warmup_steps: int) -> Callable[[int], float]:
    span = max(total_steps - warmup_steps, 1)

    def factor(step: int) -> float:
        progress = min(max((step - warmup_steps) / span, 0.0), 1.0)
        return shape(progress) * warmup_factor(step, warmup_steps)

    return factor
