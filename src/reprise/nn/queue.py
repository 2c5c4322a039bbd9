"""A first-in-first-out dictionary of keys (MoCo, 1911.05722, section 3.2)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from reprise.errors import ConfigError


class KeyQueue(nn.Module):
    """The last `size` keys; all state is in buffers, equal on all ranks where all enqueue the gathered keys.

    Starts with random unit vectors, as the released code does.

    Args:
        dim: length of a key.
        size: K, how many are kept.
    """

    keys: Tensor
    position: Tensor

    def __init__(self, dim: int, size: int) -> None:
        super().__init__()
        self.register_buffer("keys", F.normalize(torch.randn(dim, size), dim=0))
        self.register_buffer("position", torch.zeros(1, dtype=torch.int64))

    @property
    def size(self) -> int:
        return self.keys.shape[1]

    @torch.no_grad()
    def enqueue(self, keys: Tensor) -> None:
        """Replace the oldest keys by `keys` [N, dim], the key of each row in a column.

        Raises:
            ConfigError: N does not divide the queue's size, so that the keys of one batch would be torn apart.
        """
        if self.size % len(keys):
            raise ConfigError(
                f"a queue of {self.size} keys is not a multiple of the {len(keys)} that arrive at once",
                looked_at="data.batch_size and the size of the queue",
                next_step="choose a queue whose size is a multiple of the global batch",
            )
        columns = self.position + torch.arange(len(keys), device=keys.device)
        self.keys.index_copy_(1, columns, keys.T.to(self.keys.dtype))  # bfloat16 under autocast
        self.position.add_(len(keys)).remainder_(self.size)
