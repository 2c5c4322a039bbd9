"""Two-dimensional position encodings that know which pixels are padding (DETR, 2005.12872, appendix A.4)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def sine_position_2d(
    mask: Tensor,
    num_feats: int,
    *,
    temperature: float = 10000.0,
    normalize: bool = True,
    scale: float = 2 * math.pi,
    shift: float = 0.0,
) -> Tensor:
    """Sines and cosines of the row and column among the valid cells.

    Rows and columns are counted from 1 over valid cells; with `normalize` the count less `shift` is divided by the last
    one (+ 1e-6) and multiplied by `scale`. Channel 2k is sin(p / T^(2k / num_feats)) and 2k + 1 the cosine; the first
    `num_feats` channels are of the row (y), the rest of the column (x).

    Args:
        mask: bool [B, H, W], True where a cell is padding.
        num_feats: channels per axis.
        shift: 0 in DETR; 0.5 in Deformable DETR (2010.04159), whose cells are encoded at their centres.

    Returns:
        float32 [B, 2 * num_feats, H, W].
    """
    valid = (~mask).int()  # integer sums: deterministic on every device
    row = valid.cumsum(1).float()
    column = valid.cumsum(2).float()
    if normalize:
        row = (row - shift) / (row[:, -1:, :] + 1e-6) * scale
        column = (column - shift) / (column[:, :, -1:] + 1e-6) * scale
    index = torch.arange(num_feats, dtype=torch.float32, device=mask.device)
    period = temperature ** (2 * index.div(2, rounding_mode="floor") / num_feats)
    encoded = [_interleave(axis.unsqueeze(-1) / period) for axis in (row, column)]
    return torch.cat(encoded, dim=-1).permute(0, 3, 1, 2)


def _interleave(angle: Tensor) -> Tensor:
    """sin of the even channels and cos of the odd ones, [..., D] to [..., D]."""
    return torch.stack([angle[..., 0::2].sin(), angle[..., 1::2].cos()], dim=-1).flatten(-2)


class SinePosition2d(nn.Module):
    """`sine_position_2d` as a module without parameters.

    Args:
        num_feats: channels per axis (half the model width).
    """

    def __init__(
        self, num_feats: int, *, temperature: float = 10000.0, normalize: bool = True, shift: float = 0.0
    ) -> None:
        super().__init__()
        self.num_feats, self.temperature, self.normalize, self.shift = num_feats, temperature, normalize, shift

    def forward(self, mask: Tensor) -> Tensor:
        return sine_position_2d(
            mask, self.num_feats, temperature=self.temperature, normalize=self.normalize, shift=self.shift
        )


class LearnedPosition2d(nn.Module):
    """One learned vector per column and per row, columns in the first half of the channels; ignores the padding.

    Args:
        num_feats: channels per axis (half the model width).
        max_size: largest number of rows and of columns.
    """

    def __init__(self, num_feats: int, *, max_size: int = 50) -> None:
        super().__init__()
        self.row_embed = nn.Embedding(max_size, num_feats)
        self.col_embed = nn.Embedding(max_size, num_feats)
        nn.init.uniform_(self.row_embed.weight)
        nn.init.uniform_(self.col_embed.weight)

    def forward(self, mask: Tensor) -> Tensor:
        """Bool [B, H, W] to [B, 2 * num_feats, H, W].

        Raises:
            ValueError: when there are more rows or columns than `max_size`.
        """
        batch, height, width = mask.shape
        if max(height, width) > self.row_embed.num_embeddings:
            raise ValueError(f"a {height} x {width} map is larger than {self.row_embed.num_embeddings} positions")
        columns = self.col_embed.weight[:width].expand(height, -1, -1)
        rows = self.row_embed.weight[:height].unsqueeze(1).expand(-1, width, -1)
        return torch.cat([columns, rows], dim=-1).permute(2, 0, 1).expand(batch, -1, -1, -1)


def downsample_mask(mask: Tensor, size: Sequence[int]) -> Tensor:
    """Padding mask at another resolution by nearest interpolation, bool [B, H0, W0] to [B, *size]."""
    return F.interpolate(mask.unsqueeze(1).float(), size=tuple(size)).squeeze(1).bool()
