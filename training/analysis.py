"""The effect of one arm against another: paired by problem within a seed, and by seed over the runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from training.arms import Arm, ComparisonError
from training.records import Mode
from training.statistics import (
    Components,
    Interval,
    PairedDifference,
    SeedTest,
    crossed_bootstrap,
    detectable_over_seeds,
    minimum_detectable_effect,
    paired_difference,
    seed_test,
    variance_components,
)

DECISIVE: Mode = "emulated"
"""The mode that a question is decided on; the clean score is context."""

SINGLE_SEED = (
    "One run per arm: the interval covers the choice of problems, not the training seed. How much "
    "the difference would vary over seeds, two runs cannot say."
)


@dataclass(frozen=True)
class Effect:
    """The paired difference of one mode (A minus B), and the least that it could have detected.

    Attributes:
        mode: of the evaluations.
        seeds: of the pairs of runs.
        per_seed: the arms on the same problems, for each seed.
        test: over the seeds, on these problems; None with one seed, or with seeds that change nothing.
        elsewhere: percentile interval over other seeds and other problems.
        components: where the difference varies; None with one seed.
        detectable: least difference that would be detected (5 % level, 80 % power): over seeds, or with one seed
            between these two runs.
    """

    mode: Mode
    seeds: tuple[int, ...]
    per_seed: tuple[PairedDifference, ...]
    test: SeedTest | None
    elsewhere: Interval
    components: Components | None
    detectable: float

    @property
    def difference(self) -> float:
        """Mean over the seeds of the accuracy of A minus that of B."""
        return sum(paired.difference for paired in self.per_seed) / len(self.per_seed)

    @property
    def discordance(self) -> float:
        """Mean share of the problems that exactly one arm solved."""
        return sum(paired.discordance for paired in self.per_seed) / len(self.per_seed)

    @property
    def paired(self) -> PairedDifference:
        """The first seed's pair of runs."""
        return self.per_seed[0]

    @property
    def is_detected(self) -> bool:
        """Whether the difference reaches the detectable effect and its intervals leave out 0."""
        if len(self.seeds) == 1:
            clear = 0 not in self.paired.interval
        else:
            clear = self.test is not None and 0 not in self.test.interval and 0 not in self.elsewhere
        return abs(self.difference) >= self.detectable and clear


def effect(
    mode: Mode, pairs: Sequence[tuple[Arm, Arm]], *, alpha: float = 0.05, power: float = 0.8, confidence: float = 0.95
) -> Effect:
    """The effect of the first arm against the second, over pairs of runs of one seed each.

    Raises:
        ComparisonError: there is no pair, or the arms answered different problems.
    """
    if not pairs:
        raise ComparisonError("no seed was run in both arms: there is nothing to pair")
    problems = sorted(pairs[0][0].results[mode])
    answers = [[_answers(arm, mode, problems) for arm in pair] for pair in pairs]
    per_seed = tuple(paired_difference(a, b, confidence) for a, b in answers)
    matrix = np.array([[int(x) - int(y) for x, y in zip(a, b, strict=True)] for a, b in answers], dtype=np.float64)
    test = seed_test(matrix, confidence)
    if len(pairs) == 1:
        detectable = minimum_detectable_effect(per_seed[0].n, per_seed[0].discordance, alpha, power)
    else:
        detectable = 1.0 if test is None else min(1.0, detectable_over_seeds(test.sd, test.seeds, alpha, power))
    return Effect(
        mode=mode,
        seeds=tuple(a.seed for a, _ in pairs),
        per_seed=per_seed,
        test=test,
        elsewhere=crossed_bootstrap(matrix, confidence),
        components=variance_components(matrix, confidence),
        detectable=detectable,
    )


def _answers(arm: Arm, mode: Mode, problems: Sequence[str]) -> list[bool]:
    results = arm.results[mode]
    if unpaired := sorted(results.keys() ^ set(problems)):
        raise ComparisonError(
            f"the arms answered different {mode} problems: {len(unpaired)} are in one arm only, "
            f"such as {unpaired[0]!r}; a paired comparison needs the same held-out problems"
        )
    return [results[problem] for problem in problems]


def points(share: float) -> str:
    """A share in percentage points: 0.125 as "12.5"."""
    return f"{100 * share:.1f}"


def signed(share: float) -> str:
    """A difference of shares in percentage points, with its sign."""
    return f"{100 * share:+.1f}"


def interval_text(interval: Interval) -> str:
    """An interval of a difference in percentage points."""
    return f"[{signed(interval.low)}, {signed(interval.high)}]"
