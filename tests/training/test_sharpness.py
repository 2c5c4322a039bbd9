"""SAM around a base optimizer, against slow independent formulas."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from reprise.errors import ConfigError
from reprise.training.module import PaperModule
from reprise.training.sharpness import SAM, frozen_statistics, worst_perturbation

SGD = partial(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=0.02, nesterov=True)


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))


def data(seed: int = 1, count: int = 8) -> tuple[Tensor, Tensor]:
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(count, 5, generator=rng), torch.randint(0, 3, (count,), generator=rng)


def closure_of(model: nn.Module, optimizer: SAM, x: Tensor, y: Tensor) -> Callable[[], Tensor]:
    def closure() -> Tensor:
        batch = optimizer.select({"x": x, "y": y})
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(batch["x"]), batch["y"])
        loss.backward()
        return loss

    return closure


def train(model: nn.Module, optimizer: SAM, steps: range) -> None:
    for step in steps:
        optimizer.step(closure_of(model, optimizer, *data(step)))


def weights(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def flat(tensors: list[Tensor]) -> Tensor:
    return torch.cat([t.flatten() for t in tensors])


@pytest.mark.parametrize("norm", [1.5, 2.0, 3.0, math.inf])
def test_perturbation_is_the_maximiser_of_the_linear_model_in_the_ball(norm: float) -> None:
    gradients = [torch.randn(4, 3), torch.randn(6), torch.zeros(2)]
    moved, length = worst_perturbation(
        gradients, gradients, rho=[0.3] * 3, adaptive=[False] * 3, norm=norm, epsilon=0.0
    )
    dual = 1.0 if math.isinf(norm) else norm / (norm - 1)
    assert torch.linalg.vector_norm(flat(moved), norm).item() == pytest.approx(0.3, rel=1e-4)
    assert length.item() == pytest.approx(torch.linalg.vector_norm(flat(gradients), dual).item(), rel=1e-5)
    assert (flat(moved) @ flat(gradients)).item() == pytest.approx(0.3 * length.item(), rel=1e-4)  # Hoelder's equality


def test_adaptive_perturbation_has_one_norm_and_flags_by_tensor() -> None:
    w, g = [torch.randn(3, 2), torch.randn(4)], [torch.randn(3, 2), torch.randn(4)]
    moved, length = worst_perturbation(w, g, rho=[2.0, 0.1], adaptive=[True, False])
    expected = ((w[0] * g[0]).square().sum() + g[1].square().sum()).sqrt()
    torch.testing.assert_close(length, expected)
    torch.testing.assert_close(moved[0], 2.0 * w[0] ** 2 * g[0] / expected)
    torch.testing.assert_close(moved[1], 0.1 * g[1] / expected)


def test_zero_gradient_moves_nothing() -> None:
    moved, _ = worst_perturbation([torch.ones(3)], [torch.zeros(3)], rho=[0.1], adaptive=[False])
    assert torch.equal(moved[0], torch.zeros(3))


@pytest.mark.parametrize("norm", [1.0, 0.5])
def test_norms_without_a_dual_are_refused(norm: float) -> None:
    with pytest.raises(ValueError, match="p > 1"):
        SAM(network().parameters(), SGD, norm=norm)


@pytest.mark.parametrize("adaptive", [False, True])
def test_step_takes_the_gradient_at_the_neighbour_and_updates_the_original_weights(adaptive: bool) -> None:
    ours, theirs = network(), network()
    optimizer = SAM(ours.parameters(), SGD, rho=0.3, adaptive=adaptive)
    plain = SGD(theirs.parameters())
    train(ours, optimizer, range(3))
    for step in range(3):
        x, y = data(step)
        parameters = list(theirs.parameters())
        first = torch.autograd.grad(nn.functional.cross_entropy(theirs(x), y), parameters)
        scaled = [g * p.abs() if adaptive else g for g, p in zip(first, parameters, strict=True)]
        length = flat([s.detach() for s in scaled]).norm()
        before = weights(theirs)
        with torch.no_grad():
            for p, s in zip(parameters, scaled, strict=True):
                p.add_(0.3 * s * (p.abs() if adaptive else 1) / length)
        second = torch.autograd.grad(nn.functional.cross_entropy(theirs(x), y), parameters)
        with torch.no_grad():
            for p, w, g in zip(parameters, before, second, strict=True):
                p.copy_(w)
                p.grad = g
        plain.step()
    torch.testing.assert_close(weights(ours), weights(theirs))


def test_rho_zero_is_the_base_optimizer_with_one_pass() -> None:
    ours, theirs = network(), network()
    optimizer, plain = SAM(ours.parameters(), SGD, rho=0.0), SGD(theirs.parameters())
    calls: list[Tensor] = []
    x, y = data()
    inner = closure_of(ours, optimizer, x, y)
    optimizer.step(lambda: calls.append(inner()))
    plain.zero_grad()
    nn.functional.cross_entropy(theirs(x), y).backward()
    plain.step()
    assert len(calls) == 1
    assert all(torch.equal(a, b) for a, b in zip(weights(ours), weights(theirs), strict=True))


@pytest.mark.parametrize("rho", [0.0, 0.3])
def test_decay_in_perturbation_is_a_penalty_in_the_loss(rho: float) -> None:
    ours, theirs = network(), network()
    decayed = SAM(ours.parameters(), SGD, rho=rho, decay_in_perturbation=True)
    penalised = SAM(theirs.parameters(), partial(SGD, weight_decay=0.0), rho=rho)
    for step in range(3):
        x, y = data(step)
        decayed.step(closure_of(ours, decayed, x, y))

        def closure(x: Tensor = x, y: Tensor = y) -> Tensor:
            penalised.zero_grad()
            penalty = 0.5 * 0.02 * sum(p.square().sum() for p in theirs.parameters())
            loss = nn.functional.cross_entropy(theirs(x), y) + penalty
            loss.backward()
            return loss

        penalised.step(closure)
    torch.testing.assert_close(weights(ours), weights(theirs))
    assert decayed.param_groups[0]["weight_decay"] == 0.02


def test_clipping_scales_the_descent_gradient_and_leaves_the_ascent_alone() -> None:
    model, free = network(), network()
    clipped = SAM(model.parameters(), SGD, rho=0.3, clip_norm=0.01)
    unclipped = SAM(free.parameters(), SGD, rho=0.3)
    for net, optimizer in ((model, clipped), (free, unclipped)):
        optimizer.step(closure_of(net, optimizer, *data()))
    got, full = (flat([p.grad for p in net.parameters() if p.grad is not None]) for net in (model, free))
    assert got.norm().item() == pytest.approx(0.01, rel=1e-5)
    torch.testing.assert_close(got / got.norm(), full / full.norm())
    torch.testing.assert_close(clipped.ascent_norm, unclipped.ascent_norm)


@pytest.mark.parametrize("base", [SGD, partial(torch.optim.AdamW, lr=0.01)])
def test_resume_is_exact_and_keeps_the_base_optimizers_buffers(base: Any) -> None:
    whole, first = network(), network()
    straight = SAM(whole.parameters(), base, rho=0.1)
    train(whole, straight, range(6))
    half = SAM(first.parameters(), base, rho=0.1)
    train(first, half, range(3))
    second = network(5)
    second.load_state_dict(first.state_dict())
    resumed = SAM(second.parameters(), base, rho=0.7)
    resumed.load_state_dict(half.state_dict())
    assert resumed.param_groups is resumed.base.param_groups
    assert resumed.param_groups[0]["rho"] == 0.1
    train(second, resumed, range(3, 6))
    assert all(torch.equal(a, b) for a, b in zip(weights(whole), weights(second), strict=True))


def test_schedules_act_on_the_base_optimizer() -> None:
    model = network()
    optimizer = SAM(model.parameters(), SGD, rho=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: float(step == 0))
    train(model, optimizer, range(1))
    schedule.step()
    before = weights(model)
    train(model, optimizer, range(1, 2))
    assert optimizer.base.param_groups[0]["lr"] == 0
    assert all(torch.equal(a, b) for a, b in zip(before, weights(model), strict=True))


def test_groups_have_their_own_rho_and_frozen_parameters_stay() -> None:
    model = network()
    first, second = model[0], model[2]
    assert isinstance(first, nn.Linear)
    first.weight.requires_grad_(False)
    frozen = first.weight.clone()
    groups = [{"params": list(first.parameters()), "rho": 0.0}, {"params": list(second.parameters())}]
    optimizer = SAM(groups, SGD, rho=0.5)
    closure_of(model, optimizer, *data())()
    before = weights(model)
    optimizer.perturb()
    change = [a - b for a, b in zip(weights(model), before, strict=True)]
    assert change[0].norm() == 0
    assert change[1].norm() == 0
    assert change[2].norm() > 0
    train(model, optimizer, range(1))
    assert torch.equal(first.weight, frozen)


def test_weights_come_back_when_the_second_pass_fails() -> None:
    model = network()
    optimizer = SAM(model.parameters(), SGD, rho=0.5)
    before = weights(model)
    inner = closure_of(model, optimizer, *data())
    calls: list[int] = []

    def failing() -> Tensor:
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("out of memory")
        return inner()

    with pytest.raises(RuntimeError, match="out of memory"):
        optimizer.step(failing)
    assert all(torch.equal(a, b) for a, b in zip(before, weights(model), strict=True))


@pytest.mark.parametrize("momentum", [0.1, None])
def test_running_statistics_move_only_in_the_first_pass(momentum: float | None) -> None:
    normalise = nn.BatchNorm1d(4, momentum=momentum)
    model = nn.Sequential(nn.Linear(5, 4), normalise, nn.Linear(4, 3))
    reference = nn.BatchNorm1d(4, momentum=momentum)
    optimizer = SAM(model.parameters(), partial(SGD, lr=0.0), rho=0.5)
    optimizer.attach(model)
    for step in range(3):
        x, y = data(step)
        reference(model[0](x))
        optimizer.step(closure_of(model, optimizer, x, y))
    torch.testing.assert_close(normalise.running_mean, reference.running_mean)
    torch.testing.assert_close(normalise.running_var, reference.running_var)
    assert normalise.momentum == momentum


def test_frozen_statistics_leave_evaluation_mode_alone() -> None:
    layer = nn.BatchNorm1d(4).eval()
    with frozen_statistics(layer):
        assert layer.momentum == 0.1


def test_both_passes_draw_the_same_dropout_masks() -> None:
    seen = []
    model = nn.Sequential(nn.Dropout(0.5), nn.Linear(5, 3))
    model[0].register_forward_hook(lambda layer, inputs, output: seen.append(output == 0))
    optimizer = SAM(model.parameters(), SGD, rho=0.1)
    train(model, optimizer, range(2))
    assert torch.equal(seen[0], seen[1])
    assert torch.equal(seen[2], seen[3])
    assert not torch.equal(seen[0], seen[2])


def test_sub_batches_perturb_on_their_own_and_average_by_size() -> None:
    model, single = network(), network()
    optimizer = SAM(model.parameters(), SGD, rho=0.3, sub_batch=3)
    x, y = data()
    total = [torch.zeros_like(p) for p in model.parameters()]
    for part in (slice(0, 3), slice(3, 6), slice(6, 8)):
        single.load_state_dict(network().state_dict())
        alone = SAM(single.parameters(), partial(SGD, lr=0.0), rho=0.3)
        alone.step(closure_of(single, alone, x[part], y[part]))
        for sum_, p in zip(total, single.parameters(), strict=True):
            assert p.grad is not None
            sum_ += p.grad * len(x[part]) / len(x)
    optimizer.step(closure_of(model, optimizer, x, y))
    torch.testing.assert_close([p.grad for p in model.parameters()], total)


def test_sub_batches_need_a_module_that_selects() -> None:
    model = network()
    optimizer = SAM(model.parameters(), SGD, rho=0.3, sub_batch=3)
    other = SAM(model.parameters(), SGD)
    with pytest.raises(ConfigError, match="sub_batch"):
        optimizer.step(closure_of(model, other, *data()))


def test_a_step_without_a_closure_is_refused() -> None:
    with pytest.raises(ConfigError, match="closure"):
        SAM(network().parameters(), SGD).step()


class Toy(PaperModule):
    """A module that counts how often it is called."""

    def __init__(self, optimizer: Any) -> None:
        super().__init__(optimizer)
        self.model, self.calls = network(), 0

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        self.calls += 1
        return nn.functional.cross_entropy(self.model(batch[0]), batch[1])


class Batches:
    """Three batches; unlike a list, Lightning takes it for one loader."""

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return iter([data(step) for step in range(3)])

    def __len__(self) -> int:
        return 3


def fit(module: Toy, **options: Any) -> None:
    trainer = pl.Trainer(
        max_epochs=1, logger=False, enable_checkpointing=False, enable_progress_bar=False, accelerator="cpu",
        enable_model_summary=False, use_distributed_sampler=False, **options,
    )  # fmt: skip
    trainer.fit(module, Batches())


def test_lightning_closures_give_the_same_weights_as_a_plain_loop() -> None:
    module = Toy(partial(SAM, base=SGD, rho=0.3))
    plain = network()
    fit(module)
    train(plain, SAM(plain.parameters(), SGD, rho=0.3), range(3))
    assert module.calls == 6
    torch.testing.assert_close(weights(module.model), weights(plain))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"accumulate_grad_batches": 3}, "accumulate"),
        ({"gradient_clip_val": 1.0, "gradient_clip_algorithm": "value"}, "clipping"),
    ],
)
def test_trainer_options_that_would_be_wrong_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        fit(Toy(partial(SAM, base=SGD, rho=0.3)), **options)


# sync_perturbations, decay_in_perturbation, sub_batch of two replicas; sub_batch of one process that does the same
REPLICA_CASES = [(False, False, None, 4), (False, True, None, 4), (True, True, None, None), (False, False, 2, 2)]


def replica(rank: int, store: str) -> None:
    """One of two ranks: for each case three DDP steps on its half of each batch; stores its weights."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}/store", rank=rank, world_size=2)
    for number, (sync, decay, sub_batch, _) in enumerate(REPLICA_CASES):
        model = DistributedDataParallel(network())
        optimizer = SAM(
            model.parameters(), SGD, rho=0.3, sync_perturbations=sync, decay_in_perturbation=decay, sub_batch=sub_batch
        )
        optimizer.attach(model)
        for step in range(3):
            x, y = data(step)
            optimizer.step(closure_of(model, optimizer, x.chunk(2)[rank], y.chunk(2)[rank]))
        torch.save(weights(model), f"{store}/{number}-{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_replicas_perturb_alone_unless_synchronised(tmp_path: Path) -> None:
    """Per-replica perturbations are sub-batches of half the batch; synchronised ones are the whole batch's."""
    mp.spawn(replica, (str(tmp_path),), nprocs=2)
    for number, (_, decay, _, same_as) in enumerate(REPLICA_CASES):
        ranks = [torch.load(tmp_path / f"{number}-{rank}.pt", weights_only=True) for rank in range(2)]
        assert all(torch.equal(a, b) for a, b in zip(*ranks, strict=True))
        model = network()
        train(model, SAM(model.parameters(), SGD, rho=0.3, decay_in_perturbation=decay, sub_batch=same_as), range(3))
        torch.testing.assert_close(ranks[0], weights(model))
