"""Numbers for readers: one way to write them in panels, tables, reports and Markdown."""

from __future__ import annotations

from collections.abc import Sequence

from reprise.evidence.statistics import Interval

ABSENT = "–"


def number(value: float | None, digits: int = 4) -> str:
    """A fixed number of decimals; a dash for None."""
    return ABSENT if value is None else f"{value:.{digits}f}".replace("-", "−")


def signed(value: float | None, digits: int = 4) -> str:
    """As `number`, with a plus sign too."""
    return ABSENT if value is None else f"{value:+.{digits}f}".replace("-", "−")


def claimed(direction: str, margin: float) -> str:
    """What a claim says of a difference, e.g. `> 0.02`, `< −0.05` or `< 0`."""
    return f"> {margin:g}" if direction == "higher" else f"< {'−' if margin else ''}{margin:g}"


def interval(ends: Interval | None, digits: int = 4, *, sign: bool = False) -> str:
    """`[low, high]`; a dash for None."""
    if ends is None:
        return ABSENT
    write = signed if sign else number
    return f"[{write(ends[0], digits)}, {write(ends[1], digits)}]"


def duration(seconds: float) -> str:
    """Seconds for people: `48 s`, `6 min 10 s`, `2 h 05 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def count(value: float | None) -> str:
    """A large count with a unit: `86.6 M`, `17.6 G`; a dash for None."""
    if value is None:
        return ABSENT
    for unit, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(value) >= size:
            return f"{value / size:.4g} {unit}"
    return f"{value:g}"


def size(value: float | None) -> str:
    """Bytes with a binary unit: `3.2 GiB`; a dash for None."""
    if value is None:
        return ABSENT
    for unit, bytes_in in (("TiB", 2**40), ("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if value >= bytes_in:
            return f"{value / bytes_in:.1f} {unit}"
    return f"{value:.0f} B"


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A Markdown table as lines, with a blank line after it; bars in cells are escaped."""

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"

    return [line(head), "|" + "---|" * len(head), *(line(row) for row in rows), ""]


def extra_seeds(seeds: Sequence[int]) -> str:
    """A line on finished seeds that were not judged."""
    return f"Finished, but not judged, because the claim names other seeds: seed {', '.join(map(str, seeds))}"
