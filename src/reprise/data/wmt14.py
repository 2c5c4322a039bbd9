"""WMT 2014 translation from parallel plain-text files, for recipes at the published scale."""

from __future__ import annotations

from reprise.data.spec import DataSpec
from reprise.data.splits import limited
from reprise.data.text import ParallelText
from reprise.errors import ConfigError
from reprise.paths import data_root

PAIRS = ("en-de", "en-fr")
NAMES = {"train": "train", "val": "newstest2013", "test": "newstest2014"}
COUNTS = {"val": 3000, "test": 3003}  # lines of newstest2013 and of the full newstest2014


class WMT14(ParallelText):
    """English to German or French. Batches: source int64 [B, S], target int64 [B, T], index int64 [B].

    Files, one sentence a line: <data root>/wmt14/<pair>/{train,newstest2013,newstest2014}.{en,de|fr}.

    Args:
        pair: en-de or en-fr.
        vocab_size, max_length, lower: see `ParallelText`.
        bucket_length: see `SequencePairs`.
    """

    def __init__(
        self,
        *,
        pair: str = "en-de",
        vocab_size: int = 37_000,
        max_length: int = 256,
        lower: bool = False,
        bucket_length: int | None = 25,
        batch_size: int,
        steps: int,
        seed: int = 0,
        eval_batch_size: int = 64,
        limit: int | None = None,
    ) -> None:
        if pair not in PAIRS:
            raise ConfigError(f"no pair of languages {pair!r}", looked_at="data.pair", next_step="data.pair=en-de")
        source, target = pair.split("-")
        folder = data_root() / "wmt14" / pair
        files = {split: (folder / f"{name}.{source}", folder / f"{name}.{target}") for split, name in NAMES.items()}
        super().__init__(
            files,
            vocab_size=vocab_size,
            max_length=max_length,
            lower=lower,
            next_step="reprise data fetch wmt14   (says how to get it; or set REPRISE_DATA to a folder that has it)",
            bucket_length=bucket_length,
            batch_size=batch_size,
            steps=steps,
            seed=seed,
            eval_batch_size=eval_batch_size,
            limit=limit,
        )

    @property
    def spec(self) -> DataSpec:
        return DataSpec(
            name="wmt14",
            image_shape=None,
            classes=(),
            sizes=limited(COUNTS, self.limit),
            licence="terms of the corpora (research)",
            source="https://www.statmt.org/wmt14/translation-task.html",
        )
