"""The published difference beside ours, where a card's row compares the same two arms on the data of the scale."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from reprise.evidence.cards import Card, Published
from reprise.evidence.claims import Arm, Contrast, ScaledClaim
from reprise.evidence.verdict import ContrastResult, Verdict


@dataclass(frozen=True)
class Comparison:
    """One contrast and the published row it repeats; `published` is plus minus minus, percent as a fraction."""

    contrast: ContrastResult
    row: Published
    published: float


def comparisons(card: Card, claim: ScaledClaim, verdict: Verdict) -> list[Comparison]:
    """The contrasts of a verdict at the scale `paper` with a published counterpart: the first such row of each."""
    if verdict.scale != "paper":
        return []
    found = []
    for contrast, result in zip(claim.contrasts(), verdict.contrasts(), strict=True):
        for row in card.published:
            difference = _difference(row, contrast, claim.arms, card.data.get("paper") or "")
            if difference is not None:
                found.append(Comparison(result, row, difference))
                break
    return found


def _difference(row: Published, contrast: Contrast, arms: Mapping[str, Arm], data: str) -> float | None:
    """What the row says of the contrast; None unless it holds two numbers of this metric and names both arms.

    A row's method is the claim's first arm, so the sign follows from the side that this arm is on.
    """
    if not isinstance(row.baseline, int | float) or not isinstance(row.method, int | float):
        return None
    if len(contrast.plus) != 1 or len(contrast.minus) != 1 or row.dataset not in data:
        return None
    words = f"{row.setting} {row.source}".replace(",", " ").split()
    names_both = all(name in arms and arms[name].label in words for name in contrast.arms())
    method = next(iter(arms))
    if not names_both or method not in contrast.arms() or row.metric.split()[0] not in contrast.metric:
        return None
    difference = (row.method - row.baseline) * (0.01 if row.metric.endswith("%") else 1.0)
    return difference if contrast.plus == [method] else -difference
