"""Noto emoji: pictures of 72x72 pixels with short names in three languages, split so that test emoji are new."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from reprise.data.byte_pair import BytePairTokenizer, learn_merges
from reprise.data.cache import Arrays, cached_arrays
from reprise.data.captions import CaptionedModule
from reprise.data.images import ImageSource, Normalisation
from reprise.data.spec import DataSpec
from reprise.data.splits import limited
from reprise.errors import ConfigError, DataError
from reprise.paths import data_root
from reprise.seeding import derive

LANGUAGES = ("en", "de", "fr")
SPLITS = ("train", "val", "test")
TABLE = "captions.tsv"
COLUMNS = ("file", "codepoints", "skin_tone", *LANGUAGES)
KINDS = 1648  # emoji without skin tones
CACHE_VERSION = 1
MEAN, STD = (0.84, 0.79, 0.71), (0.26, 0.26, 0.35)  # of the pictures on white, rounded
NEXT_STEP = "reprise data fetch noto_emoji   (says how to get it; or set REPRISE_DATA to a folder that has it)"

Row = dict[str, str]


def read_table(folder: Path) -> list[Row]:
    """The rows of captions.tsv, in its order: file, codepoints, skin_tone, en, de, fr.

    Raises:
        DataError: the table is not there, or lacks columns or names.
    """
    path = folder / TABLE
    if not path.is_file():
        raise DataError("the emoji are not there", looked_at=path, next_step=NEXT_STEP)
    try:
        with path.open(encoding="utf-8", newline="") as handle:
            rows = list(csv.DictReader(handle, delimiter="\t", quoting=csv.QUOTE_NONE))
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{TABLE} cannot be read: {error}", looked_at=path, next_step=NEXT_STEP) from error
    if not rows or any(not row.get(column) for row in rows for column in COLUMNS):
        raise DataError(f"{TABLE} needs the columns {', '.join(COLUMNS)}, none empty", looked_at=path)
    return rows


def read_pictures(folder: Path, files: Sequence[str], side: int) -> npt.NDArray[np.uint8]:
    """Pictures on white, uint8 [N, 3, side, side], resized by area.

    Raises:
        DataError: one is missing or not a picture.
    """
    from PIL import Image

    from reprise.data.progress import track

    pixels = np.empty((len(files), 3, side, side), np.uint8)
    for place, name in enumerate(track(files, "decoding emoji")):
        path = folder / "images" / name
        try:
            with Image.open(path) as picture:
                glyph = picture.convert("RGBA")
        except (OSError, ValueError, SyntaxError) as error:
            raise DataError(f"{name} is not a readable picture", looked_at=path, next_step=NEXT_STEP) from error
        ground = Image.alpha_composite(Image.new("RGBA", glyph.size, "white"), glyph).convert("RGB")
        pixels[place] = np.asarray(ground.resize((side, side), Image.Resampling.BOX)).transpose(2, 0, 1)
    return pixels


class Emoji(CaptionedModule):
    """Retrieval by name. Batches: image float [B, 3, S, S], text [B, L] or captions [B, languages, L], index int64 [B].

    Each emoji belongs to one split whole, its skin tones with it: test emoji were never seen.

    Args:
        image_size: S; the pictures have 72 pixels.
        languages: of the names; training draws one of them for each picture and step.
        sizes: emoji (not counting skin tones) of train, val and test; together at most 1,648.
        skin_tones: keep the 1,895 variants with skin tones.
        split_seed: of the split.
        merges: of the vocabulary, learned on the names of the training emoji.
    """

    def __init__(
        self,
        *,
        image_size: int = 32,
        languages: Sequence[str] = LANGUAGES,
        sizes: Sequence[int] = (1100, 148, 400),
        skin_tones: bool = False,
        split_seed: int = 0,
        merges: int = 1000,
        normalise: str = "standard",
        context_length: int = 16,
        crop: int = 2,
        **common: Any,
    ) -> None:
        super().__init__(
            context_length=context_length,
            crop=crop,
            background=1.0,
            normalisation=Normalisation.named(normalise, MEAN, STD),
            **common,
        )
        if not languages or not set(languages) <= set(LANGUAGES):
            raise ConfigError(
                f"languages {list(languages)}", looked_at="data.languages", next_step=f"some of {', '.join(LANGUAGES)}"
            )
        if len(sizes) != 3 or min(sizes) < 1 or sum(sizes) > KINDS:
            raise ConfigError(f"sizes {list(sizes)} do not fit {KINDS} emoji", looked_at="data.sizes")
        self.image_size, self.languages, self.sizes = image_size, tuple(languages), list(sizes)
        self.skin_tones, self.split_seed, self.merges = skin_tones, split_seed, merges
        self._rows: dict[str, list[Row]] | None = None
        self._tokenizer: BytePairTokenizer | None = None

    @property
    def spec(self) -> DataSpec:
        return DataSpec(
            name="noto_emoji",
            image_shape=(3, self.image_size, self.image_size),
            classes=(),
            sizes=limited(dict(zip(SPLITS, self.sizes, strict=True)), self.limit),
            licence="SIL OFL 1.1 (pictures), Unicode licence (names)",
            source="https://github.com/googlefonts/noto-emoji, Unicode CLDR",
        )

    @property
    def caption_kinds(self) -> tuple[str, ...]:
        return self.languages

    def rows(self, split: str) -> list[Row]:
        """The table's rows of a split, each kind of emoji before its skin tones."""
        if self._rows is None:
            self._rows = self._split(read_table(data_root() / "noto_emoji"))
        return self._rows[split]

    def _split(self, table: list[Row]) -> dict[str, list[Row]]:
        kinds: dict[str, list[Row]] = {}
        for row in table:
            kinds.setdefault(kind_of(row["codepoints"]), []).append(row)
        plain = [[row for row in rows if row["skin_tone"] == "0"] or rows[:1] for rows in kinds.values()]
        groups = list(kinds.values()) if self.skin_tones else plain
        if sum(self.sizes) > len(groups):
            raise DataError(f"{len(groups)} emoji, but {sum(self.sizes)} are wanted", looked_at=TABLE)
        order = np.random.default_rng(derive(self.split_seed, "emoji")).permutation(len(groups))
        borders = np.cumsum([0, *self.sizes])
        parts = {name: order[borders[place] : borders[place + 1]] for place, name in enumerate(SPLITS)}
        return {name: [row for group in part for row in groups[group]] for name, part in parts.items()}

    @property
    def tokenizer(self) -> BytePairTokenizer:
        if self._tokenizer is None:
            names = [row[language] for row in self.rows("train") for language in self.languages]
            self._tokenizer = BytePairTokenizer(learn_merges(names, self.merges), self.merges)
        return self._tokenizer

    def build_source(self, split: str) -> ImageSource:
        table, folder = read_table(data_root() / "noto_emoji"), data_root() / "noto_emoji"
        files = [row["file"] for row in table]
        stamp = [str(folder.resolve()), (folder / TABLE).stat().st_mtime_ns, len(files)]
        key = {"version": CACHE_VERSION, "side": self.image_size, "stamp": stamp}

        def build() -> Arrays:
            return {"image": read_pictures(folder, files, self.image_size)}

        image = torch.from_numpy(cached_arrays("noto_emoji", key, build)["image"])
        place = {name: number for number, name in enumerate(files)}
        chosen = self.rows(split)[: self.limit]
        names = [row[language] for row in chosen for language in self.languages]
        return ImageSource(
            image[torch.tensor([place[row["file"]] for row in chosen])],
            self.normalisation,
            captions=self.tokens(names).unflatten(0, (-1, len(self.languages))),
        )


def kind_of(codepoints: str) -> str:
    """The code points without skin tones (U+1F3FB to U+1F3FF), which is what variants of one emoji share."""
    tones = {f"1F3F{digit}" for digit in "BCDEF"}
    return "-".join(point for point in codepoints.split("-") if point not in tones)
