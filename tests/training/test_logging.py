"""What modules log reaches Lightning where the module is."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from pytorch_lightning import LightningModule
from torch import nn

from reprise.training.module import PaperModule
from reprise.training.steps import StepMetrics


def test_values_are_logged_on_the_device_of_the_module(monkeypatch: pytest.MonkeyPatch) -> None:
    """A detector's scores are computed on the CPU, and NCCL takes nothing from there."""
    logged: dict[str, Any] = {}

    def keep(self: LightningModule, name: str, value: Any, **options: Any) -> None:
        logged[name] = value

    monkeypatch.setattr(LightningModule, "log", keep)
    module = PaperModule(torch.optim.SGD)
    module.part = nn.Linear(1, 1)
    module.to("meta").log_dict({"val/ap": torch.tensor(0.5), "val/count": 3}, sync_dist=True)
    assert logged["val/ap"].device.type == "meta"
    assert logged["val/count"] == 3


def test_noting_a_loss_leaves_it_as_it_is() -> None:
    """Ranks reduce in place."""
    notes, loss = StepMetrics(), torch.ones((), requires_grad=True).exp()
    trainer: Any = SimpleNamespace(strategy=SimpleNamespace(reduce=lambda value, reduce_op: value.mul_(2)))
    notes.on_train_start(trainer, PaperModule(torch.optim.SGD))
    notes.add("train/loss", loss, sync_dist=True)
    loss.backward()
    assert float(loss.detach()) == pytest.approx(math.e)
