"""The Hydra application behind `reprise train`, `reprise sweep` and `reprise reproduce`."""

from __future__ import annotations

import contextlib
import pickle
import re
import sys
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from omegaconf import DictConfig

from reprise import paths
from reprise.errors import ConfigError, InterruptedRunError, RepriseError, did_you_mean


@dataclass(frozen=True)
class Failure:
    """What a job hands back instead of its metrics, so that it crosses process borders and stops no other job."""

    error: Exception
    trace: str

    @property
    def message(self) -> str:
        if isinstance(self.error, RepriseError):
            return str(self.error)
        return f"{type(self.error).__name__}: {self.error}"


def portable(error: Exception) -> RepriseError:
    """The error if it is a user's and survives the way between two processes, else a plain one that says the same."""
    if not isinstance(error, RepriseError):
        return RepriseError(f"{type(error).__name__}: {error}")
    with contextlib.suppress(Exception):  # its parts may raise anything on the way
        if str(pickle.loads(pickle.dumps(error))) == str(error):
            return error
    return RepriseError(str(error))


def task(hydra_config: DictConfig) -> dict[str, float] | Failure:
    """One job: the resolved configuration, launched with the ranks it asks for."""
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    from reprise.config import register_resolvers, resolve
    from reprise.training.launch import finished_already, launch
    from reprise.training.machine import rank
    from reprise.training.stopping import begin_as_job

    register_resolvers()
    single = HydraConfig.get().mode == RunMode.RUN
    try:
        begin_as_job()
        cfg = resolve(hydra_config)
        if single and rank() == 0 and (finished := finished_already(cfg)):
            print(f"reprise: {finished}", file=sys.stderr)
        return launch(cfg, show_progress=single and sys.stderr.isatty())
    except Exception as error:  # whatever it is, the other jobs of a sweep go on; the caller tells or raises it
        return Failure(error if single else portable(error), traceback.format_exc())
    except KeyboardInterrupt:
        if single:
            raise
        return Failure(InterruptedRunError("stopped before it could save"), traceback.format_exc())


def run_hydra(overrides: Sequence[str], flags: Sequence[str] = ()) -> Any:
    """Run the Hydra application on given overrides and return what its run or sweep returned.

    Args:
        overrides: Hydra overrides.
        flags: Hydra's own flags (`--multirun`, `--cfg job`, `--info`, ...).

    Raises:
        RepriseError: of the job, or in place of Hydra's own configuration errors.
    """
    from hydra._internal.hydra import Hydra
    from hydra._internal.utils import create_config_search_path, get_args_parser
    from hydra.core.global_hydra import GlobalHydra
    from hydra.errors import HydraException
    from hydra.version import setbase
    from omegaconf.errors import OmegaConfBaseException

    from reprise.config import register_resolvers

    register_resolvers()
    setbase("1.3")
    GlobalHydra.instance().clear()
    args = get_args_parser().parse_args([*flags, *overrides])
    hydra = Hydra.create_main_hydra2("reprise", create_config_search_path(str(paths.conf_dir())))
    try:
        return _dispatch(hydra, args, list(args.overrides))
    except (HydraException, OmegaConfBaseException) as error:
        raise explained(error, overrides) from error
    finally:
        GlobalHydra.instance().clear()


def explained(error: Exception, overrides: Sequence[str]) -> RepriseError:
    """What a user can do about an error of Hydra's; its own advice is for applications that accept any key.

    Args:
        overrides: what Hydra was given.
    """
    text = str(error)
    if found := re.search(r"Could not override '([^']+)'", text):
        return _unknown_key(found[1], overrides)
    if found := re.search(r"Could not find '([^']+)/([^'/]+)'", text):
        return _unknown_option(found[1], found[2])
    if found := re.search(r"Ambiguous value for argument '([^']+)'", text):
        return ConfigError(
            f"{found[1]} names several runs, and `reprise train` makes one",
            looked_at=found[1],
            next_step="`reprise train -m ...` makes all of them; `reprise reproduce` makes those of a claim",
        )
    return ConfigError(
        "\n".join(line for line in text.splitlines() if line.strip()),
        looked_at=paths.conf_dir(),
        next_step="`reprise train ... --cfg job` prints the composed configuration",
    )


def _unknown_key(key: str, overrides: Sequence[str]) -> ConfigError:
    guess = did_you_mean(key, _known_keys(overrides))
    advice = "" if guess else f"; where the part takes an option that the recipe does not set, +{key}=... adds it"
    return ConfigError(
        f"there is no configuration key {key}{guess}",
        looked_at="the composed configuration",
        next_step=f"correct the key; `reprise train ... --cfg job` shows all{advice}",
    )


def _known_keys(overrides: Sequence[str]) -> list[str]:
    """The keys of the experiment with the groups that were chosen; none where that does not compose either."""
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    from reprise.config import compose, node_paths, split_override

    groups = {"experiment", *(path.name for path in paths.conf_dir().iterdir() if path.is_dir())} - {"hydra"}
    chosen = [item for item in overrides if split_override(item)[0] in groups and "," not in item]
    try:
        return node_paths(compose(chosen))
    except (RepriseError, HydraException, OmegaConfBaseException):
        return []


def _unknown_option(group: str, name: str) -> RepriseError:
    from reprise.config import experiment_of

    if group.startswith("experiment"):
        try:
            experiment_of([f"experiment={group}/{name}".replace("experiment/", "", 1)])
        except RepriseError as error:
            return error
    options = sorted(path.stem for path in (paths.conf_dir() / group).glob("*.yaml"))
    return ConfigError(
        f"there is no {group}={name}{did_you_mean(name, options)}",
        looked_at=paths.conf_dir() / group,
        next_step=f"choose one of: {', '.join(options)}",
    )


def _dispatch(hydra: Any, args: Any, overrides: list[str]) -> Any:
    common = {"config_name": "train", "overrides": overrides}
    if args.cfg:
        hydra.show_cfg(**common, cfg_type=args.cfg, package=args.package, resolve=args.resolve)
        return None
    if args.info:
        hydra.show_info(args.info, **common)
        return None
    if args.multirun:
        return hydra.multirun(**common, task_function=task, with_log_configuration=False)
    result = hydra.run(**common, task_function=task, with_log_configuration=False).return_value
    if isinstance(result, Failure):
        raise result.error
    return result
