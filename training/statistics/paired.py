"""Two arms on the same problems, one run each: pure functions on counts and on paired results.

Accuracies, differences and rates are shares (0 to 1), not percentage points.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt

from scipy.optimize import brentq
from scipy.stats import binomtest, norm


@dataclass(frozen=True)
class Interval:
    """A confidence interval; both ends belong to it."""

    low: float
    high: float

    def __contains__(self, value: float) -> bool:
        return self.low <= value <= self.high


@dataclass(frozen=True)
class PairedDifference:
    """Two arms on the same problems.

    Attributes:
        n: problems.
        only_a: problems that only arm A solved.
        only_b: problems that only arm B solved.
        difference: accuracy of A minus accuracy of B.
        interval: Tango's score interval of the difference.
        p_value: of McNemar's exact test, two-sided.
    """

    n: int
    only_a: int
    only_b: int
    difference: float
    interval: Interval
    p_value: float

    @property
    def discordance(self) -> float:
        """Share of the problems that exactly one arm solved."""
        return (self.only_a + self.only_b) / self.n


def wilson(correct: int, n: int, confidence: float = 0.95) -> Interval:
    """Wilson's score interval of a proportion.

    Source: Wilson (1927), J. Am. Stat. Assoc. 22, 209-212, without continuity correction.

    Raises:
        ValueError: n is not positive, or correct is not in 0..n.
    """
    _check_n(n)
    if not 0 <= correct <= n:
        raise ValueError(f"correct = {correct} is not in 0..{n}")
    low, high = binomtest(correct, n).proportion_ci(confidence, method="wilson")
    return Interval(float(low), float(high))


def paired_difference(a: Sequence[bool], b: Sequence[bool], confidence: float = 0.95) -> PairedDifference:
    """Compare two arms by their results on the same problems, in the same order.

    Raises:
        ValueError: the arms are empty or of unequal length.
    """
    _check_n(len(a))
    if len(a) != len(b):
        raise ValueError(f"the arms have {len(a)} and {len(b)} results: they must be paired")
    only_a = sum(x and not y for x, y in zip(a, b, strict=True))
    only_b = sum(y and not x for x, y in zip(a, b, strict=True))
    return PairedDifference(
        n=len(a),
        only_a=only_a,
        only_b=only_b,
        difference=(only_a - only_b) / len(a),
        interval=tango(only_a, only_b, len(a), confidence),
        p_value=mcnemar_exact(only_a, only_b),
    )


def tango(only_a: int, only_b: int, n: int, confidence: float = 0.95) -> Interval:
    """Score interval of a difference of paired proportions.

    It inverts the score test, so it leaves out 0 exactly where McNemar's (uncorrected) test
    rejects; it needs no random numbers and keeps its coverage at few or no discordant pairs, where
    Wald's and the bootstrap's intervals shrink to a point.

    Source: Tango (1998), Statistics in Medicine 17, 891-908.

    Raises:
        ValueError: n is not positive, or the discordant pairs are negative or exceed n.
    """
    _check_n(n)
    if min(only_a, only_b) < 0 or only_a + only_b > n:
        raise ValueError(f"discordant pairs {only_a} and {only_b} do not fit into n = {n}")
    z = float(norm.ppf((1 + confidence) / 2))
    difference = (only_a - only_b) / n

    def excess(delta: float) -> float:
        """The squared distance of the data from `delta`, less what the interval allows."""
        distance = only_a - only_b - n * delta
        # q is the maximum-likelihood estimate of the share of "only B", given the difference.
        linear = (2 * n - only_a + only_b) * delta - only_a - only_b
        root = sqrt(max(0.0, linear**2 + 8 * n * only_b * delta * (1 - delta)))
        q = (root - linear) / (4 * n)
        return distance**2 - z**2 * n * max(0.0, 2 * q + delta * (1 - delta))

    # The excess is negative around the estimate and crosses 0 once on either side, or at no point
    # before +-1. A step off the estimate: without discordant pairs it is 0 there, but no crossing.
    step = 1e-9
    low = -1.0 if excess(-1.0) <= 0 else brentq(excess, -1.0, difference - step)
    high = 1.0 if excess(1.0) <= 0 else brentq(excess, difference + step, 1.0)
    return Interval(float(low), float(high))


def mcnemar_exact(only_a: int, only_b: int) -> float:
    """Two-sided p-value of McNemar's exact test; 1.0 where no pair is discordant.

    Source: McNemar (1947), Psychometrika 12, 153-157, with the binomial distribution.
    """
    if only_a + only_b == 0:
        return 1.0
    return float(binomtest(only_a, only_a + only_b, 0.5).pvalue)


def minimum_detectable_effect(n: int, discordance: float, alpha: float = 0.05, power: float = 0.8) -> float:
    """The smallest paired difference that a two-sided McNemar test on n problems would detect.

    Solves Connor's sample size for the difference d at discordance w,

        n = (z[1-alpha/2] * sqrt(w) + z[power] * sqrt(w - d^2))^2 / d^2,   w = max(discordance, d),

    as a difference of d needs at least that share of discordant pairs: without that bound a few
    discordant pairs would make any difference look detectable.

    Source: Connor (1987), Biometrics 43, 207-211.

    Args:
        n: problems.
        discordance: share of the problems that exactly one arm solves.
        alpha: two-sided level of the test.
        power: probability to detect a difference of that size.

    Returns:
        The difference; 1.0 where n is too small to detect any.

    Raises:
        ValueError: n is not positive, or a rate is out of range.
    """
    _check_n(n)
    if not 0 <= discordance <= 1:
        raise ValueError(f"discordance = {discordance} is not in 0..1")
    if not (0 < alpha < 1 and 0.5 <= power < 1):
        raise ValueError(f"need 0 < alpha < 1 and 0.5 <= power < 1, not {alpha} and {power}")
    z_alpha, z_power = float(norm.ppf(1 - alpha / 2)), float(norm.ppf(power))

    def margin(d: float) -> float:
        w = max(discordance, d)
        return sqrt(n) * d - z_alpha * sqrt(w) - z_power * sqrt(max(0.0, w - d**2))

    # margin is below 0 for the smallest differences and has one zero, if n is large enough.
    smallest = 1e-12
    return 1.0 if margin(1.0) <= 0 else float(brentq(margin, smallest, 1.0))


def _check_n(n: int) -> None:
    if n <= 0:
        raise ValueError(f"n = {n}: there must be at least one problem")
