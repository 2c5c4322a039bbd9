"""The linear classification protocol: a frozen pre-trained encoder under one trained layer."""

from __future__ import annotations

from typing import Self

import torch
from torch import Tensor, nn

from reprise.papers.moco.encoders import Encoder


class LinearClassifier(nn.Module):
    """Images [B, 3, H, W] to logits [B, num_classes]; only `head` trains, on features in evaluation mode.

    The encoder never updates its batch-norm statistics. `head` starts from N(0, 0.01) (released main_lincls.py).
    """

    def __init__(self, encoder: Encoder, num_classes: int) -> None:
        super().__init__()
        encoder.head = nn.Identity()
        self.encoder = encoder.requires_grad_(False).eval()
        self.head = nn.Linear(encoder.width, num_classes)
        nn.init.normal_(self.head.weight, std=0.01)
        nn.init.zeros_(self.head.bias)

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        self.encoder.eval()
        return self

    def forward(self, image: Tensor) -> Tensor:
        with torch.no_grad():
            feature = self.encoder.features(image)
        return self.head(feature)
