"""BCCD: red and white blood cells and platelets under the microscope, from PASCAL VOC files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import torch

from reprise.data.augment import RandomHorizontalFlip
from reprise.data.cache import Arrays, cached_arrays
from reprise.data.images import DetectionSource, Normalisation
from reprise.data.loader import Transform
from reprise.data.module import DataModule
from reprise.data.progress import track
from reprise.data.spec import DataSpec
from reprise.data.splits import limited
from reprise.errors import ConfigError, DataError
from reprise.paths import data_root

CLASSES = ("RBC", "WBC", "Platelets")
COUNTS = {"train": 205, "val": 87, "test": 72}
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, as DETR uses
CACHE_VERSION = 1
LARGEST_XML = 1 << 20


@dataclass(frozen=True)
class Annotation:
    """Labels and boxes of one image: x0, y0, x1, y1 in pixels."""

    labels: list[int]
    boxes: list[tuple[float, float, float, float]]


def read_annotation(path: Path, size: tuple[int, int]) -> Annotation:
    """Objects of a VOC file; boxes are cut at the image border and dropped where nothing is left.

    Coordinates are taken as edges of the box as they stand (the files were made with a tool that does not use VOC's
    one-based pixels).

    Args:
        size: (height, width) of the image, pixels.

    Raises:
        DataError: no XML, a document type declaration (which could define entities), or an unknown class.
    """
    height, width = size
    labels, boxes = [], []
    for element in _parse(path).iter("object"):
        name = (element.findtext("name") or "").strip()
        if name not in CLASSES:
            raise _damaged(f"{path.name} has an object of unknown class {name!r}", path)
        try:
            x0, y0, x1, y1 = (
                float(element.findtext(f"bndbox/{side}", "")) for side in ("xmin", "ymin", "xmax", "ymax")
            )
        except ValueError as error:
            raise _damaged(f"{path.name} has an object without a box", path) from error
        box = (max(x0, 0.0), max(y0, 0.0), min(x1, float(width)), min(y1, float(height)))
        if box[2] > box[0] and box[3] > box[1]:
            labels.append(CLASSES.index(name))
            boxes.append(box)
    return Annotation(labels, boxes)


def _parse(path: Path) -> ElementTree.Element:
    """XML without document type declarations: no entities, so nothing to expand and nothing to load."""
    try:
        if path.stat().st_size > LARGEST_XML:
            raise _damaged(f"{path.name} is too large for an annotation", path)
        text = path.read_text(encoding="utf-8")
        if "<!DOCTYPE" in text or "<!ENTITY" in text:
            raise _damaged(f"{path.name} declares a document type, which is not accepted", path)
        return ElementTree.fromstring(text)
    except (OSError, UnicodeDecodeError, ElementTree.ParseError, ValueError) as error:
        raise _damaged(f"{path.name} is not a readable annotation: {error}", path) from error


def _damaged(problem: str, place: Path) -> DataError:
    return DataError(f"BCCD: {problem}", looked_at=place, next_step="reprise data check bccd, then fetch it again")


def split_names(folder: Path, split: str) -> list[str]:
    """Image names of a split.

    Raises:
        DataError: BCCD is not there, or the list is not the published one in length.
    """
    path = folder / "ImageSets" / "Main" / f"{split}.txt"
    if not path.is_file():
        raise DataError(
            "BCCD is not there",
            looked_at=path,
            next_step="reprise data fetch bccd   (or set REPRISE_DATA to a folder that has it)",
        )
    names = path.read_text().split()
    if len(names) != COUNTS[split] or any(Path(name).name != name for name in names):
        raise _damaged(f"the {split} split lists {len(names)} images, not {COUNTS[split]}", path)
    return names


def split_files(folder: Path, split: str) -> list[tuple[Path, Path]]:
    """(image, annotation) of each item of a split.

    Raises:
        DataError: BCCD is not there, or some of its files are missing.
    """
    names = split_names(folder, split)
    files = [(folder / "JPEGImages" / f"{name}.jpg", folder / "Annotations" / f"{name}.xml") for name in names]
    missing = [path for pair in files for path in pair if not path.is_file()]
    if missing:
        raise _damaged(f"{len(missing)} files of the {split} split are missing", missing[0])
    return files


def read_split(split: str, size: tuple[int, int]) -> Arrays:
    """Images resized to fit `size` (h, w), and flat objects, as `DetectionSource` takes them; memory-mapped.

    Raises:
        DataError: the data is missing, truncated or foreign.
    """
    folder = data_root() / "bccd"
    files = split_files(folder, split)
    stats = [path.stat() for pair in files for path in pair]
    stamp = [str(folder.resolve()), [(stat.st_mtime_ns, stat.st_size) for stat in stats]]
    key = {"version": CACHE_VERSION, "split": split, "size": list(size), "stamp": stamp}
    return cached_arrays("bccd", key, lambda: _build(files, size))


def _build(files: list[tuple[Path, Path]], size: tuple[int, int]) -> Arrays:
    image = np.zeros((len(files), 3, *size), np.uint8)
    sizes, counts = [], []
    labels: list[int] = []
    boxes: list[tuple[float, float, float, float]] = []
    for position, (picture, notes) in enumerate(track(files, "decoding BCCD")):
        pixels, original = _resized(picture, size)
        image[position, :, : pixels.shape[1], : pixels.shape[2]] = pixels
        annotation = read_annotation(notes, original)
        sizes.append(pixels.shape[1:])
        counts.append(len(annotation.labels))
        labels.extend(annotation.labels)
        boxes.extend(_relative(box, original) for box in annotation.boxes)
    return {
        "image": image,
        "size": np.array(sizes, np.int64),
        "first": np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
        "labels": np.array(labels, np.int64),
        "boxes": np.array(boxes, np.float32).reshape(-1, 4),
    }


def _resized(
    path: Path, size: tuple[int, int]
) -> tuple[np.ndarray[tuple[int, ...], np.dtype[np.uint8]], tuple[int, int]]:
    """uint8 [3, h, w] that fits `size` with the aspect kept, and the original (height, width)."""
    from PIL import Image

    try:
        with Image.open(path) as picture:
            width, height = picture.size
            scale = min(size[0] / height, size[1] / width)
            target = (max(1, min(size[1], round(width * scale))), max(1, min(size[0], round(height * scale))))
            pixels = np.asarray(picture.convert("RGB").resize(target, Image.Resampling.BILINEAR))
    except (OSError, ValueError, SyntaxError) as error:
        raise _damaged(f"{path.name} is not a readable image", path) from error
    return pixels.transpose(2, 0, 1), (height, width)


def _relative(box: tuple[float, float, float, float], size: tuple[int, int]) -> tuple[float, float, float, float]:
    """x0, y0, x1, y1 in pixels as cxcywh relative to an image of `size` (h, w)."""
    x0, y0, x1, y1 = box
    height, width = size
    return (x0 + x1) / (2 * width), (y0 + y1) / (2 * height), (x1 - x0) / width, (y1 - y0) / height


class BCCD(DataModule):
    """Detection of blood cells; the published splits of 205, 87 and 72 images of 640x480 pixels.

    Batches: image float [B, 3, H, W], mask bool [B, H, W] (True = padding), index, and targets: a list of dicts labels
    int64 [M], boxes float [M, 4] (cxcywh, relative to the unpadded image), size int64 [2] (h, w, unpadded).

    Args:
        size: (H, W) that every image is scaled to fit into, its aspect kept; the rest is padding.
        flip: augmentation: mirror training images with probability one half.
        normalise: `standard` (ImageNet's mean and std), `symmetric` ([-1, 1]) or `unit` ([0, 1]).
    """

    def __init__(
        self,
        *,
        size: Sequence[int] = (240, 320),
        flip: bool = True,
        normalise: str = "standard",
        batch_size: int,
        steps: int,
        seed: int = 0,
        eval_batch_size: int = 24,
        limit: int | None = None,
    ) -> None:
        super().__init__(batch_size=batch_size, steps=steps, seed=seed, eval_batch_size=eval_batch_size, limit=limit)
        if len(size) != 2 or min(size) < 16:
            raise ConfigError(f"{list(size)} is not a (height, width) of at least 16 pixels", looked_at="data.size")
        self.size = (int(size[0]), int(size[1]))
        self.flip = flip
        self.normalisation = Normalisation.named(normalise, MEAN, STD)

    @property
    def spec(self) -> DataSpec:
        return DataSpec(
            name="bccd",
            image_shape=(3, *self.size),
            classes=CLASSES,
            sizes=limited(COUNTS, self.limit),
            licence="MIT",
            source="https://github.com/Shenggan/BCCD_Dataset",
        )

    def build_source(self, split: str) -> DetectionSource:
        arrays = {name: torch.from_numpy(array) for name, array in read_split(split, self.size).items()}
        return DetectionSource(
            arrays["image"][: self.limit],
            self.normalisation,
            size=arrays["size"],
            first=arrays["first"],
            labels=arrays["labels"],
            boxes=arrays["boxes"],
        )

    def train_transform(self) -> Transform | None:
        return RandomHorizontalFlip() if self.flip else None
