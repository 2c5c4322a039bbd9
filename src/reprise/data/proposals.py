"""Proposals: boxes around things that nobody has labelled; by default from selective search (Uijlings et al., 2013),
which groups similar neighbouring regions. Random boxes and hidden annotations are what to compare it with.

An image is over-segmented (Felzenszwalb and Huttenlocher, 2004; scikit-image), then the two most similar neighbours are
merged until one region is left; every region on the way gives a box. `fast` search repeats this for two colour spaces,
two scales and two similarities, as OpenCV's `switchToSelectiveSearchFast` does. Boxes are ranked by their place in the
hierarchies times a random number, which is seeded by the picture itself: a box list depends on nothing else.
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from reprise.data.cache import Arrays, cached_arrays
from reprise.data.images import DetectionSource
from reprise.data.progress import track
from reprise.errors import ConfigError
from reprise.nn.boxes import xyxy_to_cxcywh
from reprise.seeding import derive

VERSION = 1  # of the boxes: raise it when they change
COLOUR_BINS, TEXTURE_BINS = 25, 10
SPACES = ("hsv", "lab", "rgb")
STRATEGIES = ("all", "no_colour")  # colour + texture + size + fill, or the same without colour

Array = npt.NDArray[Any]
Origin = Literal["search", "random", "novel"]


@dataclass(frozen=True)
class SearchOptions:
    """How proposals are made.

    Attributes:
        count: the best so many boxes of an image; 0 for none.
        spaces: colour spaces to search in.
        scales: of the over-segmentation, larger = larger regions (for intensities up to 255).
        strategies: similarities, `all` or `no_colour`.
        min_region: smallest region of the over-segmentation, pixels.
        min_side: smallest side of a box, as a fraction of the image's.
        max_side: boxes of which both sides are longer (the whole image, mostly) are left out.
        source: `search`; `random`, boxes of random places with sides between the two limits; or `novel`, the image's
            own annotations of novel classes without their labels, which no real run could know (an oracle).
    """

    count: int = 30
    spaces: tuple[str, ...] = ("hsv", "lab")
    scales: tuple[float, ...] = (150.0, 300.0)
    strategies: tuple[str, ...] = STRATEGIES
    min_region: int = 100
    min_side: float = 0.0
    max_side: float = 1.0
    source: Origin = "search"

    def __post_init__(self) -> None:
        for name, known in (("spaces", SPACES), ("strategies", STRATEGIES), ("scales", None)):
            chosen = tuple(getattr(self, name))
            object.__setattr__(self, name, chosen)
            if not chosen or (known is not None and not set(chosen) <= set(known)):
                raise ConfigError(f"no selective search with {name} {list(chosen)}", next_step=f"choose from {known}")
        if self.source not in get_args(Origin):
            raise ConfigError(
                f"no proposals from {self.source!r}",
                looked_at="data.proposals.source",
                next_step=f"choose one of: {', '.join(get_args(Origin))}",
            )
        if self.count < 0 or self.min_region < 1 or not 0 <= self.min_side <= self.max_side <= 1:
            raise ConfigError(f"no selective search with {self}", looked_at="data.proposals")

    def search_key(self) -> dict[str, Any]:
        """All that decides what the search finds, for caches."""
        return {name: value for name, value in asdict(self).items() if name != "source"}


@dataclass
class Regions:
    """Regions of one segmentation, as rows; merged regions are appended.

    Attributes:
        size: pixels.
        box: left, top, right, bottom (exclusive), pixels.
        colour, texture: histograms that sum to 1.
    """

    size: list[float]
    box: list[Array]
    colour: list[Array]
    texture: list[Array]

    def similarity(self, a: int, b: int, pixels: int, *, colour: bool) -> float:
        """Sum of the similarities of two regions, each in [0, 1] (section 3.2 of the paper)."""
        low, high = np.minimum(self.box[a][:2], self.box[b][:2]), np.maximum(self.box[a][2:], self.box[b][2:])
        both = self.size[a] + self.size[b]
        size = 1 - both / pixels
        fill = 1 - (float((high - low).prod()) - both) / pixels
        value = size + fill + float(np.minimum(self.texture[a], self.texture[b]).sum())
        return value + float(np.minimum(self.colour[a], self.colour[b]).sum()) if colour else value

    def merge(self, a: int, b: int) -> int:
        """Append the union of two regions; returns its row."""
        self.box.append(
            np.concatenate([np.minimum(self.box[a][:2], self.box[b][:2]), np.maximum(self.box[a][2:], self.box[b][2:])])
        )
        both = self.size[a] + self.size[b]
        for histograms in (self.colour, self.texture):
            histograms.append((self.size[a] * histograms[a] + self.size[b] * histograms[b]) / both)
        self.size.append(both)
        return len(self.size) - 1


def convert(image: Array, space: str) -> Array:
    """RGB in [0, 1], [H, W, 3], in another colour space, each channel again in [0, 1]."""
    from skimage import color

    if space == "hsv":
        return color.rgb2hsv(image)
    if space == "lab":
        return (color.rgb2lab(image) + np.array([0, 128, 128])) / np.array([100, 255, 255])
    return image


def describe(image: Array, labels: Array) -> Regions:
    """Sizes, boxes and histograms of the segments `labels` int [H, W] (0 .. n-1) of an image [H, W, 3] in [0, 1]."""
    count = int(labels.max()) + 1
    rows, columns = np.indices(labels.shape)
    flat = labels.ravel()
    box = np.zeros((count, 4), np.int64)
    box[:, :2] = np.iinfo(np.int64).max
    for axis, place in ((0, columns.ravel()), (1, rows.ravel())):
        np.minimum.at(box[:, axis], flat, place)
        np.maximum.at(box[:, axis + 2], flat, place + 1)
    size = np.bincount(flat, minlength=count).astype(np.float64)
    gradients = np.stack([np.gradient(image, axis=axis) for axis in (0, 1)], -1)  # [H, W, 3, 2]
    halves = np.concatenate([gradients.clip(min=0), (-gradients).clip(min=0)], -1).reshape(*labels.shape, -1)
    colour = _histograms(image.reshape(-1, 3), flat, count, COLOUR_BINS)
    texture = _histograms(2 * halves.reshape(-1, halves.shape[-1]), flat, count, TEXTURE_BINS)
    return Regions(list(size), list(box), list(colour), list(texture))


def _histograms(values: Array, labels: Array, count: int, bins: int) -> Array:
    """Histograms over [0, 1] of every channel of `values` [N, C] in each region, normalised, [count, C * bins]."""
    channels = values.shape[1]
    place = np.clip((values * bins).astype(np.int64), 0, bins - 1) + bins * np.arange(channels)
    index = labels[:, None] * (channels * bins) + place
    table = np.bincount(index.ravel(), minlength=count * channels * bins).reshape(count, -1).astype(np.float64)
    return table / table.sum(1, keepdims=True)


def neighbours(labels: Array) -> set[tuple[int, int]]:
    """Pairs (a < b) of segments that touch side by side."""
    beside = np.stack([labels[:, :-1].ravel(), labels[:, 1:].ravel()])
    below = np.stack([labels[:-1].ravel(), labels[1:].ravel()])
    pairs = np.concatenate([beside, below], 1)
    pairs = np.unique(np.sort(pairs[:, pairs[0] != pairs[1]], axis=0), axis=1)
    return {(int(a), int(b)) for a, b in pairs.T}


def group(regions: Regions, touching: set[tuple[int, int]], pixels: int, *, colour: bool) -> Array:
    """Boxes of the hierarchy that greedy merging makes, the whole image first and the first segments last, [R, 4]."""
    similarity = {pair: regions.similarity(*pair, pixels, colour=colour) for pair in sorted(touching)}
    while similarity:
        a, b = max(similarity, key=lambda pair: (similarity[pair], pair))
        merged = regions.merge(a, b)
        around = {other for pair in similarity if a in pair or b in pair for other in pair} - {a, b}
        similarity = {pair: value for pair, value in similarity.items() if a not in pair and b not in pair}
        for other in sorted(around):
            similarity[other, merged] = regions.similarity(other, merged, pixels, colour=colour)
    return np.stack(regions.box[::-1])


def selective_search(image: npt.NDArray[np.uint8], options: SearchOptions) -> Array:
    """The best boxes of an image.

    Args:
        image: RGB [H, W, 3].

    Returns:
        float32 [n, 4] xyxy in pixels, n <= options.count, best first, without repetitions.
    """
    from skimage.segmentation import felzenszwalb

    rgb = image.astype(np.float64) / 255
    height, width = image.shape[:2]
    rng = _random_of("selective_search", image)
    boxes, ranks = [], []
    for space in options.spaces:
        converted = convert(rgb, space)
        for scale in options.scales:
            labels = felzenszwalb(converted, scale=scale, sigma=0.8, min_size=options.min_region, channel_axis=-1)
            touching = neighbours(labels)
            for strategy in options.strategies:
                found = group(describe(converted, labels), touching, height * width, colour=strategy == "all")
                boxes.append(found)
                ranks.append(np.arange(1, len(found) + 1) * rng.random(len(found)))
    ordered = np.concatenate(boxes)[np.argsort(np.concatenate(ranks), kind="stable")]
    return _chosen(ordered, (width, height), options).astype(np.float32)


def _random_of(purpose: str, image: Array) -> np.random.Generator:
    """Random numbers that depend on the picture alone."""
    return np.random.default_rng(derive(0, purpose, zlib.crc32(np.ascontiguousarray(image).tobytes())))


def random_boxes(image: npt.NDArray[np.uint8], options: SearchOptions) -> Array:
    """`count` boxes of an image: sides uniform between `min_side` and `max_side`, then places uniform inside it.

    Args:
        image: RGB [H, W, 3], which seeds the draw.

    Returns:
        float32 [count, 4] xyxy in pixels.
    """
    rng = _random_of("random_boxes", image)
    side = rng.uniform(options.min_side, options.max_side, (options.count, 2))
    corner = rng.uniform(size=(options.count, 2)) * (1 - side)
    height, width = image.shape[:2]
    return (np.concatenate([corner, corner + side], 1) * np.array([width, height] * 2)).astype(np.float32)


def _chosen(boxes: Array, size: tuple[int, int], options: SearchOptions) -> Array:
    """The first `count` different boxes of an allowed size."""
    sides = (boxes[:, 2:] - boxes[:, :2]) / np.array(size)
    fits = (sides.min(1) >= options.min_side) & ~(sides > options.max_side).all(1)
    kept = boxes[fits & ~(sides == 1).all(1)]
    _, first = np.unique(kept, axis=0, return_index=True)
    return kept[np.sort(first)[: options.count]]


def proposals_of(source: DetectionSource, options: SearchOptions) -> list[Tensor]:
    """Proposals of every image of a source, cxcywh relative to the image without padding, without knowing annotations.

    What was searched is cached by its content.

    Returns:
        float32 [n, 4] for each image.
    """
    images = source.image.numpy()
    if options.count == 0:
        return [torch.zeros(0, 4) for _ in images]
    if options.source == "random":
        return _boxes_of_all(images, source.size.tolist(), options)
    digest = hashlib.blake2b(np.ascontiguousarray(images).tobytes(), digest_size=16)
    digest.update(source.size.numpy().tobytes())
    key = {"version": VERSION, "images": digest.hexdigest(), "options": options.search_key()}
    arrays = cached_arrays("proposals", key, lambda: _search_all(images, source.size.tolist(), options))
    boxes, first = torch.from_numpy(arrays["boxes"]), arrays["first"]
    return [boxes[start:stop] for start, stop in pairwise(first)]


def _search_all(images: Array, sizes: Sequence[Sequence[int]], options: SearchOptions) -> Arrays:
    found = [boxes.numpy() for boxes in _boxes_of_all(track(list(images), "selective search"), sizes, options)]
    return {
        "boxes": np.concatenate([*found, np.zeros((0, 4), np.float32)]),
        "first": np.cumsum([0, *(len(boxes) for boxes in found)]).astype(np.int64),
    }


def _boxes_of_all(images: Iterable[Array], sizes: Sequence[Sequence[int]], options: SearchOptions) -> list[Tensor]:
    """`relative_proposals` of padded images [3, H, W], each with its own size (h, w)."""
    return [
        relative_proposals(image[:, :height, :width].transpose(1, 2, 0), options)
        for image, (height, width) in zip(images, sizes, strict=True)
    ]


def relative_proposals(image: npt.NDArray[np.uint8], options: SearchOptions) -> Tensor:
    """Searched or random boxes of RGB [H, W, 3] as cxcywh in fractions of the image, float32 [n, 4]."""
    height, width = image.shape[:2]
    find = random_boxes if options.source == "random" else selective_search
    corners = torch.from_numpy(find(image, options))
    return xyxy_to_cxcywh(corners / torch.tensor([width, height, width, height], dtype=torch.float32))
