"""A W&B workspace and report of one paper at one scale, from its run folders: curves by arm, verdict table, pictures.

The specification is a plain object (JSON) and needs neither W&B nor a network; `publish` turns it into W&B's objects.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from reprise.errors import ConfigError, RepriseError
from reprise.evidence import figures
from reprise.evidence.claims import load_claim
from reprise.evidence.formatting import interval, markdown_table, number, signed
from reprise.evidence.runs import find_runs
from reprise.evidence.verdict import Verdict, make_verdict


def specification(runs_dir: Path, slug: str, scale: str) -> dict[str, Any]:
    """What the workspace and the report show.

    Raises:
        ConfigError: no such paper, or no finished runs of it at this scale.
    """
    verdict, claim = make_verdict(runs_dir, slug, scale), load_claim(slug).at(scale)
    finished = [run for run in find_runs(runs_dir, slug, scale) if run.is_finished and run.arm in claim.arms]
    if not finished:
        raise ConfigError(
            f"there are no finished runs of {slug} at the scale {scale}",
            looked_at=runs_dir / slug / scale,
            next_step=f"reprise reproduce experiment={slug}/small logger=wandb",
        )
    metrics = figures.shown_metrics([run.curves() for run in finished], claim.metrics())
    norms = ["grad_norm"] if any("grad_norm" in run.curves() for run in finished) else []
    pictures = sorted({f"pictures/{picture.name}" for run in finished for picture in run.pictures()})
    sections = [
        {"name": "Learning curves by arm", "panels": [_curve(metric) for metric in metrics]},
        {"name": "The method at work", "panels": [{"kind": "media", "keys": pictures}] if pictures else []},
        {"name": "Diagnostics", "panels": [_curve(name) for name in [*norms, "timing/items_per_second"]]},
    ]
    return {
        "title": f"{slug} · {scale}: {verdict.verdict}",
        "statement": verdict.statement,
        "group": f"{slug}/{scale}",
        "verdict": [_paragraph(verdict), *_tables(verdict)],
        "sections": [section for section in sections if section["panels"]],
    }


def _curve(metric: str) -> dict[str, Any]:
    """One line an arm (its runs' mean) with a band from the lowest to the highest seed."""
    return {"kind": "line", "x": "step", "y": [metric], "title": metric, "group_by": "job_type", "band": "minmax"}


def _paragraph(verdict: Verdict) -> str:
    return f"**{verdict.verdict.upper()}** {verdict.reason}"


def _tables(verdict: Verdict) -> list[str]:
    contrasts = [
        [
            *(each.name, each.claimed, signed(each.mean), interval(each.ci, sign=True)),
            *(number(each.p), str(each.n), each.verdict),
        ]
        for each in verdict.contrasts()
    ]
    arms = [
        [arm.label, metric, number(sample.mean), interval(sample.ci), str(sample.n)]
        for arm in verdict.arms.values()
        for metric, sample in arm.metrics.items()
    ]
    head = ["contrast", "claimed", "difference", "95 % CI", "p", "seeds", "verdict"]
    return [
        "\n".join(markdown_table(head, contrasts)),
        "\n".join(markdown_table(["arm", "metric", "mean", "95 % CI", "seeds"], arms)),
    ]


def make_report(spec: Mapping[str, Any], project: str, entity: str) -> Any:
    """The specification as a W&B report, not yet saved."""
    reports, _ = _libraries()
    runs = reports.Runset(
        project=project, entity=entity, name=spec["group"], filters=f"Metric('group') = '{spec['group']}'"
    )
    blocks = [reports.MarkdownBlock(text=f"> {spec['statement']}")]
    blocks += [reports.MarkdownBlock(text=text) for text in spec["verdict"]]
    for section in spec["sections"]:
        blocks.append(reports.H2(text=section["name"]))
        blocks.append(reports.PanelGrid(runsets=[runs], panels=_panels(section["panels"], reports)))
    return reports.Report(project=project, entity=entity, title=spec["title"], blocks=blocks)


def make_workspace(spec: Mapping[str, Any], project: str, entity: str) -> Any:
    """The specification as a W&B workspace, not yet saved."""
    reports, workspaces = _libraries()
    sections = [
        workspaces.Section(name=section["name"], panels=_panels(section["panels"], reports), is_open=True)
        for section in spec["sections"]
    ]
    chosen = workspaces.RunsetSettings(filters=f"Metric('group') = '{spec['group']}'")
    return workspaces.Workspace(
        entity=entity, project=project, name=spec["title"], sections=sections, runset_settings=chosen
    )


def publish(spec: Mapping[str, Any], project: str, entity: str) -> list[str]:
    """Save workspace and report on W&B and return their addresses."""
    made = [make_workspace(spec, project, entity), make_report(spec, project, entity)]
    return [each.save().url for each in made]


def _panels(panels: Sequence[Mapping[str, Any]], reports: Any) -> list[Any]:
    return [_panel(panel, reports) for panel in panels]


def _panel(panel: Mapping[str, Any], reports: Any) -> Any:
    if panel["kind"] == "media":
        return reports.MediaBrowser(title="Pictures", media_keys=panel["keys"])
    return reports.LinePlot(
        title=panel["title"],
        x=panel["x"],
        y=panel["y"],
        groupby=panel["group_by"],
        groupby_aggfunc="mean",
        groupby_rangefunc=panel["band"],
        aggregate=True,
    )


def _libraries() -> tuple[Any, Any]:
    try:
        import wandb_workspaces.reports.v2 as reports
        import wandb_workspaces.workspaces as workspaces
    except ImportError as error:
        raise RepriseError(
            "the dashboard needs wandb-workspaces, which is not installed",
            looked_at="the extra `dashboard` in pyproject.toml",
            next_step="pip install -c constraints.txt -e '.[dashboard]', or --json for the specification alone",
        ) from error
    return reports, workspaces
