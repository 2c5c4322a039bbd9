"""What follows `search=` on the command line of a sweep."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from reprise.errors import ConfigError

DEFAULTS: Mapping[str, Any] = {"direction": "maximize", "trials": 20, "parallel": None}
FORMS = "search=val/accuracy, or search={metric:val/loss,direction:minimize,trials:50,parallel:2}"


def read_options(override: str) -> dict[str, Any]:
    """The options of a search from `search=METRIC` or `search={metric:...,direction:...,trials:...,parallel:...}`.

    Raises:
        ConfigError: neither form, no metric, or an option that a search does not have.
    """
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    try:
        value: Any = OverridesParser.create().parse_override(override).value()
    except HydraException as error:
        raise ConfigError(f"{override} cannot be read", looked_at="search", next_step=f"type {FORMS}") from error
    given = {str(key): each for key, each in value.items()} if isinstance(value, dict) else {"metric": value}
    unknown = set(given) - {"metric", *DEFAULTS}
    if unknown or not (isinstance(given.get("metric"), str) and given["metric"]):
        problem = f"a search has no option {', '.join(sorted(unknown))}" if unknown else "the search names no metric"
        raise ConfigError(problem, looked_at=override, next_step=f"type {FORMS}")
    options = {**DEFAULTS, **given}
    counts = [options[name] for name in ("trials", "parallel") if options[name] is not None]
    if options["direction"] not in ("maximize", "minimize") or not all(type(count) is int for count in counts):
        raise ConfigError(f"{override} is not a search", looked_at="search", next_step=f"type {FORMS}")
    return options


def to_override(options: Mapping[str, Any]) -> str:
    """The same options for `hydra.sweeper.search`; without `parallel` one trial a core."""
    parallel = "${cores:}" if options["parallel"] is None else options["parallel"]
    metric, direction = json.dumps(str(options["metric"])), json.dumps(str(options["direction"]))
    fields = f"metric: {metric}, direction: {direction}, trials: {options['trials']}, parallel: {parallel}"
    return f"+hydra.sweeper.search={{{fields}}}"
