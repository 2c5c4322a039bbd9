"""One of several networks by its name, where a run compares them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeVar

T = TypeVar("T")


def chosen(name: str, factories: Mapping[str, Callable[[], T]]) -> T:
    """What the factory of this name makes; the others are not called.

    Raises:
        ValueError: another name.
    """
    if name not in factories:
        raise ValueError(f"unknown network {name!r}; one of {', '.join(factories)}")
    return factories[name]()
