"""Two arms over several seeds: the seed is what varies from run to run, so it is what a claim generalises over.

All functions but `holm` and `sign_flip` take the paired differences as a matrix, float [seeds, problems]: 1 where
only arm A solved the problem in that seed, -1 where only arm B did, else 0. Arms are paired by seed, and every seed
answers the same problems.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import permutation_test, t

from training.statistics.paired import Interval

Matrix = NDArray[np.float64]

EXACT_UP_TO = 16
"""Seeds up to which the sign-flip test goes through all assignments of signs."""


@dataclass(frozen=True)
class SeedTest:
    """Whether two arms differ, tested over seeds on the problems at hand.

    Attributes:
        seeds: pairs of runs.
        difference: mean over the seeds of accuracy A minus accuracy B.
        sd: standard deviation of that difference from seed to seed, see `seed_test`.
        interval: t interval of the difference.
        p_value: of the paired t test, two-sided.
        sign_flip: p-value of the permutation test, two-sided; never below 2 / 2^seeds.
    """

    seeds: int
    difference: float
    sd: float
    interval: Interval
    p_value: float
    sign_flip: float


@dataclass(frozen=True)
class Components:
    """Where the paired differences vary: a linear random-effects model with crossed seeds and problems.

    Attributes:
        difference: the mean.
        interval: of the mean, over other seeds and other problems.
        seed_sd: of the effect, from seed to seed.
        problem_sd: of the effect, from problem to problem, the same in every seed.
        residual_sd: of one problem in one seed beyond both.
    """

    difference: float
    interval: Interval
    seed_sd: float
    problem_sd: float
    residual_sd: float

    @property
    def persistent(self) -> float:
        """Share of the variance within a seed that comes back in every seed, 0 to 1."""
        within = self.problem_sd**2 + self.residual_sd**2
        return self.problem_sd**2 / within if within else 0.0


def seed_test(differences: ArrayLike, confidence: float = 0.95) -> SeedTest | None:
    """Test over seeds: a paired t test and an exact sign-flip test on the seeds' mean differences.

    A seed's mean over n problems varies by at least the residual variance over n, which all problems together
    estimate well. Two or three seeds agree more closely than that now and then, by accident, and a plain t interval
    then shrinks to nothing; so the variance is the larger one of the two. That only makes the test more careful.

    The problems are taken as given: `crossed_bootstrap` and `variance_components` say what other problems would do.

    Source: Student (1908), Biometrika 6, 1-25, with the bound above; Fisher (1935), The Design of Experiments, sec. 21.

    Returns:
        The test; None where the seeds allow none: there is one only, or all of them gave the same differences on
        every problem, which says nothing of how seeds vary.

    Raises:
        ValueError: the differences are not a matrix of -1, 0 and 1.

    >>> result = seed_test([[1, 0, 0, 1], [1, 0, 1, 0], [1, 1, 0, 0]])
    >>> result.difference, round(result.p_value, 3), result.sign_flip
    (0.5, 0.095, 0.25)
    """
    matrix = _matrix(differences)
    seeds, problems = matrix.shape
    if seeds < 2 or not (matrix != matrix[0]).any():
        return None
    means = matrix.mean(axis=1)
    residual = _mean_squares(matrix)[2] if problems > 1 else 0.0
    sd = sqrt(max(float(means.var(ddof=1)), residual / problems))
    difference, error = float(means.mean()), sd / sqrt(seeds)
    half = float(t.ppf((1 + confidence) / 2, seeds - 1)) * error
    return SeedTest(
        seeds=seeds,
        difference=difference,
        sd=sd,
        interval=Interval(difference - half, difference + half),
        p_value=float(2 * t.sf(abs(difference) / error, seeds - 1)),
        sign_flip=sign_flip(means.tolist()),
    )


def sign_flip(differences: Sequence[float]) -> float:
    """Two-sided p-value of the permutation test that flips the signs of paired differences.

    Exact up to 16 seeds; beyond, 65536 random assignments from a fixed seed.
    """
    exact = len(differences) <= EXACT_UP_TO
    result = permutation_test(
        (np.asarray(differences),),
        lambda x, axis: np.mean(x, axis=axis),
        permutation_type="samples",
        vectorized=True,
        n_resamples=np.inf if exact else 2**EXACT_UP_TO,
        rng=np.random.default_rng(0),
    )
    return float(result.pvalue)


def equivalence(test: SeedTest, margin: float) -> float:
    """P-value of the claim that the arms differ by less than `margin`: two one-sided t tests over seeds (TOST).

    Source: Schuirmann (1987), J. Pharmacokinet. Biopharm. 15, 657-680.

    Raises:
        ValueError: the margin is not positive.
    """
    if not margin > 0:
        raise ValueError(f"margin = {margin}: equal within nothing cannot be shown")
    error = test.sd / sqrt(test.seeds)
    return float(t.sf((margin - abs(test.difference)) / error, test.seeds - 1))


def crossed_bootstrap(
    differences: ArrayLike, confidence: float = 0.95, *, resamples: int = 4000, seed: int = 0
) -> Interval:
    """Percentile interval of the mean difference over other seeds and other problems.

    Rows and columns are drawn with replacement, independently. Of s seeds it sees (s - 1) / s of their variance, so
    with few seeds it is too narrow on its own: it stands beside the t interval, and does not replace it.

    Source: Owen (2007), The pigeonhole bootstrap, Ann. Appl. Stat. 1, 386-411.

    Args:
        differences: float [seeds, problems].
        confidence: of the interval.
        resamples: draws of the bootstrap.
        seed: of the draws.

    Raises:
        ValueError: the differences are not a matrix of -1, 0 and 1.
    """
    matrix = _matrix(differences)
    seeds, problems = matrix.shape
    rng = np.random.default_rng(seed)
    rows = rng.multinomial(seeds, np.full(seeds, 1 / seeds), resamples) / seeds
    columns = rng.multinomial(problems, np.full(problems, 1 / problems), resamples) / problems
    means = ((rows @ matrix) * columns).sum(axis=1)
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Interval(float(low), float(high))


def variance_components(differences: ArrayLike, confidence: float = 0.95) -> Components | None:
    """The random-effects model  d[s, p] = difference + seed[s] + problem[p] + residual[s, p].

    Estimated by the mean squares of the two-way layout. On complete data these are the REML estimates where no
    component is negative, in closed form; an iterative fit of crossed effects does not converge on two or three seeds.
    A negative estimate is 0. The interval has Satterthwaite's degrees of freedom.

    Limits: the model is linear, though each difference is -1, 0 or 1; with s seeds, `seed_sd` rests on s - 1 degrees
    of freedom, so that with few seeds it is hardly more than an order of magnitude.

    Source: Searle, Casella and McCulloch (1992), Variance Components, sec. 4.2-4.5; Satterthwaite (1946), Biometrics
    Bulletin 2, 110-114.

    Returns:
        The components; None where there are fewer than two seeds or two problems.

    Raises:
        ValueError: the differences are not a matrix of -1, 0 and 1.
    """
    matrix = _matrix(differences)
    seeds, problems = matrix.shape
    if seeds < 2 or problems < 2:
        return None
    of_seeds, of_problems, residual = _mean_squares(matrix)
    # The variance of the mean is the sum of the components' shares; where one is cut off at 0, so is its mean square.
    of_seeds, of_problems = max(of_seeds, residual), max(of_problems, residual)
    total = of_seeds + of_problems - residual
    difference, half = float(matrix.mean()), 0.0
    if total:
        freedom = total**2 / (
            of_seeds**2 / (seeds - 1) + of_problems**2 / (problems - 1) + residual**2 / ((seeds - 1) * (problems - 1))
        )
        half = float(t.ppf((1 + confidence) / 2, freedom)) * sqrt(total / matrix.size)
    return Components(
        difference=difference,
        interval=Interval(difference - half, difference + half),
        seed_sd=sqrt((of_seeds - residual) / problems),
        problem_sd=sqrt((of_problems - residual) / seeds),
        residual_sd=sqrt(residual),
    )


def holm(p_values: Sequence[float], family: int | None = None) -> list[float]:
    """Holm's adjusted p-values, in the order given; claims at or below a level hold together at that level.

    Source: Holm (1979), Scand. J. Stat. 6, 65-70.

    Args:
        p_values: of the tests that were made.
        family: tests that were planned, where some of them have not been made yet; they count as not rejected.

    Raises:
        ValueError: the family is smaller than what was tested.

    >>> holm([0.01, 0.04])
    [0.02, 0.04]
    >>> holm([0.01, 0.04], family=3)
    [0.03, 0.08]
    """
    family = len(p_values) if family is None else family
    if family < len(p_values):
        raise ValueError(f"family = {family} is smaller than the {len(p_values)} tests made")
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        largest = max(largest, min(1.0, (family - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted


def _mean_squares(matrix: Matrix) -> tuple[float, float, float]:
    """Mean squares of the rows, of the columns, and of what is left."""
    rows, columns = matrix.shape
    row_means, column_means = matrix.mean(axis=1, keepdims=True), matrix.mean(axis=0, keepdims=True)
    left = matrix - row_means - column_means + matrix.mean()
    return (
        float(columns * row_means.var(ddof=1)),
        float(rows * column_means.var(ddof=1)),
        float((left**2).sum() / ((rows - 1) * (columns - 1))),
    )


def _matrix(differences: ArrayLike) -> Matrix:
    matrix = np.asarray(differences, dtype=np.float64)
    if matrix.ndim != 2 or not matrix.size or not np.isin(matrix, (-1, 0, 1)).all():
        raise ValueError(f"differences must be -1, 0 or 1 in [seeds, problems], not of shape {matrix.shape}")
    return matrix
