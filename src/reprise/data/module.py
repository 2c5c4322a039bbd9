"""The base of every data module."""

from __future__ import annotations

from abc import abstractmethod

from pytorch_lightning import LightningDataModule

from reprise.data.loader import EvalLoader, Source, StepLoader, TrainLoader, Transform
from reprise.data.spec import DataSpec


class DataModule(LightningDataModule):
    """Serves deterministic batches; subclasses say what the splits are.

    Args:
        batch_size: GLOBAL training batch size, independent of the number of devices.
        steps: training steps of the whole run.
        seed: of the data order and the augmentation (not of the data set's own splits).
        eval_batch_size: items in an evaluation batch of one rank.
        limit: at most this many items of each split (smoke runs), or None.
    """

    def __init__(
        self, *, batch_size: int, steps: int, seed: int = 0, eval_batch_size: int = 500, limit: int | None = None
    ) -> None:
        super().__init__()
        self.batch_size = batch_size
        self.steps = steps
        self.seed = seed
        self.eval_batch_size = eval_batch_size
        self.limit = limit
        self.start_step = 0  # set by the resume callback before the loaders are made
        self._sources: dict[str, Source] = {}

    @property
    @abstractmethod
    def spec(self) -> DataSpec:
        """Shapes, classes, split sizes, licence, source; must not read the data."""

    @property
    def examples_per_step(self) -> int:
        """Training examples that one step of all ranks goes through; rounds of clients are more than a batch."""
        return self.batch_size

    @abstractmethod
    def build_source(self, split: str) -> Source:
        """The items of `train`, `val` or `test`, at most `self.limit` of them.

        Raises:
            DataError: the data set is missing or damaged.
        """

    def train_transform(self) -> Transform | None:
        """Augmentation of training batches."""
        return None

    def source(self, split: str) -> Source:
        """The items of a split, built once."""
        if split not in self._sources:
            self._sources[split] = self.build_source(split)
        return self._sources[split]

    def train_dataloader(self) -> TrainLoader:
        rank, world = self._rank_and_world()
        return StepLoader(
            self.source("train"),
            self.batch_size,
            self.steps,
            self.seed,
            start=self.start_step,
            rank=rank,
            world=world,
            transform=self.train_transform(),
        )

    def val_dataloader(self) -> EvalLoader:
        return self._eval_loader("val")

    def test_dataloader(self) -> EvalLoader:
        return self._eval_loader("test")

    def _eval_loader(self, split: str) -> EvalLoader:
        return EvalLoader(self.source(split), self.eval_batch_size, *self._rank_and_world())

    def _rank_and_world(self) -> tuple[int, int]:
        if self.trainer is None:
            return 0, 1
        return self.trainer.global_rank, self.trainer.world_size
