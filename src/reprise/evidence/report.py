"""`runs/<paper>/report.html` and `runs/index.html`: self-contained pages built from run folders, claim and card."""

from __future__ import annotations

import base64
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from reprise import discovery
from reprise.errors import ConfigError
from reprise.evidence import figures, formatting
from reprise.evidence.cards import Card, load_card
from reprise.evidence.claims import ScaledClaim, load_claim
from reprise.evidence.diagnostics import ArmDiagnostics, diagnose
from reprise.evidence.files import write_text
from reprise.evidence.published import Comparison, comparisons
from reprise.evidence.runs import RunRecord, find_runs, papers_with_runs, scale_labels
from reprise.evidence.verdict import ContrastResult, Verdict, cost, make_verdict, read_verdict, write_verdict
from reprise.evidence.versions import other_versions

if TYPE_CHECKING:
    from jinja2 import Environment

SYMBOLS = {"supported": "✓", "refuted": "✗", "inconclusive": "≈"}


@dataclass(frozen=True)
class Curve:
    """One metric's learning curves as SVG."""

    metric: str
    svg: str


@dataclass(frozen=True)
class Image:
    """One picture of a run as a data URI."""

    name: str
    caption: str
    arm: str
    run: str
    source: str


@dataclass(frozen=True)
class ScaleSection:
    """All that the report shows of one scale."""

    verdict: Verdict
    data: str
    strips: list[tuple[ContrastResult, str]]
    legend: list[tuple[str, str]]
    curves: list[Curve]
    images: list[Image]
    diagnostics: list[ArmDiagnostics]
    runs: list[RunRecord]
    repeat: list[str]
    other_versions: list[str]
    tuning: str
    published: list[Comparison]


@dataclass(frozen=True)
class OurResult:
    """Our number beside the published ones: one arm at one scale."""

    scale: str
    data: str
    arm: str
    metric: str
    mean: float | None
    ci: tuple[float, float] | None
    n: int
    is_method: bool


@dataclass(frozen=True)
class IndexRow:
    """One paper on the index page; `problem` says why it has no verdicts, or is ""."""

    slug: str
    title: str
    family: str
    verdicts: list[Verdict]
    problem: str = ""


def build_report(runs_dir: Path, slug: str, seeds: Mapping[str, Sequence[int]] | None = None) -> Path:
    """Write the report of one paper, with the verdict.json of each scale, and return its path.

    Args:
        seeds: by scale label those to judge in place of the claim's.

    Raises:
        ConfigError: no such paper, no runs of it, or its card or claim is wrong.
    """
    card, labels = load_card(slug), _reported(runs_dir, slug)
    if not labels:
        raise ConfigError(
            f"There are no runs of {slug} to report.",
            looked_at=runs_dir / slug,
            next_step=f"`reprise reproduce experiment={slug}/small` makes them",
        )
    sections = [_section(runs_dir, slug, label, card, (seeds or {}).get(label)) for label in labels]
    for section in sections:
        write_verdict(section.verdict, runs_dir)
    page = _environment().get_template("report.html.j2")
    html = page.render(
        slug=slug, card=card, sections=sections, ours=_ours(sections), statement=sections[0].verdict.statement
    )
    return write_text(runs_dir / slug / "report.html", html)


def build_index(runs_dir: Path) -> Path:
    """Write `index.html` over all papers that have runs, and return its path."""
    known = set(discovery.papers())
    rows = [_index_row(runs_dir, slug) for slug in papers_with_runs(runs_dir) if slug in known]
    html = _environment().get_template("index.html.j2").render(rows=rows)
    return write_text(runs_dir / "index.html", html)


def _index_row(runs_dir: Path, slug: str) -> IndexRow:
    """A paper whose card or claim is wrong is shown as such: it must not hide the others."""
    labels = [label for label in scale_labels(runs_dir, slug) if label in discovery.SCALES]
    try:
        card = load_card(slug)
        verdicts = [read_verdict(runs_dir, slug, label) or make_verdict(runs_dir, slug, label) for label in labels]
    except ConfigError as error:
        return IndexRow(slug, slug, "", [], error.problem)
    return IndexRow(slug, card.title, card.family, verdicts)


def _reported(runs_dir: Path, slug: str) -> list[str]:
    """The scale labels that the claim speaks of, other recipes (a longer run, fine-tuning) left out.

    Variants without a finished run (a refused value leaves one) count only where there is nothing else.
    """
    claim = load_claim(slug)
    labels = [label for label in scale_labels(runs_dir, slug) if claim.speaks_of(label)]
    kept = [
        each for each in labels if "~" not in each or any(run.is_finished for run in find_runs(runs_dir, slug, each))
    ]
    return kept or labels


def _section(runs_dir: Path, slug: str, label: str, card: Card, seeds: Sequence[int] | None) -> ScaleSection:
    claim, runs = load_claim(slug).at(label), find_runs(runs_dir, slug, label)
    verdict = make_verdict(runs_dir, slug, label, seeds)
    finished = [run for run in runs if run.is_finished and run.name in verdict.config_hashes]
    by_arm = {name: [run.curves() for run in finished if run.arm == name] for name in claim.arms}
    metrics = figures.shown_metrics([curves for arm in by_arm.values() for curves in arm], claim.metrics())
    return ScaleSection(
        verdict=verdict,
        data=card.data.get(claim.scale) or "",
        strips=[(contrast, figures.contrast_figure(contrast, label)) for contrast in verdict.contrasts()],
        legend=[(figures.legend_swatch(index), arm.label) for index, arm in enumerate(claim.arms.values())],
        curves=[Curve(metric, figures.curve_figure(by_arm, metric, label)) for metric in metrics],
        images=_images(finished, {name: arm.label for name, arm in claim.arms.items()}),
        diagnostics=_diagnostics(finished, {name: arm.label for name, arm in claim.arms.items()}, label),
        runs=runs,
        repeat=_repeat(verdict, claim, finished),
        other_versions=other_versions(verdict.versions),
        tuning=claim.tuning,
        published=comparisons(card, claim, verdict),
    )


def _images(finished: Sequence[RunRecord], labels: dict[str, str]) -> list[Image]:
    """The pictures of each arm's run with the lowest seed."""
    images = []
    for arm, label in labels.items():
        for run in [run for run in finished if run.arm == arm][:1]:
            for picture in run.pictures():
                data = base64.b64encode(picture.file.read_bytes()).decode()
                source = f"data:image/png;base64,{data}"
                images.append(Image(picture.name, picture.caption, label, run.folder.name, source))
    return images


def _diagnostics(finished: Sequence[RunRecord], labels: dict[str, str], scale: str) -> list[ArmDiagnostics]:
    found = [
        diagnose([run for run in finished if run.arm == arm], label, f"{scale}/{arm}") for arm, label in labels.items()
    ]
    return [each for each in found if each is not None]


def _repeat(verdict: Verdict, claim: ScaledClaim, finished: Sequence[RunRecord]) -> list[str]:
    """Commands that make these runs again: the whole claim, or for a variant its runs one by one."""
    checkout = [_checkout(commit) for commit in verdict.git_commits if len(verdict.git_commits) == 1]
    recorded = list(dict.fromkeys(run.text("command") for run in finished if run.text("command")))
    if verdict.scale not in discovery.SCALES:
        return checkout + recorded
    words = ["make", "reproduce", f"PAPER={verdict.paper}", f"SCALE={verdict.scale}"]
    if verdict.seeds != sorted(claim.seeds):
        words.append("SEEDS=" + ",".join(map(str, verdict.seeds)))
    return checkout + list(dict.fromkeys(shlex.join([*words, *_args(command)]) for command in recorded or [""]))


def _args(command: str) -> list[str]:
    """What a recorded `reprise reproduce` was given beside paper, scale and seeds, as `ARGS=...`."""
    try:
        words = shlex.split(command)
    except ValueError:
        return []
    if words[:2] != ["reprise", "reproduce"]:
        return []
    own = [word for word in words[2:] if word.partition("=")[0] not in ("experiment", "seed")]
    return [f"ARGS={shlex.join(own)}"] if own else []


def _checkout(commit: str) -> str:
    clean = commit.removesuffix("+changes")
    return f"git checkout {clean}" + ("" if clean == commit else "   # the runs had uncommitted changes on top")


def _ours(sections: Sequence[ScaleSection]) -> list[OurResult]:
    results = []
    for section in sections:
        if section.verdict.scale not in discovery.SCALES:
            continue
        metric = section.verdict.primary.metric
        for index, arm in enumerate(section.verdict.arms.values()):
            sample = arm.metrics.get(metric)
            if sample is not None:
                shown = (section.verdict.scale, section.data, arm.label, metric, sample.mean, sample.ci, sample.n)
                results.append(OurResult(*shown, is_method=index == 0))
    return results


def _environment() -> Environment:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    folder = Path(__file__).parent / "templates"
    environment = Environment(
        loader=FileSystemLoader(folder),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "number": formatting.number,
        "signed": formatting.signed,
        "interval": formatting.interval,
        "duration": formatting.duration,
        "size": formatting.size,
        "count": formatting.count,
        "cost": cost,
        "extra_seeds": formatting.extra_seeds,
    }
    environment.globals |= {"symbols": SYMBOLS}
    return environment
