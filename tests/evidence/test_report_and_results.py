"""The HTML report, the index, RESULTS.md and the table of papers."""

from __future__ import annotations

import io
import json
import re
from html import unescape
from html.parser import HTMLParser

import pytest
from rich.console import Console

from reprise.errors import ConfigError
from reprise.evidence import figures, formatting, table
from reprise.evidence.report import build_index, build_report
from reprise.evidence.results import write_results
from reprise.evidence.results_file import check_results, embed, read_results
from reprise.evidence.versions import other_versions

from .conftest import CARD, CLAIM

TABLES = ("Contrasts", "Arms")
SUPPORTED = [0.10, 0.12, 0.11, 0.09, 0.10]


class Outline(HTMLParser):
    """Collects what the tests look at: balance of tags, images, ids, links."""

    VOID = frozenset({"meta", "img", "br", "path", "line", "use", "rect", "circle", "link", "hr", "input"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.images: list[dict[str, str | None]] = []
        self.svgs: list[dict[str, str | None]] = []
        self.ids: list[str] = []
        self.resources: list[str] = []

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        if tag not in self.VOID:
            self.open.append(tag)
        if tag == "img":
            self.images.append(given)
        if tag == "svg":
            self.svgs.append(given)
        if "id" in given:
            self.ids.append(str(given["id"]))
        if "src" in given:
            self.resources.append(str(given["src"]))

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag


def outline(html: str) -> Outline:
    parser = Outline()
    parser.feed(html)
    assert parser.open == []
    return parser


def test_the_report_is_whole_and_self_contained(workshop):
    workshop.fill(SUPPORTED)
    workshop.fill([-gain for gain in SUPPORTED], scale="public")
    html = build_report(workshop.runs, "toy_paper").read_text()
    parsed = outline(html)
    assert len(parsed.images) == 4  # two arms at two scales
    assert all(image["alt"] for image in parsed.images)
    assert all(source.startswith("data:image/png;base64,") for source in parsed.resources)
    assert all("aria-label" in svg or "aria-hidden" in svg for svg in parsed.svgs)
    assert len(set(parsed.ids)) == len(parsed.ids)
    assert not re.search(r"<script|<link|@import|url\(http", html)
    for text in (
        CLAIM["statement"],
        "Supported",
        "Refuted",
        "Toys &amp; Boxes",
        "One-to-many &lt;assignment&gt;",
        "Boxes of control &amp; friends",
        "500 epochs",
        "pre-training",
        "paper.as_released=true",
        "Some CPU",
        "torch 2.14.1",
        "make reproduce PAPER=toy_paper SCALE=small",
        "git checkout 0123456789abcdef",
        "prefers-color-scheme: dark",
        "@media print",
        "Learning rate chosen on seeds 100 to 102.",
    ):
        assert text in html, text
    for seed, gain in enumerate(SUPPORTED):
        assert f"<b>seed {seed}</b> +{gain:.4f}" in html


def test_verdicts_and_seeds_stand_where_a_narrow_page_shows_them(workshop):
    workshop.fill(SUPPORTED)
    html = build_report(workshop.runs, "toy_paper").read_text()
    outline(html)
    contrasts, arms = (re.search(rf'aria-label="{name} at small">.*?</table>', html, re.DOTALL)[0] for name in TABLES)
    assert "<tr><th>Contrast</th><th>Verdict</th>" in contrasts
    assert re.search(r'\(primary\)</span></th><td><span class="badge supported">', contrasts)
    rows = re.findall(r"<tr.*?</tr>", arms, re.DOTALL)[1:]
    assert len(rows) == 8, "two arms with two metrics, two rows each"
    for above, below in zip(rows[::2], rows[1::2], strict=True):
        assert above.count("<td") == 5
        assert 'colspan="6"' in below
        assert re.findall("<b>seed (.)</b>", below) == ["0", "1", "2", "3", "4"]


def test_the_report_is_the_same_when_built_again(workshop):
    workshop.fill(SUPPORTED)
    first = build_report(workshop.runs, "toy_paper").read_bytes()
    assert build_report(workshop.runs, "toy_paper").read_bytes() == first


def test_a_report_of_broken_and_missing_runs(workshop):
    workshop.run("method", 0, {}, status="failed", error="out of <memory>")
    workshop.run("method", 1, {"test/ap": 0.3, "test/nms_gain": 0.1}, scale="small~steps=3")
    html = build_report(workshop.runs, "toy_paper").read_text()
    outline(html)
    assert "out of &lt;memory&gt;" in html
    assert "no finished run" in html
    assert "reprise train experiment=toy_paper/small~steps=3 arm=method seed=1" in html


def test_a_variant_without_a_finished_run_has_no_section(workshop):
    workshop.run("method", 0, {}, scale="small~steps=none", status="failed", error="steps: not a number")
    refused = "Evidence at the scale “small~steps=none”"
    assert refused in build_report(workshop.runs, "toy_paper").read_text(), "all that there is"
    workshop.run("method", 0, {}, scale="public", status="failed", error="out of memory")
    workshop.run("method", 0, {"test/ap": 0.3, "test/nms_gain": 0.1}, scale="small~steps=3")
    html = build_report(workshop.runs, "toy_paper").read_text()
    assert refused not in html
    assert "Evidence at the scale “public”" in html
    assert "Evidence at the scale “small~steps=3”" in html


def test_a_recipe_that_the_claim_does_not_speak_of_has_no_section(workshop):
    workshop.run("method", 0, {"test/ap": 0.3, "test/nms_gain": 0.1}, scale="long")
    with pytest.raises(ConfigError, match="no runs of toy_paper"):
        build_report(workshop.runs, "toy_paper")
    workshop.fill(SUPPORTED)
    assert "Evidence at the scale “long”" not in build_report(workshop.runs, "toy_paper").read_text()


def test_the_report_names_versions_that_constraints_do_not_install(workshop):
    workshop.fill(SUPPORTED)
    pins = workshop.root / "constraints.txt"
    assert "other versions than" not in build_report(workshop.runs, "toy_paper").read_text(), "nothing is pinned"
    pins.write_text("# every version\ntorch==2.14.1\nnumpy==2.4.6\n")
    assert "other versions than" not in build_report(workshop.runs, "toy_paper").read_text()
    pins.write_text("torch==2.15.0\nnumpy==2.4.6\n")
    html = build_report(workshop.runs, "toy_paper").read_text()
    assert "other versions than constraints.txt installs: torch 2.14.1 instead of 2.15.0.<" in html


def test_names_and_local_parts_of_versions_are_compared_as_pip_does(workshop):
    (workshop.root / "constraints.txt").write_text("torch==2.14.1\nhydra_core==1.3.8  # spelled another way\n")
    assert other_versions({"torch": ["2.14.1+cu130"], "hydra-core": ["1.3.8"], "python": ["3.11.7"]}) == []
    assert other_versions({"hydra-core": ["1.3.2", "1.3.8"]}) == ["hydra-core 1.3.2 instead of 1.3.8"]


def test_a_claim_of_less_has_a_true_minus_sign_everywhere(workshop):
    primary = CLAIM["primary"] | {"plus": ["method"], "minus": ["control"], "direction": "lower", "margin": 0.05}
    workshop.write_claim(CLAIM | {"primary": primary})
    workshop.fill(SUPPORTED)
    write_results(workshop.runs, "toy_paper")
    written = [
        build_report(workshop.runs, "toy_paper").read_text(),
        build_index(workshop.runs).read_text(),
        (workshop.experiment / "RESULTS.md").read_text(),
        table.to_markdown(table.papers_table()),
    ]
    for text in map(unescape, written):
        assert "< −0.05" in text
        assert "-0.05" not in text.partition("<!-- verdicts")[0]
    assert "the margin (−0.05)" in written[0]
    assert formatting.claimed("lower", 0.0) == "< 0"


def test_the_report_repeats_the_command_as_it_was_typed(workshop):
    typed = "reprise reproduce experiment=toy_paper/small trainer=gpu 'trainer.precision=32-true'"
    for seed in range(5):
        for arm in ("method", "control"):
            workshop.run(arm, seed, {"test/ap": 0.5, "test/nms_gain": 0.1}, command=typed)
    html = build_report(workshop.runs, "toy_paper").read_text()
    command = "make reproduce PAPER=toy_paper SCALE=small 'ARGS=trainer=gpu trainer.precision=32-true'"
    assert command in unescape(html)


def test_nothing_to_report_is_an_error(workshop):
    with pytest.raises(ConfigError, match="no runs of toy_paper"):
        build_report(workshop.runs, "toy_paper")
    with pytest.raises(ConfigError, match="no paper 'nobody'"):
        build_report(workshop.runs, "nobody")


def test_the_index_lists_papers_with_runs(workshop):
    assert "No runs yet" in build_index(workshop.runs).read_text()
    workshop.fill(SUPPORTED)
    (workshop.runs / "not_a_paper" / "small" / "x" / "seed=0").mkdir(parents=True)
    html = build_index(workshop.runs).read_text()
    outline(html)
    assert 'href="toy_paper/report.html"' in html
    assert "Supported" in html
    assert "[+0.0898, +0.1182], claimed &gt; 0.02, 5 seeds" in html
    assert "not_a_paper" not in html
    workshop.write_card({"title": "half"})
    assert "card.yaml is not right" in build_index(workshop.runs).read_text()


def test_band_averages_bins_within_a_seed_then_over_seeds():
    curves = [[(0, 1.0), (1, 3.0), (2, 5.0)], [(0, 2.0), (1, 4.0), (2, float("nan"))]]
    merged = figures.band(curves, points=2)
    assert merged.steps == [0.5, 2.0]
    assert merged.mean == [2.5, 5.0]
    assert (merged.low, merged.high) == ([2.0, 5.0], [3.0, 5.0])
    assert figures.band([]).steps == []


def test_figures_take_their_colours_from_the_page():
    svg = figures.curve_figure({"a": [{"m": [(0, 1.0), (5, 2.0)]}], "b": []}, "m")
    assert svg.startswith("<svg viewBox=")
    assert "var(--s0)" in svg
    assert "var(--ink)" in svg
    assert not re.search("#f0e0d|#0a0b0", svg)


def test_metrics_of_the_claim_come_first():
    runs = [{name: [(0, 1.0), (1, 1.0)] for name in ("lr", "val/a", "val/z", "train/loss")} | {"val/once": [(0, 1.0)]}]
    assert figures.shown_metrics(runs, ["test/z", "test/none"]) == ["val/z", "train/loss", "val/a"]


def test_results_are_written_sealed_and_read_back(workshop):
    workshop.fill(SUPPORTED)
    path = write_results(workshop.runs, "toy_paper")
    text = path.read_text()
    assert check_results(path)
    assert "**supported**" in text
    assert "0: +0.1000" not in text  # seeds of the arms are listed, with their own values
    assert "4: 0.5400" in text
    assert read_results(path)["small"]["primary"]["verdict"] == "supported"
    path.write_text(text.replace("**supported**", "**refuted**"))
    assert not check_results(path)
    path.write_text(text + "\n")
    assert not check_results(path)
    path.write_text(text.rpartition("<!--")[0])
    assert not check_results(path)


def test_a_stored_scale_survives_until_there_is_as_much_evidence(workshop):
    workshop.fill(SUPPORTED)
    workshop.fill([0.3], scale="public")
    path = write_results(workshop.runs, "toy_paper")
    for folder in (workshop.runs / "toy_paper" / "small").glob("*/seed=[1-4]"):
        (folder / "summary.json").unlink()
    workshop.fill([], scale="public")
    assert write_results(workshop.runs, "toy_paper") == path
    assert read_results(path)["small"]["verdict"] == "supported"
    assert "Missing runs:" in path.read_text()  # of the public scale
    assert check_results(path)


def test_results_without_runs_or_with_damage_are_errors(workshop):
    with pytest.raises(ConfigError, match="no finished runs"):
        write_results(workshop.runs, "toy_paper")
    path = workshop.experiment / "RESULTS.md"
    path.write_text("<!-- verdicts\n{\n-->\n")
    with pytest.raises(ConfigError, match="damaged"):
        read_results(path)
    path.write_text('<!-- verdicts\n{"small": {}}\n-->\n')
    with pytest.raises(ConfigError, match="does not fit"):
        write_results(workshop.runs, "toy_paper")


def test_data_cannot_close_its_comment(tmp_path):
    path = tmp_path / "RESULTS.md"
    path.write_text("\n".join(embed({"small": {"statement": "a --> b ---- c"}})))
    assert path.read_text().count("-->") == 1
    assert read_results(path)["small"]["statement"] == "a --> b ---- c"


def printed(rows, width: int) -> str:
    """The rows in a terminal of that width."""
    console = Console(width=width, file=io.StringIO(), record=True)
    console.print(table.render(rows, console.width))
    return console.export_text()


def test_the_papers_table(workshop):
    (bare,) = table.papers_table()
    assert (bare.golden_total, bare.sizes_total, bare.verdicts) == (None, None, {})
    workshop.fill(SUPPORTED)
    write_results(workshop.runs, "toy_paper")
    (workshop.experiment / "PARITY.json").write_text(json.dumps({"passed": 3, "total": 4}))
    (workshop.experiment / "SIZES.json").write_text(json.dumps({"passed": 1, "total": 1}))
    rows = table.papers_table()
    (data,) = json.loads(table.to_json(rows))
    assert data["title"] == CARD["title"]
    assert (data["golden_passed"], data["golden_total"], data["sizes_matched"]) == (3, 4, 1)
    small = data["verdicts"]["small"]
    assert (small["verdict"], small["seeds"], small["date"]) == ("supported", [0, 1, 2, 3, 4], "2026-01-01")
    assert (small["direction"], small["margin"], small["claimed"]) == ("higher", 0.02, "> 0.02")
    assert small["effect"] == pytest.approx(0.104)
    markdown = table.to_markdown(rows)
    assert "[Toys & Boxes](experiments/toy_paper/)" in markdown
    assert "| 3/4 | 1/1 | – | – | supported: NMS gain +0.1040 [+0.0898, +0.1182], claimed > 0.02, n=5" in markdown
    assert "supported" in printed(rows, 200)


def test_a_narrow_terminal_gets_a_block_a_paper(workshop):
    workshop.fill(SUPPORTED)
    write_results(workshop.runs, "toy_paper")
    assert printed(table.papers_table(), 80).splitlines() == [
        "toy_paper  detection",
        "  scales: small, public, paper",
        "  golden cases –, sizes –, resume –, ranks –",
        "  small: supported (NMS gain)",
        "    +0.1040 [+0.0898, +0.1182], claimed > 0.02",
        "    n=5, 2026-01-01",
    ]


def test_the_report_shows_gradient_norms_and_timing(workshop):
    workshop.fill(SUPPORTED)
    folder = workshop.runs / "toy_paper" / "small" / "method" / "seed=0"
    norms = [
        f"{step},grad_norm/{part},{9 if (step, part) == (7, 'head') else 1}"
        for step in range(1, 20)
        for part in ("body", "head")
    ]
    with (folder / "metrics.csv").open("a") as file:
        file.write("\n".join(norms) + "\n")
    rows = ["step,metric,value", "10,items_per_second,1500.0", "10,data_wait,0.25", f"10,memory_bytes,{2**28}"]
    (folder / "timing.csv").write_text("\n".join(rows) + "\n")
    html = build_report(workshop.runs, "toy_paper").read_text()
    outline(html)
    table = re.search(r"<h3>Diagnostics</h3>.*?</table>", html, re.DOTALL)[0]
    for text in ("1.5 k", "25.0 %", "256.0 MiB", "9.0", "head, step 7, seed=0"):
        assert text in table
    assert table.count("<tr>") == 2, "only the arm that has diagnostics, under the head"
    assert "Gradient norms of" in html


def test_a_report_of_runs_without_diagnostics_has_no_such_section(workshop):
    workshop.fill(SUPPORTED)
    assert "<h3>Diagnostics</h3>" not in build_report(workshop.runs, "toy_paper").read_text()
