"""Batch norm whose statistics do not depend on how a batch is spread over processes: shared by all, or per group.

Both work on every device and backend (torch's own SyncBatchNorm is for GPUs only) and keep `nn.BatchNorm2d`'s names.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from reprise.distributed import all_reduce_mean, all_reduce_sum_with_gradient, world_size
from reprise.errors import ConfigError


class SyncBatchNorm(nn.modules.batchnorm._NormBase):
    """Batch norm over the rows of all ranks, [N, C] or [N, C, ...]; with one rank, ordinary batch norm.

    The gradient flows through the statistics of all ranks. Every rank must hold equally many rows.
    """

    def forward(self, value: Tensor) -> Tensor:
        """Normalised over every dimension but the second.

        Raises:
            ValueError: `value` has fewer than two dimensions.
        """
        if value.dim() < 2:
            raise ValueError(f"expected [N, C, ...], not {value.dim()} dimension(s)")
        if not self.training or world_size() == 1:
            assert self.running_mean is not None
            assert self.running_var is not None
            if self.training and self.num_batches_tracked is not None:
                self.num_batches_tracked.add_(1)
            return F.batch_norm(
                value, self.running_mean, self.running_var, self.weight, self.bias, self.training, _rate(self), self.eps
            )
        return self._over_all_ranks(value)

    def _over_all_ranks(self, value: Tensor) -> Tensor:
        reduced = [dim for dim in range(value.dim()) if dim != 1]
        shape = [1, -1] + [1] * (value.dim() - 2)
        given = value.dtype
        value = value.to(torch.promote_types(given, torch.float32))  # the sums are over many values
        count = value.numel() // value.shape[1] * world_size()
        mean = all_reduce_sum_with_gradient(value.sum(reduced)) / count
        centred = value - mean.view(shape)
        variance = all_reduce_sum_with_gradient(centred.square().sum(reduced)) / count
        with torch.no_grad():
            assert self.running_mean is not None
            assert self.running_var is not None
            self.running_mean.lerp_(mean, _rate(self))
            self.running_var.lerp_(variance * count / max(count - 1, 1), _rate(self))
            if self.num_batches_tracked is not None:
                self.num_batches_tracked.add_(1)
        normalised = centred * (variance + self.eps).rsqrt().view(shape)
        if self.weight is not None:
            normalised = normalised * self.weight.view(shape) + self.bias.view(shape)
        return normalised.to(given)


class SplitBatchNorm(nn.BatchNorm2d):
    """Batch norm within each of `splits` groups of the GLOBAL batch [N, C, H, W]: devices that need not exist.

    MoCo's batch norm per GPU (1911.05722, section 3.3) for any number of processes: with W ranks each normalises
    `splits / W` whole groups of its own rows, so the result is the same for every W that divides `splits`. Groups are
    consecutive rows. Running statistics move towards the mean of all groups' statistics (variances unbiased); in
    evaluation mode this is ordinary batch norm.

    Args:
        num_features: C.
        splits: groups of the global batch.
        interleaved: row n of this process belongs to group n mod (its groups) instead: the layout of the authors'
            CIFAR-10 demo, which a view of the tensor gives; groups then depend on the number of ranks.
    """

    def __init__(self, num_features: int, splits: int = 1, *, interleaved: bool = False) -> None:
        super().__init__(num_features)
        if splits < 1:
            raise ValueError(f"{splits} groups")
        self.splits, self.interleaved = splits, interleaved

    def forward(self, input: Tensor) -> Tensor:
        """Normalised activations.

        Raises:
            ConfigError: the ranks do not divide the groups, or the groups do not divide the batch.
        """
        if not self.training:
            return super().forward(input)
        world = world_size()
        if self.splits % world or len(input) % (self.splits // world):
            raise ConfigError(
                f"{self.splits} batch-norm groups cannot be dealt to {world} ranks with {len(input)} items each",
                looked_at="data.batch_size, trainer.devices and the number of groups (splits)",
                next_step="choose groups that the ranks divide, and a batch that the groups divide",
            )
        normalised, mean, variance = self._by_group(input, self.splits // world)
        self._move_statistics(mean, variance)
        return normalised

    def _by_group(self, image: Tensor, groups: int) -> tuple[Tensor, Tensor, Tensor]:
        """Normalised activations, and each group's mean and unbiased variance, [groups, C]."""
        rows, channels = len(image) // groups, image.shape[1]
        # a momentum of 1 leaves the batch's own statistics in these buffers
        mean, variance = (self.weight.new_zeros(groups, channels) for _ in range(2))  # float32 also under autocast
        if self.interleaved:
            weight, bias = self.weight.repeat(groups), self.bias.repeat(groups)
            flat = image.reshape(rows, groups * channels, *image.shape[2:])
            done = F.batch_norm(flat, mean.view(-1), variance.view(-1), weight, bias, True, 1.0, self.eps)
            return done.view_as(image), mean, variance
        parts = [
            F.batch_norm(part, mean[group], variance[group], self.weight, self.bias, True, 1.0, self.eps)
            for group, part in enumerate(image.split(rows))
        ]
        return (parts[0] if groups == 1 else torch.cat(parts)), mean, variance

    @torch.no_grad()
    def _move_statistics(self, mean: Tensor, variance: Tensor) -> None:
        assert self.running_mean is not None
        assert self.running_var is not None
        moved = all_reduce_mean(torch.stack([mean.mean(0), variance.mean(0)]))
        self.running_mean.lerp_(moved[0], _rate(self))
        self.running_var.lerp_(moved[1], _rate(self))


def _rate(norm: nn.modules.batchnorm._NormBase) -> float:
    """How far running statistics move towards a batch's."""
    if norm.momentum is None:
        raise ValueError("cumulative averages (momentum=None) are not supported")
    return norm.momentum
