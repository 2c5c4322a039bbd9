"""Arms that continue from another arm's run: order of a sweep, and claims that cannot be run."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import ValidationError

from reprise.evidence.claims import Arm, Claim
from reprise.training.jobs import Job, in_waves


def claim(**after: str | None) -> Claim:
    contrast = {"name": "n", "metric": "test/accuracy", "plus": ["a"], "direction": "higher"}
    arms = {name: {"label": name, "after": earlier} for name, earlier in after.items()}
    return Claim.model_validate(
        {"statement": "s", "arms": arms, "primary": contrast, "scales": {"small": {"seeds": [0]}}, "tuning": "t"}
    )


def job(name: str, after: Job | None = None) -> Job:
    return Job((f"arm={name}",), Path(name), "hash", "demo", "small", name, 0, 1, after)


def test_stages_are_listed_from_the_first_to_the_arm_itself() -> None:
    assert claim(a="b", b="c", c=None).stages("a") == ["c", "b", "a"]


@pytest.mark.parametrize("after", [{"a": "b", "b": "a"}, {"a": "a"}, {"a": "nothing"}])
def test_a_claim_whose_stages_never_start_is_refused(after: dict[str, str]) -> None:
    with pytest.raises(ValidationError, match="after"):
        claim(**after)


def test_an_arm_without_an_earlier_stage_has_nothing_to_share_with() -> None:
    with pytest.raises(ValidationError, match="earlier stage"):
        Arm.model_validate({"label": "x", "shares": ["data.proposals"]})


def test_earlier_stages_run_first_and_once() -> None:
    base = job("base")
    tuned = job("tuned", base)
    waves = in_waves([job("full", tuned), job("plain", tuned), job("alone"), base])
    assert [[item.arm for item in wave] for wave in waves] == [["base", "alone"], ["tuned"], ["full", "plain"]]
