"""The networks that the paper and its PyTorch re-implementation train with SAM.

Images are [B, C, H, W]; all return logits [B, num_classes]. ResNet-50/101/152 come from torchvision,
EfficientNets from timm.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch.nn.functional as F
from timm.layers import Conv2dSame
from torch import Tensor, nn


class MLP(nn.Module):
    """Linear layers with an activation between them, on flattened inputs.

    Args:
        widths: input size, hidden sizes, number of classes.
        activation: `relu` or `tanh`.
    """

    def __init__(self, widths: Sequence[int], activation: str = "relu") -> None:
        super().__init__()
        between = {"relu": nn.ReLU, "tanh": nn.Tanh}[activation]
        layers: list[nn.Module] = []
        for fan_in, fan_out in pairwise(widths):
            layers += [between(), nn.Linear(fan_in, fan_out)]
        self.layers = nn.Sequential(*layers[1:])

    def forward(self, image: Tensor) -> Tensor:
        return self.layers(image.flatten(1))


def pooled_padded_sum(branch: Tensor, shortcut: Tensor) -> Tensor:
    """branch + shortcut, where a shortcut with fewer channels is average-pooled to size and zero-padded at the end.

    Args:
        branch: [B, C, H, W].
        shortcut: [B, c, H*s, W*s] with c <= C.
    """
    missing = branch.shape[1] - shortcut.shape[1]
    if missing:
        stride = shortcut.shape[-1] // branch.shape[-1]
        shortcut = F.pad(F.avg_pool2d(shortcut, stride) if stride > 1 else shortcut, (0, 0, 0, 0, 0, missing))
    return branch + shortcut


class WideBlock(nn.Module):
    """norm-relu-conv-norm-relu-conv; `activate_first` lets the shortcut start behind the first norm-relu."""

    def __init__(self, fan_in: int, width: int, stride: int, activate_first: bool) -> None:
        super().__init__()
        self.activate_first = activate_first
        self.norm1 = nn.BatchNorm2d(fan_in)
        self.conv1 = Conv2dSame(fan_in, width, 3, stride, bias=False)
        self.norm2 = nn.BatchNorm2d(width)
        self.conv2 = Conv2dSame(width, width, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        active = F.relu(self.norm1(x))
        branch = self.conv2(F.relu(self.norm2(self.conv1(active))))
        return pooled_padded_sum(branch, active if self.activate_first else x)


class WideResNet(nn.Module):
    """Wide residual network of google-research/sam: identity shortcuts, average-pooled and zero-padded; no projections.

    Depth is 6 * blocks_per_group + 4, so 4 blocks and width 10 make the WRN-28-10 of the paper's table 1. Padding is
    TensorFlow's SAME (one-sided at stride 2). Convolutions start Kaiming-normal by fan-out, the last layer uniform in
    +-1/sqrt(num_classes) with zero bias; the default initialisation costs half a point on CIFAR-100 (released comment).

    Args:
        group_shortcuts: additional shortcuts around each group and the whole body, as in AutoAugment's code.
    """

    def __init__(
        self,
        blocks_per_group: int = 4,
        width: int = 10,
        num_classes: int = 10,
        in_channels: int = 3,
        group_shortcuts: bool = False,
    ) -> None:
        super().__init__()
        self.group_shortcuts = group_shortcuts
        self.stem = Conv2dSame(in_channels, 16, 3, bias=False)
        widths = [16, 16 * width, 32 * width, 64 * width]
        self.groups = nn.ModuleList()
        for number, (fan_in, fan_out) in enumerate(pairwise(widths)):
            stride = 1 if number == 0 else 2
            blocks = [WideBlock(fan_in, fan_out, stride, activate_first=number == 0)]
            blocks += [WideBlock(fan_out, fan_out, 1, activate_first=False) for _ in range(blocks_per_group - 1)]
            self.groups.append(nn.Sequential(*blocks))
        self.norm = nn.BatchNorm2d(widths[-1])
        self.head = nn.Linear(widths[-1], num_classes)
        self._initialise()

    def _initialise(self) -> None:
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
        bound = 1 / math.sqrt(self.head.out_features)
        nn.init.uniform_(self.head.weight, -bound, bound)
        nn.init.zeros_(self.head.bias)

    def forward(self, image: Tensor) -> Tensor:
        x = self.stem(image)
        for group in self.groups:
            x = pooled_padded_sum(group(x), x) if self.group_shortcuts else group(x)
        if self.group_shortcuts:
            x = pooled_padded_sum(x, image)
        return self.head(F.relu(self.norm(x)).mean((2, 3)))


class ProjectedUnit(nn.Module):
    """First unit of a stage of davda54's network: norm-relu shared by the branch and a 1x1 projection."""

    def __init__(self, fan_in: int, width: int, stride: int, dropout: float) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(fan_in)
        self.conv1 = nn.Conv2d(fan_in, width, 3, stride, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(width)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.projection = nn.Conv2d(fan_in, width, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        active = F.relu(self.norm1(x))
        branch = self.conv2(self.dropout(F.relu(self.norm2(self.conv1(active)))))
        return branch + self.projection(active)


class IdentityUnit(nn.Module):
    """Further units of a stage of davda54's network: pre-activation with an identity shortcut."""

    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(width)
        self.conv1 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(width)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        branch = F.relu(self.norm2(self.conv1(F.relu(self.norm1(x)))))
        return x + self.conv2(self.dropout(branch))


class ProjectedWideResNet(nn.Module):
    """Wide residual network of davda54/sam's example, "WRN-16-8" by default.

    A stage is one projected unit and (depth - 4) // 6 identity units: one unit more than the name says.
    Convolutions start Kaiming-normal by fan-in, the last layer at zero.
    """

    def __init__(
        self, depth: int = 16, width: int = 8, num_classes: int = 10, in_channels: int = 3, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.stem = nn.Conv2d(in_channels, 16, 3, 1, 1, bias=False)
        widths = [16, 16 * width, 32 * width, 64 * width]
        self.stages = nn.ModuleList()
        for number, (fan_in, fan_out) in enumerate(pairwise(widths)):
            units: list[nn.Module] = [ProjectedUnit(fan_in, fan_out, 1 if number == 0 else 2, dropout)]
            units += [IdentityUnit(fan_out, dropout) for _ in range((depth - 4) // 6)]
            self.stages.append(nn.Sequential(*units))
        self.norm = nn.BatchNorm2d(widths[-1])
        self.head = nn.Linear(widths[-1], num_classes)
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight, mode="fan_in", nonlinearity="relu")
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, image: Tensor) -> Tensor:
        x = self.stem(image)
        for stage in self.stages:
            x = stage(x)
        return self.head(F.avg_pool2d(F.relu(self.norm(x)), 8).flatten(1))


class PlainBlock(nn.Module):
    """conv-norm-relu-conv-norm, added to the identity (strided and zero-padded where the shape changes), then relu."""

    def __init__(self, fan_in: int, width: int, stride: int) -> None:
        super().__init__()
        self.stride, self.missing = stride, width - fan_in
        self.conv1 = nn.Conv2d(fan_in, width, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        branch = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        shortcut = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.missing))
        return F.relu(branch + shortcut)


class CifarResNet(nn.Module):
    """He et al.'s residual network for CIFAR with parameter-free shortcuts (section 4.2); ResNet-32 in SAM's table 4.

    Args:
        depth: 6n + 2.
        width: channels of the first stage (16 in He et al.); the next ones have twice and four times as many.
        stem_stride: 1 in He et al.; 2 saves three quarters of the work in small experiments.
    """

    def __init__(
        self, depth: int = 32, width: int = 16, num_classes: int = 10, in_channels: int = 3, stem_stride: int = 1
    ) -> None:
        super().__init__()
        if (depth - 2) % 6:
            raise ValueError(f"a CIFAR ResNet has depth 6n + 2, not {depth}")
        widths = [width, width, 2 * width, 4 * width]
        self.stem = nn.Conv2d(in_channels, width, 3, stem_stride, 1, bias=False)
        self.norm = nn.BatchNorm2d(width)
        blocks = []
        for number, (fan_in, fan_out) in enumerate(pairwise(widths)):
            blocks.append(PlainBlock(fan_in, fan_out, 1 if number == 0 else 2))
            blocks += [PlainBlock(fan_out, fan_out, 1) for _ in range((depth - 2) // 6 - 1)]
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(widths[-1], num_classes)
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, image: Tensor) -> Tensor:
        x = self.blocks(F.relu(self.norm(self.stem(image))))
        return self.head(x.mean((2, 3)))
