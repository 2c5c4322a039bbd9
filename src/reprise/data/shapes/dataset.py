"""Data modules over rendered scenes, rendered once into the cache: detection (masks on request), classification."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import torch

from reprise.data.augment import Compose, RandomCrop, RandomHorizontalFlip
from reprise.data.cache import Arrays, cached_arrays
from reprise.data.images import DetectionSource, ImageSource, Normalisation
from reprise.data.loader import Transform
from reprise.data.module import DataModule
from reprise.data.shapes.render import RENDERER_VERSION, Rendered, render
from reprise.data.shapes.scenes import SceneOptions, Scenes, draw_scenes
from reprise.data.spec import DataSpec
from reprise.data.splits import limited, noisy_labels
from reprise.errors import ConfigError

SPLITS = ("train", "val", "test")
MEAN, STD = (0.2, 0.2, 0.2), (0.2, 0.2, 0.2)  # of the default scenes, rounded, the same for all channels


def scene_set(options: SceneOptions, count: int, seed: int, split: str) -> tuple[Scenes, Rendered]:
    """Scenes and their rendering, from the cache (memory-mapped) or rendered into it."""
    key = {"version": RENDERER_VERSION, "options": asdict(options), "count": count, "seed": seed, "split": split}

    def build() -> Arrays:
        scenes = draw_scenes(options, count, seed, split)
        return {**scenes.tables(), **render(options, scenes).tables()}

    arrays = cached_arrays("shapes", key, build)
    scenes = Scenes(**{name: arrays[name] for name in Scenes.__dataclass_fields__})
    return scenes, Rendered(**{name: arrays[name] for name in Rendered.__dataclass_fields__})


class _ShapesModule(DataModule):
    """What the modules share: options of the scenes, sizes of the splits, normalisation."""

    def __init__(
        self,
        *,
        scene: Mapping[str, Any] | None = None,
        sizes: Sequence[int],
        dataset_seed: int = 0,
        normalise: str = "standard",
        batch_size: int,
        steps: int,
        seed: int = 0,
        eval_batch_size: int = 500,
        limit: int | None = None,
    ) -> None:
        super().__init__(batch_size=batch_size, steps=steps, seed=seed, eval_batch_size=eval_batch_size, limit=limit)
        unknown = set(scene or {}) - set(SceneOptions.__dataclass_fields__)
        if unknown:
            raise ConfigError(
                f"unknown scene options {sorted(map(str, unknown))}",
                looked_at="data.scene",
                next_step=f"known: {', '.join(SceneOptions.__dataclass_fields__)}",
            )
        if len(sizes) != 3 or min(sizes) < 1:
            raise ConfigError(f"{list(sizes)} are not sizes of train, val and test", looked_at="data.sizes")
        self.options = SceneOptions(**{str(name): value for name, value in (scene or {}).items()})
        self.sizes = dict(zip(SPLITS, sizes, strict=True))
        self.dataset_seed = dataset_seed
        self.normalisation = Normalisation.named(normalise, MEAN, STD)

    @property
    def spec(self) -> DataSpec:
        side = self.options.image_size
        return DataSpec(
            name="shapes",
            image_shape=(3, side, side),
            classes=self.options.shapes,
            sizes=limited(self.sizes, self.limit),
            licence="Apache-2.0 (rendered by this package)",
            source="reprise.data.shapes",
        )

    def scenes(self, split: str) -> tuple[Scenes, Rendered]:
        """The scene table and the rendering of a split, at most `limit` scenes."""
        return scene_set(self.options, limited(self.sizes, self.limit)[split], self.dataset_seed, split)


class ShapesDetection(_ShapesModule):
    """Object detection.

    Batches: image float [B, 3, S, S], mask bool [B, S, S] (all False: no padding), index int64 [B], and targets: a list
    of dicts labels int64 [M], boxes float [M, 4] (cxcywh, relative), size int64 [2].

    Args:
        scene: options of `SceneOptions` by name.
        sizes: scenes of train, val and test; each split is its own draw from `dataset_seed`.
        boxes: `visible` (around the visible pixels, as in COCO) or `full` (amodal, within the image).
        min_visible: objects of which less than this fraction is visible are not annotated.
        masks: targets also have masks bool [M, S, S] (visible pixels), and the batch semantic int64 [B, S, S]
            (0 = background, label + 1).
        flip: augmentation: mirror training images with probability one half.
        normalise: `standard` (about zero mean, unit variance), `symmetric` ([-1, 1]) or `unit` ([0, 1]).
    """

    def __init__(
        self,
        *,
        sizes: Sequence[int] = (4000, 500, 2000),
        boxes: str = "visible",
        min_visible: float = 0.25,
        masks: bool = False,
        flip: bool = False,
        **common: Any,
    ) -> None:
        super().__init__(sizes=sizes, **common)
        if boxes not in ("visible", "full"):
            raise ConfigError(f"unknown kind of boxes {boxes!r}", looked_at="data.boxes", next_step="visible or full")
        self.boxes, self.min_visible, self.masks, self.flip = boxes, min_visible, masks, flip

    def build_source(self, split: str) -> DetectionSource:
        scenes, rendered = self.scenes(split)
        share = rendered.area_visible / np.maximum(rendered.area_full, 1)
        kept = scenes.present & (rendered.area_visible > 0) & (share >= self.min_visible)
        corners = (rendered.boxes_visible if self.boxes == "visible" else rendered.boxes_full)[kept]
        side = self.options.image_size
        boxes = np.concatenate([corners[:, :2] + corners[:, 2:], 2 * (corners[:, 2:] - corners[:, :2])], 1) / (2 * side)
        return DetectionSource(
            torch.from_numpy(rendered.image),
            self.normalisation,
            size=torch.full((len(scenes), 2), side),
            first=torch.from_numpy(np.concatenate([[0], kept.sum(1).cumsum()])),
            labels=torch.from_numpy(scenes.shape[kept]),
            boxes=torch.from_numpy(boxes.astype(np.float32)),
            instances=torch.from_numpy(rendered.instances) if self.masks else None,
            slots=torch.from_numpy(np.nonzero(kept)[1]) if self.masks else None,
        )

    def train_transform(self) -> Transform | None:
        return RandomHorizontalFlip() if self.flip else None


class ShapesClassification(_ShapesModule):
    """One object a scene, label = its shape; colour, texture, size, place and angle are nuisance.

    Batches: image float [B, 3, S, S]; label, clean_label, colour, texture and index int64 [B]
    (colour and texture are positions in the scene options' lists).

    Args:
        scene: options of `SceneOptions` by name; the number of objects is always 1.
        label_noise: fraction of TRAIN labels replaced by a wrong class, drawn by `noise_seed`.
        crop, flip: augmentation: random shift by up to `crop` pixels (0: none), mirroring.
    """

    def __init__(
        self,
        *,
        scene: Mapping[str, Any] | None = None,
        sizes: Sequence[int] = (4000, 500, 2000),
        label_noise: float = 0.0,
        noise_seed: int = 0,
        crop: int = 0,
        flip: bool = False,
        **common: Any,
    ) -> None:
        super().__init__(scene={**(scene or {}), "min_objects": 1, "max_objects": 1}, sizes=sizes, **common)
        self.label_noise, self.noise_seed = label_noise, noise_seed
        self.crop, self.flip = crop, flip

    def build_source(self, split: str) -> ImageSource:
        scenes, rendered = self.scenes(split)
        clean = np.array(scenes.shape[:, 0])
        fraction = self.label_noise if split == "train" else 0.0
        noisy = noisy_labels(clean, fraction, len(self.options.shapes), self.noise_seed)
        return ImageSource(
            torch.from_numpy(rendered.image),
            self.normalisation,
            label=torch.from_numpy(noisy),
            clean_label=torch.from_numpy(clean),
            colour=torch.from_numpy(np.array(scenes.colour[:, 0])),
            texture=torch.from_numpy(np.array(scenes.texture[:, 0])),
        )

    def train_transform(self) -> Transform | None:
        steps: list[Transform] = [RandomCrop(self.crop, fill=self.normalisation.value(0.0))] if self.crop else []
        if self.flip:
            steps.append(RandomHorizontalFlip())
        return Compose(steps) if steps else None
