"""Boxes against an independent formula on integer grids, and where they meet edge cases."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from reprise.nn.boxes import (
    cxcywh_to_xyxy,
    paired_giou,
    pairwise_giou,
    pairwise_iou,
    scale_to_pixels,
    xyxy_to_cxcywh,
)

SIDE = 12
corner = st.tuples(*[st.integers(0, SIDE - 1)] * 2, *[st.integers(1, 6)] * 2)


def _cells(box: tuple[int, int, int, int]) -> set[tuple[int, int]]:
    x, y, width, height = box
    return {(i, j) for i in range(x, x + width) for j in range(y, y + height)}


def _slow_giou(a: tuple[int, int, int, int], b: tuple[int, int, int, int]) -> tuple[float, float]:
    """IoU and generalised IoU by counting unit cells."""
    cells_a, cells_b = _cells(a), _cells(b)
    union = cells_a | cells_b
    xs, ys = [x for x, _ in union], [y for _, y in union]
    enclosing = (max(xs) - min(xs) + 1) * (max(ys) - min(ys) + 1)
    iou = len(cells_a & cells_b) / len(union)
    return iou, iou - (enclosing - len(union)) / enclosing


def _xyxy(box: tuple[int, int, int, int]) -> Tensor:
    x, y, width, height = box
    return torch.tensor([[x, y, x + width, y + height]], dtype=torch.float32)


@settings(max_examples=60, deadline=None)
@given(corner, corner)
def test_iou_and_giou_count_cells(a: tuple[int, int, int, int], b: tuple[int, int, int, int]) -> None:
    iou, giou = _slow_giou(a, b)
    assert pairwise_iou(_xyxy(a), _xyxy(b)).item() == pytest.approx(iou, abs=1e-6)
    assert pairwise_giou(_xyxy(a), _xyxy(b)).item() == pytest.approx(giou, abs=1e-6)


def test_conversions_are_inverse() -> None:
    boxes = torch.rand(3, 7, 4)
    assert torch.allclose(xyxy_to_cxcywh(cxcywh_to_xyxy(boxes)), boxes, atol=1e-6)


def test_order_is_centre_then_width_then_height() -> None:
    assert cxcywh_to_xyxy(torch.tensor([5.0, 5.0, 2.0, 8.0])).tolist() == [4.0, 1.0, 6.0, 9.0]


def test_paired_is_the_diagonal_of_pairwise_with_its_gradient() -> None:
    boxes = cxcywh_to_xyxy(torch.rand(5, 4) + 0.1).requires_grad_()
    others = cxcywh_to_xyxy(torch.rand(5, 4) + 0.1)
    paired, diagonal = paired_giou(boxes, others), pairwise_giou(boxes, others).diagonal()
    assert torch.equal(paired, diagonal)
    (slow,) = torch.autograd.grad(diagonal.sum(), boxes, retain_graph=True)
    (fast,) = torch.autograd.grad(paired.sum(), boxes)
    assert torch.allclose(fast, slow)


def test_a_point_has_a_finite_giou_when_the_other_box_has_area() -> None:
    point = torch.tensor([[0.5, 0.5, 0.5, 0.5]])
    assert pairwise_giou(point, torch.tensor([[0.0, 0.0, 1.0, 1.0]])).isfinite().all()


def test_no_boxes() -> None:
    empty = torch.zeros(0, 4)
    assert pairwise_giou(empty, torch.rand(3, 4)).shape == (0, 3)
    assert paired_giou(empty, empty).shape == (0,)


def test_pixels_scale_x_by_the_width_and_y_by_the_height() -> None:
    scaled = scale_to_pixels(torch.tensor([[[0.0, 0.0, 1.0, 1.0]]]), torch.tensor([[30, 40]]))
    assert scaled.tolist() == [[[0.0, 0.0, 40.0, 30.0]]]
