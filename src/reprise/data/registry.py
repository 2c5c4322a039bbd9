"""What `reprise data list | check | fetch` do: look data sets up, see whether they are whole, bring them."""

from __future__ import annotations

from dataclasses import dataclass, field

from reprise.data.catalogue import ENTRIES, DataEntry
from reprise.data.checks import Facts
from reprise.data.download import obtain
from reprise.errors import ConfigError, DataError
from reprise.paths import data_root


@dataclass(frozen=True)
class Report:
    """What `check` found: `state` is `ok`, `missing` or `damaged`."""

    name: str
    state: str
    place: str
    problem: str | None = None
    facts: Facts = field(default_factory=dict)
    next_step: str | None = None


def entries() -> dict[str, DataEntry]:
    """All data sets by name."""
    return {entry.name: entry for entry in ENTRIES}


def entry(name: str) -> DataEntry:
    """One data set.

    Raises:
        ConfigError: there is none of this name.
    """
    known = entries()
    if name not in known:
        raise ConfigError(
            f"there is no data set {name!r}", looked_at="the data registry", next_step=f"one of: {', '.join(known)}"
        )
    return known[name]


def check(name: str) -> Report:
    """Whether a data set is there and whole, as far as file names, counts and sizes tell."""
    found = entry(name)
    place = "in the package" if found.built_in else str(data_root())
    try:
        return Report(name, "ok", place, facts=found.check(data_root()))
    except DataError as error:
        state = "missing" if not _anything(found) else "damaged"
        return Report(name, state, str(error.looked_at or place), error.problem, next_step=_how_to_get(found))


def _anything(found: DataEntry) -> bool:
    """Whether anything lies where the data set would be."""
    places = [data_root() / found.name, *(data_root() / part.place for part in found.downloads)]
    return any(path.is_file() or (path.is_dir() and any(path.iterdir())) for path in places)


def _how_to_get(found: DataEntry) -> str:
    return f"reprise data fetch {found.name}" if found.downloads else (found.instructions or "")


def fetch(name: str) -> Report:
    """Bring a data set under the data root, unless it is there already.

    Raises:
        DataError: it cannot be downloaded (the message has the instructions), or what came is not what it should be.
    """
    found = entry(name)
    before = check(name)
    if before.state == "ok":
        return before
    if not found.downloads:
        raise DataError(
            f"{name} cannot be downloaded by a program", looked_at=found.source, next_step=found.instructions
        )
    for part in found.downloads:
        obtain(part, data_root())
    after = check(name)
    if after.state != "ok":
        raise DataError(after.problem or f"{name} is not complete", looked_at=after.place, next_step=after.next_step)
    return after
