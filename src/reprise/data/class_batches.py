"""Training batches with several items of each class, as pure functions of (seed, step)."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from reprise.data.loader import Batch, StepLoader
from reprise.errors import ConfigError
from reprise.seeding import generator


def class_batch(members: list[Tensor], batch_size: int, per_class: int, seed: int, step: int) -> Tensor:
    """Indices int64 [batch_size] of `per_class` items of each of `batch_size / per_class` classes, shuffled.

    Args:
        members: the items of each class, at least `per_class` of them.

    Raises:
        ValueError: the batch is not a whole number of classes, or there are not that many.
    """
    if batch_size % per_class or batch_size // per_class > len(members):
        raise ValueError(f"{batch_size} items, {per_class} of a class, do not fit {len(members)} classes")
    rng = generator(seed, "class batch", step)
    classes = torch.randperm(len(members), generator=rng)[: batch_size // per_class].tolist()
    chosen = [members[c][torch.randperm(len(members[c]), generator=rng)[:per_class]] for c in classes]
    return torch.cat(chosen)[torch.randperm(batch_size, generator=rng)]


@dataclass
class ClassLoader(StepLoader):
    """`StepLoader` whose batches hold several items of each class.

    Args:
        label: int64 [N] of the source's items.
        per_class: items of each class in the global batch; None: items in plain random order.
        skip: how many steps of the row of batches lie before step 0 (an earlier stage has trained on them).
    """

    label: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.long))
    per_class: int | None = None
    skip: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        groups = [(self.label == value).nonzero().flatten() for value in self.label.unique()]
        self._members = [items for items in groups if len(items) >= (self.per_class or 1)]
        if self.per_class and (self.batch_size % self.per_class or self.batch_size // self.per_class > len(groups)):
            raise ConfigError(
                f"batches of {self.batch_size} {self.per_class} images of a class do not fit {len(groups)} classes",
                looked_at="data.batch_size and data.images_per_class",
                next_step="choose a whole number of classes for a batch, at most as many as there are",
            )

    def indices(self, step: int) -> Tensor:
        if self.per_class is None:
            return super().indices(step)
        return class_batch(self._members, self.batch_size, self.per_class, self.seed, step)

    def batch(self, step: int) -> Batch:
        return super().batch(step + self.skip)
