"""Beam search against exhaustive search, the length penalty, its ends, and the bookkeeping of states."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from reprise.training.beam import UNFILLED, State, Step, beam_search, length_penalty

END = 1


def table_step(table: Tensor, beam: int) -> Step:
    entry = torch.arange(len(table)).repeat_interleave(beam)

    def step(last: Tensor, position: int, state: State) -> tuple[Tensor, State]:
        return table[entry, position, last], state

    return step


def exhaustive(table: Tensor, alpha: float) -> tuple[list[int], float]:
    """The best of ALL finished hypotheses of one entry, table [T, V, V]."""
    log_probs = table.log_softmax(-1)
    length, vocabulary = table.shape[:2]
    best: tuple[list[int], float] = ([], -float("inf"))
    for count in range(1, length + 1):
        others = [symbol for symbol in range(vocabulary) if symbol != END]
        for words in itertools.product(others, repeat=count - 1):
            ids = [*words, END]
            before = [0, *ids[:-1]]
            total = sum(log_probs[t, a, b].item() for t, (a, b) in enumerate(zip(before, ids, strict=True)))
            score = total / length_penalty(count, alpha)
            if score > best[1]:
                best = (ids, score)
    return best


@pytest.mark.parametrize("alpha", [0.0, 0.6, 1.0])
def test_a_wide_beam_finds_the_best_of_all(alpha: float) -> None:
    table = torch.randn(3, 4, 4, 4) * 1.5
    found = beam_search(table_step(table, 40), {}, 3, beam_size=40, max_length=4, alpha=alpha, stop_early=False)
    for entry in range(3):
        ids, score = exhaustive(table[entry], alpha)
        assert found.scores[entry, 0].item() == pytest.approx(score, abs=1e-4)
        assert found.best()[entry].tolist()[: len(ids)] == ids


def test_longer_hypotheses_win_with_a_penalty() -> None:
    """END at once has log-probability -1.2; three symbols have -0.5 each."""
    table = torch.full((1, 3, 3, 3), -30.0)
    table[0, 0, 0] = torch.tensor([-30.0, -1.2, -0.3585])
    table[0, 1, 2] = torch.tensor([-30.0, -30.0, -0.5])
    table[0, 2, 2] = torch.tensor([-30.0, 0.0, -30.0])

    def best(alpha: float) -> list[int]:
        found = beam_search(table_step(table, 2), {}, 1, beam_size=2, max_length=3, alpha=alpha)
        return found.best()[0].tolist()

    assert best(0.0)[0] in (END, 2)
    assert best(1.0) == [2, 2, END]


def test_nothing_ends_within_the_length() -> None:
    table = torch.zeros(2, 3, 8, 8)
    table[..., END] = -100.0
    found = beam_search(table_step(table, 2), {}, 2, beam_size=2, max_length=3, alpha=0.6)
    assert found.sequences.shape == (2, 2, 4)
    assert not (found.sequences == END).any()


def test_places_without_a_hypothesis_are_marked() -> None:
    table = torch.full((1, 2, 3, 3), -1.0e4)
    table[..., END] = 0.0
    found = beam_search(table_step(table, 2), {}, 1, beam_size=2, max_length=1, alpha=0.6)
    assert found.sequences[0, 0].tolist() == [0, END]
    assert (found.sequences[0, 1] == UNFILLED).all()


def test_states_follow_their_hypotheses() -> None:
    """A state that records every symbol must end up equal to the sequence."""
    torch.manual_seed(3)
    table, beam = torch.randn(2, 5, 8, 8), 3
    table[..., END] = -50.0
    entry = torch.arange(2).repeat_interleave(beam)
    seen: list[tuple[Tensor, Tensor]] = []

    def step(last: Tensor, position: int, state: State) -> tuple[Tensor, State]:
        history = torch.cat([state["history"], last.unsqueeze(1)], dim=1)
        seen.append((history, last))
        if position:
            for row in range(len(last)):  # each history must be one that its entry's beams could have
                assert history[row, -1] == last[row]
        return table[entry, position, last], {"history": history}

    start = {"history": torch.zeros(2 * beam, 0, dtype=torch.int64)}
    found = beam_search(step, start, 2, beam_size=beam, max_length=5, alpha=0.0)
    histories = seen[-1][0].view(2, beam, -1)
    for entry_number in range(2):
        known = {tuple(history.tolist()) for history in histories[entry_number]}
        assert {tuple(words[:-1].tolist()) for words in found.sequences[entry_number]} <= known
