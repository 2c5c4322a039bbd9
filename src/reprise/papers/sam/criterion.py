"""Smoothed cross-entropies of the two implementations, and measures of how sharp a minimum is.

The measures take a loss as a function of the weights (`loss_of_weights`). Weights and directions are dicts by
parameter name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

Weights = Mapping[str, Tensor]
LossOfWeights = Callable[[Weights], Tensor]


def smoothed_divergence(logits: Tensor, label: Tensor, smoothing: float) -> Tensor:
    """davda54/sam's loss: KL(target || softmax) with 1 - s on the label and s / (K - 1) on EACH OTHER class.

    It differs from cross-entropy with that target by the target's entropy, a constant. The official JAX code spreads s
    over all K classes instead, as `torch.nn.functional.cross_entropy(label_smoothing=s)` does.

    Args:
        logits: [B, K].
        label: int64 [B].
        smoothing: s in [0, 1).

    Returns:
        Losses of the items [B].
    """
    target = torch.full_like(logits, smoothing / (logits.shape[-1] - 1))
    target.scatter_(-1, label[:, None], 1 - smoothing)
    return F.kl_div(logits.log_softmax(-1), target, reduction="none").sum(-1)


class SmoothedDivergence(nn.Module):
    """Mean of `smoothed_divergence` over the batch."""

    def __init__(self, smoothing: float = 0.1) -> None:
        super().__init__()
        self.smoothing = smoothing

    def forward(self, logits: Tensor, label: Tensor) -> Tensor:
        return smoothed_divergence(logits, label, self.smoothing).mean()


def loss_of_weights(model: nn.Module, image: Tensor, label: Tensor) -> LossOfWeights:
    """Mean cross-entropy of `model` in its present mode on one fixed batch, as a function of its parameters."""

    def loss(weights: Weights) -> Tensor:
        return F.cross_entropy(functional_call(model, dict(weights), (image,)), label)

    return loss


def trainable_weights(model: nn.Module) -> dict[str, Tensor]:
    """Detached views of the trainable parameters, by name."""
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


def _gradient(loss: LossOfWeights, weights: Weights) -> dict[str, Tensor]:
    at = {name: w.detach().requires_grad_() for name, w in weights.items()}
    return dict(zip(at, torch.autograd.grad(loss(at), list(at.values())), strict=True))


def _length(direction: Weights) -> Tensor:
    return torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(d) for d in direction.values()]))


def unit(direction: Weights) -> dict[str, Tensor]:
    """The direction at length 1 over all tensors together; a zero direction stays zero."""
    length = _length(direction).clamp_min(torch.finfo(torch.float32).tiny)
    return {name: d / length for name, d in direction.items()}


def moved(weights: Weights, direction: Weights, distance: float) -> dict[str, Tensor]:
    """weights + distance * direction."""
    return {name: w + distance * direction[name] for name, w in weights.items()}


def gradient_direction(loss: LossOfWeights, weights: Weights) -> dict[str, Tensor]:
    """The direction of steepest ascent at the weights, length 1."""
    return unit(_gradient(loss, weights))


def random_direction(weights: Weights, rng: torch.Generator) -> dict[str, Tensor]:
    """A direction drawn uniformly from the unit sphere."""
    return unit({name: torch.randn(w.shape, generator=rng).to(w) for name, w in weights.items()})


def sharpness(loss: LossOfWeights, weights: Weights, radius: float, steps: int = 5) -> Tensor:
    """max over ||eps||_2 <= radius of L(w + eps), less L(w): the bracket in the paper's bound (section 2).

    The maximum is sought by `steps` projected ascent steps along the normalised gradient, each of radius * 2 / steps,
    from the first-order maximum (steps = 1: that alone, as in SAM). The best point seen counts, so the value is a
    lower bound of the true one, and never below 0.

    Returns:
        A scalar >= 0.
    """
    start = loss(weights).detach()
    point = moved(weights, gradient_direction(loss, weights), radius)
    best = torch.maximum(start, loss(point).detach())
    for _ in range(steps - 1):
        ahead = moved(point, gradient_direction(loss, point), 2 * radius / steps)
        offset = {name: ahead[name] - weights[name] for name in weights}
        shrink = float((radius / _length(offset)).clamp(max=1.0))
        point = moved(weights, offset, shrink)
        best = torch.maximum(best, loss(point).detach())
    return best - start


def top_eigenvalue(loss: LossOfWeights, weights: Weights, rng: torch.Generator, iterations: int = 15) -> Tensor:
    """Eigenvalue of largest magnitude of the Hessian of L at w, by power iteration on Hessian-vector products.

    Returns:
        The Rayleigh quotient of the last direction (scalar, with its sign).
    """
    at = {name: w.detach().requires_grad_() for name, w in weights.items()}
    gradient = torch.autograd.grad(loss(at), list(at.values()), create_graph=True)
    direction = random_direction(weights, rng)
    quotient = torch.zeros(())
    for _ in range(iterations):
        vector = list(direction.values())
        product = torch.autograd.grad(gradient, list(at.values()), grad_outputs=vector, retain_graph=True)
        quotient = sum(
            ((p * v).sum() for p, v in zip(product, vector, strict=True)), start=torch.zeros(()).to(vector[0])
        )
        direction = unit(dict(zip(at, product, strict=True)))
    return quotient.detach()
