"""Multi30k (Elliott et al. 2016), task 1: image captions in English and German, raw sentences."""

from __future__ import annotations

from reprise.data.spec import DataSpec
from reprise.data.splits import limited
from reprise.data.text import ParallelText
from reprise.errors import ConfigError
from reprise.paths import data_root

LANGUAGES = ("en", "de")
COUNTS = {"train": 29_000, "val": 1014, "test_2016_flickr": 1000, "test_2017_flickr": 1000}


class Multi30k(ParallelText):
    """Translation of captions. Batches: source int64 [B, S], target int64 [B, T], index int64 [B].

    Args:
        source_language, target_language: en and de, in either order.
        test: test_2016_flickr or test_2017_flickr.
        vocab_size, max_length, lower: see `ParallelText`.
        bucket_length: see `SequencePairs`.
    """

    def __init__(
        self,
        *,
        source_language: str = "en",
        target_language: str = "de",
        test: str = "test_2016_flickr",
        vocab_size: int = 6000,
        max_length: int = 64,
        lower: bool = False,
        bucket_length: int | None = 16,
        batch_size: int,
        steps: int,
        seed: int = 0,
        eval_batch_size: int = 250,
        limit: int | None = None,
    ) -> None:
        if {source_language, target_language} != set(LANGUAGES):
            raise ConfigError(
                f"Multi30k is in {' and '.join(LANGUAGES)}, not {source_language} and {target_language}",
                looked_at="data.source_language, data.target_language",
            )
        if test not in COUNTS or not test.startswith("test"):
            raise ConfigError(f"no test set {test!r}", looked_at="data.test", next_step="data.test=test_2016_flickr")
        folder = data_root() / "multi30k"
        names = {"train": "train", "val": "val", "test": test}
        files = {
            split: (folder / f"{name}.{source_language}.gz", folder / f"{name}.{target_language}.gz")
            for split, name in names.items()
        }
        super().__init__(
            files,
            vocab_size=vocab_size,
            max_length=max_length,
            lower=lower,
            next_step="reprise data fetch multi30k   (or set REPRISE_DATA to a folder that has it)",
            bucket_length=bucket_length,
            batch_size=batch_size,
            steps=steps,
            seed=seed,
            eval_batch_size=eval_batch_size,
            limit=limit,
        )
        self.test = test

    @property
    def spec(self) -> DataSpec:
        sizes = {"train": COUNTS["train"], "val": COUNTS["val"], "test": COUNTS[self.test]}
        return DataSpec(
            name="multi30k",
            image_shape=None,
            classes=(),
            sizes=limited(sizes, self.limit),
            licence="for research, see the repository",
            source="https://github.com/multi30k/dataset (Elliott et al. 2016)",
        )
