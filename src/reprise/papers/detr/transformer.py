"""DETR's transformer (paper section 3.2, appendix A.3): positions at every attention, decoding in parallel.

Legend: B images, S = H*W feature cells, Q queries, L decoder layers, D width. Positions are added to queries and
keys, never to values. `positions` says where the spatial ones go:
    attention  queries and keys of every encoder layer, keys of every cross-attention (the paper's default)
    decoder    only the keys of the cross-attentions
    input      added once to the encoder's input
    none       nowhere
and `query_positions` where the object queries go: `attention` (queries and keys of every decoder self-attention and
queries of every cross-attention; the decoder's input is zero) or `input` (they are the decoder's input).
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

SpatialPositions = Literal["attention", "decoder", "input", "none"]
QueryPositions = Literal["attention", "input"]


def _with(x: Tensor, position: Tensor | None) -> Tensor:
    return x if position is None else x + position


class _Layer(nn.Module):
    """What both kinds of layers share: two linear maps with ReLU and dropout between them."""

    linear1: nn.Linear
    linear2: nn.Linear
    dropout: nn.Dropout

    def feed_forward(self, x: Tensor) -> Tensor:
        return self.linear2(self.dropout(torch.relu(self.linear1(x))))


class EncoderLayer(_Layer):
    """Self-attention and a feed-forward network, each in a residual branch with layer norm after or before it."""

    def __init__(self, dim: int, num_heads: int, dim_feedforward: int, dropout: float, *, pre_norm: bool) -> None:
        super().__init__()
        self.pre_norm = pre_norm
        self.self_attn = nn.MultiheadAttention(dim, num_heads, dropout=dropout, batch_first=True)
        self.linear1, self.linear2 = nn.Linear(dim, dim_feedforward), nn.Linear(dim_feedforward, dim)
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.dropout = nn.Dropout(dropout)

    def attend(self, x: Tensor, padding: Tensor | None, position: Tensor | None) -> Tensor:
        query = _with(x, position)
        return self.dropout(self.self_attn(query, query, x, key_padding_mask=padding, need_weights=False)[0])

    def forward(self, x: Tensor, padding: Tensor | None, position: Tensor | None) -> Tensor:
        """x [B, S, D], padding bool [B, S] or None, position [B, S, D] or None, to [B, S, D]."""
        if self.pre_norm:
            x = x + self.attend(self.norm1(x), padding, position)
            return x + self.dropout(self.feed_forward(self.norm2(x)))
        x = self.norm1(x + self.attend(x, padding, position))
        return self.norm2(x + self.dropout(self.feed_forward(x)))


class DecoderLayer(_Layer):
    """Self-attention among the queries, attention to the image, feed-forward; norms after or before each."""

    def __init__(self, dim: int, num_heads: int, dim_feedforward: int, dropout: float, *, pre_norm: bool) -> None:
        super().__init__()
        self.pre_norm = pre_norm
        self.self_attn = nn.MultiheadAttention(dim, num_heads, dropout=dropout, batch_first=True)
        self.multihead_attn = nn.MultiheadAttention(dim, num_heads, dropout=dropout, batch_first=True)
        self.linear1, self.linear2 = nn.Linear(dim, dim_feedforward), nn.Linear(dim_feedforward, dim)
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(dim) for _ in range(3))
        self.dropout = nn.Dropout(dropout)

    def attend_queries(self, x: Tensor, query_position: Tensor | None) -> Tensor:
        query = _with(x, query_position)
        return self.dropout(self.self_attn(query, query, x, need_weights=False)[0])

    def attend_image(
        self, x: Tensor, memory: Tensor, key: Tensor, padding: Tensor | None, query_position: Tensor | None
    ) -> Tensor:
        query = _with(x, query_position)
        return self.dropout(self.multihead_attn(query, key, memory, key_padding_mask=padding, need_weights=False)[0])

    def forward(
        self, x: Tensor, memory: Tensor, key: Tensor, padding: Tensor | None, query_position: Tensor | None
    ) -> Tensor:
        """One layer.

        Args:
            x: [B, Q, D].
            memory, key: values and keys of the cross-attention [B, S, D].
            padding: bool [B, S] or None.
            query_position: [B, Q, D] or None.
        """
        if self.pre_norm:
            x = x + self.attend_queries(self.norm1(x), query_position)
            x = x + self.attend_image(self.norm2(x), memory, key, padding, query_position)
            return x + self.dropout(self.feed_forward(self.norm3(x)))
        x = self.norm1(x + self.attend_queries(x, query_position))
        x = self.norm2(x + self.attend_image(x, memory, key, padding, query_position))
        return self.norm3(x + self.dropout(self.feed_forward(x)))


class Encoder(nn.Module):
    """Encoder layers; a last norm only with pre-norm layers."""

    def __init__(self, layers: list[EncoderLayer], norm: nn.LayerNorm | None) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.norm = norm

    def forward(self, x: Tensor, padding: Tensor | None, position: Tensor | None) -> Tensor:
        for layer in self.layers:
            x = layer(x, padding, position)
        return x if self.norm is None else self.norm(x)


class Decoder(nn.Module):
    """Decoder layers; one norm is shared by the outputs of all of them."""

    def __init__(self, layers: list[DecoderLayer], norm: nn.LayerNorm) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.norm = norm

    def attention_modules(self) -> list[nn.Module]:
        """The cross-attention of every layer."""
        return [layer.get_submodule("multihead_attn") for layer in self.layers]

    def forward(
        self, x: Tensor, memory: Tensor, key: Tensor, padding: Tensor | None, query_position: Tensor | None
    ) -> Tensor:
        """Normed outputs of every layer, [L, B, Q, D]."""
        outputs = []
        for layer in self.layers:
            x = layer(x, memory, key, padding, query_position)
            outputs.append(x)
        return self.norm(torch.stack(outputs))


class Transformer(nn.Module):
    """Encoder over the feature map, decoder over the object queries.

    Args:
        dim, num_heads, dim_feedforward, dropout: of every layer.
        encoder_layers, decoder_layers: how many.
        pre_norm: layer norm before each branch (and after the encoder) instead of after each sum.
        positions, query_positions: see the top of this file.
    """

    def __init__(
        self,
        dim: int = 256,
        *,
        num_heads: int = 8,
        encoder_layers: int = 6,
        decoder_layers: int = 6,
        dim_feedforward: int = 2048,
        dropout: float = 0.1,
        pre_norm: bool = False,
        positions: SpatialPositions = "attention",
        query_positions: QueryPositions = "attention",
    ) -> None:
        super().__init__()
        _check("positions", positions, ("attention", "decoder", "input", "none"))
        _check("query_positions", query_positions, ("attention", "input"))
        self.dim, self.num_heads, self.num_layers = dim, num_heads, decoder_layers
        self.positions, self.query_positions = positions, query_positions
        sizes = (dim, num_heads, dim_feedforward, dropout)
        self.encoder = Encoder(
            [EncoderLayer(*sizes, pre_norm=pre_norm) for _ in range(encoder_layers)],
            nn.LayerNorm(dim) if pre_norm else None,
        )
        self.decoder = Decoder(
            [DecoderLayer(*sizes, pre_norm=pre_norm) for _ in range(decoder_layers)], nn.LayerNorm(dim)
        )
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.xavier_uniform_(parameter)

    def forward(
        self, features: Tensor, padding: Tensor | None, position: Tensor, queries: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Encode and decode.

        Args:
            features: [B, D, H, W].
            position: [B, D, H, W] or [1, D, H, W].
            padding: bool [B, H, W], True = padding, or None.
            queries: object queries [Q, D].

        Returns:
            decoder outputs [L, B, Q, D] and encoder output [B, D, H, W].
        """
        cells, position = _to_cells(features), _to_cells(position)
        flat_padding = None if padding is None else padding.flatten(1)
        if self.positions == "input":
            cells = cells + position
        memory = self.encoder(cells, flat_padding, position if self.positions == "attention" else None)
        key = memory + position if self.positions in ("attention", "decoder") else memory
        queries = queries.repeat(len(features), 1, 1)
        at_attention = self.query_positions == "attention"
        start = torch.zeros_like(queries) if at_attention else queries
        hidden = self.decoder(start, memory, key, flat_padding, queries if at_attention else None)
        return hidden, memory.transpose(1, 2).reshape(features.shape)


def _to_cells(maps: Tensor) -> Tensor:
    """[B, D, H, W] to [B, H*W, D]."""
    return maps.flatten(2).transpose(1, 2)


def _check(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} is {value!r}; choose one of {', '.join(allowed)}")
