"""Sigma as a pure function of the step, and the texts of schedules: ``kind(field=value, ...)``."""

from __future__ import annotations

import ast
import dataclasses
import itertools
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple, TypeVar, get_args

from aqnsim._errors import ConfigError, unknown

Points = tuple[tuple[float, float], ...]
"""A staircase: (where it begins, value), ascending, the first at 0."""

Unit = Literal["fraction", "step"]
"""What positions of :data:`Points` count: the share of the run that is over, or steps."""

SCHEDULES: dict[str, type[Schedule]] = {}
"""Every schedule by its kind."""

T = TypeVar("T", bound="type[Schedule]")


def _register(kind: str) -> Callable[[T], T]:
    def add(cls: T) -> T:
        cls.kind = kind
        SCHEDULES[kind] = cls
        return cls

    return add


def is_size(value: object, *, zero: bool = False) -> bool:
    """Whether a value is a finite number above 0, or with ``zero`` at least 0."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    return math.isfinite(value) and (value > 0 or (zero and value == 0))


def _check_size(what: str, sigma: float) -> None:
    if not is_size(sigma):
        raise ConfigError(f"{what} must be a finite number > 0, got {sigma!r}")


def _check_decay(name: str, start: float, end: float) -> None:
    _check_size(f"{name}: sigma_start", start)
    _check_size(f"{name}: sigma_end", end)
    if end > start:
        raise ConfigError(f"{name}: sigma_end ({end}) must not exceed sigma_start ({start}): AQN decays")


def _check_whole(what: str, count: int) -> None:
    if isinstance(count, bool) or not isinstance(count, int):
        raise ConfigError(f"{what} must be an integer, got {count!r}")


def _check_position(step: int, total: int) -> None:
    if total <= 0 or step < 0:
        raise ConfigError(f"expected 0 <= step and 0 < total_steps, got step {step} of {total}")


def _geometric(start: float, end: float, index: int, last: int) -> float:
    return start if last == 0 else start * (end / start) ** (index / last)


def _checked(what: str, points: Points, unit: Unit) -> Points:
    if unit not in get_args(Unit):
        raise unknown(f"unit of {what}", unit, get_args(Unit))
    try:
        points = tuple((position, value) for position, value in points)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{what} must be (position, value) pairs, got {points!r}") from error
    if not all(is_size(number, zero=True) for point in points for number in point):
        raise ConfigError(f"{what} must be pairs of finite numbers >= 0, got {points!r}")
    positions = [position for position, _ in points]
    if not positions or positions[0] != 0:
        raise ConfigError(f"{what} must say what the run begins with: expected the first at 0, got {positions}")
    if any(a >= b for a, b in itertools.pairwise(positions)):
        raise ConfigError(f"{what} must ascend, got positions {positions}")
    if unit == "fraction" and positions[-1] >= 1:
        raise ConfigError(f"{what} are fractions of the run, below 1, got {positions[-1]}; for steps use unit='step'")
    if unit == "step" and any(position != int(position) for position in positions):
        raise ConfigError(f"{what} are whole steps, got {positions}; for fractions of the run use unit='fraction'")
    if not any(value for _, value in points):
        raise ConfigError(f"{what}: every value is 0: the run would ask for noise and get none")
    return points


def _value_at(points: Points, unit: Unit, step: int, total: int) -> float:
    # A division, since the literal 0.07 is 7 / 100 but 0.07 * 100 is above 7.
    position = step / total if unit == "fraction" else step
    return next(value for begin, value in reversed(points) if begin <= position)


class Interval(NamedTuple):
    """Steps ``first`` to ``last``, both included, have one ``sigma``."""

    first: int
    last: int
    sigma: float


@dataclass(frozen=True)
class Schedule:
    """Sigma as a function of the step; past the end of the run it stays what it was at the end."""

    kind: ClassVar[str]

    def sigma(self, step: int, total_steps: int) -> float:
        """The standard deviation for the rollouts of ``step`` (from 0) of ``total_steps``."""
        raise NotImplementedError

    def levels(self) -> tuple[float, ...]:
        """The sigmas above 0 that the schedule declares, in their order."""
        raise NotImplementedError

    def intervals(self, total_steps: int) -> list[Interval]:
        """The run as stretches of equal sigma.

        >>> KStage(sigma_start=0.1, sigma_end=0.01, stages=3).intervals(6)[:2]
        [Interval(first=0, last=1, sigma=0.0), Interval(first=2, last=3, sigma=0.1)]
        """
        found: list[Interval] = []
        for step in range(total_steps):
            sigma = self.sigma(step, total_steps)
            if found and found[-1].sigma == sigma:
                found[-1] = found[-1]._replace(last=step)
            else:
                found.append(Interval(step, step, sigma))
        return found

    def skipped(self, total_steps: int) -> tuple[float, ...]:
        """The declared sigmas that no step of such a run has: it has fewer steps than stages, or ends too early.

        >>> KStage(sigma_start=0.1, sigma_end=0.01, stages=3).skipped(2)
        (0.01,)
        """
        acting = {self.sigma(step, total_steps) for step in range(total_steps)}
        return tuple(level for level in self.levels() if level not in acting)

    def check(self, total_steps: int) -> None:
        """Refuse a run in which the noise would never act.

        A run without some of the sigmas, even the first, passes: short trials of a long schedule are wanted. What
        they leave out :meth:`skipped` tells.

        Raises:
            ConfigError: sigma is 0 at every step.
        """
        if not any(self.sigma(t, total_steps) > 0 for t in range(total_steps)):
            raise ConfigError(
                f"{self} is 0 at every one of {total_steps} steps: the run would ask for noise and get none; "
                "use more steps or fewer stages"
            )

    @property
    def text(self) -> str:
        """The canonical text, which :func:`parse` reads.

        >>> Constant(0.01).text
        'constant(value=0.01)'
        """
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        spelt = (f"{k}={v.text if isinstance(v, Schedule) else repr(v)}" for k, v in fields.items())
        return f"{self.kind}({', '.join(spelt)})"


@_register("constant")
@dataclass(frozen=True)
class Constant(Schedule):
    """The same sigma at every step."""

    value: float

    def __post_init__(self) -> None:
        _check_size("Constant: sigma", self.value)

    def sigma(self, step: int, total_steps: int) -> float:
        _check_position(step, total_steps)
        return self.value

    def levels(self) -> tuple[float, ...]:
        return (self.value,)


@_register("k-stage")
@dataclass(frozen=True)
class KStage(Schedule):
    """QeRL's staircase as its code has it: ``stages`` equal intervals, the first without noise, the others geometric.

    With K stages and T steps, ``j = floor(min(t, T) K / T)``; ``j = 0`` gives 0, else
    ``sigma_start (sigma_end / sigma_start)^((j - 1) / (K - 2))``, where j is at most K - 1. Source: NVlabs/QeRL,
    trl_trainer/noise_scheduler.py. :class:`KStagePaper` is what the paper prints.

    Raises:
        ConfigError: fewer than 3 stages (the formula divides by K - 2), sigma_end > sigma_start, a sigma not > 0.

    >>> [KStage(sigma_start=0.1, sigma_end=0.025, stages=4).sigma(t, 4) for t in range(4)]
    [0.0, 0.1, 0.05, 0.025]
    """

    sigma_start: float
    sigma_end: float
    stages: int

    def __post_init__(self) -> None:
        _check_decay("KStage", self.sigma_start, self.sigma_end)
        _check_whole("KStage: stages", self.stages)
        if self.stages < 3:
            raise ConfigError(
                f"KStage: needs at least 3 stages, got {self.stages}: one is the warm-up without noise, "
                "and the decay runs over the others"
            )

    def sigma(self, step: int, total_steps: int) -> float:
        _check_position(step, total_steps)
        j = min(step, total_steps) * self.stages // total_steps
        return self._level(min(j, self.stages - 1)) if j else 0.0

    def levels(self) -> tuple[float, ...]:
        return tuple(self._level(j) for j in range(1, self.stages))

    def _level(self, j: int) -> float:
        return _geometric(self.sigma_start, self.sigma_end, j - 1, self.stages - 2)


@_register("k-stage-paper")
@dataclass(frozen=True)
class KStagePaper(Schedule):
    """QeRL's staircase as the paper prints it: ``stages`` equal intervals, all with noise.

    ``sigma(k) = sigma_start (sigma_end / sigma_start)^((k - 1) / (K - 1))`` in the stages k = 1 .. K, where
    ``k = floor(min(t, T - 1) K / T) + 1``. Source: arXiv 2510.11696. It differs from :class:`KStage` in
    its first interval, which has no warm-up, and so in the ratio of its stages.

    Raises:
        ConfigError: fewer than 2 stages (the formula divides by K - 1), sigma_end > sigma_start, a sigma not > 0.

    >>> [KStagePaper(sigma_start=0.1, sigma_end=0.025, stages=3).sigma(t, 3) for t in range(3)]
    [0.1, 0.05, 0.025]
    """

    sigma_start: float
    sigma_end: float
    stages: int

    def __post_init__(self) -> None:
        _check_decay("KStagePaper", self.sigma_start, self.sigma_end)
        _check_whole("KStagePaper: stages", self.stages)
        if self.stages < 2:
            raise ConfigError(
                f"KStagePaper: needs at least 2 stages, got {self.stages}: the formula divides by one less; "
                "for one sigma use Constant"
            )

    def sigma(self, step: int, total_steps: int) -> float:
        _check_position(step, total_steps)
        return self._level(min(step, total_steps - 1) * self.stages // total_steps)

    def levels(self) -> tuple[float, ...]:
        return tuple(self._level(i) for i in range(self.stages))

    def _level(self, index: int) -> float:
        return _geometric(self.sigma_start, self.sigma_end, index, self.stages - 1)


@_register("epoch-aware")
@dataclass(frozen=True)
class EpochAware(Schedule):
    """A staircase inside each epoch, the epochs' boundaries geometric.

    With E epochs of N steps and S stages an epoch, ``b_i = sigma_start (sigma_end / sigma_start)^(i / E)``. Inside
    epoch e, ``u = t mod N`` and ``j = floor(u (S + 1) / N)``: ``j = 0`` gives 0 (each epoch warms up again), else
    ``b_e (b_{e+1} / b_e)^((j - 1) / (S - 1))``. With ``warmup=False`` the S stages fill the epoch.

    Raises:
        ConfigError: no stage, no epoch, sigma_end > sigma_start, a sigma not > 0.

    >>> [EpochAware(sigma_start=0.4, sigma_end=0.1, stages_per_epoch=1, epochs=2).sigma(t, 4) for t in range(4)]
    [0.0, 0.4, 0.0, 0.2]
    """

    sigma_start: float
    sigma_end: float
    stages_per_epoch: int
    epochs: int = 1
    warmup: bool = True

    def __post_init__(self) -> None:
        _check_decay("EpochAware", self.sigma_start, self.sigma_end)
        _check_whole("EpochAware: stages_per_epoch", self.stages_per_epoch)
        _check_whole("EpochAware: epochs", self.epochs)
        if not isinstance(self.warmup, bool):
            raise ConfigError(f"EpochAware: warmup must be true or false, got {self.warmup!r}")
        if self.stages_per_epoch < 1 or self.epochs < 1:
            raise ConfigError(
                "EpochAware: needs at least one stage and one epoch, got "
                f"stages_per_epoch={self.stages_per_epoch}, epochs={self.epochs}"
            )

    def sigma(self, step: int, total_steps: int) -> float:
        _check_position(step, total_steps)
        if total_steps % self.epochs:
            raise ConfigError(
                f"EpochAware: {total_steps} steps do not divide into {self.epochs} epochs of equal length"
            )
        length = total_steps // self.epochs
        epoch, u = divmod(min(step, total_steps - 1), length)
        warm = int(self.warmup)
        j = u * (self.stages_per_epoch + warm) // length - warm
        return self._level(epoch, j) if j >= 0 else 0.0

    def levels(self) -> tuple[float, ...]:
        return tuple(self._level(e, j) for e in range(self.epochs) for j in range(self.stages_per_epoch))

    def _level(self, epoch: int, j: int) -> float:
        ratio = self.sigma_end / self.sigma_start
        start, end = (self.sigma_start * ratio ** (i / self.epochs) for i in (epoch, epoch + 1))
        return _geometric(start, end, j, self.stages_per_epoch - 1)


@_register("custom")
@dataclass(frozen=True)
class Custom(Schedule):
    """A staircase of one's own, which may also rise, or pause at 0.

    Attributes:
        points: (position, sigma) pairs, ascending from position 0: each sigma acts from its position to the next.
        unit: what positions are: ``fraction``s of the run, in [0, 1), or ``step``s. A fraction f acts from the first
            step t with t / T >= f.

    Raises:
        ConfigError: positions that do not ascend from 0 or are not of their unit, a sigma below 0, every sigma 0.
        UnknownNameError: another unit.

    >>> [Custom(((0, 0.0), (0.25, 0.1), (0.5, 0.02))).sigma(t, 4) for t in range(4)]
    [0.0, 0.1, 0.02, 0.02]
    """

    points: Points
    unit: Unit = "fraction"

    def __post_init__(self) -> None:
        object.__setattr__(self, "points", _checked("Custom: points", self.points, self.unit))

    def sigma(self, step: int, total_steps: int) -> float:
        _check_position(step, total_steps)
        return _value_at(self.points, self.unit, step, total_steps)

    def levels(self) -> tuple[float, ...]:
        return tuple(sigma for _, sigma in self.points if sigma)


@_register("scaled")
@dataclass(frozen=True)
class Scaled(Schedule):
    """Another schedule times a staircase of factors, such as one half in the second half of the run.

    A zone of layers with it follows the others until it departs from them.

    Attributes:
        schedule: what is scaled.
        factors: (position, factor) pairs, as the points of :class:`Custom`.
        unit: what positions are: ``fraction``s of the run or ``step``s.

    Raises:
        ConfigError: as :class:`Custom`; ``schedule`` is none.

    >>> [Scaled(Constant(0.1), ((0, 1.0), (0.5, 0.5))).sigma(t, 4) for t in range(4)]
    [0.1, 0.1, 0.05, 0.05]
    """

    schedule: Schedule
    factors: Points
    unit: Unit = "fraction"

    def __post_init__(self) -> None:
        if not isinstance(self.schedule, Schedule):
            raise ConfigError(f"Scaled: expected a schedule to scale, got {self.schedule!r}")
        object.__setattr__(self, "factors", _checked("Scaled: factors", self.factors, self.unit))

    def sigma(self, step: int, total_steps: int) -> float:
        return self.schedule.sigma(step, total_steps) * self._factor(step, total_steps)

    def levels(self) -> tuple[float, ...]:
        """The sigmas of what is scaled, before their factors."""
        return self.schedule.levels()

    def skipped(self, total_steps: int) -> tuple[float, ...]:
        steps = range(total_steps)
        acting = {self.schedule.sigma(t, total_steps) for t in steps if self._factor(t, total_steps)}
        return tuple(level for level in self.levels() if level not in acting)

    def _factor(self, step: int, total_steps: int) -> float:
        return _value_at(self.factors, self.unit, step, total_steps)


def parse(text: str) -> Schedule:
    """The schedule of a text such as ``k-stage(sigma_start=0.01, sigma_end=0.0001, stages=10)``.

    Raises:
        ConfigError: the text is not ``kind(field=value, ...)``, or a field is missing, unknown or out of range.
        UnknownNameError: no such kind.

    >>> parse("custom(points=((0, 0.05), (0.5, 0.01)))").sigma(9, 10)
    0.01
    >>> parse("scaled(schedule=constant(value=0.1), factors=((0, 1), (5, 0.5)), unit='step')").sigma(5, 10)
    0.05
    """
    if not isinstance(text, str):
        raise ConfigError(f"expected the text of a schedule, got {text!r}")
    try:
        # Kinds have hyphens, which a name in Python has not.
        tree = ast.parse(re.sub(r"(?<=[a-z])-(?=[a-z])", "_", text.strip()), mode="eval").body
    except SyntaxError as error:
        raise _unreadable(text) from error
    return _built(tree, text)


def _unreadable(text: str) -> ConfigError:
    return ConfigError(f"schedule {text!r}: expected kind(field=value, ...), such as {Constant(0.01).text}")


def _built(call: ast.expr, text: str) -> Schedule:
    if not (isinstance(call, ast.Call) and isinstance(call.func, ast.Name)) or call.args:
        raise _unreadable(text)
    kind = call.func.id.replace("_", "-")
    if kind not in SCHEDULES:
        raise unknown("schedule", kind, SCHEDULES)
    known = {f.name: f.default is dataclasses.MISSING for f in dataclasses.fields(SCHEDULES[kind])}
    values = {str(k.arg): _value(k.value, text) for k in call.keywords}
    if len(values) != len(call.keywords):
        raise ConfigError(f"schedule {text!r}: a field is given twice")
    for name in values:
        if name not in known:
            raise unknown(f"field of schedule {kind!r}", name, known)
    if missing := [name for name, required in known.items() if required and name not in values]:
        raise ConfigError(f"schedule {text!r}: {kind} needs {', '.join(missing)}")
    return SCHEDULES[kind](**values)


def _value(node: ast.expr, text: str) -> object:
    if isinstance(node, ast.Call):
        return _built(node, text)
    try:
        return ast.literal_eval(node)
    except (TypeError, ValueError) as error:
        raise _unreadable(text) from error
