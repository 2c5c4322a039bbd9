"""The ResNet stem of the hybrid models: its feature map takes the place of the image (section 3.1).

Standardised convolutions, GroupNorm, and no batch normalisation anywhere.
"""

from __future__ import annotations

from collections.abc import Sequence

from timm.layers import lecun_normal_
from torch import Tensor, nn

from reprise.nn.std_conv import StdConv2d, max_pool_same

GROUPS = 32
EXPANSION = 4


class Unit(nn.Module):
    """A bottleneck: 1x1, 3x3 (strided), 1x1 with four times the channels; the sum passes a ReLU."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        out_channels = channels * EXPANSION
        self.conv1 = StdConv2d(in_channels, channels, 1)
        self.gn1 = _group_norm(channels)
        self.conv2 = StdConv2d(channels, channels, 3, stride)
        self.gn2 = _group_norm(channels)
        self.conv3 = StdConv2d(channels, out_channels, 1)
        self.gn3 = _group_norm(out_channels)
        nn.init.zeros_(self.gn3.weight)  # each unit starts as the identity
        self.projects = in_channels != out_channels or stride != 1
        if self.projects:
            self.conv_proj = StdConv2d(in_channels, out_channels, 1, stride)
            self.gn_proj = _group_norm(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        shortcut = self.gn_proj(self.conv_proj(x)) if self.projects else x
        y = self.gn1(self.conv1(x)).relu()
        y = self.gn2(self.conv2(y)).relu()
        return (shortcut + self.gn3(self.conv3(y))).relu()


class ResNetStem(nn.Module):
    """Root (7x7/2 convolution, 3x3/2 max-pool) and stages; stage s >= 2 halves the resolution.

    Args:
        in_channels: channels of the image.
        layers: number of units of each stage, e.g. (3, 4, 9) for R50+ViT-B/16; may be empty (root only).
        width_factor: 1 gives 64 root channels.
    """

    def __init__(self, in_channels: int, layers: Sequence[int], width_factor: float = 1.0) -> None:
        super().__init__()
        width = int(64 * width_factor)
        self.conv_root = StdConv2d(in_channels, width, 7, 2)
        self.gn_root = _group_norm(width)
        self.stages = nn.ModuleList()
        self.out_channels = width
        for number, units in enumerate(layers):
            self.stages.append(self._stage(width * 2**number, units, stride=1 if number == 0 else 2))
        self.reduction = 4 * 2 ** max(len(layers) - 1, 0)
        for module in self.modules():
            if isinstance(module, StdConv2d):
                lecun_normal_(module.weight)

    def _stage(self, channels: int, units: int, stride: int) -> nn.Sequential:
        stage = nn.Sequential()
        for unit in range(units):
            stage.append(Unit(self.out_channels, channels, stride if unit == 0 else 1))
            self.out_channels = channels * EXPANSION
        return stage

    def forward(self, image: Tensor) -> Tensor:
        """[B, C, H, W] to [B, out_channels, ceil(H / reduction), ceil(W / reduction)]."""
        x = max_pool_same(self.gn_root(self.conv_root(image)).relu(), 3, 2)
        for stage in self.stages:
            x = stage(x)
        return x


def _group_norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(GROUPS, channels, eps=1e-6)
