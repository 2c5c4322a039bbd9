"""The two frameworks: `MoCo` with a queue (v1, v2) and `MoCoV3` with the batch's own keys.

Both take their part of a global batch; what crosses processes goes through `reprise.distributed`.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from reprise import distributed
from reprise.nn.batch_norm import SyncBatchNorm
from reprise.nn.ema import momentum_copy, update_momentum
from reprise.nn.queue import KeyQueue
from reprise.papers.moco.criterion import in_batch_contrast, in_batch_logits, info_nce, info_nce_logits
from reprise.papers.moco.encoders import Encoder, ResNet
from reprise.training.schedules import cosine_value


class Contrast(NamedTuple):
    """One step of this process: losses of its queries [N], summed over both directions where there are two; of the
    first direction logits [N, 1 + K] (or [N, B]) and their right columns, int64 [N]."""

    rows: Tensor
    logits: Tensor
    label: Tensor

    @property
    def loss(self) -> Tensor:
        """The mean over the queries."""
        return self.rows.mean()


class MoCo(nn.Module):
    """Momentum contrast with a queue (1911.05722; with `mlp`, 2003.04297).

    Args:
        encoder: its `head` is set here; one output of `dim` numbers.
        dim: of queries and keys.
        queue_size: K; a multiple of the global batch. 0: the other keys of the batch are the negatives.
        mlp: a hidden layer as wide as the features (v2), else a linear head (v1).
        momentum: m of the key encoder.
        temperature: of the softmax.
        symmetric: each view is a query once, with twice the keys a step (the authors' CIFAR-10 demo).
        shuffle: keys are computed in a random order of the global batch (ShuffleBN, section 3.3).
    """

    def __init__(
        self,
        encoder: Encoder,
        *,
        dim: int = 128,
        queue_size: int = 65536,
        mlp: bool = True,
        momentum: float = 0.999,
        temperature: float = 0.2,
        symmetric: bool = False,
        shuffle: bool = True,
    ) -> None:
        super().__init__()
        hidden = [nn.Linear(encoder.width, encoder.width), nn.ReLU()] if mlp else []
        last = nn.Linear(encoder.width, dim)
        encoder.head = nn.Sequential(*hidden, last) if mlp else last
        self.encoder_q = encoder
        self.encoder_k = momentum_copy(encoder)
        self.queue = KeyQueue(dim, queue_size) if queue_size else None
        self.momentum, self.temperature = momentum, temperature
        self.symmetric, self.shuffle = symmetric, shuffle

    @property
    def encoder(self) -> Encoder:
        """The encoder that is kept after pre-training."""
        return self.encoder_q

    def forward(self, image: Tensor) -> Tensor:
        """Queries: unit vectors [N, dim]."""
        return F.normalize(self.encoder_q(image), dim=1)

    def contrast(self, view1: Tensor, view2: Tensor, permutations: Sequence[Tensor]) -> Contrast:
        """One step: the key encoder moves, queries meet keys and queue, then the keys are enqueued.

        Args:
            view1, view2: this process's rows, [N, 3, H, W].
            permutations: orders of the global batch, equal on all processes; one for each direction.

        Raises:
            ValueError: the global batch (both views of it, where symmetric) does not divide the queue.
        """
        self.move()
        pairs = [(view1, view2), (view2, view1)][: 1 + self.symmetric]
        results, enqueued = [], []
        for (queried, keyed), permutation in zip(pairs, permutations, strict=False):
            keys = self.keys(keyed, permutation if self.shuffle else None)
            first = distributed.rank() * len(queried)
            results.append(self.compare(self(queried), keys[first : first + len(queried)], keys, first))
            enqueued.append(keys)
        if self.queue is not None:
            self.queue.enqueue(torch.cat(enqueued[::-1]))  # keys of the first view come first
        return Contrast(torch.stack([one.rows for one in results]).sum(0), *results[0][1:])

    def move(self) -> None:
        """The key encoder takes a small step towards the query encoder (1911.05722, eq. 2)."""
        update_momentum(self.encoder_k, self.encoder_q, self.momentum)

    @torch.no_grad()
    def keys(self, view: Tensor, permutation: Tensor | None) -> Tensor:
        """Keys of the global batch in its own order, unit vectors [B, dim]."""
        if permutation is None:
            return distributed.gather(F.normalize(self.encoder_k(view), dim=1))
        permutation = permutation.to(view.device)
        mine = permutation.view(distributed.world_size(), -1)[distributed.rank()]
        shuffled = F.normalize(self.encoder_k(distributed.gather(view)[mine]), dim=1)
        return distributed.gather(shuffled)[permutation.argsort()]

    def compare(self, query: Tensor, positive: Tensor, keys: Tensor, first: int = 0) -> Contrast:
        """Queries [N, dim] against their own keys [N, dim] and the queue, or without one against all keys [B, dim].

        Args:
            first: row of `keys` that belongs to the first query.
        """
        if self.queue is None:
            label = torch.arange(len(query), device=query.device) + first
            logits = in_batch_logits(query, keys, self.temperature)
            return Contrast(F.cross_entropy(logits, label, reduction="none"), logits, label)
        logits = info_nce_logits(query, positive, self.queue.keys.clone(), self.temperature)
        return Contrast(info_nce(logits), logits, torch.zeros(len(query), dtype=torch.int64, device=query.device))


def projection(sizes: Sequence[int], *, last_norm: bool) -> nn.Sequential:
    """Linear layers without bias; batch norm over all processes and ReLU between, and batch norm without weights last.

    MoCo v3's projector and predictor (2104.02057, section 3).
    """
    layers: list[nn.Module] = []
    for number, (before, after) in enumerate(pairwise(sizes)):
        layers.append(nn.Linear(before, after, bias=False))
        if number < len(sizes) - 2:
            layers += [SyncBatchNorm(after), nn.ReLU(inplace=True)]
        elif last_norm:
            layers.append(SyncBatchNorm(after, affine=False))
    return nn.Sequential(*layers)


class MoCoV3(nn.Module):
    """Momentum contrast within large batches, symmetric, with a predictor (2104.02057, algorithm 1).

    Projectors have two layers after a ResNet, three after a ViT; predictors two, of which a ResNet's has no last norm.

    Args:
        encoder: its `head` becomes the projector.
        dim, mlp_dim: output and hidden size of projector and predictor.
        temperature: of the softmax.
        momentum: m of the momentum encoder; with `momentum_cosine` where it starts, to end at 1 after `total_steps`.
    """

    def __init__(
        self,
        encoder: Encoder,
        *,
        dim: int = 256,
        mlp_dim: int = 4096,
        temperature: float = 0.2,
        momentum: float = 0.99,
        momentum_cosine: bool = True,
        total_steps: int = 1,
    ) -> None:
        super().__init__()
        residual = isinstance(encoder, ResNet)
        hidden = [mlp_dim] if residual else [mlp_dim, mlp_dim]
        encoder.head = projection([encoder.width, *hidden, dim], last_norm=True)
        self.base_encoder = encoder
        self.momentum_encoder = momentum_copy(encoder)
        self.predictor = projection([dim, mlp_dim, dim], last_norm=not residual)
        self.temperature = temperature
        self.momentum, self.momentum_cosine, self.total_steps = momentum, momentum_cosine, total_steps

    @property
    def encoder(self) -> Encoder:
        """The encoder that is kept after pre-training."""
        return self.base_encoder

    def momentum_at(self, step: int) -> float:
        """m of a step, counted from 0."""
        return cosine_value(step, self.total_steps, self.momentum, 1.0) if self.momentum_cosine else self.momentum

    def forward(self, image: Tensor) -> Tensor:
        """Queries [N, dim], not normalised."""
        return self.predictor(self.base_encoder(image))

    def contrast(self, view1: Tensor, view2: Tensor, momentum: float) -> Contrast:
        """One step on this process's rows [N, 3, H, W]; the momentum encoder moves before it makes the keys."""
        query1, query2 = self(view1), self(view2)
        with torch.no_grad():
            update_momentum(self.momentum_encoder, self.base_encoder, momentum)
            key1, key2 = (distributed.gather(self.momentum_encoder(view)) for view in (view1, view2))
        first = distributed.rank() * len(query1)
        rows = in_batch_contrast(query1, key2, self.temperature, first)
        rows = rows + in_batch_contrast(query2, key1, self.temperature, first)
        label = torch.arange(len(query1), device=query1.device) + first
        return Contrast(rows, in_batch_logits(query1, key2, self.temperature), label)


Framework = MoCo | MoCoV3
