"""Figures of a report as inline SVG whose colours are CSS variables, so that they follow light, dark and print."""

from __future__ import annotations

import hashlib
import io
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING
from xml.sax.saxutils import quoteattr

from reprise.evidence.formatting import interval, signed
from reprise.evidence.runs import Curves
from reprise.evidence.verdict import ContrastResult

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SERIES = 8  # the style sheet defines --s0 to --s7
DASHES = ("", "6 2.5", "1.5 2", "8 2 1.5 2", "3 2", "10 3", "1 3", "6 2 1 2 1 2")  # a second sign beside colour
MAX_POINTS = 120
_INK, _FAINT = "#0a0b0c", "#0a0b0d"  # stand-ins that become CSS variables
_VARIABLES = {_INK: "var(--ink)", _FAINT: "var(--line)"} | {f"#f0e0d{i}": f"var(--s{i})" for i in range(SERIES)}


@dataclass(frozen=True)
class Band:
    """A curve over seeds: steps, and the mean, lowest and highest value over the seeds at each."""

    steps: list[float]
    mean: list[float]
    low: list[float]
    high: list[float]


def series_colour(index: int) -> str:
    return f"#f0e0d{index % SERIES}"


def band(seeds: Sequence[Sequence[tuple[int, float]]], points: int = MAX_POINTS) -> Band:
    """Merge one metric's curves of several seeds.

    Args:
        seeds: for each seed its (step, value) pairs; values that are not finite are left out.
        points: the steps are cut into at most this many equal bins, and a seed's values in a bin are averaged.
    """
    last = max((step for curve in seeds for step, _ in curve), default=0)
    width = max(math.ceil((last + 1) / points), 1)
    bins: dict[int, list[tuple[float, float]]] = {}
    for curve in seeds:
        for index, pairs in _binned(curve, width).items():
            steps, values = zip(*pairs, strict=True)
            bins.setdefault(index, []).append((sum(steps) / len(steps), sum(values) / len(values)))
    ordered = [bins[index] for index in sorted(bins)]
    return Band(
        steps=[sum(step for step, _ in seen) / len(seen) for seen in ordered],
        mean=[sum(value for _, value in seen) / len(seen) for seen in ordered],
        low=[min(value for _, value in seen) for seen in ordered],
        high=[max(value for _, value in seen) for seen in ordered],
    )


def _binned(curve: Sequence[tuple[int, float]], width: int) -> dict[int, list[tuple[int, float]]]:
    bins: dict[int, list[tuple[int, float]]] = {}
    for step, value in curve:
        if math.isfinite(value):
            bins.setdefault(step // width, []).append((step, value))
    return bins


def shown_metrics(runs: Sequence[Curves], first: Sequence[str] = ()) -> list[str]:
    """The metrics worth a figure: validation twins of `first`, the training loss, then the other validation ones."""
    logged = {metric for curves in runs for metric, points in curves.items() if len(points) > 1}
    twins = ["val/" + metric.partition("/")[2] for metric in first]
    wanted = dict.fromkeys([*twins, "train/loss", *sorted(name for name in logged if name.startswith("val/"))])
    return [metric for metric in wanted if metric in logged]


def curve_figure(arms: Mapping[str, Sequence[Curves]], metric: str, key: str = "") -> str:
    """Learning curves of one metric: a line (mean over seeds) and a band (lowest to highest seed) for each arm.

    Args:
        arms: label -> the curves of each of its runs.
        metric: which metric.
        key: what tells this figure from others on its page, e.g. the scale.
    """
    figure, axes = _new_figure(4.6, 2.9)
    for index, runs in enumerate(arms.values()):
        merged = band([curves[metric] for curves in runs if metric in curves])
        if not merged.steps:
            continue
        colour, dashes = series_colour(index), _matplotlib_dashes(index)
        axes.fill_between(merged.steps, merged.low, merged.high, color=colour, alpha=0.18, linewidth=0)
        axes.plot(merged.steps, merged.mean, color=colour, linewidth=1.7, linestyle=dashes)
    axes.set_xlabel("step")
    axes.grid(axis="y", color=_FAINT, linewidth=0.8)
    axes.margins(x=0.01)
    return _svg(
        figure, f"Learning curves of {metric} for the arms {', '.join(arms)}; the numbers are in metrics.csv", key
    )


def lines_figure(lines: Mapping[str, Sequence[tuple[int, float]]], description: str, key: str = "") -> str:
    """Positive values over the steps on a logarithmic scale, one line a name; peaks stay whole.

    `key` tells this figure from others on its page.
    """
    figure, axes = _new_figure(9.4, 2.9)
    for index, points in enumerate(lines.values()):
        steps, values = zip(*points, strict=True)
        axes.plot(steps, values, color=series_colour(index), linewidth=1.2, linestyle=_matplotlib_dashes(index))
    axes.set_yscale("log")
    axes.set_xlabel("step")
    axes.grid(axis="y", color=_FAINT, linewidth=0.8)
    axes.margins(x=0.01)
    return _svg(figure, f"{description}; the numbers are in metrics.csv", key)


def contrast_figure(contrast: ContrastResult, key: str = "") -> str:
    """A strip: every seed's difference as a dot, the mean with its 95 % interval, zero, and the claimed side.

    `key` tells this figure from others on its page.
    """
    figure, axes = _new_figure(5.0, 1.1)
    threshold = contrast.margin if contrast.direction == "higher" else -contrast.margin
    points = [value for value in contrast.differences.values() if value is not None]
    low, high = _limits([0.0, threshold, *points, *(contrast.ci or ())])
    claimed = (threshold, high) if contrast.direction == "higher" else (low, threshold)
    axes.axvspan(*claimed, color=series_colour(2), alpha=0.12, linewidth=0)
    axes.axvline(0, color=_INK, linewidth=0.8)
    axes.axvline(threshold, color=series_colour(2), linewidth=1.4, linestyle=(0, (4, 2)))
    if contrast.ci is not None:
        axes.plot(contrast.ci, (1, 1), color=series_colour(0), linewidth=3, solid_capstyle="butt")
    if contrast.mean is not None:
        axes.plot([contrast.mean], [1], marker="D", markersize=7, color=series_colour(0), linestyle="none")
    axes.plot(
        points, [0.35] * len(points), marker="o", markersize=6, color=series_colour(0), alpha=0.6, linestyle="none"
    )
    axes.set(xlim=(low, high), ylim=(0, 1.5), yticks=[])
    axes.spines["left"].set_visible(False)
    axes.locator_params(axis="x", nbins=6)
    words = (
        f"{contrast.name}: mean difference {signed(contrast.mean)}, 95 % interval {interval(contrast.ci, sign=True)}"
    )
    return _svg(figure, f"{words}; the claim says {contrast.claimed}", key)


def legend_swatch(index: int) -> str:
    """A short line in an arm's colour and dashes, for the legend."""
    dashes = DASHES[index % SERIES] or "none"
    style = f"stroke: var(--s{index % SERIES}); stroke-width: 2.6; stroke-dasharray: {dashes}"
    line = f'<line x1="0" x2="28" y1="4" y2="4" style="{style}"/>'
    return f'<svg class="swatch" viewBox="0 0 28 8" width="28" height="8" aria-hidden="true">{line}</svg>'


def _matplotlib_dashes(index: int) -> str | tuple[int, tuple[float, ...]]:
    dashes = DASHES[index % SERIES]
    return (0, tuple(float(part) / 1.7 for part in dashes.split())) if dashes else "-"


def _limits(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    room = 0.12 * (high - low) or 0.01
    return low - room, high + room


def _new_figure(width: float, height: float) -> tuple[Figure, Axes]:
    from matplotlib.figure import Figure as NewFigure

    figure = NewFigure(figsize=(width, height), layout="constrained")
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(_INK)
    axes.tick_params(colors=_INK, labelsize=9)
    axes.xaxis.label.set_color(_INK)
    axes.xaxis.label.set_fontsize(9)
    return figure, axes


def _svg(figure: Figure, description: str, key: str) -> str:
    """The figure as an `<svg>` element: text stays text, colours become variables, the size follows the page."""
    from matplotlib import rc_context

    buffer = io.StringIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": description}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    text = re.sub(
        r'^<svg [^>]*?viewBox="([^"]+)"[^>]*>',
        rf'<svg viewBox="\1" role="img" aria-label={quoteattr(description)}>',
        text,
    )
    for stand_in, variable in _VARIABLES.items():
        text = text.replace(stand_in, variable)
    return _unique_ids(text, key).strip()


def _unique_ids(text: str, key: str) -> str:
    """Prefix ids, so that several figures can share a page."""
    prefix = hashlib.blake2b((key + text).encode(), digest_size=4).hexdigest()
    for pattern in (r'\bid="', r"url\(#", r'href="#'):
        text = re.sub(pattern, lambda found: f"{found.group(0)}f{prefix}-", text)
    return text
