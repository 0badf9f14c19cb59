"""What a number of seeds can show: power of the paired t test over seeds, and its inverses.

`sd` is everywhere the standard deviation, from seed to seed, of the paired difference of two arms on the same
problems; `spread_over_seeds` makes it from what is known of training and of problems.
"""

from __future__ import annotations

from collections.abc import Callable
from math import sqrt

from scipy.optimize import brentq
from scipy.stats import nct, t

MOST_SEEDS = 1000
"""Where a search for the seeds needed ends."""


def spread_over_seeds(seed_sd: float, discordance: float, problems: int, persistent: float = 0.0) -> float:
    """Standard deviation from seed to seed of a paired difference measured on `problems` problems.

        sd^2 = seed_sd^2 + (1 - persistent) * discordance / problems

    The second term is the variance of a mean of n values that are -1, 0 or 1, of which a share `discordance` is not 0,
    at difference 0, where it is largest. What comes back in every seed does not vary from seed to seed.

    Args:
        seed_sd: of the arms' true difference, from seed to seed.
        discordance: share of the problems that exactly one arm solves.
        problems: held-out problems.
        persistent: share of the variance within a seed that is the same in every seed.

    Raises:
        ValueError: an argument is out of range.

    >>> round(spread_over_seeds(0.01, 0.2, 200), 4)
    0.0332
    """
    if seed_sd < 0 or not 0 <= discordance <= 1 or not 0 <= persistent <= 1 or problems < 1:
        raise ValueError(
            f"need seed_sd >= 0, discordance and persistent in 0..1 and problems >= 1, "
            f"not {seed_sd}, {discordance}, {persistent} and {problems}"
        )
    return sqrt(seed_sd**2 + (1 - persistent) * discordance / problems)


def power_over_seeds(effect: float, sd: float, seeds: int, alpha: float = 0.05) -> float:
    """Probability that a two-sided paired t test over seeds rejects, where the true difference is `effect`.

    Source: Cohen (1988), Statistical Power Analysis, ch. 2, with the noncentral t distribution.

    Raises:
        ValueError: fewer than two seeds, no spread, or a level out of range.
    """
    _check(sd, seeds, alpha)
    freedom, shift = seeds - 1, abs(effect) * sqrt(seeds) / sd
    critical = float(t.ppf(1 - alpha / 2, freedom))
    return float(nct.sf(critical, freedom, shift) + nct.sf(critical, freedom, -shift))


def equivalence_power(margin: float, sd: float, seeds: int, alpha: float = 0.05) -> float:
    """Probability, at least, to show equality within `margin` where the arms are equal.

    Each of the two one-sided tests misses with some probability b; both succeed with at least 1 - 2b.

    Raises:
        ValueError: fewer than two seeds, no spread, or a level out of range.
    """
    _check(sd, seeds, alpha)
    freedom = seeds - 1
    miss = float(nct.cdf(float(t.ppf(1 - alpha, freedom)), freedom, margin * sqrt(seeds) / sd))
    return max(0.0, 1 - 2 * miss)


def detectable_over_seeds(sd: float, seeds: int, alpha: float = 0.05, power: float = 0.8) -> float:
    """The smallest true difference that the test over seeds would detect with the given power.

    >>> round(detectable_over_seeds(0.0158, 10), 3)
    0.016
    """
    _check(sd, seeds, alpha)
    upper = sd
    while power_over_seeds(upper, sd, seeds, alpha) < power:
        upper *= 2
    return float(brentq(lambda effect: power_over_seeds(effect, sd, seeds, alpha) - power, 0.0, upper))


def seeds_for_difference(effect: float, sd: float, alpha: float = 0.05, power: float = 0.8) -> int | None:
    """Seeds from which on the test over seeds detects `effect`; None where 1000 do not suffice."""
    return _fewest(lambda seeds: power_over_seeds(effect, sd, seeds, alpha), power)


def seeds_for_equivalence(margin: float, sd: float, alpha: float = 0.05, power: float = 0.8) -> int | None:
    """Seeds from which on equality within `margin` is shown where it holds; None where 1000 do not suffice."""
    return _fewest(lambda seeds: equivalence_power(margin, sd, seeds, alpha), power)


def _fewest(reached: Callable[[int], float], power: float) -> int | None:
    """The smallest number of seeds that reaches a power, which grows with the seeds."""
    low, high = 1, 2
    while reached(high) < power:
        low, high = high, 2 * high
        if low >= MOST_SEEDS:
            return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if reached(middle) >= power else (middle, high)
    return high


def _check(sd: float, seeds: int, alpha: float) -> None:
    if not sd > 0 or seeds < 2 or not 0 < alpha < 1:
        raise ValueError(f"need sd > 0, at least 2 seeds and 0 < alpha < 1, not {sd}, {seeds} and {alpha}")
