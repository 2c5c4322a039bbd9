"""Is a frozen representation any good? Weighted k nearest neighbours and a linear classifier, on stored features."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from reprise.data.loader import EvalLoader, Source


@dataclass(frozen=True)
class Features:
    """Features [N, D] of N items and their labels int64 [N]."""

    value: Tensor
    label: Tensor

    def __len__(self) -> int:
        return len(self.value)

    def few(self, per_class: int | None) -> Features:
        """The first `per_class` items of every class, in their order; all of them for None."""
        if per_class is None:
            return self
        member = F.one_hot(self.label)
        rank = (member.cumsum(0) * member).sum(1)  # 1 for the first of its class
        kept = rank <= per_class
        return Features(self.value[kept], self.label[kept])


@torch.no_grad()
def extract(encode: Callable[[Tensor], Tensor], source: Source, batch_size: int, device: torch.device) -> Features:
    """Features of every item of a source, in its order, on `device`; `encode` takes images [B, C, H, W]."""
    value, label = [], []
    for batch in EvalLoader(source, batch_size):
        value.append(encode(batch["image"].to(device)).float())
        label.append(batch["label"].to(device))
    return Features(torch.cat(value), torch.cat(label))


def in_full(feature: Tensor) -> AbstractContextManager[Any]:
    """Without autocast: a neighbour or a class may hang on a digit that bfloat16 does not have."""
    return torch.autocast(feature.device.type, enabled=False)


def knn_scores(feature: Tensor, bank: Features, num_classes: int, *, k: int = 200, temperature: float = 0.1) -> Tensor:
    """Votes of the k nearest neighbours by cosine similarity, exp(similarity / temperature) each, [N, num_classes].

    Wu et al. 2018 (1805.01978), section 3.4; MoCo's monitor on CIFAR-10. The largest vote is the prediction. With
    fewer than k items in the bank all of them vote.

    Args:
        feature: [N, D], any length.
        bank: labelled features.
    """
    with in_full(feature):
        similarity = F.normalize(feature, dim=1) @ F.normalize(bank.value, dim=1).T
    nearest, index = similarity.topk(min(k, len(bank)), dim=1)
    votes = (nearest / temperature).exp()
    return votes.new_zeros(len(feature), num_classes).scatter_add_(1, bank.label[index], votes)


@dataclass(frozen=True)
class Standardise:
    """(feature - mean) / std with the statistics of a training set; what does not vary stays 0."""

    mean: Tensor
    std: Tensor

    @classmethod
    def fit(cls, feature: Tensor) -> Standardise:
        return cls(feature.mean(0), feature.std(0).clamp_min(1e-6))

    def __call__(self, feature: Tensor) -> Tensor:
        return (feature - self.mean) / self.std


def linear_probe(
    train: Features, num_classes: int, *, decay: float = 1e-3, iterations: int = 100
) -> Callable[[Tensor], Tensor]:
    """Multinomial logistic regression on standardised features, solved by L-BFGS; deterministic.

    For features that are held in memory. Minimises mean cross-entropy + decay / 2 * |W|^2.

    Returns:
        A function from features [N, D] to logits [N, num_classes].
    """
    with torch.inference_mode(False), torch.enable_grad():  # probes are fitted during evaluation
        scale = Standardise.fit(train.value.detach().clone())
        inputs, label = scale(train.value.detach().clone()), train.label.clone()
        weight = inputs.new_zeros(num_classes, inputs.shape[1], requires_grad=True)
        bias = inputs.new_zeros(num_classes, requires_grad=True)
        solver = torch.optim.LBFGS([weight, bias], max_iter=iterations, line_search_fn="strong_wolfe")

        def closure() -> Tensor:
            solver.zero_grad()
            loss = F.cross_entropy(inputs @ weight.T + bias, label) + decay / 2 * weight.square().sum()
            loss.backward()
            return loss

        solver.step(closure)

    def classify(feature: Tensor) -> Tensor:
        with in_full(feature):
            return scale(feature) @ weight.detach().T + bias.detach()

    return classify
