"""Ranks agree on stopping and on checkpoints about once a second, not at every step."""

from __future__ import annotations

import signal
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
from torch import Tensor

from reprise.training import interrupt
from reprise.training.checkpoint import ExactCheckpoint
from reprise.training.interrupt import MOST_STEPS, StopBetweenSteps, StopRequest


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(interrupt, "time", clock)
    return clock


def two_ranks(asked: list[list[float]]) -> Any:
    """A trainer whose other rank never wants anything."""

    def reduce(facts: Tensor, reduce_op: str) -> Tensor:
        asked.append(facts.tolist())
        return facts

    return SimpleNamespace(
        world_size=2, is_global_zero=True, strategy=SimpleNamespace(reduce=reduce, root_device="cpu")
    )


@pytest.mark.parametrize(("pace", "expected"), [(10, 10), (0.2, 1), (1e6, MOST_STEPS)])
def test_ranks_ask_each_other_about_once_a_second(clock: Clock, pace: float, expected: int) -> None:
    asked: list[list[float]] = []
    trainer, stop = two_ranks(asked), StopBetweenSteps(StopRequest(), None)
    at = []
    for step in range(3 * expected + 2):
        before = len(asked)
        assert stop._agreed(trainer, step) is None
        at += [step] if len(asked) > before else []
        clock.now += 1 / pace
    assert at[:2] == [0, 1]
    assert max(later - earlier for earlier, later in pairwise(at)) <= expected
    assert len(at) <= 6 if expected > 1 else len(at) == 5


def test_a_signal_and_a_due_checkpoint_travel_in_one_message(clock: Clock) -> None:
    asked: list[list[float]] = []
    checkpoint, request = ExactCheckpoint(every_seconds=0.0), StopRequest()
    stop, trainer = StopBetweenSteps(request, checkpoint), two_ranks(asked)
    assert stop._agreed(trainer, 0) is None
    assert checkpoint.agreed
    request.signal = signal.SIGTERM
    assert stop._agreed(trainer, 1) == signal.SIGTERM
    assert [row[:2] for row in asked] == [[0.0, 1.0], [float(signal.SIGTERM), 1.0]]
