"""Which of the compared networks a run trains."""

from __future__ import annotations

from collections.abc import Callable

from reprise.papers.transformer.model import Transformer
from reprise.papers.transformer.recurrent import RecurrentSeq2Seq

Network = Transformer | RecurrentSeq2Seq


def build(network: str, transformer: Callable[[], Transformer], recurrent: Callable[[], RecurrentSeq2Seq]) -> Network:
    """The chosen network, "transformer" or "recurrent"; the other factory is not called.

    Raises:
        ValueError: another name.
    """
    if network == "transformer":
        return transformer()
    if network == "recurrent":
        return recurrent()
    raise ValueError(f"unknown network {network!r}; one of transformer, recurrent")
