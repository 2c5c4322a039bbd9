"""Statistics of paired differences, and the verdict they allow. SciPy is imported only when something is computed."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import numpy as np

Interval = tuple[float, float]
Outcome = Literal["supported", "refuted", "inconclusive"]

MIN_SEEDS = 5  # the smallest one-sided sign-flip p is 2**-n: 1/32 with 5 seeds, but 1/8 with 3
CONFIDENCE = 0.95
RESAMPLES = 9_999


@dataclass(frozen=True)
class Summary:
    """Mean of a sample with its spread; None where the sample is too small for it.

    Attributes:
        n: number of finite values.
        sd: standard deviation with n - 1 in the denominator; needs two values.
        ci: 95 % interval of the mean from Student's t; needs two values, and has no width when all are equal.
    """

    n: int
    mean: float | None
    sd: float | None
    ci: Interval | None


@dataclass(frozen=True)
class Difference:
    """Statistics of differences paired by seed, plus minus minus.

    Attributes:
        summary: mean, sd and t interval of the finite differences (the paired t interval).
        bootstrap_ci: 95 % BCa bootstrap interval of the mean, with a fixed seed.
        p: one-sided sign-flip permutation p-value, in the claimed direction, of "the mean difference is the margin";
            exact up to 13 seeds.
        effect_size: Cohen's dz, mean / sd; None without spread.
        not_finite: how many differences were NaN or infinite, and so left out of the numbers.
        outcome, reason: the verdict, and why in one sentence.
    """

    summary: Summary
    bootstrap_ci: Interval | None
    p: float | None
    effect_size: float | None
    not_finite: int
    outcome: Outcome
    reason: str


def summarise(values: Sequence[float]) -> Summary:
    """Mean, sd and t interval of the finite values."""
    finite = [float(value) for value in values if math.isfinite(value)]
    n = len(finite)
    if n == 0:
        return Summary(0, None, None, None)
    if n == 1:
        return Summary(1, finite[0], None, None)
    if _all_equal(finite):
        return Summary(n, finite[0], 0.0, (finite[0], finite[0]))
    from scipy import stats

    mean = math.fsum(finite) / n
    sd = math.sqrt(math.fsum((value - mean) ** 2 for value in finite) / (n - 1))
    half = float(stats.t.ppf(0.5 + CONFIDENCE / 2, n - 1)) * sd / math.sqrt(n)
    return Summary(n, mean, sd, (mean - half, mean + half))


def compare(differences: Sequence[float], *, direction: Literal["higher", "lower"], margin: float = 0.0) -> Difference:
    """Statistics and verdict of a contrast.

    Args:
        differences: plus minus minus, one a seed; may hold NaN.
        direction: `higher` claims difference > margin, `lower` claims difference < -margin.
        margin: how far beyond zero the claim reaches, >= 0.
    """
    finite = [float(value) for value in differences if math.isfinite(value)]
    not_finite = len(differences) - len(finite)
    summary = summarise(finite)
    outcome, reason = _judge(summary, direction, margin, not_finite)
    return Difference(
        summary=summary,
        bootstrap_ci=bca_interval(finite),
        p=sign_flip_p(finite, direction=direction, margin=margin),
        effect_size=summary.mean / summary.sd if summary.mean is not None and summary.sd else None,
        not_finite=not_finite,
        outcome=outcome,
        reason=reason,
    )


def bca_interval(values: Sequence[float]) -> Interval | None:
    """95 % BCa bootstrap interval of the mean; None below two values. The same values give the same interval."""
    if len(values) < 2:
        return None
    if _all_equal(values):
        return (values[0], values[0])
    import numpy as np
    from scipy import stats

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # SciPy warns of degenerate resamples; they come back as NaN, handled below
        result = stats.bootstrap(
            (np.asarray(values, dtype=np.float64),),
            np.mean,
            confidence_level=CONFIDENCE,
            n_resamples=RESAMPLES,
            method="BCa",
            rng=np.random.default_rng(0),
        )
    low, high = float(result.confidence_interval.low), float(result.confidence_interval.high)
    return (low, high) if math.isfinite(low) and math.isfinite(high) else None


def sign_flip_p(
    values: Sequence[float], *, direction: Literal["higher", "lower"] = "higher", margin: float = 0.0
) -> float | None:
    """One-sided sign-flip permutation p-value against a mean difference at the margin; None without values."""
    if not values:
        return None
    import numpy as np
    from scipy import stats

    def mean(sample: np.ndarray, axis: int) -> np.ndarray:
        return np.mean(sample, axis=axis)

    beyond = np.asarray(values, dtype=np.float64) * _sign(direction) - margin
    if len(beyond) == 1:  # SciPy wants two observations
        return 1.0 if beyond[0] <= 0 else 0.5
    result = stats.permutation_test(
        (beyond,),
        mean,
        permutation_type="samples",
        alternative="greater",
        n_resamples=RESAMPLES,
        vectorized=True,
        rng=np.random.default_rng(0),
    )
    return float(result.pvalue)


def _judge(summary: Summary, direction: str, margin: float, not_finite: int) -> tuple[Outcome, str]:
    if not_finite:
        return "inconclusive", f"{not_finite} of {summary.n + not_finite} differences are not finite numbers."
    if summary.n < MIN_SEEDS:
        seeds = "seed" if summary.n == 1 else "seeds"
        return "inconclusive", f"{summary.n} paired {seeds}; a verdict needs at least {MIN_SEEDS}."
    assert summary.ci is not None
    low, high = sorted(_sign(direction) * end for end in summary.ci)
    outcome, reason = _place(low, high, margin, _threshold(direction, margin))
    if summary.sd == 0.0:
        reason += " All differences are equal, so it has no width: check that the arms differ and the metric can."
    return outcome, reason


def _place(low: float, high: float, margin: float, threshold: str) -> tuple[Outcome, str]:
    if low > margin:
        return "supported", f"The whole 95 % interval lies on the claimed side of {threshold}."
    if high < margin:
        return "refuted", f"The whole 95 % interval lies on the other side of {threshold}."
    return "inconclusive", f"The 95 % interval includes {threshold}."


def _threshold(direction: str, margin: float) -> str:
    return f"the margin ({_sign(direction) * margin:g})".replace("-", "−") if margin else "zero"


def _sign(direction: str) -> int:
    if direction not in ("higher", "lower"):
        raise ValueError(f"direction must be 'higher' or 'lower', not {direction!r}")
    return 1 if direction == "higher" else -1


def _all_equal(values: Sequence[float]) -> bool:
    """Equal up to the rounding of a subtraction."""
    return max(values) - min(values) <= 1e-12 * max(map(abs, values))
