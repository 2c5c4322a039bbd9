"""SAM's networks, losses, sharpness measures and module, against independent formulas."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reprise.data.digits import Digits
from reprise.errors import CheckpointError, ConfigError
from reprise.papers.sam import criterion
from reprise.papers.sam.model import MLP, CifarResNet, ProjectedWideResNet, WideResNet, pooled_padded_sum
from reprise.papers.sam.module import SharpnessAwareClassifier
from reprise.papers.sam.weights import import_weights, projected_wide_resnet_names
from reprise.training.sharpness import SAM


def count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    ("model", "expected"),
    [(lambda: WideResNet(4, 10), 36_220_634), (lambda: CifarResNet(32), 464_154)],
)
def test_published_sizes(model: Any, expected: int) -> None:
    with torch.device("meta"):
        assert count(model()) == expected


def test_wide_resnet_starts_as_the_released_code_says() -> None:
    model = WideResNet(1, 2, num_classes=16)
    assert model.head.weight.abs().max() <= 1 / math.sqrt(16)
    assert not model.head.bias.any()
    conv = model.get_parameter("groups.2.0.conv2.weight")  # fan-out 128 * 9
    assert conv.std().item() == pytest.approx(math.sqrt(2 / (128 * 9)), rel=0.05)


@pytest.mark.parametrize("group_shortcuts", [False, True])
def test_wide_resnet_takes_other_sizes(group_shortcuts: bool) -> None:
    model = WideResNet(1, 1, num_classes=5, in_channels=1, group_shortcuts=group_shortcuts)
    assert model(torch.randn(2, 1, 16, 16)).shape == (2, 5)


def test_shortcuts_are_pooled_and_padded_at_the_end() -> None:
    shortcut = torch.randn(1, 2, 4, 4)
    total = pooled_padded_sum(torch.zeros(1, 3, 2, 2), shortcut)
    torch.testing.assert_close(total[:, :2], F.avg_pool2d(shortcut, 2))
    assert not total[:, 2].any()


def test_example_network_has_a_unit_more_than_its_depth_says() -> None:
    model = ProjectedWideResNet(16, 1)
    assert [len(list(stage.children())) for stage in model.stages] == [3, 3, 3]
    assert not model.head.weight.any()


def test_cifar_resnet_depth_must_fit() -> None:
    with pytest.raises(ValueError, match="6n"):
        CifarResNet(18)


@pytest.mark.parametrize(("classes", "smoothing"), [(4, 0.1), (2, 0.3), (10, 0.0)])
def test_smoothed_divergence_is_cross_entropy_less_the_targets_entropy(classes: int, smoothing: float) -> None:
    logits, label = torch.randn(6, classes), torch.randint(0, classes, (6,))
    for row, given, value in zip(logits, label, criterion.smoothed_divergence(logits, label, smoothing), strict=True):
        target = [1 - smoothing if k == given else smoothing / (classes - 1) for k in range(classes)]
        expected = sum(t * (math.log(t) - float(row.log_softmax(0)[k])) for k, t in enumerate(target) if t > 0)
        assert float(value) == pytest.approx(expected, rel=1e-4, abs=1e-5)


def test_the_two_smoothing_conventions_differ() -> None:
    logits, label = torch.randn(6, 4), torch.randint(0, 4, (6,))
    ours = criterion.SmoothedDivergence(0.1)(logits, label)
    entropy = -(0.9 * math.log(0.9) + 0.1 * math.log(0.1 / 3))
    same_convention = F.cross_entropy(logits, label, label_smoothing=0.1 * 4 / 3)  # s/K over all = s'/(K-1) over others
    torch.testing.assert_close(ours + entropy, same_convention)


def quadratic(hessian: Tensor, slope: Tensor) -> criterion.LossOfWeights:
    def loss(weights: criterion.Weights) -> Tensor:
        w = torch.cat([weights["a"], weights["b"]])
        return 0.5 * w @ hessian @ w + slope @ w

    return loss


def test_sharpness_measures_on_a_quadratic() -> None:
    basis, _ = torch.linalg.qr(torch.randn(5, 5))
    hessian = basis @ torch.diag(torch.tensor([4.0, 2.0, 1.0, 0.5, 0.1])) @ basis.T
    weights = {"a": torch.zeros(2), "b": torch.zeros(3)}
    loss = quadratic(hessian, 0.1 * torch.randn(5))
    top = criterion.top_eigenvalue(loss, weights, torch.Generator().manual_seed(0), iterations=60)
    assert float(top) == pytest.approx(4.0, rel=1e-3)
    one, more = (float(criterion.sharpness(loss, weights, 0.5, steps)) for steps in (1, 10))
    points = F.normalize(torch.randn(200_000, 5), dim=1) * 0.5
    found = (0.5 * torch.einsum("ni,ij,nj->n", points, hessian, points) + points @ _slope(loss)).max().item()
    assert 0 < one <= more <= found * 1.02 + 1e-6
    assert more > one, "a lower bound that more ascent steps tighten"
    along_the_top = quadratic(hessian, 0.1 * basis[:, 0])  # there the first step is the maximum: 4 r^2 / 2 + 0.1 r
    assert float(criterion.sharpness(along_the_top, weights, 0.5, 1)) == pytest.approx(0.55, rel=1e-4)


def _slope(loss: criterion.LossOfWeights) -> Tensor:
    eye = torch.eye(5)
    return torch.stack([(loss(_split(e)) - loss(_split(-e))) / 2 for e in eye])


def _split(w: Tensor) -> dict[str, Tensor]:
    return {"a": w[:2], "b": w[2:]}


def test_sharpness_of_a_maximum_is_not_negative() -> None:
    loss = quadratic(-torch.eye(5), torch.zeros(5))
    assert float(criterion.sharpness(loss, _split(torch.zeros(5)), 0.3)) == 0.0


def test_weights_round_trip_and_refuse_what_does_not_fit() -> None:
    model = ProjectedWideResNet(10, 1)
    names = projected_wide_resnet_names(model)
    assert set(names) == set(model.state_dict())
    official = {names[key]: value for key, value in model.state_dict().items()}
    imported = import_weights(official, model)
    assert all(torch.equal(imported[key], value) for key, value in model.state_dict().items())
    with pytest.raises(CheckpointError, match="left over"):
        import_weights(official | {"extra": torch.zeros(1)}, model)
    with pytest.raises(CheckpointError, match="missing"):
        import_weights(official, ProjectedWideResNet(16, 1))


def run(optimizer: Any, **options: Any) -> tuple[SharpnessAwareClassifier, dict[str, float]]:
    torch.manual_seed(0)
    module = SharpnessAwareClassifier(MLP([64, 16, 10]), optimizer, num_classes=10, probe_items=50, **options)
    data = Digits(batch_size=8, steps=6, label_noise=0.5, limit=60)
    trainer = pl.Trainer(
        max_epochs=1, val_check_interval=3, num_sanity_val_steps=0, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, accelerator="cpu", use_distributed_sampler=False,
    )  # fmt: skip
    trainer.fit(module, datamodule=data)
    trainer.test(module, datamodule=data, verbose=False)
    return module, {name: float(value) for name, value in trainer.callback_metrics.items()}


SGD = partial(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=0.01)


def test_module_logs_memorisation_and_sharpness_and_draws_pictures() -> None:
    module, metrics = run(partial(SAM, base=SGD, rho=0.1))
    for name in ("accuracy", "accuracy_early_stopped", "accuracy_given", "accuracy_clean", "memorised"):
        assert 0 <= metrics[f"test/{name}"] <= 1
    assert metrics["test/sharpness"] > 0
    assert math.isfinite(metrics["test/top_eigenvalue"])
    assert [entry["step"] for entry in module.history] == [3, 6]
    with torch.no_grad():
        assert [picture.name for picture in module.pictures()] == ["memorisation", "landscape", "mislabelled"]
    checkpoint: dict[str, Any] = {}
    module.on_save_checkpoint(checkpoint)
    other = SharpnessAwareClassifier(MLP([64, 16, 10]), SGD, num_classes=10)
    other.on_load_checkpoint(checkpoint)
    assert other.history == module.history
    assert other.best_accuracy == module.best_accuracy


def test_as_released_is_the_official_update_and_changes_the_result() -> None:
    paper, _ = run(partial(SAM, base=SGD, rho=0.3))
    released, _ = run(partial(SAM, base=SGD, rho=0.3), as_released=True)
    explicit, _ = run(partial(SAM, base=SGD, rho=0.3, decay_in_perturbation=True, clip_norm=5.0))
    same = zip(released.parameters(), explicit.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in same)
    assert any(not torch.equal(a, b) for a, b in zip(released.parameters(), paper.parameters(), strict=True))


def test_as_released_needs_sam() -> None:
    with pytest.raises(ConfigError, match="as_released"):
        SharpnessAwareClassifier(MLP([64, 10]), SGD, num_classes=10, as_released=True)


def test_sub_batches_work_through_the_module() -> None:
    _, metrics = run(partial(SAM, base=SGD, rho=0.1, sub_batch=3))
    assert math.isfinite(metrics["test/loss"])


def test_vectors_can_be_left_out_of_the_weight_decay() -> None:
    module = SharpnessAwareClassifier(MLP([64, 10]), partial(SAM, base=SGD), num_classes=10, decay_vectors=False)
    optimizer = module.make_optimizer(module.parameter_groups())
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.01, 0.0]
    assert [p.ndim for group in optimizer.param_groups for p in group["params"]] == [2, 1]
