"""A detector from plain options, as the configuration gives them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from reprise.nn.backbone import build_backbone
from reprise.papers.detr.model import DETR
from reprise.papers.detr.segmentation import DETRSegmentation
from reprise.papers.detr.transformer import QueryPositions, SpatialPositions, Transformer


def build_detector(
    *,
    num_classes: int,
    num_queries: int = 100,
    backbone: str = "resnet50",
    dilation: bool = False,
    train_backbone: bool = True,
    stem_widths: Sequence[int] = (32, 64, 64),
    dim: int = 256,
    num_heads: int = 8,
    encoder_layers: int = 6,
    decoder_layers: int = 6,
    dim_feedforward: int = 2048,
    dropout: float = 0.1,
    pre_norm: bool = False,
    position: Literal["sine", "learned"] = "sine",
    positions: SpatialPositions = "attention",
    query_positions: QueryPositions = "attention",
    masks: bool = False,
    freeze_detector: bool = False,
) -> DETR | DETRSegmentation:
    """The paper's detector by default (DETR-R50).

    Args:
        num_classes: the largest class id + 1 (91 for COCO, 250 for COCO panoptic).
        backbone: `resnet18` .. `resnet101` with frozen batch norm (`dilation`, `train_backbone`), or `conv_stem`:
            stride-2 convolutions of `stem_widths` with group norm, to train from scratch on small images.
        position: kind of the spatial encoding; `positions` and `query_positions` say where it and the queries go
            (see `transformer.py`).
        masks: add the mask head; `freeze_detector` trains it alone.

    Raises:
        ValueError: an option that does not exist, or masks on a backbone without stages at strides 4, 8, 16, 32.
    """
    if backbone == "conv_stem" and masks:
        raise ValueError("the conv_stem backbone lacks the four stages that masks need")
    features = build_backbone(backbone, dilation=dilation, train_backbone=train_backbone, stem_widths=stem_widths)
    transformer = Transformer(
        dim,
        num_heads=num_heads,
        encoder_layers=encoder_layers,
        decoder_layers=decoder_layers,
        dim_feedforward=dim_feedforward,
        dropout=dropout,
        pre_norm=pre_norm,
        positions=positions,
        query_positions=query_positions,
    )
    detector = DETR(features, transformer, num_classes=num_classes, num_queries=num_queries, position=position)
    return DETRSegmentation(detector, freeze_detr=freeze_detector) if masks else detector
