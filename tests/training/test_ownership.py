"""One writer per run folder, and no process that outlives whoever started it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from reprise.errors import RunInUseError
from reprise.training import ownership
from reprise.training.ownership import is_alive, only_writer

HOLDS = """
import sys, time
from pathlib import Path
from reprise.training.ownership import only_writer
with only_writer(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""
# Starts a child that ends with it, says the child's number and waits to be killed.
STARTS_A_CHILD = """
import os, subprocess, sys, time
code = "import sys, time; from reprise.training.ownership import end_with; end_with(int(sys.argv[1])); "
code += "print('watching', flush=True); time.sleep(600)"
child = subprocess.Popen([sys.executable, "-c", code, str(os.getpid())], stdout=subprocess.PIPE, start_new_session=True)
child.stdout.readline()
print(child.pid, flush=True)
time.sleep(600)
"""


def start(program: str, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-c", program, *arguments], stdout=subprocess.PIPE, text=True)


def line_of(child: subprocess.Popen[str]) -> str:
    assert child.stdout is not None
    return child.stdout.readline().strip()


def test_a_second_writer_is_told_who_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ownership, "WAIT_SECONDS", 0.2)
    holder = start(HOLDS, str(tmp_path / "seed=0"))
    try:
        assert line_of(holder) == "held"
        message = f"process {holder.pid} on .* is running this run already"
        with pytest.raises(RunInUseError, match=message) as refused, only_writer(tmp_path / "seed=0"):
            pass
        assert f"`kill {holder.pid}`" in str(refused.value)
        with only_writer(tmp_path / "seed=1"):
            pass
    finally:
        holder.kill()
        holder.wait()
    with only_writer(tmp_path / "seed=0"):
        pass


def test_a_writer_that_ends_soon_is_waited_for(tmp_path: Path) -> None:
    holder = start(HOLDS, str(tmp_path / "seed=0"))
    assert line_of(holder) == "held"
    subprocess.Popen(["sh", "-c", f"sleep 0.3; kill -9 {holder.pid}"])
    with only_writer(tmp_path / "seed=0"):
        assert holder.wait(10) == -signal.SIGKILL


def test_a_child_ends_with_the_parent_that_is_killed() -> None:
    parent = start(STARTS_A_CHILD)
    child = int(line_of(parent))
    assert is_alive(child)
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 20
    while is_alive(child):
        assert time.monotonic() < deadline, "the child lives on"
        time.sleep(0.05)


def test_a_process_that_nobody_collects_is_not_alive() -> None:
    child = subprocess.Popen(["true"])
    deadline = time.monotonic() + 10
    while is_alive(child.pid) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not is_alive(child.pid)
    child.wait()
    assert is_alive(os.getpid())
