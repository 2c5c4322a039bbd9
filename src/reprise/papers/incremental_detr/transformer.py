"""Deformable DETR's transformer (2010.04159, section 4.1), in which the released Incremental-DETR builds.

Legend: B images, S cells of all levels, Q queries, L levels, N decoder layers, D width. Layers are post-norm.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from reprise.nn.deformable import DeformableAttention, Shapes


def inverse_sigmoid(x: Tensor, eps: float = 1e-5) -> Tensor:
    """log(x / (1 - x)) with both parts at least `eps`."""
    x = x.clamp(0, 1)
    return torch.log(x.clamp(min=eps) / (1 - x).clamp(min=eps))


def refine(delta: Tensor, reference: Tensor) -> Tensor:
    """Boxes cxcywh in [0, 1]: sigmoid of a head's output moved by its reference, [..., 4].

    Args:
        delta: [..., 4].
        reference: points [..., 2], which move the centre alone, or boxes [..., 4]; in [0, 1].
    """
    start = inverse_sigmoid(reference)
    if start.shape[-1] == 2:
        start = torch.cat([start, torch.zeros_like(start)], -1)
    return (delta + start).sigmoid()


class EncoderLayer(nn.Module):
    """Deformable self-attention of the cells and a feed-forward network."""

    def __init__(self, dim: int, dim_feedforward: int, dropout: float, *, levels: int, heads: int, points: int) -> None:
        super().__init__()
        self.self_attn = DeformableAttention(dim, levels=levels, heads=heads, points=points)
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.linear1, self.linear2 = nn.Linear(dim, dim_feedforward), nn.Linear(dim_feedforward, dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, position: Tensor, reference: Tensor, shapes: Shapes, padding: Tensor | None) -> Tensor:
        """x and position [B, S, D], reference [B, S, L, 2], padding bool [B, S] or None; to [B, S, D]."""
        x = self.norm1(x + self.dropout(self.self_attn(x + position, reference, x, shapes, padding)))
        return self.norm2(x + self.dropout(self.linear2(self.dropout(torch.relu(self.linear1(x))))))


class DecoderLayer(nn.Module):
    """Self-attention of the queries, deformable attention to the image, feed-forward network."""

    def __init__(self, dim: int, dim_feedforward: int, dropout: float, *, levels: int, heads: int, points: int) -> None:
        super().__init__()
        self.cross_attn = DeformableAttention(dim, levels=levels, heads=heads, points=points)
        self.self_attn = nn.MultiheadAttention(dim, heads, dropout=dropout, batch_first=True)
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(dim) for _ in range(3))
        self.linear1, self.linear2 = nn.Linear(dim, dim_feedforward), nn.Linear(dim_feedforward, dim)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self, x: Tensor, position: Tensor, reference: Tensor, memory: Tensor, shapes: Shapes, padding: Tensor | None
    ) -> Tensor:
        """x and position [B, Q, D], reference [B, Q, L, 2 or 4], memory [B, S, D]; to [B, Q, D]."""
        query = x + position
        x = self.norm2(x + self.dropout(self.self_attn(query, query, x, need_weights=False)[0]))
        x = self.norm1(x + self.dropout(self.cross_attn(x + position, reference, memory, shapes, padding)))
        return self.norm3(x + self.dropout(self.linear2(self.dropout(torch.relu(self.linear1(x))))))


class Encoder(nn.Module):
    """Encoder layers."""

    def __init__(self, layers: Sequence[EncoderLayer]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor, position: Tensor, reference: Tensor, shapes: Shapes, padding: Tensor | None) -> Tensor:
        for layer in self.layers:
            x = layer(x, position, reference, shapes, padding)
        return x


class Decoder(nn.Module):
    """Decoder layers; `bbox_embed`, where set, moves the reference after each of them (iterative box refinement)."""

    def __init__(self, layers: Sequence[DecoderLayer]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.bbox_embed: nn.ModuleList | None = None

    def forward(
        self,
        x: Tensor,
        position: Tensor,
        reference: Tensor,
        memory: Tensor,
        shapes: Shapes,
        valid_ratios: Tensor,
        padding: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """Outputs [N, B, Q, D] and the references after every layer [N, B, Q, 2 or 4], which carry no gradient when
        they were refined.

        Args:
            reference: points [B, Q, 2] in fractions of the unpadded image.
            valid_ratios: unpadded (width, height) of each level, [B, L, 2].
        """
        outputs, references = [], []
        for index, layer in enumerate(self.layers):
            repeats = reference.shape[-1] // 2
            on_levels = reference[:, :, None] * valid_ratios.repeat(1, 1, repeats)[:, None]
            x = layer(x, position, on_levels, memory, shapes, padding)
            if self.bbox_embed is not None:
                reference = refine(self.bbox_embed[index](x), reference).detach()
            outputs.append(x)
            references.append(reference)
        return torch.stack(outputs), torch.stack(references)


class TransformerOutput(NamedTuple):
    """What the transformer makes of an image.

    Attributes:
        hidden: decoder outputs [N, B, Q, D].
        init_reference: [B, Q, 2]; references: after each layer [N, B, Q, 2 or 4].
        memory: encoder output [B, S, D].
        valid_ratios: [B, L, 2].
        shapes: (height, width) of each level.
    """

    hidden: Tensor
    init_reference: Tensor
    references: Tensor
    memory: Tensor
    valid_ratios: Tensor
    shapes: list[tuple[int, int]]


class DeformableTransformer(nn.Module):
    """Encoder and decoder over feature maps of several levels.

    Args:
        dim: D.
        levels: L; points: of the attention of decoder and encoder.
    """

    def __init__(
        self,
        dim: int = 256,
        *,
        num_heads: int = 8,
        encoder_layers: int = 6,
        decoder_layers: int = 6,
        dim_feedforward: int = 1024,
        dropout: float = 0.1,
        levels: int = 1,
        encoder_points: int = 4,
        decoder_points: int = 4,
    ) -> None:
        super().__init__()
        self.dim, self.levels, self.num_layers = dim, levels, decoder_layers
        sizes = (dim, dim_feedforward, dropout)
        encoder = EncoderLayer(*sizes, levels=levels, heads=num_heads, points=encoder_points)
        decoder = DecoderLayer(*sizes, levels=levels, heads=num_heads, points=decoder_points)
        self.encoder = Encoder([copy.deepcopy(encoder) for _ in range(encoder_layers)])
        self.decoder = Decoder([copy.deepcopy(decoder) for _ in range(decoder_layers)])
        self.level_embed = nn.Parameter(torch.empty(levels, dim))
        self.reference_points = nn.Linear(dim, 2)
        self._reset_parameters()

    def _reset_parameters(self) -> None:
        """Xavier for all matrices, then the published start of the deformable attentions."""
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.xavier_uniform_(parameter)
        for module in self.modules():
            if isinstance(module, DeformableAttention):
                module.reset_parameters()
        nn.init.zeros_(self.reference_points.bias)
        nn.init.normal_(self.level_embed)

    def forward(
        self, maps: Sequence[Tensor], paddings: Sequence[Tensor], positions: Sequence[Tensor], queries: Tensor
    ) -> TransformerOutput:
        """Encode and decode.

        Args:
            maps: projected features of every level [B, D, H_l, W_l].
            paddings: bool [B, H_l, W_l], True = padding.
            positions: [B or 1, D, H_l, W_l].
            queries: [Q, 2 D], position first and initial content second.
        """
        shapes = [(level.shape[-2], level.shape[-1]) for level in maps]
        cells = torch.cat([_to_cells(level) for level in maps], 1)
        embedded = [_to_cells(place) + embed for place, embed in zip(positions, self.level_embed, strict=True)]
        padding = torch.cat([level.flatten(1) for level in paddings], 1)
        valid_ratios = torch.stack([valid_ratio(level) for level in paddings], 1)
        flat_padding = padding if bool(padding.any()) else None
        reference = cell_centres(shapes, valid_ratios)
        memory = self.encoder(cells, torch.cat(embedded, 1), reference, shapes, flat_padding)
        position, content = queries.expand(len(cells), -1, -1).split(self.dim, dim=-1)
        start = self.reference_points(position).sigmoid()
        hidden, references = self.decoder(content, position, start, memory, shapes, valid_ratios, flat_padding)
        return TransformerOutput(hidden, start, references, memory, valid_ratios, shapes)


def valid_ratio(padding: Tensor) -> Tensor:
    """Unpadded share of the width and of the height, [B, 2], of padding masks bool [B, H, W]."""
    width = (~padding[:, 0, :]).float().mean(1)
    height = (~padding[:, :, 0]).float().mean(1)
    return torch.stack([width, height], -1)


def cell_centres(shapes: Shapes, valid_ratios: Tensor) -> Tensor:
    """Reference points of the encoder: each cell's centre, as a place in every level, [B, S, L, 2].

    Args:
        shapes: (height, width) of every level.
        valid_ratios: [B, L, 2].
    """
    centres = []
    for level, (height, width) in enumerate(shapes):
        row, column = (torch.arange(count, device=valid_ratios.device) + 0.5 for count in (height, width))
        y, x = torch.meshgrid(row / height, column / width, indexing="ij")
        centres.append(torch.stack([x, y], -1).view(1, -1, 2) / valid_ratios[:, None, level])
    return torch.cat(centres, 1)[:, :, None] * valid_ratios[:, None]


def _to_cells(maps: Tensor) -> Tensor:
    """[B, D, H, W] to [B, H*W, D]."""
    return maps.flatten(2).transpose(1, 2)
