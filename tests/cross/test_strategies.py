"""How devices share a step changes its memory and its speed, and not its result, for every paper.

Gradient accumulation and sharding add in another order, so they agree as ranks do (test_ranks.py says how closely);
activation checkpointing repeats the same operations, so it is bit-identical. bfloat16, between ranks or in the forward
pass, is allowed to be as far away as its 8 bits of precision take it in the first step. What a method cannot do it
refuses with its reason (`PaperModule.refuses`), and then it must.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from pytorch_lightning.strategies import DDPStrategy

from reprise import discovery
from reprise.config import compose, config_hash
from reprise.evidence import children
from reprise.evidence.plan import build_from, device_count, dry_run_of_ranks
from reprise.evidence.states import final_state, run_differences
from reprise.training.blocks import repeated_blocks
from reprise.training.instantiate import instantiate
from reprise.training.module import PaperModule
from reprise.training.run import build
from reprise.training.strategies import ShardedStrategy
from tests.cross import faults
from tests.cross.probes import CountCompiledCalls, Probe
from tests.cross.support import PAPERS, RECIPES, References, folder_of, in_every_run, metrics_of, smoke_config, spread
from tests.cross.test_ranks import SMOKE, far_gradients, far_metrics, far_state, invariant, uneven

FIRST_LOSS = 0.05  # relative: what bfloat16 may move the first training loss by
COPIED = (
    "trainer=ddp",
    "trainer.gradient_compression=bf16",
    "trainer.accumulate_grad_batches=2",
    "trainer.activation_checkpointing=true",
    "trainer.strategy.static_graph=true",
    "trainer.precision=16-mixed",
)


def module_of(slug: str) -> PaperModule:
    with torch.device("meta"):
        return build(SMOKE[slug]).module


MODULES = {slug: module_of(slug) for slug in PAPERS}
SHARDED = [slug for slug in PAPERS if "sharding" not in MODULES[slug].refuses]
WITH_BLOCKS = [slug for slug in PAPERS if repeated_blocks(MODULES[slug])]
MANY_RANKS = [item for item in RECIPES if device_count(compose([f"experiment={item[0]}/{item[1]}"])) > 1]


def changed(slug: str, references: References, folder: Path, *trainer: str, world: int = 1) -> tuple[Any, Path, Any]:
    """How the reference run ends when it is made with other options of the trainer: (reference, run folder, ends)."""
    reference = references(slug, str(SMOKE[slug].arm), *uneven(slug), *invariant(slug, str(SMOKE[slug].arm)))
    cfg = reference.cfg.copy()
    cfg.trainer = smoke_config(slug, *invariant(slug, str(SMOKE[slug].arm)), *trainer).trainer
    config, runs = children.write_config(cfg, folder), folder / "runs"
    reference.give_earlier_stages(runs)
    probe = Probe(folder / "probe")
    if world == 1:
        return reference, folder_of(cfg, runs), [children.run(config, runs, before=probe)]
    return reference, folder_of(cfg, runs), children.run_ranks(config, runs, world, before=probe)


def first_loss(run: Path) -> float:
    return metrics_of(run)[1, "train/loss"]


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.parametrize("slug", PAPERS)
def test_accumulation_keeps_the_global_batch(slug: str, references: References, tmp_path: Path) -> None:
    reference, run, [ended] = changed(slug, references, tmp_path, "trainer.accumulate_grad_batches=2")
    if ended.code:
        assert "Traceback" not in ended.messages
        assert "trainer.accumulate_grad_batches" in ended.messages
        assert MODULES[slug].refuses.get("accumulation", "SAM cannot accumulate") in ended.messages
        return
    assert "accumulation" not in MODULES[slug].refuses
    one, parts = (torch.load(at / "rank=0.pt", weights_only=True) for at in (reference.probe, tmp_path / "probe"))
    found = far_gradients(one["gradients"], parts["gradients"]) + far_state(one["module"], parts["module"])
    assert not [*found, *far_metrics(metrics_of(reference.run), metrics_of(run))]


def test_most_papers_accumulate() -> None:
    able = [slug for slug in PAPERS if "accumulation" not in MODULES[slug].refuses]
    assert {"vit", "detr", "transformer"} <= set(able)


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.parametrize("slug", PAPERS)
def test_activation_checkpointing_changes_no_bit(slug: str, references: References, tmp_path: Path) -> None:
    reference, run, [ended] = changed(slug, references, tmp_path, "trainer.activation_checkpointing=true")
    if slug in WITH_BLOCKS:
        assert ended.code == 0, ended.messages
        assert not run_differences(reference.run, run)
    else:
        assert ended.code == 1
        assert "has no repeated blocks" in ended.messages


def test_most_papers_have_blocks() -> None:
    assert {"vit", "detr", "transformer", "clip", "moco", "smkd", "incremental_detr"} <= set(WITH_BLOCKS)


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.parametrize("slug", PAPERS)
def test_a_sharded_model_learns_the_same(slug: str, references: References, tmp_path: Path) -> None:
    if slug not in SHARDED:
        cfg = smoke_config(slug, "trainer=fsdp_cpu")
        ended = children.run_ranks(children.write_config(cfg, tmp_path), tmp_path / "runs", 2)
        assert all(one.code == 1 for one in ended)
        assert MODULES[slug].refuses["sharding"] in ended[0].messages
        return
    reference, run, ended = changed(slug, references, tmp_path, "trainer=fsdp_cpu", world=2)
    assert [one.code for one in ended] == [0, 0], ended[0].messages[-3000:]
    whole, sharded = final_state(reference.run), final_state(run)
    found = far_metrics(metrics_of(reference.run), metrics_of(run))
    assert not found + far_state(whole["state_dict"], sharded["state_dict"])
    assert group_sizes(whole) == group_sizes(sharded)


def group_sizes(state: dict[str, Any]) -> list[list[int]]:
    """Parameters in each group of each optimizer."""
    return [[len(group["params"]) for group in each["param_groups"]] for each in state["optimizer_states"]]


def test_big_models_can_be_sharded() -> None:
    assert {"vit", "clip", "detr"} <= set(SHARDED)


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.parametrize("first", ["one process", "sharded"])
def test_a_run_continues_with_or_without_sharding(first: str, references: References, tmp_path: Path) -> None:
    slug = SHARDED[0]
    reference = references(slug, str(SMOKE[slug].arm), *uneven(slug), *invariant(slug, str(SMOKE[slug].arm)))
    run, cfg = reference.give_earlier_stages(tmp_path), reference.cfg.copy()
    cfg.trainer = smoke_config(slug, *invariant(slug, str(SMOKE[slug].arm)), "trainer=fsdp_cpu").trainer
    sharded, kill = children.write_config(cfg, tmp_path), faults.SignalAfterStep(3)
    if first == "sharded":
        assert children.run_ranks(sharded, tmp_path, 2, before=kill)[0].code == -9
        ended = [children.run(reference.config, tmp_path)]
    else:
        assert children.run(reference.config, tmp_path, before=kill).code == -9
        ended = children.run_ranks(sharded, tmp_path, 2)
    assert [one.code for one in ended] == [0] * len(ended), ended[0].messages[-3000:]
    found = far_metrics(metrics_of(reference.run), metrics_of(run))
    assert not found + far_state(final_state(reference.run)["state_dict"], final_state(run)["state_dict"])


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.parametrize("name", ["fp16", "bf16"])
@pytest.mark.parametrize("slug", [in_every_run(slug == spread(0), slug) for slug in PAPERS])
def test_compressed_gradients(slug: str, name: str, references: References, tmp_path: Path) -> None:
    options = ("trainer=ddp_cpu", f"trainer.gradient_compression={name}")
    _, run, ended = changed(slug, references, tmp_path, *options, world=2)
    assert [one.code for one in ended] == [0, 0], ended[0].messages[-3000:]
    ranks = [torch.load(path, weights_only=True) for path in sorted((tmp_path / "probe").iterdir())]
    assert len(ranks) == 2
    assert not far_state(ranks[0]["module"], ranks[1]["module"])
    assert (run / "summary.json").exists()


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.parametrize("slug", PAPERS)
def test_what_is_compiled_is_what_trains(slug: str, tmp_path: Path) -> None:
    cfg, calls = smoke_config(slug, "compile=true"), tmp_path / "calls"
    calls.touch()
    ended = children.run(children.write_config(cfg, tmp_path), tmp_path / "runs", before=CountCompiledCalls(calls))
    assert ended.code == 0, ended.messages[-3000:]
    assert calls.stat().st_size >= cfg.steps


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.parametrize("slug", [in_every_run(slug in (spread(3), spread(6)), slug) for slug in PAPERS])
def test_a_static_graph(slug: str, references: References, tmp_path: Path) -> None:
    options = ("trainer=ddp_cpu", "trainer.strategy.static_graph=true")
    reference, run, ended = changed(slug, references, tmp_path, *options, world=2)
    if ended[0].code:
        assert "Traceback" not in ended[0].messages
        assert "SAM's two passes" in ended[0].messages
        return
    assert [one.code for one in ended] == [0, 0], ended[1].messages[-3000:]
    assert first_loss(run) == pytest.approx(first_loss(reference.run), rel=FIRST_LOSS)


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.parametrize("slug", [in_every_run(slug in (spread(1), spread(2)), slug) for slug in PAPERS])
def test_mixed_precision(slug: str, references: References, tmp_path: Path) -> None:
    reference, run, [ended] = changed(slug, references, tmp_path, "trainer.precision=bf16-mixed")
    assert ended.code == 0, ended.messages
    assert first_loss(run) == pytest.approx(first_loss(reference.run), rel=FIRST_LOSS)


@pytest.mark.parametrize(("slug", "recipe"), RECIPES)
def test_every_recipe_composes_with_every_strategy(slug: str, recipe: str) -> None:
    plain = compose([f"experiment={slug}/{recipe}"])
    sharded = compose([f"experiment={slug}/{recipe}", "trainer=fsdp"])
    copied = compose([f"experiment={slug}/{recipe}", *COPIED])
    for cfg, kind in ((sharded, ShardedStrategy), (copied, DDPStrategy)):
        assert cfg.data.batch_size == plain.data.batch_size
        assert isinstance(instantiate(cfg.trainer.strategy, path="trainer.strategy"), kind)
    assert config_hash(copied) != config_hash(plain)  # compressed, in parts, half precision: another run


def test_what_changes_no_number_changes_no_hash() -> None:
    plain = compose(["experiment=vit/small"])
    for options in (["trainer=ddp_cpu"], ["trainer=fsdp_cpu"], ["trainer.activation_checkpointing=true"]):
        cfg = compose(["experiment=vit/small", *options])
        assert (config_hash(cfg), cfg.variant) == (config_hash(plain), None)


def test_every_paper_was_collected() -> None:
    assert set(MODULES) == set(discovery.papers())


@pytest.mark.slow
@pytest.mark.parametrize(("slug", "recipe"), MANY_RANKS)
def test_a_step_at_the_published_number_of_ranks(slug: str, recipe: str) -> None:
    cfg, messages = compose([f"experiment={slug}/{recipe}"]), list[str]()
    world = device_count(cfg)
    assert cfg.data.batch_size % world == 0
    step = dry_run_of_ranks(lambda: build_from(cfg), world, cfg.data.batch_size // world, messages)
    assert step is not None, messages
    assert step.ranks == world


def test_most_published_recipes_have_many_ranks() -> None:
    assert {"clip", "detr", "moco", "smkd", "transformer", "vit"} <= {slug for slug, _ in MANY_RANKS}
