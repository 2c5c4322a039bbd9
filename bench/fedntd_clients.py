"""One round's clients trained one after the other, and all at once with `torch.func.vmap`: which is faster here?

Both run in this process, in turns, on the same data and weights; processor time is compared, and the ratio printed.
    python bench/fedntd_clients.py
Measured on two contended cores of an AMD EPYC, one thread (batched / sequential): digits about 0.9, CIFAR-10 about 2.
"""

from __future__ import annotations

import statistics
import time

import torch

from reprise.data.federated import minibatch_sizes
from reprise.papers.fedntd.algorithms import FedNTD
from reprise.papers.fedntd.model import FedAvgNet, fedavg_cifar, fedavg_digits
from reprise.training.federated import ClientTraining, FlatModel, LocalSGD

REPEATS = 3
CASES = {  # model, (clients, items each, image shape, batch size, epochs)
    "digits": (fedavg_digits, (4, 50, (1, 8, 8), 32, 5)),
    "cifar10": (fedavg_cifar, (4, 100, (3, 32, 32), 50, 1)),
}


def make_clients(
    count: int, items: int, shape: tuple[int, ...], batch_size: int, epochs: int
) -> list[dict[str, object]]:
    """Clients with random images."""
    return [
        {
            "slot": slot,
            "client": slot,
            "size": items,
            "image": torch.rand(items, *shape),
            "label": torch.randint(10, (items,)),
            "order": torch.cat([torch.randperm(items) for _ in range(epochs)]),
            "splits": minibatch_sizes(items, batch_size, epochs),
        }
        for slot in range(count)
    ]


def seconds(training: ClientTraining, clients: list[dict[str, object]]) -> float:
    """Processor time of one round."""
    began = time.process_time()
    training(training.model.vector(), clients, [{} for _ in clients], LocalSGD(0.05, 0.9, 1e-5))
    return time.process_time() - began


def main() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    for name, (build, sizes) in CASES.items():
        model: FedAvgNet = build()
        clients = make_clients(*sizes)
        ways = {way: ClientTraining(FlatModel(model), FedNTD(), way) for way in ("sequential", "batched")}
        times: dict[str, list[float]] = {way: [] for way in ways}
        for _ in range(REPEATS + 1):
            for way, training in ways.items():
                times[way].append(seconds(training, clients))
        median = {way: statistics.median(found[1:]) for way, found in times.items()}
        print(
            f"{name}: sequential {median['sequential']:.3f} s, batched {median['batched']:.3f} s a round, "
            f"ratio {median['batched'] / median['sequential']:.2f}"
        )


if __name__ == "__main__":
    main()
