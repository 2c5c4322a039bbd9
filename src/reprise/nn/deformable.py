"""Multi-scale deformable attention (Zhu et al., 2020, 2010.04159, section 4.1) in pure PyTorch.

Legend: B images, Q queries, S cells of all levels together, L levels, H heads, P points, D channels of all heads.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Shapes = Sequence[tuple[int, int]]


def deformable_attention(value: Tensor, shapes: Shapes, locations: Tensor, weights: Tensor) -> Tensor:
    """Weighted sums of values sampled bilinearly at a few places of every level (equation 3 without projections).

    Args:
        value: [B, S, H, D / H], the levels one after the other, each row by row.
        shapes: (height, width) of every level.
        locations: (x, y) in [0, 1] of the level (a cell's centre is at (i + 1/2) / size); what lies outside counts as
            zero; [B, Q, H, L, P, 2].
        weights: [B, Q, H, L, P].

    Returns:
        [B, Q, D].

    Raises:
        ValueError: when the levels do not hold S cells.
    """
    batch, cells, heads, channels = value.shape
    if sum(height * width for height, width in shapes) != cells:
        raise ValueError(f"levels of {list(shapes)} do not hold {cells} cells")
    grid = (2 * locations - 1).transpose(1, 2).flatten(0, 1)  # [B*H, Q, L, P, 2]
    maps = value.permute(0, 2, 3, 1).flatten(0, 1).split([height * width for height, width in shapes], dim=-1)
    sample = sample_by_rows if value.is_cuda and torch.are_deterministic_algorithms_enabled() else sample_bilinear
    sampled = [
        sample(level.unflatten(-1, shape), grid[:, :, index])
        for index, (level, shape) in enumerate(zip(maps, shapes, strict=True))
    ]  # each [B*H, D/H, Q, P]
    weight = weights.transpose(1, 2).flatten(0, 1).flatten(-2).unsqueeze(1)  # [B*H, 1, Q, L*P]
    mixed = (torch.cat(sampled, dim=-1) * weight).sum(-1)
    return mixed.view(batch, heads * channels, -1).transpose(1, 2)


def sample_bilinear(image: Tensor, grid: Tensor) -> Tensor:
    """Bilinear values between cells, zero outside.

    Args:
        image: [N, C, H, W].
        grid: (x, y), -1 and 1 at the outer edges, [N, Q, P, 2].

    Returns:
        [N, C, Q, P].
    """
    return F.grid_sample(image, grid, align_corners=False)


def sample_by_rows(image: Tensor, grid: Tensor) -> Tensor:
    """`sample_bilinear` in operations whose gradients CUDA adds up in a fixed order; it has none for `grid_sample`."""
    height, width = image.shape[-2:]
    rows = image.flatten(2).transpose(1, 2).flatten(0, 1)  # [N*H*W, C]
    first = height * width * torch.arange(len(image), device=image.device)[:, None, None]
    grid = grid.to(torch.promote_types(grid.dtype, torch.float32))
    at = (grid + 1) / 2 * grid.new_tensor([width, height]) - 0.5
    corner = at.detach().floor()
    total = image.new_zeros(())
    for offset in ((0, 0), (0, 1), (1, 0), (1, 1)):
        column, row = (corner + corner.new_tensor(offset)).unbind(-1)
        share = (1 - (at - corner - corner.new_tensor(offset)).abs()).prod(-1)
        inside = (column >= 0) & (column < width) & (row >= 0) & (row < height)
        cell = first + row.clamp(0, height - 1).long() * width + column.clamp(0, width - 1).long()
        total = total + (share * inside)[..., None] * rows.index_select(0, cell.flatten()).unflatten(0, cell.shape)
    return total.permute(0, 3, 1, 2)


def sampling_locations(offsets: Tensor, reference: Tensor, shapes: Shapes) -> Tensor:
    """Where a query looks.

    Args:
        offsets: [B, Q, H, L, P, 2]; in cells of the level around a point, in P-ths of half a box inside a box.
        reference: points [B, Q, L, 2] or boxes (cxcywh) [B, Q, L, 4], in fractions of each level.

    Returns:
        (x, y) in fractions of each level, [B, Q, H, L, P, 2].

    Raises:
        ValueError: a reference with neither 2 nor 4 numbers.
    """
    at = reference[:, :, None, :, None]
    if reference.shape[-1] == 2:
        cells = offsets.new_tensor([[width, height] for height, width in shapes])
        return at + offsets / cells[:, None]
    if reference.shape[-1] == 4:
        return at[..., :2] + offsets / offsets.shape[-2] * at[..., 2:] * 0.5
    raise ValueError(f"a reference has 2 or 4 numbers, not {reference.shape[-1]}")


def compass(heads: int, levels: int, points: int) -> Tensor:
    """First offsets: head h looks in the direction 2 pi h / H (largest coordinate 1), point p goes p + 1 cells far.

    Returns:
        [H, L, P, 2].
    """
    angle = torch.arange(heads) * (2 * math.pi / heads)
    direction = torch.stack([angle.cos(), angle.sin()], -1)
    direction = direction / direction.abs().amax(-1, keepdim=True)
    steps = torch.arange(1, points + 1).view(1, 1, points, 1)
    return (direction.view(heads, 1, 1, 2) * steps).expand(heads, levels, points, 2)


class DeformableAttention(nn.Module):
    """Queries that choose where to look and how much each place counts (equation 3); names as in the official code.

    Args:
        dim: D.
        levels, heads, points: L, H, P.

    Raises:
        ValueError: when the heads do not divide the width.
    """

    def __init__(self, dim: int = 256, *, levels: int = 4, heads: int = 8, points: int = 4) -> None:
        super().__init__()
        if dim % heads:
            raise ValueError(f"{heads} heads do not divide a width of {dim}")
        self.levels, self.heads, self.points = levels, heads, points
        self.sampling_offsets = nn.Linear(dim, heads * levels * points * 2)
        self.attention_weights = nn.Linear(dim, heads * levels * points)
        self.value_proj = nn.Linear(dim, dim)
        self.output_proj = nn.Linear(dim, dim)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """The published start: fixed directions, equal weights, Xavier projections."""
        for layer in (self.sampling_offsets, self.attention_weights):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
        start = compass(self.heads, self.levels, self.points).flatten()
        self.sampling_offsets.bias.copy_(start.to(self.sampling_offsets.bias.device))
        for layer in (self.value_proj, self.output_proj):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)

    def look(self, query: Tensor, reference: Tensor, shapes: Shapes) -> tuple[Tensor, Tensor]:
        """Sampling locations [B, Q, H, L, P, 2] and weights [B, Q, H, L, P] of queries [B, Q, D]."""
        kinds = (self.heads, self.levels, self.points)
        offsets = self.sampling_offsets(query).unflatten(-1, (*kinds, 2))
        weights = self.attention_weights(query).unflatten(-1, (self.heads, -1)).softmax(-1)
        return sampling_locations(offsets, reference, shapes), weights.unflatten(-1, kinds[1:])

    def forward(
        self, query: Tensor, reference: Tensor, memory: Tensor, shapes: Shapes, padding: Tensor | None = None
    ) -> Tensor:
        """Attend.

        Args:
            query: [B, Q, D].
            reference: [B, Q, L, 2] or [B, Q, L, 4], fractions of each level.
            memory: [B, S, D].
            shapes: (height, width) of every level.
            padding: bool [B, S]; values there are zero (after the projection, its bias included). None: no padding.

        Returns:
            [B, Q, D].
        """
        value = self.value_proj(memory)
        if padding is not None:
            value = value.masked_fill(padding.unsqueeze(-1), 0.0)
        locations, weights = self.look(query, reference, shapes)
        mixed = deformable_attention(value.unflatten(-1, (self.heads, -1)), shapes, locations, weights)
        return self.output_proj(mixed)
