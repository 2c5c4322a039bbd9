"""The array cache: made once, safe between processes, re-made when damaged."""

from __future__ import annotations

import multiprocessing
import os
from pathlib import Path

import numpy as np
import pytest

from reprise.data.cache import Arrays, cached_arrays
from reprise.errors import DataError


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("REPRISE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


class Builder:
    def __init__(self) -> None:
        self.calls = 0

    def __call__(self) -> Arrays:
        self.calls += 1
        return {"a": np.arange(1000), "b": np.ones((3, 4), np.uint8)}


def test_arrays_are_built_once_for_each_key():
    build = Builder()
    for _ in range(3):
        arrays = cached_arrays("things", {"x": 1}, build)
    assert build.calls == 1
    assert isinstance(arrays["a"], np.memmap)
    assert arrays["a"].tolist() == list(range(1000))
    cached_arrays("things", {"x": 2}, build)
    assert build.calls == 2


@pytest.mark.parametrize("damage", ["truncated", "changed", "missing", "manifest"])
def test_a_damaged_cache_is_made_again(own_cache: Path, damage: str):
    build = Builder()
    cached_arrays("things", {"x": 1}, build)
    (file,) = own_cache.rglob("a.npy")
    if damage == "truncated":
        os.truncate(file, 400)
    elif damage == "changed":
        content = bytearray(file.read_bytes())
        content[600] ^= 1
        file.write_bytes(content)
    elif damage == "missing":
        file.unlink()
    else:
        (file.parent / "manifest.json").write_text("{")
    assert cached_arrays("things", {"x": 1}, build)["a"].tolist() == list(range(1000))
    assert build.calls == 2


def test_writing_to_the_arrays_does_not_change_the_cache():
    build = Builder()
    cached_arrays("things", {}, build)["a"][0] = 99
    assert cached_arrays("things", {}, build)["a"][0] == 0


def test_a_failed_build_leaves_nothing_behind(own_cache: Path):
    def fail() -> Arrays:
        raise DataError("no data")

    with pytest.raises(DataError, match="no data"):
        cached_arrays("things", {}, fail)
    assert not list(own_cache.rglob("*.npy"))
    assert cached_arrays("things", {}, Builder())["b"].shape == (3, 4)


def test_a_cache_that_cannot_be_written_is_a_data_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("REPRISE_CACHE", str(tmp_path / "file"))
    with pytest.raises(DataError, match="REPRISE_CACHE"):
        cached_arrays("things", {}, Builder())


def _build_and_count(folder: str) -> int:
    def build() -> Arrays:
        with (Path(folder) / "builds").open("a") as file:
            file.write("x")
        return {"a": np.arange(200_000)}

    return int(cached_arrays("shared", {"k": 1}, build)["a"].sum())


def test_processes_that_ask_at_once_build_once(tmp_path: Path):
    with multiprocessing.get_context("fork").Pool(4) as pool:
        sums = pool.map(_build_and_count, [str(tmp_path)] * 8)
    assert set(sums) == {199_999 * 200_000 // 2}
    assert (tmp_path / "builds").read_text() == "x"
