"""Multi-head attention against a loop over heads, masks, and one-dimensional position signals."""

from __future__ import annotations

import math

import pytest
import torch

from reprise.nn.attention import MultiHeadAttention, causal_mask
from reprise.nn.sinusoid import sinusoid, timing_signal


@pytest.mark.parametrize(("heads", "key_dim", "value_dim"), [(1, None, None), (3, None, None), (2, 5, 7)])
@pytest.mark.parametrize("scaled", [True, False])
def test_heads_one_by_one(heads: int, key_dim: int | None, value_dim: int | None, scaled: bool) -> None:
    layer = MultiHeadAttention(12, heads, key_dim=key_dim, value_dim=value_dim, bias=True, scaled=scaled)
    x, memory = torch.randn(2, 4, 12), torch.randn(2, 6, 12)
    query, key, value = layer.query(x), layer.key(memory), layer.value(memory)
    found = []
    for head in range(heads):
        k = slice(head * layer.key_dim, (head + 1) * layer.key_dim)
        v = slice(head * layer.value_dim, (head + 1) * layer.value_dim)
        logits = query[..., k] @ key[..., k].transpose(1, 2) / (math.sqrt(layer.key_dim) if scaled else 1)
        found.append(logits.softmax(-1) @ value[..., v])
    assert torch.allclose(layer(x, memory), layer.output(torch.cat(found, -1)), atol=1e-5)


def test_masked_keys_get_no_weight_and_a_blind_query_averages() -> None:
    layer = MultiHeadAttention(8, 2)
    x = torch.randn(1, 3, 8)
    weights = layer.weights(x, x, causal_mask(3))
    assert not weights.triu(1).any()
    nowhere = torch.zeros(1, 1, 1, 3, dtype=torch.bool)
    assert torch.allclose(layer.weights(x, x, nowhere), torch.full((1, 2, 3, 3), 1 / 3))
    assert torch.isfinite(layer(x, x, nowhere)).all()


def test_logits_have_unit_variance_because_of_the_scale() -> None:
    query, key = torch.randn(20_000, 64), torch.randn(20_000, 64)
    product = (query * key).sum(1)
    assert product.std().item() == pytest.approx(8.0, rel=0.05)
    assert (product / math.sqrt(64)).std().item() == pytest.approx(1.0, rel=0.05)


def test_heads_that_do_not_divide_the_width() -> None:
    with pytest.raises(ValueError, match="key_dim"):
        MultiHeadAttention(10, 3)


@pytest.mark.parametrize(("length", "dim"), [(5, 8), (4, 7), (3, 1)])
def test_sinusoid_formula(length: int, dim: int) -> None:
    table = sinusoid(length, dim)
    for position in range(length):
        for channel in range(dim):
            angle = position / 10_000 ** (2 * (channel // 2) / dim)
            expected = math.sin(angle) if channel % 2 == 0 else math.cos(angle)
            assert table[position, channel].item() == pytest.approx(expected, abs=1e-6)


def test_timing_signal_has_both_ends_and_a_zero_channel() -> None:
    signal = timing_signal(6, 9, start=2)
    assert torch.allclose(signal[:, 0], torch.arange(2.0, 8.0).sin(), atol=1e-6)
    assert torch.allclose(signal[:, 3], (torch.arange(2.0, 8.0) / 1e4).sin(), atol=1e-6)
    assert not signal[:, 8].any()
