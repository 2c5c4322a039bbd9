"""A row a paper, made from files alone: recipes, card, PARITY, SIZES and RECORDS.json, RESULTS.md. Cheap to import."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from reprise import discovery
from reprise.evidence.files import read_json, read_yaml
from reprise.evidence.formatting import claimed, interval, markdown_table, signed
from reprise.evidence.records import GUARANTEES, read_record
from reprise.evidence.results_file import read_results

if TYPE_CHECKING:
    from rich.console import Group, RenderableType
    from rich.table import Table

TABLE_COLUMNS = 160  # below, the cells of the table are a few words wide
VERDICT_SCALES = ("small", "public", "paper")


@dataclass(frozen=True)
class VerdictCell:
    """A verdict in short.

    Attributes:
        effect, ci: mean and 95 % t interval of the primary contrast, plus minus minus.
        direction, margin, claimed: what the claim says of it, the last in words (`> 0.02`).
        seeds: the paired seeds it rests on.
        date: the day its last run finished.
    """

    verdict: str
    effect: float | None
    ci: tuple[float, float] | None
    contrast: str
    direction: str
    margin: float
    claimed: str
    seeds: list[int]
    date: str | None


@dataclass(frozen=True)
class GuaranteeCell:
    """What the tests of a guarantee showed, and when (RECORDS.json)."""

    passed: int
    total: int
    date: str
    commit: str | None

    def __str__(self) -> str:
        return f"{self.passed}/{self.total}"


@dataclass(frozen=True)
class PaperRow:
    """One paper; counts are None where the generated file is absent."""

    slug: str
    title: str
    family: str
    scales: list[str]
    golden_passed: int | None
    golden_total: int | None
    sizes_matched: int | None
    sizes_total: int | None
    resume: GuaranteeCell | None
    ranks: GuaranteeCell | None
    verdicts: dict[str, VerdictCell]


def papers_table() -> list[PaperRow]:
    """The rows of all papers, by slug."""
    return [paper_row(slug) for slug in discovery.papers()]


def paper_row(slug: str) -> PaperRow:
    """What the paper's files say.

    Raises:
        ConfigError: the card or the results file is damaged.
    """
    folder = discovery.experiment_dir(slug)
    card = read_yaml(discovery.card_path(slug)) if discovery.card_path(slug).is_file() else {}
    golden, sizes = (_counts(read_json(folder / name)) for name in ("PARITY.json", "SIZES.json"))
    return PaperRow(
        slug=slug,
        title=str(card.get("title", slug)),
        family=str(card.get("family", "")),
        scales=discovery.recipes(slug),
        golden_passed=golden[0],
        golden_total=golden[1],
        sizes_matched=sizes[0],
        sizes_total=sizes[1],
        **_guarantees(slug),
        verdicts=_verdicts(slug),
    )


def _counts(content: Any) -> tuple[int | None, int | None]:
    if not isinstance(content, dict) or not isinstance(content.get("total"), int):
        return None, None
    return int(content["passed"]), int(content["total"])


def _guarantees(slug: str) -> dict[str, GuaranteeCell | None]:
    record = read_record(slug)
    return {name: _guarantee(record, name) for name in GUARANTEES}


def _guarantee(record: Mapping[str, Any], name: str) -> GuaranteeCell | None:
    if name not in record:
        return None
    return GuaranteeCell(record[name]["passed"], record[name]["total"], record["date"], record["commit"])


def _verdicts(slug: str) -> dict[str, VerdictCell]:
    stored = read_results(discovery.results_path(slug))
    return {scale: _cell(content) for scale, content in stored.items()}


def _cell(content: Mapping[str, Any]) -> VerdictCell:
    primary = content["primary"]
    return VerdictCell(
        verdict=content["verdict"],
        effect=primary["mean"],
        ci=tuple(primary["ci"]) if primary["ci"] else None,
        contrast=primary["name"],
        direction=primary["direction"],
        margin=primary["margin"],
        claimed=claimed(primary["direction"], primary["margin"]),
        seeds=[int(seed) for seed in primary["differences"]],
        date=content["date"],
    )


def to_json(rows: Sequence[PaperRow]) -> str:
    """The rows as JSON."""
    return json.dumps([asdict(row) for row in rows], indent=1, ensure_ascii=False)


_HEAD = (
    "paper",
    "family",
    "scales",
    "golden cases",
    "sizes",
    *GUARANTEES,
    *(f"{scale} scale" for scale in VERDICT_SCALES),
)


def _cells(row: PaperRow) -> list[str]:
    return [
        row.family,
        ", ".join(row.scales),
        _fraction(row.golden_passed, row.golden_total),
        _fraction(row.sizes_matched, row.sizes_total),
        *(str(cell or "–") for cell in (row.resume, row.ranks)),
        *(_verdict_text(row.verdicts.get(scale)) for scale in VERDICT_SCALES),
    ]


def _fraction(part: int | None, total: int | None) -> str:
    return "–" if total is None else f"{part}/{total}"


def _verdict_text(cell: VerdictCell | None) -> str:
    if cell is None:
        return "–"
    return f"{cell.verdict}: {cell.contrast} {_effect(cell)}, n={len(cell.seeds)}, {cell.date}"


def _effect(cell: VerdictCell) -> str:
    return f"{signed(cell.effect)} {interval(cell.ci, sign=True)}, claimed {cell.claimed}"


def to_markdown(rows: Sequence[PaperRow]) -> str:
    """The README's table; titles link to the papers' folders."""
    cells = [[f"[{row.title}](experiments/{row.slug}/)", *_cells(row)] for row in rows]
    return "\n".join(markdown_table(_HEAD, cells))


def render(rows: Sequence[PaperRow], width: int) -> RenderableType:
    """For a terminal of `width` columns: the table, or a block a paper where the table would be squeezed."""
    return _wide(rows) if width >= TABLE_COLUMNS else _blocks(rows)


def _wide(rows: Sequence[PaperRow]) -> Table:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, row_styles=["", "dim"])
    for name in _HEAD:
        table.add_column(name)
    for row in rows:
        table.add_row(f"[bold]{row.slug}[/]", *(Text(cell) for cell in _cells(row)))
    return table


def _blocks(rows: Sequence[PaperRow]) -> Group:
    from rich.console import Group
    from rich.padding import Padding
    from rich.text import Text

    parts: list[RenderableType] = []
    for row in rows:
        parts.append(Text.assemble((row.slug, "bold"), f"  {row.family}" if row.family else ""))
        parts += [Padding(Text(line), (0, 0, 0, 2 * depth), expand=False) for depth, line in _lines(row)]
        parts.append(Text())
    return Group(*parts[:-1])


def _lines(row: PaperRow) -> Iterator[tuple[int, str]]:
    """The lines of a paper's block below its name, each with the depth of its indent."""
    counts = dict(zip(_HEAD[1:], _cells(row), strict=True))
    yield 1, f"scales: {counts['scales']}"
    yield 1, ", ".join(f"{name} {counts[name]}" for name in ("golden cases", "sizes", *GUARANTEES))
    for scale, cell in row.verdicts.items():
        yield 1, f"{scale}: {cell.verdict} ({cell.contrast})"
        yield 2, _effect(cell)
        yield 2, f"n={len(cell.seeds)}, {cell.date}"
