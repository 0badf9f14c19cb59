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
ALARMS = "alarms.jsonl"
PREFLIGHT = "preflight.json"
PROBLEM_COLUMNS = "problems.json"
INVALID = "invalid.json"
ROBUSTNESS = "robustness.jsonl"

Mode = Literal["clean", "emulated"]
MODES: tuple[Mode, ...] = get_args(Mode)
State = Literal["running", "interrupted", "finished", "failed"]


class Record(BaseModel):
    """A frozen record; a key that its type does not know is refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Mismatch(Record):
    """How far the loss's policy is from the one that sampled: log p(loss) - log p(rollout) over a step's tokens.

    `k1` and `k3` estimate KL(rollout || loss); `beyond` is the share of tokens whose ratio exceeds the limit.
    """

    mean: float
    std: float
    max: float
    k1: float
    k3: float
    beyond: float


class StepMetrics(Record):
    """One line of metrics.jsonl: what one step of training did.

    `truncated` is the share of completions that were cut off. Of its tokens: how many counted in the loss, the mean
    entropy in nats, the share that the clip cut, the KL to the policy that training began with, and the mismatch.
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
    truncated: float | None = None
    tokens: int | None = None
    entropy: float | None = None
    clipped: float | None = None
    kl: float | None = None
    mismatch: Mismatch | None = None
    nonfinite: dict[str, str] | None = None


class Alarm(Record):
    """One line of alarms.jsonl: a rule that held for as many steps on end as its patience is, `step` being the last."""

    step: int
    rule: str
    value: float
    threshold: float
    sign: str


class Preflight(Record):
    """preflight.json: what the first rollout says of whether the run can learn, before anything is trained.

    Attributes:
        completions, groups: that were sampled.
        accuracy: mean reward by the strict scorer.
        flexible: the same by the flexible one.
        informative: share of the groups whose answers differ.
        reward_sd: mean over groups of the standard deviation of the reward within.
        truncated: share of the completions that did not end.
    """

    completions: int
    groups: int
    accuracy: float
    flexible: float
    informative: float
    reward_sd: float
    truncated: float


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


class AnswerColumn(Record):
    """One evaluation in one mode: for each problem, in their order, "1" where it was solved, else "0"."""

    step: int
    is_final: bool
    mode: Mode
    correct: str


class ProblemColumns(Record):
    """problems.json of an archived run: its problems.jsonl without the texts of completions and answers."""

    problem_ids: tuple[str, ...]
    evaluations: tuple[AnswerColumn, ...]


class Invalid(Record):
    """invalid.json: why a run no longer counts, and since which version or revision that is known."""

    reason: str
    since: str


class RobustnessPoint(Record):
    """One line of robustness.jsonl: adapters evaluated once, under a profile that the record names.

    `profile` and `fingerprint` are of the hardware below the noise, `evaluated_under` is the fingerprint of both
    together. `noise` is the sigma that was added to linear layers; `requested` and `realised` are what these layers'
    receipts say of their whole miss, as root mean squares. `answers` and `logits` are SHA-256 (16 hex digits) of the
    completions, and of the bits of the logits of the first prompts. `as_recorded` says whether the completions are
    those of the run's own final evaluation; None where the point is another evaluation than that.
    """

    adapters: str
    step: int
    merged: bool
    trained_under: str
    trained_fingerprint: str
    profile: str
    fingerprint: str
    evaluated_under: str
    noise: float
    seed: int
    draws_anything: bool
    score: Score
    sites: int
    noisy_sites: int
    requested: float | None
    realised: float | None
    answers: str
    logits: str
    as_recorded: bool | None
    revision: str | None

    @property
    def key(self) -> tuple[object, ...]:
        """What a point is: two with one key are the same evaluation."""
        return (self.adapters, self.merged, self.evaluated_under, self.seed, self.score.n)
