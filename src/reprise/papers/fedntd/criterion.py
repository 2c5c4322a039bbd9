"""Losses of FedNTD and of the baselines that change the local loss; all per item, so that means can be masked."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def not_true_logits(logits: Tensor, label: Tensor) -> Tensor:
    """The logits without the true class, in class order: [B, C] to [B, C-1].

    The true logit is removed BEFORE any softmax, which then renormalises over the C-1 others.
    """
    batch, classes = logits.shape
    column = torch.arange(classes - 1, device=logits.device).expand(batch, -1)
    return logits.gather(1, column + (column >= label[:, None]))


def distillation(student: Tensor, teacher: Tensor, tau: float) -> Tensor:
    """KL(softmax(teacher / tau) || softmax(student / tau)), summed over classes: [B, C] twice to [B].

    The teacher gets no gradient.
    """
    target = F.log_softmax(teacher.detach() / tau, 1)
    return (target.exp() * (target - F.log_softmax(student / tau, 1))).sum(1)


def not_true_distillation(logits: Tensor, teacher: Tensor, label: Tensor, tau: float) -> Tensor:
    """L_NTD of each item, [B]: distillation of the not-true classes (Lee et al. 2022, section 3). Zero when C = 2."""
    return distillation(not_true_logits(logits, label), not_true_logits(teacher, label), tau)


def true_class_distillation(logits: Tensor, teacher: Tensor, label: Tensor, tau: float) -> Tensor:
    """KL between the two-way distributions (true class, all others), [B]: what full distillation has beside L_NTD."""

    def two_way(values: Tensor) -> Tensor:
        scaled = values / tau
        others = not_true_logits(scaled, label).logsumexp(1)
        return torch.stack([scaled.gather(1, label[:, None])[:, 0], others], 1)

    return distillation(two_way(logits), two_way(teacher), 1.0)


def ntd_loss(logits: Tensor, teacher: Tensor, label: Tensor, *, beta: float = 1.0, tau: float = 1.0) -> Tensor:
    """Cross-entropy + beta tau^2 L_NTD of each item, [B]; its batch mean is the paper's local loss.

    Args:
        logits, teacher: of the local model and of the received global model, [B, C].
        label: int64 [B].
    """
    cross_entropy = F.cross_entropy(logits, label, reduction="none")
    return cross_entropy + beta * tau**2 * not_true_distillation(logits, teacher, label, tau)


def model_contrastive(features: Tensor, global_features: Tensor, previous_features: Tensor, tau: float) -> Tensor:
    """MOON's term of each item, [B]: features should resemble the global model's more than the previous local one's.

    -log( exp(cos(z, z_glob) / tau) / (exp(cos(z, z_glob) / tau) + exp(cos(z, z_prev) / tau)) ) (Li et al. 2021, eq. 3).
    """
    positive = F.cosine_similarity(features, global_features, dim=1) / tau
    negative = F.cosine_similarity(features, previous_features, dim=1) / tau
    return F.softplus(negative - positive)
