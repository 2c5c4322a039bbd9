"""Detections, suppression, duplicates and the evaluation on cases that can be counted by hand."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from reprise.nn.detection import (
    DetectionScores,
    count_duplicates,
    ground_truth,
    of_classes,
    set_detections,
    suppress,
    top_detections,
)

BOX = [0.0, 0.0, 10.0, 10.0]
SHIFTED = [0.0, 1.0, 10.0, 11.0]  # IoU 9 / 11 with BOX
FAR = [30.0, 30.0, 40.0, 40.0]


def detection(boxes: list[list[float]], scores: list[float], labels: list[int]) -> dict[str, Tensor]:
    return {"boxes": torch.tensor(boxes).view(-1, 4), "scores": torch.tensor(scores), "labels": torch.tensor(labels)}


def truth(boxes: list[list[float]], labels: list[int]) -> dict[str, Tensor]:
    return {"boxes": torch.tensor(boxes).view(-1, 4), "labels": torch.tensor(labels, dtype=torch.int64)}


def test_no_object_is_dropped_even_when_it_wins() -> None:
    logits = torch.tensor([[[0.0, 1.0, 5.0], [3.0, 0.0, 1.0]]])
    boxes, sizes = torch.full((1, 2, 4), 0.5), torch.tensor([[20, 40]])
    (found,) = set_detections(logits, boxes, sizes)
    assert found["labels"].tolist() == [1, 0]
    assert torch.allclose(found["scores"], logits.softmax(-1)[0, [0, 1], [1, 0]])
    assert found["boxes"][0].tolist() == [10.0, 5.0, 30.0, 15.0]
    (kept,) = set_detections(logits, boxes, sizes, override_empty=False)
    assert kept["labels"].tolist() == [0]


def test_suppression_is_within_a_class() -> None:
    kept = suppress(detection([BOX, SHIFTED, SHIFTED, FAR], [0.9, 0.8, 0.7, 0.1], [0, 0, 1, 0]))
    assert sorted(kept["scores"].tolist()) == pytest.approx([0.1, 0.7, 0.9])


def test_duplicates_count_beyond_the_first() -> None:
    objects = truth([BOX, FAR], [0, 0])
    assert count_duplicates(detection([BOX, SHIFTED, SHIFTED], [0.9, 0.8, 0.7], [0, 0, 0]), objects) == 2
    assert count_duplicates(detection([BOX, SHIFTED], [0.9, 0.8], [0, 1]), objects) == 0
    assert count_duplicates(detection([BOX, SHIFTED], [0.9, 0.4], [0, 0]), objects) == 0
    assert count_duplicates(detection([FAR], [0.9], [0]), truth([], [])) == 0


def test_scores_of_perfect_and_of_duplicated_detections() -> None:
    scores = DetectionScores()
    objects = [truth([BOX, FAR], [0, 1])]
    scores.update([detection([BOX, FAR], [0.9, 0.8], [0, 1])], objects)
    perfect = scores.compute()
    assert perfect["ap50"].item() == pytest.approx(1)
    assert perfect["ap"].item() == pytest.approx(1)
    assert perfect["nms_gain"].item() == pytest.approx(0)
    assert perfect["duplicates"].item() == 0
    scores.reset()
    many = [truth([BOX], [0]), truth([BOX], [0])]
    scores.update([detection([BOX, SHIFTED], [0.9, 0.8], [0, 0]), detection([BOX], [0.7], [0])], many)
    doubled = scores.compute()
    assert doubled["ap50_nms"].item() == pytest.approx(1)
    assert doubled["nms_gain"].item() > 0.1
    assert doubled["duplicates"].item() == pytest.approx(0.5)


def test_images_without_objects_or_detections() -> None:
    scores = DetectionScores()
    scores.update([detection([BOX], [0.9], [0]), detection([], [], [])], [truth([], []), truth([BOX], [0])])
    assert scores.compute()["ap50"].item() == 0


def test_ground_truth_in_pixels_keeps_crowds() -> None:
    target = {"boxes": torch.tensor([[0.5, 0.5, 1.0, 0.5]]), "labels": torch.tensor([2]), "iscrowd": torch.tensor([1])}
    (found,) = ground_truth([target], torch.tensor([[20, 40]]))
    assert found["boxes"].tolist() == [[0.0, 5.0, 40.0, 15.0]]
    assert found["iscrowd"].tolist() == [1]


def test_top_detections_are_pairs_of_query_and_class() -> None:
    logits = torch.tensor([[[0.0, 2.0], [1.0, -3.0], [-1.0, -2.0]]])
    boxes = torch.tensor([[[0.5, 0.5, 0.2, 0.2], [0.25, 0.5, 0.5, 1.0], [0.1, 0.1, 0.1, 0.1]]])
    (found,) = top_detections(logits, boxes, torch.tensor([[10, 20]]), most=3)
    assert found["labels"].tolist() == [1, 0, 0]
    torch.testing.assert_close(found["scores"], torch.tensor([2.0, 1.0, 0.0]).sigmoid())
    torch.testing.assert_close(found["boxes"][0], torch.tensor([8.0, 4.0, 12.0, 6.0]))
    torch.testing.assert_close(found["boxes"][1], torch.tensor([0.0, 0.0, 10.0, 10.0]))
    (all_pairs,) = top_detections(logits, boxes, torch.tensor([[10, 20]]))
    assert len(all_pairs["scores"]) == 6
    assert of_classes(all_pairs, torch.tensor([1]))["labels"].tolist() == [1, 1, 1]
