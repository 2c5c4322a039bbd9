"""Unpacking: plain archives arrive whole, hostile and damaged ones leave nothing."""

from __future__ import annotations

import io
import os
import tarfile
import zipfile
from pathlib import Path

import pytest

from reprise.data.archives import safe_extract
from reprise.errors import DataError


def tar(path: Path, *members: tuple[tarfile.TarInfo, bytes], mode: str = "w:gz") -> Path:
    with tarfile.open(path, mode) as package:
        for info, content in members:
            info.size = len(content)
            package.addfile(info, io.BytesIO(content))
    return path


def info(name: str, kind: bytes = tarfile.REGTYPE, link: str = "") -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, link
    return member


@pytest.mark.parametrize("mode", ["w", "w:gz", "w:bz2", "w:xz"])
def test_plain_tars(tmp_path: Path, mode: str):
    archive = tar(
        tmp_path / "a.tar", (info("d/x.txt"), b"one"), (info("d/e/y.txt"), b"two"), (info("z"), b""), mode=mode
    )
    out = tmp_path / "out"
    assert safe_extract(archive, out) == [out / "d", out / "z"]
    assert (out / "d" / "e" / "y.txt").read_bytes() == b"two"
    assert sorted(path.name for path in out.iterdir()) == ["d", "z"]


def test_plain_zips_and_merging(tmp_path: Path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_DEFLATED) as package:
        package.writestr("d/x.txt", "new")
        package.writestr("d/", "")
    (tmp_path / "out" / "d").mkdir(parents=True)
    (tmp_path / "out" / "d" / "x.txt").write_text("old")
    (tmp_path / "out" / "d" / "kept.txt").write_text("kept")
    safe_extract(tmp_path / "a.zip", tmp_path / "out")
    assert (tmp_path / "out" / "d" / "x.txt").read_text() == "new"
    assert (tmp_path / "out" / "d" / "kept.txt").read_text() == "kept"


HOSTILE = {
    "parent": info("../evil"),
    "hidden parent": info("d/../../evil"),
    "absolute": info("/tmp/reprise-evil"),
    "backslash": info("d\\..\\evil"),
    "drive": info("c:evil"),
    "symbolic link": info("link", tarfile.SYMTYPE, "/etc"),
    "hard link": info("link", tarfile.LNKTYPE, "/etc/passwd"),
    "device": info("null", tarfile.CHRTYPE),
    "pipe": info("pipe", tarfile.FIFOTYPE),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_tars_leave_nothing(tmp_path: Path, name: str):
    archive = tar(tmp_path / "a.tar.gz", (info("good.txt"), b"good"), (HOSTILE[name], b""))
    with pytest.raises(DataError, match=r"unsafe path|not a file or folder"):
        safe_extract(archive, tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())
    assert not (tmp_path / "evil").exists()


@pytest.mark.parametrize("name", ["../evil", "/tmp/reprise-evil", "a/../../evil"])
def test_hostile_zips_leave_nothing(tmp_path: Path, name: str):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as package:
        package.writestr("good.txt", "good")
        package.writestr(name, "evil")
    with pytest.raises(DataError, match="unsafe path"):
        safe_extract(tmp_path / "a.zip", tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())


def test_links_in_zips_are_refused(tmp_path: Path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as package:
        link = zipfile.ZipInfo("link")
        link.external_attr = 0o120777 << 16
        package.writestr(link, "/etc/passwd")
    with pytest.raises(DataError, match="not a file or folder"):
        safe_extract(tmp_path / "a.zip", tmp_path / "out")


def test_limits(tmp_path: Path):
    archive = tar(tmp_path / "a.tar.gz", *((info(f"f{k}"), b"x" * 1000) for k in range(5)))
    with pytest.raises(DataError, match="more than 4 files"):
        safe_extract(archive, tmp_path / "out", max_files=4)
    with pytest.raises(DataError, match="more than"):
        safe_extract(archive, tmp_path / "out", max_bytes=4999)
    assert len(safe_extract(archive, tmp_path / "out", max_files=5, max_bytes=5000)) == 5


def test_a_bomb_is_stopped(tmp_path: Path):
    archive = tar(tmp_path / "a.tar.gz", (info("zeros"), bytes(100 << 20)))
    assert archive.stat().st_size < 200_000
    with pytest.raises(DataError, match="unpacks to more than"):
        safe_extract(archive, tmp_path / "out")


@pytest.mark.parametrize("keep", [0, 5, 100, 3000])
def test_truncated_archives(tmp_path: Path, keep: int):
    archive = tar(tmp_path / "a.tar.gz", (info("noise"), os.urandom(5000)))
    os.truncate(archive, keep)
    with pytest.raises(DataError):
        safe_extract(archive, tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())


def test_a_damaged_zip(tmp_path: Path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_DEFLATED) as package:
        package.writestr("x", os.urandom(2000))
    content = bytearray((tmp_path / "a.zip").read_bytes())
    content[500] ^= 0xFF
    (tmp_path / "a.zip").write_bytes(content)
    with pytest.raises(DataError):
        safe_extract(tmp_path / "a.zip", tmp_path / "out")
