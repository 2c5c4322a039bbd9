"""Few-shot image sets: base classes to train on, other classes to validate on, novel classes to test on."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from reprise.data.cache import Arrays
from reprise.data.class_batches import ClassLoader
from reprise.data.images import ImageSource, Normalisation
from reprise.data.loader import Batch, Transform
from reprise.data.module import DataModule
from reprise.data.views import MultiView, ViewOptions, multi_view, view_options
from reprise.errors import ConfigError
from reprise.nn.masks import MaskSampler

GLOBAL = "global"  # views whose names begin so are masked


def mask_grids(views: Mapping[str, ViewOptions], patch: int) -> list[int]:
    """Patches along the side of each global view.

    Raises:
        ConfigError: there is no global view, or a view is not a whole number of patches.
    """
    grids = [options.size // patch for name, options in views.items() if name.startswith(GLOBAL)]
    uneven = [name for name, options in views.items() if options.size % patch]
    if not grids or uneven or len(set(grids)) > 1:
        raise ConfigError(
            f"views {list(views)} in patches of {patch}: {uneven or 'global views'} do not fit",
            looked_at="data.views",
            next_step="name global views global_0, global_1, of one size that is a multiple of data.patch",
        )
    return grids


class MaskedViews:
    """Random views of each image, and with `masks` a block mask for each global view: `mask` bool [B, G, h/P, w/P].

    Args:
        views: makes the views.
        grids: patches along the side of each global view.
    """

    def __init__(self, views: MultiView, grids: Sequence[int], masks: MaskSampler | None) -> None:
        self.views, self.grids, self.masks = views, list(grids), masks

    def draw(self, count: int, rng: torch.Generator) -> dict[str, Tensor]:
        params = self.views.draw(count, rng)
        if self.masks is not None:
            seed, side = int(torch.randint(2**62, (1,), generator=rng)), self.grids[0]
            drawn = self.masks.sample(count * len(self.grids), side, side, seed)
            params["mask"] = drawn.unflatten(0, (count, len(self.grids)))
        return params

    def apply(self, batch: Batch, params: Mapping[str, Tensor]) -> Batch:
        made = self.views.apply(batch, params)
        return {**made, "mask": params["mask"].to(batch["image"].device)} if "mask" in params else made


class FewShotImages(DataModule):
    """In-memory few-shot images. The three splits have different classes, each numbered from 0.

    Batches: image float [B, C, S, S], label and index int64 [B]; training batches also one entry for each view, and
    `mask` (see `MaskedViews`). Items come in class-cyclic order, so that a `limit` keeps all classes.

    Args:
        views: name -> options of `ViewOptions`; those called global... are masked.
        masks: draws the masks; None: no masks.
        patch: side of a patch, pixels.
        images_per_class: of the global training batch; None: plain random batches.
        stage: 1 or 2; stage 2 goes on with the batches after those of stage 1.
        stage1_steps: how many these are.
        normalise: `standard` (`level`: mean and std of the images), `symmetric` ([-1, 1]) or `unit` ([0, 1]).
    """

    level = (0.5, 0.5)  # mean and standard deviation of the training images

    def __init__(
        self,
        *,
        views: Mapping[str, Mapping[str, Any]],
        masks: MaskSampler | None,
        patch: int,
        images_per_class: int | None = None,
        stage: int = 1,
        stage1_steps: int = 0,
        normalise: str = "standard",
        **common: Any,
    ) -> None:
        super().__init__(**common)
        self.normalisation = Normalisation.named(normalise, self.level[:1], self.level[1:])
        if stage not in (1, 2) or stage1_steps < 0:
            raise ConfigError(f"stage {stage} after {stage1_steps} steps", looked_at="data.stage and data.stage1_steps")
        self.images_per_class, self.patch = images_per_class, patch
        self.skip_steps = stage1_steps if stage == 2 else 0
        grids = mask_grids(view_options(views), patch)
        self.transform = MaskedViews(multi_view(views, self.normalisation), grids, masks)

    @abstractmethod
    def read(self, split: str) -> Arrays:
        """`image` uint8 [N, C, S, S] and `label` int64 [N] of a split.

        Raises:
            DataError: the data set is missing or damaged.
        """

    def build_source(self, split: str) -> ImageSource:
        arrays = self.read(split)
        label = torch.as_tensor(arrays["label"])
        order = class_cyclic_order(label)[: self.limit]
        return ImageSource(torch.as_tensor(arrays["image"])[order], self.normalisation, label=label[order])

    def train_transform(self) -> Transform:
        return self.transform

    def train_dataloader(self) -> ClassLoader:
        rank, world = self._rank_and_world()
        source = self.source("train")
        assert isinstance(source, ImageSource)
        return ClassLoader(
            source,
            self.batch_size,
            self.steps,
            self.seed,
            start=self.start_step,
            rank=rank,
            world=world,
            transform=self.transform,
            label=source.fields["label"],
            per_class=self.images_per_class,
            skip=self.skip_steps,
        )


def class_cyclic_order(label: Tensor) -> Tensor:
    """The order first item of each class, second item of each class, ...: int64 [N]."""
    place = torch.empty_like(label)
    for value in label.unique():
        members = (label == value).nonzero().flatten()
        place[members] = torch.arange(len(members))
    return (place * (int(label.max()) + 1) + label).argsort()
