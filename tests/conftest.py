"""What all tests share: one thread, run folders and caches of their own, and where optional data is."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from joblib.externals.loky import reusable_executor

from reprise.seeding import seed_all

os.environ.setdefault("OMP_NUM_THREADS", "1")
pytest_plugins = ["tests.records"]


@pytest.fixture(autouse=True)
def own_folders(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run folders never mix with the user's; the cache is shared by the tests of a session."""
    monkeypatch.setenv("REPRISE_RUNS", str(tmp_path_factory.mktemp("runs")))
    cache = tmp_path_factory.getbasetemp() / "cache"
    monkeypatch.setenv("REPRISE_CACHE", os.environ.get("REPRISE_TEST_CACHE", str(cache)))


@pytest.fixture(autouse=True)
def same_random_numbers() -> None:
    """A test draws the same numbers whatever ran before it, in whichever process."""
    seed_all(0, "test")


@pytest.fixture(autouse=True)
def no_pool_of_another_test() -> Iterator[None]:
    """A sweep keeps its processes for the next one, with the environment they began with: the last test's folders."""
    yield
    if reusable_executor._executor is not None:
        reusable_executor._executor.shutdown(kill_workers=True)


@pytest.fixture
def goldens() -> Path:
    """The folder of golden cases, from REPRISE_GOLDENS."""
    folder = os.environ.get("REPRISE_GOLDENS")
    if not folder:
        pytest.skip("REPRISE_GOLDENS is not set: no golden cases of official code at hand")
    return Path(folder)
