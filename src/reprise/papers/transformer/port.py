"""The arrangement of a widely used PyTorch port (jadore801120/attention-is-all-you-need-pytorch), for comparison.

It differs from the paper: a layer norm directly after embedding + position in both stacks; the embedding is multiplied
by sqrt(d) only on request, or the logits by 1 / sqrt(d) instead; the decoder also masks padding in its own input;
ids of padding are chosen by the user, and the target has a start symbol.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reprise.nn.attention import causal_mask
from reprise.nn.sinusoid import sinusoid
from reprise.papers.transformer.model import NORM_EPS, DecoderLayer, EncoderLayer, LayerOptions

SUBLAYERS = {"slf_attn": "attention", "enc_attn": "cross_attention", "pos_ffn": "feed_forward"}
ATTENTION = {"w_qs": "query", "w_ks": "key", "w_vs": "value", "fc": "output"}
FEED_FORWARD = {"w_1": "0", "w_2": "3"}
OUTER = {
    "encoder.src_word_emb": "source_embedding",
    "decoder.trg_word_emb": "target_embedding",
    "trg_word_prj": "projection",
    "encoder.layer_norm": "encoder_norm",
    "decoder.layer_norm": "decoder_norm",
}


class PortTransformer(nn.Module):
    """The port in evaluation mode.

    Args:
        scale_emb_or_prj: emb, prj or none: what is scaled, where target embedding and projection are tied.
        tie_projection, tie_sides: share the target embedding with the projection, and with the source embedding.
    """

    def __init__(
        self,
        options: LayerOptions,
        *,
        source_vocab: int,
        target_vocab: int,
        source_pad: int,
        target_pad: int,
        layers: int,
        scale_emb_or_prj: str = "prj",
        tie_projection: bool = True,
        tie_sides: bool = True,
    ) -> None:
        super().__init__()
        dim = options.dim
        self.source_pad, self.target_pad = source_pad, target_pad
        self.embedding_scale = math.sqrt(dim) if tie_projection and scale_emb_or_prj == "emb" else 1.0
        self.logit_scale = dim**-0.5 if tie_projection and scale_emb_or_prj == "prj" else 1.0
        self.source_embedding = nn.Embedding(source_vocab, dim, padding_idx=source_pad)
        self.target_embedding = nn.Embedding(target_vocab, dim, padding_idx=target_pad)
        self.projection = nn.Linear(dim, target_vocab, bias=False)
        self.encoder_norm, self.decoder_norm = (nn.LayerNorm(dim, eps=NORM_EPS) for _ in range(2))
        self.encoder = nn.ModuleList(EncoderLayer(options) for _ in range(layers))
        self.decoder = nn.ModuleList(DecoderLayer(options) for _ in range(layers))
        if tie_projection:
            self.projection.weight = self.target_embedding.weight
        if tie_sides:
            self.source_embedding.weight = self.target_embedding.weight

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        """Logits [B, T, V] after each symbol of target int64 [B, T]."""
        allowed = (source != self.source_pad)[:, None, None]
        before = causal_mask(target.shape[1]) & (target != self.target_pad)[:, None, None]
        memory = self._embed(source, self.source_embedding, self.encoder_norm)
        for layer in self.encoder:
            memory = layer(memory, allowed)
        x = self._embed(target, self.target_embedding, self.decoder_norm)
        for layer in self.decoder:
            x = layer(x, memory, before, allowed)
        return self.projection(x) * self.logit_scale

    def _embed(self, ids: Tensor, embedding: nn.Embedding, norm: nn.LayerNorm) -> Tensor:
        signal = sinusoid(ids.shape[1], embedding.embedding_dim)
        return norm(embedding(ids) * self.embedding_scale + signal)


def our_name(official: str) -> str | None:
    """Our name of one of the port's tensors; None for its position tables, which are computed."""
    if official.endswith("pos_table"):
        return None
    stem, kind = official.rsplit(".", 1)
    if stem in OUTER:
        return f"{OUTER[stem]}.{kind}"
    stack, _, number, sublayer, part = stem.split(".")
    ours = SUBLAYERS[sublayer]
    if part == "layer_norm":
        return f"{stack}.{number}.{ours}_residual.norm.{kind}"
    return f"{stack}.{number}.{ours}.{(ATTENTION | FEED_FORWARD)[part]}.{kind}"


def load_port(state: Mapping[str, Tensor], model: PortTransformer) -> None:
    """Load the port's state dict."""
    named = {our_name(name): tensor for name, tensor in state.items()}
    model.load_state_dict({name: tensor.clone() for name, tensor in named.items() if name is not None})


def port_loss(logits: Tensor, gold: Tensor, pad: int, smoothing: bool) -> Tensor:
    """Summed cross-entropy without padding; smoothed: 0.9 on the true symbol, 0.1 / (V - 1) on each other."""
    if not smoothing:
        return F.cross_entropy(logits.flatten(0, -2), gold.flatten(), ignore_index=pad, reduction="sum")
    vocabulary = logits.shape[-1]
    spread = 0.1 * vocabulary / (vocabulary - 1)
    losses = F.cross_entropy(logits.flatten(0, -2), gold.flatten(), reduction="none", label_smoothing=spread)
    return losses[gold.flatten() != pad].sum()


def counted_right(logits: Tensor, gold: Tensor, pad: int) -> Tensor:
    """Right and counted symbols, int64 [2]."""
    real = gold != pad
    return torch.stack([((logits.argmax(-1) == gold) & real).sum(), real.sum()])
