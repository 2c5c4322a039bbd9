"""Zero-shot accuracy, retrieval and probes from stored features of a whole split."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from reprise.distributed import gather, world_size
from reprise.training.probes import Features, linear_probe


def gather_interleaved(rows: Tensor, total: int) -> Tensor:
    """All items in order, [total, ...], where rank r of w holds items r, r + w, ...; lengths differ by at most one."""
    most = -(-total // world_size())
    padded = torch.cat([rows, rows.new_zeros(most - len(rows), *rows.shape[1:])])
    return gather(padded).unflatten(0, (-1, most)).transpose(0, 1).flatten(0, 1)[:total]


def recall_at(scores: Tensor, relevant: Tensor, k: int) -> float:
    """Share of the rows with something relevant among their k best columns (rows with nothing relevant do not count).

    Args:
        scores: [N, M].
        relevant: bool [N, M].
    """
    best = scores.topk(min(k, scores.shape[1]), dim=1).indices
    found = relevant.gather(1, best).any(1)[relevant.any(1)]
    return found.double().mean().item()


def distinct_texts(captions: Tensor) -> tuple[Tensor, Tensor]:
    """Distinct rows of token ids [N, L] as [M, L], and bool [N, M]: which of them each picture has."""
    texts, number = captions.unique(dim=0, return_inverse=True)
    return texts, F.one_hot(number, len(texts)).bool()


def accuracy(scores: Tensor, label: Tensor) -> float:
    """Share of the rows of [N, C] whose largest entry is the label; NaN without rows."""
    return (scores.argmax(1) == label).double().mean().item()


def probe_accuracy(train: Features, test: Features, num_classes: int, shots: int) -> float:
    """Accuracy of logistic regression on the first `shots` items of each class (all, where a class has fewer)."""
    classify = linear_probe(train.few(shots), num_classes)
    return accuracy(classify(test.value), test.label)


def average(values: Sequence[float]) -> float:
    return sum(values) / len(values)
