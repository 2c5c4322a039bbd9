"""The modified ResNet (section 2.4): a three-convolution stem, anti-aliased strides, attention pooling."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Norm = Callable[[int], nn.Module]
EXPANSION = 4


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 convolutions of stride 1; where the block is strided, an average pool precedes the last one."""

    def __init__(self, channels: int, planes: int, stride: int, norm: Norm) -> None:
        super().__init__()
        wide = planes * EXPANSION
        self.conv1 = nn.Conv2d(channels, planes, 1, bias=False)
        self.bn1 = norm(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, padding=1, bias=False)
        self.bn2 = norm(planes)
        self.pool = nn.AvgPool2d(stride) if stride > 1 else nn.Identity()
        self.conv3 = nn.Conv2d(planes, wide, 1, bias=False)
        self.bn3 = norm(wide)
        self.downsample: nn.Sequential | None = None
        if stride > 1 or channels != wide:
            self.downsample = nn.Sequential()
            self.downsample.add_module("-1", nn.AvgPool2d(stride))
            self.downsample.add_module("0", nn.Conv2d(channels, wide, 1, bias=False))
            self.downsample.add_module("1", norm(wide))

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.pool(F.relu(self.bn2(self.conv2(out))))
        out = self.bn3(self.conv3(out))
        return F.relu(out + (x if self.downsample is None else self.downsample(x)))


class AttentionPool(nn.Module):
    """[B, C, H, W] to [B, E]: multi-head attention whose only query is the mean position.

    Keys and values are the mean and all H W positions, each with its learned position entry (the mean's is entry 0).
    """

    def __init__(self, grid: int, channels: int, heads: int, embed_dim: int) -> None:
        super().__init__()
        self.heads = heads
        self.positional_embedding = nn.Parameter(torch.randn(grid**2 + 1, channels) / channels**0.5)
        self.k_proj = nn.Linear(channels, channels)
        self.q_proj = nn.Linear(channels, channels)
        self.v_proj = nn.Linear(channels, channels)
        self.c_proj = nn.Linear(channels, embed_dim)
        for projection in (self.q_proj, self.k_proj, self.v_proj, self.c_proj):
            nn.init.normal_(projection.weight, std=channels**-0.5)

    def pooled(self, x: Tensor) -> Tensor:
        """[B, C], before the output projection."""
        tokens = x.flatten(2).transpose(1, 2)
        tokens = torch.cat([tokens.mean(1, keepdim=True), tokens], dim=1) + self.positional_embedding.to(x.dtype)
        query, key, value = self.q_proj(tokens[:, :1]), self.k_proj(tokens), self.v_proj(tokens)
        split = [part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in (query, key, value)]
        return F.scaled_dot_product_attention(*split).transpose(1, 2).flatten(1)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(self.pooled(x))


class ModifiedResNet(nn.Module):
    """Images [B, 3, R, R] to embeddings [B, E]; the features before the projection have 32 width (four stages).

    Args:
        image_size: R, at least the network's total stride (32 with four stages).
        width: channels after the stem; stage i has planes width * 2^i.
        layers: blocks of each stage.
        heads: of the attention pool; width * 32 / 64 in all released models.
        norm: makes the normalisation of so many channels.

    Raises:
        ValueError: the last feature map has not as many cells as the attention pool, one per total stride, or the heads
            do not divide the channels.
    """

    def __init__(
        self,
        *,
        image_size: int,
        width: int,
        layers: Sequence[int],
        heads: int,
        embed_dim: int,
        norm: Norm = nn.BatchNorm2d,
    ) -> None:
        super().__init__()
        stride, channels = 2 ** (len(layers) + 1), width * EXPANSION * 2 ** (len(layers) - 1)
        cells = (image_size + 1) // 2 // 2 ** len(layers)  # the first convolution rounds up, the pools down
        if not 0 < cells == image_size // stride:
            raise ValueError(f"an image of {image_size} pixels does not fit the total stride {stride}")
        if channels % heads:
            raise ValueError(f"{heads} heads do not divide {channels} channels")
        self.image_size = image_size
        self.conv1 = nn.Conv2d(3, width // 2, 3, stride=2, padding=1, bias=False)
        self.bn1 = norm(width // 2)
        self.conv2 = nn.Conv2d(width // 2, width // 2, 3, padding=1, bias=False)
        self.bn2 = norm(width // 2)
        self.conv3 = nn.Conv2d(width // 2, width, 3, padding=1, bias=False)
        self.bn3 = norm(width)
        self.stages = len(layers)
        into = width
        for stage, blocks in enumerate(layers):
            planes = width * 2**stage
            strides = [1 if stage == 0 else 2] + [1] * (blocks - 1)
            inputs = [into] + [planes * EXPANSION] * (blocks - 1)
            made = [Bottleneck(*pair, norm) for pair in zip(inputs, [planes] * blocks, strides, strict=True)]
            self.add_module(f"layer{stage + 1}", nn.Sequential(*made))
            into = planes * EXPANSION
        self.attnpool = AttentionPool(image_size // stride, channels, heads, embed_dim)
        self._initialise()

    def _initialise(self) -> None:
        """Each block starts as its shortcut: the last norm's gain is zero."""
        for module in self.modules():
            if isinstance(module, Bottleneck) and isinstance(module.bn3.weight, Tensor):
                nn.init.zeros_(module.bn3.weight)

    def convolved(self, image: Tensor) -> Tensor:
        """[B, C, R / stride, R / stride], before the pool."""
        x = F.relu(self.bn1(self.conv1(image)))
        x = F.relu(self.bn2(self.conv2(x)))
        x = F.avg_pool2d(F.relu(self.bn3(self.conv3(x))), 2)
        for stage in range(self.stages):
            x = self.get_submodule(f"layer{stage + 1}")(x)
        return x

    def features(self, image: Tensor) -> Tensor:
        """[B, C], before the projection: what the paper's linear probes use."""
        return self.attnpool.pooled(self.convolved(image))

    def forward(self, image: Tensor) -> Tensor:
        return self.attnpool(self.convolved(image))
