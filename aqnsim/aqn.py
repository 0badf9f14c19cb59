"""Adaptive quantization noise (AQN): Gaussian noise on norm weights, with a sigma that a schedule decays.

After QeRL (arXiv 2510.11696). In a norm's forward the weight ``w`` is ``w + sigma z``, in fp32, with ``z`` a standard
normal of (seed, site, step, channel): the parameter itself is never written. Schedules are pure functions of the step.

>>> KStage(sigma_start=0.05, sigma_end=0.0005, stages=10).sigma(3, 29)
0.05
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from aqnsim._errors import ConfigError, unknown

TARGETS = ("rmsnorm",)
PHASES = ("rollout", "train", "eval", "reference")


def _check_size(what: str, sigma: float) -> None:
    if not (isinstance(sigma, (int, float)) and math.isfinite(sigma) and sigma > 0):
        raise ConfigError(f"{what} must be a finite number > 0, got {sigma!r}")


def _check_decay(name: str, start: float, end: float) -> None:
    _check_size(f"{name}: sigma_start", start)
    _check_size(f"{name}: sigma_end", end)
    if end > start:
        raise ConfigError(f"{name}: sigma_end ({end}) must not exceed sigma_start ({start}): AQN decays")


def _check_position(step: int, total: int) -> None:
    if total <= 0 or step < 0:
        raise ConfigError(f"expected 0 <= step and 0 < total_steps, got step {step} of {total}")


def _geometric(start: float, end: float, index: int, last: int) -> float:
    return start if last == 0 else start * (end / start) ** (index / last)


@dataclass(frozen=True)
class Schedule:
    """Sigma as a function of the step."""

    def sigma(self, step: int, total_steps: int) -> float:
        """The standard deviation for the rollouts of ``step`` (from 0) of ``total_steps``."""
        raise NotImplementedError

    def check(self, total_steps: int) -> None:
        """Refuse a run in which the noise would never act.

        Raises:
            ConfigError: sigma is 0 at every step.
        """
        if not any(self.sigma(t, total_steps) > 0 for t in range(total_steps)):
            raise ConfigError(
                f"{self} is 0 at every one of {total_steps} steps: the run would ask for noise and get none; "
                "use more steps or fewer stages"
            )


@dataclass(frozen=True)
class Constant(Schedule):
    """The same sigma at every step."""

    value: float

    def __post_init__(self) -> None:
        _check_size("Constant: sigma", self.value)

    def sigma(self, step: int, total_steps: int) -> float:
        _check_position(step, total_steps)
        return self.value


@dataclass(frozen=True)
class KStage(Schedule):
    """QeRL's staircase: ``stages`` equal intervals, the first without noise, the others geometric.

    With K stages and T steps, ``j = floor(min(t, T) K / T)``; ``j = 0`` gives 0, else
    ``sigma_start (sigma_end / sigma_start)^((j - 1) / (K - 2))``, where j is at most K - 1.

    Raises:
        ConfigError: fewer than 3 stages (the formula divides by K - 2), sigma_end > sigma_start, a sigma not > 0.
    """

    sigma_start: float
    sigma_end: float
    stages: int

    def __post_init__(self) -> None:
        _check_decay("KStage", self.sigma_start, self.sigma_end)
        if self.stages < 3:
            raise ConfigError(
                f"KStage: needs at least 3 stages, got {self.stages}: one is the warm-up without noise, "
                "and the decay runs over the others"
            )

    def sigma(self, step: int, total_steps: int) -> float:
        _check_position(step, total_steps)
        j = min(step, total_steps) * self.stages // total_steps
        if j == 0:
            return 0.0
        last = self.stages - 2
        return _geometric(self.sigma_start, self.sigma_end, min(j - 1, last), last)


@dataclass(frozen=True)
class EpochAware(Schedule):
    """A staircase inside each epoch, the epochs' boundaries geometric.

    With E epochs of N steps and S stages an epoch, ``b_i = sigma_start (sigma_end / sigma_start)^(i / E)``. Inside
    epoch e, ``u = t mod N`` and ``j = floor(u (S + 1) / N)``: ``j = 0`` gives 0 (each epoch warms up again), else
    ``b_e (b_{e+1} / b_e)^((j - 1) / (S - 1))``. With ``warmup=False`` the S stages fill the epoch.

    Raises:
        ConfigError: no stage, no epoch, sigma_end > sigma_start, a sigma not > 0.
    """

    sigma_start: float
    sigma_end: float
    stages_per_epoch: int
    epochs: int = 1
    warmup: bool = True

    def __post_init__(self) -> None:
        _check_decay("EpochAware", self.sigma_start, self.sigma_end)
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
        if j < 0:
            return 0.0
        ratio = self.sigma_end / self.sigma_start
        start, end = (self.sigma_start * ratio ** (i / self.epochs) for i in (epoch, epoch + 1))
        last = self.stages_per_epoch - 1
        return _geometric(start, end, min(j, last), last)


_LAYER = re.compile(r"(?:^|\.)(?:layers|layer|blocks|h)\.(\d+)\.")


def layer_of(site: str) -> int | None:
    """The layer's index in a module path, or None where there is none (such as the final norm).

    >>> layer_of("model.layers.14.input_layernorm"), layer_of("model.norm")
    (14, None)
    """
    match = _LAYER.search(site)
    return int(match[1]) if match else None


@dataclass(frozen=True)
class AQN:
    """What noise, where and when.

    Attributes:
        schedule: sigma by step.
        targets: kind of module; ``rmsnorm``.
        multipliers: factor on sigma by layer index.
        default_multiplier: factor for all other sites; 0 leaves them alone.
        phases: where the noise acts: the rollout only, by default.

    Raises:
        ConfigError: a multiplier that is negative or not finite, no phase.
        UnknownNameError: a target or phase that does not exist.
    """

    schedule: Schedule
    targets: str = "rmsnorm"
    multipliers: Mapping[int, float] = field(default_factory=dict)
    default_multiplier: float = 1.0
    phases: tuple[str, ...] = ("rollout",)

    def __post_init__(self) -> None:
        if self.targets not in TARGETS:
            raise unknown("AQN target", self.targets, TARGETS)
        if not self.phases:
            raise ConfigError("AQN: phases is empty: the noise would never act")
        for phase in self.phases:
            if phase not in PHASES:
                raise unknown("phase", phase, PHASES)
        for index in self.multipliers:
            if not isinstance(index, int) or index < 0:
                raise ConfigError(f"AQN: a multiplier's layer index must be an integer >= 0, got {index!r}")
        for layer, m in [*self.multipliers.items(), ("default", self.default_multiplier)]:
            if not (math.isfinite(m) and m >= 0):
                raise ConfigError(f"AQN: the multiplier of layer {layer} must be finite and >= 0, got {m!r}")

    def multiplier(self, site: str) -> float:
        """The factor on sigma for a site."""
        layer = layer_of(site)
        if layer is None:
            return self.default_multiplier
        return self.multipliers.get(layer, self.default_multiplier)
