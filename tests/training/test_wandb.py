"""The W&B mirror, by its offline files, against the run folder."""

from __future__ import annotations

import csv
import json
import os
from pathlib import Path

import pytest
import wandb
from tests.training.wandb_files import OfflineRun, read_offline
from torch import Tensor

from reprise import config as configuration
from reprise.cli import main
from reprise.data.loader import Batch
from reprise.errors import DivergedError
from reprise.papers.vit.module import ViTModule
from reprise.training.run import train
from reprise.training.wandb_mirror import HIDDEN, WandbMirror, without_secrets

KEY = "0123456789abcdef" * 2 + "01234567"
SMOKE = ["experiment=vit/small", "smoke=true", "logger=wandb"]


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """A key that must appear nowhere, and no network."""
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("WANDB_MODE", "offline")


@pytest.fixture
def runs() -> Path:
    return Path(os.environ["REPRISE_RUNS"])


def mirrored(folder: Path) -> OfflineRun:
    """The one mirrored run of a folder."""
    (path,) = (folder / "wandb").glob("offline-run-*/run-*.wandb")
    return read_offline(path)


def recorded(folder: Path) -> dict[tuple[int, str], float]:
    with (folder / "metrics.csv").open() as handle:
        return {(int(row["step"]), row["metric"]): float(row["value"]) for row in csv.DictReader(handle)}


@pytest.mark.slow
def test_a_claim_in_one_process_is_a_run_a_seed_and_a_verdict(runs: Path) -> None:
    code = main(["reproduce", *SMOKE, "arm=vit", "seed=0,1", "hydra/launcher=basic", "logger.wandb.tags=[mine]"])
    assert code == 0
    folders = sorted(path.parent for path in runs.rglob("summary.json"))
    assert len(folders) == 2
    for folder in folders:
        _same_as_the_folder(folder, mirrored(folder))
    verdict = mirrored(runs / "vit" / "smoke")
    stated = json.loads((runs / "vit" / "smoke" / "verdict.json").read_text())
    assert (verdict.run.run_group, verdict.run.job_type, verdict.exit_code) == ("vit/smoke", "verdict", 0)
    assert verdict.summary["verdict"] == stated["verdict"]
    assert any(row.get("contrasts.nrows") == len(stated["secondary"]) + 1 for row in verdict.history)
    assert wandb.run is None
    assert not [path for path in runs.rglob("*") if path.is_file() and KEY.encode() in path.read_bytes()]


def _same_as_the_folder(folder: Path, found: OfflineRun) -> None:
    resolved = configuration.compose([*SMOKE, f"seed={folder.name[5:]}"])
    assert (found.run.run_group, found.run.job_type, found.exit_code) == ("vit/smoke", "vit", 0)
    assert set(found.run.tags) == {"vit", "smoke", "mine"}
    assert found.config["optimizer"] == dict(resolved.optimizer)
    assert found.config["seed"] == resolved.seed
    in_folder = {key: value for key, value in recorded(folder).items() if not key[1].startswith("test/")}
    assert found.metrics() == pytest.approx(in_folder, rel=1e-9)
    tested = json.loads((folder / "summary.json").read_text())["metrics"]
    assert {name: found.summary[name] for name in tested} == pytest.approx(tested)
    pictures = json.loads((folder / "pictures" / "pictures.json").read_text())
    shown = {name for row in found.history for name in row if name.startswith("pictures/")}
    assert {f"pictures/{entry['name']}" for entry in pictures} == {name.split(".")[0] for name in shown}
    assert any("timing/items_per_second" in row for row in found.history)
    assert found.stats >= 1, "the system's load is mirrored too"


def test_a_failed_run_is_finished_as_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    step = ViTModule.training_step

    def spoiled(self: ViTModule, batch: Batch, batch_idx: int) -> Tensor:
        return step(self, batch, batch_idx) * (float("nan") if batch_idx == 2 else 1.0)

    monkeypatch.setattr(ViTModule, "training_step", spoiled)
    cfg = configuration.compose([*SMOKE, "seed=3"])
    with pytest.raises(DivergedError):
        train(cfg, show_progress=False)
    found = mirrored(configuration.run_dir(cfg))
    assert found.exit_code == 1
    assert {step for step, name in found.metrics() if name == "train/loss"} == {1, 2}
    assert wandb.run is None


def test_the_mirror_never_stops_a_run(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(**options: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(wandb, "init", broken)
    config = {"slug": "vit", "arm": "vit", "seed": 0}
    mirror = WandbMirror(project="p", entity=None, tags=[], save_dir=str(tmp_path), run_config=config, scale="small")
    mirror.log_metrics({"train/loss": 1.0}, 0)
    mirror.log_metrics({"train/loss": 1.0}, 1)
    mirror.close({"test/accuracy": 1.0})
    assert capsys.readouterr().err.count("the mirror stops here") == 1


def test_secrets_are_hidden() -> None:
    config = {"api_key": "abc", "data": {"url": "https://me:pw@host/x", "token": ["t"], "keys": 3}, "seed": 1}
    assert without_secrets(config) == {
        "api_key": HIDDEN,
        "data": {"url": f"https://{HIDDEN}@host/x", "token": [HIDDEN], "keys": 3},
        "seed": 1,
    }
