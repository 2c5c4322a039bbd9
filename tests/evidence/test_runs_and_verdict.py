"""Run folders in every state, and verdicts from them."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence

import pytest
import yaml
from omegaconf import OmegaConf
from rich.console import Console

from reprise import paths
from reprise.config import compose, config_hash, scale_label
from reprise.evidence.claims import load_claim
from reprise.evidence.panel import render_panel
from reprise.evidence.report import build_report
from reprise.evidence.results import write_results
from reprise.evidence.runs import find_runs, papers_with_runs, read_run, scale_labels
from reprise.evidence.verdict import make_verdict, read_verdict, write_verdict

from .conftest import Workshop

SUPPORTED = [0.10, 0.12, 0.11, 0.09, 0.10]


def test_reads_a_finished_run(workshop):
    run = read_run(workshop.run("method", 3, {"test/ap": 0.5}))
    assert (run.paper, run.scale, run.arm, run.seed, run.status) == ("toy_paper", "small", "method", 3, "finished")
    assert run.metrics == {"test/ap": 0.5}
    assert run.seconds == 40.5
    curves = run.curves()
    assert len(curves["train/loss"]) == 200
    assert [step for step, _ in curves["val/ap"]] == list(range(20, 201, 20))
    assert [picture.name for picture in run.pictures()] == ["boxes"]


def test_tolerates_every_kind_of_broken_folder(workshop):
    torn = workshop.run("method", 0, {"test/ap": 0.5})
    (torn / "summary.json").write_text('{"metrics": {"test')
    with (torn / "metrics.csv").open("a") as file:
        file.write("201,train/lo")
    (torn / "pictures" / "boxes.png").unlink()
    no_json = workshop.run("method", 1, {})
    (no_json / "run.json").unlink()
    workshop.run("method", 2, {}, status="running")
    workshop.run("method", 3, {}, status="failed", error="DivergedError: loss is NaN\n  looked at: step 3")
    workshop.run("method", 4, {"test/ap": None})
    old = workshop.run("method", 5, {"test/ap": 0.1})
    old.rename(old.with_name("seed=5~old-20260101"))
    (workshop.runs / "toy_paper" / "small" / "method" / "seed=x").mkdir()
    (workshop.runs / "toy_paper" / "small" / "verdict.json").write_text("{}")
    found = {run.folder.name: run for run in find_runs(workshop.runs, "toy_paper")}
    assert {name: run.status for name, run in found.items()} == {
        "seed=0": "damaged",
        "seed=1": "damaged",
        "seed=2": "running",
        "seed=3": "failed",
        "seed=4": "finished",
        "seed=5~old-20260101": "moved aside",
        "seed=x": "damaged",
    }
    assert found["seed=3"].problem == "DivergedError: loss is NaN"
    assert math.isnan(found["seed=4"].metrics["test/ap"])
    assert len(found["seed=0"].curves()["train/loss"]) == 200
    assert found["seed=0"].pictures() == []


def test_a_picture_outside_the_run_is_not_read(workshop):
    folder = workshop.run("method", 0, {})
    listing = [{"name": "x", "caption": "x", "file": "../../../secret.png"}, "nonsense"]
    (folder / "pictures" / "pictures.json").write_text(json.dumps(listing))
    assert read_run(folder).pictures() == []


def test_scales_and_papers_are_found_in_order(workshop):
    for scale in ("smoke-public", "smoke", "public", "small~steps=3", "small"):
        workshop.run("method", 0, {}, scale=scale)
    assert scale_labels(workshop.runs, "toy_paper") == ["small", "public", "small~steps=3", "smoke", "smoke-public"]
    assert papers_with_runs(workshop.runs) == ["toy_paper"]
    assert papers_with_runs(workshop.runs / "nowhere") == []


def test_supported_verdict_with_everything_in_it(workshop):
    workshop.fill(SUPPORTED)
    verdict = make_verdict(workshop.runs, "toy_paper", "small")
    path = write_verdict(verdict, workshop.runs)
    assert path == workshop.runs / "toy_paper" / "small" / "verdict.json"
    assert verdict.verdict == "supported"
    assert verdict.primary.mean == pytest.approx(0.104)
    assert verdict.primary.differences == pytest.approx(dict(enumerate(SUPPORTED)))
    assert verdict.arms["method"].metrics["test/ap"].values[4] == pytest.approx(0.54)
    assert verdict.secondary[0].verdict == "supported"
    assert verdict.config_hashes["control/seed=2"] == "control2"
    assert verdict.versions["torch"] == ["2.14.1"]
    assert (verdict.date, verdict.missing, verdict.finished_runs) == ("2026-01-01", [], 10)
    assert read_verdict(workshop.runs, "toy_paper", "small") == verdict
    later = path.stat().st_mtime_ns + 1
    os.utime(workshop.runs / "toy_paper" / "small" / "method" / "seed=0", ns=(later, later))
    assert read_verdict(workshop.runs, "toy_paper", "small") is None, "a run changed after it"


@pytest.mark.parametrize(
    ("gains", "outcome"), [([-g for g in SUPPORTED], "refuted"), ([0.3, -0.2, 0.1, -0.1, 0.0], "inconclusive")]
)
def test_other_verdicts(workshop, gains, outcome):
    workshop.fill(gains)
    assert make_verdict(workshop.runs, "toy_paper", "small").verdict == outcome


def test_only_paired_seeds_count_and_the_others_are_named(workshop):
    workshop.fill(SUPPORTED)
    folder = workshop.runs / "toy_paper" / "small" / "control" / "seed=2"
    (folder / "summary.json").unlink()
    verdict = make_verdict(workshop.runs, "toy_paper", "small")
    assert sorted(verdict.primary.differences) == [0, 1, 3, 4]
    assert verdict.primary.unpaired == [2]
    assert verdict.verdict == "inconclusive", "who leaves out what failed, or stops in time, can always win"
    assert "without a finished run of every arm: 2." in verdict.reason
    assert [(run.arm, run.seed, run.status) for run in verdict.missing] == [("control", 2, "damaged")]
    assert verdict.verdict == "inconclusive"
    assert "4 paired seeds" in verdict.reason


def test_a_missing_metric_is_a_missing_run(workshop):
    workshop.fill(SUPPORTED)
    path = workshop.runs / "toy_paper" / "small" / "method" / "seed=1" / "summary.json"
    path.write_text('{"metrics": {"test/ap": 0.5}}')
    verdict = make_verdict(workshop.runs, "toy_paper", "small")
    assert [(run.status, run.detail) for run in verdict.missing] == [("no metric", "test/nms_gain")]
    assert verdict.secondary[0].n == 5


def test_a_metric_that_is_nan_decides_nothing(workshop):
    workshop.fill([*SUPPORTED, 0.1])
    path = workshop.runs / "toy_paper" / "small" / "method" / "seed=1" / "summary.json"
    path.write_text('{"metrics": {"test/nms_gain": NaN, "test/ap": 0.5}}')
    verdict = make_verdict(workshop.runs, "toy_paper", "small")
    write_verdict(verdict, workshop.runs)
    assert verdict.verdict == "inconclusive"
    assert "not finite" in verdict.reason
    assert verdict.primary.differences[1] is None


def test_seeds_beside_the_claims_are_listed_and_not_judged(workshop):
    workshop.fill([*SUPPORTED, -9.0, -9.0])
    workshop.run("method", 100, {"test/nms_gain": 9.0, "test/ap": 9.0})
    verdict = make_verdict(workshop.runs, "toy_paper", "small")
    assert (verdict.seeds, verdict.extra_seeds) == ([0, 1, 2, 3, 4], [5, 6])
    assert (verdict.verdict, verdict.primary.n, verdict.finished_runs) == ("supported", 5, 10)
    console = Console(width=140, record=True, force_terminal=False)
    console.print(render_panel(verdict))
    assert "not judged, because the claim names other seeds: seed 5, 6" in console.export_text()
    assert "seed 5, 6" in build_report(workshop.runs, "toy_paper").read_text()
    assert "seed 5, 6" in write_results(workshop.runs, "toy_paper").read_text()


def test_seeds_named_by_hand_are_judged_and_the_verdict_says_so(workshop):
    workshop.fill([*SUPPORTED, 0.11])
    verdict = make_verdict(workshop.runs, "toy_paper", "small", [0, 1, 2, 3, 4, 5, 100])
    assert (verdict.seeds, verdict.extra_seeds, verdict.primary.n) == ([0, 1, 2, 3, 4, 5], [], 6)
    assert "The seeds 0, 1, 2, 3, 4, 5 were named by hand; the claim's are 0, 1, 2, 3, 4." in verdict.reason
    html = build_report(workshop.runs, "toy_paper", {"small": [0, 1, 2, 3, 4, 5]}).read_text()
    assert "were named by hand" in html
    assert "make reproduce PAPER=toy_paper SCALE=small SEEDS=0,1,2,3,4,5" in html
    assert "by hand" not in make_verdict(workshop.runs, "toy_paper", "small").reason


CONFIG = {
    "slug": "toy_paper",
    "paper": {"lr": 0.1},
    "data": {"seed": 0, "world_seed": 0},
    "steps": 9,
    "start_from": None,
}


def configure(workshop, arm: str, seed: int, lr: float, finished: str = "2026-01-01T10:00:40+00:00", **data) -> None:
    """Give a run folder the configuration that it was made with."""
    folder = workshop.runs / "toy_paper" / "small" / arm / f"seed={seed}"
    config = {
        **CONFIG,
        "seed": seed,
        "paper": {"lr": lr},
        "data": {"seed": seed, "world_seed": 0, **data},
        "trainer": {},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    info = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps(info | {"finished": finished}))


def test_runs_of_an_arm_with_another_configuration_are_not_mixed_in(workshop):
    workshop.fill(SUPPORTED)
    for arm in ("method", "control"):
        for seed in range(5):
            changed = arm == "control" and seed in (1, 3)
            configure(workshop, arm, seed, 0.2 if changed else 0.1, f"2026-01-0{1 if changed else 2}T10:00:00+00:00")
    verdict = make_verdict(workshop.runs, "toy_paper", "small")
    found = [(run.arm, run.seed, run.status) for run in verdict.missing]
    assert found == [("control", 1, "another configuration"), ("control", 3, "another configuration")]
    assert sorted(verdict.primary.differences) == [0, 2, 4]
    assert (verdict.verdict, verdict.finished_runs) == ("inconclusive", 8)
    assert "another configuration" in write_results(workshop.runs, "toy_paper").read_text()
    configure(workshop, "control", 3, 0.2, "2026-01-03T10:00:00+00:00")
    newest = make_verdict(workshop.runs, "toy_paper", "small")
    assert sorted(newest.primary.differences) == [1, 3], "from folders alone the newest configuration is kept"


def test_the_seed_and_what_follows_it_are_no_other_configuration(workshop):
    workshop.fill(SUPPORTED)
    for arm in ("method", "control"):
        for seed in range(5):
            configure(workshop, arm, seed, 0.1)
    assert make_verdict(workshop.runs, "toy_paper", "small").finished_runs == 10
    configure(workshop, "method", 2, 0.1, world_seed=7)
    assert make_verdict(workshop.runs, "toy_paper", "small").finished_runs == 9


def composed_run(workshop, recipe: Sequence[str], arm: str, seed: int, *overrides: str) -> None:
    """A finished run of ViT's claim with its configuration, none of it trained."""
    cfg = compose([*recipe, f"arm={arm}", f"seed={seed}", "variant=null", *overrides])
    day = "2026-01-02" if overrides else "2026-01-01"
    info = {"config_hash": config_hash(cfg), "finished": f"{day}T10:00:40+00:00"}
    folder = Workshop(workshop.root, workshop.runs, "vit").run(
        arm, seed, {"test/accuracy": 0.5}, scale=scale_label(compose(recipe)), **info
    )
    OmegaConf.save(cfg, folder / "config.yaml")


@pytest.mark.parametrize(
    ("label", "recipe"),
    [("small", ["experiment=vit/small"]), ("smoke-public", ["experiment=vit/public", "smoke=true"])],
)
def test_what_the_recipe_composes_to_is_kept_before_what_is_newest(tmp_path, label, recipe):
    vit = Workshop(paths.root(), tmp_path)
    for arm in load_claim("vit").at(label).arms:
        for seed in (0, 1):
            composed_run(vit, recipe, arm, seed, *(["optimizer.lr=0.5"] if (arm, seed) == ("cnn", 1) else []))
    verdict = make_verdict(tmp_path, "vit", label)
    found = [(run.arm, run.seed) for run in verdict.missing if run.status == "another configuration"]
    assert found == [("cnn", 1)]


def test_an_earlier_stage_that_has_changed_since_is_another_configuration(tmp_path):
    for seed in (0, 1):
        cfg = compose(["experiment=smkd/small", "arm=smkd", f"seed={seed}"])
        info = {"config_hash": config_hash(cfg) if seed == 0 else "of another stage"}
        folder = Workshop(paths.root(), tmp_path, "smkd").run("smkd", seed, {"test/accuracy": 0.5}, **info)
        OmegaConf.save(cfg, folder / "config.yaml")
    verdict = make_verdict(tmp_path, "smkd", "small")
    assert [run.seed for run in verdict.missing if run.status == "another configuration"] == [1]


def test_no_runs_and_smoke_runs(workshop):
    empty = make_verdict(workshop.runs, "toy_paper", "small")
    assert (empty.verdict, empty.date, len(empty.missing)) == ("inconclusive", None, 10)
    for label in ("smoke", "smoke-public", "smoke~steps-3"):
        workshop.fill(SUPPORTED, scale=label)
        smoke = make_verdict(workshop.runs, "toy_paper", label)
        assert smoke.verdict == "inconclusive"
        assert "wiring" in smoke.reason


@pytest.mark.parametrize("gains", [SUPPORTED, [-0.1], []])
def test_the_panel_shows_arms_seeds_and_verdict(workshop, gains):
    workshop.fill(gains)
    verdict = make_verdict(workshop.runs, "toy_paper", "small")
    console = Console(width=140, record=True, force_terminal=False)
    console.print(render_panel(verdict))
    text = console.export_text()
    assert verdict.verdict.upper() in text
    assert "Set prediction" in text
    assert "NMS gain" in text
    assert ("Missing runs" in text) == (len(gains) < 5)
