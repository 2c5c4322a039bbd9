"""Position encodings against the formula cell by cell."""

from __future__ import annotations

import math

import pytest
import torch

from reprise.nn.position import LearnedPosition2d, SinePosition2d, sine_position_2d


def test_sine_formula_with_padding() -> None:
    feats, mask = 6, torch.zeros(2, 4, 5, dtype=torch.bool)
    mask[1, 3:], mask[1, :, 2:] = True, True
    encoded = sine_position_2d(mask, feats)
    for image, (height, width) in enumerate([(4, 5), (3, 2)]):
        for y in range(height):
            for x in range(width):
                for half, place, last in ((0, y + 1, height), (1, x + 1, width)):
                    for k in range(feats):
                        angle = place / (last + 1e-6) * 2 * math.pi / 10000 ** (2 * (k // 2) / feats)
                        wanted = math.sin(angle) if k % 2 == 0 else math.cos(angle)
                        assert encoded[image, half * feats + k, y, x].item() == pytest.approx(wanted, abs=1e-5)


def test_padding_does_not_change_the_valid_part() -> None:
    module = SinePosition2d(8)
    padded = torch.ones(1, 6, 9, dtype=torch.bool)
    padded[:, :4, :5] = False
    alone = module(torch.zeros(1, 4, 5, dtype=torch.bool))
    assert torch.allclose(module(padded)[:, :, :4, :5], alone)


def test_unnormalised_counts_from_one() -> None:
    encoded = sine_position_2d(torch.zeros(1, 2, 2, dtype=torch.bool), 2, normalize=False)
    assert encoded[0, 0, 1, 0].item() == pytest.approx(math.sin(2))


def test_learned_has_columns_first() -> None:
    module = LearnedPosition2d(3)
    encoded = module(torch.zeros(2, 4, 5, dtype=torch.bool))
    assert encoded.shape == (2, 6, 4, 5)
    assert torch.equal(encoded[1, :3, 2, 4], module.col_embed.weight[4])
    assert torch.equal(encoded[1, 3:, 2, 4], module.row_embed.weight[2])


def test_learned_refuses_larger_maps() -> None:
    with pytest.raises(ValueError, match="51"):
        LearnedPosition2d(2)(torch.zeros(1, 3, 51, dtype=torch.bool))


def test_a_shift_encodes_the_centres_of_cells() -> None:
    mask = torch.zeros(1, 4, 4, dtype=torch.bool)
    angle = (torch.arange(1, 5) - 0.5) / (4 + 1e-6) * 2 * math.pi
    assert torch.allclose(sine_position_2d(mask, 2, shift=0.5)[0, 2, 0], angle.sin(), atol=1e-6)
    assert SinePosition2d(2, shift=0.5)(mask).equal(sine_position_2d(mask, 2, shift=0.5))
