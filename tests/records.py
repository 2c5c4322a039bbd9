"""A pytest plugin: what the tests marked `proves` showed, by paper; written as RECORDS.json with `--write-records`."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import pytest

from reprise import discovery
from reprise.evidence.records import write_record
from reprise.training.runfolder import git_commit

PROPERTY = "proves"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--write-records", action="store_true", help="write experiments/<slug>/RECORDS.json")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--write-records") and (config.getoption("keyword") or config.getoption("file_or_dir")):
        raise pytest.UsageError("--write-records needs all tests: no -k and no path")
    config.pluginmanager.register(Recorder(config), "records of guarantees")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Keep a paper's runs in one process; let reports carry (guarantee, paper, case), also from another process."""
    for item in items:
        given = dict(item.callspec.params) if hasattr(item, "callspec") else {}
        together = given.get("slug") if item.get_closest_marker("dist") else None
        item.add_marker(pytest.mark.xdist_group(str(together or item.nodeid.partition("::")[0])))
        mark = item.get_closest_marker(PROPERTY)
        if mark is not None:
            slug = given.pop("slug")
            details = [str(value) for value in (*mark.args[1:], *given.values())]
            item.user_properties.append((PROPERTY, [mark.args[0], slug, ", ".join(details)]))


class Recorder:
    """Collects the reports of a session; under xdist, in the process that started the others."""

    def __init__(self, config: pytest.Config) -> None:
        self.config = config
        self.cases: dict[str, dict[str, dict[str, str]]] = defaultdict(lambda: defaultdict(dict))

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        for name, value in report.user_properties:
            if name == PROPERTY:
                guarantee, slug, case = value
                outcome = _outcome(report)
                if outcome is not None:
                    self.cases[slug][guarantee][case] = outcome

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        if not self.cases:
            return
        terminalreporter.section("guarantees")
        for slug, guarantees in sorted(self.cases.items()):
            told = [
                f"{name} {sum(outcome == 'passed' for outcome in cases.values())}/{len(cases)}"
                for name, cases in sorted(guarantees.items(), reverse=True)
            ]
            terminalreporter.write_line(f"{slug:<24} {', '.join(told)}")
        terminalreporter.write_line(f"{len(self.cases)} of {len(discovery.papers())} papers covered")

    def pytest_sessionfinish(self) -> None:
        if not self.config.getoption("--write-records") or hasattr(self.config, "workerinput"):
            return
        commit = git_commit()
        for slug, guarantees in self.cases.items():
            write_record(slug, guarantees, commit)


def _outcome(report: pytest.TestReport) -> str | None:
    """Passed, failed or why skipped; None for a phase that decides nothing."""
    if report.failed:
        return "failed"
    if report.skipped:
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        return reason.removeprefix("Skipped: ")
    return "passed" if report.when == "call" else None
