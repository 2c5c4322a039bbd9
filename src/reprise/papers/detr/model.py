"""DETR's detector (paper section 3.2, figure 2): backbone, transformer, object queries and prediction heads.

Legend: B images, H x W feature map, Q queries, C classes, L decoder layers, D width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from reprise.nn.backbone import Backbone
from reprise.nn.mlp import MLP
from reprise.nn.position import LearnedPosition2d, SinePosition2d, downsample_mask
from reprise.papers.detr.transformer import Transformer


class DetrOutput(NamedTuple):
    """Predictions of every decoder layer (the last one last), and what they were made from.

    Attributes:
        logits: [L, B, Q, C + 1]; the last class is "no object".
        boxes: [L, B, Q, 4] cxcywh in [0, 1], relative to the image without padding.
        hidden: decoder outputs [L, B, Q, D].
        memory: encoder output [B, D, H, W].
        projected: the transformer's input [B, D, H, W].
        features: backbone stages.
        padding: bool [B, H, W] at the resolution of `memory`, or None when nothing is padded.
        position: spatial position encoding [B, D, H, W], or [1, D, H, W] when nothing is padded.
    """

    logits: Tensor
    boxes: Tensor
    hidden: Tensor
    memory: Tensor
    projected: Tensor
    features: list[Tensor]
    padding: Tensor | None
    position: Tensor


class DETR(nn.Module):
    """Detection as set prediction.

    Args:
        backbone: images to a list of feature maps, the last one used.
        transformer: encoder and decoder.
        num_classes: the largest class id + 1, NOT the number of classes (91 for COCO); index `num_classes` is
            "no object".
        num_queries: predictions per image; more than the largest number of objects.
        position: `sine` or `learned` spatial encoding.
    """

    def __init__(
        self,
        backbone: Backbone,
        transformer: Transformer,
        *,
        num_classes: int,
        num_queries: int,
        position: Literal["sine", "learned"] = "sine",
    ) -> None:
        super().__init__()
        if position not in ("sine", "learned"):
            raise ValueError(f"position is {position!r}; choose sine or learned")
        dim = transformer.dim
        encoding = SinePosition2d(dim // 2) if position == "sine" else LearnedPosition2d(dim // 2)
        self.num_classes, self.num_queries = num_classes, num_queries
        self.transformer = transformer
        self.class_embed = nn.Linear(dim, num_classes + 1)
        self.bbox_embed = MLP((dim, dim, dim, 4))
        self.query_embed = nn.Embedding(num_queries, dim)
        self.input_proj = nn.Conv2d(backbone.channels[-1], dim, 1)
        self.channels = backbone.channels
        self.backbone = nn.ModuleList([backbone, encoding])

    def forward(self, image: Tensor, mask: Tensor | None = None) -> DetrOutput:
        """Predict.

        Args:
            image: normalised float [B, 3, H0, W0], padded at the bottom and right.
            mask: bool [B, H0, W0], True = padding; None when nothing is padded.
        """
        features = self.backbone[0](image)
        last = features[-1]
        padding = None if mask is None else downsample_mask(mask, last.shape[-2:])
        no_padding = last.new_zeros(1, *last.shape[-2:], dtype=torch.bool)  # one encoding for all images
        position = self.backbone[1](no_padding if padding is None else padding).to(last.dtype)
        projected = self.input_proj(last)
        hidden, memory = self.transformer(projected, padding, position, self.query_embed.weight)
        # in full precision under autocast: the losses compare small differences
        logits, boxes = self.class_embed(hidden).float(), self.bbox_embed(hidden).float().sigmoid()
        return DetrOutput(logits, boxes, hidden, memory, projected, features, padding, position)

    @torch.no_grad()
    def cross_attention(self, image: Tensor, mask: Tensor | None = None) -> tuple[DetrOutput, Tensor]:
        """Predict in evaluation mode and keep what the queries look at.

        Returns:
            the output, and the attention of every decoder layer on the feature map, averaged over heads:
            [L, B, Q, H, W], each map summing to 1.
        """
        was_training = self.training
        self.eval()
        with recorded_attention(self.transformer.decoder.attention_modules()) as maps:
            output = self(image, mask)
        self.train(was_training)
        height, width = output.memory.shape[-2:]
        return output, torch.stack(maps).unflatten(-1, (height, width))


@contextmanager
def recorded_attention(modules: Sequence[nn.Module]) -> Iterator[list[Tensor]]:
    """Attention weights [B, queries, keys] of the modules' calls, in call order, while the context lasts."""
    maps: list[Tensor] = []

    def ask(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return args, {**kwargs, "need_weights": True}

    def keep(module: nn.Module, args: object, result: tuple[Tensor, Tensor]) -> None:
        maps.append(result[1])

    handles = [module.register_forward_pre_hook(ask, with_kwargs=True) for module in modules]
    handles += [module.register_forward_hook(keep) for module in modules]
    try:
        yield maps
    finally:
        for handle in handles:
            handle.remove()
