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

from aqnsim._errors import AqnsimError
from training import config
from training.config import Difference
from training.records import (
    EVALUATION,
    MODES,
    PROBLEMS,
    Evaluation,
    Mode,
    ProblemRecord,
    Resume,
    Score,
)
from training.rundir import RESUMES, RunDirectory
from training.statistics import PairedDifference, minimum_detectable_effect, paired_difference

DECISIVE: Mode = "emulated"

SINGLE_SEED = (
    "One run per arm: the interval covers the choice of problems, not the training seed. How much "
    "the difference would vary over seeds, two runs cannot say."
)


class ComparisonError(AqnsimError):
    """Two runs that cannot be compared."""


@dataclass(frozen=True)
class Arm:
    """One finished run: its final evaluation, and per mode which problems it got right."""

    directory: RunDirectory
    evaluation: Evaluation
    results: dict[Mode, dict[str, bool]]

    @property
    def name(self) -> str:
        """The id of the experiment."""
        return self.directory.experiment.id


@dataclass(frozen=True)
class Effect:
    """The paired difference of one mode (A minus B) and the least that it could have detected."""

    mode: Mode
    paired: PairedDifference
    detectable: float

    @property
    def is_detected(self) -> bool:
        """Whether the difference reaches the detectable effect and its interval leaves out 0."""
        return abs(self.paired.difference) >= self.detectable and 0 not in self.paired.interval


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
    a, b = _load(run_a), _load(run_b)
    if a.directory.path.resolve() == b.directory.path.resolve():
        raise ComparisonError(f"{run_a} and {run_b} are the same run")
    effects = tuple(_effect(mode, a, b) for mode in MODES)
    decisive = next(effect for effect in effects if effect.mode == DECISIVE)
    allowed = _allowed(a, b)
    differences = [*config.diff(a.directory.experiment, b.directory.experiment), *_outside(a, b)]
    declared = tuple(item for item in differences if config.covers(allowed, item.key))
    undeclared = tuple(item for item in differences if not config.covers(allowed, item.key))
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


def _load(path: Path) -> Arm:
    directory = RunDirectory.open(path)
    status = directory.status
    if status.state != "finished":
        why = f" ({status.message})" if status.message else ""
        raise ComparisonError(f"{path} is {status.state}{why}: only finished runs are compared")
    evaluation = directory.read_json(EVALUATION, Evaluation)
    if not evaluation.is_final:
        raise ComparisonError(f"{path}: its evaluation at step {evaluation.step} is not the final one")
    if evaluation.fingerprint != directory.run.fingerprint:
        raise ComparisonError(
            f"{path} was trained under profile {directory.run.fingerprint[:12]}, but evaluated "
            f"under {evaluation.fingerprint[:12]}: its emulated score is not the one asked for"
        )
    problems = [row for row in directory.read_jsonl(PROBLEMS, ProblemRecord) if row.split_is_final]
    results = {mode: _results(path, mode, problems) for mode in MODES}
    for mode, answers in results.items():
        score = evaluation.score(mode)
        if (score.correct, score.n) != (sum(answers.values()), len(answers)):
            raise ComparisonError(
                f"{path}: {EVALUATION} says {score.correct} of {score.n} {mode}, {PROBLEMS} holds "
                f"{sum(answers.values())} of {len(answers)}"
            )
    return Arm(directory, evaluation, results)


def _results(path: Path, mode: Mode, problems: Iterable[ProblemRecord]) -> dict[str, bool]:
    results: dict[str, bool] = {}
    for problem in problems:
        if problem.mode == mode:
            if problem.problem_id in results:
                raise ComparisonError(f"{path}: problem {problem.problem_id!r} is there twice ({mode})")
            results[problem.problem_id] = problem.correct
    if not results:
        raise ComparisonError(f"{path} has no final {mode} results")
    return results


def _effect(mode: Mode, a: Arm, b: Arm) -> Effect:
    left, right = a.results[mode], b.results[mode]
    if unpaired := sorted(left.keys() ^ right.keys()):
        raise ComparisonError(
            f"the arms answered different {mode} problems: {len(unpaired)} are in one arm only, "
            f"such as {unpaired[0]!r}; a paired comparison needs the same held-out problems"
        )
    ids = sorted(left)
    paired = paired_difference([left[key] for key in ids], [right[key] for key in ids])
    return Effect(mode, paired, minimum_detectable_effect(paired.n, paired.discordance))


def _allowed(a: Arm, b: Arm) -> tuple[str, ...]:
    """What the question lets the arms differ in; nothing where neither is the other's control."""
    for arm, other in ((a, b), (b, a)):
        question = arm.directory.experiment.question
        if question.control_id == other.name:
            # Another profile has another fingerprint, but so has a profile that was edited.
            renamed = arm.directory.run.profile != other.directory.run.profile
            varies_profile = renamed and config.covers(question.differs_in, "profile.name")
            return (*question.differs_in, *(["profile.fingerprint"] if varies_profile else []))
    return ()


def _outside(a: Arm, b: Arm) -> list[Difference]:
    """Differences that no config knows of: seed, emulated hardware, code, machine."""
    left, right = (
        {
            "seed": arm.directory.run.seed,
            "processes": arm.directory.run.processes,
            "profile.fingerprint": arm.directory.run.fingerprint,
            **arm.directory.environment(),
        }
        for arm in (a, b)
    )
    return [
        Difference(key, left.get(key), right.get(key))
        for key in sorted(left.keys() | right.keys())
        if left.get(key) != right.get(key)
    ]


def _caveats(a: Arm, b: Arm) -> Iterable[str]:
    for label, arm in (("A", a), ("B", b)):
        environment = arm.directory.environment()
        if environment.get("git.revision") is None:
            yield f"{label} does not know the revision of its code."
        elif environment.get("git.dirty"):
            yield f"{label} ran on uncommitted changes: its revision does not tell its code."
        for resume in arm.directory.read_jsonl(RESUMES, Resume):
            if resume.changed:
                changes = ", ".join(resume.changed)
                yield f"{label} was resumed in another environment: {changes} had changed."
    if not _allowed(a, b):
        yield "Neither experiment names the other as its control: nothing that differs is declared."


def _verdict(
    effect: Effect,
    a: Arm,
    b: Arm,
    declared: tuple[Difference, ...],
    undeclared: tuple[Difference, ...],
) -> Verdict:
    paired = effect.paired
    difference = f"the difference of {_signed(paired.difference)} points"
    if abs(paired.difference) < effect.detectable:
        return Verdict(
            "no finding",
            f"no finding: {difference} is below the minimum detectable effect of "
            f"{_points(effect.detectable)} points at n={paired.n}",
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
        f"{_signed(paired.difference)} points ({effect.mode}, n={paired.n}), at or above the "
        f"minimum detectable effect of {_points(effect.detectable)} points",
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
    for effect in comparison.effects:
        paired = effect.paired
        low, high = paired.interval.low, paired.interval.high
        table.add_row(
            effect.mode,
            *(_score(arm.evaluation.score(effect.mode)) for arm in (comparison.a, comparison.b)),
            f"{_signed(paired.difference)}\n[{_signed(low)}, {_signed(high)}]",
            f"{paired.p_value:.3g}\n{paired.only_a} : {paired.only_b}",
            _points(effect.detectable),
        )
    return table


def _score(score: Score) -> str:
    low, high = score.wilson
    return f"{_points(score.accuracy)}\n[{_points(low)}, {_points(high)}]"


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


def _points(share: float) -> str:
    return f"{100 * share:.1f}"


def _signed(share: float) -> str:
    return f"{100 * share:+.1f}"
