"""Federated training on one machine or several ranks: local SGD over flat weight vectors, and sums over the clients.

A model is seen as a function of one flat vector w [P] (P parameters), so that what an algorithm does to weights,
momentum or control variates is written as in its paper. The clients of a round train one after the other, or all at
once (`torch.func.vmap` over clients); both give the same weights up to rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value, vmap

from reprise.distributed import all_reduce_sum
from reprise.errors import ConfigError

Context = dict[str, Tensor]  # what an algorithm tells one client: vectors [P]
Notes = dict[str, Tensor]  # what an algorithm knows of each item: first dimension = items


def weighted_mean(states: Sequence[Mapping[str, Tensor]], sizes: Sequence[float]) -> dict[str, Tensor]:
    """The mean of state dicts, weighted by data size, over every entry (statistics and counters become float32)."""
    share = torch.tensor(sizes, dtype=torch.float32)
    share = share / share.sum()
    return {name: sum_of(p * state[name] for p, state in zip(share, states, strict=True)) for name in states[0]}


def sum_of(terms: Any) -> Tensor:
    """The sum of an iterable of tensors, from left to right."""
    first, *rest = terms
    for term in rest:
        first = first + term
    return first


def channels_last(image: Tensor) -> Tensor:
    """Images [B, C, H, W] in the memory order in which convolutions and pooling are fastest on a CPU."""
    return image.contiguous(memory_format=torch.channels_last) if image.ndim == 4 else image


class FlatModel:
    """A module as a function of a flat vector of its parameters, in the order of `named_parameters`."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        named = dict(model.named_parameters())
        self.names = list(named)
        self.shapes = [parameter.shape for parameter in named.values()]
        self.sizes = [parameter.numel() for parameter in named.values()]

    def vector(self) -> Tensor:
        """A copy of the parameters, [P]."""
        return torch.cat([parameter.detach().reshape(-1) for parameter in self.model.parameters()])

    def load(self, vector: Tensor) -> None:
        """Write a vector into the module's parameters."""
        with torch.no_grad():
            for parameter, value in zip(self.model.parameters(), self.unflatten(vector).values(), strict=True):
                parameter.copy_(value)

    def unflatten(self, vector: Tensor) -> dict[str, Tensor]:
        """Views of a vector by parameter name."""
        parts = vector.split(self.sizes)
        return {name: part.view(shape) for name, part, shape in zip(self.names, parts, self.shapes, strict=True)}

    def buffers(self) -> dict[str, Tensor]:
        """Copies of the module's buffers (running statistics)."""
        return {name: buffer.detach().clone() for name, buffer in self.model.named_buffers()}

    def __call__(self, vector: Tensor, image: Tensor, buffers: dict[str, Tensor] | None = None, **options: Any) -> Any:
        """The module's output at these weights; `buffers` are read and, in training mode, updated in place."""
        return functional_call(self.model, {**self.unflatten(vector), **(buffers or {})}, (image,), options)

    def predict(self, vector: Tensor, image: Tensor, *, chunk: int = 500, **options: Any) -> Any:
        """The output for many images, `chunk` at a time (a tensor, or a tuple of them)."""
        outputs = [self(vector, channels_last(part), **options) for part in image.split(chunk)]
        if isinstance(outputs[0], Tensor):
            return torch.cat(outputs)
        return tuple(torch.cat(column) for column in zip(*outputs, strict=True))


@dataclass(frozen=True)
class LocalSGD:
    """torch's SGD as a pure function; every client starts a round with zero momentum."""

    lr: float
    momentum: float = 0.0
    weight_decay: float = 0.0

    @classmethod
    def of(cls, optimizer: torch.optim.Optimizer) -> LocalSGD:
        """The current hyper-parameters of the server's optimizer, which is never stepped itself.

        Raises:
            ConfigError: the optimizer is not plain SGD.
        """
        group = optimizer.param_groups[0]
        if type(optimizer) is not torch.optim.SGD or group["nesterov"] or group["dampening"] or group["maximize"]:
            raise ConfigError(
                "clients train with plain SGD (no Nesterov momentum, no dampening)",
                looked_at="optimizer",
                next_step="choose `optimizer: sgd` and set lr, momentum and weight_decay",
            )
        return cls(group["lr"], group["momentum"], group["weight_decay"])

    def step(self, weights: Tensor, velocity: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
        """v <- momentum v + (gradient + weight_decay w); w <- w - lr v."""
        velocity = self.momentum * velocity + gradient + self.weight_decay * weights
        return weights - self.lr * velocity, velocity

    def effective_steps(self, steps: Tensor) -> Tensor:
        """How many plain SGD steps `steps` momentum steps with a constant gradient move (FedNova, table 1)."""
        rho = self.momentum
        return (steps - rho * (1 - rho**steps) / (1 - rho)) / (1 - rho)


class LocalObjective(Protocol):
    """What the clients minimise; `Algorithm` of the FedNTD paper is one."""

    @property
    def features(self) -> bool: ...

    def annotate(self, model: FlatModel, received: Tensor, image: Tensor, context: Context) -> Notes: ...

    def sample_losses(self, logits: Tensor, features: Tensor, label: Tensor, notes: Notes) -> Tensor: ...

    def penalty(self, weights: Tensor, received: Tensor, context: Context) -> Tensor | None: ...

    def correct(self, gradient: Tensor, context: Context) -> Tensor: ...


@dataclass
class LocalResult:
    """What a client hands back: weights [P], the loss of every local step [T], and its running statistics."""

    slot: int
    weights: Tensor
    losses: Tensor
    buffers: dict[str, Tensor] = field(default_factory=dict)
    uploads: dict[str, Tensor] = field(default_factory=dict)  # what else the algorithm sends, each [P]


@dataclass
class ClientTraining:
    """Local training of a rank's clients of one round.

    Args:
        model: shared by all clients.
        objective: what they minimise.
        execution: `sequential` (one client after the other) or `batched` (all at once; not for models with running
            statistics, which vmap cannot update).
    """

    model: FlatModel
    objective: LocalObjective
    execution: str = "sequential"

    def __post_init__(self) -> None:
        if self.execution not in ("sequential", "batched"):
            raise ConfigError(
                f"no client execution {self.execution!r}",
                looked_at="paper.client_execution",
                next_step="choose sequential or batched",
            )
        if self.execution == "batched" and self.model.buffers():
            raise ConfigError(
                "batched clients cannot update the running statistics of batch normalisation",
                looked_at="paper.client_execution",
                next_step="choose sequential, or a model without batch normalisation",
            )

    def __call__(
        self, received: Tensor, clients: Sequence[Mapping[str, Any]], contexts: Sequence[Context], sgd: LocalSGD
    ) -> list[LocalResult]:
        """Train every client from the weights `received` [P]; `clients` as in `reprise.data.federated.RoundLoader`."""
        if not clients:
            return []
        with torch.no_grad():
            self.model.model.eval()
            notes = [
                self.objective.annotate(self.model, received, client["image"], context)
                for client, context in zip(clients, contexts, strict=True)
            ]
            self.model.model.train()
        if self.execution == "batched" and max(len(client["splits"]) for client in clients):
            return self._batched(received, clients, contexts, notes, sgd)
        return [
            self._one(received, client, context, note, sgd)
            for client, context, note in zip(clients, contexts, notes, strict=True)
        ]

    def loss(
        self,
        weights: Tensor,
        received: Tensor,
        image: Tensor,
        label: Tensor,
        valid: Tensor,
        context: Context,
        notes: Notes,
        buffers: dict[str, Tensor] | None = None,
    ) -> Tensor:
        """Mean loss over the valid items of a mini-batch, plus the penalty on the weights."""
        if self.objective.features:
            logits, features = self.model(weights, image, buffers, return_features=True)
        else:
            logits = features = self.model(weights, image, buffers)
        losses = self.objective.sample_losses(logits, features, label, notes)
        mean = (losses * valid).sum() / valid.sum().clamp(min=1)
        penalty = self.objective.penalty(weights, received, context)
        return mean if penalty is None else mean + penalty

    def _one(
        self, received: Tensor, client: Mapping[str, Any], context: Context, notes: Notes, sgd: LocalSGD
    ) -> LocalResult:
        weights, velocity = received.clone(), torch.zeros_like(received)
        buffers, losses = self.model.buffers(), []
        for rows in client["order"].split(client["splits"]):
            image, label = channels_last(client["image"][rows]), client["label"][rows]
            valid = torch.ones(len(rows), device=weights.device)
            note = {name: value[rows] for name, value in notes.items()}
            with torch.enable_grad():
                leaf = weights.detach().requires_grad_()
                loss = self.loss(leaf, received, image, label, valid, context, note, buffers)
                (gradient,) = torch.autograd.grad(loss, leaf)
            gradient = self.objective.correct(gradient, context)
            weights, velocity = sgd.step(weights, velocity, gradient)
            losses.append(loss.detach())
        return LocalResult(client["slot"], weights, torch.stack(losses) if losses else received.new_empty(0), buffers)

    def _batched(
        self,
        received: Tensor,
        clients: Sequence[Mapping[str, Any]],
        contexts: Sequence[Context],
        notes: Sequence[Notes],
        sgd: LocalSGD,
    ) -> list[LocalResult]:
        rows, valid = padded_minibatches(clients, received.device)
        image, label = _stack([client["image"] for client in clients]), _stack([client["label"] for client in clients])
        note = {name: _stack([one[name] for one in notes]) for name in notes[0]}
        context = {name: torch.stack([one[name] for one in contexts]) for name in contexts[0]}
        gradient_of = vmap(grad_and_value(self.loss), in_dims=(0, None, 0, 0, 0, 0, 0))
        who = torch.arange(len(clients), device=received.device)[:, None]
        weights = received.expand(len(clients), -1).clone()
        velocity, losses = torch.zeros_like(weights), []
        for pick, mask in zip(rows.unbind(1), valid.unbind(1), strict=True):
            taken = {name: value[who, pick] for name, value in note.items()}
            gradient, loss = gradient_of(weights, received, image[who, pick], label[who, pick], mask, context, taken)
            gradient = self.objective.correct(gradient, context)
            stepped, moved = sgd.step(weights, velocity, gradient)
            active = mask.any(1, keepdim=True)  # a client that has finished stays where it is
            weights, velocity = torch.where(active, stepped, weights), torch.where(active, moved, velocity)
            losses.append(loss)
        table = torch.stack(losses, 1)
        return [
            LocalResult(client["slot"], weights[i], table[i, : len(client["splits"])])
            for i, client in enumerate(clients)
        ]


def padded_minibatches(clients: Sequence[Mapping[str, Any]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Rows int64 and validity float32, both [clients, T, B], of the mini-batches of clients of different sizes."""
    steps = max(len(client["splits"]) for client in clients)
    width = max(max(client["splits"], default=1) for client in clients)
    rows = torch.zeros(len(clients), steps, width, dtype=torch.int64)
    valid = torch.zeros(len(clients), steps, width)
    for i, client in enumerate(clients):
        for t, part in enumerate(client["order"].cpu().split(client["splits"])):
            rows[i, t, : len(part)] = part
            valid[i, t, : len(part)] = 1
    return rows.to(device), valid.to(device)


def _stack(parts: Sequence[Tensor]) -> Tensor:
    """Parts of different length as one tensor [parts, longest, ...], filled up with zeros."""
    return nn.utils.rnn.pad_sequence(list(parts), batch_first=True)


@dataclass
class Round:
    """A finished round as the server sees it, on every rank alike.

    Attributes:
        received: the global weights the clients started from, [P].
        clients, sizes, steps: of ALL S sampled clients: who, how many items, how many local steps; [S].
        sgd: the local optimizer of the round.
        results: of this rank's clients.
        num_clients: K; sample_ratio: the configured S / K.
        statistics: the global model's running statistics.
    """

    received: Tensor
    clients: Tensor
    sizes: Tensor
    steps: Tensor
    sgd: LocalSGD
    results: Sequence[LocalResult]
    num_clients: int
    sample_ratio: float
    statistics: dict[str, Tensor] = field(default_factory=dict)

    @property
    def share(self) -> Tensor:
        """n_k / sum of n over the sampled clients, float32 [S]."""
        sizes = self.sizes.to(self.received)
        return sizes / sizes.sum() if sizes.any() else torch.full_like(sizes, 1 / len(sizes))

    @property
    def effective_steps(self) -> Tensor:
        """a_k of the sampled clients, float32 [S], at least 1 (`LocalSGD.effective_steps`)."""
        return self.sgd.effective_steps(self.steps.to(self.received)).clamp(min=1)

    def total(self, term: Callable[[LocalResult], Tensor]) -> Tensor:
        """The sum of a term over the sampled clients of all ranks, [P]."""
        mine = [term(result) for result in self.results]
        return all_reduce_sum(sum_of(mine) if mine else torch.zeros_like(self.received))

    def mean_weights(self) -> Tensor:
        """The mean of the local weights by data size: FedAvg's aggregation, [P]."""
        share = self.share
        return self.total(lambda result: share[result.slot] * result.weights)

    def mean_buffers(self) -> dict[str, Tensor]:
        """Running statistics averaged like weights; counters are truncated to integers, as the release loads them."""
        share = self.share
        mean = {}
        for name, like in self.statistics.items():
            terms = [share[result.slot] * result.buffers[name] for result in self.results]
            total = sum_of(terms) if terms else torch.zeros_like(like, dtype=share.dtype)
            mean[name] = all_reduce_sum(total).to(like.dtype)
        return mean

    def rows(self, value: Callable[[LocalResult], Tensor]) -> Tensor:
        """One row of every sampled client, collected from all ranks, [S, P]."""
        table = self.received.new_zeros(len(self.clients), len(self.received))
        for result in self.results:
            table[result.slot] = value(result)
        return all_reduce_sum(table)
