"""Named rules that say when a run goes wrong, each with a threshold from the experiment's [alarms]."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from aqnsim._errors import AqnsimError
from training.records import Alarm, StepMetrics
from training.tables import Alarms


class AlarmError(AqnsimError):
    """A run that was to stop at its first alarm, and had one."""


@dataclass(frozen=True)
class Rule:
    """What is looked at, which key of [alarms] bounds it, on which side, and what it is a sign of."""

    value: Callable[[Watch, StepMetrics], float | None]
    key: str
    above: bool
    sign: str

    def breaks(self, value: float, threshold: float) -> bool:
        """Whether a value is beyond the threshold."""
        return value > threshold if self.above else value < threshold


RULES = {
    "entropy-collapse": Rule(lambda w, m: m.entropy, "entropy_low", False, "the policy answers with certainty"),
    "entropy-explosion": Rule(lambda w, m: m.entropy, "entropy_high", True, "the policy answers at random"),
    "clipping": Rule(lambda w, m: m.clipped, "clipped", True, "most updates are cut: lower the learning rate"),
    "truncation": Rule(lambda w, m: m.truncated, "truncated", True, "answers do not end: raise max_new_tokens"),
    "length-collapse": Rule(lambda w, m: w.of_first_length(m), "length_drop", False, "answers became empty"),
    "uninformative": Rule(lambda w, m: w.uninformative(m), "uninformative", True, "no group differs in its answers"),
    "reward-collapse": Rule(lambda w, m: w.below_best(), "reward_drop", True, "what was learnt is lost"),
    "kl-explosion": Rule(lambda w, m: m.kl, "kl", True, "the policy left the one that training began with"),
    "mismatch": Rule(
        lambda w, m: m.mismatch.k3 if m.mismatch else None, "mismatch", True, "rollout and loss are two policies"
    ),
}
"""Every rule by its name."""


@dataclass
class Watch:
    """Looks at each step; a rule that held for `patience` steps on end gives one alarm, and no other before it let go.

    Args:
        alarms: thresholds.
        prompts_per_step: groups of a generation batch.

    >>> from training.tables import Alarms
    >>> watch = Watch(Alarms(patience=2, entropy_low=0.1), prompts_per_step=8)
    >>> row = dict(reward=0.5, accuracy=0.5, sigma_requested=None, sigma_realised=None, kept_groups=4, starved=False)
    >>> row |= dict(generation_batches=1, loss=0.0, grad_norm=1.0, completion_length=5.0, seconds=1.0)
    >>> for step, entropy in enumerate([0.2, 0.05, 0.04, 0.03], start=1):
    ...     found = list(watch.look(StepMetrics(step=step, entropy=entropy, **row)))
    ...     print(step, [a.rule for a in found])
    1 []
    2 []
    3 ['entropy-collapse']
    4 []
    """

    alarms: Alarms
    prompts_per_step: int
    held: dict[str, int] = field(default_factory=dict)
    first_length: float | None = None
    best: float | None = None
    rewards: deque[float] = field(default_factory=deque)

    def look(self, metrics: StepMetrics) -> Iterator[Alarm]:
        """The alarms that a step gives."""
        if self.first_length is None:
            self.first_length = metrics.completion_length
        if metrics.reward is not None:
            self.rewards.append(metrics.reward)
        if len(self.rewards) > self.alarms.patience:
            self.rewards.popleft()
        for name, rule in RULES.items():
            value, threshold = rule.value(self, metrics), float(getattr(self.alarms, rule.key))
            broken = value is not None and rule.breaks(value, threshold)
            self.held[name] = self.held.get(name, 0) + 1 if broken else 0
            if self.held[name] == self.alarms.patience and value is not None:
                yield Alarm(step=metrics.step, rule=name, value=value, threshold=threshold, sign=rule.sign)

    def of_first_length(self, metrics: StepMetrics) -> float | None:
        """Mean length over that of the first step."""
        if not self.first_length or metrics.completion_length is None:
            return None
        return metrics.completion_length / self.first_length

    def uninformative(self, metrics: StepMetrics) -> float:
        """Share of the sampled groups whose answers all agree, or were not needed."""
        return 1 - metrics.kept_groups / (metrics.generation_batches * self.prompts_per_step)

    def below_best(self) -> float | None:
        """How far the mean of the last rewards lies below the best such mean."""
        if len(self.rewards) < self.alarms.patience:
            return None
        mean = sum(self.rewards) / len(self.rewards)
        self.best = mean if self.best is None else max(self.best, mean)
        return self.best - mean
