"""Foreign state dicts: every key has its place, every shape fits."""

from __future__ import annotations

import pytest
import torch

from reprise.errors import CheckpointError
from reprise.nn.state import fitting_state

OWN = {"a": torch.zeros(2), "b": torch.zeros(3)}
HINT = {"looked_at": "a file", "next_step": "choose another"}


def test_entries_come_in_our_order() -> None:
    assert list(fitting_state({"b": torch.ones(3), "a": torch.ones(2)}, OWN, **HINT)) == ["a", "b"]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ({"a": torch.ones(2)}, "lacks keys of the model: b"),
        ({"a": torch.ones(2), "b": torch.ones(3), "c": torch.ones(1)}, "keys that the model lacks: c"),
        ({"a": torch.ones(2), "b": torch.ones(4)}, r"shapes differ: b: \(4,\) in the file, \(3,\) in the model"),
    ],
)
def test_what_does_not_fit_is_named(source: dict[str, torch.Tensor], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        fitting_state(source, OWN, **HINT)
