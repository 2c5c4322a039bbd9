"""Papers are found by their folders: no list to edit. Cheap to import: neither torch nor Hydra."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

import reprise.papers
from reprise.errors import ConfigError, did_you_mean
from reprise.paths import experiments_dir

SCALES = ("small", "public", "paper")
_NOT_RECIPES = {"claim", "card"}


def papers() -> list[str]:
    """The slugs of all papers: every folder of `reprise.papers` with an `__init__.py`, sorted."""
    found = {init.parent.name for base in reprise.papers.__path__ for init in Path(base).glob("*/__init__.py")}
    return sorted(found)


def check_paper(slug: str) -> str:
    """The slug itself.

    Raises:
        ConfigError: there is no such paper; names the closest ones.
    """
    known = papers()
    if slug not in known:
        raise ConfigError(
            f"There is no paper {slug!r}{did_you_mean(slug, known)}.",
            looked_at=", ".join(str(base) for base in reprise.papers.__path__),
            next_step="`reprise papers` lists all papers",
        )
    return slug


def paper_dir(slug: str) -> Path:
    """The folder of a paper's code."""
    check_paper(slug)
    return next(Path(base) / slug for base in reprise.papers.__path__ if (Path(base) / slug / "__init__.py").is_file())


def experiment_dir(slug: str) -> Path:
    """The folder of a paper's recipes, claim, card and results."""
    return experiments_dir() / check_paper(slug)


def recipes(slug: str) -> list[str]:
    """Names of the paper's recipes, e.g. `["small", "public", "paper"]`; the usual scales first, in that order."""
    stems = {path.stem for path in experiment_dir(slug).glob("*.yaml")} - _NOT_RECIPES
    return [scale for scale in SCALES if scale in stems] + sorted(stems - set(SCALES))


def ablations(slug: str) -> list[str]:
    """Names of the paper's ablation sweeps (`experiments/<slug>/ablations/*.yaml`), sorted."""
    return sorted(path.stem for path in (experiment_dir(slug) / "ablations").glob("*.yaml"))


def claim_path(slug: str) -> Path:
    return experiment_dir(slug) / "claim.yaml"


def card_path(slug: str) -> Path:
    return experiment_dir(slug) / "card.yaml"


def results_path(slug: str) -> Path:
    return experiment_dir(slug) / "RESULTS.md"


def has_module(slug: str, name: str) -> bool:
    """Whether the paper has a file `<name>.py`, without importing it."""
    return (paper_dir(slug) / f"{name}.py").is_file()


def module(slug: str, name: str) -> ModuleType:
    """Import one of a paper's modules, e.g. `module("detr", "parity")`.

    Raises:
        ConfigError: no such paper, or the paper has no such file.
    """
    if not has_module(slug, name):
        raise ConfigError(
            f"The paper {slug} has no {name}.py.",
            looked_at=paper_dir(slug),
            next_step="docs/architecture.md names the files of a paper",
        )
    return importlib.import_module(f"reprise.papers.{slug}.{name}")
