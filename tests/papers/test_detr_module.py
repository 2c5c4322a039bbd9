"""The module in a Trainer: with and without masks, evaluation of every layer, pictures."""

from __future__ import annotations

from functools import partial

import pytest
import pytorch_lightning as pl
import torch

from reprise.data.shapes.dataset import ShapesDetection
from reprise.nn.detection import padding_of
from reprise.papers.detr.build import build_detector
from reprise.papers.detr.criterion import SetCriterion
from reprise.papers.detr.module import DetrModule
from reprise.training.module import PaperModule

ADAMW = partial(torch.optim.AdamW, lr=1e-3)


def _data(masks: bool = False) -> ShapesDetection:
    scene = {"max_objects": 2, "image_size": 32, "shapes": ("circle", "square")}
    return ShapesDetection(sizes=(16, 8, 8), scene=scene, masks=masks, batch_size=4, steps=2, eval_batch_size=4)


def _run(module: PaperModule, data: ShapesDetection) -> dict[str, float]:
    trainer = pl.Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        gradient_clip_val=0.1,
        num_sanity_val_steps=0,
    )
    trainer.fit(module, datamodule=data)
    trained = dict(trainer.callback_metrics)
    trainer.test(module, datamodule=data, verbose=False)
    return {name: float(value) for name, value in {**trained, **trainer.callback_metrics}.items()}


@pytest.mark.filterwarnings("ignore")
def test_detector_trains_evaluates_and_draws() -> None:
    detector = build_detector(
        num_classes=2,
        num_queries=4,
        backbone="conv_stem",
        stem_widths=(8, 16),
        dim=16,
        num_heads=2,
        encoder_layers=1,
        decoder_layers=2,
        dim_feedforward=16,
    )
    module = DetrModule(detector, SetCriterion(2), ADAMW, as_released=True)
    assert module.criterion.as_released
    metrics = _run(module, _data())
    assert {"test/ap", "test/ap50", "test/ap50_nms", "test/nms_gain", "test/duplicates"} <= metrics.keys()
    assert metrics["test/layer1_ap50"] == metrics["test/ap50"]
    assert metrics["test/nms_gain"] == pytest.approx(metrics["test/ap50_nms"] - metrics["test/ap50"])
    assert [picture.name for picture in module.pictures()] == ["detections", "attention", "centres", "layers"]


@pytest.mark.filterwarnings("ignore")
def test_masks_train_with_a_frozen_detector() -> None:
    model = build_detector(
        num_classes=2,
        num_queries=3,
        backbone="resnet18",
        dim=128,
        num_heads=8,
        encoder_layers=1,
        decoder_layers=1,
        dim_feedforward=16,
        masks=True,
        freeze_detector=True,
    )
    module = DetrModule(model, SetCriterion(2), ADAMW)
    head, detector = (
        model.get_parameter(name).detach().clone() for name in ("mask_head.lay5.weight", "detr.class_embed.weight")
    )
    metrics = _run(module, _data(masks=True))
    assert metrics["train/loss_mask"] > 0
    assert metrics["train/loss_dice"] > 0
    assert not torch.equal(model.get_parameter("mask_head.lay5.weight"), head)
    assert torch.equal(model.get_parameter("detr.class_embed.weight"), detector)


def test_no_padding_needs_no_mask() -> None:
    mask = torch.zeros(2, 4, 4, dtype=torch.bool)
    assert padding_of({"mask": mask}) is None
    mask[1, 3] = True
    assert padding_of({"mask": mask}) is mask
