"""What so many seeds and problems can tell, before they are run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt
from pathlib import Path
from typing import Any

from training.arms import find_runs
from training.questions import Contrast
from training.statistics import (
    detectable_over_seeds,
    minimum_detectable_effect,
    seeds_for_difference,
    seeds_for_equivalence,
    spread_over_seeds,
)
from training.validate import LEVEL, POWER, SEED_SD, measured

SEEDS = (2, 3, 5, 10, 20)


@dataclass(frozen=True)
class Power:
    """What is detected at 5 % and 80 % power.

    Attributes:
        spread: standard deviation of the measured difference from seed to seed.
        source: where that comes from.
        problems: held out.
        detectable: by number of seeds; 1 stands for two single runs, which tell nothing of other seeds.
        effect: the difference that matters.
        for_difference, for_equivalence: seeds that it takes; None for more than 1000.
    """

    spread: float
    source: str
    problems: int
    detectable: dict[int, float]
    effect: float
    for_difference: int | None
    for_equivalence: int | None

    def to_dict(self) -> dict[str, Any]:
        """As plain values."""
        return vars(self)

    def __str__(self) -> str:
        rows = [f"{seeds:5d}   {100 * d:6.1f}" for seeds, d in self.detectable.items()]
        needed = [
            f"{what}: {'more than 1000' if n is None else n} seeds"
            for what, n in (
                (f"to detect {100 * self.effect:g} points", self.for_difference),
                (f"to show equality within {100 * self.effect:g} points", self.for_equivalence),
            )
        ]
        return "\n".join(
            [
                f"{self.problems} problems, spread over seeds {100 * self.spread:.2f} points ({self.source})",
                "least difference detected at a level of 5 % with 80 % power, in points:",
                "seeds  detects",
                *rows,
                *needed,
                "1 seed: two runs, whose interval covers the choice of problems alone",
            ]
        )


def table_of(seed_sd: float | None, discordance: float, problems: int, effect: float) -> Power:
    """The table for a spread between seeds.

    Args:
        seed_sd: standard deviation of the true difference from seed to seed, as a share; None takes that of two arms
            of six published runs of one configuration, 1.58 points each.
        discordance: share of the problems that exactly one arm solves.
        problems: held out.
        effect: the difference that matters, as a share.

    >>> found = table_of(0.01, 0.2, 200, 0.05)
    >>> found.for_difference, round(found.detectable[10], 3)
    (6, 0.033)

    Raises:
        ValueError: an argument is out of range.
    """
    source = (
        "given, with the sampling of problems" if seed_sd is not None else "of six published runs, 1.58 points an arm"
    )
    spread = spread_over_seeds(SEED_SD * sqrt(2) if seed_sd is None else seed_sd, discordance, problems)
    detectable = {1: minimum_detectable_effect(problems, discordance)}
    detectable |= {n: detectable_over_seeds(spread, n, LEVEL, POWER) for n in SEEDS}
    return Power(
        spread,
        source,
        problems,
        detectable,
        effect,
        seeds_for_difference(effect, spread, LEVEL, POWER),
        seeds_for_equivalence(effect, spread, LEVEL, POWER),
    )


def measured_spread(roots: Sequence[Path], treatment: str, control: str, preset: str) -> tuple[float, float, int]:
    """From runs: the standard deviation of the true difference over seeds, the discordance, and the problems.

    Raises:
        ComparisonError: an arm has no finished run.
    """
    runs = [run for root in roots for run in find_runs(root)]
    effect, _ = measured(Contrast(treatment, control, ""), preset, runs, 1000)
    seed_sd = SEED_SD * sqrt(2) if effect.components is None else effect.components.seed_sd
    return seed_sd, effect.discordance, effect.paired.n
