"""Which of the compared networks a run trains."""

from __future__ import annotations

from collections.abc import Callable

from reprise.papers.transformer.model import Transformer
from reprise.papers.transformer.recurrent import RecurrentSeq2Seq
from reprise.training.choices import chosen

Network = Transformer | RecurrentSeq2Seq


def build(network: str, transformer: Callable[[], Transformer], recurrent: Callable[[], RecurrentSeq2Seq]) -> Network:
    """The chosen network, "transformer" or "recurrent"; the other factory is not called.

    Raises:
        ValueError: another name.
    """
    factories: dict[str, Callable[[], Network]] = {"transformer": transformer, "recurrent": recurrent}
    return chosen(network, factories)
