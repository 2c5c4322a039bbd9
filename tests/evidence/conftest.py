"""A made-up paper and its run folders, so that the evidence layer is tested without training anything."""

from __future__ import annotations

import json
import math
import struct
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

import reprise.papers

SLUG = "toy_paper"
CLAIM: dict[str, Any] = {
    "statement": "One-to-one matching makes NMS unnecessary.",
    "arms": {
        "method": {"label": "Set prediction", "overrides": []},
        "control": {"label": "One-to-many <assignment>", "overrides": ["paper.criterion.assignment=one_to_many"]},
    },
    "primary": {
        "name": "NMS gain",
        "metric": "test/nms_gain",
        "plus": ["control"],
        "minus": ["method"],
        "direction": "higher",
        "margin": 0.02,
    },
    "secondary": [
        {
            "name": "AP without NMS",
            "metric": "test/ap",
            "plus": ["method"],
            "minus": ["control"],
            "direction": "higher",
        }
    ],
    "scales": {"small": {"seeds": [0, 1, 2, 3, 4]}, "public": {"seeds": [0, 1, 2, 3, 4], "margin": 0.01}},
    "tuning": "Learning rate chosen on seeds 100 to 102.",
}
CARD: dict[str, Any] = {
    "title": "Toys & Boxes",
    "authors": ["A. Author", "B. Author"],
    "venue": "ECCV",
    "year": 2020,
    "arxiv": "2005.12872",
    "family": "detection",
    "task": "object detection",
    "official_code": [{"repo": "someone/toys", "framework": "PyTorch", "licence": "Apache-2.0"}],
    "summary": "Detection as set prediction.",
    "implemented": ["matching", "set criterion"],
    "left_out": ["nothing"],
    "choices": ["seeds"],
    "small_leaves_out": ["pre-training", "COCO"],
    "discrepancies": [
        {
            "topic": "dropout",
            "paper": "0.1",
            "released": "0.0",
            "switch": "paper.as_released=true",
            "effect": "none seen",
        }
    ],
    "traps": [{"trap": "softmax over queries", "avoided_by": "a test"}],
    "sizes": [{"name": "base", "overrides": [], "parameters": 110, "flops": 100, "source": "Table 1"}],
    "hardware": {"published": "16 V100, 3 days", "here": "2 CPU cores, 8 minutes"},
    "recipe_sources": {"optimizer.lr": "Section 4"},
    "published": [
        {
            "dataset": "COCO val",
            "setting": "500 epochs",
            "metric": "AP",
            "baseline": 42.0,
            "method": "42.0",
            "source": "Table 1",
        }
    ],
    "normalisation": "layer norm; frozen batch norm in the backbone",
    "rank_exceptions": [],
    "data": {"small": "shapes", "public": "bccd", "paper": "COCO 2017"},
}


@dataclass
class Workshop:
    """A scratch project with one paper, and the tools to fill it."""

    root: Path
    runs: Path
    slug: str = SLUG

    @property
    def experiment(self) -> Path:
        return self.root / "experiments" / self.slug

    def write_claim(self, claim: dict[str, Any]) -> None:
        (self.experiment / "claim.yaml").write_text(yaml.safe_dump(claim, sort_keys=False))

    def write_card(self, card: dict[str, Any]) -> None:
        (self.experiment / "card.yaml").write_text(yaml.safe_dump(card, sort_keys=False))

    def run(
        self,
        arm: str,
        seed: int,
        metrics: dict[str, float],
        *,
        scale: str = "small",
        status: str = "finished",
        **info: Any,
    ) -> Path:
        """Write one run folder as the trainer would leave it."""
        folder = self.runs / self.slug / scale / arm / f"seed={seed}"
        (folder / "pictures").mkdir(parents=True)
        record = {
            "paper": self.slug,
            "scale": scale,
            "arm": arm,
            "seed": seed,
            "config_hash": f"{arm}{seed}",
            "status": status,
            "started": "2026-01-01T10:00:00+00:00",
            "finished": "2026-01-01T10:00:40+00:00",
            "seconds": 40.5,
            "git_commit": "0123456789abcdef",
            "versions": {"python": "3.11.9", "torch": "2.14.1"},
            "machine": {"cpu": "Some CPU", "cores": 2},
            "command": f"reprise train experiment={self.slug}/{scale} arm={arm} seed={seed}",
            "error": None,
        }
        (folder / "run.json").write_text(json.dumps(record | info))
        rows = ["step,metric,value"]
        for step in range(1, 201):
            rows.append(f"{step},train/loss,{math.exp(-step / 60) + 0.02 * math.sin(step + seed)}")
            if step % 20 == 0:
                rows.append(f"{step},val/ap,{1 - math.exp(-step / 80) + 0.01 * seed}")
        (folder / "metrics.csv").write_text("\n".join(rows) + "\n")
        if status == "finished":
            (folder / "summary.json").write_text(json.dumps({"metrics": metrics}))
        (folder / "pictures" / "boxes.png").write_bytes(tiny_png(seed))
        listing = [{"name": "boxes", "caption": f"Boxes of {arm} & friends", "file": "boxes.png"}]
        (folder / "pictures" / "pictures.json").write_text(json.dumps(listing))
        return folder

    def fill(self, gains: list[float], *, scale: str = "small") -> None:
        """Finished runs of both arms: the control's NMS gain exceeds the method's by `gains[seed]`."""
        for seed, gain in enumerate(gains):
            self.run("method", seed, {"test/nms_gain": 0.01 * seed, "test/ap": 0.5 + 0.01 * seed}, scale=scale)
            self.run("control", seed, {"test/nms_gain": 0.01 * seed + gain, "test/ap": 0.4}, scale=scale)


def tiny_png(shade: int, side: int = 48) -> bytes:
    """A valid grey PNG, by hand."""
    rows = b"".join(b"\0" + bytes((60 + 20 * shade + x) % 256 for x in range(side)) for _ in range(side))

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


@pytest.fixture
def workshop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Workshop:
    """A project root with the paper `toy_paper`, found by discovery for the length of a test."""
    code = tmp_path / "papers"
    (code / SLUG).mkdir(parents=True)
    (code / SLUG / "__init__.py").write_text('"""Toys."""\n')
    monkeypatch.setattr(reprise.papers, "__path__", [str(code)])
    monkeypatch.setenv("REPRISE_ROOT", str(tmp_path / "root"))
    made = Workshop(tmp_path / "root", tmp_path / "runs")
    (made.experiment / "ablations").mkdir(parents=True)
    for scale in ("paper", "public", "small"):
        (made.experiment / f"{scale}.yaml").write_text("# @package _global_\n")
    (made.experiment / "ablations" / "margin.yaml").write_text("# @package _global_\n")
    made.write_claim(CLAIM)
    made.write_card(CARD)
    return made


@pytest.fixture
def paper_module(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str, str], None]]:
    """Writes a file of the toy paper's code; its import is undone after the test."""
    import sys

    def write(name: str, source: str) -> None:
        (Path(reprise.papers.__path__[0]) / SLUG / f"{name}.py").write_text(source)

    yield write
    for name in [name for name in sys.modules if name.startswith(f"reprise.papers.{SLUG}")]:
        del sys.modules[name]
    if hasattr(reprise.papers, SLUG):
        delattr(reprise.papers, SLUG)
