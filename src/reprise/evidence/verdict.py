"""From run folders and a claim to a verdict, and to `runs/<paper>/<scale>/verdict.json`."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from reprise import discovery
from reprise.config import smoked_scale
from reprise.evidence.claims import TUNING_SEEDS_FROM, Arm, Contrast, ScaledClaim, load_claim
from reprise.evidence.configurations import one_configuration_an_arm
from reprise.evidence.files import read_json, write_json
from reprise.evidence.formatting import claimed, duration
from reprise.evidence.runs import RunRecord, find_runs
from reprise.evidence.statistics import Interval, Outcome, Summary, compare, summarise
from reprise.evidence.sweeps import read_sweep


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Sample(_Record):
    """One metric of one arm: every seed's value (None: not a finite number), mean, sd and 95 % t interval."""

    values: dict[int, float | None]
    n: int
    mean: float | None
    sd: float | None
    ci: Interval | None


class ArmResult(_Record):
    """One arm: its label, its overrides and its metrics over the finished runs."""

    label: str
    overrides: list[str]
    metrics: dict[str, Sample]


class ContrastResult(_Record):
    """One contrast with its statistics and verdict.

    Attributes:
        differences: seed -> plus minus minus, for the seeds that every arm of the contrast has.
        unpaired: seeds that were asked for but lack a finished run with the metric in some arm.
        others: see `reprise.evidence.statistics.Difference`.
    """

    name: str
    metric: str
    formula: str
    direction: str
    margin: float
    differences: dict[int, float | None]
    unpaired: list[int]
    n: int
    mean: float | None
    sd: float | None
    ci: Interval | None
    bootstrap_ci: Interval | None
    p: float | None
    effect_size: float | None
    verdict: Outcome
    reason: str

    @property
    def claimed(self) -> str:
        """What the claim says of the difference, e.g. `> 0.02`."""
        return claimed(self.direction, self.margin)


class MissingRun(_Record):
    """A run that the verdict wanted and did not get."""

    arm: str
    seed: int
    status: str
    detail: str


class Verdict(_Record):
    """What the evidence says about a claim at one scale.

    Attributes:
        scale: the scale label of the runs.
        date: the day (ISO) on which the last run finished; None without a finished run.
        seeds: the seeds that were judged: the claim's, or those named on the command line (`reason` says so then).
        extra_seeds: other verdict seeds with finished runs. They are not judged: to add seeds until the interval
            suits would be optional stopping.
        config_hashes: `arm/seed=n` -> hash of the resolved configuration.
        seconds: of all finished runs together.
        cpu_seconds: processor time of all finished runs that recorded it.
        wall_seconds: of the sweeps that made the runs; None where none was recorded.
        jobs_at_once: of the last sweep; None where its launcher does not say.
    """

    paper: str
    scale: str
    statement: str
    date: str | None
    verdict: Outcome
    reason: str
    seeds: list[int]
    extra_seeds: list[int] = []
    arms: dict[str, ArmResult]
    primary: ContrastResult
    secondary: list[ContrastResult]
    missing: list[MissingRun]
    config_hashes: dict[str, str]
    git_commits: list[str]
    versions: dict[str, list[str]]
    machines: list[str]
    seconds: float
    finished_runs: int
    cpu_seconds: float | None = None
    wall_seconds: float | None = None
    jobs_at_once: int | None = None

    def contrasts(self) -> list[ContrastResult]:
        return [self.primary, *self.secondary]


def make_verdict(runs_dir: Path, slug: str, scale: str, seeds: Sequence[int] | None = None) -> Verdict:
    """The verdict over the run folders of one scale label; changes nothing on disk.

    Args:
        seeds: those named on the command line; without them the claim's are judged.

    Raises:
        ConfigError: no such paper, or its claim is wrong or says nothing about the scale.
    """
    sweep = read_sweep(runs_dir, slug, scale)
    verdict = judge(slug, scale, load_claim(slug).at(scale), find_runs(runs_dir, slug, scale), seeds)
    return verdict.model_copy(update={"wall_seconds": sweep.seconds, "jobs_at_once": sweep.jobs_at_once})


def write_verdict(verdict: Verdict, runs_dir: Path) -> Path:
    """Write `runs/<paper>/<scale>/verdict.json` and return its path."""
    return write_json(runs_dir / verdict.paper / verdict.scale / "verdict.json", verdict.model_dump(mode="json"))


def read_verdict(runs_dir: Path, slug: str, scale: str) -> Verdict | None:
    """What `verdict.json` says; None where there is none that is whole and newer than every run and the claim."""
    path = runs_dir / slug / scale / "verdict.json"
    sources = [*path.parent.glob("*/seed=*/run.json"), *path.parent.glob("*/seed=*"), discovery.claim_path(slug)]
    try:
        written = path.stat().st_mtime_ns
        if any(source.stat().st_mtime_ns > written for source in sources):
            return None
        return Verdict.model_validate(read_json(path))
    except (OSError, ValueError):
        return None


def judge(
    slug: str, label: str, claim: ScaledClaim, runs: Sequence[RunRecord], named: Sequence[int] | None = None
) -> Verdict:
    """The verdict of a claim over given runs.

    The runs of an arm share one configuration, up to the seed; those of another one are listed among the missing.
    Tuning seeds and runs that were moved aside do not count.

    Args:
        named: the seeds to judge in place of the claim's; tuning seeds among them are left out.
    """
    current = {(run.arm, run.seed): run for run in runs if run.seed is not None and _may_count(run, claim)}
    seeds = sorted(seed for seed in set(named or ()) if seed < TUNING_SEEDS_FROM) or sorted(claim.seeds)
    kept, others = one_configuration_an_arm(
        slug, label, list(claim.arms), [r for r in current.values() if r.is_finished]
    )
    extra = {run.seed for run in kept if run.seed is not None} - set(seeds)
    finished = {(run.arm, run.seed): run for run in kept if run.seed in seeds}
    primary, *secondary = (_contrast(contrast, seeds, finished) for contrast in claim.contrasts())
    outcome, reason = _conclusion(label, primary, seeds, claim.seeds)
    records = list(finished.values())
    return Verdict(
        paper=slug,
        scale=label,
        statement=claim.statement,
        date=max((run.text("finished")[:10] for run in records), default="") or None,
        verdict=outcome,
        reason=reason,
        seeds=seeds,
        extra_seeds=sorted(extra),
        arms={name: _arm(name, arm, claim.metrics(), records) for name, arm in claim.arms.items()},
        primary=primary,
        secondary=secondary,
        missing=_missing(claim, seeds, current, others),
        config_hashes={run.name: run.text("config_hash") for _, run in sorted(finished.items())},
        git_commits=_distinct(run.text("git_commit") for run in records),
        versions=_versions(records),
        machines=_distinct(describe_machine(run) for run in records),
        seconds=sum(run.seconds for run in records),
        finished_runs=len(records),
        cpu_seconds=_sum_of_known(run.cpu_seconds for run in records),
    )


def _may_count(run: RunRecord, claim: ScaledClaim) -> bool:
    is_verdicts = run.seed is not None and run.seed < TUNING_SEEDS_FROM
    return is_verdicts and run.status != "moved aside" and run.arm in claim.arms


def _conclusion(label: str, primary: ContrastResult, seeds: list[int], of_claim: Sequence[int]) -> tuple[Outcome, str]:
    if smoked_scale(label) is not None:
        return "inconclusive", "A smoke run proves the wiring, not the claim."
    if primary.unpaired:
        lacking = ", ".join(map(str, primary.unpaired))
        reason = f"Seeds without a finished run of every arm: {lacking}. Of the others alone: {primary.reason}"
        return "inconclusive", reason[:-1] + f" ({primary.verdict})."
    if seeds == sorted(of_claim):
        return primary.verdict, primary.reason
    shown = [", ".join(map(str, each)) for each in (seeds, sorted(of_claim))]
    return primary.verdict, f"{primary.reason} The seeds {shown[0]} were named by hand; the claim's are {shown[1]}."


def _contrast(contrast: Contrast, seeds: list[int], finished: dict[tuple[str, int], RunRecord]) -> ContrastResult:
    differences: dict[int, float] = {}
    for seed in seeds:
        metrics = {arm: finished[arm, seed].metrics for arm in contrast.arms() if (arm, seed) in finished}
        try:
            differences[seed] = contrast.value(metrics)
        except KeyError:
            continue
    statistics = compare(list(differences.values()), direction=contrast.direction, margin=contrast.margin)
    return ContrastResult(
        name=contrast.name,
        metric=contrast.metric,
        formula=contrast.formula(),
        direction=contrast.direction,
        margin=contrast.margin,
        differences={seed: _finite(value) for seed, value in differences.items()},
        unpaired=[seed for seed in seeds if seed not in differences],
        n=statistics.summary.n,
        mean=statistics.summary.mean,
        sd=statistics.summary.sd,
        ci=statistics.summary.ci,
        bootstrap_ci=statistics.bootstrap_ci,
        p=statistics.p,
        effect_size=statistics.effect_size,
        verdict=statistics.outcome,
        reason=statistics.reason,
    )


def _arm(name: str, arm: Arm, metrics: list[str], runs: Sequence[RunRecord]) -> ArmResult:
    own = sorted((run for run in runs if run.arm == name), key=lambda run: run.seed or 0)
    samples = {}
    for metric in metrics:
        values = {run.seed: run.metrics[metric] for run in own if run.seed is not None and metric in run.metrics}
        if values:
            samples[metric] = _sample(values, summarise(list(values.values())))
    return ArmResult(label=arm.label, overrides=arm.overrides, metrics=samples)


def _sample(values: dict[int, float], summary: Summary) -> Sample:
    finite = {seed: _finite(value) for seed, value in values.items()}
    return Sample(values=finite, n=summary.n, mean=summary.mean, sd=summary.sd, ci=summary.ci)


def _missing(
    claim: ScaledClaim, seeds: list[int], current: Mapping[tuple[str, int], RunRecord], others: Sequence[RunRecord]
) -> list[MissingRun]:
    missing = []
    for arm in claim.arms:
        for seed in seeds:
            run = current.get((arm, seed))
            if run is None:
                missing.append(MissingRun(arm=arm, seed=seed, status="not run", detail="there is no run folder"))
            elif not run.is_finished:
                missing.append(MissingRun(arm=arm, seed=seed, status=run.status, detail=run.problem))
            elif run in others:
                detail = f"{run.text('config_hash')[:8] or 'an unknown one'} is not that of the runs judged"
                missing.append(MissingRun(arm=arm, seed=seed, status="another configuration", detail=detail))
            elif absent := _absent_metrics(claim, arm, run):
                missing.append(MissingRun(arm=arm, seed=seed, status="no metric", detail=", ".join(absent)))
    return missing


def _absent_metrics(claim: ScaledClaim, arm: str, run: RunRecord) -> list[str]:
    wanted = dict.fromkeys(term.metric for each in claim.contrasts() for term in each.terms() if term.arm == arm)
    return [metric for metric in wanted if metric not in run.metrics]


def _versions(runs: Sequence[RunRecord]) -> dict[str, list[str]]:
    versions: dict[str, set[str]] = {}
    for run in runs:
        given = run.info.get("versions")
        for name, version in given.items() if isinstance(given, dict) else ():
            versions.setdefault(str(name), set()).add(str(version))
    return {name: sorted(found) for name, found in sorted(versions.items())}


def cost(verdict: Verdict) -> str:
    """What the runs of a verdict took, in words."""
    parts = [f"{duration(verdict.seconds)} in all"]
    if verdict.cpu_seconds is not None:
        parts.append(f"{duration(verdict.cpu_seconds)} of processor time")
    if verdict.wall_seconds is not None:
        at_once = "" if verdict.jobs_at_once is None else f" with {verdict.jobs_at_once} at once"
        parts.append(f"{duration(verdict.wall_seconds)} from start to end{at_once}")
    return ", ".join(parts)


def describe_machine(run: RunRecord) -> str:
    """The `machine` of run.json in one line."""
    machine = run.info.get("machine")
    if isinstance(machine, dict):
        return ", ".join(f"{key} {value}" for key, value in machine.items() if value not in (None, "", [], {}))
    return run.text("machine")


def _sum_of_known(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) if known else None


def _distinct(values: Iterable[str]) -> list[str]:
    return sorted({value for value in values if value})


def _finite(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None
