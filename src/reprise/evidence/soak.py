"""A soak: smoke runs of every paper are killed at random moments, started again, and compared with undisturbed ones."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from omegaconf import DictConfig

from reprise import config as configuration
from reprise import paths
from reprise.errors import RepriseError
from reprise.evidence import children
from reprise.evidence.formatting import markdown_table
from reprise.evidence.states import run_differences
from reprise.training.runfolder import git_commit, machine, now

OVERRIDES = ("smoke=true", "callbacks.checkpoint.every_steps=1")


@dataclass
class PaperSoak:
    """What a paper bore: kills, runs that were brought to their end, and what went wrong with them."""

    slug: str
    kills: int = 0
    runs: int = 0
    lost: list[str] = field(default_factory=list)
    mismatches: list[str] = field(default_factory=list)
    seconds: float = 0.0


@dataclass(frozen=True)
class Victim:
    """The runs of a paper: their configuration, where below a folder of runs the run folder lies, how long it takes."""

    config: Path
    place: Path
    reference: Path
    seconds: float

    @classmethod
    def prepare(cls, cfg: DictConfig, folder: Path) -> Victim:
        """Make the undisturbed run that the others are compared with.

        Raises:
            RepriseError: it fails.
        """
        place = configuration.run_dir(cfg).relative_to(paths.runs_dir())
        config = children.write_config(cfg, folder)
        for name in ("warm", "reference"):  # the first run fills caches, the second one is timed
            began = time.monotonic()
            ended = children.run(config, folder / name)
            if ended.code:
                raise RepriseError(f"the undisturbed run of {cfg.slug} failed: {ended.messages}", looked_at=folder)
        return cls(config, place, folder / "reference" / place, time.monotonic() - began)


def soak(
    slugs: Sequence[str],
    kills: int,
    seed: int,
    folder: Path,
    *,
    at_once: int = 2,
    tell: Callable[[PaperSoak], None] = lambda paper: None,
) -> list[PaperSoak]:
    """Spread `kills` over papers, `at_once` of them in parallel; `tell` hears of each paper that is done."""
    configurations = [configuration.compose([f"experiment={slug}/small", *OVERRIDES]) for slug in slugs]
    shares = [kills // len(slugs) + (number < kills % len(slugs)) for number in range(len(slugs))]

    def torment(cfg: DictConfig, share: int) -> PaperSoak:
        result = torment_paper(cfg, share, random.Random(f"{seed} {cfg.slug}"), folder / cfg.slug)
        tell(result)
        return result

    with ThreadPoolExecutor(at_once) as pool:
        return list(pool.map(torment, configurations, shares))


def torment_paper(cfg: DictConfig, kills: int, rng: random.Random, folder: Path) -> PaperSoak:
    """Kill runs of a paper at random moments until all kills are done; every run is started again until it ends."""
    began = time.monotonic()
    victim = Victim.prepare(cfg, folder)
    result = PaperSoak(cfg.slug)
    while result.kills < kills:
        runs = folder / f"run-{result.runs}"
        while result.kills < kills and _killed(victim, runs, rng):
            result.kills += 1
        _finish(victim, runs, result)
    result.seconds = time.monotonic() - began
    return result


def _killed(victim: Victim, runs: Path, rng: random.Random) -> bool:
    """Start (or continue) a run and kill it at a random moment; False where it had ended by then."""
    child = children.start(victim.config, runs)
    child.process.join(rng.uniform(0, victim.seconds))
    if child.process.exitcode is not None:
        return False
    child.kill()
    return True


def _finish(victim: Victim, runs: Path, result: PaperSoak) -> None:
    """Bring a run to its end and compare it with the undisturbed one."""
    result.runs += 1
    ended = children.run(victim.config, runs)
    if ended.code:
        result.lost.append(f"{result.slug}: exit code {ended.code}: {ended.messages.strip()[-300:]}")
        return
    different = run_differences(runs / victim.place, victim.reference)
    if different:
        result.mismatches.append(f"{result.slug}: {', '.join(different[:5])}")


def passed(results: Sequence[PaperSoak]) -> bool:
    """Whether every killed run came to its end with the same bits."""
    return not any(paper.lost or paper.mismatches for paper in results)


def closing_line(results: Sequence[PaperSoak]) -> str:
    kills, runs = sum(paper.kills for paper in results), sum(paper.runs for paper in results)
    lost, different = (sum(len(getattr(paper, name)) for paper in results) for name in ("lost", "mismatches"))
    return f"{kills} kills over {len(results)} papers, {runs} runs: {lost} lost, {different} with other final bits"


def to_markdown(results: Sequence[PaperSoak], command: str) -> str:
    """The page docs/soak.md."""
    rows = [
        [p.slug, str(p.kills), str(p.runs), str(len(p.lost)), str(len(p.mismatches)), f"{p.seconds:.0f}"]
        for p in results
    ]
    here = machine()
    lines = [
        "# Soak",
        "",
        f"Generated by `{command}`. Each paper's smoke run is killed (SIGKILL) at random moments and started",
        "again; a run that does not come to its end is lost, and one whose final checkpoint or metrics are not",
        "bit-identical to those of an undisturbed run is a mismatch.",
        "",
        f"**{closing_line(results)}.** {now()[:10]}, commit {git_commit()}, {here['cores']} cores.",
        "",
        *markdown_table(("paper", "kills", "runs", "lost", "mismatches", "seconds"), rows),
        "",
        *(f"- {complaint}" for paper in results for complaint in (*paper.lost, *paper.mismatches)),
    ]
    return "\n".join(lines).rstrip() + "\n"
