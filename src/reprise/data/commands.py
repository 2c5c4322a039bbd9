"""`reprise data list | check | fetch | show`."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.table import Table

from reprise import paths
from reprise.data import registry
from reprise.errors import ConfigError


def run(action: str, name: str | None, *, out: Path | None, as_json: bool) -> int:
    """Carry out one action; returns the exit code (1 where a checked data set is not whole).

    Raises:
        ConfigError: an action that needs a name got none, or an unknown one.
        DataError: a data set cannot be brought.
    """
    if action == "list":
        return _list(as_json)
    if name is None:
        raise ConfigError(f"`reprise data {action}` needs a data set", next_step="`reprise data list` names them")
    if action == "show":
        from reprise.data.show import contact_sheet

        print(contact_sheet(name, out or paths.cache_dir() / "pictures" / f"{name}.png"))
        return 0
    report = registry.fetch(name) if action == "fetch" else registry.check(name)
    if as_json:
        print(json.dumps(asdict(report), indent=1))
    else:
        print(f"{report.name}: {report.state} ({report.place})")
        for key, value in report.facts.items():
            print(f"  {key}: {value}")
        if report.problem:
            print(f"  {report.problem}\n  next step: {report.next_step}")
    return 0 if report.state == "ok" else 1


def _list(as_json: bool) -> int:
    reports = {name: registry.check(name) for name in registry.entries()}
    if as_json:
        rows = [
            {
                "name": entry.name,
                "what": entry.what,
                "size": entry.size,
                "licence": entry.licence,
                "source": entry.source,
                "layout": entry.layout,
                "state": reports[entry.name].state,
            }
            for entry in registry.entries().values()
        ]
        print(json.dumps(rows, indent=1))
        return 0
    table = Table("data set", "what", "size", "licence", "state", title=f"data root: {paths.data_root()}")
    for entry in registry.entries().values():
        table.add_row(entry.name, entry.what, entry.size, entry.licence, reports[entry.name].state)
    Console().print(table)
    return 0
