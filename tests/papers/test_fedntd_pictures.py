"""Figures of FedNTD."""

from __future__ import annotations

import pytest
import torch

from reprise.papers.fedntd.pictures import partition


@pytest.mark.parametrize("clients", [2, 4, 20, 100])
def test_clients_are_marked_by_whole_numbers(clients: int) -> None:
    figure = partition(torch.ones(clients, 3, dtype=torch.int64), ["a", "b", "c"]).figure
    figure.draw_without_rendering()
    shown = [tick.get_text() for tick in figure.axes[0].get_xticklabels()]
    assert len(shown) >= 2
    assert all(text.replace("−", "-").lstrip("-").isdigit() for text in shown), shown
