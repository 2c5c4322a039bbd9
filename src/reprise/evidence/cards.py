"""A paper's card (`experiments/<slug>/card.yaml`): the facts that reports, the README and the site are made from."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, model_validator

from reprise import discovery
from reprise.errors import ConfigError
from reprise.evidence.files import read_model

Text = Annotated[str, Field(min_length=1)]
Texts = Annotated[list[Text], Field(min_length=1)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class OfficialCode(_Strict):
    """Where released code lies."""

    repo: Text
    framework: Text
    licence: Text
    commit: str | None = None


class Discrepancy(_Strict):
    """Where the paper and its released code disagree, and the switch between them."""

    topic: Text
    paper: Text
    released: Text
    switch: Text
    effect: Text


class Trap(_Strict):
    """An easy mistake, and what keeps us from it."""

    trap: Text
    avoided_by: Text


class Size(_Strict):
    """A published model size: `parameters` exact, `flops` as multiply-adds, relative `tolerance`."""

    name: Text
    overrides: list[str] = []
    parameters: Annotated[int, Field(gt=0)]
    flops: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    tolerance: Annotated[float, Field(ge=0, lt=1)] = 0.01
    source: Text
    note: str | None = None


class Hardware(_Strict):
    """Devices and hours: the authors', and what a run takes here."""

    published: Text
    here: Text


class Published(_Strict):
    """One published result, as the paper prints it."""

    dataset: Text
    setting: Text
    metric: Text
    baseline: float | str | None
    method: float | str | None
    source: Text


class RankException(_Strict):
    """Where results depend on the number of ranks by design.

    `overrides` make a run rank-invariant, where possible; `when` are overrides that bring the exception about, where
    the small recipe does not have it; `arms` are those it holds for, where it does not hold for all.
    """

    what: Text
    reason: Text
    overrides: list[str] = []
    when: list[str] = []
    arms: Annotated[list[Text], Field(min_length=1)] | None = None

    def concerns(self, arm: str) -> bool:
        """Whether the exception holds for an arm of the claim."""
        return self.arms is None or arm in self.arms


class Card(_Strict):
    """The whole file."""

    title: Text
    authors: Texts
    venue: Text
    year: Annotated[int, Field(ge=1950, le=2100)]
    arxiv: Annotated[str, Field(pattern=r"^(\d{4}\.\d{4,5}(v\d+)?|[a-z-]+(\.[A-Z]{2})?/\d{7})$")] | None
    family: Text
    task: Text
    official_code: list[OfficialCode]
    summary: Text
    implemented: Texts
    left_out: list[Text]
    choices: list[Text]
    small_leaves_out: Texts
    discrepancies: list[Discrepancy]
    traps: list[Trap]
    sizes: list[Size]
    hardware: Hardware
    recipe_sources: Annotated[dict[str, Text], Field(min_length=1)]
    published: Annotated[list[Published], Field(min_length=1)]
    normalisation: Text
    rank_exceptions: list[RankException]
    data: Annotated[dict[str, Text | None], Field(min_length=1)]

    @model_validator(mode="before")
    @classmethod
    def _arxiv_is_text(cls, content: object) -> object:
        if isinstance(content, dict) and isinstance(content.get("arxiv"), int | float):
            raise ValueError("arxiv: write the number in quotes; YAML reads it as a decimal and drops its last zeros")
        return content

    @model_validator(mode="after")
    def _check(self) -> Card:
        names = [size.name for size in self.sizes]
        if len(set(names)) != len(names):
            raise ValueError("sizes: two entries have the same name")
        return self


def load_card(slug: str) -> Card:
    """Read and lint `experiments/<slug>/card.yaml`.

    Raises:
        ConfigError: no such paper, no file, a wrong key (named with its place), or a recipe whose data the card does
            not name.
    """
    path = discovery.card_path(slug)
    card = read_model(path, Card)
    unnamed = [scale for scale in discovery.recipes(slug) if scale in discovery.SCALES and not card.data.get(scale)]
    if unnamed:
        raise ConfigError(
            f"{slug}/card.yaml does not name the data of the recipe {', '.join(unnamed)}.",
            looked_at=path,
            next_step="add it under `data:`",
        )
    return card
