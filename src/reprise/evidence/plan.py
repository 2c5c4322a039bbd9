"""`reprise plan`: what of a recipe can be proved without running it: sizes, memory, hours, data, one optimizer step."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from reprise import discovery
from reprise.data.spec import DataSpec
from reprise.errors import RepriseError
from reprise.evidence import measure
from reprise.evidence.cards import Card, Size, load_card
from reprise.evidence.files import write_json
from reprise.evidence.formatting import ABSENT, count, duration
from reprise.evidence.formatting import size as bytes_text
from reprise.evidence.measure import MemoryEstimate, StepResult
from reprise.training.module import PaperModule

if TYPE_CHECKING:
    from omegaconf import DictConfig
    from rich.console import RenderableType
    from rich.table import Table

REAL_STEP_BYTES = 16 * 2**30  # up to here the optimizer step runs on real tensors
DEVICE = "A100"
DEVICE_FLOPS = 312e12  # bf16 peak of one A100 (NVIDIA data sheet)
DRY_ITEMS = 2  # of a dry run on real tensors
UTILISATION = 0.35  # of the peak, a usual share for vision models and transformers

T = TypeVar("T")
Built = tuple[PaperModule, DataSpec]
Build = Callable[[Sequence[str]], Built]


@dataclass(frozen=True)
class SizeResult:
    """One published size beside ours.

    Attributes:
        parameters, flops: ours; None where they could not be had (`message` says why). FLOPs are multiply-adds of one
            forward pass over one item.
        matched: every published figure is met within `tolerance`.
        note: the card's explanation, where it gives one.
    """

    name: str
    parameters: int | None
    published_parameters: int
    flops: int | None
    published_flops: float | None
    tolerance: float
    matched: bool
    source: str
    note: str | None = None
    message: str = ""


@dataclass(frozen=True)
class DataResult:
    """The data a recipe names: `state` is ok, missing, damaged or unknown (not in the registry)."""

    name: str
    state: str
    place: str
    next_step: str | None


@dataclass(frozen=True)
class Plan:
    """All that `reprise plan` found out about a recipe.

    Attributes:
        examples: forward and backward passes of single examples in the whole run (SAM takes two a step, a federated
            round many).
        device_hours: on `DEVICE`s at `UTILISATION` of their peak, three forward passes' worth an example; None when
            the forward pass could not be counted.
        memory: bytes a device with its share of the global batch; None when it could not be measured.
        step: the optimizer step; None when it failed (`messages` says why).
        dry_run: an optimizer step as one of the published number of ranks; None for one rank, or when it failed.
    """

    paper: str
    recipe: str
    sizes: list[SizeResult]
    data: DataResult
    steps: int
    batch_size: int
    devices: int
    examples: int
    device_hours: float | None
    memory: MemoryEstimate | None
    step: StepResult | None
    dry_run: StepResult | None
    messages: list[str]

    @property
    def ok(self) -> bool:
        """Every size matched or explained by its note, and the optimizer steps made."""
        ran = self.step is not None and (self.dry_run is not None or self.devices == 1)
        return ran and all(size.matched or (size.note and not size.message) for size in self.sizes)


def plan_experiment(overrides: Sequence[str]) -> Plan:
    """Compose a recipe and examine it; sizes are those of the card, as overrides on the same recipe.

    Raises:
        ConfigError: the overrides name no recipe, or the card is wrong.
    """
    from reprise.config import compose, experiment_of
    from reprise.training.instantiate import instantiate

    slug, recipe = experiment_of(overrides)
    cfg, card = compose(overrides), load_card(slug)
    examples = instantiate(cfg.data, path="data").examples_per_step
    sized = "paper" if "paper" in discovery.recipes(slug) else recipe

    def build_size(more: Sequence[str]) -> Built:
        return build_from(compose([f"experiment={slug}/{sized}", *more]))

    return make_plan(
        slug,
        recipe,
        card,
        build_size=build_size,
        build=lambda: build_from(cfg),
        data=check_data(data_name(cfg)),
        steps=int(cfg.steps),
        batch_size=int(cfg.data.batch_size),
        examples_per_step=examples,
        devices=device_count(cfg),
    )


def build_from(cfg: DictConfig) -> Built:
    """The module on torch's default device, and what its data module says of the data."""
    from reprise.training.instantiate import instantiate

    with torch.device("cpu"):
        spec = instantiate(cfg.data, path="data").spec
    return instantiate(cfg.paper, path="paper"), spec


def make_plan(
    slug: str,
    recipe: str,
    card: Card,
    *,
    build_size: Build,
    build: Callable[[], Built],
    data: DataResult,
    steps: int,
    batch_size: int,
    devices: int,
    examples_per_step: int | None = None,
) -> Plan:
    """Examine a recipe from its parts.

    Args:
        build_size: makes the module of a published size from its overrides, on torch's default device.
        build: makes the recipe's own module.
        steps, batch_size, devices: of the recipe; the batch is global.
        examples_per_step: what one step goes through, where that is not one batch (rounds of clients).
    """
    messages: list[str] = []
    share = math.ceil(batch_size / devices)
    macs = _try(lambda: _forward_cost(build)[1], "multiply-adds", messages)
    memory = _try(lambda: _memory(build, share), "memory", messages)
    step = make_step(build, share, memory, messages)
    dry_run = dry_run_of_ranks(build, devices, share, messages) if devices > 1 else None
    passes = _try(lambda: _passes(build), "passes", messages) or 1
    work = (examples_per_step or batch_size) * passes * steps
    hours = None if macs is None else 6 * macs * work / (DEVICE_FLOPS * UTILISATION) / 3600
    sizes = [check_size(size, build_size) for size in card.sizes]
    return Plan(slug, recipe, sizes, data, steps, batch_size, devices, work, hours, memory, step, dry_run, messages)


def check_size(size: Size, build: Build) -> SizeResult:
    """Build one published size and compare its figures; whatever goes wrong is a mismatch with its message."""
    parameters, flops, message = None, None, ""
    try:
        if size.flops is None:
            parameters = _on_meta_or_cpu(lambda: measure.count_parameters(build(size.overrides)[0]))
        else:
            parameters, flops = _forward_cost(lambda: build(size.overrides))
    except Exception as error:
        message = _reason(error)
    met = [_within(parameters, size.parameters, size.tolerance)]
    if size.flops is not None:
        met.append(_within(flops, size.flops, size.tolerance))
    return SizeResult(
        size.name,
        parameters,
        size.parameters,
        flops,
        size.flops,
        size.tolerance,
        all(met),
        size.source,
        size.note,
        message,
    )


def _within(ours: float | None, published: float, tolerance: float) -> bool:
    return ours is not None and abs(ours - published) <= tolerance * published


def _forward_cost(build: Callable[[], Built]) -> tuple[int, int]:
    """(parameters, multiply-adds of one item)."""

    def cost() -> tuple[int, int]:
        module, spec = build()
        return measure.count_parameters(module), measure.multiply_adds(module, measure.example_batch(module, spec, 1))

    return _on_meta_or_cpu(cost)


def _passes(build: Callable[[], Built]) -> int:
    with torch.device("meta"):
        return int(getattr(build()[0], "passes_per_step", 1))


def _memory(build: Callable[[], Built], batch_size: int) -> MemoryEstimate:
    """With the device's share of the batch on meta; a model that needs real tensors: from one item times the share."""

    def estimate(items: int) -> MemoryEstimate:
        module, spec = build()
        return measure.estimate_memory(module, measure.example_batch(module, spec, items))

    try:
        with torch.device("meta"):
            return estimate(batch_size)
    except measure.NO_VALUES:
        one = estimate(1)
        return MemoryEstimate(one.parameters, one.gradients, one.optimizer, one.activations * batch_size)


def _on_meta_or_cpu(work: Callable[[], T]) -> T:
    """Meta tensors cost nothing, but code that looks at values needs real ones."""
    try:
        with torch.device("meta"):
            return work()
    except measure.NO_VALUES:
        return work()


def make_step(
    build: Callable[[], Built], batch_size: int, memory: MemoryEstimate | None, messages: list[str]
) -> StepResult | None:
    """One optimizer step of the full-size model on a device's share of the batch.

    On real tensors where the estimate is within 16 GiB and the machine's free memory, else on meta tensors; a loss that
    looks at values (a matcher) cannot run on meta, and then the largest batch that fits is used on real tensors.
    """
    limit = min(REAL_STEP_BYTES, int(0.8 * _free_bytes()))
    fits = _largest_batch(memory, batch_size, limit)
    plans = [("cpu", batch_size)] if fits >= batch_size else [("meta", batch_size), *([("cpu", fits)] if fits else [])]
    for device, items in plans:
        step = _try(partial(_step, build, device, items), f"optimizer step on {device}", messages)
        if step is not None:
            return step
    return None


def dry_run_of_ranks(build: Callable[[], Built], world: int, batch_size: int, messages: list[str]) -> StepResult | None:
    """One optimizer step as rank 0 of `world`, with the shapes of all collectives; what it computes means nothing.

    On meta tensors with the device's share of the batch, or where a loss looks at values on a few real items.
    """
    reasons: list[str] = []
    for device, items in (("meta", batch_size), ("cpu", min(batch_size, DRY_ITEMS))):
        with measure.as_rank_of(world):
            step = _try(partial(_step, build, device, items), f"as one of {world} ranks on {device}", reasons)
        if step is not None:
            return replace(step, loss=None, ranks=world)
    messages += reasons
    return None


def _step(build: Callable[[], Built], device: str, batch_size: int) -> StepResult:
    def parts() -> tuple[PaperModule, measure.Batch]:
        module, spec = build()
        return module, measure.example_batch(module, spec, batch_size)

    return measure.timed_step(parts, device, batch_size)


def _largest_batch(memory: MemoryEstimate | None, batch_size: int, limit: int) -> int:
    if memory is None:
        return 1
    room = limit - (memory.total - memory.activations)
    each = max(memory.activations / batch_size, 1)
    return max(min(int(room / each), batch_size), 0)


def _free_bytes() -> int:
    """Memory that this machine can still give; where it does not say (no /proc), as much as the real step may use."""
    try:
        facts = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        return int(facts["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return REAL_STEP_BYTES


def _try(work: Callable[[], T], what: str, messages: list[str]) -> T | None:
    try:
        return work()
    except Exception as error:
        messages.append(f"{what}: {_reason(error)}")
        return None


def _reason(error: Exception) -> str:
    text = error.problem if isinstance(error, RepriseError) else f"{type(error).__name__}: {error}"
    return " ".join(text.split())[:240]


def data_name(cfg: DictConfig) -> str:
    """The registry name of the recipe's data."""
    from reprise.training.instantiate import instantiate

    return instantiate(cfg.data, path="data").spec.name


def check_data(name: str) -> DataResult:
    """Whether the data is there, as the registry sees it."""
    from reprise.data import registry

    if name not in registry.entries():
        return DataResult(name, "unknown", "the data registry", None)
    found = registry.check(name)
    return DataResult(name, found.state, found.place, found.next_step)


def device_count(cfg: DictConfig) -> int:
    """Processes of the recipe's trainer; `auto` counts as one."""
    devices, nodes = cfg.trainer.get("devices", 1), cfg.trainer.get("num_nodes", 1)
    return (devices if isinstance(devices, int) and devices > 0 else 1) * int(nodes)


def to_json(plan: Plan) -> str:
    """The plan as JSON, with `ok`."""
    return json.dumps({**asdict(plan), "ok": plan.ok}, indent=1, allow_nan=False)


def write_sizes(plan: Plan) -> Path:
    """Write `experiments/<slug>/SIZES.json`: counts, and each size with ours and the published figures."""
    rows: list[dict[str, Any]] = [
        {key: value for key, value in asdict(size).items() if key not in ("source", "note")} for size in plan.sizes
    ]
    content = {"passed": sum(size.matched for size in plan.sizes), "total": len(plan.sizes), "sizes": rows}
    return write_json(discovery.experiment_dir(plan.paper) / "SIZES.json", content)


def render(plan: Plan) -> RenderableType:
    """Sizes, then what a run takes, for the terminal."""
    from rich.console import Group
    from rich.text import Text

    parts: list[RenderableType] = [Text(f"{plan.paper}/{plan.recipe}", style="bold"), _size_table(plan.sizes), Text()]
    parts.append(_facts_table(plan))
    parts += [Text(message, style="yellow") for message in plan.messages]
    return Group(*parts)


def _size_table(sizes: Sequence[SizeResult]) -> Table:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False)
    table.add_column("size")
    for name in ("parameters", "published", "multiply-adds", "published"):
        table.add_column(name, justify="right")
    table.add_column("")
    for each in sizes:
        ours = ABSENT if each.parameters is None else f"{each.parameters:,}"
        cells = (ours, f"{each.published_parameters:,}", count(each.flops), count(each.published_flops))
        outcome = Text("match", style="green") if each.matched else Text("differs", style="red")
        why = each.message or ("" if each.matched else each.note or "")
        table.add_row(Text(each.name), *cells, outcome + Text(f"  {why}", style="dim"))
    return table


def _facts_table(plan: Plan) -> Table:
    from rich.table import Table
    from rich.text import Text

    table = Table.grid(padding=(0, 2))
    for name, text in _facts(plan):
        table.add_row(Text(name, style="dim"), Text(text))
    return table


def _facts(plan: Plan) -> list[tuple[str, str]]:
    share = math.ceil(plan.batch_size / plan.devices)
    facts = [
        ("data", f"{plan.data.name}: {plan.data.state} ({plan.data.next_step or plan.data.place})"),
        ("steps", f"{plan.steps:,} of {plan.batch_size:,} examples on {plan.devices} devices ({share} each)"),
    ]
    if plan.device_hours is not None:
        assumed = f"{DEVICE} at {UTILISATION:.0%} of {DEVICE_FLOPS / 1e12:.0f} TFLOP/s"
        facts.append(("device-hours", f"{plan.device_hours:,.2f} ({assumed}, {plan.examples:,} examples in all)"))
    if plan.memory is not None:
        memory = plan.memory
        detail = ", ".join(f"{name} {bytes_text(value)}" for name, value in asdict(memory).items())
        facts.append(("memory a device", f"{bytes_text(memory.total)} in 32 bit ({detail})"))
    if plan.step is not None:
        loss = "no values on meta" if plan.step.loss is None else f"loss {plan.step.loss:.4f}"
        facts.append(
            (
                "optimizer step",
                f"{plan.step.batch_size} examples on {plan.step.device}: {loss}, {duration(plan.step.seconds)}",
            )
        )
    if plan.dry_run is not None:
        dry = plan.dry_run
        text = f"{dry.batch_size} examples on {dry.device} as one of them: done, {duration(dry.seconds)}"
        facts.append((f"{dry.ranks} ranks", text))
    return facts
