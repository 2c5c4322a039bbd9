"""Beam search over any step function, with the length penalty of GNMT (1609.08144, equation 14).

The behaviour is that of tensor2tensor's `beam_search`, which the Transformer was evaluated with: the best unfinished
and the best finished hypotheses are kept apart, and the search of a batch ends when no unfinished hypothesis of any
entry can still win.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

WORST = 1.0e7  # minus this is the score of a place that no hypothesis has taken
UNFILLED = -1  # ids of such a place

State = Mapping[str, Tensor]


class Step(Protocol):
    """One step of a decoder for N = batch * beam hypotheses."""

    def __call__(self, last: Tensor, position: int, state: State) -> tuple[Tensor, State]:
        """Logits [N, V] of the next symbol, and the new state.

        Args:
            last: the last symbols, int64 [N]; hypotheses of one batch entry are neighbours.
            position: how many symbols have been generated.
            state: tensors whose first dimension is N; they follow their hypotheses.
        """
        ...


@dataclass(frozen=True)
class Beams:
    """What a beam search found, best first.

    Attributes:
        sequences: int64 [B, beam, 1 + generated], beginning with the start symbol and padded with 0 after the end; -1
            in places that no hypothesis has taken.
        scores: float [B, beam]: log-probability over length penalty. Where no hypothesis of an entry has ended, its
            unfinished ones are returned with their plain log-probabilities.
    """

    sequences: Tensor
    scores: Tensor

    def best(self) -> Tensor:
        """The best hypothesis of each entry without its start symbol, [B, generated]."""
        return self.sequences[:, 0, 1:]


def length_penalty(length: int, alpha: float) -> float:
    """lp = ((5 + length) / 6) ^ alpha; the length counts the end symbol."""
    return ((5.0 + length) / 6.0) ** alpha


@torch.no_grad()
def beam_search(
    step: Step,
    state: State,
    batch_size: int,
    *,
    beam_size: int,
    max_length: int,
    alpha: float,
    start: int = 0,
    end: int = 1,
    stop_early: bool = True,
    device: torch.device | None = None,
) -> Beams:
    """The best hypotheses for each entry of a batch.

    Args:
        step: the decoder, see `Step`; `state` is its state before the first symbol.
        max_length: most symbols to generate, the end symbol included.
        alpha: exponent of the length penalty (the paper: 0.6); 0 is plain log-probability.
        stop_early: end when the best finished hypothesis of every entry beats what its best unfinished one can still
            reach; else when the worst finished one of the whole batch does.
    """
    alive = _Hypotheses.first(batch_size, beam_size, start, device)
    ended = _Hypotheses.none(batch_size, beam_size, start, device)
    last = alive.sequences[:, :, -1]
    for position in range(max_length):
        logits, state = step(last.flatten(), position, state)
        grown, parents = _grow(alive, logits.float(), length_penalty(position + 1, alpha))
        finished = grown.sequences[:, :, -1] == end
        alive, kept = grown.top(beam_size, ~finished)
        ended = ended.padded().joined(grown).top(beam_size, torch.cat([ended.filled, finished], dim=1))[0]
        rows = parents.gather(1, kept) + beam_size * torch.arange(batch_size, device=kept.device).unsqueeze(1)
        state = {name: tensor.index_select(0, rows.flatten()) for name, tensor in state.items()}
        last = alive.sequences[:, :, -1]
        if _is_decided(alive, ended, length_penalty(max_length, alpha), stop_early):
            break
    return _result(alive, ended)


@dataclass(frozen=True)
class _Hypotheses:
    """Sequences int64 [B, K, T] with plain and penalised log-probabilities [B, K], and which places are taken."""

    sequences: Tensor
    log_probs: Tensor
    scores: Tensor
    filled: Tensor

    @staticmethod
    def first(batch: int, beam: int, start: int, device: torch.device | None) -> _Hypotheses:
        """One hypothesis, the start symbol; its copies are so improbable that they are never extended."""
        log_probs = torch.full((batch, beam), -WORST, device=device)
        log_probs[:, 0] = 0.0
        sequences = torch.full((batch, beam, 1), start, device=device)
        return _Hypotheses(sequences, log_probs, log_probs, torch.ones_like(log_probs, dtype=torch.bool))

    @staticmethod
    def none(batch: int, beam: int, start: int, device: torch.device | None) -> _Hypotheses:
        scores = torch.full((batch, beam), -WORST, device=device)
        sequences = torch.full((batch, beam, 1), start, device=device)
        return _Hypotheses(sequences, scores, scores, torch.zeros_like(scores, dtype=torch.bool))

    def padded(self) -> _Hypotheses:
        longer = torch.cat([self.sequences, torch.zeros_like(self.sequences[:, :, :1])], dim=2)
        return _Hypotheses(longer, self.log_probs, self.scores, self.filled)

    def joined(self, other: _Hypotheses) -> _Hypotheses:
        return _Hypotheses(
            torch.cat([self.sequences, other.sequences], dim=1),
            torch.cat([self.log_probs, other.log_probs], dim=1),
            torch.cat([self.scores, other.scores], dim=1),
            torch.cat([self.filled, other.filled], dim=1),
        )

    def top(self, count: int, wanted: Tensor) -> tuple[_Hypotheses, Tensor]:
        """The `count` best of the `wanted` [B, K], best first, earlier ones first among equals; and their places."""
        key = self.scores - WORST * (~wanted).float()
        place = key.sort(dim=1, descending=True, stable=True).indices[:, :count]
        sequences = self.sequences.gather(1, place.unsqueeze(-1).expand(-1, -1, self.sequences.shape[-1]))
        chosen = [tensor.gather(1, place) for tensor in (self.log_probs, key, wanted)]
        return _Hypotheses(sequences, *chosen), place


def _grow(alive: _Hypotheses, logits: Tensor, penalty: float) -> tuple[_Hypotheses, Tensor]:
    """The 2 * beam best extensions of each entry by penalised score, and the beams they extend."""
    batch, beam, length = alive.sequences.shape
    vocabulary = logits.shape[-1]
    log_probs = logits.log_softmax(-1).view(batch, beam, vocabulary) + alive.log_probs.unsqueeze(-1)
    scores, place = (log_probs.flatten(1) / penalty).topk(min(2 * beam, beam * vocabulary), dim=1)
    parents, symbols = place.div(vocabulary, rounding_mode="floor"), place % vocabulary
    before = alive.sequences.gather(1, parents.unsqueeze(-1).expand(-1, -1, length))
    sequences = torch.cat([before, symbols.unsqueeze(-1)], dim=2)
    return _Hypotheses(sequences, scores * penalty, scores, torch.ones_like(symbols, dtype=torch.bool)), parents


def _is_decided(alive: _Hypotheses, ended: _Hypotheses, last_penalty: float, stop_early: bool) -> bool:
    """Whether no unfinished hypothesis can pass the finished ones; its bound is its score at the greatest length."""
    reachable = alive.log_probs[:, 0] / last_penalty
    reached = ended.scores.amax(1) if stop_early else ended.scores.min()
    return bool((reached > reachable).all())


def _result(alive: _Hypotheses, ended: _Hypotheses) -> Beams:
    empty = ~ended.filled | (ended.log_probs < -WORST / 2)  # also copies of the start that ended at once
    sequences = ended.sequences.masked_fill(empty.unsqueeze(-1), UNFILLED)
    scores = ended.scores.masked_fill(empty, -WORST)
    any_ended = ended.filled.any(1, keepdim=True)
    return Beams(
        torch.where(any_ended.unsqueeze(-1), sequences, alive.sequences),
        torch.where(any_ended, scores, alive.log_probs),
    )
