"""Every recipe and ablation of every paper composes, resolves and instantiates."""

from __future__ import annotations

import pytest
import torch

from reprise import discovery, paths
from reprise.config import compose, config_hash
from reprise.evidence.cards import load_card
from reprise.evidence.claims import load_claim
from reprise.training.instantiate import instantiate
from reprise.training.run import build
from tests.cross.support import ABLATIONS, PAPERS, RECIPES


def test_discovery_sees_every_paper() -> None:
    configured = {path.stem for path in (paths.conf_dir() / "paper").glob("*.yaml")}
    experimented = {path.name for path in paths.experiments_dir().iterdir() if path.is_dir()}
    assert set(PAPERS) == configured == experimented
    assert {"vit", "sam", "fedntd", "detr"} <= set(PAPERS)


def test_every_recipe_was_collected() -> None:
    files = [path for path in paths.experiments_dir().glob("*/*.yaml") if path.stem not in ("claim", "card")]
    assert len(RECIPES) == len(files) >= 12
    assert len(ABLATIONS) == len(list(paths.experiments_dir().glob("*/ablations/*.yaml"))) >= 12


@pytest.mark.parametrize(("slug", "recipe"), RECIPES)
def test_recipe_builds(slug: str, recipe: str) -> None:
    cfg = compose([f"experiment={slug}/{recipe}"])
    assert cfg.slug == slug
    if recipe in discovery.SCALES:
        assert cfg.scale == recipe
    with torch.device("meta"):
        parts = build(cfg)
    assert sum(parameter.numel() for parameter in parts.module.parameters()) > 0
    assert parts.data.spec.name
    assert parts.data.steps == cfg.steps
    for name, node in cfg.callbacks.items():
        instantiate(node, path=f"callbacks.{name}")


@pytest.mark.parametrize(("slug", "recipe"), ABLATIONS)
def test_every_value_of_an_ablation_builds(slug: str, recipe: str) -> None:
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir

    with initialize_config_dir(str(paths.conf_dir()), version_base="1.3"):
        raw = hydra_compose(
            "train", overrides=[f"experiment={slug}/{recipe}", f"slug={slug}"], return_hydra_config=True
        )
    params = dict(raw.hydra.sweeper.params)
    assert params, "an ablation without a sweep"
    for key, values in params.items():
        for value in _values(str(values)):
            cfg = compose([f"experiment={slug}/{recipe}", f"{key}={value}"])
            with torch.device("meta"):
                build(cfg)


def _values(text: str) -> list[str]:
    from hydra.core.override_parser.overrides_parser import OverridesParser

    override = OverridesParser.create().parse_override(f"key={text}")
    if not override.is_sweep_override():
        return [text]
    return [str(value) for value in override.sweep_string_iterator()]


@pytest.mark.parametrize("slug", PAPERS)
def test_claim_arms_compose_to_different_runs(slug: str) -> None:
    claim = load_claim(slug)
    for scale in claim.scales:
        if scale not in discovery.recipes(slug):
            continue
        arms = claim.at(scale).arms
        hashes = {config_hash(compose([f"experiment={slug}/{scale}", f"arm={arm}"])) for arm in arms}
        assert len(hashes) == len(arms) >= 2


@pytest.mark.parametrize("slug", PAPERS)
def test_arms_get_equal_data_order(slug: str) -> None:
    claim = load_claim(slug).at("small")
    for arm in claim.arms:
        cfg = compose([f"experiment={slug}/small", f"arm={arm}", "seed=7"])
        assert cfg.seed == 7
        assert cfg.data.seed == 7


@pytest.mark.parametrize("slug", PAPERS)
def test_card_is_complete(slug: str) -> None:
    card = load_card(slug)
    assert card.title
    assert card.implemented


def test_a_verdict_needs_five_seeds() -> None:
    for slug in PAPERS:
        for scale in load_claim(slug).scales:
            assert len(load_claim(slug).at(scale).seeds) >= 5, f"{slug}/{scale}"
