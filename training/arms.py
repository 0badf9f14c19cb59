"""A finished run as one arm of a comparison: its final results, what sets it apart, and whether it may be used."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from aqnsim._errors import AqnsimError
from training import config
from training.config import Difference
from training.records import (
    EVALUATION,
    INVALID,
    MODES,
    PROBLEM_COLUMNS,
    PROBLEMS,
    Evaluation,
    Invalid,
    Mode,
    ProblemColumns,
    ProblemRecord,
    Resume,
)
from training.rundir import CONFIG, RESUMES, RunDirectory


class ComparisonError(AqnsimError):
    """Runs that cannot be compared."""


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

    @property
    def seed(self) -> int:
        """The seed of the run."""
        return self.directory.run.seed


def load_arm(path: Path) -> Arm:
    """The arm that a run directory, or the archive of one, holds.

    Raises:
        ComparisonError: the run is not finished or marked invalid, its evaluation is missing, not the final one or
            of another profile, or does not fit its problems.
        RunDirectoryError: not a run directory, or a damaged one.
    """
    directory = RunDirectory.open(path)
    if (mark := invalid(directory)) is not None:
        raise ComparisonError(f"{path} is marked invalid since {mark.since}: {mark.reason}")
    status = directory.status
    if status.state != "finished":
        why = f" ({status.message})" if status.message else ""
        raise ComparisonError(f"{path} is {status.state}{why}: only finished runs are compared")
    if not (directory.path / EVALUATION).exists():
        raise ComparisonError(f"{path} is finished, but its final evaluation ({EVALUATION}) is missing")
    evaluation = directory.read_json(EVALUATION, Evaluation)
    if not evaluation.is_final:
        raise ComparisonError(f"{path}: its evaluation at step {evaluation.step} is not the final one")
    if evaluation.fingerprint != directory.run.fingerprint:
        raise ComparisonError(
            f"{path} was trained under profile {directory.run.fingerprint[:12]}, but evaluated "
            f"under {evaluation.fingerprint[:12]}: its emulated score is not the one asked for"
        )
    results = _final_results(directory)
    for mode, answers in results.items():
        score = evaluation.score(mode)
        if (score.correct, score.n) != (sum(answers.values()), len(answers)):
            raise ComparisonError(
                f"{path}: {EVALUATION} says {score.correct} of {score.n} {mode}, its problems are "
                f"{sum(answers.values())} of {len(answers)}"
            )
    return Arm(directory, evaluation, results)


def find_runs(root: Path) -> list[RunDirectory]:
    """The runs below a folder, by name; none where there is no such folder.

    Raises:
        RunDirectoryError: one of them is damaged.
    """
    return [RunDirectory.open(path.parent) for path in sorted(root.glob(f"*/{CONFIG}"))]


def invalid(directory: RunDirectory) -> Invalid | None:
    """Why a run no longer counts; None where it does."""
    return directory.read_json(INVALID, Invalid) if (directory.path / INVALID).exists() else None


def mark_invalid(path: Path, reason: str, since: str) -> None:
    """Take a run out of every analysis and table; the run itself stays as it is.

    Raises:
        RunDirectoryError: not a run directory, or the disk refused it.
    """
    RunDirectory.open(path).write_json(INVALID, Invalid(reason=reason, since=since))


def allowed(a: Arm, b: Arm) -> tuple[str, ...]:
    """What the question lets the arms differ in; nothing where neither is the other's control."""
    for arm, other in ((a, b), (b, a)):
        question = arm.directory.experiment.question
        if question.control_id == other.name:
            return question.differs_in
    return ()


def split_differences(a: Arm, b: Arm, declared: Sequence[str]) -> tuple[tuple[Difference, ...], tuple[Difference, ...]]:
    """All differences of settings, emulated hardware and environment: declared ones, and the others."""
    # Another profile has another fingerprint, but so has a profile that was edited.
    settings = config.diff(a.directory.experiment, b.directory.experiment)
    if any(item.key.startswith("profile.") and config.covers(declared, item.key) for item in settings):
        declared = (*declared, "profile.fingerprint")
    differences = [*settings, *_outside(a, b)]
    covered = [config.covers(declared, item.key) for item in differences]
    return (
        tuple(item for item, is_covered in zip(differences, covered, strict=True) if is_covered),
        tuple(item for item, is_covered in zip(differences, covered, strict=True) if not is_covered),
    )


def caveats(label: str, arm: Arm) -> Iterable[str]:
    """What a reader has to know of how an arm was run."""
    environment = arm.directory.environment()
    if environment.get("git.revision") is None:
        yield f"{label} does not know the revision of its code."
    elif environment.get("git.dirty"):
        yield f"{label} ran on uncommitted changes: its revision does not tell its code."
    if changed := changed_on_resume(arm):
        yield f"{label} was resumed in another environment: {', '.join(changed)} had changed."


def changed_on_resume(arm: Arm) -> list[str]:
    """What had changed in the environment when the run was resumed."""
    resumes = arm.directory.read_jsonl(RESUMES, Resume)
    return sorted({key for resume in resumes for key in resume.changed})


def _outside(a: Arm, b: Arm) -> list[Difference]:
    """Differences that no config knows of: seed, emulated hardware, code, machine."""
    left, right = (
        {
            "seed": arm.seed,
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


def _final_results(directory: RunDirectory) -> dict[Mode, dict[str, bool]]:
    """For each mode the final answers: from the columns of an archive, or from the lines of a run."""
    if (directory.path / PROBLEM_COLUMNS).exists():
        columns = directory.read_json(PROBLEM_COLUMNS, ProblemColumns)
        answers = [
            (column.mode, problem, mark == "1")
            for column in columns.evaluations
            if column.is_final
            for problem, mark in zip(columns.problem_ids, column.correct, strict=True)
        ]
    else:
        rows = directory.read_jsonl(PROBLEMS, ProblemRecord)
        answers = [(row.mode, row.problem_id, row.correct) for row in rows if row.split_is_final]
    results: dict[Mode, dict[str, bool]] = {mode: {} for mode in MODES}
    for mode, problem, correct in answers:
        if problem in results[mode]:
            raise ComparisonError(f"{directory.path}: problem {problem!r} is there twice ({mode})")
        results[mode][problem] = correct
    for mode in MODES:
        if not results[mode]:
            raise ComparisonError(f"{directory.path} has no final {mode} results")
    return results
