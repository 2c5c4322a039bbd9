"""The Optuna study of a search: one journal file, proposals that are a function of it, one search at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from reprise.errors import ConfigError, RepriseError
from reprise.seeding import derive

if TYPE_CHECKING:
    from optuna import Study, Trial
    from optuna.distributions import BaseDistribution

NAME = "search"
PRUNED_AT = "pruned_at"  # the attribute of a trial whose run was stopped: the step


def require_optuna() -> None:
    """Raise a clear error where Optuna is not installed; keep it quiet where it is."""
    try:
        import optuna
    except ImportError as error:
        raise ConfigError(
            "optuna is not installed",
            looked_at="reprise search",
            next_step="pip install -c constraints.txt -e '.[search]'",
        ) from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)


def open_study(journal: Path, direction: Literal["maximize", "minimize"] | None = None) -> Study:
    """The study in a journal file; with a direction it is made where it is missing."""
    import optuna
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    storage = JournalStorage(JournalFileBackend(str(journal)))
    pruner = optuna.pruners.MedianPruner()
    if direction is None:
        return optuna.load_study(study_name=NAME, storage=storage, pruner=pruner)
    return optuna.create_study(
        study_name=NAME, storage=storage, pruner=pruner, direction=direction, load_if_exists=True
    )


def trial_of(study: Study, number: int) -> Trial:
    """A trial of the study that is still running, also one that another process asked for."""
    from optuna import Trial

    return Trial(study, study._storage.get_trial_id_from_study_id_trial_number(study._study_id, number))


def propose(study: Study, distributions: Mapping[str, BaseDistribution]) -> None:
    """Ask for one more trial; what it proposes is a function of its number and of what the journal holds."""
    from optuna.samplers import TPESampler

    number = len(study.get_trials(deepcopy=False))
    study.sampler = TPESampler(seed=derive(0, "search", number) % 2**32)
    study.ask(dict(distributions))


@contextmanager
def only_search(folder: Path) -> Iterator[None]:
    """Holds the search's folder; the lock ends with the process, however that ends."""
    from filelock import FileLock, Timeout

    try:
        with FileLock(folder / "lock", timeout=0):
            yield
    except Timeout as error:
        raise RepriseError(
            "this search is running already", looked_at=folder, next_step="wait for it, or stop it first"
        ) from error
