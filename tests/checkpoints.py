"""Checkpoints as official training scripts save them, and their import by the command."""

from __future__ import annotations

import copy
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from reprise.cli import main
from reprise.config import compose
from reprise.training.instantiate import instantiate


def recipe_model(experiment: str) -> nn.Module:
    """The model of a recipe, every parameter and floating-point buffer with a value of its own."""
    model = instantiate(compose([f"experiment={experiment}"]).paper.model, path="paper.model")
    assert isinstance(model, nn.Module)
    for value in model.state_dict().values():
        if value.is_floating_point():
            value.normal_()
    return model


def save_checkpoint(path: Path, model: nn.Module, /, **states: Mapping[str, Tensor]) -> Path:
    """A whole checkpoint: `states`, and beside them what training a copy of `model` would leave.

    The rate is a NumPy number, as it is where a script reads it from an array; so are some arguments.
    """
    model = copy.deepcopy(model)
    rate = np.linspace(1e-3, 0, 5)[1]
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 10)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    beside = {
        "optimizer": optimizer.state_dict(),
        "lr_scheduler": schedule.state_dict(),
        "epoch": 3,
        "arch": "resnet50",
        "args": Namespace(lr=rate, lr_drop=np.int64(40), output_dir="", crops=(0.4, 1.0), dist=Namespace(rank=0)),
        "ibot_loss": {"center": torch.zeros(1, 8), "center2": torch.zeros(1, 1, 8)},
        "fp16_scaler": None,
    }
    torch.save({**states, **beside}, path)
    return path


def import_command(experiment: str, source: Path) -> tuple[int, Path]:
    """The exit code of `reprise weights import`, and the file that it writes."""
    target = source.with_name(f"{source.name}.safetensors")
    return main(["weights", "import", f"experiment={experiment}", f"src={source}", f"out={target}"]), target


def imported(experiment: str, source: Path) -> dict[str, Tensor]:
    """What the command makes of a file."""
    code, target = import_command(experiment, source)
    assert code == 0
    return load_file(target)


def assert_equal(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    """The same names and the same values."""
    assert found.keys() == wanted.keys()
    assert not [name for name, value in wanted.items() if not torch.equal(found[name], value)]
