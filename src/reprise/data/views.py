"""Several random views of each image, made on whole batches: two views, or global and local crops (multi-crop).

Numbers are drawn per item and per view for the whole global batch (the `Transform` protocol of `data/loader.py`), so
what an item gets does not depend on the number of ranks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from reprise.data.augment import (
    ColorJitter,
    Compose,
    GaussianBlur,
    RandomGrayscale,
    RandomHorizontalFlip,
    RandomResizedCrop,
)
from reprise.data.images import Normalisation
from reprise.data.loader import Batch, Source, Transform
from reprise.data.module import DataModule
from reprise.data.spec import DataSpec
from reprise.errors import ConfigError


@dataclass(frozen=True)
class ViewOptions:
    """How one kind of view is made; probabilities of 0 leave a step out.

    Order: crop, colour jitter, greyscale, blur, solarisation, mirroring (BYOL; MoCo v2 and v3).

    Attributes:
        size: side of the square view, pixels.
        count: views of this kind; more than one are called `<name>_0`, `<name>_1`, ...
        scale: share of the image's area in the crop; its aspect ratio is 3/4 to 4/3.
        jitter: strengths of brightness, contrast, saturation and hue.
        jitter_p, grayscale_p, blur_p, solarize_p, flip_p: probabilities.
        grayscale_first: greyscale before the jitter (MoCo v1).
        blur_sigma: range of the standard deviation of the blur, pixels.
        blur_kernel: its width, odd; null: the odd number at a tenth of the size, at least 3 (SimCLR, appendix A).
    """

    size: int
    count: int = 1
    scale: tuple[float, float] = (0.2, 1.0)
    jitter: tuple[float, float, float, float] = (0.4, 0.4, 0.4, 0.1)
    jitter_p: float = 0.8
    grayscale_p: float = 0.2
    grayscale_first: bool = False
    blur_p: float = 0.0
    blur_sigma: tuple[float, float] = (0.1, 2.0)
    blur_kernel: int | None = None
    solarize_p: float = 0.0
    flip_p: float = 0.5

    def __post_init__(self) -> None:
        for name in ("scale", "jitter", "blur_sigma"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if self.size < 1 or self.count < 1:
            raise ConfigError(f"{self.count} views of {self.size} pixels", looked_at="data.views")

    @classmethod
    def named(cls, options: Mapping[str, Any], name: str) -> ViewOptions:
        """Options of the view `name` from a configuration.

        Raises:
            ConfigError: an unknown option, or no size.
        """
        known = [field.name for field in fields(cls)]
        if unknown := sorted(map(str, set(options) - set(known))):
            raise ConfigError(
                f"unknown view options {unknown}",
                looked_at=f"data.views.{name}",
                next_step=f"known: {', '.join(known)}",
            )
        if "size" not in options:
            raise ConfigError("a view needs a size", looked_at=f"data.views.{name}.size")
        return cls(**options)

    @property
    def kernel(self) -> int:
        return self.blur_kernel or max(3, self.size // 10 | 1)

    def transform(self, normalisation: Normalisation) -> Compose:
        """The view of normalised images [B, C, H, W], [B, C, size, size]."""
        space: dict[str, Any] = {"mean": normalisation.mean, "std": normalisation.std}
        brightness, contrast, saturation, hue = self.jitter
        grey = [RandomGrayscale(self.grayscale_p, **space)] if self.grayscale_p else []
        steps: list[Transform] = [RandomResizedCrop((self.size, self.size), self.scale)]
        steps += grey if self.grayscale_first else []
        if self.jitter_p:
            steps.append(ColorJitter(brightness, contrast, saturation, hue, self.jitter_p, **space))
        steps += [] if self.grayscale_first else grey
        if self.blur_p:
            steps.append(GaussianBlur(self.kernel, self.blur_sigma, self.blur_p))
        if self.solarize_p:
            steps.append(Solarize(self.solarize_p, **space))
        if self.flip_p:
            steps.append(RandomHorizontalFlip(self.flip_p))
        return Compose(steps)


@dataclass
class Solarize:
    """Invert the colours from `threshold` (of the full range) up, with probability p.

    `mean` and `std` as in `ColorJitter`; the threshold is Pillow's default of 128 for 8-bit values.
    """

    p: float = 0.2
    threshold: float = 128 / 255
    mean: float | Sequence[float] = 0.0
    std: float | Sequence[float] = 1.0

    def draw(self, count: int, rng: torch.Generator) -> dict[str, Tensor]:
        return {"chosen": torch.rand(count, generator=rng) < self.p}

    def apply(self, batch: Batch, params: Mapping[str, Tensor]) -> Batch:
        image = batch["image"]
        mean = torch.as_tensor(self.mean, dtype=image.dtype, device=image.device).view(-1, 1, 1)
        std = torch.as_tensor(self.std, dtype=image.dtype, device=image.device).view(-1, 1, 1)
        colour = image * std + mean
        changed = torch.where(colour >= self.threshold, ((1 - colour) - mean) / std, image)
        chosen = params["chosen"].to(image.device)[:, None, None, None]
        return {**batch, "image": torch.where(chosen, changed, image)}


class MultiView:
    """Adds to a batch, for every view name, the images [B, C, S, S] that its transform makes of `image`."""

    def __init__(self, views: Mapping[str, Transform]) -> None:
        self.views = dict(views)

    def draw(self, count: int, rng: torch.Generator) -> dict[str, Tensor]:
        return {
            f"{view}/{name}": value
            for view, transform in self.views.items()
            for name, value in transform.draw(count, rng).items()
        }

    def apply(self, batch: Batch, params: Mapping[str, Tensor]) -> Batch:
        made = dict(batch)
        for view, transform in self.views.items():
            prefix = f"{view}/"
            mine = {name.removeprefix(prefix): value for name, value in params.items() if name.startswith(prefix)}
            made[view] = transform.apply({"image": batch["image"]}, mine)["image"]
        return made


def view_options(views: Mapping[str, Mapping[str, Any]]) -> dict[str, ViewOptions]:
    """One entry for every single view: kinds with a `count` above one are numbered.

    Raises:
        ConfigError: no view, an unknown option, or a view without a size.
    """
    if not views:
        raise ConfigError("no views", looked_at="data.views", next_step="name at least one, e.g. data/views=moco_v2")
    single: dict[str, ViewOptions] = {}
    for name, given in views.items():
        options = ViewOptions.named(given, name)
        names = [name] if options.count == 1 else [f"{name}_{number}" for number in range(options.count)]
        single |= dict.fromkeys(names, options)
    return single


def multi_view(views: Mapping[str, Mapping[str, Any]], normalisation: Normalisation) -> MultiView:
    """The transform that a configuration of views describes, for normalised images."""
    return MultiView({name: options.transform(normalisation) for name, options in view_options(views).items()})


class Views(DataModule):
    """Any in-memory image data module, with random views of each training image.

    Training batches keep what the base's have (`image` is not augmented) and add one entry [B, C, S, S] for each view.
    Evaluation batches are the base's.

    Args:
        base: an image data module with a `normalisation`; its own augmentation is not used.
        views: name -> options of `ViewOptions`.
    """

    def __init__(
        self,
        *,
        base: DataModule,
        views: Mapping[str, Mapping[str, Any]],
        batch_size: int,
        steps: int,
        seed: int = 0,
        eval_batch_size: int = 500,
        limit: int | None = None,
    ) -> None:
        super().__init__(batch_size=batch_size, steps=steps, seed=seed, eval_batch_size=eval_batch_size, limit=limit)
        normalisation = getattr(base, "normalisation", None)
        if not isinstance(normalisation, Normalisation):
            raise ConfigError(
                f"{type(base).__name__} has no image normalisation",
                looked_at="data.base",
                next_step="choose an image data set such as cifar10 or shapes_classification",
            )
        self.base = base
        self.normalisation = normalisation
        self.transform = multi_view(views, normalisation)

    @property
    def spec(self) -> DataSpec:
        return self.base.spec

    def build_source(self, split: str) -> Source:
        return self.base.source(split)

    def train_transform(self) -> Transform:
        return self.transform
