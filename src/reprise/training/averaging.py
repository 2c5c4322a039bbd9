"""The average of the last checkpoints of a run, as state of the module and so part of every checkpoint.

The Transformer is evaluated with the average of the last 5 (base) or 20 (big) checkpoints, saved at 10-minute intervals
(1706.03762, section 6.1). Files are not needed for it: which steps count is known from the length of the run, and a
running mean over their weights is carried along as state, so a resumed run ends with the same average, bit for bit.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn


class CheckpointAverage(nn.Module):
    """The mean of a model's parameters after the steps total, total - every, ..., total - (last - 1) * every.

    Args:
        model: what is averaged; persistent buffers are taken as they are after the newest of these steps.
        last: how many snapshots (the paper's base: 5, big: 20).
        every: steps between two of them.
        total_steps: steps of the whole run.

    Raises:
        ValueError: fewer than one snapshot or step, or more snapshots than the run has room for.
    """

    count: Tensor

    def __init__(self, model: nn.Module, *, last: int, every: int, total_steps: int) -> None:
        super().__init__()
        if last < 1 or every < 1:
            raise ValueError(f"cannot average {last} snapshots every {every} steps")
        self.last, self.every, self.total_steps = last, every, total_steps
        self.model = copy.deepcopy(model).requires_grad_(False)
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))

    def is_due(self, finished_steps: int) -> bool:
        """Whether the weights after so many steps belong to the average."""
        left = self.total_steps - finished_steps
        return finished_steps > 0 and left % self.every == 0 and 0 <= left < self.last * self.every

    @torch.no_grad()
    def update(self, model: nn.Module, finished_steps: int) -> None:
        """Take the weights in, when they are due."""
        if not self.is_due(finished_steps):
            return
        self.count += 1
        trained = {name for name, _ in model.named_parameters()}
        current = model.state_dict()
        for name, mean in self.model.state_dict().items():
            mean.copy_(mean + (current[name] - mean) / self.count if name in trained else current[name])

    def current(self, model: nn.Module) -> nn.Module:
        """The average where it has begun, else the model itself."""
        return self.model if int(self.count) else model
