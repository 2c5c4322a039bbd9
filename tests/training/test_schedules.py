"""Schedules at their corners, and against torch's own where it has the same."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch.optim import SGD
from torch.optim.lr_scheduler import CosineAnnealingLR, LRScheduler, MultiStepLR

from reprise.training import schedules


def rates(make: Callable[[SGD], LRScheduler], steps: int) -> list[float]:
    optimizer = SGD([torch.zeros(1, requires_grad=True)], lr=2.0)
    schedule = make(optimizer)
    seen = []
    for _ in range(steps):
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return seen


def test_cosine_is_torch_s_without_warmup() -> None:
    ours = rates(lambda o: schedules.cosine(o, total_steps=20), 20)
    assert ours == pytest.approx(rates(lambda o: CosineAnnealingLR(o, 20), 20))


def test_step_is_torch_s_multistep() -> None:
    ours = rates(lambda o: schedules.step(o, milestones=[3, 7], gamma=0.1), 10)
    assert ours == pytest.approx(rates(lambda o: MultiStepLR(o, [3, 7], gamma=0.1), 10))


@pytest.mark.parametrize("shape", [schedules.cosine, schedules.linear])
def test_warmup_starts_at_zero_and_reaches_the_base_rate(shape: Callable[..., LRScheduler]) -> None:
    ours = rates(lambda o: shape(o, total_steps=30, warmup_steps=10, final_factor=0.1), 31)
    assert ours[0] == 0
    assert ours[5] == pytest.approx(1.0)
    assert ours[10] == pytest.approx(2.0)
    assert ours[30] == pytest.approx(0.2)


def test_linear_is_a_straight_line() -> None:
    ours = rates(lambda o: schedules.linear(o, total_steps=10), 10)
    assert ours == pytest.approx([2.0 * (1 - step / 10) for step in range(10)])


def test_constant() -> None:
    assert rates(lambda o: schedules.constant(o, warmup_steps=2), 4) == pytest.approx([0, 1, 2, 2])
