"""Composition: the order of overrides, variants, hashes, every option of every group."""

from __future__ import annotations

from unittest.mock import Mock

import pytest
import torch
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra._internal.callbacks import Callbacks
from hydra.types import HydraContext
from omegaconf import OmegaConf

from hydra_plugins.reprise_sweeper.sweeper import RepriseSweeper
from reprise import paths
from reprise.config import (
    compose,
    config_hash,
    earlier_stage,
    job_overrides,
    run_dir,
    scale_label,
    smoked_scale,
    variant_name,
)
from reprise.errors import ConfigError
from reprise.training.instantiate import check_targets, instantiate

GROUPS = ("optimizer", "schedule", "trainer", "logger", "callbacks")
OPTIONS = [(group, path.stem) for group in GROUPS for path in sorted((paths.conf_dir() / group).glob("*.yaml"))]


def test_options_were_found() -> None:
    assert {group for group, _ in OPTIONS} == set(GROUPS)
    assert len(OPTIONS) >= 18


@pytest.mark.parametrize(("group", "option"), OPTIONS)
def test_every_option_composes_and_builds(group: str, option: str) -> None:
    if group in ("optimizer", "schedule"):
        written = OmegaConf.to_container(OmegaConf.load(paths.conf_dir() / group / f"{option}.yaml"))
        missing = [key for key, value in dict(written).items() if value == "???"]
        extra = [f"++{group}.{key}={'[2]' if key == 'milestones' else 2}" for key in missing]
        with initialize_config_dir(str(paths.conf_dir()), version_base="1.3"):
            alone = hydra_compose(f"{group}/{option}", overrides=["+steps=10", *extra])
        OmegaConf.resolve(alone)
        factory = instantiate(alone[group], path=group)
        target = [torch.nn.Parameter(torch.zeros(2, 2))]
        factory(target if group == "optimizer" else torch.optim.SGD(target, lr=1.0))
        return
    cfg = compose(["experiment=vit/small", f"{group}={option}"])
    if group == "trainer" and not isinstance(cfg.trainer.strategy, str):
        instantiate(cfg.trainer.strategy, path="trainer.strategy")


def test_the_user_s_overrides_come_after_the_arm_s() -> None:
    composed = job_overrides(["experiment=vit/small", "arm=vit_100", "data.train_size=50"])
    assert composed.index("data.train_size=100") < composed.index("data.train_size=50")
    assert compose(["experiment=vit/small", "arm=vit_100", "data.train_size=50"]).data.train_size == 50


def test_what_an_arm_shares_reaches_its_earlier_stage_and_no_further() -> None:
    typed = ["experiment=incremental_detr/small", "arm=full", "seed=100"]
    plain = compose(typed)
    varied = compose([*typed, "+data.proposals.source=random", "optimizer.weight_decay=0.5"])
    stage, usual = earlier_stage(varied), earlier_stage(plain)
    assert stage is not None
    assert usual is not None
    assert varied.data.proposals.source == stage.data.proposals.source == "random"
    assert stage.optimizer == usual.optimizer  # what is not shared belongs to the named arm alone
    assert run_dir(stage).parts[-3:] == ("small~+data.proposals.source-random", "base_finetuned", "seed=100")
    first, before = earlier_stage(stage), earlier_stage(usual)
    assert first is not None
    assert before is not None
    assert run_dir(first) == run_dir(before)
    assert config_hash(first) == config_hash(before)
    assert len({config_hash(cfg) for cfg in (plain, varied, stage, usual)}) == 4


def test_what_the_user_types_replaces_an_ablation_s_sweep_of_a_key_that_it_adds() -> None:
    sweeper = RepriseSweeper({"+data.proposals.source": "search,random"}, claim=False, dry_run=True, search={})
    sweeper.context = HydraContext(config_loader=Mock(), callbacks=Callbacks())
    typed = ["seed=100"]
    assert sweeper._combinations(typed) == [[f"+data.proposals.source={name}", *typed] for name in ("search", "random")]
    typed = ["+data.proposals.source=novel"]
    assert sweeper._combinations(typed) == [typed]


def test_a_variant_names_the_change_and_neutral_keys_do_not() -> None:
    assert "variant=optimizer.lr-0.1" in job_overrides(["experiment=vit/small", "optimizer.lr=0.1"])
    neutral = ["experiment=vit/small", "seed=3", "logger=wandb", "trainer=ddp_cpu", "trainer.devices=2", "threads=2"]
    assert not any(item.startswith("variant=") for item in job_overrides(neutral))
    assert len(variant_name(["key=" + "x" * 500])) <= 60


@pytest.mark.parametrize(
    ("typed", "variant"),
    [
        (["trainer=gpu"], "trainer-gpu"),
        (["trainer=gpu", "trainer.precision=32-true"], None),
        (["trainer.precision=32-true"], None),
        (["trainer=gpu", "optimizer.lr=0.1"], "optimizer.lr-0.1-trainer-gpu"),
        (["trainer=ddp_cpu", "optimizer.lr=0.1"], "optimizer.lr-0.1"),
        (["trainer.precision=bf16-mixed", "seed=4"], "trainer.precision-bf16-mixed"),
        (["trainer.devices=2"], None),
    ],
)
def test_a_trainer_that_changes_what_is_computed_is_a_variant(typed: list[str], variant: str | None) -> None:
    own, typed_run = compose(["experiment=vit/small"]), compose(["experiment=vit/small", *typed])
    assert typed_run.variant == variant
    changes = config_hash(typed_run) != config_hash(compose(["experiment=vit/small", f"seed={typed_run.seed}"]))
    assert changes == (run_dir(typed_run).parts[-3] != run_dir(own).parts[-3]), "it would move the claim's run aside"


def test_an_earlier_stage_takes_the_trainer_with_it() -> None:
    cfg = compose(["experiment=smkd/small", "arm=smkd", "trainer=gpu"])
    earlier = earlier_stage(cfg)
    assert earlier is not None
    assert (cfg.variant, earlier.variant) == ("trainer-gpu", "trainer-gpu")


def test_the_hash_covers_what_decides_and_nothing_else() -> None:
    base = config_hash(compose(["experiment=vit/small"]))
    same = [["logger=tensorboard"], ["trainer=gpu", "trainer.precision=32-true"], ["callbacks.checkpoint.keep=5"]]
    other = [["seed=1"], ["optimizer.lr=0.5"], ["steps=10"], ["data.batch_size=32"], ["trainer.precision=bf16-mixed"]]
    assert all(config_hash(compose(["experiment=vit/small", *more])) == base for more in same)
    assert len({config_hash(compose(["experiment=vit/small", *more])) for more in other} | {base}) == len(other) + 1


def test_what_is_not_known_to_be_neutral_makes_another_run() -> None:
    plain = compose(["experiment=vit/small"])
    swa = "+callbacks.swa={_target_: pytorch_lightning.callbacks.StochasticWeightAveraging, swa_lrs: 0.1}"
    for more in ("+trainer.limit_test_batches=1", "+trainer.gradient_clip_algorithm=value", swa):
        cfg = compose(["experiment=vit/small", more])
        assert config_hash(cfg) != config_hash(plain)
        assert run_dir(cfg) != run_dir(plain)
    assert config_hash(compose(["experiment=moco/paper", "data.workers=2"])) == config_hash(
        compose(["experiment=moco/paper"])
    )


def test_run_folders_are_named_by_paper_scale_arm_and_seed() -> None:
    path = run_dir(compose(["experiment=vit/small", "arm=cnn", "seed=4"]))
    assert path.parts[-4:] == ("vit", "small", "cnn", "seed=4")


def test_smoke_runs_of_each_recipe_have_a_folder_of_their_own() -> None:
    small, public, finetune = (
        run_dir(compose([f"experiment=vit/{recipe}", "smoke=true"])).parts[-3]
        for recipe in ("small", "public", "finetune")
    )
    assert (small, public, finetune) == ("smoke", "smoke-public", "smoke-finetune")
    variant = scale_label(compose(["experiment=vit/public", "smoke=true", "optimizer.lr=0.1"]))
    assert variant == "smoke-public~optimizer.lr-0.1"
    labels = (small, public, variant, "small", "public~smoke")
    assert [smoked_scale(label) for label in labels] == ["small", "public", "public", None, None]


def test_learning_rate_and_batch_do_not_depend_on_devices() -> None:
    one = compose(["experiment=vit/small"])
    many = compose(["experiment=vit/small", "trainer=ddp", "trainer.devices=8"])
    assert one.optimizer == many.optimizer
    assert one.data == many.data


@pytest.mark.parametrize("target", ["os.system", "builtins.eval", "subprocess.run", "torch.load", "repriseX.evil"])
def test_targets_outside_the_white_list_are_refused(target: str) -> None:
    with pytest.raises(ConfigError, match="not allowed"):
        check_targets({"part": [{"_target_": target}]}, "paper")
