"""A paper's claim (`experiments/<slug>/claim.yaml`): arms, contrasts, seeds, and what differs by scale."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, model_validator

from reprise import discovery
from reprise.config import smoked_scale
from reprise.errors import ConfigError
from reprise.evidence.files import read_model

TUNING_SEEDS_FROM = 100  # seeds from here up are for choosing hyper-parameters and never enter a verdict

Text = Annotated[str, Field(min_length=1)]
Direction = Literal["higher", "lower"]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Arm(_Strict):
    """One variant that is trained: a label for tables, its Hydra overrides on the recipe, and its earlier stage.

    With `after: <arm>` a run continues from the final state of that arm's run of the same scale and seed. Of what a
    user overrides, the keys in `shares` (and those below them) reach that earlier stage too.
    """

    label: Text
    overrides: list[str] = []
    after: str | None = None
    shares: list[Text] = []

    @model_validator(mode="after")
    def _check(self) -> Arm:
        if self.shares and self.after is None:
            raise ValueError("`shares` needs an earlier stage: `after`")
        return self


class Term(NamedTuple):
    """One summand of a contrast."""

    sign: int
    arm: str
    metric: str


class Contrast(_Strict):
    """A difference per seed: the sum over `plus` terms minus the sum over `minus` terms.

    A term is `arm` (its value of `metric`) or `arm:metric`. Direction `higher` claims plus - minus > margin,
    `lower` claims plus - minus < -margin.
    """

    name: Text
    metric: Text
    plus: Annotated[list[Text], Field(min_length=1)]
    minus: list[Text] = []
    direction: Direction
    margin: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0

    def terms(self) -> list[Term]:
        """All terms with their signs, `plus` first."""
        signed = [(1, text) for text in self.plus] + [(-1, text) for text in self.minus]
        return [Term(sign, text.partition(":")[0], text.partition(":")[2] or self.metric) for sign, text in signed]

    def arms(self) -> list[str]:
        """The arms this contrast needs, each once."""
        return list(dict.fromkeys(term.arm for term in self.terms()))

    def value(self, metrics: Mapping[str, Mapping[str, float]]) -> float:
        """The difference for one seed.

        Args:
            metrics: arm -> metric -> value, from that seed's runs.

        Raises:
            KeyError: an arm or a metric is absent; the message names it.
        """
        total = 0.0
        for sign, arm, metric in self.terms():
            if arm not in metrics:
                raise KeyError(f"no run of the arm {arm}")
            if metric not in metrics[arm]:
                raise KeyError(f"the arm {arm} has no metric {metric}")
            total += sign * metrics[arm][metric]
        return total

    def formula(self) -> str:
        """The contrast as a reader's formula, e.g. `one_to_many − detr`."""
        return " + ".join(self.plus) + "".join(f" − {text}" for text in self.minus)


class ScaleChanges(_Strict):
    """What one scale sets: its seeds, and whatever differs from the claim."""

    seeds: Annotated[list[Annotated[int, Field(ge=0, lt=TUNING_SEEDS_FROM)]], Field(min_length=1)]
    statement: Text | None = None
    arms: list[str] | None = None
    margin: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None
    primary: Contrast | None = None
    secondary: list[Contrast] | None = None

    @model_validator(mode="after")
    def _check(self) -> ScaleChanges:
        if len(set(self.seeds)) != len(self.seeds):
            raise ValueError("seeds are given twice")
        return self


@dataclass(frozen=True)
class ScaledClaim:
    """The claim as one scale tests it; `tuning` leaves out what belongs to another scale."""

    scale: str
    statement: str
    arms: dict[str, Arm]
    primary: Contrast
    secondary: list[Contrast]
    seeds: list[int]
    tuning: str

    def contrasts(self) -> list[Contrast]:
        return [self.primary, *self.secondary]

    def metrics(self) -> list[str]:
        """Every metric that a contrast reads, the primary one first."""
        return list(dict.fromkeys(term.metric for contrast in self.contrasts() for term in contrast.terms()))


class Claim(_Strict):
    """The whole file; the first arm is the paper's method."""

    statement: Text
    arms: Annotated[dict[str, Arm], Field(min_length=1)]
    primary: Contrast
    secondary: list[Contrast] = []
    scales: Annotated[dict[str, ScaleChanges], Field(min_length=1)]
    tuning: Text
    smoke: list[str] = []  # overrides that `smoke=true` needs beyond the usual ones

    @model_validator(mode="after")
    def _check(self) -> Claim:
        for name in self.arms:
            self.stages(name)
        for scale in self.scales:
            _check_scale(self._scaled(scale), known=list(self.arms))
        return self

    def stages(self, arm: str) -> list[str]:
        """The arms that have to be run for `arm`, the earliest first and itself last.

        Raises:
            ValueError: `after` names no arm, or arms wait for each other.
        """
        chain = [arm]
        while (earlier := self.arms[chain[0]].after) is not None:
            if earlier not in self.arms:
                raise ValueError(f"arms.{chain[0]}.after: no arm {earlier!r}; arms: {', '.join(self.arms)}")
            if earlier in chain:
                raise ValueError(f"arms.{chain[0]}.after: {earlier!r} waits for {chain[0]!r} itself")
            chain.insert(0, earlier)
        return chain

    def at(self, label: str) -> ScaledClaim:
        """The claim at a scale label; `<scale>~<overrides>` and `smoke-<scale>` are that scale, `smoke` the small one.

        Smoke runs of a recipe that the claim says nothing about are those of the small scale.

        Raises:
            ConfigError: the claim says nothing about the scale.
        """
        scale = self._scale_of(label)
        if scale not in self.scales:
            raise ConfigError(
                f"The claim has no scale {scale!r}.",
                looked_at="scales in claim.yaml",
                next_step=f"choose one of: {', '.join(self.scales)}",
            )
        return self._scaled(scale)

    def speaks_of(self, label: str) -> bool:
        """Whether there is a claim at a scale label (`at`)."""
        return self._scale_of(label) in self.scales

    def _scale_of(self, label: str) -> str:
        scale = label.partition("~")[0]
        if (smoked := smoked_scale(label)) is not None and scale not in self.scales:
            known = [name for name in (smoked, "small") if name in self.scales]
            return known[0] if known else next(iter(self.scales))
        return scale

    def _scaled(self, scale: str) -> ScaledClaim:
        changes = self.scales[scale]
        primary = changes.primary or self.primary
        if changes.margin is not None:
            primary = primary.model_copy(update={"margin": changes.margin})
        for name in changes.arms or []:
            if name not in self.arms:
                raise ValueError(f"scales.{scale}.arms: there is no arm {name!r}; arms: {', '.join(self.arms)}")
        return ScaledClaim(
            scale=scale,
            statement=changes.statement or self.statement,
            arms={name: arm for name, arm in self.arms.items() if changes.arms is None or name in changes.arms},
            primary=primary,
            secondary=self.secondary if changes.secondary is None else changes.secondary,
            seeds=changes.seeds,
            tuning=_tuning_at(self.tuning, scale),
        )


def _tuning_at(text: str, scale: str) -> str:
    """The lines of the text without those that begin with the name of another scale and a colon, as one paragraph."""
    others = set(discovery.SCALES) - {scale}
    return " ".join(line for line in text.splitlines() if line.partition(":")[0] not in others)


def _check_scale(claim: ScaledClaim, known: list[str]) -> None:
    for contrast in claim.contrasts():
        for arm in contrast.arms():
            if arm not in known:
                raise ValueError(f"the contrast {contrast.name!r} names no arm: {arm!r}; arms: {', '.join(known)}")
            if arm not in claim.arms:
                raise ValueError(
                    f"the contrast {contrast.name!r} needs {arm!r}, which scales.{claim.scale}.arms leaves out"
                )
    names = [contrast.name for contrast in claim.contrasts()]
    if len(set(names)) != len(names):
        raise ValueError("two contrasts have the same name")


def load_claim(slug: str) -> Claim:
    """Read and check `experiments/<slug>/claim.yaml`.

    Raises:
        ConfigError: no such paper, no file, or a wrong key (each named with its place).
    """
    return read_model(discovery.claim_path(slug), Claim)
