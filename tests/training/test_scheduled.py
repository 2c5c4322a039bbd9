"""Schedules, weight decay and clipping as DINO does them."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from reprise.training.scheduled import clip_each, decay_groups, set_weight_decay, warmup_cosine, warmup_cosine_value


@pytest.mark.parametrize("warmup", [0, 1, 10])
def test_values_are_a_line_and_half_a_cosine(warmup: int) -> None:
    found = [warmup_cosine_value(step, 40, 0.5, 0.1, warmup) for step in range(40)]
    rest = np.arange(40 - warmup)
    cosine = 0.1 + 0.2 * (1 + np.cos(math.pi * rest / len(rest)))
    line = np.linspace(0, 0.5, warmup) if warmup > 1 else np.zeros(warmup)
    np.testing.assert_allclose(found, np.concatenate([line, cosine]))


def test_the_rate_follows_the_values() -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=2.0)
    schedule = warmup_cosine(optimizer, total_steps=10, warmup_steps=3, final_factor=0.1)
    for step in range(10):
        expected = warmup_cosine_value(step, 10, 2.0, 0.2, 3)
        assert optimizer.param_groups[0]["lr"] == pytest.approx(expected)
        optimizer.step()
        schedule.step()


def test_biases_and_vectors_have_no_weight_decay() -> None:
    module = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4))
    module[0].weight.requires_grad_(False)
    module.token = nn.Parameter(torch.zeros(1, 1, 4))
    groups = decay_groups(module)
    assert [value.shape for value in groups[0]["params"]] == [module.token.shape]
    assert len(groups[1]["params"]) == 3
    optimizer = torch.optim.AdamW(groups, weight_decay=0.1)
    set_weight_decay(optimizer, 0.3)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.3, 0.0]


def test_each_gradient_is_clipped_by_itself() -> None:
    small, large, none = (nn.Parameter(torch.zeros(4)) for _ in range(3))
    small.grad, large.grad = torch.full((4,), 0.1), torch.full((4,), 10.0)
    clip_each([small, large, none], 3.0)
    assert torch.equal(small.grad, torch.full((4,), 0.1))
    assert float(large.grad.norm()) == pytest.approx(3.0, rel=1e-5)
    assert none.grad is None
