"""Momentum copies: what they average, what they leave alone."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from reprise.nn.ema import momentum_copy, update_momentum


def test_parameters_move_and_statistics_do_not() -> None:
    source = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    target = momentum_copy(source)
    assert not any(parameter.requires_grad for parameter in target.parameters())
    before = [parameter.clone() for parameter in target.parameters()]
    with torch.no_grad():
        for parameter in source.parameters():
            parameter.add_(torch.randn_like(parameter))
        source(torch.randn(8, 3))
    update_momentum(target, source, 0.9)
    for old, new, now in zip(before, source.parameters(), target.parameters(), strict=True):
        torch.testing.assert_close(now, 0.9 * old + 0.1 * new)
    assert torch.equal(target[1].running_mean, torch.zeros(2))


def test_different_networks_are_refused() -> None:
    with pytest.raises(ValueError, match="weight"):
        update_momentum(nn.Linear(2, 2, bias=False), nn.Sequential(nn.Linear(2, 2, bias=False)), 0.5)
