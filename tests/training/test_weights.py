"""Official weights: every format is read as plain tensors, code in a file is refused, leftovers are named."""

from __future__ import annotations

import argparse
import os
import pickle
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from reprise.cli import main
from reprise.config import compose
from reprise.errors import CheckpointError
from reprise.training.run import build
from reprise.training.weights import find_weights, read_weights

STATE = {"a.weight": torch.arange(6.0).reshape(2, 3), "b": torch.ones(2)}


@pytest.mark.parametrize("wrap", [None, "model", "state_dict"])
def test_pth_files(tmp_path: Path, wrap: str | None) -> None:
    path = tmp_path / "w.pth"
    torch.save({wrap: STATE, "epoch": 3} if wrap else STATE, path)
    assert all(torch.equal(value, STATE[name]) for name, value in read_weights(path).items())


def test_weights_are_found_by_path_and_below_the_data_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REPRISE_DATA", str(tmp_path / "data"))
    own, shared = tmp_path / "own.npz", tmp_path / "data" / "toy" / "shared.npz"
    shared.parent.mkdir(parents=True)
    for file in (own, shared):
        file.write_bytes(b"")
    assert find_weights(str(own), "toy", next_step="bring it") == own
    assert find_weights("shared.npz", "toy", next_step="bring it") == shared
    with pytest.raises(CheckpointError, match=r"'absent\.npz' do not exist") as error:
        find_weights("absent.npz", "toy", next_step="bring it")
    assert str(shared.parent / "absent.npz") in str(error.value)
    assert "bring it" in str(error.value)


def test_npz_and_safetensors(tmp_path: Path) -> None:
    np.savez(tmp_path / "w.npz", **{name: value.numpy() for name, value in STATE.items()})
    save_file(STATE, tmp_path / "w.safetensors")
    for name in ("w.npz", "w.safetensors"):
        assert read_weights(tmp_path / name).keys() == STATE.keys()


@pytest.mark.parametrize("zipped", [True, False])
def test_what_training_scripts_save_beside_the_weights(tmp_path: Path, zipped: bool) -> None:
    state = OrderedDict((f"module.{name}", value) for name, value in STATE.items())
    beside = {"args": argparse.Namespace(lr=0.1, seed=np.int64(3)), "optimizer": {"lr": np.float64(0.1)}, "epoch": 3}
    torch.save(
        {**beside, "student": state, "model": state}, tmp_path / "w.pth.tar", _use_new_zipfile_serialization=zipped
    )
    for keys in ((), ("teacher", "student")):
        assert read_weights(tmp_path / "w.pth.tar", keys).keys() == STATE.keys()


def test_a_papers_own_keys_come_first_and_a_file_without_any_is_described(tmp_path: Path) -> None:
    torch.save({"student": STATE, "model": {"c": torch.ones(1)}, "epoch": 3}, tmp_path / "w.pth")
    assert read_weights(tmp_path / "w.pth", ("teacher", "student")).keys() == STATE.keys()
    assert read_weights(tmp_path / "w.pth").keys() == {"c"}
    torch.save({"student": STATE, "epoch": 3}, tmp_path / "w.pth")
    with pytest.raises(
        CheckpointError, match="no state dict of tensors, but a dictionary with the keys student, epoch"
    ):
        read_weights(tmp_path / "w.pth")
    torch.save([1, 2], tmp_path / "w.pth")
    with pytest.raises(CheckpointError, match="but one list"):
        read_weights(tmp_path / "w.pth")


class Malicious:
    def __reduce__(self) -> tuple[object, ...]:
        return (os.mkdir, ("executed",))


class OnArrival:
    """Would run code as NumPy rebuilds an array of objects, or as an allowed object takes its state."""

    def __init__(self, build: Callable[..., object]) -> None:
        self.build = build

    def __reduce__(self) -> tuple[object, ...]:
        return (self.build, (), {"state": Malicious()})


@pytest.mark.parametrize(
    "hidden",
    [
        pytest.param(Malicious(), id="bare"),
        pytest.param(argparse.Namespace(lr=Malicious()), id="in the arguments"),
        pytest.param(OnArrival(argparse.Namespace), id="as the state of the arguments"),
        pytest.param(np.array([Malicious()], dtype=object), id="in an array of objects"),
    ],
)
@pytest.mark.parametrize("zipped", [True, False])
def test_code_beside_the_weights_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], hidden: object, zipped: bool
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"model": STATE, "args": hidden}, tmp_path / "w.pth", _use_new_zipfile_serialization=zipped)
    assert main(["weights", "import", "experiment=fedntd/small", "src=w.pth", "out=out.safetensors"]) == 1
    message = capsys.readouterr().err
    assert "which is refused" in message
    assert "weights_only" not in message
    assert sorted(path.name for path in tmp_path.iterdir()) == ["w.pth"]


def test_foreign_classes_are_refused_by_name(tmp_path: Path) -> None:
    torch.save({"model": STATE, "config": Path("somewhere")}, tmp_path / "w.pth")
    with pytest.raises(CheckpointError, match=r"it asks for pathlib\S*PosixPath, which is refused"):
        read_weights(tmp_path / "w.pth")
    torch.save(torch.nn.Linear(2, 2), tmp_path / "w.pth")
    with pytest.raises(CheckpointError, match=r"it asks for torch\.nn\.modules\.linear\.Linear, which is refused"):
        read_weights(tmp_path / "w.pth")


@pytest.mark.parametrize("content", [b"junk\n", bytes(1000)])
def test_what_is_no_weights_file_is_called_so(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "w.pth").write_bytes(content)
    with pytest.raises(
        CheckpointError, match=r"it is no PyTorch file \(neither a zip archive nor a pickle\)"
    ) as caught:
        read_weights(tmp_path / "w.pth")
    assert "weights_only" not in str(caught.value)


def test_a_damaged_pickle_is_not_explained_by_a_bare_number(tmp_path: Path) -> None:
    (tmp_path / "w.pth").write_bytes(b"\x80\x02h\x05.")
    with pytest.raises(CheckpointError, match=r"tensors: [A-Za-z]"):
        read_weights(tmp_path / "w.pth")


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
