"""Detection of base classes first and of novel ones later, from K boxes each (the protocol of 2205.04042).

Training images of the three stages (evaluation images always have all their annotations):
    base              images with at least one base object; base annotations only, novel objects are there unlabelled
    self_supervised   the same, and selective-search proposals as further objects of the class `num_classes`
    incremental       K boxes of each novel class and nothing else: base objects are there unlabelled
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from reprise.data.cache import cached_arrays
from reprise.data.coco import CocoItems, Record
from reprise.data.folder import FolderSource, Sample
from reprise.data.images import DetectionSource
from reprise.data.loader import EvalLoader, Source, TrainLoader
from reprise.data.module import DataModule
from reprise.data.proposals import VERSION, SearchOptions, proposals_of, selective_search
from reprise.data.spec import DataSpec
from reprise.errors import ConfigError, DataError
from reprise.seeding import generator

Stage = Literal["base", "self_supervised", "incremental"]


class Selection(NamedTuple):
    """A part of a data set: images, and which of their annotations are kept.

    Attributes:
        items: positions of the images.
        rows: int64, positions among the annotations of each chosen image.
    """

    items: list[int]
    rows: list[Tensor]


def base_selection(labels: Sequence[Tensor], novel: Tensor) -> Selection:
    """Images with at least one object that is not novel, and those objects.

    Args:
        labels: int64 [m] of every image.
        novel: int64 [N], labels of the novel classes.
    """
    rows = [(~torch.isin(label, novel)).nonzero().flatten() for label in labels]
    items = [item for item, row in enumerate(rows) if len(row)]
    return Selection(items, [rows[item] for item in items])


def shots_selection(labels: Sequence[Tensor], novel: Tensor, shots: int, seed: int) -> Selection:
    """Exactly `shots` boxes of each novel class from randomly drawn images.

    Images are taken in random order; all boxes that an image has of the class count, and an image that has more than
    are still missing is passed over. Boxes of another novel class in it are only kept where it was drawn for that too.

    Args:
        labels, novel: see `base_selection`.
        seed: of the draw, which is independent for each class.

    Raises:
        DataError: there are not so many boxes of a class.
    """
    kept: dict[int, list[Tensor]] = {}
    for name in novel.tolist():
        missing = shots
        for item in torch.randperm(len(labels), generator=generator(seed, "shots", name)).tolist():
            rows = (labels[item] == name).nonzero().flatten()
            if 0 < len(rows) <= missing:
                kept.setdefault(item, []).append(rows)
                missing -= len(rows)
        if missing:
            raise DataError(
                f"only {shots - missing} boxes of the novel class {name} could be drawn, not {shots}",
                looked_at=f"{len(labels)} training images",
                next_step="choose fewer data.shots, or more images",
            )
    items = sorted(kept)
    return Selection(items, [torch.cat(kept[item]).sort().values for item in items])


def annotations_of(source: Source) -> list[Tensor]:
    """Labels int64 [m] of every training image, without reading pictures.

    Raises:
        ConfigError: a source whose annotations are not known beforehand.
    """
    if isinstance(source, DetectionSource):
        return list(source.labels[: int(source.first[len(source)])].split(source.first.diff()[: len(source)].tolist()))
    return [torch.tensor(record.labels, dtype=torch.int64) for record in _coco(source).records[: len(source)]]


def selected(source: Source, selection: Selection) -> Source:
    """The source reduced to a selection; the numbers of the items change."""
    if isinstance(source, DetectionSource):
        return _selected_tensors(source, selection)
    items = _coco(source)
    records = []
    for item, rows in zip(*selection, strict=True):
        record = items.records[item]
        chosen = [(record.labels[row], record.boxes[row]) for row in rows.tolist()]
        labels, boxes = [label for label, _ in chosen], [box for _, box in chosen]
        records.append(dataclasses.replace(record, labels=labels, boxes=boxes))
    assert isinstance(source, FolderSource)
    return dataclasses.replace(source, items=dataclasses.replace(items, records=records))


def _selected_tensors(source: DetectionSource, selection: Selection) -> DetectionSource:
    item = torch.tensor(selection.items, dtype=torch.int64)
    rows = [source.first[index] + row for index, row in zip(selection.items, selection.rows, strict=True)]
    row = torch.cat([*rows, item.new_zeros(0)])
    return DetectionSource(
        source.image[item],
        source.normalisation,
        size=source.size[item],
        first=_starts(rows),
        labels=source.labels[row],
        boxes=source.boxes[row],
    )


def with_proposals(source: Source, options: SearchOptions, label: int) -> Source:
    """The source with proposals after the annotations of every image, as objects of the class `label`."""
    if not isinstance(source, DetectionSource):
        assert isinstance(source, FolderSource)
        return dataclasses.replace(source, items=ProposedItems(_coco(source), options, label))
    found = proposals_of(source, options)
    spans = source.first.diff().tolist()
    known = zip(source.labels.split(spans), source.boxes.split(spans), strict=True)
    labels, boxes = [], []
    for (label_of, box), more in zip(known, found, strict=True):
        labels.append(torch.cat([label_of, label_of.new_full((len(more),), label)]))
        boxes.append(torch.cat([box, more]))
    return DetectionSource(
        source.image,
        source.normalisation,
        size=source.size,
        first=_starts(labels),
        labels=torch.cat(labels),
        boxes=torch.cat(boxes),
    )


def _starts(parts: Sequence[Tensor]) -> Tensor:
    return torch.tensor([0, *(len(part) for part in parts)]).cumsum(0)


def _coco(source: Source) -> CocoItems:
    if isinstance(source, FolderSource) and isinstance(source.items, CocoItems):
        return source.items
    raise ConfigError(
        f"the annotations of {type(source).__name__} are not known beforehand",
        looked_at="data.base",
        next_step="use shapes, bccd or coco",
    )


@dataclass
class ProposedItems:
    """COCO images with proposals among their boxes before any augmentation, each searched once and cached."""

    items: CocoItems
    options: SearchOptions
    label: int

    def __len__(self) -> int:
        return len(self.items)

    def item(self, index: int, augment: bool) -> Sample:
        record = self.items.records[index]
        more = [tuple(box) for box in self._proposals(record).tolist()]
        labels, boxes = [*record.labels, *[self.label] * len(more)], [*record.boxes, *more]
        extended = dataclasses.replace(record, labels=labels, boxes=boxes)
        return dataclasses.replace(self.items, records=[extended]).item(0, augment)

    def _proposals(self, record: Record) -> np.ndarray[Any, Any]:
        """xyxy in pixels, float32 [n, 4]."""
        from reprise.data.imagenet import read_image

        options = dataclasses.asdict(self.options)
        key = {"version": VERSION, "file": record.file, "image_id": record.image_id, "options": options}

        def build() -> dict[str, np.ndarray[Any, Any]]:
            image = read_image(self.items.folder / record.file)
            return {"boxes": selective_search(image.permute(1, 2, 0).numpy(), self.options)}

        return cached_arrays("proposals", key, build)["boxes"]


class IncrementalDetection(DataModule):
    """A detection data set seen class by class.

    Batches are those of the base module; in the stage `self_supervised` training targets also hold proposals, with the
    label `spec.num_classes`.

    Args:
        base: the data set; its batch sizes, steps, seed and limit are those given here.
        novel: names of the novel classes; all others are base classes.
        stage: see the module's docstring.
        shots: boxes of each novel class in the stage `incremental`, drawn by `seed`.
        proposals: options of `SearchOptions` by name.

    Raises:
        ConfigError: an unknown class, stage or search option.
    """

    def __init__(
        self,
        *,
        base: DataModule,
        novel: Sequence[str],
        stage: Stage = "base",
        shots: int = 10,
        proposals: Mapping[str, Any] | None = None,
        batch_size: int,
        steps: int,
        seed: int = 0,
        eval_batch_size: int = 100,
        limit: int | None = None,
    ) -> None:
        super().__init__(batch_size=batch_size, steps=steps, seed=seed, eval_batch_size=eval_batch_size, limit=limit)
        classes = base.spec.classes
        if stage not in ("base", "self_supervised", "incremental") or shots < 1:
            raise ConfigError(f"no stage {stage!r} with {shots} shots", looked_at="data.stage, data.shots")
        if unknown := sorted(set(novel) - set(classes)):
            raise ConfigError(f"unknown novel classes {unknown}", looked_at="data.novel", next_step=f"of: {classes}")
        if extra := set(proposals or {}) - {field.name for field in dataclasses.fields(SearchOptions)}:
            raise ConfigError(f"unknown search options {sorted(map(str, extra))}", looked_at="data.proposals")
        self.base, self.stage, self.shots = base, stage, shots
        self.search = SearchOptions(**{str(name): value for name, value in (proposals or {}).items()})
        self.novel_labels = torch.tensor([classes.index(name) for name in novel], dtype=torch.int64, device="cpu")
        known = [label for label in range(len(classes)) if classes[label] not in novel]
        self.base_labels = torch.tensor(known, dtype=torch.int64, device="cpu")

    @property
    def spec(self) -> DataSpec:
        return self.base.spec

    def build_source(self, split: str) -> Source:
        source = self.base.source(split)
        if split != "train":
            return source
        labels = annotations_of(source)
        if self.stage == "incremental":
            return selected(source, shots_selection(labels, self.novel_labels, self.shots, self.seed))
        chosen = selected(source, base_selection(labels, self.novel_labels))
        if self.stage == "base":
            return chosen
        return with_proposals(chosen, self.search, self.spec.num_classes)

    def train_dataloader(self) -> TrainLoader:
        return self._lent("train").train_dataloader()

    def val_dataloader(self) -> EvalLoader:
        return self._lent("val").val_dataloader()

    def test_dataloader(self) -> EvalLoader:
        return self._lent("test").test_dataloader()

    def _lent(self, split: str) -> DataModule:
        """The base module, set to serve our items in its own way (in memory, or read by workers)."""
        base = self.base
        base.trainer = self.trainer
        base.batch_size, base.steps, base.seed = self.batch_size, self.steps, self.seed
        base.eval_batch_size, base.start_step = self.eval_batch_size, self.start_step
        base._sources = {**base._sources, split: self.source(split)}
        return base
