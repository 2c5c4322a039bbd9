"""Contact sheets: what a data set looks like, as one PNG."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from reprise.data.bccd import BCCD
from reprise.data.cifar10 import CIFAR10
from reprise.data.digits import Digits
from reprise.data.module import DataModule
from reprise.data.shapes.dataset import ShapesClassification, ShapesDetection
from reprise.errors import ConfigError, DataError

if TYPE_CHECKING:
    from PIL.Image import Image

INK = ("#ff4d4d", "#4dd2ff", "#ffd24d", "#7dff4d", "#ff7de0", "#ffffff", "#b28dff", "#ff9f40")


def _module(name: str, count: int) -> DataModule:
    makers: dict[str, Callable[[], DataModule]] = {
        "digits": lambda: Digits(batch_size=count, steps=1, limit=count),
        "shapes": lambda: ShapesDetection(batch_size=count, steps=1, limit=count, normalise="unit"),
        "shapes_classification": lambda: ShapesClassification(
            batch_size=count,
            steps=1,
            limit=count,
            normalise="unit",
            scene={"image_size": 32, "min_size": 0.4, "max_size": 0.8},
        ),
        "cifar10": lambda: CIFAR10(batch_size=count, steps=1, limit=count, normalise="unit"),
        "bccd": lambda: BCCD(batch_size=count, steps=1, limit=count, normalise="unit"),
    }
    if name not in makers:
        raise ConfigError(
            f"no pictures of {name!r}", next_step=f"reprise data show NAME with one of {', '.join(makers)}"
        )
    return makers[name]()


def contact_sheet(name: str, out_path: Path | str, count: int = 48, columns: int = 8) -> Path:
    """Write a sheet of the first training items of a data set, with boxes and class names, and return its path.

    Raises:
        ConfigError: a data set without pictures. DataError: it is not there, or the sheet cannot be written.
    """
    module = _module(name, count)
    source = module.source("train")
    batch = source.fetch(torch.arange(min(count, len(source))))
    names = module.spec.classes
    if "targets" in batch:
        cells = [
            detection_cell(image, target, names) for image, target in zip(batch["image"], batch["targets"], strict=True)
        ]
    else:
        cells = [
            labelled_cell(image, names[label])
            for image, label in zip(batch["image"], batch["label"].tolist(), strict=True)
        ]
    path = Path(out_path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        tile(cells, columns).save(path)
    except (OSError, ValueError) as error:
        raise DataError(
            f"the sheet cannot be written: {error}", looked_at=path, next_step="choose another path"
        ) from error
    return path


def to_picture(image: Tensor, side: int = 160) -> Image:
    """An image in [0, 1], [C, H, W], enlarged by a whole factor until its longer side is about `side` pixels."""
    from PIL import Image

    pixels = (image.clamp(0, 1) * 255).round().byte()
    pixels = pixels.expand(3, -1, -1) if len(pixels) == 1 else pixels
    factor = max(1, round(side / max(pixels.shape[1:])))
    array = np.asarray(pixels.permute(1, 2, 0).contiguous())
    return Image.fromarray(array.repeat(factor, 0).repeat(factor, 1))


def detection_cell(image: Tensor, target: dict[str, Tensor], names: tuple[str, ...]) -> Image:
    """The image with its boxes (cxcywh relative to `size`) and class names."""
    from PIL import ImageDraw

    picture = to_picture(image)
    factor = picture.height / image.shape[1]
    draw = ImageDraw.Draw(picture)
    height, width = (float(value) * factor for value in target["size"])
    for label, (cx, cy, w, h) in zip(target["labels"].tolist(), target["boxes"].tolist(), strict=True):
        corner = ((cx - w / 2) * width, (cy - h / 2) * height)
        ink = INK[label % len(INK)]
        draw.rectangle((*corner, (cx + w / 2) * width - 1, (cy + h / 2) * height - 1), outline=ink)
        draw.text((corner[0] + 2, corner[1] + 1), names[label], fill=ink)
    return picture


def labelled_cell(image: Tensor, name: str) -> Image:
    """The image above its class name."""
    from PIL import Image, ImageDraw

    picture = to_picture(image, side=96)
    cell = Image.new("RGB", (picture.width, picture.height + 14), "white")
    cell.paste(picture, (0, 0))
    ImageDraw.Draw(cell).text((2, picture.height + 1), name, fill="black")
    return cell


def tile(cells: list[Image], columns: int, gap: int = 6) -> Image:
    """Cells of one size in rows on white."""
    from PIL import Image

    width, height = cells[0].size
    rows = -(-len(cells) // columns)
    columns = min(columns, len(cells))
    sheet = Image.new("RGB", (gap + columns * (width + gap), gap + rows * (height + gap)), "white")
    for position, cell in enumerate(cells):
        row, column = divmod(position, columns)
        sheet.paste(cell, (gap + column * (width + gap), gap + row * (height + gap)))
    return sheet
