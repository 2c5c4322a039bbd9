"""The Transformer (1706.03762, section 3): encoder and decoder of attention and position-wise networks.

Shapes: B batch, S source length, T target length, d model width, V vocabulary. Ids: 0 is padding. There is no start
symbol: the decoder's input is the target embedding shifted right by one, with a zero vector in front (as released).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reprise.nn.attention import MultiHeadAttention, causal_mask
from reprise.nn.sinusoid import sinusoid, timing_signal
from reprise.training.beam import State, Step

PAD = 0
NORM_EPS = 1e-6  # of the released layer norm

SIGNALS: dict[str, Callable[[int, int], Tensor]] = {"sinusoid": sinusoid, "timing": timing_signal}
POSITIONS = ("none", *SIGNALS, "learned")


class FeedForward(nn.Sequential):
    """FFN(x) = max(0, x W_1 + b_1) W_2 + b_2 at each position (equation 2)."""

    def __init__(self, dim: int, hidden_dim: int, dropout: float = 0.0) -> None:
        super().__init__(nn.Linear(dim, hidden_dim), nn.ReLU(), nn.Dropout(dropout), nn.Linear(hidden_dim, dim))


@dataclass(frozen=True)
class LayerOptions:
    """What all layers share.

    Attributes:
        dim, hidden_dim: d and d_ff.
        num_heads: h.
        key_dim, value_dim: d_k and d_v; None: dim / num_heads.
        dropout: of every sub-layer's output (P_drop).
        attention_dropout, relu_dropout: of attention weights and inside the FFN; the paper has none.
        pre_norm: normalise the input of a sub-layer instead of its sum with the residual; then each stack ends with a
            norm.
        scaled: divide attention logits by sqrt(d_k).
    """

    dim: int
    hidden_dim: int
    num_heads: int
    key_dim: int | None = None
    value_dim: int | None = None
    dropout: float = 0.1
    attention_dropout: float = 0.0
    relu_dropout: float = 0.0
    pre_norm: bool = False
    scaled: bool = True

    def attention(self) -> MultiHeadAttention:
        return MultiHeadAttention(
            self.dim,
            self.num_heads,
            key_dim=self.key_dim,
            value_dim=self.value_dim,
            dropout=self.attention_dropout,
            scaled=self.scaled,
        )

    def feed_forward(self) -> FeedForward:
        return FeedForward(self.dim, self.hidden_dim, self.relu_dropout)


class Residual(nn.Module):
    """LayerNorm(x + Dropout(Sublayer(x))) (section 3.1), or x + Dropout(Sublayer(LayerNorm(x))) with `pre_norm`."""

    def __init__(self, options: LayerOptions) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(options.dim, eps=NORM_EPS)
        self.dropout = nn.Dropout(options.dropout)
        self.pre_norm = options.pre_norm

    def forward(self, x: Tensor, sublayer: Callable[[Tensor], Tensor]) -> Tensor:
        if self.pre_norm:
            return x + self.dropout(sublayer(self.norm(x)))
        return self.norm(x + self.dropout(sublayer(x)))


class EncoderLayer(nn.Module):
    """Self-attention and a position-wise network, each in a residual."""

    def __init__(self, options: LayerOptions) -> None:
        super().__init__()
        self.attention, self.feed_forward = options.attention(), options.feed_forward()
        self.attention_residual, self.feed_forward_residual = Residual(options), Residual(options)

    def forward(self, x: Tensor, allowed: Tensor) -> Tensor:
        """[B, S, d] to the same; `allowed` bool [B, 1, 1, S] is False at padding."""
        x = self.attention_residual(x, lambda y: self.attention(y, y, allowed))
        return self.feed_forward_residual(x, self.feed_forward)


class DecoderLayer(nn.Module):
    """Masked self-attention, attention over the encoder's output, and a position-wise network."""

    def __init__(self, options: LayerOptions) -> None:
        super().__init__()
        self.attention, self.cross_attention = options.attention(), options.attention()
        self.feed_forward = options.feed_forward()
        self.attention_residual, self.cross_attention_residual = Residual(options), Residual(options)
        self.feed_forward_residual = Residual(options)

    def forward(self, x: Tensor, memory: Tensor, before: Tensor, allowed: Tensor) -> Tensor:
        """[B, T, d] to the same; `before` bool [T, T] is the causal mask, `allowed` [B, 1, 1, S] of the memory."""
        x = self.attention_residual(x, lambda y: self.attention(y, y, before))
        x = self.cross_attention_residual(x, lambda y: self.cross_attention(y, memory, allowed))
        return self.feed_forward_residual(x, self.feed_forward)

    def step(
        self, x: Tensor, past: tuple[Tensor, Tensor], memory: tuple[Tensor, Tensor], allowed: Tensor
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """One new position [N, 1, d] after those whose keys and values are `past`; also the lengthened past."""
        grown = past

        def attend(y: Tensor) -> Tensor:
            nonlocal grown
            key, value = self.attention.keys_and_values(y)
            grown = torch.cat([past[0], key], dim=2), torch.cat([past[1], value], dim=2)
            return self.attention.attend(y, *grown)

        x = self.attention_residual(x, attend)
        x = self.cross_attention_residual(x, lambda y: self.cross_attention.attend(y, *memory, allowed))
        return self.feed_forward_residual(x, self.feed_forward), grown


class Transformer(nn.Module):
    """An encoder-decoder of N identical layers each.

    Args:
        vocab_size: V, of source and target alike.
        dim, hidden_dim, num_heads, key_dim, value_dim: d, d_ff, h, d_k, d_v (see `LayerOptions`).
        encoder_layers, decoder_layers: N.
        dropout: P_drop, also on the sums of embeddings and positions; attention_dropout, relu_dropout: see there.
        pre_norm, scaled: see there.
        positions: sinusoid (the paper's formula), timing (the released signal), learned or none.
        max_length: longest sequence with learned positions.
        tied: one matrix for both embeddings and the output (section 3.4); else three.

    Raises:
        ValueError: unknown positions.
    """

    def __init__(
        self,
        vocab_size: int,
        *,
        dim: int = 512,
        hidden_dim: int = 2048,
        num_heads: int = 8,
        key_dim: int | None = None,
        value_dim: int | None = None,
        encoder_layers: int = 6,
        decoder_layers: int = 6,
        dropout: float = 0.1,
        attention_dropout: float = 0.0,
        relu_dropout: float = 0.0,
        pre_norm: bool = False,
        scaled: bool = True,
        positions: str = "sinusoid",
        max_length: int = 512,
        tied: bool = True,
    ) -> None:
        super().__init__()
        if positions not in POSITIONS:
            raise ValueError(f"unknown positions {positions!r}; one of {', '.join(POSITIONS)}")
        options = LayerOptions(
            dim=dim,
            hidden_dim=hidden_dim,
            num_heads=num_heads,
            key_dim=key_dim,
            value_dim=value_dim,
            dropout=dropout,
            attention_dropout=attention_dropout,
            relu_dropout=relu_dropout,
            pre_norm=pre_norm,
            scaled=scaled,
        )
        self.vocab_size, self.dim, self.positions, self.tied = vocab_size, dim, positions, tied
        names = ("embedding",) if tied else ("embedding", "target_embedding", "projection")
        for name in names:
            self.register_parameter(name, nn.Parameter(torch.empty(vocab_size, dim)))
        if positions == "learned":
            self.learned_positions = nn.Parameter(torch.empty(max_length, dim))
        self._table = torch.zeros(0, dim)  # grows on demand; not a buffer, which ranks would have to agree on
        self.encoder = nn.ModuleList(EncoderLayer(options) for _ in range(encoder_layers))
        self.decoder = nn.ModuleList(DecoderLayer(options) for _ in range(decoder_layers))
        self.encoder_norm, self.decoder_norm = (
            nn.LayerNorm(dim, eps=NORM_EPS) if pre_norm else nn.Identity() for _ in range(2)
        )
        self.dropout = nn.Dropout(dropout)
        initialise(self)

    @property
    def source_table(self) -> Tensor:
        return self.get_parameter("embedding")

    @property
    def target_table(self) -> Tensor:
        return self.get_parameter("embedding" if self.tied else "target_embedding")

    @property
    def output_table(self) -> Tensor:
        return self.get_parameter("embedding" if self.tied else "projection")

    def position_signal(self, start: int, length: int) -> Tensor | None:
        """What is added to the embeddings at positions start .. start + length - 1, [length, d], None for nothing.

        Raises:
            ValueError: learned positions do not reach so far.
        """
        if self.positions == "none":
            return None
        if self.positions == "learned":
            if start + length > len(self.learned_positions):
                raise ValueError(f"{start + length} positions, but {len(self.learned_positions)} were learned")
            return self.learned_positions[start : start + length]
        if start + length > len(self._table) or self._table.device != self.source_table.device:
            rows = max(start + length, 2 * len(self._table))
            self._table = SIGNALS[self.positions](rows, self.dim).to(self.source_table.device)
        return self._table[start : start + length]

    def embed(self, ids: Tensor, table: Tensor) -> Tensor:
        """Embeddings times sqrt(d), zero at padding, [B, L] to [B, L, d] (section 3.4)."""
        return F.embedding(ids, table) * math.sqrt(self.dim) * (ids != PAD).unsqueeze(-1)

    def place(self, embedded: Tensor, start: int = 0) -> Tensor:
        """Dropout(embedding + position signal) (sections 3.5 and 5.4)."""
        signal = self.position_signal(start, embedded.shape[1])
        return self.dropout(embedded if signal is None else embedded + signal)

    def encode(self, source: Tensor) -> Tensor:
        """Ids [B, S] to the encoder's output [B, S, d]; what it says at padding means nothing."""
        allowed = source_mask(source)
        x = self.place(self.embed(source, self.source_table))
        for layer in self.encoder:
            x = layer(x, allowed)
        return self.encoder_norm(x)

    def decode(self, target: Tensor, memory: Tensor, source: Tensor) -> Tensor:
        """Decoder output [B, T, d]; row t has seen the symbols before target t and the whole source."""
        allowed, before = source_mask(source), causal_mask(target.shape[1], target.device)
        x = self.place(shift_right(self.embed(target, self.target_table)))
        for layer in self.decoder:
            x = layer(x, memory, before, allowed)
        return self.decoder_norm(x)

    def logits(self, decoded: Tensor) -> Tensor:
        """[..., d] to [..., V]: products with the (shared) embedding matrix."""
        return F.linear(decoded, self.output_table)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        """Logits [B, T, V] of the target's symbols under teacher forcing; row t predicts target[:, t]."""
        return self.logits(self.decode(target, self.encode(source), source))

    def begin(self, source: Tensor, beam_size: int) -> tuple[Step, State]:
        """The step function of a beam search over sources [B, S], and its state: keys and values of what was said."""
        memory = self.encode(source)
        allowed = source_mask(source).repeat_interleave(beam_size, 0)
        seen = [
            layer.cross_attention.keys_and_values(memory.repeat_interleave(beam_size, 0))
            for layer in self.decoder_layers()
        ]

        def step(last: Tensor, position: int, state: State) -> tuple[Tensor, State]:
            x = self.place(self.embed(last.unsqueeze(1), self.target_table), position)
            grown: dict[str, Tensor] = {}
            for number, layer in enumerate(self.decoder_layers()):
                past = state[f"key{number}"], state[f"value{number}"]
                x, (key, value) = layer.step(x, past, seen[number], allowed)
                grown |= {f"key{number}": key, f"value{number}": value}
            return self.logits(self.decoder_norm(x)).squeeze(1), grown

        return step, self._nothing_said(len(allowed), memory)

    def _nothing_said(self, rows: int, like: Tensor) -> State:
        state: dict[str, Tensor] = {}
        for number, layer in enumerate(self.decoder_layers()):
            attention = layer.attention
            state[f"key{number}"] = like.new_zeros(rows, attention.num_heads, 0, attention.key_dim)
            state[f"value{number}"] = like.new_zeros(rows, attention.num_heads, 0, attention.value_dim)
        return state

    def decoder_layers(self) -> Iterator[DecoderLayer]:
        """The layers of the decoder, first to last."""
        for layer in self.decoder:
            assert isinstance(layer, DecoderLayer)
            yield layer


def source_mask(source: Tensor) -> Tensor:
    """Bool [B, 1, 1, S], False at padding."""
    return (source != PAD)[:, None, None]


def shift_right(embedded: Tensor) -> Tensor:
    """[B, T, d] moved by one position, a zero vector in front, the last one dropped."""
    return F.pad(embedded, (0, 0, 1, 0))[:, :-1]


def initialise(model: nn.Module) -> None:
    """As released: kernels uniform with variance 1 / fan_in, zero biases, embeddings N(0, 1/d)."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            bound = math.sqrt(3 / module.in_features)
            nn.init.uniform_(module.weight, -bound, bound)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    for name, parameter in model.named_parameters(recurse=False):
        if name in ("embedding", "target_embedding", "projection", "learned_positions"):
            nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
