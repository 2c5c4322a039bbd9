"""Papers are found by folder; a wrong name gets the nearest right one; nothing heavy is imported."""

from __future__ import annotations

import subprocess
import sys

import pytest

from reprise import discovery
from reprise.errors import ConfigError


def test_lists_what_the_folders_hold(workshop):
    assert discovery.papers() == ["toy_paper"]
    assert discovery.recipes("toy_paper") == ["small", "public", "paper"]
    assert discovery.ablations("toy_paper") == ["margin"]
    assert discovery.claim_path("toy_paper") == workshop.experiment / "claim.yaml"
    assert discovery.card_path("toy_paper").is_file()


def test_unknown_paper_names_the_nearest(workshop):
    with pytest.raises(ConfigError, match="did you mean toy_paper"):
        discovery.claim_path("toypaper")


def test_unknown_module(workshop):
    with pytest.raises(ConfigError, match=r"has no parity\.py"):
        discovery.module("toy_paper", "parity")


def test_imports_a_module_of_a_paper(workshop, paper_module):
    paper_module("parity", "ADAPTERS = {}\n")
    assert discovery.module("toy_paper", "parity").ADAPTERS == {}


@pytest.mark.parametrize("name", ["reprise.discovery", "reprise.evidence.table", "reprise.evidence.verdict"])
def test_nothing_heavy_is_imported(name):
    code = f"import {name}, sys; print(sorted({{'torch', 'scipy', 'hydra', 'matplotlib', 'numpy'}} & set(sys.modules)))"
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
    )
