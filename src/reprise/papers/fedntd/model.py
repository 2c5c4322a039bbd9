"""The small CNNs of the paper: two convolutions and two linear layers, without normalisation layers."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn


class FedAvgNet(nn.Module):
    """conv - ReLU - pool - conv - ReLU - pool - linear - ReLU - classifier.

    Args:
        image_shape: (channels, height, width) of the input.
        channels: of the two convolutions (stride 1, size-preserving padding).
        kernel_size: odd.
        hidden: units of the linear layer; its activations are the features of an image.
    """

    def __init__(
        self,
        image_shape: Sequence[int],
        num_classes: int,
        *,
        channels: Sequence[int] = (32, 64),
        kernel_size: int = 5,
        hidden: int = 512,
    ) -> None:
        super().__init__()
        first, second = channels
        self.image_shape = tuple(image_shape)
        depth, height, width = image_shape
        self.conv2d_1 = nn.Conv2d(depth, first, kernel_size, padding=kernel_size // 2)
        self.conv2d_2 = nn.Conv2d(first, second, kernel_size, padding=kernel_size // 2)
        self.linear_1 = nn.Linear(second * (height // 4) * (width // 4), hidden)
        self.classifier = nn.Linear(hidden, num_classes)

    def forward(self, image: Tensor, return_features: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """Logits [B, num_classes] (and features [B, hidden]) of images [B, C, H, W], or [B, H, W] with one channel."""
        if image.ndim == 3:
            image = image[:, None]
        # pooling before the ReLU gives the same values and gradients as after it, at a quarter of the ReLU's work
        hidden = nn.functional.max_pool2d(self.conv2d_1(image), 2).relu()
        hidden = nn.functional.max_pool2d(self.conv2d_2(hidden), 2).relu()
        features = self.linear_1(hidden.flatten(1)).relu()
        logits = self.classifier(features)
        return (logits, features) if return_features else logits


def fedavg_cifar(num_classes: int = 10) -> FedAvgNet:
    """The main model, for 3x32x32; 2,156,490 parameters with 10 classes."""
    return FedAvgNet((3, 32, 32), num_classes)


def fedavg_mnist(num_classes: int = 10) -> FedAvgNet:
    """For 1x28x28; 1,663,370 parameters with 10 classes."""
    return FedAvgNet((1, 28, 28), num_classes)


def fedavg_tiny(num_classes: int = 200) -> FedAvgNet:
    """For Tiny-ImageNet's 3x64x64."""
    return FedAvgNet((3, 64, 64), num_classes)


def fedavg_digits(num_classes: int = 10) -> FedAvgNet:
    """For 1x8x8 digits: 3x3 convolutions of 16 and 32 channels, 64 hidden units; 13,706 parameters."""
    return FedAvgNet((1, 8, 8), num_classes, channels=(16, 32), kernel_size=3, hidden=64)
