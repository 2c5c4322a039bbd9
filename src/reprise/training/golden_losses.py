"""The first losses of a paper's smoke run, stored in full precision, so that a change of the mathematics is seen."""

from __future__ import annotations

import csv
import json
from pathlib import Path

from reprise import config as configuration
from reprise import paths
from reprise.training.launch import launch

# Losses of another CPU may differ in rounding, grown over four optimizer steps.
RELATIVE_TOLERANCE = 1e-4


def path_of(slug: str) -> Path:
    return paths.experiments_dir() / slug / "golden_losses.json"


def first_losses(slug: str) -> dict[str, list[float]]:
    """The training losses of the smoke run of every arm, by arm, in full precision."""
    from reprise.evidence.claims import load_claim

    losses = {}
    for arm in load_claim(slug).at("small").arms:
        cfg = configuration.compose([f"experiment={slug}/small", "smoke=true", f"arm={arm}"])
        launch(cfg, show_progress=False)
        with (configuration.run_dir(cfg) / "metrics.csv").open() as handle:
            losses[arm] = [float(row["value"]) for row in csv.DictReader(handle) if row["metric"] == "train/loss"]
    return losses


def record(slug: str) -> Path:
    """Store the first losses of a paper; do this only when the mathematics was meant to change."""
    path = path_of(slug)
    path.write_text(json.dumps(first_losses(slug), indent=1) + "\n")
    return path
