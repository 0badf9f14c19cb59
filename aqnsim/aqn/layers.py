"""Layers: their index in a module's path, factors on sigma by layer, zones of layers."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypedDict

from aqnsim._errors import ConfigError
from aqnsim.aqn.schedules import Schedule, is_size

_LAYER = re.compile(r"(?:^|\.)(?:layers|layer|blocks|h)\.(\d+)\.")


def layer_of(site: str) -> int | None:
    """The layer's index in a module path, or None where there is none (such as the final norm).

    >>> layer_of("model.layers.14.input_layernorm"), layer_of("model.norm")
    (14, None)
    """
    match = _LAYER.search(site)
    return int(match[1]) if match else None


def _is_layer(index: object) -> bool:
    return isinstance(index, int) and not isinstance(index, bool) and index >= 0


# ---- factors by layer -----------------------------------------------------------------------------------------------


class Factors(TypedDict):
    """Two arguments of :class:`aqnsim.AQN`: ``AQN(schedule, **factors)``."""

    multipliers: dict[int, float]
    default_multiplier: float


def check_factors(multipliers: Mapping[int, float], default_multiplier: float) -> None:
    """Refuse what is no factor on sigma, or no layer.

    Raises:
        ConfigError: an index that is no integer >= 0, a factor that is negative or not finite.
    """
    for index in multipliers:
        if not _is_layer(index):
            raise ConfigError(f"AQN: a multiplier's layer index must be an integer >= 0, got {index!r}")
    for layer, m in [*multipliers.items(), ("default", default_multiplier)]:
        if not is_size(m, zero=True):
            raise ConfigError(f"AQN: the multiplier of layer {layer} must be finite and >= 0, got {m!r}")


def variable(multipliers: Mapping[int, float], default_multiplier: float = 1.0) -> Factors:
    """Each layer its own factor; layers that are not named, and sites without a layer, take the default.

    Raises:
        ConfigError: an index that is no integer >= 0, a factor that is negative or not finite.

    >>> variable({14: 1.5})
    {'multipliers': {14: 1.5}, 'default_multiplier': 1.0}
    """
    check_factors(multipliers, default_multiplier)
    return {"multipliers": dict(multipliers), "default_multiplier": default_multiplier}


def targeted(layers: Iterable[int]) -> Factors:
    """1 on these layers, 0 elsewhere: the final norm gets none either.

    Raises:
        ConfigError: no layer, or an index that is no integer >= 0.

    >>> targeted([14, 15])
    {'multipliers': {14: 1.0, 15: 1.0}, 'default_multiplier': 0.0}
    """
    multipliers = dict.fromkeys(layers, 1.0)
    if not multipliers:
        raise ConfigError("targeted: no layer is given: no noise would be injected")
    return variable(multipliers, 0.0)


def inverse(multipliers: Mapping[int, float], default_multiplier: float = 1.0) -> Factors:
    """``m' = 2 - m``, for the default too: what had more than the schedule's sigma has as much less.

    Raises:
        ConfigError: a factor above 2, whose inverse would be negative.

    >>> inverse({14: 1.25, 15: 0.5})
    {'multipliers': {14: 0.75, 15: 1.5}, 'default_multiplier': 1.0}
    """
    check_factors(multipliers, default_multiplier)
    for layer, m in [*multipliers.items(), ("default", default_multiplier)]:
        if m > 2:
            raise ConfigError(f"inverse: the multiplier of layer {layer} is {m}, and 2 - {m} is negative; at most 2")
    return variable({layer: 2 - m for layer, m in multipliers.items()}, 2 - default_multiplier)


def ceiling(multipliers: Mapping[int, float], default_multiplier: float = 1.0) -> Factors:
    """``m' = m / max m``, the default included: no site gets more than the schedule's sigma.

    Raises:
        ConfigError: every factor is 0.

    >>> ceiling(**inverse({14: 1.0, 15: 0.75}))
    {'multipliers': {14: 0.8, 15: 1.0}, 'default_multiplier': 0.8}
    """
    check_factors(multipliers, default_multiplier)
    highest = max([*multipliers.values(), default_multiplier])
    if highest == 0:
        raise ConfigError("ceiling: every multiplier is 0: no noise would be injected")
    return variable({layer: m / highest for layer, m in multipliers.items()}, default_multiplier / highest)


# ---- zones ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Zone:
    """Layers ``first`` to ``last``, both included, with a schedule of their own or a factor on the common one.

    Raises:
        ConfigError: no such range, neither or both of schedule and multiplier, a multiplier that is no factor.

    >>> 6 in Zone(6, 22, multiplier=0.5), 23 in Zone(6, 22, multiplier=0.5)
    (True, False)
    """

    first: int
    last: int
    schedule: Schedule | None = None
    multiplier: float | None = None

    def __post_init__(self) -> None:
        if not (_is_layer(self.first) and _is_layer(self.last) and self.first <= self.last):
            raise ConfigError(f"Zone: expected layers 0 <= first <= last, got {self.first!r} to {self.last!r}")
        if (self.schedule is None) == (self.multiplier is None):
            raise ConfigError(
                f"Zone {self.first} to {self.last}: give either a schedule of its own or a multiplier, "
                f"got schedule={self.schedule!r}, multiplier={self.multiplier!r}"
            )
        if self.schedule is not None and not isinstance(self.schedule, Schedule):
            raise ConfigError(f"Zone {self.first} to {self.last}: expected a schedule, got {self.schedule!r}")
        if self.multiplier is not None and not is_size(self.multiplier, zero=True):
            raise ConfigError(
                f"Zone {self.first} to {self.last}: the multiplier must be finite and >= 0, got {self.multiplier!r}"
            )

    def __contains__(self, layer: int) -> bool:
        return self.first <= layer <= self.last

    @property
    def layers(self) -> range:
        return range(self.first, self.last + 1)


def check_zones(zones: Sequence[Zone], multipliers: Mapping[int, float]) -> None:
    """Refuse zones that overlap or do not ascend, and a layer with both a zone and a multiplier.

    Raises:
        ConfigError: see above; a multiplier inside a zone would have no effect.
    """
    for below, above in itertools.pairwise(zones):
        if above.first <= below.last:
            raise ConfigError(
                f"AQN: zones must ascend and not overlap, but {above.first} to {above.last} follows "
                f"{below.first} to {below.last}"
            )
    if both := sorted(layer for layer in multipliers if any(layer in zone for zone in zones)):
        raise ConfigError(f"AQN: layers {both} have a zone and a multiplier, which would have no effect: give one")
