"""DETR's networks: published sizes, official keys, padding, positions, masks, golden cases."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from reprise.errors import CheckpointError
from reprise.golden import find_cases, load_case
from reprise.nn.backbone import ConvStem, ResNetBackbone
from reprise.nn.detection import pad_images
from reprise.papers.detr.build import build_detector
from reprise.papers.detr.model import DETR
from reprise.papers.detr.module import parameter_groups
from reprise.papers.detr.parity import ADAPTERS
from reprise.papers.detr.segmentation import BoxAttention, DETRSegmentation
from reprise.papers.detr.transformer import Transformer
from reprise.papers.detr.weights import import_weights
from reprise.training.weights import read_weights


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _tiny(**options: Any) -> DETR:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "dim": 16,
        "num_heads": 2,
        "encoder_layers": 1,
        "decoder_layers": 2,
        "dim_feedforward": 24,
        "dropout": 0.0,
    }
    model = build_detector(
        num_classes=3,
        num_queries=5,
        backbone="conv_stem",
        stem_widths=(8, 16),
        **{**sizes, **options},
    )
    assert isinstance(model, DETR)
    return model


@pytest.mark.parametrize(
    ("options", "parameters"),
    [
        ({"num_classes": 91}, 41_524_768),
        ({"num_classes": 91, "dilation": True}, 41_524_768),
        ({"num_classes": 91, "backbone": "resnet101"}, 60_464_672),
        ({"num_classes": 250, "masks": True}, 42_899_288),
    ],
)
def test_published_parameter_counts(options: dict[str, Any], parameters: int) -> None:
    with torch.device("meta"):
        assert _count(build_detector(**options)) == parameters


def test_parts_and_trainable_parameters_of_r50() -> None:
    with torch.device("meta"):
        model = build_detector(num_classes=91)
    assert isinstance(model, DETR)
    parts = {name: _count(child) for name, child in model.named_children()}
    assert parts == {
        "transformer": 17_363_456,
        "class_embed": 23_644,
        "bbox_embed": 132_612,
        "query_embed": 25_600,
        "input_proj": 524_544,
        "backbone": 23_454_912,
    }
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 41_302_368
    state = model.state_dict()
    assert len(state) == 458
    assert state["transformer.encoder.layers.5.self_attn.in_proj_weight"].shape == (768, 256)
    assert "backbone.0.body.layer4.2.bn3.running_var" in state
    assert not any("num_batches_tracked" in key or ".fc." in key for key in state)


def test_dc5_doubles_the_resolution() -> None:
    image = torch.zeros(1, 3, 64, 64)
    backbone = partial(ResNetBackbone, None, block="bottleneck", layers=(1, 1, 1, 1), width=8)
    plain, dilated = backbone()(image)[-1], backbone(dilation=True)(image)[-1]
    assert plain.shape[-2:] == (2, 2)
    assert dilated.shape[-2:] == (4, 4)


def test_frozen_backbone_and_learning_rates() -> None:
    model = build_detector(num_classes=3, backbone="resnet18", dim=16, num_heads=2, dim_feedforward=16)
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert {name.split(".")[3] for name in frozen} == {"conv1", "layer1"}
    assert not any("bn" in name for name, _ in model.named_parameters())
    rest, backbone = parameter_groups(model, 1e-5)
    assert "lr" not in rest
    assert backbone["lr"] == 1e-5
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert sum(p.numel() for group in (rest, backbone) for p in group["params"]) == trained


@pytest.mark.parametrize("pre_norm", [False, True])
def test_padding_does_not_change_the_predictions(pre_norm: bool) -> None:
    """Boxes are relative to the image without padding, so they must not move when a larger image joins the batch."""
    model = _tiny(pre_norm=pre_norm).eval()
    image = torch.randn(3, 16, 24)
    alone = model(image[None])
    with torch.no_grad():
        # group norm sees padded pixels, so only the transformer is compared: features of the padded image are masked
        batch, mask = pad_images([image, torch.randn(3, 32, 32)])
        features = model.input_proj(model.backbone[0](image[None])[-1])
        padded = torch.randn(1, 16, 8, 8)
        padded[:, :, :4, :6] = features
        padding = torch.ones(1, 8, 8, dtype=torch.bool)
        padding[:, :4, :6] = False
        hidden, _ = model.transformer(padded, padding, model.backbone[1](padding), model.query_embed.weight)
    assert torch.allclose(hidden, alone.hidden, atol=1e-5)
    assert model(batch, mask).padding.shape == (2, 8, 8)


def test_decoder_starts_from_zeros_and_values_carry_no_position() -> None:
    """With zero features a position reaches only queries and keys, so the encoder's output does not see it."""
    model = _tiny().eval()
    features, position = torch.zeros(1, 16, 4, 4), torch.randn(1, 16, 4, 4)
    for parameter in model.transformer.encoder.parameters():
        parameter.data.clamp_(-0.1, 0.1)
    _, memory = model.transformer(features, None, position, model.query_embed.weight)
    assert torch.allclose(memory, memory[:, :, :1, :1].expand_as(memory), atol=1e-6)


@pytest.mark.parametrize("positions", ["attention", "decoder", "input", "none"])
@pytest.mark.parametrize("query_positions", ["attention", "input"])
def test_every_place_of_positions(positions: str, query_positions: str) -> None:
    model = _tiny(positions=positions, query_positions=query_positions).eval()
    image = torch.randn(2, 3, 16, 16)
    features = torch.randn(2, 16, 4, 4)
    flipped = features.flip(-1)
    where = model.backbone[1](torch.zeros(1, 4, 4, dtype=torch.bool))
    plain, _ = model.transformer(features, None, where, model.query_embed.weight)
    moved, _ = model.transformer(flipped, None, where, model.query_embed.weight)
    blind = positions == "none"  # without positions the transformer cannot tell a scene from its mirror image
    assert torch.allclose(plain, moved, atol=1e-5) == blind
    assert model(image).logits.shape == (2, 2, 5, 4)
    assert not torch.allclose(plain[:, :, 0], plain[:, :, 1], atol=1e-3)  # the queries stay distinct


def test_aux_outputs_share_the_decoder_norm() -> None:
    output = _tiny().eval()(torch.randn(1, 3, 16, 16))
    assert torch.allclose(output.hidden.mean(-1), torch.zeros(2, 1, 5), atol=1e-5)


def test_no_encoder_layers() -> None:
    output = _tiny(encoder_layers=0).eval()(torch.randn(1, 3, 16, 16))
    assert torch.allclose(output.memory, output.projected)


def test_recorded_attention_is_a_distribution_and_changes_nothing() -> None:
    model = _tiny().eval()
    image = torch.randn(2, 3, 16, 16)
    output, maps = model.cross_attention(image)
    assert maps.shape == (2, 2, 5, 4, 4)
    assert torch.allclose(maps.sum((-1, -2)), torch.ones(2, 2, 5), atol=1e-5)
    assert torch.allclose(output.logits, model(image).logits, atol=1e-5)


def test_mask_head_attention_is_one_softmax_over_heads_and_positions() -> None:
    padding = torch.zeros(1, 3, 4, dtype=torch.bool)
    padding[:, :, 3:] = True
    weights = BoxAttention(16, 4)(torch.randn(1, 2, 16), torch.randn(1, 16, 3, 4), padding)
    assert weights.shape == (1, 2, 4, 3, 4)
    assert torch.allclose(weights.sum((-3, -2, -1)), torch.ones(1, 2), atol=1e-6)
    assert not weights[..., 3].any()


def test_freezing_the_detector_leaves_the_mask_head() -> None:
    model = DETRSegmentation(
        DETR(ResNetBackbone("resnet18"), Transformer(128, num_heads=8, encoder_layers=1, decoder_layers=1,
                                                     dim_feedforward=16), num_classes=3, num_queries=2),
        freeze_detr=True,
    )  # fmt: skip
    trained = {name.split(".")[0] for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {"bbox_attention", "mask_head"}


def test_wrong_options() -> None:
    with pytest.raises(ValueError, match="positions"):
        _tiny(positions="everywhere")
    with pytest.raises(ValueError, match="resnet51"):
        ResNetBackbone("resnet51")
    with pytest.raises(ValueError, match="four stages"):
        build_detector(num_classes=3, backbone="conv_stem", masks=True)


def test_import_of_an_official_checkpoint_and_leftover_keys(tmp_path: Path) -> None:
    model, other = _tiny(), _tiny()
    for parameter in other.parameters():
        parameter.data.normal_()
    torch.save({"model": other.state_dict(), "epoch": 3}, tmp_path / "detr.pth")
    model.load_state_dict(import_weights(read_weights(tmp_path / "detr.pth"), model))
    assert torch.equal(model.class_embed.weight, other.class_embed.weight)
    broken = other.state_dict()
    broken["class_embed.extra"] = broken.pop("class_embed.bias")
    with pytest.raises(CheckpointError, match=r"class_embed\.extra"):
        import_weights(broken, model)
    with pytest.raises(CheckpointError, match="shapes differ"):
        import_weights(_tiny(dim_feedforward=8).state_dict(), model)
    panoptic = {f"detr.{key}": value for key, value in other.state_dict().items()} | {
        "mask_head.lay1.bias": torch.ones(1)
    }
    with pytest.raises(CheckpointError, match=r"paper\.model\.masks=true"):
        import_weights(panoptic, model)


def test_stem_features_have_the_stated_channels() -> None:
    stem = ConvStem((8, 16, 24))
    assert [feature.shape[1] for feature in stem(torch.zeros(1, 3, 32, 32))] == list(stem.channels)


def _golden_cases() -> list[Path]:
    folder = os.environ.get("REPRISE_GOLDENS")
    return find_cases(Path(folder) / "detr") if folder else []


@pytest.mark.skipif(not _golden_cases(), reason="REPRISE_GOLDENS is not set: no golden cases of official code at hand")
@pytest.mark.parametrize("folder", _golden_cases(), ids=lambda path: path.name)
def test_golden_case(folder: Path) -> None:
    stored = load_case(folder)
    ours = ADAPTERS[stored.case.kind](stored.case)
    for name, golden in stored.outputs.items():
        atol, rtol = stored.tolerance_of(name)
        assert torch.allclose(ours[name].double(), golden.double(), atol=atol, rtol=rtol), name
