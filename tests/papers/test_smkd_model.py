"""SMKD's networks, the import of official weights, the training step's parts, and golden cases."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.checkpoints import assert_equal, imported, recipe_model, save_checkpoint
from timm.layers import Attention, DropPath
from timm.models.vision_transformer import Block
from torch import Tensor
from torch.nn import functional as F

from reprise.errors import CheckpointError, ConfigError
from reprise.evidence.parity import run_parity
from reprise.golden import load_case
from reprise.papers.smkd import steps
from reprise.papers.smkd.model import (
    DistillationNetwork,
    WeightNormLinear,
    block_with_attention,
    follow,
    make_teacher,
    network,
    patch_weights,
    pooled_features,
)
from reprise.papers.smkd.weights import import_weights

TINY: dict[str, Any] = {"channels": 1, "width": 24, "depth": 2, "num_heads": 3, "hidden": 16, "bottleneck": 8}


def tiny(**options: Any) -> DistillationNetwork:
    return network(16, 4, **(TINY | {"prototypes": 12} | options))


def test_published_sizes() -> None:
    with torch.device("meta"):
        backbones = {variant: network(224, 16, variant=variant).backbone for variant in ("tiny", "small", "base")}
    counts = {name: sum(p.numel() for p in backbone.parameters()) for name, backbone in backbones.items()}
    assert counts == {"tiny": 5524416 + 192, "small": 21665664 + 384, "base": 85798656 + 768}


def test_golden_cases(goldens: Path) -> None:
    results = run_parity(goldens, "smkd")
    assert not [(result.case, result.message) for result in results if not result.passed]


def test_masked_patches_do_not_reach_the_output() -> None:
    backbone, image = tiny().backbone.eval(), torch.randn(2, 1, 16, 16)
    mask = torch.zeros(2, 4, 4, dtype=torch.bool)
    mask[:, 1, 2] = True
    other = image.clone()
    other[:, :, 4:8, 8:12] += 5
    torch.testing.assert_close(backbone(image, mask), backbone(other, mask))
    assert not torch.allclose(backbone(image), backbone(other))


@pytest.mark.parametrize(("height", "width"), [(8, 8), (12, 20), (24, 16)])
def test_positions_are_those_of_bicubic_interpolation(height: int, width: int) -> None:
    backbone = tiny().backbone
    learned = backbone.pos_embed[:, 1:].unflatten(1, (4, 4)).permute(0, 3, 1, 2)
    scale = [(height // 4 + 0.1) / 4, (width // 4 + 0.1) / 4]
    expected = F.interpolate(learned, scale_factor=scale, mode="bicubic")
    torch.testing.assert_close(backbone.positions(height, width)[:, 1:], expected.flatten(2).transpose(1, 2))


def test_other_sizes_get_interpolated_positions() -> None:
    backbone = tiny().backbone
    assert backbone.positions(16, 16) is backbone.pos_embed
    assert backbone(torch.randn(2, 1, 8, 12)).shape == (2, 1 + 6, 24)
    torch.testing.assert_close(backbone.positions(8, 8)[:, 0], backbone.pos_embed[:, 0])


def test_attention_is_that_of_the_block() -> None:
    block, x = tiny().backbone.blocks[0].eval(), torch.randn(2, 5, 24)
    assert isinstance(block, Block)
    assert isinstance(block.attn, Attention)
    output, weights = block_with_attention(block, x)
    assert torch.equal(output, block(x))
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 3, 5))
    value = block.attn.qkv(block.norm1(x)).unflatten(-1, (3, 3, 8))[:, :, 2].transpose(1, 2)
    mixed = block.attn.proj((weights @ value).transpose(1, 2).flatten(2))
    torch.testing.assert_close(mixed, block.attn(block.norm1(x)), atol=1e-5, rtol=1e-5)


def test_weight_norm_matches_torch() -> None:
    layer, x = WeightNormLinear(6, 4), torch.randn(3, 6)
    with torch.no_grad():
        layer.weight_g.uniform_(0.5, 2)
    expected = x @ (layer.weight_g * F.normalize(layer.weight_v, dim=1)).t()
    torch.testing.assert_close(layer(x), expected)


def test_a_shared_head_has_one_set_of_prototypes() -> None:
    head = tiny().head
    assert head.last_layer is head.last_layer2
    apart = tiny(shared_head=False).head
    assert apart.last_layer is not apart.last_layer2
    assert not any(p.requires_grad for n, p in tiny(train_prototype_norm=False).named_parameters() if "weight_g" in n)


def test_the_teacher_follows_without_gradients_or_stochastic_depth() -> None:
    student = tiny(drop_path=0.5)
    teacher = make_teacher(student)
    assert any(isinstance(m, DropPath) and m.drop_prob for m in student.modules())
    assert not any(isinstance(m, DropPath) and m.drop_prob for m in teacher.modules())
    assert not any(p.requires_grad for p in teacher.parameters())
    before = teacher.backbone.cls_token.clone()
    with torch.no_grad():
        student.backbone.cls_token.add_(1)
    follow(teacher, student, 0.9)
    torch.testing.assert_close(teacher.backbone.cls_token, before + 0.1)


def test_prototypes_are_frozen_by_dropping_their_gradients() -> None:
    student = tiny()
    student(torch.randn(2, 1, 16, 16)).cls.sum().backward()
    steps.prepare_gradients(student, max_norm=3.0, freeze_prototypes=True)
    assert student.head.last_layer.weight_v.grad is None
    assert student.head.mlp[0].weight.grad is not None


def test_features_are_normalised_part_by_part() -> None:
    tokens, attention = torch.randn(3, 5, 6), torch.rand(3, 2, 5, 5).softmax(-1)
    feature = pooled_features(tokens, attention, average=True)
    assert feature.shape == (3, 18)
    torch.testing.assert_close(feature.unflatten(1, (3, 6)).norm(dim=-1), torch.ones(3, 3))
    torch.testing.assert_close(patch_weights(attention).sum(-1), torch.ones(3))
    with pytest.raises(ValueError, match="at least one"):
        pooled_features(tokens, attention, cls=False, weighted=False)


def test_sizes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ConfigError, match="whole numbers"):
        network(16, 5, **TINY)
    with pytest.raises(ConfigError, match="unknown variant"):
        network(16, 4, variant="huge")


def checkpoint(model: DistillationNetwork) -> dict[str, dict[str, Tensor]]:
    state = model.state_dict()
    teacher = {key: value for key, value in state.items() if not key.endswith("masked_embed")}
    return {"student": {f"module.{key}": value for key, value in state.items()}, "teacher": teacher}


def test_official_checkpoints_are_imported() -> None:
    source, target = tiny(), tiny()
    both = checkpoint(source)
    target.load_state_dict(import_weights(both["teacher"], target))
    torch.testing.assert_close(target.head.last_layer.weight_v, source.head.last_layer.weight_v)
    target.backbone.load_state_dict(import_weights(both["teacher"], target.backbone))
    with pytest.raises(CheckpointError, match="lacks keys"):
        import_weights({key: value for key, value in both["teacher"].items() if "norm.weight" not in key}, target)
    with pytest.raises(CheckpointError, match="model lacks"):
        import_weights(both["teacher"] | {"backbone.extra": torch.zeros(1)}, target)


def test_whole_checkpoints_give_the_teacher_else_the_student(tmp_path: Path) -> None:
    """Also with one head for both kinds of tokens, whose prototypes lie in the file under two names."""
    model = recipe_model("smkd/small")
    assert isinstance(model, DistillationNetwork)
    assert model.head.shared
    both = checkpoint(model)
    teacher = {key: value + 1 for key, value in both["teacher"].items()}
    idle = {"backbone.masked_embed": torch.zeros_like(model.backbone.masked_embed)}
    whole = save_checkpoint(tmp_path / "checkpoint0150.pth", model, student=both["student"], teacher=teacher)
    assert_equal(imported("smkd/small", whole), teacher | idle)
    student = save_checkpoint(tmp_path / "student.pth", model, student=both["student"])
    assert_equal(imported("smkd/small", student), model.state_dict())


def test_golden_weights_are_imported(goldens: Path) -> None:
    case = load_case(goldens / "smkd" / "forward").case
    model = network(16, 4, width=24, depth=2, num_heads=3, prototypes=20, hidden=32, bottleneck=12)
    state = import_weights(case.weights, model)
    torch.testing.assert_close(state["backbone.norm.weight"], case.weights["teacher.backbone.norm.weight"])


def test_keys_share_no_bias_gradient() -> None:
    """It is zero but for rounding, and Adam would blow the rounding up."""
    student = tiny()
    student(torch.randn(2, 1, 16, 16)).cls.sum().backward()
    attention = next(module for module in student.modules() if isinstance(module, Attention))
    assert attention.qkv.bias.grad is not None
    assert attention.qkv.bias.grad[24:48].abs().max() < 1e-5 * attention.qkv.bias.grad.abs().max()
    steps.prepare_gradients(student, max_norm=3.0, freeze_prototypes=False)
    assert not attention.qkv.bias.grad[24:48].any()
    assert attention.qkv.bias.grad[48:].any()
