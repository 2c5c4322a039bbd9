"""Omniglot (Lake et al. 2015), background set small 1: 136 characters by 20 drawers, split by character."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from reprise.data.cache import Arrays, cached_arrays
from reprise.data.fewshot import FewShotImages
from reprise.data.spec import DataSpec
from reprise.data.splits import limited
from reprise.errors import ConfigError, DataError
from reprise.paths import data_root
from reprise.seeding import derive

CHARACTERS, DRAWERS, SIDE = 136, 20, 105
CACHE_VERSION = 1
SPLITS = ("train", "val", "test")
FETCH = "reprise data fetch omniglot   (or set REPRISE_DATA to a folder that has it)"


def character_folders(root: Path) -> list[Path]:
    """The folder of each character, sorted by alphabet and number.

    Raises:
        DataError: they are not there, or not complete.
    """
    folder = root / "omniglot" / "images_background_small1"
    if not folder.is_dir():
        raise DataError("Omniglot is not there", looked_at=folder, next_step=FETCH)
    found = sorted(path for path in folder.glob("*/*") if path.is_dir())
    short = [path for path in found if sum(1 for _ in path.glob("*.png")) != DRAWERS]
    if len(found) != CHARACTERS or short:
        raise DataError(
            f"Omniglot has {len(found)} characters of {CHARACTERS}, {len(short)} of them not with {DRAWERS} drawings",
            looked_at=short[0] if short else folder,
            next_step=f"remove {folder} and run: reprise data fetch omniglot",
        )
    return found


def read_characters(size: int) -> Arrays:
    """`image` uint8 [136, 20, size, size], ink bright on dark, made once and then memory-mapped.

    Raises:
        DataError: the data is missing or damaged.
    """
    folders = character_folders(data_root())
    files = [sorted(folder.glob("*.png")) for folder in folders]
    stamp = [(str(file.resolve()), file.stat().st_size) for row in files for file in row]
    key = {"version": CACHE_VERSION, "size": size, "stamp": derive(0, *stamp)}
    return cached_arrays(
        "omniglot", key, lambda: {"image": np.stack([[_decode(file, size) for file in row] for row in files])}
    )


def _decode(path: Path, size: int) -> npt.NDArray[np.uint8]:
    from PIL import Image

    try:
        with Image.open(path) as picture:
            ink = Image.eval(picture.convert("L"), lambda value: 255 - value)
            side = ink.size
            small = ink.resize((size, size), Image.Resampling.BOX)
    except (OSError, ValueError, SyntaxError) as error:
        raise DataError(f"{path.name} is not a readable image", looked_at=path, next_step=FETCH) from error
    if side != (SIDE, SIDE):
        raise DataError(
            f"{path.name} is {side[0]}x{side[1]} pixels, not {SIDE}x{SIDE}", looked_at=path, next_step=FETCH
        )
    return np.asarray(small, np.uint8)


class Omniglot(FewShotImages):
    """Handwritten characters. Batches: image float [B, 1, S, S]; see `FewShotImages`.

    Args:
        classes: numbers of base, validation and novel characters, drawn by `split_seed`.
        image_size: S; the drawings of 105 pixels are averaged down to it.
        common: of `FewShotImages`.
    """

    level = (0.08, 0.23)

    def __init__(
        self,
        *,
        classes: Sequence[int] = (80, 20, 36),
        split_seed: int = 0,
        image_size: int = 28,
        **common: Any,
    ) -> None:
        super().__init__(**common)
        if len(classes) != 3 or min(classes) < 1 or sum(classes) > CHARACTERS:
            raise ConfigError(
                f"base, validation and novel classes {list(classes)} do not fit {CHARACTERS} characters",
                looked_at="data.classes",
            )
        self.classes, self.split_seed, self.image_size = list(classes), split_seed, image_size

    @property
    def spec(self) -> DataSpec:
        sizes = {split: self.classes[i] * DRAWERS for i, split in enumerate(SPLITS)}
        return DataSpec(
            name="omniglot",
            image_shape=(1, self.image_size, self.image_size),
            classes=tuple(f"character {number}" for number in range(self.classes[0])),
            sizes=limited(sizes, self.limit),
            licence="MIT",
            source="https://github.com/brendenlake/omniglot (Lake et al. 2015)",
        )

    def read(self, split: str) -> Arrays:
        image = read_characters(self.image_size)["image"]
        order = np.random.default_rng(derive(self.split_seed, "omniglot")).permutation(CHARACTERS)
        first = sum(self.classes[: SPLITS.index(split)])
        chosen = order[first : first + self.classes[SPLITS.index(split)]]
        label = np.repeat(np.arange(len(chosen)), DRAWERS)
        return {"image": image[chosen].reshape(-1, 1, self.image_size, self.image_size), "label": label}
