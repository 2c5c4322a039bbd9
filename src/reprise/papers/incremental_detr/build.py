"""A detector from plain options, as the configuration gives them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from reprise.nn.backbone import build_backbone
from reprise.papers.incremental_detr.model import DeformableDETR
from reprise.papers.incremental_detr.transformer import DeformableTransformer

Stage = Literal["base", "self_supervised", "incremental"]
STAGES: tuple[Stage, ...] = ("base", "self_supervised", "incremental")


def build_detector(
    *,
    num_classes: int,
    stage: Stage = "base",
    num_queries: int = 300,
    backbone: str = "resnet50",
    dilation: bool = True,
    train_backbone: bool = True,
    stem_widths: Sequence[int] = (32, 64, 64),
    dim: int = 256,
    num_heads: int = 8,
    encoder_layers: int = 6,
    decoder_layers: int = 6,
    dim_feedforward: int = 1024,
    dropout: float = 0.1,
    levels: int = 1,
    encoder_points: int = 4,
    decoder_points: int = 4,
    box_refinement: bool = False,
) -> DeformableDETR:
    """The paper's detector by default (Deformable DETR, single scale, DC5-R50).

    Args:
        num_classes: base and novel classes together (91 for COCO: the largest id + 1).
        stage: `self_supervised` adds a last class output, for pseudo objects.
        backbone: `resnet18` .. `resnet101` with frozen batch norm (`dilation`, `train_backbone`), or `conv_stem`:
            stride-2 convolutions of `stem_widths` with group norm, to train from scratch on small images.
        levels: feature levels, 1 or at least 3.

    Raises:
        ValueError: an option that does not exist, or levels that the backbone cannot give.
    """
    if stage not in STAGES:
        raise ValueError(f"stage is {stage!r}; choose one of {', '.join(STAGES)}")
    features = build_backbone(backbone, dilation=dilation, train_backbone=train_backbone, stem_widths=stem_widths)
    transformer = DeformableTransformer(
        dim,
        num_heads=num_heads,
        encoder_layers=encoder_layers,
        decoder_layers=decoder_layers,
        dim_feedforward=dim_feedforward,
        dropout=dropout,
        levels=levels,
        encoder_points=encoder_points,
        decoder_points=decoder_points,
    )
    outputs = num_classes + (stage == "self_supervised")
    return DeformableDETR(
        features, transformer, num_classes=outputs, num_queries=num_queries, box_refinement=box_refinement
    )
