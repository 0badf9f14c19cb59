"""Compare two finished runs: the paired difference, what it can detect, what the arms differ in.

The verdict is on the emulated score alone, as that is the question; the clean one is context. It
calls a winner only where the data can carry one and where the arms differ in nothing undeclared.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from training.analysis import DECISIVE, SINGLE_SEED, Effect, effect, interval_text, points, signed
from training.arms import Arm, ComparisonError, allowed, caveats, load_arm, split_differences
from training.config import Difference
from training.records import MODES, Score

__all__ = ["SINGLE_SEED", "Comparison", "ComparisonError", "Verdict", "compare", "render"]


@dataclass(frozen=True)
class Verdict:
    """What the comparison may be said to show."""

    kind: Literal["finding", "no finding", "not attributable"]
    text: str


@dataclass(frozen=True)
class Comparison:
    """Two arms side by side.

    Attributes:
        a: the first arm.
        b: the second arm.
        effects: one for each mode.
        declared: settings in which the question lets the arms differ, and they do.
        undeclared: everything else that differs, environment included.
        caveats: what a reader has to know besides.
        verdict: on the emulated score.
    """

    a: Arm
    b: Arm
    effects: tuple[Effect, ...]
    declared: tuple[Difference, ...]
    undeclared: tuple[Difference, ...]
    caveats: tuple[str, ...]
    verdict: Verdict


def compare(run_a: Path, run_b: Path) -> Comparison:
    """Compare two run directories.

    Raises:
        ComparisonError: a run is not finished, its evaluation does not fit its problems, or the
            arms were evaluated on different problems.
        RunDirectoryError: a directory is not a run, or is damaged.
    """
    a, b = load_arm(run_a), load_arm(run_b)
    if a.directory.path.resolve() == b.directory.path.resolve():
        raise ComparisonError(f"{run_a} and {run_b} are the same run")
    effects = tuple(effect(mode, [(a, b)]) for mode in MODES)
    decisive = next(item for item in effects if item.mode == DECISIVE)
    declared, undeclared = split_differences(a, b, allowed(a, b))
    return Comparison(
        a=a,
        b=b,
        effects=effects,
        declared=declared,
        undeclared=undeclared,
        caveats=(SINGLE_SEED, *_caveats(a, b)),
        verdict=_verdict(decisive, a, b, declared, undeclared),
    )


def render(comparison: Comparison) -> RenderableType:
    """The comparison for a terminal."""
    a, b, verdict = comparison.a, comparison.b, comparison.verdict
    colour = {"finding": "green", "no finding": "yellow", "not attributable": "red"}[verdict.kind]
    return Group(
        Text(f"A  {a.name}  {a.directory.path}"),
        Text(f"B  {b.name}  {b.directory.path}"),
        _score_table(comparison),
        _difference_table("Declared differences (what the question varies)", comparison.declared),
        _difference_table("Undeclared differences", comparison.undeclared),
        *(Text(f"note: {caveat}", style="dim") for caveat in comparison.caveats),
        Text(verdict.text, style=f"bold {colour}"),
    )


def _caveats(a: Arm, b: Arm) -> Iterable[str]:
    yield from caveats("A", a)
    yield from caveats("B", b)
    if not allowed(a, b):
        yield "Neither experiment names the other as its control: nothing that differs is declared."


def _verdict(
    effect: Effect,
    a: Arm,
    b: Arm,
    declared: tuple[Difference, ...],
    undeclared: tuple[Difference, ...],
) -> Verdict:
    paired = effect.paired
    difference = f"the difference of {signed(paired.difference)} points"
    if abs(paired.difference) < effect.detectable:
        return Verdict(
            "no finding",
            f"no finding: {difference} is below the minimum detectable effect of "
            f"{points(effect.detectable)} points at n={paired.n}",
        )
    if not effect.is_detected:
        return Verdict(
            "no finding",
            f"no finding: the interval of {difference} includes 0 at n={paired.n}",
        )
    if undeclared or not declared:
        keys = ", ".join(item.key for item in undeclared)
        why = f"the arms also differ in {keys}" if keys else "the two runs have the same settings"
        return Verdict(
            "not attributable",
            f"not attributable: {difference} ({a.name} minus {b.name}, {effect.mode}) is "
            f"detectable at n={paired.n}, but {why}",
        )
    winner = a if paired.difference > 0 else b
    return Verdict(
        "finding",
        f"finding, for these two runs: {winner.name} is ahead, {a.name} minus {b.name} is "
        f"{signed(paired.difference)} points ({effect.mode}, n={paired.n}), at or above the "
        f"minimum detectable effect of {points(effect.detectable)} points",
    )


def _score_table(comparison: Comparison) -> Table:
    table = Table(
        title=f"Final accuracy on {comparison.effects[0].paired.n} held-out problems, in points",
        caption="95 % intervals. p: McNemar, exact, with the problems that only A : only B solved. "
        "MDE: minimum detectable effect (5 % level, 80 % power).",
        title_justify="left",
        caption_justify="left",
    )
    for column in ("", "A", "B", "A - B", "p", "MDE"):
        table.add_column(column)
    for found in comparison.effects:
        paired = found.paired
        table.add_row(
            found.mode,
            *(_score(arm.evaluation.score(found.mode)) for arm in (comparison.a, comparison.b)),
            f"{signed(paired.difference)}\n{interval_text(paired.interval)}",
            f"{paired.p_value:.3g}\n{paired.only_a} : {paired.only_b}",
            points(found.detectable),
        )
    return table


def _score(score: Score) -> str:
    low, high = score.wilson
    return f"{points(score.accuracy)}\n[{points(low)}, {points(high)}]"


def _difference_table(title: str, differences: tuple[Difference, ...]) -> RenderableType:
    if not differences:
        return Text(f"{title}: none")
    table = Table(title=title, title_justify="left")
    for column in ("", "A", "B"):
        table.add_column(column, overflow="fold")
    for item in differences:
        table.add_row(item.key, *(Text(_shown(value)) for value in (item.a, item.b)))
    return table


def _shown(value: object) -> str:
    return "-" if value is None else str(value)
