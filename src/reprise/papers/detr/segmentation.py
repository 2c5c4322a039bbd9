"""DETR's mask head (paper section 5, figure 8): attention maps of the queries, refined by a pyramid of convolutions.

Legend: B images, Q queries, h heads, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reprise.papers.detr.model import DETR, DetrOutput

NORM_GROUPS = 8


class BoxAttention(nn.Module):
    """Multi-head attention weights without values: one softmax over heads AND positions together.

    Args:
        dim: width of queries and keys.
        num_heads: heads; the scale is (dim / num_heads) ** -0.5.
    """

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q_linear = nn.Linear(dim, dim)
        self.k_linear = nn.Linear(dim, dim)
        for layer in (self.q_linear, self.k_linear):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, query: Tensor, memory: Tensor, padding: Tensor | None) -> Tensor:
        """query [B, Q, D], memory [B, D, H, W], padding bool [B, H, W] or None, to weights [B, Q, h, H, W]."""
        height, width = memory.shape[-2:]
        query = self.q_linear(query).unflatten(-1, (self.num_heads, -1))
        key = self.k_linear(memory.flatten(2).transpose(1, 2)).unflatten(-1, (self.num_heads, -1))
        scores = torch.einsum("bqhd,bkhd->bqhk", query * query.shape[-1] ** -0.5, key)
        if padding is not None:
            scores = scores.masked_fill(padding.flatten(1)[:, None, None, :], float("-inf"))
        return scores.flatten(2).softmax(-1).view(*scores.shape[:3], height, width)


class MaskHead(nn.Module):
    """Five convolutions with group norm; backbone stages join on the way up to stride 4.

    Args:
        inputs: channels of the input (width + heads).
        stages: channels of the backbone stages at strides 16, 8 and 4.
        dim: the transformer's width; the inner layers have dim / 2, / 4, / 8 and / 16 channels.
    """

    def __init__(self, inputs: int, stages: Sequence[int], dim: int) -> None:
        super().__init__()
        widths = (inputs, dim // 2, dim // 4, dim // 8, dim // 16)
        before = (inputs, *widths[:-1])
        for index, (source, width) in enumerate(zip(before, widths, strict=True), start=1):
            self.add_module(f"lay{index}", nn.Conv2d(source, width, 3, padding=1))
            self.add_module(f"gn{index}", nn.GroupNorm(NORM_GROUPS, width))
        for index, (source, width) in enumerate(zip(stages, widths[1:4], strict=True), start=1):
            self.add_module(f"adapter{index}", nn.Conv2d(source, width, 1))
        self.out_lay = nn.Conv2d(widths[-1], 1, 3, padding=1)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_uniform_(module.weight, a=1)
                nn.init.zeros_(module.get_parameter("bias"))

    def _block(self, index: int, x: Tensor) -> Tensor:
        return torch.relu(self.get_submodule(f"gn{index}")(self.get_submodule(f"lay{index}")(x)))

    def forward(self, projected: Tensor, attention: Tensor, stages: Sequence[Tensor]) -> Tensor:
        """Mask logits at stride 4.

        Args:
            projected: the transformer's input [B, D, H, W].
            attention: [B, Q, h, H, W].
            stages: backbone features at strides 16, 8 and 4 (with DC5 the first has the stride of `projected`).

        Returns:
            [B, Q, H4, W4].
        """
        queries = attention.shape[1]
        x = torch.cat([projected.repeat_interleave(queries, dim=0), attention.flatten(0, 1)], dim=1)
        x = self._block(2, self._block(1, x))
        for index, stage in enumerate(stages, start=1):
            lateral = self.get_submodule(f"adapter{index}")(stage).repeat_interleave(queries, dim=0)
            x = self._block(index + 2, lateral + F.interpolate(x, size=lateral.shape[-2:], mode="nearest"))
        return self.out_lay(x).squeeze(1).unflatten(0, (-1, queries))


class SegmentationOutput(NamedTuple):
    """A detector's output with mask logits [B, Q, H4, W4] and the attention maps [B, Q, h, H, W] they came from."""

    detection: DetrOutput
    masks: Tensor
    attention: Tensor


class DETRSegmentation(nn.Module):
    """A detector with masks for every query.

    Args:
        detr: the detector; its backbone must give four stages (strides 4 to 32).
        freeze_detr: train the mask head alone, as the paper's 25-epoch schedule does.
    """

    def __init__(self, detr: DETR, *, freeze_detr: bool = False) -> None:
        super().__init__()
        self.detr = detr
        if freeze_detr:
            detr.requires_grad_(False)
        dim, heads = detr.transformer.dim, detr.transformer.num_heads
        self.bbox_attention = BoxAttention(dim, heads)
        self.mask_head = MaskHead(dim + heads, detr.channels[-2::-1], dim)

    def forward(self, image: Tensor, mask: Tensor | None = None) -> SegmentationOutput:
        """image [B, 3, H0, W0], mask bool [B, H0, W0] (True = padding) or None."""
        output = self.detr(image, mask)
        attention = self.bbox_attention(output.hidden[-1], output.memory, output.padding)
        masks = self.mask_head(output.projected, attention, output.features[-2::-1])
        return SegmentationOutput(output, masks, attention)


def instance_masks(
    pred_masks: Tensor, sizes: Tensor, original_sizes: Tensor, *, threshold: float = 0.5
) -> list[Tensor]:
    """Binary masks of every query at the original image sizes.

    Args:
        pred_masks: logits [B, Q, h, w].
        sizes: int64 [B, 2] (height, width) of each image inside the padded batch.
        original_sizes: int64 [B, 2] of each image before any resizing.
        threshold: on the probability.

    Returns:
        per image bool [Q, height, width].
    """
    padded = tuple(sizes.max(0).values.tolist())
    on = F.interpolate(pred_masks, size=padded, mode="bilinear").sigmoid() > threshold
    masks = []
    for image, size, original in zip(on, sizes.tolist(), original_sizes.tolist(), strict=True):
        cropped = image[:, : size[0], : size[1]].unsqueeze(1).float()
        masks.append(F.interpolate(cropped, size=tuple(original), mode="nearest").squeeze(1).bool())
    return masks
