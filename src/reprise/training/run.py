"""One run, from its resolved configuration to a finished run folder."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import shlex
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from omegaconf import DictConfig, OmegaConf

from reprise import config as configuration
from reprise.data.module import DataModule
from reprise.errors import CheckpointError, ConfigError, InterruptedRunError, RepriseError
from reprise.seeding import seed_all
from reprise.training.accumulation import accumulate
from reprise.training.blocks import checkpoint_activations, compiled_blocks
from reprise.training.checkpoint import AtomicCheckpointIO, ExactCheckpoint, callbacks_of, newest_checkpoint
from reprise.training.diagnostics import Timing
from reprise.training.instantiate import check_values, instantiate
from reprise.training.interrupt import StopBetweenSteps, StopRequest
from reprise.training.machine import rank, ranks_are_there, start_name
from reprise.training.mirrors import finished_mirrors, make_mirrors
from reprise.training.module import PaperModule
from reprise.training.ownership import only_writer
from reprise.training.ranks import await_end, await_start, text_of, write_rank_error
from reprise.training.recording import ProgressReport, Reseed, RunLogger, save_pictures
from reprise.training.runfolder import MetricsFile, RunFolder, write_atomic, write_json
from reprise.training.steps import StepMetrics
from reprise.training.stopping import GraceIsOver
from reprise.training.strategies import ShardedStrategy, ddp
from reprise.training.usage import Usage

# What the trainer's configuration says that is ours to do, and not Lightning's.
OWN_OPTIONS = ("accumulate_grad_batches", "activation_checkpointing", "gradient_compression")


@dataclass
class Parts:
    """What a run is made of."""

    data: DataModule
    module: PaperModule


def build(cfg: DictConfig) -> Parts:
    """The data module and the paper's module of a configuration, initialised from its seed."""
    data = instantiate(cfg.data, path="data")
    seed_all(cfg.seed, "init")
    module = instantiate(cfg.paper, path="paper")
    if not isinstance(module, PaperModule):
        raise ConfigError(f"{cfg.paper._target_} is not a PaperModule", looked_at="paper._target_")
    return Parts(data, module)


def build_first(cfg: DictConfig, folder: RunFolder, config_hash: str) -> Parts | None:
    """The parts of a run that has not begun, with its training data, made before anything is written or moved aside.

    None where the folder holds a run of this configuration: what goes wrong then is recorded there.

    Raises:
        RepriseError: the data is missing, or a value is wrong.
    """
    if folder.holds(config_hash):
        return None
    check_values(cfg.callbacks, "callbacks")
    parts = build(cfg)
    parts.module.configure_optimizers()
    parts.data.source("train")
    return parts


def train(cfg: DictConfig, *, show_progress: bool = True, is_checked: bool = False) -> dict[str, float]:
    """Run one configuration in this process (one rank of it, under a process group) and return its test metrics.

    A finished run is not repeated; an interrupted one continues. The run folder is `config.run_dir(cfg)`.

    Args:
        is_checked: the process that prepared the folder has seen that the parts can be built.

    Raises:
        RepriseError: whatever the user can do something about; the run folder, once it is there, says how it ended.
    """
    torch.set_num_threads(cfg.threads)
    folder = RunFolder(configuration.run_dir(cfg))
    config_hash = configuration.config_hash(cfg)
    if folder.is_finished(config_hash):
        return folder.metrics()
    usage = Usage()
    parts = None if is_checked else build_first(cfg, folder, config_hash)
    if rank() > 0:
        return _train_after_rank_0(cfg, folder, config_hash, parts)
    with _full_disk_explained(folder), only_writer(folder.path):
        if folder.is_finished(config_hash):  # by the process that held the lock
            return folder.metrics()
        folder.prepare(config_hash)
        write_atomic(folder.path / "config.yaml", OmegaConf.to_yaml(cfg))
        folder.start(_facts(cfg, config_hash))
        with _recorded(folder, usage):
            metrics = _fit_and_test(cfg, folder, config_hash, parts or build(cfg), show_progress)
            write_json(folder.path / "summary.json", {"metrics": metrics})
            folder.end("finished", seconds=usage.seconds, cpu_seconds=usage.cpu_seconds)
    return metrics


def _train_after_rank_0(cfg: DictConfig, folder: RunFolder, config_hash: str, parts: Parts | None) -> dict[str, float]:
    """The run as another rank: rank 0 prepares the folder first, and has closed it when this returns."""
    if await_start(folder, config_hash, start_name()):
        return folder.metrics()
    try:
        with _full_disk_explained(folder):
            metrics = _fit_and_test(cfg, folder, config_hash, parts or build(cfg), show=False)
    except BaseException as error:
        write_rank_error(folder, rank(), error)
        raise
    await_end(folder, config_hash)
    return metrics


@contextlib.contextmanager
def _recorded(folder: RunFolder, usage: Usage) -> Iterator[None]:
    """run.json says how the body failed, if it does; beside other ranks, so does a file of this rank."""
    try:
        with _full_disk_explained(folder):
            yield
    except BaseException as error:
        stopped = isinstance(error, InterruptedRunError | KeyboardInterrupt | GraceIsOver)
        code = error.exit_code if isinstance(error, RepriseError) else 130 if stopped else 1
        status = "interrupted" if stopped else "failed"
        seconds, cpu_seconds = usage.seconds, usage.cpu_seconds
        with contextlib.suppress(OSError):  # a full disk must not hide the first error
            folder.end(status, seconds=seconds, cpu_seconds=cpu_seconds, error=text_of(error), exit_code=code)
        if ranks_are_there():
            write_rank_error(folder, 0, error)
        raise


@contextlib.contextmanager
def _quiet_lightning() -> Iterator[None]:
    """Lightning's advice about loaders and devices does not apply here: loaders are functions of the step."""
    loggers = [logging.getLogger(name) for name in ("pytorch_lightning", "lightning.pytorch")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        for pattern in (
            ".*dataloader.*",
            ".*transfer_batch_to_device.*",
            ".*DataLoader.*",
            ".*GPU available.*",
            ".*LeafSpec.*",
            ".*treespec.*",
        ):
            warnings.filterwarnings("ignore", message=pattern)
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


@contextlib.contextmanager
def _full_disk_explained(folder: RunFolder) -> Iterator[None]:
    """Say what to do where the disk (or the quota) has no room for a file of the run."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        raise RepriseError(
            f"the run folder cannot be written: {error.strerror}",
            looked_at=folder.path.resolve(),
            next_step="free disk space and run the same command again; it continues from the last checkpoint",
        ) from error


@_quiet_lightning()
def _fit_and_test(cfg: DictConfig, folder: RunFolder, config_hash: str, parts: Parts, show: bool) -> dict[str, float]:
    earlier = configuration.earlier_stage(cfg)
    if earlier is not None:
        parts.module.continue_from(_final_state_of(earlier))
    identity = _identity(cfg, config_hash)
    found = newest_checkpoint(folder.path / "checkpoints", identity)
    start = found[1] if found else 0
    curves = MetricsFile(folder.path / "metrics.csv")
    timing = Timing(MetricsFile(folder.path / "timing.csv"), parts.data.examples_per_step)
    if rank() == 0:
        curves.cut_back(start)
        timing.file.cut_back(start)
    request = StopRequest()
    progress = ProgressReport(folder, cfg.steps, f"{cfg.slug} {cfg.scale} {cfg.arm} seed {cfg.seed}", show)
    trainer = make_trainer(cfg, folder, identity, curves, request, progress, timing)
    _prepare(parts.module, trainer, cfg)
    with request.listening(), contextlib.closing(progress), finished_mirrors(trainer.loggers) as outcome:
        final = found[0] if found else None
        if start < cfg.steps:
            parts.data.start_step = start
            with compiled_blocks(parts.module) if cfg.compile else contextlib.nullcontext():
                trainer.fit(parts.module, datamodule=parts.data, ckpt_path=final, weights_only=True)
            final = checkpoint_of(trainer).save(trainer, cfg.steps)
        sharded = isinstance(trainer.strategy, ShardedStrategy)
        if sharded:
            parts, trainer = build(cfg), _unsharded(trainer, cfg, folder)
        if final is not None and (sharded or start == cfg.steps):
            _restore(parts.module, final)
        outcome.metrics = _test(trainer, parts, folder, curves, cfg)
        return dict(outcome.metrics)


def _prepare(module: PaperModule, trainer: pl.Trainer, cfg: DictConfig) -> None:
    """Set up what the trainer's configuration asks of the module, or refuse it with the module's reason."""
    asked = {
        "accumulation": (cfg.trainer.accumulate_grad_batches > 1, "trainer.accumulate_grad_batches"),
        "sharding": (isinstance(trainer.strategy, ShardedStrategy), "trainer.strategy"),
    }
    for option, (is_asked, place) in asked.items():
        if is_asked and option in module.refuses:
            raise ConfigError(
                f"{cfg.slug} cannot be trained with {option}: {module.refuses[option]}",
                looked_at=place,
                next_step="set it to 1" if option == "accumulation" else "use trainer=ddp",
            )
    accumulate(trainer, module, cfg.trainer.accumulate_grad_batches)
    if cfg.trainer.activation_checkpointing:
        checkpoint_activations(module)


def _restore(module: PaperModule, path: Path) -> None:
    content = torch.load(path, map_location="cpu", weights_only=True)
    module.on_load_checkpoint(content)
    module.load_state_dict(content["state_dict"])


def _final_state_of(cfg: DictConfig) -> dict[str, torch.Tensor]:
    """The state dict that a finished run ended with."""
    folder = configuration.run_dir(cfg)
    config_hash = configuration.config_hash(cfg)
    found = newest_checkpoint(folder / "checkpoints", _identity(cfg, config_hash))
    if found is None or not RunFolder(folder).is_finished(config_hash):
        raise CheckpointError(
            f"the earlier stage has not ended: {cfg.slug} {cfg.scale} {cfg.arm} seed {cfg.seed}",
            looked_at=folder,
            next_step=f"reprise train {' '.join(map(shlex.quote, _typed(cfg)))}",
        )
    return torch.load(found[0], map_location="cpu", weights_only=True)["state_dict"]


def _typed(cfg: DictConfig) -> list[str]:
    smoke = ["smoke=true"] if cfg.smoke else []
    return [f"experiment={cfg.slug}/{cfg.scale}", f"arm={cfg.arm}", f"seed={cfg.seed}", *smoke]


def _identity(cfg: DictConfig, config_hash: str) -> dict[str, str]:
    return {"paper": cfg.slug, "config_hash": config_hash}


def _test(
    trainer: pl.Trainer, parts: Parts, folder: RunFolder, curves: MetricsFile, cfg: DictConfig
) -> dict[str, float]:
    """Touch the test data once; the metrics and the pictures of the final state."""
    trainer.test(parts.module, datamodule=parts.data, verbose=False)
    metrics = {
        name: float(value) for name, value in sorted(trainer.callback_metrics.items()) if name.startswith("test/")
    }
    if not metrics:
        raise ConfigError(f"{cfg.paper._target_} logged no test/<metric>", looked_at="its test_step")
    if trainer.is_global_zero:
        curves.cut_back(cfg.steps)
        curves.append(cfg.steps, metrics)
        with torch.no_grad():
            parts.module.eval()
            save_pictures(parts.module, folder)
    return metrics


def make_trainer(
    cfg: DictConfig,
    folder: RunFolder,
    identity: Mapping[str, str],
    curves: MetricsFile,
    request: StopRequest,
    progress: ProgressReport,
    timing: Timing,
) -> pl.Trainer:
    """The Trainer of a run: one endless epoch of `steps` batches, deterministic, with the standard callbacks."""
    _set_up_torch()
    configured = {name: instantiate(node, path=f"callbacks.{name}") for name, node in cfg.callbacks.items()}
    checkpoint = next((item for item in configured.values() if isinstance(item, ExactCheckpoint)), None)
    if checkpoint is None:
        raise ConfigError(
            "the run has no ExactCheckpoint callback", looked_at="callbacks", next_step="callbacks=default"
        )
    checkpoint.folder, checkpoint.identity = folder.path / "checkpoints", dict(identity)
    return pl.Trainer(
        **_options(cfg, folder),
        max_epochs=1,
        val_check_interval=min(cfg.val_every or cfg.steps, cfg.steps),
        log_every_n_steps=max(1, cfg.steps // 200),
        logger=[RunLogger(curves), *make_mirrors(cfg, folder.path)],
        callbacks=[
            StopBetweenSteps(request, checkpoint),
            *(item for item in configured.values() if item is not checkpoint),
            checkpoint,
            Reseed(cfg.seed),
            progress,
            timing,
            StepMetrics(),
        ],
        profiler=timing.clock,
        plugins=[AtomicCheckpointIO()],
        num_sanity_val_steps=0,
    )


def _unsharded(trainer: pl.Trainer, cfg: DictConfig, folder: RunFolder) -> pl.Trainer:
    """A trainer for the test of a model that was sharded in training: every device holds the whole of it.

    What an evaluation calls besides the forward pass, and the pictures of one rank, need whole weights.
    """
    backend = cfg.trainer.strategy.process_group_backend
    return pl.Trainer(
        **{**_options(cfg, folder), "strategy": ddp(backend)},
        logger=trainer.loggers,
        callbacks=[
            item for item in callbacks_of(trainer) if isinstance(item, Reseed | ProgressReport | StopBetweenSteps)
        ],
    )


def _options(cfg: DictConfig, folder: RunFolder) -> dict[str, Any]:
    """The trainer's configuration as arguments, with what every run wants."""
    chosen = {
        key: instantiate(value, path=f"trainer.{key}") if key == "strategy" and isinstance(value, DictConfig) else value
        for key, value in cfg.trainer.items()
        if key not in OWN_OPTIONS
    }
    return {
        **chosen,
        "use_distributed_sampler": False,
        "deterministic": True,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "default_root_dir": folder.path,
    }


def _set_up_torch() -> None:
    """Float32 is float32 on every device; and two things that cost time at every step and change no result are off."""
    torch.backends.cudnn.allow_tf32 = False  # PyTorch's default rounds the inputs of convolutions to 10 bits
    # nothing reads memory that it has not written
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "0"  # Lightning's 1 makes each optimizer step search for a driver


def checkpoint_of(trainer: pl.Trainer) -> ExactCheckpoint:
    return next(item for item in callbacks_of(trainer) if isinstance(item, ExactCheckpoint))


def _facts(cfg: DictConfig, config_hash: str) -> dict[str, Any]:
    return {
        "paper": cfg.slug,
        "scale": configuration.scale_label(cfg),
        "arm": cfg.arm,
        "seed": cfg.seed,
        "config_hash": config_hash,
        "start": start_name(),
    }


def read_config(path: Path) -> DictConfig:
    """The resolved configuration of a run folder's config.yaml."""
    loaded = OmegaConf.load(path)
    assert isinstance(loaded, DictConfig)
    OmegaConf.set_struct(loaded, True)
    return loaded
