"""ViT: sizes, traps of the fact sheet, and the parts around the model."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tests.papers.vit_models import perturbed, tiny
from torch import nn

from reprise.errors import CheckpointError
from reprise.papers.vit.cnn import ConvNet
from reprise.papers.vit.criterion import sigmoid_cross_entropy, softmax_cross_entropy
from reprise.papers.vit.fewshot import few_shot_accuracy, first_of_each_class, fit_least_squares
from reprise.papers.vit.model import VisionTransformer, vision_transformer
from reprise.papers.vit.module import ViTModule, is_kernel
from reprise.papers.vit.networks import build
from reprise.papers.vit.pictures import attention_rollout, position_similarity, principal_filters
from reprise.papers.vit.positions import RelativeAttention, resize_positions, sin_cos_table, square_grid
from reprise.papers.vit.weights import (
    export_weights,
    import_weights,
)
from reprise.training.probes import Features


def parameters_of(variant: str, size: int = 224, num_classes: int = 1000, **changes: Any) -> int:
    with torch.device("meta"):
        options: dict[str, Any] = {"image_shape": (3, size, size), "num_classes": num_classes} | changes
        model = vision_transformer(variant, **options)
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(
    ("variant", "size", "expected"),
    [
        ("Ti/16", 224, 5_717_416),
        ("S/16", 224, 22_050_664),
        ("B/16", 224, 86_567_656),
        ("B/32", 224, 88_224_232),
        ("L/16", 224, 304_326_632),
        ("B/16", 384, 86_859_496),
    ],
)
def test_published_sizes(variant: str, size: int, expected: int) -> None:
    assert parameters_of(variant, size) == expected


def test_a_variant_with_replaced_sizes_and_its_errors() -> None:
    with torch.device("meta"):
        model = vision_transformer("B/16", image_shape=(3, 32, 32), num_classes=3, depth=2, width=24)
    assert (len(model.layers), model.embedding.out_channels, model.grid) == (2, 24, (2, 2))
    for unknown in ("X/16", "R99+B/16", "B16"):
        with pytest.raises(ValueError, match="unknown variant"):
            vision_transformer(unknown, image_shape=(3, 32, 32), num_classes=3)
    with pytest.raises(ValueError, match="depth, mlp_dim"):
        vision_transformer(image_shape=(3, 32, 32), num_classes=3, patch=4, width=8, num_heads=2)
    with pytest.raises(ValueError, match="do not divide"):
        tiny(num_heads=3)
    with pytest.raises(ValueError, match="unknown classifier"):
        tiny(classifier="cls")
    with pytest.raises(ValueError, match="unknown positions"):
        tiny(positions="polar")
    with pytest.raises(ValueError, match="built for images"):
        tiny()(torch.zeros(1, 3, 12, 8))


def test_first_loss_is_ln_of_the_classes_and_the_class_token_starts_at_zero() -> None:
    model = tiny()
    label = torch.tensor([0, 3, 4])
    loss = softmax_cross_entropy(model(torch.randn(3, 3, 8, 12)), label)
    assert loss.item() == pytest.approx(math.log(5), abs=1e-6)
    assert model.cls is not None
    assert not model.cls.any()
    assert model.encoder_norm.eps == model.layers[0].norm1.eps == 1e-6
    assert tiny(classifier="gap").cls is None


def test_gelu_is_the_tanh_form() -> None:
    x = torch.linspace(-4, 4, 101)
    activation = tiny().layers[0].mlp.act(x)
    assert torch.allclose(activation, F.gelu(x, approximate="tanh"), atol=1e-6)
    assert not torch.allclose(activation, F.gelu(x), atol=1e-5)


def test_query_key_and_value_are_initialised_as_three_layers() -> None:
    torch.manual_seed(0)
    weight = tiny(width=64, num_heads=4).layers[0].attn.qkv.weight
    bound = math.sqrt(6 / (64 + 64))
    for part in weight.chunk(3):
        assert 0.95 * bound < part.abs().max().item() <= bound


def test_sigmoid_loss_sums_over_classes_and_starts_small_with_the_bias() -> None:
    logits, label = torch.randn(4, 6), torch.tensor([0, 1, 5, 5])
    slow = torch.zeros(())
    for row, target in zip(logits, label, strict=True):
        for number, value in enumerate(row):
            slow = slow - (F.logsigmoid(value) if number == target else F.logsigmoid(-value)) / 4
    assert torch.allclose(sigmoid_cross_entropy(logits, label), slow, atol=1e-5)
    multi_hot = F.one_hot(label, 6).float()
    assert torch.equal(sigmoid_cross_entropy(logits, multi_hot), sigmoid_cross_entropy(logits, label))
    first = sigmoid_cross_entropy(tiny(head_bias=-10.0)(torch.randn(2, 3, 8, 12)), torch.tensor([1, 2]))
    assert first.item() == pytest.approx(10 + 5 * math.log1p(math.exp(-10)), abs=1e-4)


@pytest.mark.parametrize("positions", ["none", "learned_1d", "learned_2d", "sin_cos", "relative"])
@pytest.mark.parametrize("classifier", ["token", "gap"])
def test_without_positions_and_only_then_patches_may_be_permuted(positions: str, classifier: str) -> None:
    torch.manual_seed(0)
    model = perturbed(tiny(positions=positions, classifier=classifier)).eval()
    image = torch.randn(2, 3, 8, 12)
    patches = image.unfold(2, 4, 4).unfold(3, 4, 4)  # B C 2 3 4 4
    permuted = patches.flip(3).permute(0, 1, 2, 4, 3, 5).reshape_as(image)
    same = torch.allclose(model(image), model(permuted), atol=1e-5)
    assert same is (positions == "none")


def test_relative_attention_adds_a_key_for_each_offset() -> None:
    torch.manual_seed(0)
    attention = RelativeAttention(4, 6, 2, attn_drop=0.0, proj_drop=0.0).double()
    x = torch.randn(3, 4, 6, dtype=torch.float64)
    query, key, value = attention.qkv(x).chunk(3, -1)
    wanted = torch.zeros_like(x)
    for head in (slice(0, 3), slice(3, 6)):
        for q in range(4):
            keys = key[:, :, head] + torch.stack([attention.offsets[q - k + 3] for k in range(4)])
            weights = ((query[:, q, None, head] * keys).sum(-1) / math.sqrt(3)).softmax(-1)
            wanted[:, q, head] = (weights[..., None] * value[:, :, head]).sum(1)
    assert torch.allclose(attention(x), attention.proj(wanted))
    with pytest.raises(ValueError, match="no mask"):
        attention(x, is_causal=True)


def test_a_model_with_relative_positions_shows_the_attention_that_it_uses() -> None:
    torch.manual_seed(0)
    model = perturbed(tiny(positions="relative", depth=1)).eval()
    block, image = model.layers[0], torch.randn(2, 3, 8, 12)
    x = model.tokens(image)
    value = block.attn.qkv(block.norm1(x)).chunk(3, -1)[2].unflatten(-1, (2, -1)).transpose(1, 2)
    mixed = (model.attention_maps(image)[0] @ value).transpose(1, 2).flatten(2)
    assert torch.allclose(block.attn.proj(mixed), block.attn(block.norm1(x)), atol=1e-6)
    assert model.positions is None
    assert not is_kernel("blocks.0.attn.offsets", model.get_parameter("blocks.0.attn.offsets"))
    with pytest.raises(CheckpointError, match=r"blocks\.0\.attn\.offsets"):
        import_weights(export_weights(model.state_dict(), model), model)


@pytest.mark.parametrize(("old", "new"), [((4, 4), (6, 6)), ((7, 7), (3, 3)), ((2, 5), (4, 3)), ((1, 1), (2, 2))])
def test_position_interpolation_is_scipys_linear_zoom(old: tuple[int, int], new: tuple[int, int]) -> None:
    from scipy.ndimage import zoom

    table = torch.randn(1, old[0] * old[1] + 1, 6, dtype=torch.float64)
    grid = table[0, 1:].reshape(*old, 6).numpy()
    expected = zoom(grid, (new[0] / old[0], new[1] / old[1], 1), order=1, mode="nearest").reshape(-1, 6)
    ours = resize_positions(table, old, new, class_token=True)
    assert torch.equal(ours[:, 0], table[:, 0])
    assert np.allclose(ours[0, 1:], expected, atol=1e-9)


def test_position_tables_refuse_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match="do not fit"):
        resize_positions(torch.zeros(1, 9, 4), (3, 3), (4, 4), class_token=True)
    with pytest.raises(ValueError, match="square"):
        square_grid(12)
    with pytest.raises(ValueError, match="4 divides"):
        sin_cos_table((2, 2), 6, class_token=False)


def test_sin_cos_table_is_row_major_with_a_zero_class_position() -> None:
    table = sin_cos_table((2, 3), 8, class_token=True)[0]
    assert table.shape == (7, 8)
    assert not table[0].any()
    row, column = 1, 2
    expected = [f(a * w) for a in (column, row) for f in (math.sin, math.cos) for w in (1.0, 1e-4)]
    assert torch.allclose(table[1 + 3 * row + column], torch.tensor(expected), atol=1e-6)


def test_attention_maps_are_those_of_the_forward_pass() -> None:
    model = perturbed(tiny()).eval()
    image = torch.randn(2, 3, 8, 12)
    maps = model.attention_maps(image)
    assert maps.shape == (2, 2, 2, 7, 7)
    assert torch.allclose(maps.sum(-1), torch.ones(2, 2, 2, 7), atol=1e-5)
    block = model.layers[0]
    x = model.tokens(image)
    value = block.attn.qkv(block.norm1(x)).reshape(2, 7, 3, 2, 8)[:, :, 2].transpose(1, 2)
    mixed = block.attn.proj((maps[0] @ value).transpose(1, 2).flatten(2))
    assert torch.allclose(mixed, block.attn(block.norm1(x)), atol=1e-5)


def test_least_squares_agrees_in_both_forms_and_with_its_normal_equations() -> None:
    rng = torch.Generator().manual_seed(0)
    feature, label = torch.randn(9, 4, generator=rng), torch.tensor([0, 1, 2] * 3)
    weight = fit_least_squares(feature, label, 3, ridge=0.5)
    x = torch.cat([feature, torch.ones(9, 1)], 1).double()
    y = F.one_hot(label, 3).double() * 2 - 1
    assert torch.allclose(x.T @ (x @ weight - y) + 0.5 * weight, torch.zeros(5, 3, dtype=torch.float64), atol=1e-9)
    wide = torch.cat([feature, torch.zeros(9, 20)], 1)
    assert torch.allclose(fit_least_squares(wide, label, 3, ridge=0.5)[[0, 1, 2, 3, -1]], weight, atol=1e-9)
    with pytest.raises(ValueError, match="ridge"):
        fit_least_squares(feature, label, 3, ridge=0.0)


def test_few_shot_takes_the_same_number_of_every_class() -> None:
    label = torch.tensor([0, 0, 1, 0, 1, 1])
    assert first_of_each_class(label, 2, 2).tolist() == [0, 1, 2, 4]
    with pytest.raises(ValueError, match="fewer than 4"):
        first_of_each_class(label, 2, 4)
    feature = F.one_hot(label, 2).float()
    items = Features(feature, label)
    assert few_shot_accuracy(items, items, num_classes=2, shots=2) == 1.0


def test_rollout_of_uniform_attention_is_flat_and_of_one_sided_attention_is_not() -> None:
    uniform = torch.full((2, 1, 3, 7, 7), 1 / 7)
    assert torch.allclose(attention_rollout(uniform, (2, 3)), torch.ones(1, 2, 3))
    looking = torch.zeros(1, 1, 1, 7, 7)
    looking[..., 5] = 1
    assert attention_rollout(looking, (2, 3))[0].argmax().item() == 4
    gap = attention_rollout(torch.full((2, 1, 3, 6, 6), 1 / 6), (2, 3))
    assert torch.allclose(gap, torch.ones(1, 2, 3))


def test_what_pictures_show() -> None:
    model = tiny(positions="learned_2d")
    similarity = position_similarity(model)
    assert similarity.shape == (6, 2, 3)
    assert torch.allclose(similarity.flatten(1).diagonal(), torch.ones(6), atol=1e-5)
    assert principal_filters(model.embedding.weight, 5).shape == (5, 3, 4, 4)
    with pytest.raises(ValueError, match="without positions"):
        position_similarity(tiny(positions="none"))


def module(network: str = "vit", **changes: Any) -> ViTModule:
    return ViTModule(
        build(
            network,
            lambda: tiny(image_shape=(3, 12, 12)),
            lambda: ConvNet(image_shape=(3, 12, 12), num_classes=5, widths=(4, 6)),
        ),
        lambda groups: torch.optim.AdamW(groups, lr=1e-3, weight_decay=0.3),
        num_classes=5,
        **changes,
    )


@pytest.mark.parametrize("network", ["vit", "cnn"])
def test_weight_decay_reaches_kernels_only_unless_told(network: str) -> None:
    ours = module(network)
    kernels, others = ours.configure_optimizers().param_groups
    assert (kernels["weight_decay"], others["weight_decay"]) == (0.3, 0.0)
    assert all(parameter.ndim >= 2 for parameter in kernels["params"])
    every = sum(1 for _ in ours.network.parameters())
    assert len(kernels["params"]) + len(others["params"]) == every
    assert len(module(network, decay_all=True).configure_optimizers().param_groups[0]["params"]) == every
    assert not is_kernel("positions.table", nn.Parameter(torch.zeros(1, 3, 4)))


def test_the_module_loads_official_weights_when_training_starts(tmp_path: Path) -> None:
    source = perturbed(tiny(image_shape=(3, 8, 8), num_classes=9))
    official = {name: value.numpy() for name, value in export_weights(source.state_dict(), source).items()}
    np.savez(tmp_path / "official.npz", **official)
    ours = module(pretrained=str(tmp_path / "official.npz"))
    assert not torch.equal(ours.network.head.weight, source.embedding.weight)
    ours.setup("fit")
    assert isinstance(ours.network, VisionTransformer)
    assert torch.equal(ours.network.embedding.weight, source.embedding.weight)
    assert not ours.network.head.weight.any()
    with pytest.raises(CheckpointError, match="do not exist"):
        module(pretrained="absent.npz").setup("fit")


def test_unknown_options_of_the_module_are_refused() -> None:
    with pytest.raises(ValueError, match="unknown network 'mlp'"):
        module("mlp")
    with pytest.raises(ValueError, match="unknown loss 'hinge'"):
        module(loss="hinge")


def test_the_polyak_average_is_state_of_the_run_and_what_is_evaluated() -> None:
    torch.manual_seed(0)
    ours = module(polyak=0.75)
    image = torch.randn(2, *ours.network.image_shape)
    before = {name: value.clone() for name, value in ours.network.state_dict().items()}
    with torch.no_grad():
        for parameter in ours.network.parameters():
            parameter.add_(1.0)
    ours.on_train_batch_end(None, {}, 0)
    assert ours.average is not None
    for name, value in ours.average.named_parameters():
        assert torch.allclose(value, before[name] + 0.25), name
        assert f"average.{name}" in ours.state_dict()
    ours.train()
    assert torch.equal(ours(image), ours.network(image))
    ours.eval()
    assert torch.equal(ours(image), ours.average(image))
    assert not torch.equal(ours(image), ours.network(image))
    trained = sum(len(group["params"]) for group in ours.parameter_groups())
    assert trained == len(list(ours.network.parameters()))
    assert "sharding" in ours.refuses
    assert "sharding" not in module().refuses
    with pytest.raises(ValueError, match="between 0 and 1"):
        module(polyak=1.0)
