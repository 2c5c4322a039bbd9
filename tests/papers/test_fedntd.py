"""FedNTD: losses against slow formulas, algorithms against what they must reduce to, both ways of training clients."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from reprise.data.federated import minibatch_sizes
from reprise.errors import CheckpointError, ConfigError
from reprise.golden import find_cases, load_case
from reprise.papers.fedntd.algorithms import (
    FedAvg,
    FedAvgM,
    FedCurv,
    FedDyn,
    FedKD,
    FedNova,
    FedNTD,
    FedProx,
    FedTrueOnly,
    Moon,
    Scaffold,
)
from reprise.papers.fedntd.criterion import (
    distillation,
    model_contrastive,
    not_true_distillation,
    not_true_logits,
    ntd_loss,
    true_class_distillation,
)
from reprise.papers.fedntd.measures import forgetting, in_and_out_local
from reprise.papers.fedntd.model import fedavg_cifar, fedavg_digits, fedavg_mnist
from reprise.papers.fedntd.parity import ADAPTERS
from reprise.papers.fedntd.weights import import_weights
from reprise.training.federated import ClientTraining, FlatModel, LocalSGD, Round, weighted_mean

ALGORITHMS = [FedAvg, FedNTD, FedKD, FedTrueOnly, FedProx, FedAvgM, FedNova, Scaffold, Moon, FedDyn, FedCurv]
SIZES = (23, 8, 41, 0)  # uneven clients, one without data
SGD = LocalSGD(0.05, 0.9, 1e-5)


def batch(classes: int, items: int = 6, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    rng = torch.Generator().manual_seed(seed)
    logits, teacher = 3 * torch.randn(2, items, classes, generator=rng)
    return logits, teacher, torch.randint(classes, (items,), generator=rng)


def clients(seed: int = 0, epochs: int = 2) -> list[dict[str, Any]]:
    rng = torch.Generator().manual_seed(seed)
    return [
        {
            "slot": slot,
            "client": 2 * slot,
            "size": size,
            "image": torch.rand(size, 1, 8, 8, generator=rng),
            "label": torch.randint(10, (size,), generator=rng),
            "order": torch.cat([torch.randperm(size, generator=rng) for _ in range(epochs)]),
            "splits": minibatch_sizes(size, 16, epochs),
        }
        for slot, size in enumerate(SIZES)
    ]


def play(algorithm: FedAvg, rounds: int = 2, execution: str = "sequential") -> tuple[Tensor, dict[str, Tensor]]:
    """Global weights and server state after some rounds of the same four of eight clients."""
    torch.manual_seed(0)
    flat = FlatModel(fedavg_digits())
    training = ClientTraining(flat, algorithm, execution)
    state = algorithm.init_state(flat.vector(), 8)
    for number in range(rounds):
        own = clients(number)
        chosen = torch.tensor([client["client"] for client in own])
        contexts = [algorithm.context(state, chosen, slot) for slot in range(len(own))]
        received = flat.vector()
        results = training(received, own, contexts, SGD)
        for result, client in zip(results, own, strict=True):
            result.uploads = algorithm.upload(training, client, result)
        steps = torch.tensor([len(client["splits"]) for client in own])
        finished = Round(received, chosen, torch.tensor(SIZES), steps, SGD, results, 8, len(chosen) / 8)
        flat.load(algorithm.aggregate(state, finished))
    return flat.vector(), state


@pytest.mark.parametrize("tau", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("classes", [2, 3, 10])
def test_ntd_loss_is_the_slow_formula(classes: int, tau: float) -> None:
    logits, teacher, label = batch(classes)
    total = 0.0
    for row in range(len(label)):
        others = [c for c in range(classes) if c != label[row]]
        own, received = (values[row, others].div(tau).softmax(0) for values in (logits, teacher))
        divergence = (received * (received / own).log()).sum()
        total += F.cross_entropy(logits[row], label[row]) + 0.3 * tau**2 * divergence
    expected = torch.as_tensor(total / len(label))
    torch.testing.assert_close(ntd_loss(logits, teacher, label, beta=0.3, tau=tau).mean(), expected)


def test_two_classes_have_no_not_true_knowledge() -> None:
    assert not_true_distillation(*batch(2), 1.0).abs().max() == 0


def test_true_logit_is_removed_before_the_softmax() -> None:
    logits, teacher, label = batch(5)
    changed = logits.scatter_add(1, label[:, None], torch.full((len(label), 1), 7.0))
    term = not_true_distillation(logits, teacher, label, 1.0)
    torch.testing.assert_close(not_true_distillation(changed, teacher, label, 1.0), term)
    assert not_true_logits(logits, label).shape == (6, 4)


def test_gradient_reaches_the_local_not_true_logits_only() -> None:
    logits, teacher, label = batch(5)
    logits.requires_grad_()
    teacher.requires_grad_()
    not_true_distillation(logits, teacher, label, 1.0).sum().backward()
    assert teacher.grad is None
    assert logits.grad is not None
    assert logits.grad.gather(1, label[:, None]).abs().max() == 0
    assert (logits.grad != 0).sum() == 6 * 4


def test_divergence_is_from_the_global_to_the_local_model() -> None:
    logits, teacher, _ = batch(4)
    expected = F.kl_div(logits.log_softmax(1), teacher.softmax(1), reduction="batchmean")
    torch.testing.assert_close(distillation(logits, teacher, 1.0).mean(), expected)
    assert not torch.allclose(distillation(teacher, logits, 1.0).mean(), expected)


def test_full_distillation_is_true_part_plus_weighted_not_true_part() -> None:
    logits, teacher, label = batch(6)
    others = 1 - teacher.softmax(1).gather(1, label[:, None])[:, 0]
    parts = true_class_distillation(logits, teacher, label, 1.0) + others * not_true_distillation(
        logits, teacher, label, 1.0
    )
    torch.testing.assert_close(distillation(logits, teacher, 1.0), parts)


def test_moon_is_cross_entropy_over_two_similarities() -> None:
    z, of_global, of_previous = torch.randn(3, 5, 8)
    similarity = torch.stack([F.cosine_similarity(z, other) for other in (of_global, of_previous)], 1) / 0.5
    expected = F.cross_entropy(similarity, torch.zeros(5, dtype=torch.int64), reduction="none")
    torch.testing.assert_close(model_contrastive(z, of_global, of_previous, 0.5), expected)


@pytest.mark.parametrize("algorithm", ALGORITHMS, ids=lambda item: item.__name__)
def test_batched_clients_agree_with_sequential_ones(algorithm: type[FedAvg]) -> None:
    one, state = play(algorithm())
    many, batched = play(algorithm(), execution="batched")
    torch.testing.assert_close(many, one, rtol=1e-4, atol=1e-6)
    for name, value in state.items():
        torch.testing.assert_close(batched[name], value, rtol=1e-3, atol=1e-5)


def test_one_client_is_torch_sgd() -> None:
    torch.manual_seed(0)
    model, client = fedavg_digits(), clients()[0]
    flat = FlatModel(model)
    (result,) = ClientTraining(flat, FedAvg())(flat.vector(), [client], [{}], SGD)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-5)
    for rows in client["order"].split(client["splits"]):
        optimizer.zero_grad()
        F.cross_entropy(model(client["image"][rows]), client["label"][rows]).backward()
        optimizer.step()
    torch.testing.assert_close(result.weights, flat.vector())


@pytest.mark.parametrize(
    "neutral", [FedNTD(beta=0), FedKD(beta=0), FedProx(mu=0), FedAvgM(beta=0), Moon(mu=0), FedCurv(lam=0)], ids=repr
)
def test_a_neutral_weight_gives_fedavg(neutral: FedAvg) -> None:
    torch.testing.assert_close(play(neutral)[0], play(FedAvg())[0])


def test_the_penalties_and_distillations_do_something() -> None:
    plain = play(FedAvg())[0]
    for algorithm in ALGORITHMS[1:]:
        assert (play(algorithm(), rounds=3)[0] - plain).abs().max() > 1e-5, algorithm


def test_scaffold_control_is_the_mean_of_the_clients() -> None:
    _, state = play(Scaffold(), rounds=3)
    assert state["control"].abs().max() > 0
    torch.testing.assert_close(state["control"], state["controls"].mean(0), rtol=1e-4, atol=1e-6)


def test_effective_steps_of_momentum() -> None:
    velocity, moved = 0.0, 0.0
    for _ in range(7):
        velocity = 0.9 * velocity + 1
        moved += velocity
    assert float(SGD.effective_steps(torch.tensor(7.0))) == pytest.approx(moved, rel=1e-4)


def test_moon_remembers_the_previous_local_models() -> None:
    _, state = play(Moon(), rounds=1)
    torch.manual_seed(0)
    initial = FlatModel(fedavg_digits()).vector()
    absent = [1, 3, 5, 7, 6]  # client 6 took part, but has no data to learn from
    torch.testing.assert_close(state["previous"][absent], initial.expand(5, -1))
    assert (state["previous"][0] - initial).abs().max() > 1e-3


def test_mean_is_weighted_by_data_size_over_statistics_too() -> None:
    states = [nn.BatchNorm1d(2).state_dict() for _ in range(2)]
    states[1] = {name: value + 4 for name, value in states[1].items()}
    mean = weighted_mean(states, [3, 1])
    torch.testing.assert_close(mean["running_mean"], torch.ones(2))
    torch.testing.assert_close(mean["num_batches_tracked"], torch.tensor(1.0))


class Normed(nn.Module):
    """A tiny network with running statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 10))

    def forward(self, image: Tensor) -> Tensor:
        return self.body(image)


def test_running_statistics_are_local_and_averaged() -> None:
    flat, own = FlatModel(Normed()), clients()[:2]
    received, before = flat.vector(), flat.buffers()
    results = ClientTraining(flat, FedAvg())(received, own, [{}, {}], SGD)
    assert all(torch.equal(value, before[name]) for name, value in flat.buffers().items())
    sizes, steps = torch.tensor(SIZES[:2]), torch.tensor([len(client["splits"]) for client in own])
    mean = Round(received, torch.tensor([0, 2]), sizes, steps, SGD, results, 8, 0.25, before).mean_buffers()
    name = "body.2.running_mean"
    expected = (23 * results[0].buffers[name] + 8 * results[1].buffers[name]) / 31
    torch.testing.assert_close(mean[name], expected)
    with pytest.raises(ConfigError, match="running statistics"):
        ClientTraining(flat, FedAvg(), "batched")


def test_forgetting_of_a_hand_made_history() -> None:
    nan = torch.nan
    history = torch.tensor([[0.9, 0.0], [nan, nan], [0.5, 0.8], [0.6, 0.6]])
    assert float(forgetting(history)) == pytest.approx((0.3 + 0.2) / 2)
    assert float(forgetting(history[:1])) == 0


def test_in_and_out_local_accuracy() -> None:
    inside, outside = in_and_out_local(torch.tensor([0.8, 0.6, 0.1]), torch.tensor([0.5, 0.5, 0.0]))
    assert float(inside) == pytest.approx(0.7)
    assert float(outside) == pytest.approx(0.25 * 0.8 + 0.25 * 0.6 + 0.5 * 0.1)


@pytest.mark.parametrize(
    ("model", "count"), [(fedavg_cifar, 2_156_490), (fedavg_mnist, 1_663_370), (fedavg_digits, 13_706)]
)
def test_sizes(model: Any, count: int) -> None:
    assert sum(parameter.numel() for parameter in model().parameters()) == count


def test_official_keys() -> None:
    model = fedavg_mnist()
    official = {name.replace("classifier", "linear_2"): value for name, value in model.state_dict().items()}
    assert import_weights(official, model).keys() == model.state_dict().keys()
    with pytest.raises(CheckpointError, match="left over"):
        import_weights({**official, "extra": torch.zeros(1)}, model)
    with pytest.raises(CheckpointError, match="shape"):
        import_weights({**official, "linear_2.bias": torch.zeros(3)}, model)


def test_only_plain_sgd_is_accepted() -> None:
    parameter = nn.Parameter(torch.zeros(1))
    assert LocalSGD.of(torch.optim.SGD([parameter], lr=0.1, momentum=0.9)) == LocalSGD(0.1, 0.9, 0)
    with pytest.raises(ConfigError, match="plain SGD"):
        LocalSGD.of(torch.optim.Adam([parameter]))


def test_golden_cases(goldens: Path) -> None:
    cases = find_cases(goldens / "fedntd")
    assert cases
    for path in cases:
        stored = load_case(path)
        ours = ADAPTERS[stored.case.kind](stored.case)
        for name, golden in stored.outputs.items():
            atol, rtol = stored.tolerance_of(name)
            torch.testing.assert_close(
                ours[name].double(), golden.double(), atol=atol, rtol=rtol, msg=f"{path.name} {name}"
            )
