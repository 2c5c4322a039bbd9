"""The registry: what it lists, checks and fetches (from a server of our own)."""

from __future__ import annotations

import hashlib
import http.server
import io
import os
import tarfile
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from reprise import paths
from reprise.data import checks, registry
from reprise.data.catalogue import DataEntry
from reprise.data.download import Download, obtain, tree_digest
from reprise.errors import ConfigError, DataError


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("REPRISE_DATA", str(tmp_path / "data"))
    return tmp_path / "data"


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def server(tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """A web server over a folder: (address, folder)."""
    folder = tmp_path / "www"
    folder.mkdir()
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder))) as service:
        threading.Thread(target=service.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{service.server_address[1]}", folder
        service.shutdown()


def sha(path: Path) -> str:
    return f"sha256:{hashlib.sha256(path.read_bytes()).hexdigest()}"


def archive(path: Path, name: str, content: bytes) -> Path:
    with tarfile.open(path, "w:gz") as package:
        member = tarfile.TarInfo(name)
        member.size = len(content)
        package.addfile(member, io.BytesIO(content))
    return path


def test_every_data_set_of_the_configuration_is_listed():
    known = set(registry.entries())
    assert {"cifar10", "bccd", "multi30k", "clinc150", "cora", "wn18rr", "kinship", "omniglot", "noto_emoji"} <= known
    assert {"tiny_shakespeare", "digits", "shapes", "imagenet", "coco"} <= known
    for path in (paths.conf_dir() / "data").glob("*.yaml"):
        assert any(name in path.stem for name in known), path


@pytest.mark.parametrize("name", registry.entries())
def test_entries_are_complete_and_check_on_an_empty_root(root: Path, name: str):
    entry = registry.entry(name)
    assert all((entry.what, entry.size, entry.licence, entry.source, entry.layout))
    assert entry.built_in or entry.downloads or entry.instructions
    for part in entry.downloads:
        assert part.checksum or part.tree
    report = registry.check(name)
    assert report.state == ("ok" if entry.built_in else "missing")
    assert entry.built_in or report.next_step


@pytest.mark.parametrize("name", [name for name, entry in registry.entries().items() if not entry.built_in])
def test_what_is_there_is_whole(name: str):
    if not os.environ.get("REPRISE_DATA"):
        pytest.skip("REPRISE_DATA is not set")
    report = registry.check(name)
    if report.state == "missing":
        pytest.skip(f"{name} is not below REPRISE_DATA")
    assert report.state == "ok", report.problem


def test_unknown_names(root: Path):
    for action in (registry.check, registry.fetch):
        with pytest.raises(ConfigError, match="cifar100"):
            action("cifar100")


def test_data_without_downloads_gives_the_instructions(root: Path):
    with pytest.raises(DataError, match=r"image-net\.org"):
        registry.fetch("imagenet")


def test_built_in_data_needs_no_fetching(root: Path):
    assert registry.fetch("digits").state == "ok"


def test_damaged_text_is_noticed(root: Path):
    (root / "wn18rr").mkdir(parents=True)
    (root / "wn18rr" / "train.txt").write_text("a\tb\tc\n")
    report = registry.check("wn18rr")
    assert (report.state, report.next_step) == ("damaged", "reprise data fetch wn18rr")
    (root / "tiny_shakespeare").mkdir()
    (root / "tiny_shakespeare" / "input.txt").write_text("To be")
    assert "not the published file" in (registry.check("tiny_shakespeare").problem or "")


def fake_entry(monkeypatch: pytest.MonkeyPatch, *downloads: Download) -> None:
    check = checks.file_counts("toy", {"*.txt": 1})
    entry = DataEntry("toy", "w", "s", "l", "src", "toy/*.txt", check, downloads=downloads)
    monkeypatch.setattr(registry, "ENTRIES", (*registry.ENTRIES, entry))


def test_fetching_files_and_archives(root: Path, server: tuple[str, Path], monkeypatch: pytest.MonkeyPatch):
    address, folder = server
    package = archive(folder / "toy.tar.gz", "toy-1/inner/a.txt", b"hello")
    fake_entry(monkeypatch, Download(f"{address}/toy.tar.gz", sha(package), place="toy", member="toy-1/inner"))
    assert registry.check("toy").state == "missing"
    assert registry.fetch("toy").state == "ok"
    assert (root / "toy" / "a.txt").read_text() == "hello"
    package.unlink()
    assert registry.fetch("toy").state == "ok"  # there already: nothing is downloaded
    (folder / "b.txt").write_text("plain")
    obtain(Download(f"{address}/b.txt", sha(folder / "b.txt"), place="toy/sub/b.txt"), root)
    assert (root / "toy" / "sub" / "b.txt").read_text() == "plain"
    assert sorted(path.name for path in root.iterdir()) == ["toy"]


def test_fetching_repairs_damaged_data(root: Path, server: tuple[str, Path], monkeypatch: pytest.MonkeyPatch):
    address, folder = server
    package = archive(folder / "toy.tar.gz", "a.txt", b"hello")
    fake_entry(monkeypatch, Download(f"{address}/toy.tar.gz", sha(package), place="toy", member=""))
    (root / "toy").mkdir(parents=True)
    (root / "toy" / "a.txt").write_text("")
    assert registry.check("toy").state == "damaged"
    assert registry.fetch("toy").state == "ok"


@pytest.mark.parametrize("fault", ["checksum", "missing", "refused", "folder", "tree"])
def test_failed_fetches_leave_nothing(root: Path, server: tuple[str, Path], fault: str):
    address, folder = server
    good = sha(archive(folder / "toy.tar.gz", "inner/a.txt", b"hello"))
    parts = {
        "checksum": Download(f"{address}/toy.tar.gz", "sha256:" + "0" * 64, "toy", "inner"),
        "missing": Download(f"{address}/other.tar.gz", good, "toy", "inner"),
        "refused": Download("http://127.0.0.1:9/toy.tar.gz", good, "toy", "inner"),
        "folder": Download(f"{address}/toy.tar.gz", good, "toy", "elsewhere"),
        "tree": Download(f"{address}/toy.tar.gz", None, "toy", "inner", tree="0" * 64),
    }
    with pytest.raises(DataError):
        obtain(parts[fault], root)
    assert not list(root.iterdir())


def test_a_tree_digest_sees_names_and_contents(tmp_path: Path):
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "a").write_text("1")
    first = tree_digest(tmp_path)
    (tmp_path / "d" / "a").rename(tmp_path / "d" / "b")
    second = tree_digest(tmp_path)
    (tmp_path / "d" / "b").write_text("2")
    assert len({first, second, tree_digest(tmp_path)}) == 3


def test_a_root_that_cannot_be_written(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="REPRISE_DATA"):
        obtain(Download("http://127.0.0.1:9/x", None, "x"), tmp_path / "file" / "root")
