"""Adapters for the golden cases of FedNTD."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from reprise.data.federated import minibatch_sizes, sample_clients
from reprise.data.partition import (
    IntArray,
    class_counts,
    deal_shards,
    dirichlet,
    draw_shard_classes,
    iid,
    sharding_max,
)
from reprise.golden import GoldenCase
from reprise.papers.fedntd.algorithms import (
    FedAvg,
    FedAvgM,
    FedCurv,
    FedDyn,
    FedKD,
    FedNova,
    FedNTD,
    FedProx,
    Moon,
    Scaffold,
)
from reprise.papers.fedntd.criterion import not_true_distillation, not_true_logits, ntd_loss
from reprise.papers.fedntd.measures import class_hits, in_and_out_local
from reprise.papers.fedntd.model import FedAvgNet, fedavg_cifar, fedavg_mnist, fedavg_tiny
from reprise.papers.fedntd.weights import import_weights
from reprise.training.federated import ClientTraining, FlatModel, LocalSGD, Round, weighted_mean

Outputs = Mapping[str, Tensor]
NETWORKS = {"fedavg_cifar": fedavg_cifar, "fedavg_mnist": fedavg_mnist, "fedavg_tiny": fedavg_tiny}


def loss(case: GoldenCase) -> Outputs:
    """The local loss, its terms and its gradient for several (tau, beta)."""
    inputs, outputs = case.inputs, {}
    teacher, label = inputs["dg_logits"], inputs["targets"]
    for i, (tau, beta) in enumerate(case.config["tau_beta"]):
        logits = inputs["logits"].clone().requires_grad_()
        total = ntd_loss(logits, teacher, label, beta=beta, tau=tau).mean()
        total.backward()
        term = tau**2 * not_true_distillation(logits, teacher, label, tau).mean()
        outputs[f"loss{i}"] = torch.stack([total, F.cross_entropy(logits, label), term]).detach()
        assert logits.grad is not None
        outputs[f"grad_logits{i}"] = logits.grad
    return {**outputs, "not_true_logits": not_true_logits(inputs["logits"], label)}


def cnn(case: GoldenCase) -> Outputs:
    """A full-size network: forward, loss and gradients."""
    config, inputs = case.config, case.inputs
    model = NETWORKS[config["model"]](config["num_classes"])
    right = inputs["linear_1.weight_right"]
    low_rank = {"linear_1.weight": inputs["linear_1.weight_left"] @ right}
    model.load_state_dict(import_weights({**case.weights, **low_rank}, model))
    logits, features = model(inputs["images"], return_features=True)
    options = {"beta": config["beta"], "tau": config["tau"]}
    total = ntd_loss(logits, inputs["dg_logits"], inputs["targets"], **options).mean()
    total.backward()
    gradients = {}
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        official = name.replace("classifier.", "linear_2.") if config["model"] == "fedavg_mnist" else name
        gradients[f"grad_{official}"] = parameter.grad
    product = gradients["grad_linear_1.weight"] @ right.T
    forward = {"logits": logits.detach(), "features": features.detach(), "loss": total.detach()}
    return {**forward, **gradients, "grad_linear_1.weight_times_right_T": product}


def aggregation(case: GoldenCase) -> Outputs:
    """State dicts averaged by data size, before and after loading into a model."""
    states = [
        {name.removeprefix(f"w{i}/"): value for name, value in case.inputs.items() if name.startswith(f"w{i}/")}
        for i in range(case.config["clients"])
    ]
    mean = weighted_mean(states, case.config["sizes"])
    loaded = {name: value.to(states[0][name].dtype) for name, value in mean.items()}
    return {
        f"{kind}/{name}": value
        for kind, state in (("aggregated", mean), ("loaded", loaded))
        for name, value in state.items()
    }


def client_sampling(case: GoldenCase) -> Outputs:
    """Sampled clients of the first rounds."""
    rounds = range(case.config["rounds"])
    return {
        f"clients{i}": torch.from_numpy(np.stack([sample_clients(clients, ratio, r) for r in rounds]))
        for i, (clients, ratio) in enumerate(case.config["settings"])
    }


def partitions(case: GoldenCase) -> Outputs:
    """Index lists and class counts of the partitions."""
    train, test = case.inputs["targets"].numpy(), case.inputs["test_targets"].numpy()
    num_classes, outputs = len(np.unique(train)), {}
    for i, setting in enumerate(case.config["settings"]):
        parts, more = _partition(setting, train, test, num_classes)
        outputs[f"counts{i}"] = torch.from_numpy(class_counts(train, parts, num_classes))
        outputs[f"indices{i}"] = torch.from_numpy(np.concatenate(parts)).to(torch.int32)
        outputs[f"sizes{i}"] = torch.tensor([len(part) for part in parts])
        outputs.update({f"{name}{i}": torch.from_numpy(value) for name, value in more.items()})
    return outputs


def _partition(
    setting: Mapping[str, Any], train: IntArray, test: IntArray, num_classes: int
) -> tuple[list[IntArray], dict[str, IntArray]]:
    clients, seed, method = setting["n_clients"], setting["seed"], setting["method"]
    if method == "sharding":
        classes = draw_shard_classes(num_classes, clients, setting["shard_per_user"], random.Random(seed))
        rng = np.random.RandomState(seed)
        parts = deal_shards(train, classes, rng)
        tests = class_counts(test, deal_shards(test, classes, rng), num_classes)
        return parts, {"shard_classes": classes, "test_counts": tests}
    if method == "lda":
        return dirichlet(train, clients, alpha=setting["alpha"], seed=seed), {}
    if method == "sharding_max":
        return sharding_max(train, clients, shards_per_client=setting["K"], seed=seed), {}
    if method in ("iid", "centralized"):  # centralized: everything with one client
        return iid(train, clients if method == "iid" else 1, seed=seed), {}
    raise ValueError(f"no partition {method!r}")


def rounds(case: GoldenCase) -> Outputs:
    """Communication rounds with fixed mini-batches, through the same parts that train."""
    config = case.config
    images = case.inputs["test/images"]
    model = FedAvgNet(
        (images.shape[1], config["hw"], config["hw"]),
        config["num_classes"],
        channels=(config["c1"], config["c2"]),
        hidden=config["hidden"],
    )
    model.load_state_dict(import_weights(case.weights, model))
    flat, algorithm = FlatModel(model), _algorithm(config)
    state = algorithm.init_state(flat.vector(), config["n_clients"])
    outputs, sampled, metrics = {}, [], []
    accuracy = [_accuracy(flat, flat.vector(), images, case.inputs["test/targets"])]
    for index in range(config["n_rounds"]):
        sgd = LocalSGD(config["lr"] * config["gamma"] ** index, config["momentum"], config["weight_decay"])
        chosen = torch.from_numpy(sample_clients(config["n_clients"], config["sample_ratio"], index))
        finished = _round(case, flat, algorithm, state, chosen, sgd)
        flat.load(algorithm.aggregate(state, finished))
        sampled.append(chosen)
        accuracy.append(_accuracy(flat, flat.vector(), images, case.inputs["test/targets"]))
        metrics.append(_metrics(case, flat, finished, accuracy[-1]))
        outputs.update({f"round{index}/{name}": value for name, value in _tensors(flat, finished, config).items()})
    named = [torch.tensor([row[name] for name in config["metric_names"]]) for row in metrics]
    return {
        **outputs,
        "clients": torch.stack(sampled),
        "test_accuracy": torch.tensor(accuracy),
        "metrics": torch.stack(named),
    }


def _algorithm(config: Mapping[str, Any]) -> FedAvg:
    """By the release's names of algorithms and of their options."""
    official: dict[str, tuple[Callable[..., FedAvg], dict[str, str]]] = {
        "fedavg": (FedAvg, {}),
        "fedntd": (FedNTD, {"beta": "beta", "tau": "tau"}),
        "fedkd": (FedKD, {"beta": "beta", "tau": "tau"}),
        "fedprox": (FedProx, {"mu": "mu"}),
        "fedavgm": (FedAvgM, {"avgm_beta": "beta"}),
        "fednova": (FedNova, {"nova_ccvr": "variance_reduction"}),
        "scaffold": (partial(Scaffold, released=True), {"adaptive_divison": "adaptive"}),
        "moon": (Moon, {"mu": "mu", "tau": "tau"}),
        "feddyn": (FedDyn, {"dyn_alpha": "alpha"}),
        "fedcurv": (partial(FedCurv, cumulative=True), {"size": "samples", "lam": "lam"}),
    }
    algorithm, names = official[config["algo"]]
    return algorithm(**{ours: config[theirs] for theirs, ours in names.items() if theirs in config})


def _round(
    case: GoldenCase, flat: FlatModel, algorithm: FedAvg, state: dict[str, Tensor], chosen: Tensor, sgd: LocalSGD
) -> Round:
    clients = [_client(case, slot, int(client)) for slot, client in enumerate(chosen)]
    contexts = [algorithm.context(state, chosen, slot) for slot in range(len(clients))]
    received = flat.vector()
    training = ClientTraining(flat, algorithm)
    results = training(received, clients, contexts, sgd)
    for client, result in zip(clients, results, strict=True):
        result.uploads = algorithm.upload(training, client, result)
    sizes = torch.tensor([client["size"] for client in clients])
    steps = torch.tensor([len(client["splits"]) for client in clients])
    return Round(received, chosen, sizes, steps, sgd, results, case.config["n_clients"], case.config["sample_ratio"])


def _client(case: GoldenCase, slot: int, client: int) -> dict[str, Any]:
    config, image = case.config, case.inputs[f"client{client}/images"]
    return {
        "slot": slot,
        "client": client,
        "size": len(image),
        "image": image,
        "label": case.inputs[f"client{client}/targets"],
        "order": torch.arange(len(image)).repeat(config["local_epochs"]),
        "splits": minibatch_sizes(len(image), config["batch_size"], config["local_epochs"]),
    }


def _tensors(flat: FlatModel, finished: Round, config: Mapping[str, Any]) -> dict[str, Tensor]:
    tensors = {f"global/{name}": value.clone() for name, value in flat.model.state_dict().items()}
    for result in finished.results:
        local = flat.unflatten(result.weights)
        tensors.update({f"client_slot{result.slot}/{name}": local[name] for name in config["track"]})
    losses = torch.cat([result.losses for result in finished.results])
    return {**tensors, "client_sizes": finished.sizes, "losses": losses, "lr": torch.tensor(finished.sgd.lr)}


@torch.no_grad()
def _class_accuracy(flat: FlatModel, weights: Tensor, image: Tensor, label: Tensor) -> Tensor:
    hits, items = class_hits(flat.predict(weights, image), label)
    return hits / items


@torch.no_grad()
def _accuracy(flat: FlatModel, weights: Tensor, image: Tensor, label: Tensor) -> float:
    """Rounded to four digits, as the release stores accuracies."""
    return round((flat.predict(weights, image).argmax(1) == label).float().mean().item(), 4)


def _metrics(case: GoldenCase, flat: FlatModel, finished: Round, server: float) -> dict[str, float]:
    image, label = case.inputs["test/images"], case.inputs["test/targets"]
    train, test, inside, outside = [], [], [], []
    for result, client in zip(finished.results, finished.clients.tolist(), strict=True):
        own_image, own_label = (case.inputs[f"client{client}/{name}"] for name in ("images", "targets"))
        by_class = _class_accuracy(flat, result.weights, image, label)
        counts = own_label.bincount(minlength=case.config["num_classes"]).float()
        within, without = in_and_out_local(by_class, counts / counts.sum())
        train.append(_accuracy(flat, result.weights, own_image, own_label))
        test.append(round(by_class.mean().item(), 4))
        inside.append(within)
        outside.append(without)
    within, without = torch.stack(inside), torch.stack(outside)
    return {
        "local_train_acc": float(np.mean(train)),
        "local_test_acc": float(np.mean(test)),
        "server_test_acc": server,
        "in_dist_acc_prop": float(within @ finished.share),
        "in_dist_acc_mean": float(within.mean()),
        "in_dist_acc_std": float(within.std()),
        "out_dist_acc": float(without @ finished.share),
        "in_dout_acc_mean": float(without.mean()),
    }


ADAPTERS = {
    "fedntd_loss": loss,
    "fedntd_cnn": cnn,
    "fedntd_aggregation": aggregation,
    "fedntd_client_sampling": client_sampling,
    "fedntd_partitions": partitions,
    "fedntd_rounds": rounds,
}
