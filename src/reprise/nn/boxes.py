"""Boxes as tensors: conversions, IoU and generalised IoU (Rezatofighi et al., 2019), differentiable and batched.

`cxcywh` is (centre x, centre y, width, height), `xyxy` is (left, top, right, bottom); units are the caller's
(pixels, or fractions of the image). Boxes need x2 >= x1 and y2 >= y1; generalised IoU also needs an enclosing box
of positive area, so one of the two boxes may be a point but not both at the same place.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torchvision.ops import box_convert, box_iou, generalized_box_iou


def cxcywh_to_xyxy(boxes: Tensor) -> Tensor:
    """[..., 4] centre form to corner form."""
    return box_convert(boxes, "cxcywh", "xyxy")


def xyxy_to_cxcywh(boxes: Tensor) -> Tensor:
    """[..., 4] corner form to centre form."""
    return box_convert(boxes, "xyxy", "cxcywh")


def pairwise_iou(boxes: Tensor, others: Tensor) -> Tensor:
    """IoU of every pair, `xyxy` [..., N, 4] and [..., M, 4] to [..., N, M]."""
    return box_iou(boxes, others)


def pairwise_giou(boxes: Tensor, others: Tensor) -> Tensor:
    """Generalised IoU of every pair: IoU - |C minus union| / |C|, C the smallest box around both; in [-1, 1].

    Args:
        boxes, others: `xyxy` [..., N, 4] and [..., M, 4].

    Returns:
        [..., N, M].
    """
    return generalized_box_iou(boxes, others)


def paired_giou(boxes: Tensor, others: Tensor) -> Tensor:
    """Generalised IoU of corresponding boxes, `xyxy` [..., 4] and [..., 4] to [...]."""
    return generalized_box_iou(boxes.unsqueeze(-2), others.unsqueeze(-2))[..., 0, 0]


def scale_to_pixels(boxes: Tensor, size: Tensor) -> Tensor:
    """Boxes relative to the image to pixels.

    Args:
        boxes: [..., N, 4] in [0, 1], either form.
        size: [..., 2] image (height, width) in pixels.
    """
    height, width = size.unbind(-1)
    return boxes * torch.stack([width, height, width, height], dim=-1).to(boxes.dtype).unsqueeze(-2)
