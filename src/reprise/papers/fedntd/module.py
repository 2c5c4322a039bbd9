"""Federated image classification: one training step is one communication round."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from reprise.data.federated import Federated
from reprise.data.loader import Batch, EvalLoader
from reprise.distributed import all_reduce_sum
from reprise.errors import ConfigError
from reprise.papers.fedntd.algorithms import FedAvg
from reprise.papers.fedntd.measures import class_hits, forgetting, in_and_out_local
from reprise.papers.fedntd.model import FedAvgNet
from reprise.training.federated import (
    ClientTraining,
    FlatModel,
    LocalResult,
    LocalSGD,
    Round,
    channels_last,
)
from reprise.training.module import OptimizerFactory, PaperModule, Picture, ScheduleFactory

LAST = 5  # test/accuracy_last5 is the mean over the global models of this many last rounds


class FederatedClassifier(PaperModule):
    """The server of FedNTD and of its baselines (Lee et al. 2022, algorithm 1).

    The optimizer is the server's: it holds the learning rate, momentum and weight decay that the clients of a round
    train with; the schedule is stepped once per round. It moves nothing itself. Batches are rounds
    (`reprise.data.federated.RoundLoader`). All state is in buffers: the algorithm's memory (`state_*`), the class-wise
    accuracy of the global model on validation data by round (`history`, -1 where not measured), the global models of
    the last rounds (`recent`), the last measures of local models, and the number of finished rounds.

    Logs `val/accuracy` and `val/forgetting` at each validation; `test/accuracy` (final global model),
    `test/accuracy_last5` (mean over the last five global models) and `test/forgetting`. F needs the class-wise accuracy
    of every round; so that the test items are touched once, its history is the one on the validation items.

    Args:
        model: images [B, C, H, W] to logits, and features where asked.
        algorithms: by name.
        algorithm: the name of the one to use.
        num_classes, num_clients: of the data.
        rounds: of the whole run.
        local_every: after every so many rounds, measure the local models on the validation items, inside and outside
            their clients' classes (`val/local_accuracy`, `val/in_local_accuracy`, `val/out_local_accuracy`); 0: never.
        client_execution: `sequential` or `batched`; both give the same weights.
        as_released: behave like the released code where it differs from the paper: the initial learning rate is
            `released_lr`, and FedCurv, FedNova and SCAFFOLD follow it (their `follow_release`).
        released_lr: the released initial learning rate; None keeps the optimizer's.

    Raises:
        ConfigError: an unknown algorithm.
    """

    automatic_optimization = False
    history: Tensor
    recent: Tensor
    finished_rounds: Tensor
    local_measures: Tensor
    hits: Tensor
    items: Tensor

    refuses = {
        "accumulation": "a step is a round of clients, each with batches of their own (data.batch_size)",
        "sharding": "each rank trains whole models of its clients",
    }

    def __init__(
        self,
        model: FedAvgNet,
        optimizer: OptimizerFactory,
        schedule: ScheduleFactory | None = None,
        *,
        algorithms: Mapping[str, FedAvg],
        algorithm: str,
        num_classes: int,
        num_clients: int,
        rounds: int,
        local_every: int = 0,
        client_execution: str = "sequential",
        as_released: bool = False,
        released_lr: float | None = None,
    ) -> None:
        if as_released and released_lr is not None:
            optimizer = _with_rate(optimizer, released_lr)
        super().__init__(optimizer, schedule)
        self.model: FedAvgNet = model
        self.flat = FlatModel(model)
        self.algorithm = _choose(algorithms, algorithm)
        if as_released:
            self.algorithm.follow_release()
        self.clients = ClientTraining(self.flat, self.algorithm, client_execution)
        self.num_clients, self.local_every = num_clients, local_every
        weights = self.flat.vector()
        state = self.algorithm.init_state(weights, num_clients)
        self.state_names = list(state)
        for name, value in state.items():
            self.register_buffer(f"state_{name}", value)
        self.register_buffer("history", torch.full((rounds, num_classes), -1.0))
        self.register_buffer("recent", weights.new_zeros(LAST, len(weights)))
        self.register_buffer("local_measures", torch.full((3,), -1.0))
        self.register_buffer("finished_rounds", torch.zeros((), dtype=torch.int64))
        self.register_buffer("hits", torch.zeros(LAST, num_classes), persistent=False)
        self.register_buffer("items", torch.zeros(num_classes), persistent=False)

    def forward(self, image: Tensor) -> Tensor:
        return self.model(image)

    @property
    def state(self) -> dict[str, Tensor]:
        """The algorithm's memory."""
        return {name: getattr(self, f"state_{name}") for name in self.state_names}

    @property
    def class_history(self) -> Tensor:
        """Class-wise validation accuracy of the global model by round, [rounds, C], NaN where not measured."""
        return self.history.masked_fill(self.history < 0, torch.nan)

    def example_batch(self, batch_size: int) -> Batch:
        """A round of one client with one random mini-batch, for `reprise plan`."""
        items = {
            "image": torch.rand(batch_size, *self.model.image_shape),
            "label": torch.zeros(batch_size, dtype=torch.int64),
            "index": torch.arange(batch_size),
        }
        client = {"slot": 0, "client": 0, "size": batch_size, "order": torch.arange(batch_size), "splits": [batch_size]}
        sampled = {"clients": torch.tensor([0]), "sizes": torch.tensor([batch_size]), "steps": torch.tensor([1])}
        return {**items, "round": 0, "sample_ratio": 1 / self.num_clients, **sampled, "local": [{**client, **items}]}

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """One communication round: the rank's clients train, the server aggregates over all ranks."""
        sgd = LocalSGD.of(self.trainer.optimizers[0])
        received = self.flat.vector()
        results = self._train_clients(batch, received, sgd)
        finished = Round(
            received,
            batch["clients"],
            batch["sizes"],
            batch["steps"],
            sgd,
            results,
            self.num_clients,
            batch["sample_ratio"],
            self.flat.buffers(),
        )
        self._measure_locals(batch, results)
        self._accept(self.algorithm.aggregate(self.state, finished), finished.mean_buffers())
        self._count_round()
        steps = batch["steps"].sum().clamp(min=1)
        loss = all_reduce_sum(sum((r.losses.sum() for r in results), start=received.new_zeros(()))) / steps
        self.log("train/loss", loss, batch_size=1)
        return loss

    def _count_round(self) -> None:
        """One step of the optimizer, which moves nothing (there are no gradients), and of its schedule."""
        optimizer, schedule = self.optimizers(), self.lr_schedulers()
        assert not isinstance(optimizer, list)
        assert not isinstance(schedule, list)
        optimizer.step()
        if schedule is not None:
            schedule.step()

    def _train_clients(self, batch: Batch, received: Tensor, sgd: LocalSGD) -> list[LocalResult]:
        contexts = [self.algorithm.context(self.state, batch["clients"], client["slot"]) for client in batch["local"]]
        results = self.clients(received, batch["local"], contexts, sgd)
        for result, client in zip(results, batch["local"], strict=True):
            result.uploads = self.algorithm.upload(self.clients, client, result)
        return results

    def _accept(self, weights: Tensor, statistics: Mapping[str, Tensor]) -> None:
        """Make new global weights the model's and remember them."""
        self.flat.load(weights)
        for name, buffer in self.model.named_buffers():
            buffer.copy_(statistics[name])
        self.recent[self.finished_rounds % LAST] = weights
        self.finished_rounds += 1

    @torch.no_grad()
    def _measure_locals(self, batch: Batch, results: list[LocalResult]) -> None:
        """The local models' class-wise accuracy on all validation items: plain, in-local and out-local means."""
        if not self.local_every or (int(self.finished_rounds) + 1) % self.local_every:
            return
        data = self.data
        total = self.local_measures.new_zeros(3)
        for result, client in zip(results, batch["local"], strict=True):
            hits, items = torch.zeros_like(self.items), torch.zeros_like(self.items)
            for part in EvalLoader(data.source("val"), data.eval_batch_size):
                image, label = part["image"].to(self.device), part["label"].to(self.device)
                right, seen = class_hits(self.flat(result.weights, channels_last(image), result.buffers), label)
                hits, items = hits + right, items + seen
            counts = client["label"].bincount(minlength=len(items)).float()
            inside, outside = in_and_out_local(hits / items, counts / counts.sum())
            total += torch.stack([(hits / items).nanmean(), inside, outside])
        self.local_measures.copy_(all_reduce_sum(total) / len(batch["clients"]))

    def on_validation_epoch_start(self) -> None:
        self._restart_counts()

    def on_test_epoch_start(self) -> None:
        self._restart_counts()

    def _restart_counts(self) -> None:
        self.hits.zero_()
        self.items.zero_()

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        hits, items = class_hits(self(channels_last(batch["image"])), batch["label"])
        self.hits[0] += hits
        self.items += items

    def on_validation_epoch_end(self) -> None:
        hits, items = all_reduce_sum(self.hits[0].clone()), all_reduce_sum(self.items.clone())
        if self.finished_rounds:
            self.history[self.finished_rounds - 1] = (hits / items).nan_to_num(nan=-1.0)
        self.log("val/accuracy", hits.sum() / items.sum())
        self.log("val/forgetting", forgetting(self.class_history))
        names = ("local_accuracy", "in_local_accuracy", "out_local_accuracy")
        if (self.local_measures >= 0).all():
            self.log_dict({f"val/{name}": value for name, value in zip(names, self.local_measures, strict=True)})

    def last_models(self) -> Tensor:
        """The global weights of up to five last rounds, newest first, [n, P]; before training, the current ones."""
        done = int(self.finished_rounds)
        order = [(done - 1 - back) % LAST for back in range(min(done, LAST))]
        return self.recent[order] if order else self.flat.vector()[None]

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        for row, weights in enumerate(self.last_models()):
            hits, items = class_hits(self.flat.predict(weights, batch["image"]), batch["label"])
            self.hits[row] += hits
        self.items += items

    def on_test_epoch_end(self) -> None:
        hits, items = all_reduce_sum(self.hits.clone()), all_reduce_sum(self.items.clone())
        accuracy = hits.sum(1)[: len(self.last_models())] / items.sum()
        self.log("test/accuracy", accuracy[0])
        self.log("test/accuracy_last5", accuracy.mean())
        self.log("test/forgetting", forgetting(self.class_history))

    @torch.no_grad()
    def predict(self, image: Tensor) -> Tensor:
        """Class probabilities [B, num_classes] of the global model in evaluation mode."""
        return self.eval()(image.to(self.device)).softmax(-1)

    def pictures(self) -> Iterator[Picture]:
        from reprise.papers.fedntd import pictures  # matplotlib

        assert isinstance(self.data, Federated)
        spec = self.data.spec
        yield pictures.partition(self.data.counts(), spec.classes)
        yield pictures.class_history(self.class_history.cpu(), spec.classes)
        yield pictures.accuracy_history(self.class_history.cpu())


def _with_rate(optimizer: OptimizerFactory, lr: float) -> OptimizerFactory:
    """The same factory with another learning rate."""

    def make(parameters: Iterable[Any]) -> Optimizer:
        made = optimizer(parameters)
        for group in made.param_groups:
            group["lr"] = lr
        return made

    return make


def _choose(algorithms: Mapping[str, FedAvg], name: str) -> FedAvg:
    if name not in algorithms:
        raise ConfigError(
            f"no federated algorithm {name!r}",
            looked_at="paper.algorithm",
            next_step=f"choose one of: {', '.join(algorithms)}",
        )
    return algorithms[name]
