"""One of several networks by its name."""

from __future__ import annotations

import pytest

from reprise.training.choices import chosen


def test_only_the_chosen_factory_is_called() -> None:
    made: list[str] = []

    def make(name: str) -> str:
        made.append(name)
        return name

    factories = {name: (lambda name=name: make(name)) for name in ("vit", "cnn")}
    assert chosen("cnn", factories) == "cnn"
    assert made == ["cnn"]
    with pytest.raises(ValueError, match="unknown network 'mlp'; one of vit, cnn"):
        chosen("mlp", factories)
