"""MoCo's losses, steps and encoders, and what its traps would break."""

from __future__ import annotations

import copy
import math
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.checkpoints import assert_equal, imported, recipe_model, save_checkpoint
from torch import Tensor, nn
from torch.nn import functional as F

from reprise.errors import CheckpointError
from reprise.nn.ema import update_momentum
from reprise.papers.moco.build import build
from reprise.papers.moco.criterion import in_batch_contrast, info_nce, info_nce_logits
from reprise.papers.moco.encoders import ResNet, VisionTransformer, grid_positions
from reprise.papers.moco.linear import LinearClassification
from reprise.papers.moco.model import MoCo, MoCoV3
from reprise.papers.moco.module import MomentumContrast
from reprise.papers.moco.probe import LinearClassifier
from reprise.papers.moco.weights import import_backbone, import_weights, official_name
from reprise.training.schedules import epoch_cosine
from reprise.training.weights import read_weights


def resnet(**options: Any) -> ResNet:
    return ResNet("basic", [1, 1, 1, 1], width=4, stem="cifar_stride", **options)


def moco(**options: Any) -> MoCo:
    return MoCo(resnet(), **{"dim": 6, "queue_size": 16, "momentum": 0.9, **options})


def pair(count: int = 8) -> tuple[Tensor, Tensor]:
    return torch.randn(count, 3, 16, 16), torch.randn(count, 3, 16, 16)


def orders(count: int = 8) -> list[Tensor]:
    return [torch.randperm(count), torch.randperm(count)]


def test_info_nce_against_the_formula() -> None:
    query, positive = F.normalize(torch.randn(5, 4), dim=1), F.normalize(torch.randn(5, 4), dim=1)
    queue = F.normalize(torch.randn(4, 7), dim=0)
    for row, loss in enumerate(info_nce(info_nce_logits(query, positive, queue, 0.2))):
        scores = [math.exp(float(query[row] @ key) / 0.2) for key in (positive[row], *queue.T)]
        assert float(loss) == pytest.approx(-math.log(scores[0] / sum(scores)), rel=1e-4)


def test_chance_level_is_ln_of_the_number_of_keys() -> None:
    assert info_nce(torch.zeros(3, 1025)) == pytest.approx([math.log(1025)] * 3)


def test_in_batch_contrast_against_a_loop() -> None:
    query, keys = torch.randn(3, 4), torch.randn(6, 4)
    found = in_batch_contrast(query, keys, 0.5, first=2)
    for row in range(3):
        scores = [math.exp(float(F.cosine_similarity(query[row], key, dim=0)) / 0.5) for key in keys]
        assert float(found[row]) == pytest.approx(-2 * 0.5 * math.log(scores[row + 2] / sum(scores)), rel=1e-4)


def test_keys_are_enqueued_after_the_logits() -> None:
    model = moco()
    assert model.queue is not None
    before = model.queue.keys.clone()
    view1, view2 = pair()
    query = model(view1).detach()
    result = model.contrast(view1, view2, orders())
    torch.testing.assert_close(result.logits[:, 1:].detach(), query @ before / model.temperature)
    assert not torch.equal(model.queue.keys[:, :8], before[:, :8])
    assert torch.equal(model.queue.keys[:, 8:], before[:, 8:])


def test_no_gradient_reaches_the_key_encoder() -> None:
    model = moco(symmetric=True)
    model.contrast(*pair(), orders()).loss.backward()
    assert all(parameter.grad is None for parameter in model.encoder_k.parameters())
    assert all(parameter.grad is not None for parameter in model.encoder_q.parameters())


def test_symmetric_loss_enqueues_both_views() -> None:
    model = moco(symmetric=True, momentum=1.0)
    view1, view2 = pair()
    model.contrast(view1, view2, orders())
    assert model.queue is not None
    assert model.queue.position.item() == 0
    key1 = model.keys(view1, None)
    torch.testing.assert_close(model.queue.keys[:, :8].T, key1, atol=1e-4, rtol=1e-4)


def test_shuffling_changes_no_key_when_batch_norm_sees_the_whole_batch() -> None:
    model = moco()
    view = pair()[0]
    torch.testing.assert_close(model.keys(view, torch.randperm(8)), model.keys(view, None), atol=1e-5, rtol=1e-5)


def test_shuffling_mixes_the_groups_of_batch_norm() -> None:
    model = _built(norm="split", splits=2)
    assert isinstance(model, MoCo)
    view, order = pair()[0], torch.tensor([0, 4, 1, 5, 2, 6, 3, 7])
    assert (model.keys(view, order) - model.keys(view, None)).abs().max() > 1e-3


def test_batch_keys_instead_of_a_queue() -> None:
    result = moco(queue_size=0).contrast(*pair(), orders())
    assert result.logits.shape == (8, 8)
    assert torch.equal(result.label, torch.arange(8))


def test_update_order_of_the_paper_is_the_same() -> None:
    """Algorithm 1 moves the key encoder after SGD, the released code before the next keys: equal losses."""
    released, views = moco(), [pair() for _ in range(3)]
    paper: Any = copy.deepcopy(released)
    paper.move = lambda: None
    order = orders()
    losses: dict[str, list[float]] = {"released": [], "paper": []}
    for name, model in (("released", released), ("paper", paper)):
        optimizer = torch.optim.SGD(model.encoder_q.parameters(), lr=0.05)
        for view1, view2 in views:
            loss = model.contrast(view1, view2, order).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if name == "paper":
                update_momentum(model.encoder_k, model.encoder_q, model.momentum)
            losses[name].append(float(loss.detach()))
    assert losses["released"] == pytest.approx(losses["paper"], rel=1e-6)


def test_without_momentum_keys_come_from_the_query_encoder() -> None:
    model = moco(momentum=0.0)
    with torch.no_grad():
        for parameter in model.encoder_q.parameters():
            parameter.add_(0.1)
    model.move()
    for ours, theirs in zip(model.encoder_k.parameters(), model.encoder_q.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def vit(**options: Any) -> VisionTransformer:
    return VisionTransformer(image_size=16, patch=4, width=16, depth=2, num_heads=4, **options)


def test_frozen_patches_stay_and_the_first_layer_is_the_next() -> None:
    encoder = vit()
    model = MoCoV3(encoder, dim=6, mlp_dim=12)
    model.contrast(*pair(), 0.99).loss.backward()
    assert encoder.patch_embed.get_parameter("proj.weight").grad is None
    assert model.encoder.first_layer.grad is not None
    free = vit(freeze_patches=False)
    assert MoCoV3(free, dim=6, mlp_dim=12).encoder.first_layer is next(free.patch_embed.parameters())


def test_heads_of_v3() -> None:
    norms = {name: [type(layer).__name__ for layer in part] for name, part in _v3_parts().items()}
    hidden = ["Linear", "SyncBatchNorm", "ReLU"]
    assert norms["resnet projector"] == [*hidden, "Linear", "SyncBatchNorm"]
    assert norms["resnet predictor"] == [*hidden, "Linear"]
    assert norms["vit projector"] == [*hidden, *hidden, "Linear", "SyncBatchNorm"]
    assert norms["vit predictor"] == [*hidden, "Linear", "SyncBatchNorm"]


def _v3_parts() -> dict[str, Any]:
    parts: dict[str, Any] = {}
    for name, encoder in (("resnet", resnet()), ("vit", vit())):
        model = MoCoV3(encoder, dim=6, mlp_dim=12)
        parts |= {f"{name} projector": encoder.head, f"{name} predictor": model.predictor}
    return parts


def test_momentum_schedule_ends_at_one() -> None:
    model = MoCoV3(resnet(), dim=6, mlp_dim=12, momentum=0.99, total_steps=10)
    assert [model.momentum_at(step) for step in (0, 5, 10)] == pytest.approx([0.99, 0.995, 1.0])
    model.momentum_cosine = False
    assert model.momentum_at(10) == 0.99


def test_rows_and_columns_of_positions() -> None:
    table = grid_positions(3, 5, 8)[0, 1:].view(3, 5, 8)
    assert torch.equal(table[0, :, :4], table[2, :, :4]), "the first half says the column"
    assert torch.equal(table[:, 0, 4:], table[:, 4, 4:]), "the second half says the row"
    assert grid_positions(3, 5, 8)[0, 0].abs().max() == 0


def test_positions_as_released() -> None:
    ours, released = (grid_positions(14, 14, 16, released=flag)[0, 1:].view(14, 14, 16) for flag in (False, True))
    assert torch.equal(released, ours.transpose(0, 1))
    assert int((released == ours).all(-1).sum()) == 14
    odd = grid_positions(3, 5, 16, released=True)[0, 1:].view(3, 5, 16)
    assert not torch.equal(odd[0, :, :8], odd[2, :, :8])


def test_query_key_and_value_start_as_layers_of_their_own() -> None:
    weight = vit().get_parameter("blocks.0.attn.qkv.weight")
    assert float(weight.detach().abs().max()) == pytest.approx(math.sqrt(6 / 32), rel=0.05)


def test_epoch_cosine_moves_once_an_epoch_and_never_ends_at_zero() -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    factor = epoch_cosine(optimizer, total_steps=12, steps_per_epoch=3).lr_lambdas[0]
    assert factor(0) == factor(2) == 1.0
    assert factor(11) == pytest.approx(0.5 * (1 + math.cos(0.75 * math.pi)))


def test_classifier_freezes_the_encoder_in_evaluation_mode() -> None:
    model = LinearClassifier(resnet(), 3).train()
    before = {name: value.clone() for name, value in model.encoder.state_dict().items()}
    model(torch.randn(4, 3, 16, 16)).sum().backward()
    assert all(torch.equal(value, before[name]) for name, value in model.encoder.state_dict().items())
    assert [name for name, value in model.named_parameters() if value.grad is not None] == ["head.weight", "head.bias"]


def test_official_names_come_back() -> None:
    model = moco()
    official = {f"module.{official_name(key, residual=True)}": value for key, value in model.state_dict().items()}
    assert "module.encoder_q.fc.0.weight" in official
    assert "module.queue_ptr" in official
    mapped = import_weights(official, model)
    assert all(torch.equal(value, mapped[key]) for key, value in model.state_dict().items())


def test_whole_checkpoints_are_imported(tmp_path: Path) -> None:
    model = recipe_model("moco/small")
    assert isinstance(model, MoCo)
    official = {f"module.{official_name(key, residual=True)}": value for key, value in model.state_dict().items()}
    whole = save_checkpoint(tmp_path / "checkpoint_0199.pth.tar", model, state_dict=official)
    assert_equal(imported("moco/small", whole), model.state_dict())
    trunk = import_backbone(read_weights(whole), model.encoder)
    assert torch.equal(trunk["conv1.weight"], model.encoder.first_layer)


def test_trunk_alone_is_imported_and_leftovers_are_named() -> None:
    model = moco()
    trunk = import_backbone({f"model.{key}": value for key, value in model.state_dict().items()}, resnet())
    assert not any(key.startswith("head.") for key in trunk)
    with pytest.raises(CheckpointError, match="no MoCo encoder"):
        import_backbone({"conv1.weight": torch.zeros(1)}, resnet())
    lacking = {key: value for key, value in model.state_dict().items() if "encoder_k.conv1" not in key}
    with pytest.raises(CheckpointError, match=r"encoder_k\.conv1\.weight"):
        import_weights(lacking, model)


def test_linear_stage_takes_over_the_trunk_and_trains_one_layer() -> None:
    sgd = partial(torch.optim.SGD, lr=0.1)
    earlier = MomentumContrast(moco(), sgd, num_classes=3, image_size=16)
    stage = LinearClassification(moco(), sgd, num_classes=3, image_size=16)
    stage.continue_from(earlier.state_dict())
    assert torch.equal(stage.classifier.encoder.get_parameter("conv1.weight"), earlier.model.encoder.first_layer)
    stage.training_step({"image": pair()[0], "label": torch.arange(8) % 3}, 0).backward()
    assert [name for name, value in stage.named_parameters() if value.grad is not None] == [
        "model.head.weight",
        "model.head.bias",
    ]


def _built(**options: Any) -> MoCo | MoCoV3:
    choices: dict[str, Any] = {"framework": "queue", "network": "resnet", "norm": "batch", "splits": 1, **options}
    return build(
        resnet=resnet,
        vit=vit,
        queue=lambda encoder: MoCo(encoder, dim=6, queue_size=16),
        in_batch=lambda encoder: MoCoV3(encoder, dim=6, mlp_dim=12),
        **choices,
    )


@pytest.mark.parametrize("choice", [{"framework": "v2"}, {"network": "cnn"}, {"norm": "layer"}])
def test_unknown_choices_are_named(choice: dict[str, str]) -> None:
    with pytest.raises(ValueError, match="unknown choice"):
        _built(**choice)
