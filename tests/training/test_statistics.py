"""Statistics: against statsmodels, against values worked out by hand, and by their own laws."""

from __future__ import annotations

from math import sqrt

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom, norm
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.proportion import proportion_confint

from training.statistics import (
    Interval,
    mcnemar_exact,
    minimum_detectable_effect,
    paired_difference,
    tango,
    wilson,
)

counts = st.integers(1, 400).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n)))
pairs = st.integers(1, 300).flatmap(
    lambda n: st.integers(0, n).flatmap(lambda b: st.tuples(st.just(b), st.integers(0, n - b), st.just(n)))
)


@settings(deadline=None)
@given(counts)
def test_wilson_is_that_of_statsmodels(count: tuple[int, int]) -> None:
    correct, n = count
    interval = wilson(correct, n)
    assert (interval.low, interval.high) == pytest.approx(proportion_confint(correct, n, method="wilson"), abs=1e-12)
    assert correct / n in interval


def test_wilson_by_hand() -> None:
    # No success in n: the upper end is z^2 / (n + z^2).
    z2 = norm.ppf(0.975) ** 2
    assert (wilson(0, 10).low, wilson(0, 10).high) == pytest.approx((0, z2 / (10 + z2)))


@pytest.mark.parametrize("share", [0.05, 0.3, 0.7])
def test_wilson_covers(share: float) -> None:
    n = 60
    covered = [share in wilson(k, n) for k in range(n + 1)]
    assert binom.pmf(np.arange(n + 1), n, share)[covered].sum() > 0.92


@settings(deadline=None)
@given(st.integers(0, 200), st.integers(0, 200))
def test_mcnemar_is_that_of_statsmodels(only_a: int, only_b: int) -> None:
    expected = mcnemar([[50, only_a], [only_b, 50]], exact=True).pvalue if only_a + only_b else 1.0
    assert mcnemar_exact(only_a, only_b) == pytest.approx(min(expected, 1.0), abs=1e-12)


@settings(deadline=None)
@given(pairs)
def test_tango_contains_the_estimate_and_mirrors(pair: tuple[int, int, int]) -> None:
    only_a, only_b, n = pair
    interval, mirrored = tango(only_a, only_b, n), tango(only_b, only_a, n)
    assert -1 <= interval.low <= (only_a - only_b) / n <= interval.high <= 1
    assert interval.low < interval.high
    assert (interval.low, interval.high) == pytest.approx((-mirrored.high, -mirrored.low), abs=1e-8)


@settings(deadline=None)
@given(pairs)
def test_tango_leaves_out_zero_where_mcnemar_rejects(pair: tuple[int, int, int]) -> None:
    only_a, only_b, n = pair
    z = abs(only_a - only_b) / sqrt(only_a + only_b) if only_a + only_b else 0.0
    if abs(z - norm.ppf(0.975)) > 1e-6:
        assert (0 in tango(only_a, only_b, n)) == (z < norm.ppf(0.975))


@pytest.mark.parametrize("n", [1, 44, 50, 1319])
def test_tango_without_discordant_pairs_is_no_point(n: int) -> None:
    # The score test of a difference d without discordant pairs: n d^2 / (d (1 - d)) = z^2.
    end = norm.ppf(0.975) ** 2 / (n + norm.ppf(0.975) ** 2)
    assert (tango(0, 0, n).low, tango(0, 0, n).high) == pytest.approx((-end, end), abs=1e-7)


def test_tango_where_all_pairs_are_discordant_one_way() -> None:
    z2, n = norm.ppf(0.975) ** 2, 50
    interval = tango(n, 0, n)
    assert (interval.low, interval.high) == pytest.approx(((n - z2) / (n + z2), 1.0), abs=1e-7)


@pytest.mark.parametrize(("p_a", "p_b"), [(0.1, 0.1), (0.2, 0.05), (0.02, 0.0)])
def test_tango_covers(p_a: float, p_b: float) -> None:
    """Exact coverage over all outcomes of 40 pairs: a Wald interval has 0.55 for the last case."""
    n, coverage = 40, 0.0
    for discordant in range(n + 1):
        weight = binom.pmf(discordant, n, p_a + p_b)
        if weight < 1e-6:
            continue
        for only_a in range(discordant + 1):
            inside = p_a - p_b in tango(only_a, discordant - only_a, n)
            coverage += inside * weight * binom.pmf(only_a, discordant, p_a / (p_a + p_b))
    assert coverage > 0.93


def test_paired_difference_counts_pairs() -> None:
    a = [True, True, True, False, False, True]
    b = [True, False, False, False, True, True]
    paired = paired_difference(a, b)
    assert (paired.n, paired.only_a, paired.only_b) == (6, 2, 1)
    assert paired.difference == pytest.approx(1 / 6)
    assert paired.discordance == pytest.approx(0.5)
    assert paired.p_value == 1.0
    assert paired.difference in paired.interval


@pytest.mark.parametrize("value", [True, False])
def test_equal_arms(value: bool) -> None:
    paired = paired_difference([value] * 100, [value] * 100)
    assert (paired.difference, paired.p_value, paired.discordance) == (0, 1, 0)
    assert 0 in paired.interval


@pytest.mark.parametrize(("n", "discordance"), [(200, 0.2), (1319, 0.07), (500, 1.0)])
def test_detectable_effect_solves_connors_formula(n: int, discordance: float) -> None:
    effect = minimum_detectable_effect(n, discordance)
    z_alpha, z_power = norm.ppf(0.975), norm.ppf(0.8)
    needed = (z_alpha * sqrt(discordance) + z_power * sqrt(discordance - effect**2)) ** 2
    assert needed / effect**2 == pytest.approx(n)


def test_detectable_effect_is_detected_as_often_as_promised() -> None:
    """Exact power of the uncorrected McNemar test at the effect that is called detectable."""
    n, discordance = 300, 0.2
    effect = minimum_detectable_effect(n, discordance, power=0.8)
    p_a = (discordance + effect) / 2
    power = 0.0
    for discordant in range(1, n + 1):
        weight = binom.pmf(discordant, n, discordance)
        only_a = np.arange(discordant + 1)
        rejects = np.abs(2 * only_a - discordant) / sqrt(discordant) > norm.ppf(0.975)
        power += weight * binom.pmf(only_a, discordant, p_a / discordance)[rejects].sum()
    assert power == pytest.approx(0.8, abs=0.02)


@settings(deadline=None)
@given(st.integers(1, 5000), st.floats(0, 1), st.floats(0, 1))
def test_detectable_effect_is_monotone_and_never_nothing(n: int, w: float, v: float) -> None:
    low, high = sorted((w, v))
    effect = minimum_detectable_effect(n, low)
    assert 0 < effect <= 1
    assert effect <= minimum_detectable_effect(n, high) + 1e-9
    assert minimum_detectable_effect(n + 1, low) <= effect + 1e-9


def test_few_discordant_pairs_do_not_make_everything_detectable() -> None:
    # Fewer than 6 pairs, all one way, can never be significant at 5 %.
    assert minimum_detectable_effect(200, 0.0) > 6 / 200


def test_nothing_is_detectable_in_one_problem() -> None:
    assert minimum_detectable_effect(1, 1.0) == 1.0


def test_refusals() -> None:
    for call in (
        lambda: wilson(0, 0),
        lambda: wilson(3, 2),
        lambda: wilson(-1, 2),
        lambda: tango(0, 0, 0),
        lambda: tango(2, 1, 2),
        lambda: paired_difference([], []),
        lambda: paired_difference([True], [True, False]),
        lambda: minimum_detectable_effect(0, 0.1),
        lambda: minimum_detectable_effect(10, 1.1),
        lambda: minimum_detectable_effect(10, 0.1, alpha=0),
        lambda: minimum_detectable_effect(10, 0.1, power=1),
    ):
        with pytest.raises(ValueError, match=r"n = 0|correct|discordan|alpha|must be paired"):
            call()


def test_interval_has_both_ends() -> None:
    assert 0.2 in Interval(0.2, 0.4)
    assert 0.4 in Interval(0.2, 0.4)
    assert 0.41 not in Interval(0.2, 0.4)
