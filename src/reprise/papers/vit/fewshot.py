"""Few-shot evaluation without training (section 4.1): least squares from frozen features to {-1, 1}^K."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from reprise.training.probes import Features


def fit_least_squares(feature: Tensor, label: Tensor, num_classes: int, ridge: float = 1.0) -> Tensor:
    """Weights [D + 1, K] minimising |[x 1] W - Y|^2 + ridge |W|^2 in closed form, Y being -1 but 1 for the true class.

    Args:
        feature: float [N, D].
        label: int64 [N].

    Raises:
        ValueError: the ridge is not positive.
    """
    if ridge <= 0:
        raise ValueError(f"the ridge must be positive, not {ridge}")
    x, y = _with_bias(feature), F.one_hot(label, num_classes).double() * 2 - 1
    if len(x) < x.shape[1]:  # the dual problem is the smaller one
        return x.T @ torch.linalg.solve(x @ x.T + ridge * torch.eye(len(x), dtype=x.dtype, device=x.device), y)
    return torch.linalg.solve(x.T @ x + ridge * torch.eye(x.shape[1], dtype=x.dtype, device=x.device), x.T @ y)


def few_shot_accuracy(train: Features, test: Features, num_classes: int, shots: int, ridge: float = 1.0) -> float:
    """Accuracy on `test` of a classifier fitted to the first `shots` items of each class of `train`.

    Features are standardised with the mean and deviation of the items that are fitted to.

    Raises:
        ValueError: a class has fewer items than `shots`.
    """
    chosen = first_of_each_class(train.label, num_classes, shots)
    feature, label = train.value[chosen].double(), train.label[chosen]
    mean, deviation = feature.mean(0), feature.std(0, correction=0) + 1e-8
    weight = fit_least_squares((feature - mean) / deviation, label, num_classes, ridge)
    predicted = (_with_bias((test.value.double() - mean) / deviation) @ weight).argmax(1)
    return (predicted == test.label).double().mean().item()


def first_of_each_class(label: Tensor, num_classes: int, shots: int) -> Tensor:
    """Indices of the first `shots` items of every class, int64 [num_classes * shots]."""
    members = [(label == number).nonzero().flatten()[:shots] for number in range(num_classes)]
    short = [number for number, found in enumerate(members) if len(found) < shots]
    if short:
        raise ValueError(f"fewer than {shots} items of class {short[0]}")
    return torch.cat(members)


def _with_bias(feature: Tensor) -> Tensor:
    feature = feature.double()
    return torch.cat([feature, torch.ones_like(feature[:, :1])], dim=1)
