"""Masks are functions of their seed, hide the wanted share, and consist of blocks."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from reprise.nn.masks import MaskSampler


def test_the_same_seed_gives_the_same_masks() -> None:
    sampler = MaskSampler()
    assert torch.equal(sampler.sample(20, 14, 14, 5), sampler.sample(20, 14, 14, 5))
    assert not torch.equal(sampler.sample(20, 14, 14, 5), sampler.sample(20, 14, 14, 6))


def test_half_of_the_masks_are_empty_and_the_rest_hide_a_tenth_to_a_half() -> None:
    share = MaskSampler((0.0, 0.3), (0.0, 0.2)).sample(400, 14, 14, 0).float().mean((1, 2))
    assert 0.4 < float((share == 0).float().mean()) < 0.6
    assert float(share.max()) <= 0.5
    assert 0.2 < float(share[share > 0].mean()) < 0.35


@pytest.mark.parametrize("shape", ["block", "random"])
@pytest.mark.parametrize("side", [4, 7])
def test_ratio_is_an_upper_bound_on_small_grids(shape: str, side: int) -> None:
    masks = MaskSampler(0.4, 0.0, shape).sample(50, side, side, 1)
    hidden = masks.sum((1, 2))
    assert int(hidden.max()) <= 0.4 * side * side
    if shape == "random":
        assert set(hidden.tolist()) == {int(0.4 * side * side)}


def test_no_ratio_hides_nothing() -> None:
    assert not MaskSampler([0.0], [0.0]).sample(5, 6, 3, 0).any()


@pytest.mark.parametrize("wrong", [{"shape": "round"}, {"ratio": [0.1], "spread": [0.2]}, {"ratio": [0.1, 0.2]}])
def test_wrong_arguments_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="mask"):
        MaskSampler(**({"spread": [0.0]} | wrong))
