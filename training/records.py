"""What a run writes and its readers read: one type for each kind of record."""

from __future__ import annotations

from typing import Literal, Self, get_args

from pydantic import BaseModel, ConfigDict

from training.statistics import wilson

METRICS = "metrics.jsonl"
RECEIPTS = "receipts.jsonl"
FINAL_RECEIPTS = "receipts.json"
PROBLEMS = "problems.jsonl"
EVALUATION = "evaluation.json"
PROBLEM_COLUMNS = "problems.json"
INVALID = "invalid.json"

Mode = Literal["clean", "emulated"]
MODES: tuple[Mode, ...] = get_args(Mode)
State = Literal["running", "interrupted", "finished", "failed"]


class Record(BaseModel):
    """A frozen record; a key that its type does not know is refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class StepMetrics(Record):
    """One line of metrics.jsonl: what one step of training did.

    `nonfinite` names the values that were NaN or infinite and are stored as null.
    """

    step: int
    reward: float | None
    accuracy: float | None
    sigma_requested: float | None
    sigma_realised: float | None
    kept_groups: int
    generation_batches: int
    starved: bool
    loss: float | None
    grad_norm: float | None
    completion_length: float | None
    seconds: float
    nonfinite: dict[str, str] | None = None


class ProblemRecord(Record):
    """One line of problems.jsonl: the answer to one held-out problem in one evaluation."""

    step: int
    split_is_final: bool
    mode: Mode
    problem_id: str
    correct: bool
    completion: str
    answer: str


class Score(Record):
    """An accuracy (0 to 1) with its 95 % Wilson interval."""

    accuracy: float
    correct: int
    n: int
    wilson: tuple[float, float]

    @classmethod
    def of(cls, correct: int, n: int) -> Self:
        """The score of `correct` right answers to `n` problems."""
        interval = wilson(correct, n)
        return cls(accuracy=correct / n, correct=correct, n=n, wilson=(interval.low, interval.high))


class Evaluation(Record):
    """evaluation.json: the scores of one evaluation, and under which profile it was made."""

    step: int
    is_final: bool
    clean: Score
    emulated: Score
    profile: str
    fingerprint: str

    def score(self, mode: Mode) -> Score:
        """The score of one mode."""
        return self.clean if mode == "clean" else self.emulated


class Run(Record):
    """run.json: how the run was started. `command` holds the arguments after `-m training`."""

    created: str
    command: tuple[str, ...]
    seed: int
    processes: int
    profile: str
    fingerprint: str


class Status(Record):
    """status.json: where the run stands; a failed one says why."""

    state: State
    message: str | None
    time: str


class Resume(Record):
    """One line of resumes.jsonl: from which step, and what had changed in the environment."""

    step: int | None
    time: str
    changed: dict[str, tuple[str | None, str | None]]


class Invalid(Record):
    """invalid.json: why a run no longer counts, and since which version or revision that is known."""

    reason: str
    since: str
