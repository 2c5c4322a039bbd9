"""Official weights: every format is read as plain tensors, code in a file is refused, leftovers are named."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from reprise.cli import main
from reprise.config import compose
from reprise.errors import CheckpointError
from reprise.training.run import build
from reprise.training.weights import read_weights

STATE = {"a.weight": torch.arange(6.0).reshape(2, 3), "b": torch.ones(2)}


@pytest.mark.parametrize("wrap", [None, "model", "state_dict"])
def test_pth_files(tmp_path: Path, wrap: str | None) -> None:
    path = tmp_path / "w.pth"
    torch.save({wrap: STATE, "epoch": 3} if wrap else STATE, path)
    assert all(torch.equal(value, STATE[name]) for name, value in read_weights(path).items())


def test_npz_and_safetensors(tmp_path: Path) -> None:
    np.savez(tmp_path / "w.npz", **{name: value.numpy() for name, value in STATE.items()})
    save_file(STATE, tmp_path / "w.safetensors")
    for name in ("w.npz", "w.safetensors"):
        assert read_weights(tmp_path / name).keys() == STATE.keys()


class Malicious:
    def __reduce__(self) -> tuple[object, ...]:
        return (os.mkdir, ("executed",))


@pytest.mark.parametrize("name", ["w.pth", "w.npz"])
def test_files_with_code_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / name
    if name.endswith(".npz"):
        np.savez(path, a=np.array([Malicious()], dtype=object))
    else:
        path.write_bytes(pickle.dumps({"a": Malicious()}))
    with pytest.raises(CheckpointError, match="cannot be read as plain tensors"):
        read_weights(path)
    assert not (tmp_path / "executed").exists()


def test_missing_and_truncated_files(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not exist"):
        read_weights(tmp_path / "nothing.pth")
    torch.save(STATE, tmp_path / "w.pth")
    content = (tmp_path / "w.pth").read_bytes()
    (tmp_path / "w.pth").write_bytes(content[: len(content) // 2])
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_weights(tmp_path / "w.pth")


def test_the_command_imports_and_names_what_is_left_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = build(compose(["experiment=fedntd/paper"])).module.model
    assert isinstance(model, torch.nn.Module)
    state = {name: torch.randn_like(value) for name, value in model.state_dict().items()}
    source, target = tmp_path / "model.pth", tmp_path / "out.safetensors"
    torch.save(state, source)
    command = ["weights", "import", "experiment=fedntd/paper", f"src={source}", f"out={target}"]
    assert main(command) == 0
    assert load_file(target).keys() == model.state_dict().keys()
    torch.save({**state, "surplus": torch.zeros(1)}, source)
    capsys.readouterr()
    assert main(command) == 1
    assert "surplus" in capsys.readouterr().err
