"""The baseline: a small convolutional network with batch normalisation."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch.nn.functional as F
from torch import Tensor, nn


class ConvNet(nn.Module):
    """3x3 convolutions, each with batch norm and ReLU; 2x2 max-pooling between them; global average; linear head.

    Args:
        image_shape: (C, H, W).
        widths: channels of each convolution.
    """

    def __init__(self, *, image_shape: Sequence[int], num_classes: int, widths: Sequence[int]) -> None:
        super().__init__()
        convolutions = [
            nn.Conv2d(before, after, 3, padding=1, bias=False) for before, after in pairwise([image_shape[0], *widths])
        ]
        for convolution in convolutions:
            nn.init.kaiming_normal_(convolution.weight, mode="fan_out", nonlinearity="relu")
        self.convolutions = nn.ModuleList(convolutions)
        self.norms = nn.ModuleList(nn.BatchNorm2d(width) for width in widths)
        self.head = nn.Linear(widths[-1], num_classes)

    def features(self, image: Tensor) -> Tensor:
        """[B, widths[-1]]."""
        x = image
        for number, (convolution, norm) in enumerate(zip(self.convolutions, self.norms, strict=True)):
            if number:
                x = F.max_pool2d(x, 2)
            x = norm(convolution(x)).relu()
        return x.mean(dim=(2, 3))

    def forward(self, image: Tensor) -> Tensor:
        return self.head(self.features(image))
