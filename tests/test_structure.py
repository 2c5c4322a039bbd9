"""The house: import directions, standard file names, no central lists, no product file that names a workplace."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from reprise import discovery, paths

SOURCE = paths.root() / "src" / "reprise"
FILES = sorted(SOURCE.rglob("*.py"))
LEAVES = {"errors", "paths", "seeding", "distributed", "golden"}
STANDARD = {"__init__", "module", "model", "criterion", "parity", "pictures"}


def imports_of(path: Path) -> set[str]:
    """Every module name that a file imports."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return {name for name in names if name.startswith("reprise")}


def room_of(path: Path) -> tuple[str, ...]:
    return path.relative_to(SOURCE).with_suffix("").parts


def test_files_were_found() -> None:
    assert len(FILES) > 60


@pytest.mark.parametrize("path", FILES, ids=lambda path: "/".join(room_of(path)))
def test_imports_point_one_way(path: Path) -> None:
    room, imported = room_of(path), imports_of(path)
    assert not any(name.startswith("reprise.cli") for name in imported)
    if room[0] == "papers" and len(room) > 2:
        others = {name for name in imported if name.startswith("reprise.papers.")}
        assert all(name.startswith(f"reprise.papers.{room[1]}") for name in others), "a paper imports another paper"
        assert not any(name.startswith("reprise.evidence") for name in imported)
    elif room[0] in ("nn", "data", "training"):
        assert not any(name.startswith("reprise.papers") for name in imported)
    elif room[0] == "evidence":
        assert not any(name.startswith("reprise.papers.") for name in imported)
    if room[0] in ("nn", "data"):
        assert not any(name.startswith(("reprise.training", "reprise.evidence")) for name in imported)
    if room[0] in LEAVES:
        assert {name.split(".")[1] for name in imported if "." in name} <= LEAVES


@pytest.mark.parametrize("slug", discovery.papers())
def test_paper_has_the_standard_files(slug: str) -> None:
    present = {path.stem for path in (SOURCE / "papers" / slug).glob("*.py")}
    assert present >= STANDARD
    assert (paths.conf_dir() / "paper" / f"{slug}.yaml").exists()
    assert {"small"} <= set(discovery.recipes(slug))


def test_no_file_lists_the_papers() -> None:
    for path in FILES:
        if room_of(path)[0] == "papers":
            continue
        words = set(re.findall(r"['\"]([a-z0-9_]+)['\"]", path.read_text()))
        assert len(words & set(discovery.papers())) < 2, f"{path} names several papers"


def test_product_files_name_no_workplace() -> None:
    tracked = subprocess.run(["git", "ls-files"], cwd=paths.root(), capture_output=True, text=True)
    names = tracked.stdout.split() or [str(path.relative_to(paths.root())) for path in FILES]
    needle = "/work/" + "shared"
    for name in names:
        path = paths.root() / name
        if path.is_file() and path.suffix in (".py", ".yaml", ".md", ".toml", ".sh", ""):
            assert needle not in path.read_text(errors="ignore"), name


def project() -> dict[str, Any]:
    """The table `project` of pyproject.toml."""
    return tomllib.loads((paths.root() / "pyproject.toml").read_text())["project"]


def extras_in(text: str) -> list[set[str]]:
    """The extras of every `-e .[...]` in a file."""
    return [set(found.split(",")) for found in re.findall(r"-e '?\.\[([^\]]*)\]", text)]


def lowest_python() -> tuple[int, int]:
    """What pyproject.toml requires, e.g. (3, 11)."""
    found = re.fullmatch(r">=(\d+)\.(\d+)", project()["requires-python"])
    assert found is not None
    return int(found[1]), int(found[2])


def test_environment_yml_is_in_step() -> None:
    text, makefile = ((paths.root() / name).read_text() for name in ("environment.yml", "Makefile"))
    dependencies = yaml.safe_load(text)["dependencies"]
    pip = next(item["pip"] for item in dependencies if isinstance(item, dict))
    assert len(pip) == 2, "dependencies come from pyproject alone"
    assert "-c constraints.txt" in pip
    assert extras_in(text) == extras_in(makefile), "`make setup` and conda install the same extras"
    (extras,) = extras_in(text)
    assert extras == set(project()["optional-dependencies"]), "all extras, so that no test is skipped for one"
    pythons = [item for item in dependencies if str(item).startswith("python")]
    assert pythons == ["python={}.{}".format(*lowest_python())]


def test_the_lowest_python_is_the_same_everywhere() -> None:
    configured = tomllib.loads((paths.root() / "pyproject.toml").read_text())["tool"]["mypy"]["python_version"]
    makefile = (paths.root() / "Makefile").read_text()
    asked = re.findall(r"sys\.version_info < \((\d+), (\d+)\)", makefile)
    assert [tuple(map(int, found)) for found in asked] == [lowest_python()]
    assert tuple(map(int, configured.split("."))) == lowest_python()


def test_constraints_pin_every_dependency() -> None:
    declared = project()
    wanted = declared["dependencies"] + [item for group in declared["optional-dependencies"].values() for item in group]
    lines = (paths.root() / "constraints.txt").read_text().splitlines()
    pinned = {line.split("==")[0].lower().replace("_", "-") for line in lines if "==" in line}
    names = {re.split(r"[<>=\[; ]", item)[0].lower().replace("_", "-") for item in wanted}
    assert names <= pinned, names - pinned


@pytest.mark.parametrize("command", [["--help"], ["papers", "--help"]])
def test_help_does_not_import_torch(command: list[str]) -> None:
    code = (
        "import sys; from reprise.cli import main\n"
        f"try: main({command!r})\n"
        "except SystemExit: pass\n"
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_papers_table_does_not_import_torch() -> None:
    code = "import sys; from reprise.cli import main; main(['papers', '--json']); assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
