"""Standardised convolutions and SAME padding against slow formulas."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from reprise.nn.std_conv import StdConv2d, max_pool_same, pad_same, standardize


def test_standardised_filters_have_zero_mean_and_eps_is_added_to_the_deviation() -> None:
    weight = torch.randn(4, 3, 5, 5, dtype=torch.float64) * 1e-4
    ours = standardize(weight)
    for mine, filter_ in zip(ours, weight, strict=True):
        assert torch.allclose(mine, (filter_ - filter_.mean()) / (filter_.std(correction=0) + 1e-5), atol=1e-9)


@pytest.mark.parametrize(("size", "kernel", "stride"), [(8, 3, 2), (7, 3, 2), (16, 7, 2), (9, 1, 2), (5, 3, 1)])
def test_same_padding_gives_ceil_and_puts_the_odd_pixel_last(size: int, kernel: int, stride: int) -> None:
    image = torch.ones(1, 1, size, size + 1)
    padded = pad_same(image, kernel, stride)
    outputs = [(side - kernel) // stride + 1 for side in padded.shape[-2:]]
    assert outputs == [-(-size // stride), -(-(size + 1) // stride)]
    row = padded[0, 0].amax(1)
    before, after = int(row.argmax()), len(row) - 1 - int(row.flip(0).argmax())
    assert 0 <= (len(row) - 1 - after) - before <= 1
    convolution = StdConv2d(1, 2, kernel, stride)
    assert list(convolution(image).shape[-2:]) == outputs


def test_pooling_pads_with_minus_infinity() -> None:
    image = -torch.rand(1, 2, 6, 6) - 1
    pooled = max_pool_same(image, 3, 2)
    assert pooled.shape == (1, 2, 3, 3)
    assert pooled.max() < 0
    assert torch.equal(pooled[:, :, :2, :2], F.max_pool2d(image[:, :, :5, :5], 3, 2))
