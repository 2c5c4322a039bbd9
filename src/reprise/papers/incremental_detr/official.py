"""Our detector and losses from the released code's argument names, as golden cases give them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from reprise.nn.backbone import ResNetBackbone
from reprise.papers.incremental_detr.criterion import IncrementalCriterion
from reprise.papers.incremental_detr.model import DeformableDETR
from reprise.papers.incremental_detr.transformer import DeformableTransformer


def detector_of(config: Mapping[str, Any], num_classes: int) -> DeformableDETR:
    """A detector from official argument names."""
    body = config["backbone"]
    backbone = ResNetBackbone(
        None,
        block=body["block"],
        layers=body["layers"],
        width=body["base"],
        dilation=body.get("dilation", False),
        train_backbone=body.get("train_backbone", True),
    )
    transformer = DeformableTransformer(
        config["hidden_dim"],
        num_heads=config["nheads"],
        encoder_layers=config["enc_layers"],
        decoder_layers=config["dec_layers"],
        dim_feedforward=config["dim_feedforward"],
        dropout=config["dropout"],
        levels=config["num_feature_levels"],
        encoder_points=config["enc_n_points"],
        decoder_points=config["dec_n_points"],
    )
    refinement = config.get("with_box_refine", False)
    return DeformableDETR(
        backbone, transformer, num_classes=num_classes, num_queries=config["num_queries"], box_refinement=refinement
    )


def criterion_of(config: Mapping[str, Any]) -> IncrementalCriterion:
    """The released behaviour, with the official weights."""
    terms = ("loss_ce", "loss_bbox", "loss_giou")
    selected = {name: config[f"{name}_select_coef"] for name in terms if f"{name}_select_coef" in config}
    return IncrementalCriterion(
        class_cost=config.get("set_cost_class", 2),
        l1_cost=config.get("set_cost_bbox", 5),
        giou_cost=config.get("set_cost_giou", 2),
        class_coef=config.get("cls_loss_coef", 2),
        l1_coef=config.get("bbox_loss_coef", 5),
        giou_coef=config.get("giou_loss_coef", 2),
        focal_alpha=config.get("focal_alpha", 0.25),
        aux_loss=config.get("aux_loss", True),
        pseudo_coefs=selected,
        feature_kd_coef=config.get("loss_fm_kd_coef", 0.1),
        class_kd_coef=config.get("loss_cls_kd_coef", 2),
        as_released=True,
    )
