"""Statistics over seeds: against scipy and statsmodels, and by simulation: levels, coverage, power as promised.

Each simulation is seeded; its count is held to the binomial distribution of the promise, at a level of 1e-4.
"""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from numpy.typing import NDArray
from scipy.stats import binom, ttest_1samp
from statsmodels.formula.api import ols
from statsmodels.stats.anova import anova_lm
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.power import TTestPower
from statsmodels.stats.weightstats import ttost_paired

from training.statistics import (
    crossed_bootstrap,
    detectable_over_seeds,
    equivalence,
    equivalence_power,
    holm,
    power_over_seeds,
    seed_test,
    seeds_for_difference,
    seeds_for_equivalence,
    sign_flip,
    spread_over_seeds,
    variance_components,
)

Matrix = NDArray[np.float64]


def draw(
    rng: np.random.Generator,
    seeds: int,
    problems: int,
    effect: float = 0.0,
    seed_sd: float = 0.0,
    discordance: float = 0.2,
    persistent: float = 0.0,
) -> Matrix:
    """Paired differences; a share `persistent` of the problems has the same one in every seed."""
    effects = effect + seed_sd * rng.standard_normal((seeds, 1))
    u = rng.random((seeds, problems))
    plus, minus = (discordance + effects) / 2, (discordance - effects) / 2
    drawn = (u < plus).astype(float) - (u > 1 - minus)
    same = rng.random(problems) < persistent
    return np.where(same, drawn[0], drawn)


def at_most(rejections: int, runs: int, level: float) -> bool:
    return bool(binom.sf(rejections - 1, runs, level) > 1e-4)


def test_the_seed_test_is_the_paired_t_test() -> None:
    matrix = draw(np.random.default_rng(1), 5, 200, effect=0.02, seed_sd=0.08)
    result, means = seed_test(matrix), matrix.mean(axis=1)
    assert result is not None
    assert result.sd == pytest.approx(means.std(ddof=1))  # seeds vary by more than the problems explain
    expected = ttest_1samp(means, 0.0)
    assert result.p_value == pytest.approx(expected.pvalue)
    interval = expected.confidence_interval()
    assert (result.interval.low, result.interval.high) == pytest.approx((interval.low, interval.high))
    assert equivalence(result, 0.1) == pytest.approx(ttost_paired(means, np.zeros(5), -0.1, 0.1)[0])
    assert result.sign_flip == sign_flip(means.tolist())


def test_seeds_that_agree_by_accident_do_not_make_an_interval_of_nothing() -> None:
    matrix = np.zeros((2, 50))
    matrix[0, :10] = matrix[1, 10:20] = 1  # two seeds with the same score, by different problems
    result = seed_test(matrix)
    assert result is not None
    assert result.interval.low < 0 < 0.2 < result.interval.high


@pytest.mark.parametrize("matrix", [[[1, 0, 0, -1]], [[1, 0], [1, 0], [1, 0]], [[0, 0], [0, 0]]])
def test_one_seed_or_seeds_that_change_nothing_allow_no_test(matrix: list[list[int]]) -> None:
    assert seed_test(matrix) is None


def test_sign_flip_by_hand() -> None:
    assert sign_flip([0.1, 0.2, 0.3]) == pytest.approx(2 / 8)
    assert sign_flip([0.1, 0.2, -0.3]) == 1.0
    assert sign_flip([0.01 * i for i in range(1, 9)]) == pytest.approx(2 / 2**8)


def test_many_seeds_flip_at_random_and_repeatably() -> None:
    values = np.random.default_rng(0).normal(0.3, 1, 20).tolist()
    assert sign_flip(values) == sign_flip(values)
    assert sign_flip(values) == pytest.approx(ttest_1samp(values, 0).pvalue, abs=0.03)


@pytest.mark.parametrize(("seeds", "problems"), [(2, 48), (3, 48), (5, 200)])
@pytest.mark.parametrize("seed_sd", [0.0, 0.03])
def test_the_level_of_the_seed_test_is_kept(seeds: int, problems: int, seed_sd: float) -> None:
    rng, runs = np.random.default_rng(7), 500
    tests = [seed_test(draw(rng, seeds, problems, seed_sd=seed_sd)) for _ in range(runs)]
    assert at_most(sum(test is not None and test.p_value <= 0.05 for test in tests), runs, 0.05)


def test_the_level_of_equivalence_is_kept_at_the_margin() -> None:
    rng, runs, margin = np.random.default_rng(3), 400, 0.05
    tests = [seed_test(draw(rng, 4, 200, effect=margin, seed_sd=0.02)) for _ in range(runs)]
    assert at_most(sum(test is not None and equivalence(test, margin) <= 0.05 for test in tests), runs, 0.05)


def test_equivalence_needs_a_margin() -> None:
    test = seed_test([[1, 0], [0, 1]])
    assert test is not None
    with pytest.raises(ValueError, match="margin = 0"):
        equivalence(test, 0)


def test_the_bootstrap_covers_other_problems_where_seeds_do_not_vary() -> None:
    rng, runs = np.random.default_rng(5), 300
    effect = 0.06
    missed = sum(
        effect not in crossed_bootstrap(draw(rng, 8, 150, effect, persistent=0.7), resamples=500) for _ in range(runs)
    )
    assert at_most(missed, runs, 0.08)  # a percentile interval of 8 seeds is a little narrow, as its docstring says


def test_the_bootstrap_is_repeatable_and_contains_the_estimate() -> None:
    matrix = draw(np.random.default_rng(2), 3, 100, effect=0.1)
    interval = crossed_bootstrap(matrix)
    assert interval == crossed_bootstrap(matrix)
    assert interval != crossed_bootstrap(matrix, seed=1)
    assert matrix.mean() in interval


def test_components_are_those_of_the_two_way_layout() -> None:
    matrix = draw(np.random.default_rng(4), 4, 60, effect=0.05, seed_sd=0.1, persistent=0.4)
    frame = pd.DataFrame({"d": matrix.ravel(), "s": np.repeat(range(4), 60), "p": np.tile(range(60), 4)})
    table = anova_lm(ols("d ~ C(s) + C(p)", frame).fit())
    seeds, problems, residual = (table.loc[row, "mean_sq"] for row in ("C(s)", "C(p)", "Residual"))
    found = variance_components(matrix)
    assert found is not None
    assert found.seed_sd**2 == pytest.approx((seeds - residual) / 60)
    assert found.problem_sd**2 == pytest.approx((problems - residual) / 4)
    assert found.residual_sd**2 == pytest.approx(residual)
    assert found.difference in found.interval


def test_components_find_what_was_put_in() -> None:
    rng = np.random.default_rng(6)
    found = variance_components(draw(rng, 200, 300, effect=0.1, seed_sd=0.03, discordance=0.3, persistent=0.5))
    assert found is not None
    assert found.persistent == pytest.approx(0.5, abs=0.08)
    assert 0.01 < found.seed_sd < 0.03  # half of the problems do not answer to the seed: 0.03 * 0.5
    assert found.seed_sd == pytest.approx(0.015, abs=0.003)


@pytest.mark.parametrize("persistent", [0.0, 0.6])
def test_the_interval_over_seeds_and_problems_covers(persistent: float) -> None:
    rng, runs, effect = np.random.default_rng(8), 500, 0.05
    missed = 0
    for _ in range(runs):
        found = variance_components(draw(rng, 3, 100, effect, persistent=persistent))
        assert found is not None
        missed += effect not in found.interval
    assert at_most(missed, runs, 0.05)


def test_no_components_without_a_second_seed() -> None:
    assert variance_components([[1, 0, -1]]) is None
    saturated = variance_components([[0, 0], [0, 0]])
    assert saturated is not None
    assert (saturated.interval.low, saturated.persistent) == (0, 0)


def test_holm_is_that_of_statsmodels() -> None:
    rng = np.random.default_rng(0)
    for size in (1, 2, 5):
        p = rng.random(size) ** 3
        assert holm(p.tolist()) == pytest.approx(multipletests(p, method="holm")[1])
        padded = multipletests([*p, 1.0, 1.0], method="holm")[1][:size]
        assert holm(p.tolist(), family=size + 2) == pytest.approx(padded)
    with pytest.raises(ValueError, match="smaller than the 2 tests"):
        holm([0.1, 0.2], family=1)


@pytest.mark.parametrize("seeds", [3, 10])
def test_power_is_that_of_statsmodels(seeds: int) -> None:
    expected = TTestPower().power(0.9, seeds, 0.05)
    assert power_over_seeds(0.018, 0.02, seeds) == pytest.approx(expected)
    assert power_over_seeds(0.0, 0.02, seeds) == pytest.approx(0.05)


@pytest.mark.parametrize(("seeds", "problems", "seed_sd"), [(3, 200, 0.02), (6, 100, 0.0), (5, 400, 0.03)])
def test_what_is_called_detectable_is_detected_as_often_as_promised(seeds: int, problems: int, seed_sd: float) -> None:
    rng, runs, discordance = np.random.default_rng(9), 4000, 0.4
    effect = detectable_over_seeds(spread_over_seeds(seed_sd, discordance, problems), seeds)
    means = np.stack([draw(rng, seeds, problems, effect, seed_sd, discordance).mean(axis=1) for _ in range(runs)])
    found = (ttest_1samp(means, 0, axis=1).pvalue <= 0.05).mean()
    # The variance of an item is taken at difference 0, which is a little too much: the promise errs to the safe side.
    assert 0.78 <= found <= 0.87


def test_seeds_needed_are_the_fewest() -> None:
    for effect in (0.01, 0.02, 0.05):
        seeds = seeds_for_difference(effect, 0.0158)
        assert seeds is not None
        assert power_over_seeds(effect, 0.0158, seeds) >= 0.8
        assert seeds == 2 or power_over_seeds(effect, 0.0158, seeds - 1) < 0.8
        equal = seeds_for_equivalence(effect, 0.0158)
        assert equal is not None
        assert equivalence_power(effect, 0.0158, equal) >= 0.8
        assert equal == 2 or equivalence_power(effect, 0.0158, equal - 1) < 0.8
    assert seeds_for_difference(1e-4, 0.0158) is None


def test_equality_is_shown_at_least_as_often_as_promised() -> None:
    rng, margin, seeds = np.random.default_rng(10), 0.05, 6
    promised = equivalence_power(margin, 0.03, seeds)
    means = 0.03 * rng.standard_normal((4000, seeds))
    upper = ttest_1samp(means, margin, axis=1, alternative="less").pvalue
    lower = ttest_1samp(means, -margin, axis=1, alternative="greater").pvalue
    shown = (np.maximum(upper, lower) <= 0.05).mean()
    assert 0.5 < promised <= shown + 0.02
    assert shown - promised < 0.05


def test_refusals() -> None:
    for call in (
        lambda: seed_test([1, 0]),
        lambda: seed_test([[0.5, 0.0], [1, 0]]),
        lambda: crossed_bootstrap([]),
        lambda: spread_over_seeds(-1, 0.1, 10),
        lambda: spread_over_seeds(0.1, 2, 10),
        lambda: power_over_seeds(0.1, 0.0, 3),
        lambda: detectable_over_seeds(0.1, 1),
        lambda: equivalence_power(0.1, 0.1, 3, alpha=1),
    ):
        with pytest.raises(ValueError, match=r"need|must be"):
            call()
