"""Several gloo processes with a part of the batch each give the run that one process gives, for every paper.

Tolerance: sums over the batch are added in another order. The averaged gradients of the first step agree to 1e-4 of a
value or 1e-5 of the tensor's largest; losses, metrics and weights to that rounding grown over four steps (relative
2e-4, absolute 2e-5). Parameters, buffers and optimizer states are bit-identical on all ranks. The evaluation splits
have one item more than the ranks can share evenly. Exceptions are declared in the card (`rank_exceptions`), with
overrides that make the run rank-invariant where the paper allows it; a declared exception must be real.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from reprise.evidence import children
from reprise.evidence.cards import Card, RankException, load_card
from reprise.evidence.claims import load_claim
from reprise.evidence.states import differences, final_state
from reprise.training.runfolder import RunFolder
from tests.cross import faults
from tests.cross.probes import Probe
from tests.cross.support import (
    ARMS,
    PAPERS,
    STAGES,
    Reference,
    References,
    RefusedError,
    folder_of,
    in_every_run,
    metrics_of,
    smoke_config,
    spread,
)

pytestmark = [pytest.mark.slow, pytest.mark.dist]
RELATIVE, ABSOLUTE, POINTS = 2e-4, 2e-5, 0.5
STATISTICS = ("running_mean", "running_var", "num_batches_tracked")
GRADIENT_RELATIVE, GRADIENT_SHARE = 1e-4, 1e-5
CARDS: dict[str, Card] = {slug: load_card(slug) for slug in PAPERS}
SMOKE = {slug: smoke_config(slug) for slug in PAPERS}
DETECTION = [slug for slug in PAPERS if CARDS[slug].task.lower().count("detection")]
FEDERATED = [slug for slug in PAPERS if "sample_ratio" in SMOKE[slug].data]


def exceptions(slug: str, arm: str) -> list[RankException]:
    """What the card declares for an arm."""
    return [exception for exception in CARDS[slug].rank_exceptions if exception.concerns(arm)]


def invariant(slug: str, arm: str) -> list[str]:
    """The overrides that make an arm rank-invariant."""
    return [item for exception in exceptions(slug, arm) for item in exception.overrides]


def unexcused(slug: str, arm: str, found: list[str]) -> list[str]:
    """What an exception that nothing can switch off (per-rank batch statistics) does not explain.

    It must show in the first gradients, and ranks may differ from each other in their running statistics alone.
    """
    declared = any(not exception.overrides for exception in exceptions(slug, arm))
    if not declared or not any(item.startswith("gradient of") for item in found):
        return found
    return [item for item in found if item.startswith("rank ") and not item.endswith(STATISTICS)]


def test_an_exception_excuses_its_own_arms_alone() -> None:
    slug, exception = next((s, e) for s in PAPERS for e in CARDS[s].rank_exceptions if e.arms and not e.overrides)
    excused, strict = (
        exception.arms or [],
        [arm for owner, arm in ARMS if owner == slug and not exception.concerns(arm)],
    )
    assert strict
    for arm in strict:
        assert unexcused(slug, arm, ["gradient of w in call 0"]) == ["gradient of w in call 0"]
    for arm in excused:
        assert unexcused(slug, arm, ["gradient of w in call 0"]) == []


def uneven(slug: str) -> list[str]:
    """One evaluation item more than ranks can share evenly."""
    limit = SMOKE[slug].data.get("limit")
    return [] if limit is None else [f"data.limit={limit + 1}"]


def compare(
    slug: str, arm: str, world: int, overrides: list[str], references: References, folder: Path, *, empty: bool = False
) -> list[str]:
    """Where a run of `world` ranks is not the run of one process, beyond the tolerance."""
    one = references(slug, arm, *overrides, empty_half=empty)
    two = run_on(world, one, folder, Probe(folder / "probe", empty))
    ranks = [torch.load(path, weights_only=True) for path in sorted((folder / "probe").iterdir())]
    assert len(ranks) == world
    alone = torch.load(one.probe / "rank=0.pt", weights_only=True)
    return [
        *unequal_ranks(ranks),
        *far_metrics(metrics_of(one.run), metrics_of(two)),
        *far_gradients(alone["gradients"], ranks[0]["gradients"]),
        *far_state(alone["module"], ranks[0]["module"]),
    ]


def run_on(world: int, one: Reference, folder: Path, before: children.Before | None = None) -> Path:
    """The run folder of the same configuration on several ranks."""
    config = children.write_config(on_ranks(one, world), folder)
    one.give_earlier_stages(folder / "runs")
    for ended in children.run_ranks(config, folder / "runs", world, before=before):
        if ended.code == 1 and "Traceback" not in ended.messages:
            raise RefusedError(ended.messages)
        assert ended.code == 0, ended.messages[-3000:]
    return folder_of(one.cfg, folder / "runs")


def on_ranks(one: Reference, world: int) -> Any:
    """The configuration of `one` under DDP."""
    cfg = one.cfg.copy()
    cfg.trainer = smoke_config(cfg.slug, "trainer=ddp_cpu", f"trainer.devices={world}").trainer
    kept = ("precision", "gradient_clip_val", "accumulate_grad_batches")
    cfg.trainer.update({key: one.cfg.trainer[key] for key in kept})
    return cfg


def unequal_ranks(ranks: list[dict[str, Any]]) -> list[str]:
    return [
        f"rank {number} differs from rank 0 in {found}"
        for number, rank in enumerate(ranks)
        for key in ("module", "optimizers")
        for found in differences(rank[key], ranks[0][key], key)
    ]


def far_metrics(one: dict[Any, float], two: dict[Any, float]) -> list[str]:
    if one.keys() != two.keys():
        return [f"metrics {sorted(one.keys() ^ two.keys())}"]
    compared = {key: value for key, value in one.items() if key[1].startswith(("val/", "test/", "lr", "train/loss"))}
    return [
        f"{name} at step {step}: {two[step, name]} instead of {value}"
        for (step, name), value in compared.items()
        if two[step, name] != pytest.approx(value, rel=RELATIVE, abs=absolute(name), nan_ok=True)
    ]


def absolute(name: str) -> float:
    """Points (BLEU) are of decoded text, in which a near tie between two words may fall either way."""
    return POINTS if name.endswith("_points") else ABSOLUTE


def far_gradients(one: list[dict[str, Any]], two: list[dict[str, Any]]) -> list[str]:
    if [call.keys() for call in one] != [call.keys() for call in two]:
        return ["the parameters that have gradients"]
    return [
        f"gradient of {name} in call {number}"
        for number, (mine, theirs) in enumerate(zip(one, two, strict=True))
        for name, value in mine.items()
        if not torch.allclose(
            theirs[name], value, rtol=GRADIENT_RELATIVE, atol=GRADIENT_SHARE * float(value.abs().max()) + 1e-7
        )
    ]


def far_state(one: dict[str, Any], two: dict[str, Any]) -> list[str]:
    if one.keys() != two.keys():
        return ["the keys of the state"]
    return [
        f"{name} after training"
        for name, value in one.items()
        if not torch.allclose(two[name], value, rtol=RELATIVE, atol=ABSOLUTE, equal_nan=True)
    ]


@pytest.mark.proves("ranks", "2 ranks")
@pytest.mark.parametrize(("slug", "arm"), [in_every_run((slug, arm) in STAGES, slug, arm) for slug, arm in ARMS])
def test_two_ranks_agree_with_one(slug: str, arm: str, references: References, tmp_path: Path) -> None:
    found = compare(slug, arm, 2, [*uneven(slug), *invariant(slug, arm)], references, tmp_path)
    assert not unexcused(slug, arm, found), found


@pytest.mark.proves("ranks", "3 ranks")
@pytest.mark.parametrize("slug", [in_every_run(slug == spread(0), slug) for slug in PAPERS])
def test_three_ranks_agree_with_one(slug: str, references: References, tmp_path: Path) -> None:
    arm = str(SMOKE[slug].arm)
    for batch_size in (6, 24):  # where batches are made of groups, six items may be too few, and three ranks too odd
        overrides = [f"data.batch_size={batch_size}", *uneven(slug), *invariant(slug, arm)]
        with contextlib.suppress(RefusedError):
            found = compare(slug, arm, 3, overrides, references, tmp_path / f"{batch_size}")
            assert not unexcused(slug, arm, found), found
            return


@pytest.mark.proves("ranks", "a declared exception is real")
@pytest.mark.parametrize(
    ("slug", "exception"),
    [
        in_every_run(bool(e.overrides), slug, number)
        for slug in PAPERS
        for number, e in enumerate(CARDS[slug].rank_exceptions)
    ],
)
def test_declared_exceptions_are_real(slug: str, exception: int, references: References, tmp_path: Path) -> None:
    this = CARDS[slug].rank_exceptions[exception]

    def shows_it(arm: str) -> bool:
        others = [item for other in exceptions(slug, arm) if other is not this for item in other.overrides]
        return bool(compare(slug, arm, 2, [*uneven(slug), *others, *this.when], references, tmp_path / arm))

    assert any(shows_it(arm) for owner, arm in ARMS if owner == slug and this.concerns(arm)), "no arm shows it"


@pytest.mark.proves("ranks", "a rank without objects")
@pytest.mark.parametrize("slug", DETECTION)
def test_a_rank_without_objects(slug: str, references: References, tmp_path: Path) -> None:
    arm = str(SMOKE[slug].arm)
    found = compare(slug, arm, 2, invariant(slug, arm), references, tmp_path, empty=True)
    assert not unexcused(slug, arm, found), found


@pytest.mark.proves("ranks", "a rank without a client")
@pytest.mark.parametrize("slug", FEDERATED)
def test_a_rank_without_a_client(slug: str, references: References, tmp_path: Path) -> None:
    arm, data = str(SMOKE[slug].arm), SMOKE[slug].data
    one_client = f"data.sample_ratio={1.5 / data.num_clients}"
    found = compare(slug, arm, 2, [one_client, *invariant(slug, arm)], references, tmp_path)
    assert not unexcused(slug, arm, found), found


STAGED = [(slug, arm) for slug, arm in ARMS if load_claim(slug).arms[arm].after][:1]


@pytest.mark.parametrize(("slug", "arm"), STAGED)
def test_ranks_that_a_cluster_started_wait_for_rank_0_between_stages(slug: str, arm: str, tmp_path: Path) -> None:
    cfg = smoke_config(slug, f"arm={arm}", "trainer=ddp_cpu", *invariant(slug, arm))
    config = children.write_config(cfg, tmp_path)
    for ended in children.run_ranks(config, tmp_path / "runs", 2, before=faults.SlowOwner(1.5)):
        assert ended.code == 0, ended.messages[-3000:]
    assert len(list((tmp_path / "runs").rglob("summary.json"))) >= 2


@pytest.mark.proves("ranks", "continued on another number of ranks")
@pytest.mark.parametrize("first", [1, 2])
@pytest.mark.parametrize("slug", PAPERS)
def test_a_run_continues_on_another_number_of_ranks(
    slug: str, first: int, references: References, tmp_path: Path
) -> None:
    arm = str(SMOKE[slug].arm)
    overrides = [*uneven(slug), *invariant(slug, arm)]
    reference = references(slug, arm, *overrides)
    run = reference.give_earlier_stages(tmp_path)
    several = children.write_config(on_ranks(reference, 2), tmp_path)
    kill = faults.SignalAfterStep(3)
    if first == 1:
        assert children.run(reference.config, tmp_path, before=kill).code == -9
        ended = children.run_ranks(several, tmp_path, 2)
    else:
        assert children.run_ranks(several, tmp_path, 2, before=kill)[0].code == -9
        ended = [children.run(reference.config, tmp_path)]
    assert [one.code for one in ended] == [0] * len(ended), ended[0].messages[-3000:]
    found = far_metrics(metrics_of(reference.run), metrics_of(run))
    found += far_state(final_state(reference.run)["state_dict"], final_state(run)["state_dict"])
    if found:  # then only because any run on two ranks is another one, as declared
        found += compare(slug, arm, 2, overrides, references, tmp_path / "whole")
    assert not unexcused(slug, arm, found), found


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, pytest.param(signal.SIGUSR1, marks=pytest.mark.exhaustive)], ids=lambda n: n.name
)
def test_preemption_of_several_ranks(number: signal.Signals, tmp_path: Path) -> None:
    cfg = smoke_config(spread(1), "trainer=ddp_cpu", "steps=100000", "val_every=100000")
    runs, run = tmp_path / "runs", folder_of(cfg, tmp_path / "runs")
    child = children.start(children.write_config(cfg, tmp_path), runs)
    deadline = time.monotonic() + 120
    while (RunFolder(run).read("progress.json") or {}).get("step", 0) < 1 and time.monotonic() < deadline:
        time.sleep(0.1)
    os.kill(child.process.pid, number)
    ended = child.wait(60)
    assert ended.code == 75, ended.messages
    assert f"stopped by {number.name} at step" in ended.messages
    assert len(list((run / "checkpoints").glob("step=*.ckpt"))) == 1


def test_every_paper_was_collected() -> None:
    assert {slug for slug, _ in STAGES} == {slug for slug, _ in ARMS} == set(PAPERS)
    assert len(PAPERS) >= 4
    assert len(DETECTION) >= 1
    assert len(FEDERATED) >= 1
