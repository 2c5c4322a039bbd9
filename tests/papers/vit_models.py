"""Small Vision Transformers that the tests of ViT share."""

from __future__ import annotations

from typing import Any

import torch

from reprise.papers.vit.model import VisionTransformer, vision_transformer


def tiny(**changes: Any) -> VisionTransformer:
    options: dict[str, Any] = {
        "image_shape": (3, 8, 12),
        "num_classes": 5,
        "patch": 4,
        "width": 16,
        "depth": 2,
        "num_heads": 2,
        "mlp_dim": 24,
    }
    return vision_transformer(**(options | changes))


def perturbed(model: VisionTransformer, seed: int = 0) -> VisionTransformer:
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=rng))
    return model
