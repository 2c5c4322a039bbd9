"""docs/bench.md: what the scripts in `bench/` print, a section a script, with the date and the machine."""

from __future__ import annotations

import io
import re
import sys
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import TextIO

from reprise import paths
from reprise.evidence.files import write_text
from reprise.training.runfolder import git_commit, machine, now

HEAD = """# Speed

What `python bench/<name>.py --write` printed, the newest run of each script; `make bench` prints them all.
Ratios are measured in one process, in turns, so that they hold on a busy machine too; times hold for the machine named.
"""


class _Twice(io.StringIO):
    """Keeps what is printed, and prints it."""

    def __init__(self, screen: TextIO) -> None:
        super().__init__()
        self.screen = screen

    def write(self, text: str) -> int:
        self.screen.write(text)
        self.screen.flush()
        return super().write(text)


def run(script: str, work: Callable[[list[str]], None], argv: Sequence[str] | None = None) -> None:
    """Run a benchmark; with `--write` among its arguments what it prints becomes its section of the page.

    Args:
        script: the file of the benchmark.
        work: what measures and prints; gets the other arguments.
        argv: the command line, by default this process's.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    others = [word for word in words if word != "--write"]
    printed = _Twice(sys.stdout)
    with redirect_stdout(printed):
        work(others)
    if len(others) < len(words):
        print(write_section(" ".join([f"bench/{Path(script).name}", *others]), printed.getvalue()))


def write_section(command: str, printed: str) -> Path:
    """Add or replace the section of a command (`bench/data.py`), sorted by name; the path of the page."""
    page = paths.root() / "docs" / "bench.md"
    text = page.read_text(encoding="utf-8") if page.exists() else HEAD
    found = dict(re.findall(r"^## `([^`]*)`\n(.*?)(?=^## |\Z)", text, re.DOTALL | re.MULTILINE))
    here = machine()
    where = ", ".join([str(here["processor"]), f"{here['cores']} cores", *here["gpus"]])
    found[command] = f"\n{now()[:10]}, {where}, commit {git_commit()}.\n\n```text\n{printed.strip()}\n```\n"
    sections = [f"## `{name}`\n{found[name].rstrip()}\n" for name in sorted(found)]
    return write_text(page, "\n".join([HEAD, *sections]))
