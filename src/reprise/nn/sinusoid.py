"""Position signals of one-dimensional sequences (Attention Is All You Need, 1706.03762, section 3.5)."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def sinusoid(length: int, dim: int) -> Tensor:
    """The paper's formula: channel 2i is sin(pos / 10000^(2i / dim)), channel 2i + 1 the cosine of the same angle.

    Computed in float64; for odd `dim` the last channel is a sine.

    Returns:
        float32 [length, dim].
    """
    position = torch.arange(length, dtype=torch.float64).unsqueeze(1)
    pair = torch.arange(dim, dtype=torch.float64).div(2, rounding_mode="floor")
    angle = position * torch.exp(-math.log(10000.0) * 2 * pair / dim)
    even = torch.arange(dim) % 2 == 0
    return torch.where(even, angle.sin(), angle.cos()).float()


def timing_signal(
    length: int, dim: int, *, min_timescale: float = 1.0, max_timescale: float = 1.0e4, start: int = 0
) -> Tensor:
    """The released signal (tensor2tensor): all sines, then all cosines, at dim // 2 timescales.

    The timescales are a geometric series that holds both ends; an odd `dim` gets one channel of zeros at the end.
    Computed in float32, as released: far from the start the angles are rounded by more than an ulp of their sine.

    Args:
        start: position of the first row.

    Returns:
        float32 [length, dim].
    """
    count = dim // 2
    increment = math.log(max_timescale / min_timescale) / max(count - 1, 1)
    scale = min_timescale * torch.exp(-increment * torch.arange(count, dtype=torch.float32))
    angle = torch.arange(start, start + length, dtype=torch.float32).unsqueeze(1) * scale
    rest = angle.new_zeros(length, dim - 2 * count)
    return torch.cat([angle.sin(), angle.cos(), rest], dim=1)
