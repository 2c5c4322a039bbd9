"""Deformable attention against a slow loop, its start, and padding."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from reprise.nn.deformable import (
    DeformableAttention,
    compass,
    deformable_attention,
    sample_bilinear,
    sample_by_rows,
    sampling_locations,
)

SHAPES = [(4, 6), (2, 3)]


def _bilinear(level: Tensor, x: float, y: float) -> Tensor:
    """The value of a map [H, W, C] at (x, y) in [0, 1], zero outside, written out cell by cell."""
    height, width, _ = level.shape
    column, row = x * width - 0.5, y * height - 0.5
    value = torch.zeros(level.shape[-1])
    for i in (math.floor(row), math.floor(row) + 1):
        for j in (math.floor(column), math.floor(column) + 1):
            if 0 <= i < height and 0 <= j < width:
                value += (1 - abs(row - i)) * (1 - abs(column - j)) * level[i, j]
    return value


@pytest.mark.parametrize(("heads", "points"), [(1, 1), (2, 3), (4, 2)])
def test_equals_a_loop(heads: int, points: int) -> None:
    cells, queries, channels = 30, 5, 4
    value = torch.randn(2, cells, heads, channels)
    locations = torch.rand(2, queries, heads, 2, points, 2) * 1.4 - 0.2
    weights = torch.rand(2, queries, heads, 2, points)
    found = deformable_attention(value, SHAPES, locations, weights).unflatten(-1, (heads, channels))
    for image, query, head in ((0, 0, 0), (1, queries - 1, heads - 1)):
        expected, start = torch.zeros(channels), 0
        for level, (height, width) in enumerate(SHAPES):
            maps = value[image, start : start + height * width, head].view(height, width, channels)
            start += height * width
            for point in range(points):
                x, y = locations[image, query, head, level, point].tolist()
                expected += weights[image, query, head, level, point] * _bilinear(maps, x, y)
        torch.testing.assert_close(found[image, query, head], expected, atol=1e-5, rtol=1e-4)


def test_sampling_by_rows_has_the_values_and_gradients_of_grid_sample() -> None:
    image, grid = torch.randn(3, 4, 5, 7, dtype=torch.float64), torch.rand(3, 6, 2, 2, dtype=torch.float64) * 2.8 - 1.4
    probe = torch.randn(3, 4, 6, 2, dtype=torch.float64)
    found = []
    for sample in (sample_bilinear, sample_by_rows):
        leaves = [image.clone().requires_grad_(), grid.clone().requires_grad_()]
        value = sample(*leaves)
        found.append([value, *torch.autograd.grad((value * probe).sum(), leaves)])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_levels_must_hold_the_cells() -> None:
    with pytest.raises(ValueError, match="do not hold 29 cells"):
        deformable_attention(
            torch.zeros(1, 29, 1, 2), SHAPES, torch.zeros(1, 1, 1, 2, 1, 2), torch.zeros(1, 1, 1, 2, 1)
        )


def test_offsets_are_cells_around_points_and_parts_of_boxes() -> None:
    offsets = torch.ones(1, 1, 1, 2, 2, 2)
    around_point = sampling_locations(offsets, torch.full((1, 1, 2, 2), 0.5), SHAPES)
    assert torch.allclose(around_point[0, 0, 0, 0, 0], torch.tensor([0.5 + 1 / 6, 0.5 + 1 / 4]))
    in_box = sampling_locations(offsets, torch.tensor([0.5, 0.5, 0.2, 0.4]).expand(1, 1, 2, 4), SHAPES)
    assert torch.allclose(in_box[0, 0, 0, 1, 0], torch.tensor([0.5 + 0.05, 0.5 + 0.1]))
    with pytest.raises(ValueError, match="2 or 4 numbers, not 3"):
        sampling_locations(offsets, torch.zeros(1, 1, 2, 3), SHAPES)


def test_first_directions_and_equal_weights() -> None:
    attention = DeformableAttention(16, levels=2, heads=4, points=3)
    start = compass(4, 2, 3)
    assert torch.allclose(start[0, 0, 2], torch.tensor([3.0, 0.0]), atol=1e-6)
    assert torch.allclose(start[1, 1, 0], torch.tensor([0.0, 1.0]), atol=1e-6)
    assert torch.equal(attention.sampling_offsets.bias, start.flatten())
    _, weights = attention.look(torch.randn(1, 2, 16), torch.rand(1, 2, 2, 2), SHAPES)
    assert torch.allclose(weights, torch.full_like(weights, 1 / 6))


def test_padded_values_count_as_zero_after_the_projection() -> None:
    attention = DeformableAttention(8, levels=2, heads=2, points=2)
    torch.nn.init.ones_(attention.value_proj.bias)
    query, reference, memory = torch.randn(1, 3, 8), torch.rand(1, 3, 2, 2), torch.randn(1, 30, 8)
    everything = torch.ones(1, 30, dtype=torch.bool)
    assert torch.equal(
        attention(query, reference, memory, SHAPES, everything), attention.output_proj.bias.expand(1, 3, 8)
    )


def test_heads_must_divide_the_width() -> None:
    with pytest.raises(ValueError, match="do not divide"):
        DeformableAttention(10, heads=4)
