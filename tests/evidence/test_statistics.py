"""The statistics against SciPy, against slow formulas, and at their edges."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from reprise.evidence.statistics import bca_interval, compare, sign_flip_p, summarise

values = st.floats(-1, 1, allow_nan=False).map(lambda value: round(value, 6))
samples = st.lists(values, min_size=2, max_size=9)


def test_summary_matches_scipy_on_a_known_case():
    plus, minus = [0.81, 0.84, 0.79, 0.86, 0.82], [0.78, 0.80, 0.79, 0.80, 0.77]
    differences = [a - b for a, b in zip(plus, minus, strict=True)]
    expected = stats.ttest_rel(plus, minus)
    found = compare(differences, direction="higher")
    low, high = expected.confidence_interval(0.95)
    assert found.summary.ci == pytest.approx((low, high))
    assert found.summary.sd == pytest.approx(np.std(differences, ddof=1))
    assert found.effect_size == pytest.approx(expected.statistic / math.sqrt(5))
    assert found.outcome == "supported"


@settings(max_examples=60, deadline=None)
@given(samples)
def test_t_interval_matches_scipy(sample):
    found = summarise(sample)
    if found.sd == 0:
        assert found.ci == (found.mean, found.mean)
        return
    low, high = stats.ttest_1samp(sample, 0).confidence_interval(0.95)
    assert found.ci == pytest.approx((low, high), abs=1e-9)


@settings(max_examples=40, deadline=None)
@given(st.lists(values, min_size=2, max_size=8), st.sampled_from(["higher", "lower"]), st.sampled_from([0.0, 0.1]))
def test_sign_flip_matches_enumeration(sample, direction, margin):
    sign = 1 if direction == "higher" else -1
    beyond = np.asarray(sample) * sign - margin
    flips = np.array(list(itertools.product((1, -1), repeat=len(sample))))
    expected = np.mean((flips * beyond).mean(1) >= beyond.mean() - 1e-12)
    assert sign_flip_p(sample, direction=direction, margin=margin) == pytest.approx(expected)


def test_sign_flip_is_exact_for_twelve_and_sampled_beyond():
    assert sign_flip_p([0.1 + 0.01 * i for i in range(12)]) == 2**-12
    p = sign_flip_p([0.1 + 0.01 * i for i in range(20)])
    assert 0 < p < 0.001
    assert p == sign_flip_p([0.1 + 0.01 * i for i in range(20)])


def test_bca_is_deterministic_and_near_the_t_interval():
    sample = list(np.random.default_rng(3).normal(0.1, 0.02, 40))
    first = bca_interval(sample)
    assert first == bca_interval(sample)
    assert first == pytest.approx(summarise(sample).ci, abs=2e-3)


@settings(max_examples=30, deadline=None)
@given(st.lists(values, min_size=5, max_size=9), st.sampled_from([0.0, 0.05, 0.3]))
def test_reversing_the_direction_mirrors_everything(sample, margin):
    up = compare(sample, direction="higher", margin=margin)
    down = compare([-value for value in sample], direction="lower", margin=margin)
    assert (up.outcome, up.p) == (down.outcome, down.p)
    assert up.summary.ci == pytest.approx([-end for end in reversed(down.summary.ci)])


@settings(max_examples=60, deadline=None)
@given(st.lists(values, min_size=5, max_size=9), st.sampled_from([0.0, 0.05, 0.3]))
def test_the_outcome_follows_the_interval(sample, margin):
    found = compare(sample, direction="higher", margin=margin)
    low, high = found.summary.ci
    expected = "supported" if low > margin else "refuted" if high < margin else "inconclusive"
    assert found.outcome == expected
    if found.outcome == "supported":
        assert found.summary.mean > margin
        assert found.p < 0.5


@pytest.mark.parametrize(
    ("direction", "sample", "outcome"),
    [
        ("higher", [0.5, 0.51, 0.49, 0.5, 0.52], "supported"),
        ("lower", [0.5, 0.51, 0.49, 0.5, 0.52], "refuted"),
        ("lower", [-0.5, -0.51, -0.49, -0.5, -0.52], "supported"),
        ("higher", [-0.5, -0.51, -0.49, -0.5, -0.52], "refuted"),
        ("higher", [0.1, 0.11, 0.09, 0.1, 0.1], "refuted"),  # above zero, but short of the margin
        ("higher", [0.1, 0.5, -0.3, 0.2, 0.4], "inconclusive"),
    ],
)
def test_verdicts_with_a_margin(direction, sample, outcome):
    assert compare(sample, direction=direction, margin=0.2).outcome == outcome


@pytest.mark.parametrize("n", [0, 1, 2, 3, 4])
def test_fewer_than_five_seeds_decide_nothing(n):
    found = compare([0.5, 0.51, 0.52, 0.53][:n], direction="higher")
    assert found.outcome == "inconclusive"
    assert "at least 5" in found.reason
    assert found.summary.n == n


def test_one_seed_has_a_mean_and_no_spread():
    found = compare([0.3], direction="higher")
    assert (found.summary.mean, found.summary.sd, found.summary.ci, found.bootstrap_ci) == (0.3, None, None, None)
    assert found.p == 0.5
    assert found.effect_size is None


@pytest.mark.parametrize(("value", "outcome"), [(0.1, "supported"), (0.0, "inconclusive"), (-0.1, "refuted")])
def test_equal_differences_have_no_width_and_say_so(value, outcome):
    found = compare([value] * 5, direction="higher")
    assert found.outcome == outcome
    assert found.summary.ci == found.bootstrap_ci == (value, value)
    assert found.effect_size is None
    assert "All differences are equal" in found.reason


def test_equal_up_to_rounding_counts_as_equal():
    differences = [0.1 + 0.2 - 0.2, 0.1, 0.4 - 0.3, 0.7 - 0.6, 0.1]
    assert compare(differences, direction="higher").summary.sd == 0.0


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_numbers_that_are_not_finite_decide_nothing(bad):
    found = compare([0.5, 0.51, 0.52, 0.53, 0.54, bad], direction="higher")
    assert found.outcome == "inconclusive"
    assert "1 of 6" in found.reason
    assert (found.not_finite, found.summary.n) == (1, 5)
    nothing = compare([bad] * 5, direction="higher")
    assert nothing.summary.mean is None
    assert nothing.outcome == "inconclusive"


def test_an_unknown_direction_is_an_error():
    with pytest.raises(ValueError, match="direction"):
        compare([0.1] * 5, direction="up")
