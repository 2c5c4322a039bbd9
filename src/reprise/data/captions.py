"""Pictures with captions, and the rendered world with one captioned object a scene and held-out pairs of attributes.

Every captioned data module serves training batches with `text` int64 [B, L] (one caption of each picture, drawn for the
step) and evaluation batches with `captions` int64 [B, K, L] (all of them), and has `tokenizer` and `prompts`.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import product
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from reprise.data.augment import Compose, RandomCrop
from reprise.data.byte_pair import BytePairTokenizer, learn_merges
from reprise.data.cache import Arrays, cached_arrays
from reprise.data.images import ImageSource, Normalisation
from reprise.data.loader import Batch, Transform
from reprise.data.module import DataModule
from reprise.data.shapes.dataset import MEAN, SPLITS, STD
from reprise.data.shapes.render import RENDERER_VERSION, render
from reprise.data.shapes.scenes import SceneOptions, Scenes, draw_scenes
from reprise.data.spec import DataSpec
from reprise.data.splits import limited
from reprise.errors import ConfigError
from reprise.seeding import derive

CAPTIONS = ("{}", "a picture of {}", "there is {}", "an image with {}")
SIZES = ("small", "large")
GROUND = 0.15  # mean level behind the objects
PLACES = ("top left", "top right", "bottom left", "bottom right")

IntArray = npt.NDArray[np.int64]


class ChooseCaption:
    """Training sees one of each picture's captions: `captions` [B, K, L] becomes `text` [B, L]."""

    def draw(self, count: int, rng: torch.Generator) -> dict[str, Tensor]:
        return {"choice": torch.rand(count, generator=rng)}

    def apply(self, batch: Batch, params: Mapping[str, Tensor]) -> Batch:
        captions = batch["captions"]
        chosen = (params["choice"] * captions.shape[1]).long()
        rest = {name: value for name, value in batch.items() if name != "captions"}
        return {**rest, "text": captions[torch.arange(len(captions)), chosen]}


class Captioned(DataModule):
    """What every captioned data module can say."""

    context_length: int
    normalisation: Normalisation

    @property
    @abstractmethod
    def tokenizer(self) -> BytePairTokenizer:
        """Texts to ids."""

    @property
    def caption_kinds(self) -> tuple[str, ...]:
        """Names of the K captions that each picture has (templates, languages)."""
        return ("caption",)

    def prompts(self) -> Tensor | None:
        """Token ids [classes, templates, L] of the zero-shot classes, or None where there are no classes."""
        return None

    def tokens(self, texts: Sequence[str]) -> Tensor:
        """int64 [N, context_length]."""
        return self.tokenizer(texts, self.context_length)


class CaptionedModule(Captioned):
    """Pictures and captions in memory.

    Args:
        context_length: L, start and end token included; longer captions are cut.
        crop: augmentation: random shift by up to so many pixels (the paper's random square crop, for small pictures).
        background: grey level in [0, 1] that fills in at the border of shifted pictures.
        normalisation: of the pictures.
    """

    def __init__(
        self, *, context_length: int, crop: int, background: float, normalisation: Normalisation, **common: Any
    ) -> None:
        super().__init__(**common)
        if context_length < 3:
            raise ConfigError(f"a context of {context_length} tokens holds no word", looked_at="data.context_length")
        self.context_length, self.crop, self.normalisation = context_length, crop, normalisation
        self.background = background

    def train_transform(self) -> Transform | None:
        steps: list[Transform] = [ChooseCaption()]
        if self.crop:
            steps.append(RandomCrop(self.crop, fill=self.normalisation.value(self.background)))
        return Compose(steps)


def held_out_pairs(shapes: int, colours: int, per_shape: int, seed: int) -> npt.NDArray[np.bool_]:
    """Which (shape, colour) pairs are kept from training, bool [shapes, colours].

    Each shape loses `per_shape` colours, and the colours lose shapes as evenly as the numbers allow, so that every word
    stays in the training captions.

    Raises:
        ValueError: no pair, or no pair of some shape, would be left for training.
    """
    if not 0 <= per_shape < colours or (per_shape * shapes >= colours * shapes):
        raise ValueError(f"{per_shape} of {colours} colours held out for each shape")
    rng = np.random.default_rng(derive(seed, "held_out"))
    order, row = rng.permutation(colours), rng.permutation(shapes)
    held = np.zeros((shapes, colours), bool)
    for shape, step in product(range(shapes), range(per_shape)):
        held[row[shape], order[(shape * per_shape + step) % colours]] = True
    return held


class CaptionedShapes(CaptionedModule):
    """One object a scene, with captions such as `a picture of a small red circle in the top left`.

    Batches: image float [B, 3, S, S]; text int64 [B, L] (training) or captions [B, 4, L] (evaluation); label int64 [B]
    (shape * colours + colour: the zero-shot class); unseen bool [B] (the pair is held out of training); index.
    Half of the validation and test scenes show held-out pairs, in turn with others.

    Args:
        scene: options of `SceneOptions` by name; always one object.
        sizes: scenes of train, val and test.
        held_out: colours that each shape is never shown in during training; the pairs are drawn by `dataset_seed`.
        dataset_seed: of the scenes and of the held-out pairs.
        merges: of the vocabulary, learned on all captions that the grammar can make.
        templates: prompts of the zero-shot classes, with {} for the name (`red circle`); several are an ensemble.
    """

    def __init__(
        self,
        *,
        scene: Mapping[str, Any] | None = None,
        sizes: Sequence[int] = (4000, 1000, 4000),
        held_out: int = 1,
        dataset_seed: int = 0,
        merges: int = 120,
        templates: Sequence[str] = ("a {}", "a picture of a {}", "there is a {}", "an image with a {}"),
        normalise: str = "standard",
        context_length: int = 13,
        crop: int = 0,
        **common: Any,
    ) -> None:
        super().__init__(
            context_length=context_length,
            crop=crop,
            background=GROUND,
            normalisation=Normalisation.named(normalise, MEAN, STD),
            **common,
        )
        if len(sizes) != 3 or min(sizes) < 2:
            raise ConfigError(f"{list(sizes)} are not sizes of train, val and test", looked_at="data.sizes")
        if not templates or any("{}" not in template for template in templates):
            raise ConfigError(f"prompts {list(templates)} need a {{}} for the name", looked_at="data.templates")
        fixed = {"min_objects": 1, "max_objects": 1, "textures": ("plain",)}
        self.options = SceneOptions(**{**{str(name): value for name, value in (scene or {}).items()}, **fixed})
        self.sizes = dict(zip(SPLITS, sizes, strict=True))
        self.dataset_seed, self.merges, self.templates = dataset_seed, merges, list(templates)
        try:
            self.held = held_out_pairs(len(self.options.shapes), len(self.options.colours), held_out, dataset_seed)
        except ValueError as error:
            raise ConfigError(str(error), looked_at="data.held_out") from error
        if not held_out:
            raise ConfigError("no pair is held out, so none can be tested", looked_at="data.held_out")
        self._tokenizer: BytePairTokenizer | None = None

    @property
    def spec(self) -> DataSpec:
        side = self.options.image_size
        return DataSpec(
            name="shapes",
            image_shape=(3, side, side),
            classes=tuple(f"{colour} {shape}" for shape, colour in product(self.options.shapes, self.options.colours)),
            sizes=limited(self.sizes, self.limit),
            licence="Apache-2.0 (rendered by this package)",
            source="reprise.data.shapes",
        )

    @property
    def tokenizer(self) -> BytePairTokenizer:
        if self._tokenizer is None:
            self._tokenizer = BytePairTokenizer(learn_merges(self.grammar(), self.merges), self.merges)
        return self._tokenizer

    @property
    def caption_kinds(self) -> tuple[str, ...]:
        return CAPTIONS

    def grammar(self) -> list[str]:
        """Every caption that can be made: phrases by size, place, shape and colour, each in all templates."""
        words = product(SIZES, PLACES, self.options.shapes, self.options.colours)
        phrases = (f"a {size} {colour} {shape} in the {place}" for size, place, shape, colour in words)
        return [caption.format(phrase) for phrase in phrases for caption in CAPTIONS]

    def prompts(self) -> Tensor:
        texts = [template.format(name) for name in self.spec.classes for template in self.templates]
        return self.tokens(texts).unflatten(0, (-1, len(self.templates)))

    def build_source(self, split: str) -> ImageSource:
        count = limited(self.sizes, self.limit)[split]
        key = {
            "version": RENDERER_VERSION,
            "options": asdict(self.options),
            "held": self.held.tolist(),
            "count": count,
            "seed": self.dataset_seed,
            "split": split,
        }
        arrays = cached_arrays("captioned_shapes", key, lambda: self._render(split, count))
        label, caption = arrays["label"], arrays["caption"]
        written = self.tokens(self.grammar()).unflatten(0, (-1, len(CAPTIONS)))
        return ImageSource(
            torch.from_numpy(arrays["image"]),
            self.normalisation,
            captions=written[torch.from_numpy(caption)],
            label=torch.from_numpy(label),
            unseen=torch.from_numpy(self.held.reshape(-1)[label]),
        )

    def _render(self, split: str, count: int) -> Arrays:
        scenes = self._chosen(split, count)
        shape, colour = scenes.shape[:, 0], scenes.colour[:, 0]
        middle = 0.25 * self.options.image_size * (self.options.min_size + self.options.max_size)
        size = (scenes.radius[:, 0] >= middle).astype(np.int64)
        right, low = (scenes.centre[:, 0] >= self.options.image_size / 2).astype(np.int64).T
        label = shape * len(self.options.colours) + colour
        caption = (size * len(PLACES) + 2 * low + right) * self.held.size + label
        return {"image": render(self.options, scenes).image, "label": label, "caption": caption}

    def _chosen(self, split: str, count: int) -> Scenes:
        """Training: scenes of seen pairs. Else unseen and seen pairs in turn, so that every beginning holds both."""
        wanted = {True: 0, False: count} if split == "train" else {True: (count + 1) // 2, False: count // 2}
        drawn = 2 * count
        while True:
            scenes = draw_scenes(self.options, drawn, self.dataset_seed, "captions", split)
            held = self.held[scenes.shape[:, 0], scenes.colour[:, 0]]
            rows = {which: np.flatnonzero(held == which)[:number] for which, number in wanted.items()}
            if all(len(rows[which]) == number for which, number in wanted.items()):
                break
            drawn *= 2
        if split == "train":
            return scenes[rows[False]]
        chosen = np.empty(count, np.int64)
        chosen[0::2], chosen[1::2] = rows[True], rows[False]
        return scenes[chosen]
