"""The verdict as a panel in the terminal."""

from __future__ import annotations

from rich.console import Group
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from reprise.evidence.formatting import ABSENT, extra_seeds, interval, number, signed
from reprise.evidence.verdict import ContrastResult, Verdict

COLOURS = {"supported": "green", "refuted": "red", "inconclusive": "yellow"}


def render_panel(verdict: Verdict) -> Panel:
    """Statement, arms with every seed, contrasts with intervals, what is missing, and the verdict."""
    parts: list[Text | Table] = [
        Text(verdict.statement, style="bold"),
        Text(),
        _arms(verdict),
        Text(),
        _contrasts(verdict),
    ]
    if verdict.missing:
        parts += [Text(), _missing(verdict)]
    if verdict.extra_seeds:
        parts += [Text(), Text(extra_seeds(verdict.extra_seeds), style="yellow")]
    colour = COLOURS[verdict.verdict]
    parts += [Text(), Text.assemble((verdict.verdict.upper(), f"bold {colour}"), f"  {verdict.reason}")]
    return Panel(
        Group(*parts),
        title=Text.assemble((verdict.paper, "bold"), f" · {verdict.scale}"),
        border_style=colour,
        padding=(1, 2),
    )


def _arms(verdict: Verdict) -> Table:
    metric = verdict.primary.metric
    table = Table(box=None, pad_edge=False)
    table.add_column("arm")
    table.add_column(metric, justify="right")
    table.add_column("95 % CI", justify="right", no_wrap=True)
    table.add_column("every seed")
    for arm in verdict.arms.values():
        sample = arm.metrics.get(metric)
        if sample is None:
            table.add_row(Text(arm.label), ABSENT, ABSENT, "no finished run")
            continue
        seeds = "  ".join(number(value) for value in sample.values.values())
        table.add_row(Text(arm.label), number(sample.mean), Text(interval(sample.ci)), Text(seeds, style="dim"))
    return table


def _contrasts(verdict: Verdict) -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column("contrast (claimed)")
    for name in ("difference", "95 % CI", "p", "seeds"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("verdict", no_wrap=True)
    for contrast in verdict.contrasts():
        table.add_row(*_contrast_cells(contrast))
    return table


def _contrast_cells(contrast: ContrastResult) -> list[str | Text]:
    return [
        Text(f"{contrast.name} ({contrast.claimed})"),
        signed(contrast.mean),
        Text(interval(contrast.ci, sign=True)),
        number(contrast.p, 3),
        str(contrast.n),
        Text(contrast.verdict, style=COLOURS[contrast.verdict]),
    ]


def _missing(verdict: Verdict) -> Text:
    shown = [f"{run.arm} seed {run.seed}: {run.status} ({run.detail})" for run in verdict.missing[:8]]
    more = len(verdict.missing) - len(shown)
    if more:
        shown.append(f"and {more} more")
    return Text("Missing runs\n" + "\n".join(f"  {line}" for line in shown), style="yellow")
