"""The running average of checkpoints equals the mean of the saved weights, and survives a resume."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from reprise.training.averaging import CheckpointAverage
from reprise.training.schedules import noam, noam_rate


def trained(step: int) -> nn.Module:
    torch.manual_seed(step)
    return nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))


def test_mean_of_the_last_snapshots() -> None:
    average = CheckpointAverage(trained(0), last=3, every=4, total_steps=20)
    assert average.current(trained(7)) is not average.model
    for step in range(1, 21):
        average.update(trained(step), step)
    expected = torch.stack([trained(step)[0].weight for step in (12, 16, 20)]).mean(0)
    assert torch.allclose(average.model[0].weight, expected, atol=1e-6)
    assert int(average.count) == 3
    assert average.current(trained(7)) is average.model


def test_a_resumed_average_is_the_same_to_the_bit() -> None:
    whole, first = (CheckpointAverage(trained(0), last=3, every=2, total_steps=10) for _ in range(2))
    for step in range(1, 11):
        whole.update(trained(step), step)
    for step in range(1, 8):
        first.update(trained(step), step)
    second = CheckpointAverage(trained(99), last=3, every=2, total_steps=10)
    second.load_state_dict(first.state_dict())
    for step in range(8, 11):
        second.update(trained(step), step)
    for name, tensor in whole.state_dict().items():
        assert torch.equal(second.state_dict()[name], tensor), name


def test_nothing_to_average() -> None:
    with pytest.raises(ValueError, match="0 snapshots"):
        CheckpointAverage(trained(0), last=0, every=1, total_steps=5)


def test_noam_counts_from_one_and_peaks_at_the_warm_up() -> None:
    assert noam_rate(0, 512, 4000) == 0
    assert noam_rate(4000, 512, 4000) == pytest.approx(6.99e-4, rel=1e-3)
    assert noam_rate(4000, 1024, 4000) == pytest.approx(4.94e-4, rel=1e-3)
    optimizer = torch.optim.Adam([nn.Parameter(torch.zeros(1))], lr=2.0)
    schedule = noam(optimizer, dim=16, warmup_steps=3)
    rates = []
    for _ in range(6):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert rates == pytest.approx([2 * noam_rate(number, 16, 3) for number in range(1, 7)])
    assert max(rates) == rates[2]
