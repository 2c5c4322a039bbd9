"""docs/bench.md: sections are added and replaced, and every script writes one."""

from __future__ import annotations

from pathlib import Path

import pytest

from reprise import paths
from reprise.evidence import benchmarks

SCRIPTS = sorted((paths.root() / "bench").glob("*.py"))


def test_a_section_is_added_and_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("REPRISE_ROOT", str(tmp_path))
    given: list[list[str]] = []

    def work(words: list[str]) -> None:
        given.append(words)
        print(f"ratio 1.0{len(given)}")

    benchmarks.run("bench/b.py", work, [])
    page = tmp_path / "docs" / "bench.md"
    assert not page.exists()
    for script in ("bench/b.py", "bench/a.py", "bench/b.py"):
        benchmarks.run(script, work, ["--write"])
    benchmarks.run("bench/b.py", work, ["experiment=x", "--write"])
    assert given == [[], [], [], [], ["experiment=x"]]
    text = page.read_text()
    heads = [line for line in text.splitlines() if line.startswith("## ")]
    assert heads == ["## `bench/a.py`", "## `bench/b.py`", "## `bench/b.py experiment=x`"]
    assert "ratio 1.02" not in text, "replaced"
    assert text.index("ratio 1.03") < text.index("ratio 1.04") < text.index("ratio 1.05")
    assert "cores" in text
    assert text.count("# Speed") == 1
    assert "ratio 1.01" in capsys.readouterr().out, "printed all the same"


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_every_script_writes_its_section(script: Path) -> None:
    assert "benchmarks.run(__file__, " in script.read_text()


def test_scripts_were_found() -> None:
    assert len(SCRIPTS) >= 4
