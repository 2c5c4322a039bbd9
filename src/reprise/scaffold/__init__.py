"""`reprise new-paper`: the files of a paper that composes, runs and is tested from its first minute."""

from __future__ import annotations

import re
from importlib import resources
from pathlib import Path
from string import Template

from reprise import discovery, paths
from reprise.errors import ConfigError

# Template file -> where it goes, relative to the project.
TARGETS = {
    "init.py.txt": "src/reprise/papers/{slug}/__init__.py",
    "module.py.txt": "src/reprise/papers/{slug}/module.py",
    "model.py.txt": "src/reprise/papers/{slug}/model.py",
    "criterion.py.txt": "src/reprise/papers/{slug}/criterion.py",
    "weights.py.txt": "src/reprise/papers/{slug}/weights.py",
    "parity.py.txt": "src/reprise/papers/{slug}/parity.py",
    "pictures.py.txt": "src/reprise/papers/{slug}/pictures.py",
    "paper.yaml.txt": "conf/paper/{slug}.yaml",
    "small.yaml.txt": "experiments/{slug}/small.yaml",
    "claim.yaml.txt": "experiments/{slug}/claim.yaml",
    "card.yaml.txt": "experiments/{slug}/card.yaml",
}


def make_paper(slug: str) -> list[Path]:
    """Write the files of a new paper and return their paths; no existing file is touched.

    Raises:
        ConfigError: the slug is not a Python package name, or a file is there already.
    """
    if not re.fullmatch(r"[a-z][a-z0-9_]*", slug):
        raise ConfigError(
            f"{slug!r} cannot be a folder of Python code", next_step="use lower case letters, digits and _"
        )
    made = {name: paths.root() / target.format(slug=slug) for name, target in TARGETS.items()}
    there = [str(path) for path in made.values() if path.exists()]
    if there or slug in discovery.papers():
        raise ConfigError(
            f"there is a paper {slug!r} already", looked_at=", ".join(there), next_step="choose another slug"
        )
    words = {"slug": slug, "name": "".join(part.capitalize() for part in slug.split("_"))}
    folder = resources.files("reprise.scaffold") / "files"
    for name, path in made.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(Template((folder / name).read_text()).substitute(words))
    return list(made.values())
