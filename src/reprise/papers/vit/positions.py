"""Position embeddings (section 3.1 and appendix D.4) and their interpolation to another resolution (section 3.2)."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from timm.layers import Attention
from torch import Tensor, nn

Grid = tuple[int, int]
STD = 0.02  # of the initial normal distribution


def resize_positions(table: Tensor, old: Grid, new: Grid, class_token: bool) -> Tensor:
    """Interpolate learned positions linearly in 2-D to another patch grid (section 3.2).

    The corner positions stay where they are (scipy.ndimage.zoom of order 1, as released); neither half-pixel
    alignment nor bicubic interpolation gives these numbers. The class token's position is copied.

    Args:
        table: [1, T, D] with T = rows * columns of `old`, plus one where `class_token`; row-major.
        old, new: (rows, columns) of patches.

    Returns:
        [1, T', D].

    Raises:
        ValueError: the table does not have as many positions as `old` says.
    """
    extra = int(class_token)
    if table.shape[1] != old[0] * old[1] + extra:
        raise ValueError(f"{table.shape[1]} positions do not fit a grid of {old} with {extra} extra token")
    head, patches = table[:, :extra], table[:, extra:]
    image = patches.reshape(1, *old, -1).permute(0, 3, 1, 2)
    image = F.interpolate(image, size=new, mode="bilinear", align_corners=True)
    return torch.cat([head, image.permute(0, 2, 3, 1).flatten(1, 2)], dim=1)


def square_grid(tokens: int) -> Grid:
    """The side twice, for a square number of patches.

    Raises:
        ValueError: `tokens` is not a square.
    """
    side = math.isqrt(tokens)
    if side * side != tokens:
        raise ValueError(f"{tokens} patches do not form a square grid")
    return side, side


class LearnedPositions1d(nn.Module):
    """One learned vector per token, without any notion of 2-D: the paper's default."""

    def __init__(self, grid: Grid, width: int, class_token: bool) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.empty(1, grid[0] * grid[1] + class_token, width).normal_(std=STD))

    def forward(self) -> Tensor:
        """[1, tokens, width]."""
        return self.table


class LearnedPositions2d(nn.Module):
    """Half of each vector is learned per row, half per column; the class token has a vector of its own."""

    def __init__(self, grid: Grid, width: int, class_token: bool) -> None:
        super().__init__()
        if width % 2:
            raise ValueError(f"2-D positions need an even width, not {width}")
        self.rows = nn.Parameter(torch.empty(grid[0], width // 2).normal_(std=STD))
        self.columns = nn.Parameter(torch.empty(grid[1], width // 2).normal_(std=STD))
        self.extra = nn.Parameter(torch.empty(int(class_token), width).normal_(std=STD))

    def forward(self) -> Tensor:
        """[1, tokens, width]."""
        rows, columns = len(self.rows), len(self.columns)
        grid = torch.cat([self.rows[:, None].expand(-1, columns, -1), self.columns[None].expand(rows, -1, -1)], dim=-1)
        return torch.cat([self.extra, grid.flatten(0, 1)])[None]


class SinCosPositions(nn.Module):
    """Fixed sines and cosines of row and column, a quarter of the width each; zero for the class token."""

    table: Tensor

    def __init__(self, grid: Grid, width: int, class_token: bool) -> None:
        super().__init__()
        self.register_buffer("table", sin_cos_table(grid, width, class_token), persistent=False)

    def forward(self) -> Tensor:
        """[1, tokens, width]."""
        return self.table


def sin_cos_table(grid: Grid, width: int, class_token: bool, temperature: float = 10_000.0) -> Tensor:
    """[1, tokens, width]: sin and cos of the column, then of the row, at frequencies temperature^(-i / (width/4 - 1)).

    Raises:
        ValueError: the width is not a multiple of 4 of at least 8.
    """
    if width % 4 or width < 8:
        raise ValueError(f"sin-cos positions need a width that 4 divides, of at least 8, not {width}")
    frequency = temperature ** -torch.linspace(0, 1, width // 4)
    rows, columns = torch.meshgrid(torch.arange(grid[0]), torch.arange(grid[1]), indexing="ij")
    angles = [axis.flatten()[:, None] * frequency for axis in (columns, rows)]
    patches = torch.cat([wave(angle) for angle in angles for wave in (torch.sin, torch.cos)], dim=1)
    return torch.cat([torch.zeros(int(class_token), width), patches])[None]


class RelativeAttention(Attention):
    """Self-attention whose queries also look at where the keys are: 1-D relative positions (appendix D.4).

    Each offset p_q - p_k of two tokens has a learned vector r, a further key for the same query: the logits are
    (q k + q r) / sqrt(d_h). The vectors are shared by the heads of a layer, and each layer has its own.

    Args:
        tokens: T, of the sequence; the class token, where there is one, is the first.
        width, num_heads, attn_drop, proj_drop: see timm's `Attention`; query, key and value have biases.
    """

    def __init__(self, tokens: int, width: int, num_heads: int, *, attn_drop: float, proj_drop: float) -> None:
        super().__init__(width, num_heads, qkv_bias=True, attn_drop=attn_drop, proj_drop=proj_drop)
        self.tokens = tokens
        self.offsets = nn.Parameter(torch.empty(2 * tokens - 1, self.head_dim).normal_(std=STD))

    def position_logits(self, query: Tensor) -> Tensor:
        """q r / sqrt(d_h) for queries [B, heads, T, d_h], as [B, heads, T, T]."""
        place = torch.arange(self.tokens, device=query.device)
        keys = self.offsets[place[:, None] - place + self.tokens - 1]  # [T, T, d_h]
        return torch.einsum("bhqd,qkd->bhqk", query * self.scale, keys)

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """[B, T, width] to the same shape.

        Raises:
            ValueError: a mask is given; a position bias is all that this attention adds.
        """
        if attn_mask is not None or is_causal:
            raise ValueError("attention with relative positions takes no mask")
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, self.head_dim)).permute(2, 0, 3, 1, 4)
        query, key, value = qkv.unbind(0)
        dropout = self.attn_drop.p if self.training else 0.0
        bias = self.position_logits(query)
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=bias, dropout_p=dropout)
        return self.proj_drop(self.proj(mixed.transpose(1, 2).flatten(2)))


POSITIONS: dict[str, type[LearnedPositions1d | LearnedPositions2d | SinCosPositions]] = {
    "learned_1d": LearnedPositions1d,
    "learned_2d": LearnedPositions2d,
    "sin_cos": SinCosPositions,
}
