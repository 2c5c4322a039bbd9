"""The Transformer of both towers, and the vision transformer (sections 2.4 and 2.5).

Shapes: B items, L tokens, D width, E embedding. The block is pre-norm, as in GPT-2, with QuickGELU.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class LayerNorm(nn.LayerNorm):
    """Layer normalisation (epsilon 1e-5) in float32, whatever the type of the activations."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.float()).to(input.dtype)


def quick_gelu(x: Tensor) -> Tensor:
    """x * sigmoid(1.702 x): the approximation that the released weights were trained with."""
    return x * torch.sigmoid(1.702 * x)


class MLP(nn.Module):
    """Two layers, four times as wide between them."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.c_fc = nn.Linear(width, 4 * width)
        self.c_proj = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(quick_gelu(self.c_fc(x)))


class ResidualAttentionBlock(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.ln_1 = LayerNorm(width)
        self.mlp = MLP(width)
        self.ln_2 = LayerNorm(width)

    def forward(self, x_BLD: Tensor, mask: Tensor | None = None) -> Tensor:
        normed = self.ln_1(x_BLD)
        x_BLD = x_BLD + self.attn(normed, normed, normed, need_weights=False, attn_mask=mask)[0]
        return x_BLD + self.mlp(self.ln_2(x_BLD))


class Transformer(nn.Module):
    """A stack of residual attention blocks over [B, L, D].

    Args:
        causal: each position sees only itself and earlier ones.
    """

    def __init__(self, width: int, layers: int, heads: int, *, causal: bool = False) -> None:
        super().__init__()
        self.width, self.causal = width, causal
        self.resblocks = nn.ModuleList(ResidualAttentionBlock(width, heads) for _ in range(layers))

    def forward(self, x_BLD: Tensor) -> Tensor:
        mask = causal_mask(x_BLD.shape[1], x_BLD) if self.causal else None
        for block in self.resblocks:
            x_BLD = block(x_BLD, mask)
        return x_BLD

    def initialise(self) -> None:
        """The released text initialisation: N(0, width^-0.5), smaller by (2 layers)^0.5 on residual paths."""
        layers = max(len(self.resblocks), 1)
        attention, into, residual = self.width**-0.5, (2 * self.width) ** -0.5, self.width**-0.5 * (2 * layers) ** -0.5
        for block in self.resblocks:
            assert isinstance(block, ResidualAttentionBlock)
            nn.init.normal_(block.attn.in_proj_weight, std=attention)
            nn.init.normal_(block.attn.out_proj.weight, std=residual)
            nn.init.normal_(block.mlp.c_fc.weight, std=into)
            nn.init.normal_(block.mlp.c_proj.weight, std=residual)


def causal_mask(length: int, like: Tensor) -> Tensor:
    """[length, length]: -inf above the diagonal, 0 elsewhere, of the type and device of `like`."""
    return torch.full((length, length), float("-inf"), dtype=like.dtype, device=like.device).triu_(1)


class VisionTransformer(nn.Module):
    """Images [B, 3, R, R] to features [B, D] (the class token after `ln_post`) and embeddings [B, E] (times `proj`).

    A bias-free patch convolution, a class embedding in front, learned positions, and one more norm than ViT before the
    blocks. Positions are interpolated nowhere: the image size is fixed.

    Args:
        image_size: R; what is left after whole patches is not looked at.
        heads: width / 64 in all released models.

    Raises:
        ValueError: the image is smaller than a patch.
    """

    def __init__(self, *, image_size: int, patch_size: int, width: int, layers: int, heads: int, embed_dim: int):
        super().__init__()
        if image_size < patch_size:
            raise ValueError(f"an image of {image_size} pixels is smaller than a patch of {patch_size}")
        self.image_size = image_size
        self.grid = image_size // patch_size
        scale = width**-0.5
        self.conv1 = nn.Conv2d(3, width, patch_size, patch_size, bias=False)
        self.class_embedding = nn.Parameter(scale * torch.randn(width))
        self.positional_embedding = nn.Parameter(scale * torch.randn(self.grid**2 + 1, width))
        self.ln_pre = LayerNorm(width)
        self.transformer = Transformer(width, layers, heads)
        self.ln_post = LayerNorm(width)
        self.proj = nn.Parameter(scale * torch.randn(width, embed_dim))

    def features(self, image: Tensor) -> Tensor:
        """[B, D], before the projection: what the paper's linear probes use."""
        patches = self.conv1(image).flatten(2).transpose(1, 2)
        token = self.class_embedding.to(patches.dtype).expand(len(patches), 1, -1)
        x_BLD = torch.cat([token, patches], dim=1) + self.positional_embedding.to(patches.dtype)
        return self.ln_post(self.transformer(self.ln_pre(x_BLD))[:, 0])

    def forward(self, image: Tensor) -> Tensor:
        return self.features(image) @ self.proj


class TextTransformer(nn.Module):
    """Token ids [B, L] to embeddings [B, E]: the causal Transformer's output at the end token, times a projection.

    Args:
        end_token: the feature is read at its first occurrence. None: at the largest id of the row, as the released code
            does; the same in the official vocabulary, whose end token is the largest id.
    """

    def __init__(
        self,
        *,
        vocab_size: int,
        context_length: int,
        width: int,
        layers: int,
        heads: int,
        embed_dim: int,
        end_token: int | None,
    ) -> None:
        super().__init__()
        self.context_length, self.vocab_size, self.end_token = context_length, vocab_size, end_token
        self.token_embedding = nn.Embedding(vocab_size, width)
        self.positional_embedding = nn.Parameter(torch.empty(context_length, width))
        self.transformer = Transformer(width, layers, heads, causal=True)
        self.ln_final = LayerNorm(width)
        self.text_projection = nn.Parameter(torch.empty(width, embed_dim))
        self._initialise()

    def _initialise(self) -> None:
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        nn.init.normal_(self.positional_embedding, std=0.01)
        self.transformer.initialise()
        nn.init.normal_(self.text_projection, std=self.transformer.width**-0.5)

    def hidden(self, embedded_BLD: Tensor) -> Tensor:
        """[B, L, D]: positions added, blocks, final norm."""
        length = embedded_BLD.shape[1]
        return self.ln_final(self.transformer(embedded_BLD + self.positional_embedding[:length]))

    def forward(self, text: Tensor) -> Tensor:
        hidden = self.hidden(self.token_embedding(text))
        ends = end_positions(text, self.end_token)
        return hidden[torch.arange(len(text), device=text.device), ends] @ self.text_projection


def end_positions(text: Tensor, end_token: int | None) -> Tensor:
    """Where each row [B, L] ends, int64 [B]: the first `end_token`, or (None) the first of its largest id."""
    return (text if end_token is None else (text == end_token).long()).argmax(-1)


def unit(features: Tensor) -> Tensor:
    """Rows divided by their plain Euclidean norm."""
    return features / features.norm(dim=-1, keepdim=True)
