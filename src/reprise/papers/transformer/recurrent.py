"""The network that the Transformer replaced: a recurrent encoder-decoder with additive attention (1409.0473).

Encoder: a bidirectional GRU. Decoder: a GRU whose input at each step is the last symbol and the context that its
previous state attends to, so training has to walk along the target. Interface and ids are those of `model.Transformer`.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reprise.papers.transformer.model import PAD, shift_right
from reprise.training.beam import State, Step


class AdditiveAttention(nn.Module):
    """Weights softmax_s v . tanh(W query + U memory_s) over a memory (1409.0473, appendix A.1.2)."""

    def __init__(self, query_dim: int, memory_dim: int, dim: int) -> None:
        super().__init__()
        self.query = nn.Linear(query_dim, dim)
        self.memory = nn.Linear(memory_dim, dim, bias=False)
        self.energy = nn.Linear(dim, 1, bias=False)

    def forward(self, query: Tensor, memory: Tensor, keys: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Context [B, memory_dim] and weights [B, S].

        Args:
            query: [B, query_dim]. memory: [B, S, memory_dim], and `keys` [B, S, dim] its projection `self.memory`.
            mask: [B, S], 0 or a large negative number to add to the energies.
        """
        energy = self.energy(torch.tanh(self.query(query).unsqueeze(1) + keys)).squeeze(-1)
        weights = (energy + mask).softmax(-1)
        return torch.bmm(weights.unsqueeze(1), memory).squeeze(1), weights


class RecurrentSeq2Seq(nn.Module):
    """GRU encoder-decoder with additive attention, or without: then every step sees the last encoder state.

    Args:
        vocab_size: V, of source and target alike; one matrix for both embeddings and the output.
        dim: width of embeddings.
        state_dim: of the decoder's state; each direction of the encoder has half of it.
        attention: False for the encoder-decoder of 1406.1078.
        dropout: of embeddings, the encoder's output and the read-out.
    """

    def __init__(
        self, vocab_size: int, *, dim: int, state_dim: int, attention: bool = True, dropout: float = 0.1
    ) -> None:
        super().__init__()
        if state_dim % 2:
            raise ValueError(f"state_dim must be even for two directions, not {state_dim}")
        self.vocab_size, self.dim = vocab_size, dim
        self.embedding = nn.Parameter(torch.randn(vocab_size, dim) * dim**-0.5)
        self.forward_gru = nn.GRU(dim, state_dim // 2, batch_first=True)
        self.backward_gru = nn.GRU(dim, state_dim // 2, batch_first=True)
        self.first_state = nn.Linear(state_dim // 2, state_dim)
        self.attention = AdditiveAttention(state_dim, state_dim, state_dim) if attention else None
        self.cell = nn.GRUCell(dim + state_dim, state_dim)
        self.readout = nn.Linear(dim + 2 * state_dim, dim)
        self.dropout = nn.Dropout(dropout)

    def embed(self, ids: Tensor) -> Tensor:
        """Embeddings times sqrt(d), zero at padding, [B, L] to [B, L, dim]."""
        return F.embedding(ids, self.embedding) * math.sqrt(self.dim) * (ids != PAD).unsqueeze(-1)

    def encode(self, source: Tensor) -> tuple[Tensor, Tensor]:
        """Annotations [B, S, state_dim] and the decoder's first state [B, state_dim].

        The backward direction reads each sentence from its own end, so padding changes nothing.
        """
        embedded = self.dropout(self.embed(source))
        length = (source != PAD).sum(1, keepdim=True)
        place = torch.arange(source.shape[1], device=source.device)
        mirror = torch.where(place < length, length - 1 - place, place)
        ahead, _ = self.forward_gru(embedded)
        back, _ = self.backward_gru(_take(embedded, mirror))
        memory = torch.cat([ahead, _take(back, mirror)], dim=-1)
        return self.dropout(memory), torch.tanh(self.first_state(_take(back, length.clamp(min=1) - 1).squeeze(1)))

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        """Logits [B, T, V] under teacher forcing; row t predicts target[:, t]."""
        memory, state = self.encode(source)
        keys, mask = self._attended(memory, source)
        inputs = shift_right(self.dropout(self.embed(target)))
        states, contexts = [], []
        for symbol in inputs.unbind(1):
            context = self._context(state, memory, keys, mask)
            state = self.cell(torch.cat([symbol, context], dim=-1), state)
            states.append(state)
            contexts.append(context)
        return self._logits(inputs, torch.stack(states, dim=1), torch.stack(contexts, dim=1))

    def begin(self, source: Tensor, beam_size: int) -> tuple[Step, State]:
        """The step function of a beam search over sources [B, S], and the decoder's first state."""
        memory, first = (part.repeat_interleave(beam_size, 0) for part in self.encode(source))
        keys, mask = self._attended(memory, source.repeat_interleave(beam_size, 0))

        def step(last: Tensor, position: int, state: State) -> tuple[Tensor, State]:
            symbol = self.embed(last)
            context = self._context(state["state"], memory, keys, mask)
            after = self.cell(torch.cat([symbol, context], dim=-1), state["state"])
            return self._logits(symbol, after, context), {"state": after}

        return step, {"state": first}

    def _attended(self, memory: Tensor, source: Tensor) -> tuple[Tensor, Tensor]:
        """Projected memory, and the mask; without attention the memory's place is taken by its end."""
        mask = torch.zeros_like(source, dtype=memory.dtype).masked_fill(
            source == PAD, torch.finfo(memory.dtype).min / 2
        )
        if self.attention is not None:
            return self.attention.memory(memory), mask
        length = (source != PAD).sum(1, keepdim=True)
        return _take(memory, length.clamp(min=1) - 1), mask

    def _context(self, state: Tensor, memory: Tensor, keys: Tensor, mask: Tensor) -> Tensor:
        if self.attention is None:
            return keys.squeeze(1)
        return self.attention(state, memory, keys, mask)[0]

    def _logits(self, symbol: Tensor, state: Tensor, context: Tensor) -> Tensor:
        """A deep output (1312.6026): a tanh layer on symbol, state and context, then the embedding matrix."""
        read = torch.tanh(self.readout(torch.cat([symbol, state, context], dim=-1)))
        return F.linear(self.dropout(read), self.embedding)


def _take(sequence: Tensor, place: Tensor) -> Tensor:
    """Rows of [B, L, D] at places int64 [B, M], [B, M, D]."""
    return sequence.gather(1, place.unsqueeze(-1).expand(-1, -1, sequence.shape[-1]))
