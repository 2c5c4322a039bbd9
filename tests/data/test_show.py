"""Contact sheets."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from PIL import Image

from reprise.cli import main
from reprise.data import registry
from reprise.data.show import contact_sheet
from reprise.errors import ConfigError, DataError


@pytest.mark.parametrize("name", ["digits", "shapes", "shapes_classification", "cifar10", "bccd"])
def test_sheets(tmp_path: Path, name: str):
    if name in ("cifar10", "bccd") and (not os.environ.get("REPRISE_DATA") or registry.check(name).state == "missing"):
        pytest.skip(f"{name} is not below REPRISE_DATA")
    path = contact_sheet(name, tmp_path / "sub" / "sheet.png", count=10, columns=4)
    with Image.open(path) as sheet:
        assert sheet.width > 300
        assert len(sheet.convert("RGB").getcolors(1 << 24) or []) > 50


def test_a_sheet_without_a_place_goes_to_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("REPRISE_CACHE", str(tmp_path / "cache"))
    assert main(["data", "show", "digits"]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "cache" / "pictures" / "digits.png")
    assert (tmp_path / "cache" / "pictures" / "digits.png").is_file()
    assert not list(tmp_path.glob("*.png"))


def test_what_cannot_be_shown_or_written(tmp_path: Path):
    with pytest.raises(ConfigError, match="cora"):
        contact_sheet("cora", tmp_path / "sheet.png")
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cannot be written"):
        contact_sheet("digits", tmp_path / "file" / "sheet.png")
