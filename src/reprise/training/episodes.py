"""Few-shot evaluation by episodes: N ways, K shots, frozen features.

Shapes: E episodes, W ways (classes), K support items of each, Q queries of each, D width. An episode is a table of item
indices [W, K + Q] whose first K columns are the support; logits are [E, W * Q, W] with queries in class order.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from reprise.seeding import generator


class Interval(NamedTuple):
    """A mean over episodes and the half-width of its 95 % interval, 1.96 std / sqrt(E), as the field reports it."""

    mean: float
    half_width: float


def sample_episodes(label: Tensor, ways: int, shots: int, queries: int | None, count: int, seed: int) -> Tensor:
    """Random episodes int64 [E, W, K + Q] of items with labels [N]; a function of its arguments alone.

    Args:
        queries: of each class; None: all that the smallest class has left.

    Raises:
        ValueError: there are fewer classes than ways, or a class has too few items.
    """
    members = [(label == value).nonzero().flatten() for value in label.unique()]
    smallest = min(len(items) for items in members)
    size = smallest if queries is None else shots + queries
    if len(members) < ways or smallest < size or size <= shots:
        raise ValueError(
            f"{ways} ways with {shots} shots and {'all other' if queries is None else queries} queries do not fit "
            f"{len(members)} classes of at least {smallest} items"
        )
    rng = generator(seed, "episodes", ways, shots, size)
    classes = torch.rand(count, len(members), generator=rng).argsort(1)[:, :ways]
    return torch.stack([_members_of(row.tolist(), members, size, rng) for row in classes])


def _members_of(classes: list[int], members: list[Tensor], size: int, rng: torch.Generator) -> Tensor:
    chosen = [members[value][torch.randperm(len(members[value]), generator=rng)[:size]] for value in classes]
    return torch.stack(chosen)


def prototype_logits(feature: Tensor, episode: Tensor, shots: int) -> Tensor:
    """Cosine of each query to the mean of each class's support (not normalised before the mean), [E, W * Q, W].

    Args:
        feature: [N, D]; episode: [E, W, K + Q].
    """
    support, query = _parts(feature, episode, shots)
    return F.normalize(query, dim=-1) @ F.normalize(support.mean(2), dim=-1).transpose(1, 2)


def nearest_neighbour_logits(feature: Tensor, episode: Tensor, shots: int, neighbours: int = 5) -> Tensor:
    """For each class the summed cosine of those of its support items that are among the query's nearest, [E, W * Q, W].

    Args:
        neighbours: how many of the W * K support items vote, at most all of them.
    """
    support, query = _parts(feature, episode, shots)
    similarity = F.normalize(query, dim=-1) @ F.normalize(support.flatten(1, 2), dim=-1).transpose(1, 2)
    nearest = similarity.topk(min(neighbours, similarity.shape[-1]), dim=-1)
    owner = nearest.indices // shots
    logits = similarity.new_zeros(*similarity.shape[:2], episode.shape[1])
    return logits.scatter_add_(2, owner, 1 + nearest.values)


def cosine_classifier_logits(
    feature: Tensor, episode: Tensor, shots: int, *, seed: int, epochs: int = 301, batch_size: int = 4
) -> Tensor:
    """Logits [E, W * Q, W] of a cosine classifier trained on each episode's support, all episodes at once.

    logits = 2 cos(feature, weight); SGD with rate 0.01, momentum and dampening 0.9, weight decay 0.001 on batches of 4
    for 301 epochs (HL-hanlin/SMKD, after Chen et al. 2019). The last batch of an epoch may be smaller.
    """
    support, query = _parts(feature, episode, shots)
    inputs = F.normalize(support.flatten(1, 2), dim=-1)
    episodes, ways = len(episode), episode.shape[1]
    rng = generator(seed, "cosine classifier")
    bound = 1 / math.sqrt(feature.shape[-1])
    start = (torch.rand(ways, feature.shape[-1], generator=rng) * 2 - 1) * bound
    weight = start.to(feature).expand(episodes, -1, -1).clone()
    velocity: Tensor | None = None
    label = torch.arange(ways, device=feature.device).repeat_interleave(shots)
    for _ in range(epochs):
        for rows in torch.randperm(ways * shots, generator=rng).to(feature.device).split(batch_size):
            gradient = _cosine_gradient(inputs[:, rows], weight, label[rows]) + 0.001 * weight
            velocity = gradient if velocity is None else 0.9 * velocity + 0.1 * gradient
            weight = weight - 0.01 * velocity
    return COSINE_SCALE * F.normalize(query, dim=-1) @ F.normalize(weight, dim=-1).transpose(1, 2)


COSINE_SCALE = 2.0


def _cosine_gradient(inputs: Tensor, weight: Tensor, label: Tensor) -> Tensor:
    """d/dw of the mean cross-entropy of softmax(2 inputs . w/|w|): inputs [E, B, D] of norm 1, weight [E, W, D]."""
    norm = weight.norm(dim=-1, keepdim=True)
    unit = weight / norm
    error = (COSINE_SCALE * inputs @ unit.transpose(1, 2)).softmax(-1) - F.one_hot(label, weight.shape[1])
    outward = COSINE_SCALE / inputs.shape[1] * error.transpose(1, 2) @ inputs
    return (outward - (outward * unit).sum(-1, keepdim=True) * unit) / norm


def episode_accuracy(logits: Tensor) -> Tensor:
    """Share of right answers in each episode [E], for logits [E, W * Q, W] of queries in class order."""
    ways = logits.shape[-1]
    truth = torch.arange(ways, device=logits.device).repeat_interleave(logits.shape[1] // ways)
    return (logits.argmax(-1) == truth).float().mean(1)


def interval(accuracy: Tensor) -> Interval:
    """Mean and 95 % half-width over episodes [E]."""
    spread = accuracy.double().std(correction=0) if len(accuracy) > 1 else accuracy.new_zeros(())
    return Interval(float(accuracy.double().mean()), float(1.96 * spread / math.sqrt(len(accuracy))))


def _parts(feature: Tensor, episode: Tensor, shots: int) -> tuple[Tensor, Tensor]:
    """Support [E, W, K, D] and queries [E, W * Q, D]."""
    chosen = feature[episode.to(feature.device)]
    return chosen[:, :, :shots], chosen[:, :, shots:].flatten(1, 2)
