"""Two gloo processes with half the batch each give the run that one process gives, for every paper.

Tolerance: sums over the batch are added in another order, so losses and weights agree to float32 rounding grown over
four steps (relative 2e-4, absolute 2e-5). Exceptions are declared in the card (`rank_exceptions`), with an override
that makes the run rank-invariant where the paper allows it.
"""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch

from reprise.evidence.cards import load_card
from tests.cross.support import (
    PAPERS,
    STAGES,
    copy_earlier_stages,
    final_state,
    only_run,
    run_child,
    smoke_config,
    write_config,
)

pytestmark = pytest.mark.slow
RELATIVE, ABSOLUTE = 2e-4, 2e-5


def metrics_of(runs: Path) -> dict[tuple[int, str], float]:
    with (only_run(runs) / "metrics.csv").open() as handle:
        return {(int(row["step"]), row["metric"]): float(row["value"]) for row in csv.DictReader(handle)}


@pytest.mark.parametrize(("slug", "arm"), STAGES)
def test_two_ranks_agree_with_one(slug: str, arm: str, tmp_path: Path) -> None:
    invariant = [item for exception in load_card(slug).rank_exceptions for item in exception.overrides]
    runs = {}
    for name, trainer in (("one", "cpu"), ("two", "ddp_cpu")):
        config = write_config(smoke_config(slug, f"arm={arm}", f"trainer={trainer}", *invariant), tmp_path / name)
        if runs:
            copy_earlier_stages(runs["one"], tmp_path / name / "runs")
        done = run_child(config, tmp_path / name / "runs")
        assert done.returncode == 0, done.stderr[-3000:]
        runs[name] = tmp_path / name / "runs"
    one, two = metrics_of(runs["one"]), metrics_of(runs["two"])
    assert one.keys() == two.keys()
    for key, value in one.items():
        if key[1].startswith(("val/", "test/", "lr")) or key[1] == "train/loss":
            assert two[key] == pytest.approx(value, rel=RELATIVE, abs=ABSOLUTE), key
    weights = final_state(runs["one"])["state_dict"], final_state(runs["two"])["state_dict"]
    assert weights[0].keys() == weights[1].keys()
    for name, tensor in weights[0].items():
        torch.testing.assert_close(
            weights[1][name], tensor, rtol=RELATIVE, atol=ABSOLUTE, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_every_paper_was_collected() -> None:
    assert {slug for slug, _ in STAGES} == set(PAPERS)
    assert len(PAPERS) >= 4
