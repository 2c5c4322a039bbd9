"""Checkpoints: the newest complete one is found, foreign ones are refused, nothing in them is executed."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import pytest
import torch

from reprise.errors import CheckpointError
from reprise.training.checkpoint import FORMAT, AtomicCheckpointIO, ExactCheckpoint, newest_checkpoint

IDENTITY = {"paper": "demo", "config_hash": "abc"}


def write(folder: Path, step: int, **changes: str) -> Path:
    path = folder / f"step={step:09d}.ckpt"
    AtomicCheckpointIO().save_checkpoint({"reprise": {"format": FORMAT, "step": step, **IDENTITY, **changes}}, path)
    return path


def test_the_newest_complete_one_is_found(tmp_path: Path) -> None:
    write(tmp_path, 5)
    good = write(tmp_path, 10)
    newest = write(tmp_path, 15)
    newest.write_bytes(newest.read_bytes()[:-40])
    assert newest_checkpoint(tmp_path, IDENTITY) == (good, 10)


def test_a_wrong_bit_is_seen(tmp_path: Path) -> None:
    good = write(tmp_path, 5)
    path = tmp_path / "step=000000010.ckpt"
    weights = {"state_dict": {"w": torch.ones(1000)}, "reprise": {"format": FORMAT, "step": 10, **IDENTITY}}
    AtomicCheckpointIO().save_checkpoint(weights, path)
    assert newest_checkpoint(tmp_path, IDENTITY) == (path, 10)
    content = bytearray(path.read_bytes())
    content[content.index(b"\x00\x00\x80\x3f" * 8) + 2] ^= 1
    path.write_bytes(content)
    assert newest_checkpoint(tmp_path, IDENTITY) == (good, 5)


def test_damaged_later_files_do_not_count(tmp_path: Path) -> None:
    keeper = ExactCheckpoint(keep=2)
    keeper.folder = tmp_path
    for step in (5, 10, 15, 20):
        write(tmp_path, step)
    (tmp_path / ".step=000000020.ckpt.99999999").write_bytes(b"half, and its writer is dead")
    living = tmp_path / f".step=000000020.ckpt.{os.getppid()}"
    living.write_bytes(b"being written")
    keeper._tidy(tmp_path / "step=000000015.ckpt")
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        living.name,
        "step=000000010.ckpt",
        "step=000000015.ckpt",
    ]


def test_none_in_an_empty_folder(tmp_path: Path) -> None:
    assert newest_checkpoint(tmp_path, IDENTITY) is None


def test_another_paper_is_refused(tmp_path: Path) -> None:
    write(tmp_path, 5, paper="other")
    with pytest.raises(CheckpointError, match="paper=other"):
        newest_checkpoint(tmp_path, IDENTITY)


def test_a_foreign_file_is_refused(tmp_path: Path) -> None:
    torch.save({"state_dict": {}}, tmp_path / "step=000000001.ckpt")
    with pytest.raises(CheckpointError, match="not a checkpoint of reprise"):
        newest_checkpoint(tmp_path, IDENTITY)


class Malicious:
    def __reduce__(self) -> tuple[object, ...]:
        return (os.mkdir, ("executed",))


def test_code_in_a_checkpoint_is_not_executed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"reprise": Malicious()}, tmp_path / "step=000000002.ckpt")
    (tmp_path / "step=000000003.ckpt").write_bytes(pickle.dumps(Malicious()))
    write(tmp_path, 1)
    found = newest_checkpoint_or_none(tmp_path)
    assert not (tmp_path / "executed").exists()
    assert found == 1


def newest_checkpoint_or_none(folder: Path) -> int | None:
    found = newest_checkpoint(folder, IDENTITY)
    return found[1] if found else None


def test_a_failed_write_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(CheckpointError, match="No space left"):
        write(tmp_path, 1)
    assert list(tmp_path.iterdir()) == []
