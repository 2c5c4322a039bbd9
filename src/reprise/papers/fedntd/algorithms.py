"""Federated algorithms with one interface: what a client minimises, what it sends, and what the server makes of it.

Vectors: w [P] weights; `received` w_g, the global weights a round starts from; K clients of n_k items, S in a round.
`state` is the server's memory (tensors [P], or [K, P] with one row a client): the module keeps it in buffers, and
`aggregate` updates it in place.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from reprise.papers.fedntd.criterion import (
    distillation,
    model_contrastive,
    not_true_distillation,
    true_class_distillation,
)
from reprise.training.federated import ClientTraining, Context, FlatModel, LocalResult, Notes, Round

State = dict[str, Tensor]


@dataclass
class FedAvg:
    """Plain averaging (McMahan et al. 2017): w = sum_k n_k / n w_k. The base of the others, which override hooks."""

    features: ClassVar[bool] = False  # whether `sample_losses` reads the model's features

    def follow_release(self) -> None:
        """Do as the released code does, where it departs from the method."""

    def init_state(self, weights: Tensor, num_clients: int) -> State:
        """The server's memory before the first round."""
        return {}

    def context(self, state: State, clients: Tensor, slot: int) -> Context:
        """What the client `clients[slot]` is told beside the global weights, vectors [P]."""
        return {}

    def annotate(self, model: FlatModel, received: Tensor, image: Tensor, context: Context) -> Notes:
        """What is computed once for each of a client's items [U, ...], without gradient."""
        return {}

    def sample_losses(self, logits: Tensor, features: Tensor, label: Tensor, notes: Notes) -> Tensor:
        """The loss of each item of a mini-batch, [B]; `notes` are its rows."""
        return F.cross_entropy(logits, label, reduction="none")

    def penalty(self, weights: Tensor, received: Tensor, context: Context) -> Tensor | None:
        """A scalar added to the loss of every local step."""
        return None

    def correct(self, gradient: Tensor, context: Context) -> Tensor:
        """The gradient a local step uses, [P] (or [clients, P])."""
        return gradient

    def upload(self, training: ClientTraining, client: Mapping[str, Any], result: LocalResult) -> dict[str, Tensor]:
        """What the client sends beside its weights, vectors [P]."""
        return {}

    def aggregate(self, state: State, round: Round) -> Tensor:
        """The next global weights [P]."""
        return round.mean_weights()


@dataclass
class FedNTD(FedAvg):
    """FedAvg with not-true distillation from the received global model: CE + beta tau^2 L_NTD."""

    beta: float = 1.0
    tau: float = 1.0

    def annotate(self, model: FlatModel, received: Tensor, image: Tensor, context: Context) -> Notes:
        return {"teacher": model.predict(received, image)}

    def sample_losses(self, logits: Tensor, features: Tensor, label: Tensor, notes: Notes) -> Tensor:
        cross_entropy = super().sample_losses(logits, features, label, notes)
        return cross_entropy + self.beta * self.tau**2 * self.distill(logits, notes["teacher"], label)

    def distill(self, logits: Tensor, teacher: Tensor, label: Tensor) -> Tensor:
        """The distillation term of each item, [B]."""
        return not_true_distillation(logits, teacher, label, self.tau)


@dataclass
class FedKD(FedNTD):
    """Ablation: ordinary distillation on all C logits."""

    def distill(self, logits: Tensor, teacher: Tensor, label: Tensor) -> Tensor:
        return distillation(logits, teacher, self.tau)


@dataclass
class FedTrueOnly(FedNTD):
    """Ablation: distillation of the true class's probability alone."""

    def distill(self, logits: Tensor, teacher: Tensor, label: Tensor) -> Tensor:
        return true_class_distillation(logits, teacher, label, self.tau)


@dataclass
class FedProx(FedAvg):
    """Adds mu / 2 ||w - w_g||^2 to the local loss (Li et al. 2020)."""

    mu: float = 1.0

    def penalty(self, weights: Tensor, received: Tensor, context: Context) -> Tensor:
        return 0.5 * self.mu * (weights - received).square().sum()


@dataclass
class FedAvgM(FedAvg):
    """Server momentum (Hsu et al. 2019): m <- beta m + (w_g - mean_k w_k); w = w_g - m."""

    beta: float = 0.7

    def init_state(self, weights: Tensor, num_clients: int) -> State:
        return {"momentum": torch.zeros_like(weights)}

    def aggregate(self, state: State, round: Round) -> Tensor:
        state["momentum"].mul_(self.beta).add_(round.received - round.mean_weights())
        return round.received - state["momentum"]


@dataclass
class FedNova(FedAvg):
    """Normalised averaging (Wang et al. 2020): w = w_g - (sum_k p_k a_k) sum_k p_k (w_g - w_k) / a_k.

    p_k = n_k / n, and a_k is the number of effective local steps under momentum.

    Args:
        variance_reduction: as the released configuration has it: each local gradient becomes g - d_k, where
            d_k = (w_g - w_k) / (a_k lr) is the client's move when it last took part (the mean move that the release
            means to add stays zero in it).
    """

    variance_reduction: bool = False

    def follow_release(self) -> None:
        self.variance_reduction = True

    def init_state(self, weights: Tensor, num_clients: int) -> State:
        return {"moves": weights.new_zeros(num_clients, len(weights))} if self.variance_reduction else {}

    def context(self, state: State, clients: Tensor, slot: int) -> Context:
        return {"move": state["moves"][clients[slot]]} if self.variance_reduction else {}

    def correct(self, gradient: Tensor, context: Context) -> Tensor:
        return gradient - context["move"] if self.variance_reduction else gradient

    def aggregate(self, state: State, round: Round) -> Tensor:
        steps = round.effective_steps
        share = round.share
        if self.variance_reduction:
            lengths = steps * round.sgd.lr
            moves = round.rows(lambda result: (round.received - result.weights) / lengths[result.slot])
            state["moves"][round.clients] = moves
        moved = round.total(lambda result: share[result.slot] / steps[result.slot] * (round.received - result.weights))
        return round.received - (share * steps).sum() * moved


@dataclass
class Scaffold(FedAvg):
    """Control variates (Karimireddy et al. 2020, option II): each local gradient becomes g - c_k + c.

    c_k+ = c_k - c + (w_g - w_k) / (a_k lr), where a_k are the effective local steps under momentum (as the release
    divides), then c <- c + S/K mean_k (c_k+ - c_k), for S of K clients.

    Args:
        adaptive: False: a_k are the local steps themselves.
        released: take the configured ratio of sampled clients for S/K; they differ where ratio * K is not whole.
    """

    adaptive: bool = True
    released: bool = False

    def follow_release(self) -> None:
        self.released = True

    def init_state(self, weights: Tensor, num_clients: int) -> State:
        return {"control": torch.zeros_like(weights), "controls": weights.new_zeros(num_clients, len(weights))}

    def context(self, state: State, clients: Tensor, slot: int) -> Context:
        return {"correction": state["control"] - state["controls"][clients[slot]]}

    def correct(self, gradient: Tensor, context: Context) -> Tensor:
        return gradient + context["correction"]

    def aggregate(self, state: State, round: Round) -> Tensor:
        steps = round.effective_steps if self.adaptive else round.steps.to(round.received).clamp(min=1)
        old, control = state["controls"][round.clients], state["control"]

        def updated(result: LocalResult) -> Tensor:
            drift = (round.received - result.weights) / (steps[result.slot] * round.sgd.lr)
            return old[result.slot] - control + drift

        new = round.rows(updated)
        state["controls"][round.clients] = new
        share = round.sample_ratio if self.released else len(new) / round.num_clients
        state["control"] += share * (new - old).mean(0)
        return round.mean_weights()


@dataclass
class Moon(FedAvg):
    """Model-contrastive learning (Li et al. 2021) against the global and the client's previous local model."""

    mu: float = 0.1
    tau: float = 0.5
    features: ClassVar[bool] = True

    def init_state(self, weights: Tensor, num_clients: int) -> State:
        return {"previous": weights.expand(num_clients, -1).clone()}

    def context(self, state: State, clients: Tensor, slot: int) -> Context:
        return {"previous": state["previous"][clients[slot]]}

    def annotate(self, model: FlatModel, received: Tensor, image: Tensor, context: Context) -> Notes:
        _, of_global = model.predict(received, image, return_features=True)
        _, of_previous = model.predict(context["previous"], image, return_features=True)
        return {"global": of_global, "previous": of_previous}

    def sample_losses(self, logits: Tensor, features: Tensor, label: Tensor, notes: Notes) -> Tensor:
        contrast = model_contrastive(features, notes["global"], notes["previous"], self.tau)
        return super().sample_losses(logits, features, label, notes) + self.mu * contrast

    def aggregate(self, state: State, round: Round) -> Tensor:
        state["previous"][round.clients] = round.rows(lambda result: result.weights)
        return round.mean_weights()


@dataclass
class FedDyn(FedAvg):
    """Dynamic regularisation (Acar et al. 2021): the loss gets - <g_k, w> + alpha / 2 ||w - w_g||^2.

    Then g_k <- g_k - alpha (w_k - w_g), h <- h - alpha / K sum_k (w_k - w_g), and w = sum_k p_k w_k - h / alpha.
    """

    alpha: float = 0.1

    def init_state(self, weights: Tensor, num_clients: int) -> State:
        return {"drift": torch.zeros_like(weights), "gradients": weights.new_zeros(num_clients, len(weights))}

    def context(self, state: State, clients: Tensor, slot: int) -> Context:
        return {"gradient": state["gradients"][clients[slot]]}

    def penalty(self, weights: Tensor, received: Tensor, context: Context) -> Tensor:
        linear = (context["gradient"] * weights).sum()
        return 0.5 * self.alpha * (weights - received).square().sum() - linear

    def aggregate(self, state: State, round: Round) -> Tensor:
        moved = round.rows(lambda result: result.weights - round.received)
        state["gradients"][round.clients] -= self.alpha * moved
        state["drift"] -= self.alpha / round.num_clients * moved.sum(0)
        return round.mean_weights() - state["drift"] / self.alpha


@dataclass
class FedCurv(FedAvg):
    """Elastic weight consolidation across clients (Shoham et al. 2019): lam sum_{j != k} (w - w_j)^T F_j (w - w_j).

    F_j is the diagonal Fisher information of client j when it last took part, from mini-batch gradients of about
    `samples` items; constants are dropped from the penalty.

    Args:
        cumulative: as released: the sums over the other clients lose, within a round, every client that came earlier
            (an in-place subtraction), not only the client itself.
    """

    lam: float = 1.0
    samples: int = 500
    cumulative: bool = False

    def follow_release(self) -> None:
        self.cumulative = True

    def init_state(self, weights: Tensor, num_clients: int) -> State:
        shape = (num_clients, len(weights))
        return {"fisher": weights.new_zeros(shape), "fisher_weights": weights.new_zeros(shape)}

    def context(self, state: State, clients: Tensor, slot: int) -> Context:
        own = clients[: slot + 1] if self.cumulative else clients[slot : slot + 1]
        return {name: table.sum(0) - table[own].sum(0) for name, table in state.items()}

    def penalty(self, weights: Tensor, received: Tensor, context: Context) -> Tensor:
        square = (context["fisher"] * weights.square()).sum()
        return self.lam * (square - 2 * (context["fisher_weights"] * weights).sum())

    def upload(self, training: ClientTraining, client: Mapping[str, Any], result: LocalResult) -> dict[str, Tensor]:
        squares, seen = [], 0
        for rows in client["order"].split(client["splits"]):
            with torch.enable_grad():
                leaf = result.weights.detach().requires_grad_()
                loss = F.cross_entropy(training.model(leaf, client["image"][rows]), client["label"][rows])
                squares.append(torch.autograd.grad(loss, leaf)[0].square())
            seen += len(rows)
            if seen > self.samples or seen >= client["size"]:
                break
        return {"fisher": torch.stack(squares).mean(0) if squares else torch.zeros_like(result.weights)}

    def aggregate(self, state: State, round: Round) -> Tensor:
        state["fisher"][round.clients] = round.rows(lambda result: result.uploads["fisher"])
        state["fisher_weights"][round.clients] = round.rows(lambda result: result.uploads["fisher"] * result.weights)
        return round.mean_weights()
