"""Weight-standardised convolution and pooling with TensorFlow's SAME padding, as in BiT and ViT hybrids."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def pad_same(x: Tensor, kernel: int, stride: int, value: float = 0.0) -> Tensor:
    """Pad [B, C, H, W] so that the output has ceil(size / stride) positions; an odd extra pixel goes bottom/right."""
    padding: list[int] = []
    for size in (x.shape[-1], x.shape[-2]):
        total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
        padding += [total // 2, total - total // 2]
    return F.pad(x, padding, value=value) if any(padding) else x


def max_pool_same(x: Tensor, kernel: int, stride: int) -> Tensor:
    """Max-pooling with SAME padding of -inf."""
    return F.max_pool2d(pad_same(x, kernel, stride, -torch.inf), kernel, stride)


def standardize(weight: Tensor, eps: float = 1e-5) -> Tensor:
    """Filters with zero mean and unit standard deviation: (w - mean) / (std + eps) over each output filter.

    The standard deviation is the population's, and eps is added to it, not to the variance.
    """
    centred = weight - weight.mean(dim=(1, 2, 3), keepdim=True)
    return centred / (centred.square().mean(dim=(1, 2, 3), keepdim=True).sqrt() + eps)


class StdConv2d(nn.Conv2d):
    """A square convolution without bias whose filters are standardised at each use (Qiao et al., 2019)."""

    def __init__(self, in_channels: int, out_channels: int, kernel: int, stride: int = 1) -> None:
        super().__init__(in_channels, out_channels, kernel, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = pad_same(x, self.kernel_size[0], self.stride[0])
        return F.conv2d(x, standardize(self.weight), stride=self.stride)
