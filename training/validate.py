"""The plan's questions, decided from intervals over seeds; what the runs cannot decide says how many seeds could."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import sqrt
from pathlib import Path
from typing import Any

from training.analysis import DECISIVE, Effect, effect, interval_text, points, signed
from training.arms import Arm, ComparisonError, find_runs, load_arm, split_differences
from training.config import Experiment, NoAqn, load
from training.questions import Contrast, Outcome, Question, decision
from training.records import METRICS, StepMetrics
from training.rundir import RunDirectory, replace
from training.statistics import equivalence, holm, seeds_for_difference, seeds_for_equivalence, spread_over_seeds
from training.sweep import Planned

LEVEL, POWER = 0.05, 0.8
MARGIN = 0.02
"""Differences below this are equal for the plan, whose hypothesis is a benefit of 2 to 3 points."""

SEED_SD = 0.0158
"""Standard deviation between runs of one configuration where none was measured: that of six published ones."""


@dataclass(frozen=True)
class Decided:
    """A contrast with its effect and what may be said of it.

    Attributes:
        contrast: what was compared.
        effect: over the seeds that both arms have.
        p_value: of no difference over seeds, adjusted by Holm over the primary contrasts; None with one seed.
        equal_p: of a difference of the margin or more (TOST); None with one seed.
        outcome: from the intervals.
        text: in words.
        undeclared: settings or environment in which the arms differ and should not.
        seeds_needed: where it is undecided.
    """

    contrast: Contrast
    effect: Effect
    p_value: float | None
    equal_p: float | None
    outcome: Outcome
    text: str
    undeclared: tuple[str, ...]
    seeds_needed: int | None


@dataclass(frozen=True)
class Validation:
    """The questions' contrasts, and the decision where both questions were asked."""

    preset: str
    margin: float
    decided: Mapping[str, tuple[Decided, ...]]
    decision: str | None

    def to_dict(self) -> dict[str, Any]:
        """As plain values."""
        return {
            "preset": self.preset,
            "margin": self.margin,
            "level": LEVEL,
            "decision": self.decision,
            "questions": {name: [_plain(d) for d in rows] for name, rows in self.decided.items()},
        }

    def to_markdown(self) -> str:
        """Tables that can stand in a document."""
        lines = []
        for name, rows in self.decided.items():
            lines += [f"### {name}", "", "| contrast | seeds | difference | 95 % over seeds | outcome |"]
            lines += ["| --- | --- | --- | --- | --- |"]
            for d in rows:
                test = d.effect.test
                shown = interval_text(test.interval) if test else "one seed: none"
                cells = (f"`{d.contrast.treatment}` - `{d.contrast.control}`", str(len(d.effect.seeds)))
                lines.append(f"| {' | '.join((*cells, signed(d.effect.difference), shown, d.outcome))} |")
            lines += ["", *(f"- {d.text}" for d in rows), ""]
        if self.decision:
            lines += [f"**{self.decision}**", ""]
        return "\n".join(lines)


def validate(
    questions: Sequence[Question], preset: str, roots: Sequence[Path], *, seeds: int, margin: float = MARGIN
) -> Validation:
    """Decide questions from finished runs.

    Args:
        questions: some of `questions.QUESTIONS`.
        preset: of the runs.
        roots: folders of runs, or of archives of runs.
        seeds: seeds 0 to this are looked for.
        margin: differences below this count as equal.

    Raises:
        ComparisonError: a run is missing, not finished, not attested, or was evaluated on something else.
    """
    runs = [run for root in roots for run in find_runs(root)]
    found: dict[str, list[tuple[Contrast, Effect, tuple[str, ...]]]] = {}
    for question in questions:
        found[question.name] = [(c, *measured(c, preset, runs, seeds)) for c in question.contrasts]
    primary = [e for rows in found.values() for c, e, _ in rows if c.primary and e.test is not None]
    adjusted = dict(zip(map(id, primary), holm([e.test.p_value for e in primary if e.test]), strict=True))
    decided = {
        name: tuple(_decide(c, e, undeclared, adjusted.get(id(e)), margin) for c, e, undeclared in rows)
        for name, rows in found.items()
    }
    both = {"e12", "targeting"} <= decided.keys()
    said = decision(decided["e12"][0].outcome, decided["targeting"][0].outcome) if both else None
    return Validation(preset, margin, decided, said)


def write(found: Validation, path: Path) -> None:
    """Write a validation as JSON, and as Markdown beside it.

    Raises:
        RunDirectoryError: the disk refused it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    replace(path, (json.dumps(found.to_dict(), indent=2) + "\n").encode())
    replace(path.with_suffix(".md"), (found.to_markdown() + "\n").encode())


def measured(
    contrast: Contrast, preset: str, runs: Sequence[RunDirectory], seeds: int
) -> tuple[Effect, tuple[str, ...]]:
    """The effect of a contrast over the seeds that both arms have, and in what the arms differ though they should not.

    Raises:
        ComparisonError: an arm has no finished run, or one that is not attested; no seed is in both.
    """
    names = (contrast.treatment, contrast.control)
    experiments = {name: load(name, preset) for name in names}
    arms = {name: _arms(name, e, preset, runs, seeds) for name, e in experiments.items()}
    common = sorted(arms[names[0]].keys() & arms[names[1]].keys())
    pairs = [(arms[names[0]][seed], arms[names[1]][seed]) for seed in common]
    declared = _declared(contrast, preset)
    undeclared = {d.key for a, b in pairs for d in split_differences(a, b, declared)[1]}
    return effect(DECISIVE, pairs), tuple(sorted(undeclared))


def _arms(name: str, experiment: Experiment, preset: str, runs: Sequence[RunDirectory], seeds: int) -> dict[int, Arm]:
    """The finished runs of an arm by their seed, each attested.

    Raises:
        ComparisonError: none is there, or one did not realise its noise.
    """
    found = {}
    for seed in range(seeds):
        run = Planned(name, experiment, seed, preset).find(runs)
        if run is not None and run.status.state == "finished":
            found[seed] = load_arm(run.path)
            attest(found[seed])
    if not found:
        raise ComparisonError(
            f"no finished run of {name!r} with preset {preset!r} and a seed below {seeds}: "
            f"python -m training sweep {name} --preset {preset} --seeds {seeds}"
        )
    return found


def attest(arm: Arm) -> None:
    """Hold an arm's records against what it asked for.

    Raises:
        ComparisonError: it asked for noise, and its records show none, or another than the schedule's.
    """
    directory = arm.directory
    if isinstance(directory.experiment.aqn, NoAqn):
        return
    rows = directory.read_jsonl(METRICS, StepMetrics)
    asked = [row for row in rows if row.sigma_requested]
    missed = [row for row in asked if not row.sigma_realised]
    if not asked or missed:
        what = (
            f"step {missed[0].step} asked for sigma {missed[0].sigma_requested}" if missed else "no step asked for any"
        )
        raise ComparisonError(
            f"{directory.path} asked for {directory.experiment.aqn.schedule} noise, and its records show none: {what}"
        )


def _declared(contrast: Contrast, preset: str) -> tuple[str, ...]:
    """What the arms may differ in: all that lies between the treatment and the control, along the chain of controls."""
    declared: list[str] = []
    for start, end in ((contrast.treatment, contrast.control), (contrast.control, contrast.treatment)):
        name: str | None = start
        chain: list[str] = []
        while name is not None and name != end:
            question = load(name, preset).question
            chain += question.differs_in
            name = question.control_id
        if name == end:
            declared += chain
    return tuple(declared)


def _decide(
    contrast: Contrast, e: Effect, undeclared: tuple[str, ...], adjusted: float | None, margin: float
) -> Decided:
    test = e.test
    p_value = None if test is None else (test.p_value if adjusted is None else adjusted)
    equal_p = equivalence(test, margin) if test is not None and test.sd > 0 else None
    sd = (
        test.sd if test is not None and test.sd > 0 else spread_over_seeds(SEED_SD * sqrt(2), e.discordance, e.paired.n)
    )
    needed = None
    outcome: Outcome
    if p_value is not None and p_value <= LEVEL and e.is_detected:
        outcome = "better" if e.difference > 0 else "worse"
    elif equal_p is not None and equal_p <= LEVEL:
        outcome = "equal"
    else:
        outcome = "undecided"
        wanted = max(abs(e.difference), margin)
        searched = (seeds_for_difference(wanted, sd, LEVEL, POWER), seeds_for_equivalence(margin, sd, LEVEL, POWER))
        needed = min((n for n in searched if n is not None), default=None)
    if undeclared and outcome != "undecided":
        outcome = "not attributable"
    return Decided(
        contrast,
        e,
        p_value,
        equal_p,
        outcome,
        _text(contrast, e, outcome, undeclared, needed, margin),
        undeclared,
        needed,
    )


def _text(
    c: Contrast, e: Effect, outcome: Outcome, undeclared: tuple[str, ...], needed: int | None, margin: float
) -> str:
    measured = f"{c.asks}: {signed(e.difference)} points over {len(e.seeds)} seeds on {e.paired.n} problems"
    match outcome:
        case "better" | "worse":
            return f"{measured}: {outcome} (detectable: {points(e.detectable)})."
        case "equal":
            return f"{measured}: equal within {points(margin)} points."
        case "not attributable":
            return f"{measured}, but the arms also differ in {', '.join(undeclared)}: not attributable."
    more = "more than 1000 seeds" if needed is None else f"about {needed} seeds"
    return f"{measured}: undecided; these runs would detect {points(e.detectable)} points or more. It takes {more}."


def _plain(d: Decided) -> dict[str, Any]:
    e = d.effect
    return {
        "treatment": d.contrast.treatment,
        "control": d.contrast.control,
        "asks": d.contrast.asks,
        "primary": d.contrast.primary,
        "outcome": d.outcome,
        "text": d.text,
        "difference": e.difference,
        "seeds": list(e.seeds),
        "per_seed": [
            {"difference": p.difference, "interval": dataclasses.astuple(p.interval), "p_value": p.p_value}
            for p in e.per_seed
        ],
        "interval": None if e.test is None else dataclasses.astuple(e.test.interval),
        "elsewhere": dataclasses.astuple(e.elsewhere),
        "p_value": d.p_value,
        "equal_p": d.equal_p,
        "detectable": e.detectable,
        "components": None if e.components is None else dataclasses.asdict(e.components),
        "undeclared": list(d.undeclared),
        "seeds_needed": d.seeds_needed,
    }
