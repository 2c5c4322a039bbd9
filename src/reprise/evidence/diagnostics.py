"""What the report says of how training went: gradient norms over the steps, throughput, waiting for data, memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import mean, median

from reprise.evidence import figures
from reprise.evidence.runs import Curves, RunRecord

PREFIX = "grad_norm/"


@dataclass(frozen=True)
class ArmDiagnostics:
    """One arm's runs.

    Attributes:
        items_per_second: median over all rows of all runs.
        data_wait: mean share of the time spent waiting for data.
        memory_bytes: the highest peak.
        spike: the largest gradient norm over the median one of a run (highest run), with `spike_part`, `spike_step` and
            `spike_run` to say where.
        svg: gradient norms over the steps of the first run, of the parts of the model with the highest.
        parts: (legend swatch, name) of the figure's lines.
    """

    label: str
    run: str
    items_per_second: float | None
    data_wait: float | None
    memory_bytes: float | None
    spike: float | None
    spike_part: str
    spike_step: int
    spike_run: str
    svg: str
    parts: list[tuple[str, str]]


def diagnose(runs: Sequence[RunRecord], label: str, key: str) -> ArmDiagnostics | None:
    """The diagnostics of one arm's finished runs; None where they left none (runs of an older version).

    Args:
        label: the arm's label.
        key: what tells this figure from others on its page.
    """
    timing = [run.timing() for run in runs]
    norms = {run.folder.name: gradient_norms(run.curves()) for run in runs}
    if not any(timing) and not any(norms.values()):
        return None
    first = next((name for name, parts in norms.items() if parts), "")
    parts = dict(list(norms.get(first, {}).items())[: figures.SERIES])
    height, part, step, where = max((_spike(parts, name) for name, parts in norms.items()), default=(0.0, "", 0, ""))
    return ArmDiagnostics(
        label=label,
        run=first,
        items_per_second=_over(timing, "items_per_second", median),
        data_wait=_over(timing, "data_wait", mean),
        memory_bytes=_over(timing, "memory_bytes", max),
        spike=height or None,
        spike_part=part,
        spike_step=step,
        spike_run=where,
        svg=figures.lines_figure(parts, f"Gradient norms of {label}, {first}, by part of the model", key)
        if parts
        else "",
        parts=[(figures.legend_swatch(index), name) for index, name in enumerate(parts)],
    )


def gradient_norms(curves: Curves) -> dict[str, list[tuple[int, float]]]:
    """The gradient-norm curves of a run by part of the model, in the order of their highest values."""
    found = {name.removeprefix(PREFIX): points for name, points in curves.items() if name.startswith(PREFIX)}
    return dict(sorted(found.items(), key=lambda item: -max(value for _, value in item[1])))


def _spike(parts: Mapping[str, Sequence[tuple[int, float]]], run: str) -> tuple[float, str, int, str]:
    """(largest norm over the part's median, part, step, run)."""
    spikes = []
    for name, points in parts.items():
        usual = median(value for _, value in points)
        step, highest = max(points, key=lambda point: point[1])
        if usual > 0:
            spikes.append((highest / usual, name, step, run))
    return max(spikes, default=(0.0, "", 0, run))


def _over(timing: Sequence[Curves], name: str, how: Callable[[list[float]], float]) -> float | None:
    values = [value for curves in timing for _, value in curves.get(name, [])]
    return how(values) if values else None
