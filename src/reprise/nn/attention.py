"""Scaled dot-product attention with several heads (Attention Is All You Need, 1706.03762, section 3.2).

Masks are bool and True where a query MAY look (the meaning of `scaled_dot_product_attention`, not that of
`nn.MultiheadAttention`). They act on the logits, as a large negative number: a query that may look nowhere averages
over all keys instead of turning into NaN.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def causal_mask(length: int, device: torch.device | None = None) -> Tensor:
    """Bool [length, length]: query q may look at keys 0 .. q."""
    return torch.ones(length, length, dtype=torch.bool, device=device).tril()


def additive_mask(allowed: Tensor, dtype: torch.dtype) -> Tensor:
    """0 where `allowed` and half the most negative number of `dtype` elsewhere; for adding to logits."""
    return torch.zeros(allowed.shape, dtype=dtype, device=allowed.device).masked_fill(
        ~allowed, torch.finfo(dtype).min / 2
    )


class MultiHeadAttention(nn.Module):
    """MultiHead(Q, K, V) = Concat(head_1, ..., head_h) W^O, head_i = softmax(Q_i K_i^T / sqrt(d_k)) V_i.

    Heads are consecutive blocks of the projected channels.

    Args:
        dim: width of queries, memory and output.
        num_heads: h.
        key_dim, value_dim: d_k and d_v, channels of a head; None: dim / num_heads.
        bias: biases in the four projections (the paper has none).
        dropout: of the attention weights (the paper has none).
        scaled: divide the logits by sqrt(d_k).

    Raises:
        ValueError: `dim` is not a multiple of `num_heads` and d_k or d_v is not given.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        key_dim: int | None = None,
        value_dim: int | None = None,
        bias: bool = False,
        dropout: float = 0.0,
        scaled: bool = True,
    ) -> None:
        super().__init__()
        if dim % num_heads and None in (key_dim, value_dim):
            raise ValueError(f"a width of {dim} cannot be split over {num_heads} heads; give key_dim and value_dim")
        self.num_heads, self.dropout = num_heads, dropout
        self.key_dim = dim // num_heads if key_dim is None else key_dim
        self.value_dim = dim // num_heads if value_dim is None else value_dim
        self.scale = 1 / math.sqrt(self.key_dim) if scaled else 1.0
        self.query = nn.Linear(dim, num_heads * self.key_dim, bias=bias)
        self.key = nn.Linear(dim, num_heads * self.key_dim, bias=bias)
        self.value = nn.Linear(dim, num_heads * self.value_dim, bias=bias)
        self.output = nn.Linear(num_heads * self.value_dim, dim, bias=bias)

    def forward(self, query: Tensor, memory: Tensor, allowed: Tensor | None = None) -> Tensor:
        """Attention of queries over a memory (the same tensor for self-attention).

        Args:
            query: [B, L, dim]. memory: [B, S, dim].
            allowed: bool, broadcastable to [B, h, L, S], or None for everything.

        Returns:
            [B, L, dim].
        """
        return self.attend(query, *self.keys_and_values(memory), allowed)

    def keys_and_values(self, memory: Tensor) -> tuple[Tensor, Tensor]:
        """Projected memory [B, S, dim] as [B, h, S, d_k] and [B, h, S, d_v]; what step-by-step decoding keeps."""
        return self._split(self.key(memory)), self._split(self.value(memory))

    def attend(self, query: Tensor, key: Tensor, value: Tensor, allowed: Tensor | None = None) -> Tensor:
        """`forward` from projected keys and values."""
        query = self._split(self.query(query))
        mask = None if allowed is None else additive_mask(allowed, query.dtype)
        heads = F.scaled_dot_product_attention(
            query, key, value, mask, dropout_p=self.dropout if self.training else 0.0, scale=self.scale
        )
        return self.output(heads.transpose(1, 2).flatten(2))

    def weights(self, query: Tensor, memory: Tensor, allowed: Tensor | None = None) -> Tensor:
        """The attention weights that `forward` uses (without dropout), [B, h, L, S]."""
        logits = self._split(self.query(query)) @ self._split(self.key(memory)).transpose(-1, -2) * self.scale
        if allowed is not None:
            logits = logits + additive_mask(allowed, logits.dtype)
        return logits.softmax(-1)

    def _split(self, projected: Tensor) -> Tensor:
        return projected.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
