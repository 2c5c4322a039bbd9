"""The W&B workspace and report: their specification, and the objects built from it, without a network."""

from __future__ import annotations

import json

import pytest

from reprise.errors import ConfigError
from reprise.evidence.dashboard import make_report, make_workspace, specification


def test_the_specification_is_plain_and_complete(workshop):
    workshop.fill([0.10, 0.12, 0.11, 0.09, 0.10])
    spec = specification(workshop.runs, "toy_paper", "small")
    assert json.loads(json.dumps(spec)) == spec
    assert spec["group"] == "toy_paper/small"
    assert "SUPPORTED" in spec["verdict"][0]
    assert "NMS gain" in spec["verdict"][1]
    assert "One-to-many" in spec["verdict"][2]
    curves, pictures, _ = spec["sections"]
    assert {panel["title"] for panel in curves["panels"]} == {"val/ap", "train/loss"}
    assert all(panel["group_by"] == "job_type" for panel in curves["panels"])
    assert pictures["panels"] == [{"kind": "media", "keys": ["pictures/boxes"]}]


def test_without_runs_it_says_so(workshop):
    with pytest.raises(ConfigError, match="no finished runs"):
        specification(workshop.runs, "toy_paper", "small")


def test_the_objects_of_wandb_hold_every_panel(workshop):
    workshop.fill([0.10, 0.12, 0.11, 0.09, 0.10])
    spec = specification(workshop.runs, "toy_paper", "small")
    workspace, report = (make(spec, "reprise", "someone") for make in (make_workspace, make_report))
    assert [section.name for section in workspace.sections] == [section["name"] for section in spec["sections"]]
    panels = sum(len(section["panels"]) for section in spec["sections"])
    assert sum(len(section.panels) for section in workspace.sections) == panels
    grids = [block for block in report.blocks if type(block).__name__ == "PanelGrid"]
    assert sum(len(grid.panels) for grid in grids) == panels
    assert report.blocks[0].text == f"> {spec['statement']}"
