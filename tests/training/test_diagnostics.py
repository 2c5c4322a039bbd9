"""Gradient norms, timing and the guard that names the module, on smoke runs of one process."""

from __future__ import annotations

import csv
from contextlib import nullcontext
from mmap import PAGESIZE, mmap
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from reprise import config as configuration
from reprise.errors import DivergedError
from reprise.papers.vit.model import VisionTransformer
from reprise.training.diagnostics import memory_meter, parameter_parts, squared_norms
from reprise.training.guard import DivergenceGuard, bad_gradient, bad_parameter
from reprise.training.run import build, train

SMOKE = ["experiment=vit/small", "smoke=true", "callbacks.checkpoint.every_steps=1"]


def run(*overrides: str) -> Path:
    cfg = configuration.compose([*SMOKE, *overrides])
    train(cfg, show_progress=False)
    return configuration.run_dir(cfg)


def table(path: Path) -> dict[str, list[tuple[int, float]]]:
    found: dict[str, list[tuple[int, float]]] = {}
    with path.open() as handle:
        for row in csv.DictReader(handle):
            found.setdefault(row["metric"], []).append((int(row["step"]), float(row["value"])))
    return found


def test_a_run_records_norms_with_its_metrics_and_times_apart() -> None:
    folder = run()
    metrics, timing = table(folder / "metrics.csv"), table(folder / "timing.csv")
    assert [step for step, _ in metrics["grad_norm"]] == [1, 2, 3, 4]
    parts = {name: dict(points) for name, points in metrics.items() if name.startswith("grad_norm/")}
    assert 3 <= len(parts) <= 16
    for step, total in metrics["grad_norm"]:
        assert sum(points[step] ** 2 for points in parts.values()) ** 0.5 == pytest.approx(total, rel=1e-5)
    assert timing.keys() == {"items_per_second", "data_wait", "memory_bytes"}
    assert not timing.keys() & metrics.keys()
    assert all(value > 0 for _, value in timing["items_per_second"])
    assert all(0 <= value <= 1 for _, value in timing["data_wait"])
    assert all(value > 1e7 for _, value in timing["memory_bytes"])
    assert [rate for _, rate in metrics["lr"]] == [3e-3 * share for share in (0.0, 1 / 70, 2 / 70, 3 / 70)]


def test_the_model_is_divided_block_by_block() -> None:
    module = build(configuration.compose(SMOKE)).module
    parts = parameter_parts(module, 16)
    named = [parameter for group in parts.values() for parameter in group]
    assert {id(p) for p in named} == {id(p) for p in module.parameters() if p.requires_grad}
    assert len(named) == len(set(map(id, named)))
    assert any("block" in name for name in parts)
    assert len(parameter_parts(module, 1)) == 1


def test_squared_norms_are_those_of_the_plain_formula() -> None:
    layers = nn.ModuleList([nn.Linear(3, 4), nn.Linear(4, 2)])
    layers[1](layers[0](torch.randn(5, 3))).square().sum().backward()
    found = squared_norms([list(layer.parameters()) for layer in layers])
    expected = [sum(float(p.grad.square().sum()) for p in layer.parameters() if p.grad is not None) for layer in layers]
    torch.testing.assert_close(found, torch.tensor(expected))
    assert squared_norms([[nn.Parameter(torch.ones(1))]]) is None


def test_a_bad_output_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    norm = nn.LayerNorm.forward
    seen: list[int] = []

    def spoiled(self: nn.LayerNorm, input: Tensor) -> Tensor:
        output = norm(self, input)
        seen.append(1)
        return output * torch.nan if self is target[0] and len(seen) > 8 else output

    made = VisionTransformer.__init__
    target: list[nn.LayerNorm] = []

    def remember(self: VisionTransformer, *args: Any, **kwargs: Any) -> None:
        made(self, *args, **kwargs)
        target[:] = [layer for layer in self.modules() if isinstance(layer, nn.LayerNorm)][2:3]

    monkeypatch.setattr(VisionTransformer, "__init__", remember)
    monkeypatch.setattr(nn.LayerNorm, "forward", spoiled)
    with pytest.raises(
        DivergedError, match=r"NaN or infinite at step 1; first in the output of model\..*\(LayerNorm\)"
    ):
        run("seed=1")
    folder = configuration.run_dir(configuration.compose([*SMOKE, "seed=1"]))
    newest = sorted((folder / "checkpoints").glob("*.ckpt"))[-1]
    state = torch.load(newest, weights_only=True)["state_dict"]
    assert all(torch.isfinite(value).all() for value in state.values() if value.is_floating_point())


def test_a_bad_gradient_is_named_before_it_reaches_the_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    made = VisionTransformer.__init__

    def poison(self: VisionTransformer, *args: Any, **kwargs: Any) -> None:
        made(self, *args, **kwargs)
        list(self.parameters())[3].register_hook(lambda gradient: gradient * torch.inf)

    monkeypatch.setattr(VisionTransformer, "__init__", poison)
    with pytest.raises(DivergedError, match=r"gradient became NaN or infinite at step 0, first \(backwards\) in model"):
        run("seed=2", "callbacks.divergence.check_every=1")


@pytest.mark.parametrize("scaler", [None, object()])
def test_an_overflow_of_scaled_gradients_is_no_divergence(scaler: object) -> None:
    """float16 scales the loss until gradients overflow, then skips the step and scales less."""
    guard, module = DivergenceGuard(check_every=1), build(configuration.compose(SMOKE)).module
    for parameter in module.parameters():
        parameter.grad = torch.full_like(parameter, torch.inf)
    trainer: Any = SimpleNamespace(
        precision_plugin=SimpleNamespace(scaler=scaler),
        fit_loop=SimpleNamespace(
            epoch_loop=SimpleNamespace(batch_progress=SimpleNamespace(current=SimpleNamespace(completed=0)))
        ),
        train_dataloader=None,
        callbacks=[],
        world_size=1,
    )
    stopped = pytest.raises(DivergedError, match="gradient became NaN or infinite")
    with nullcontext() if scaler else stopped:
        guard.on_before_optimizer_step(trainer, module, torch.optim.SGD(module.parameters()))


def test_the_last_bad_tensor_is_the_first_in_the_backward_pass() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    assert bad_parameter(model) is None
    assert bad_gradient(model) is None
    with torch.no_grad():
        model[0].weight[0, 0] = torch.nan
        model[1].bias[0] = -torch.inf
    assert bad_parameter(model) == "1.bias"


def test_peak_memory_begins_anew() -> None:
    peak = memory_meter(torch.device("cpu"))
    before = peak()
    with mmap(-1, 64 * 2**20) as fresh:  # pages of its own: what malloc gives may have been counted already
        for page in range(0, len(fresh), PAGESIZE):
            fresh[page] = 1
        assert peak() - before > 0.9 * len(fresh)
