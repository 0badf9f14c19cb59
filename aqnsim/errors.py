"""Error models: how an op misses the right answer. The standard library only.

An error model is a frozen dataclass with a canonical text, which profiles, ops, receipts and fingerprints share. Fields
that have their default are not spelt:

>>> str(RelativeGaussian(0.05)), str(Spike(rate=1e-6, size=100, draw="frozen"))
('relative-gaussian(sigma=0.05)', 'spike(rate=1e-06, size=100.0, draw=frozen)')
>>> parse("relative-gaussian(sigma=0.05)") == RelativeGaussian(0.05)
True

A chain is one or several models, applied in order in fp32; its text joins theirs by " + ".

>>> chain("relative-gaussian(sigma=0.05) + saturation(limit=448)")
(RelativeGaussian(sigma=0.05, reference='output', draw='per_phase'), Saturation(limit=448.0))

The exceptions of the package stand here too, under the names that callers catch.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar, TypeVar

from aqnsim._errors import (
    AqnsimError,
    BackendError,
    ConfigError,
    RealisationError,
    UnknownNameError,
    did_you_mean,
    unknown,
)
from aqnsim.rng import DRAWS

__all__ = [
    "MODELS",
    "AbsoluteGaussian",
    "AqnsimError",
    "BackendError",
    "BitFlip",
    "ConfigError",
    "DeadZone",
    "ErrorModel",
    "RealisationError",
    "RelativeGaussian",
    "Saturation",
    "Spike",
    "Stuck",
    "SystematicBias",
    "UnknownNameError",
    "chain",
    "chain_text",
    "did_you_mean",
    "parse",
    "rate_of",
    "sigma_of",
]

MODELS: dict[str, type[ErrorModel]] = {}
"""Every error model by its kind."""

REFERENCES = ("output", "absdot")
TARGETS = ("value", "codes", "scales")

_FLOAT32_MAX = 3.4028234663852886e38
_SPELT = re.compile(r"\s*([\w-]+)\s*\(([^()]*)\)\s*\Z")
_PLUS = re.compile(r"(?<=\))\s*\+\s*")  # after a bracket: an exponent may have a plus of its own

T = TypeVar("T", bound="type[ErrorModel]")


def _register(kind: str) -> Callable[[T], T]:
    def add(cls: T) -> T:
        cls.kind = kind
        MODELS[kind] = cls
        return cls

    return add


@dataclass(frozen=True)
class ErrorModel:
    """What an op's output misses; ``z`` below is a standard normal of the element's logical coordinates.

    Infinities and NaNs pass unchanged. A field ``draw``, one of :data:`aqnsim.rng.DRAWS`, says how often the model
    draws anew; a model without one draws nothing.
    """

    kind: ClassVar[str]

    def __str__(self) -> str:
        spelt = [f"{f.name}={getattr(self, f.name)}" for f in dataclasses.fields(self) if self._differs(f)]
        return f"{self.kind}({', '.join(spelt)})"

    def _differs(self, field: dataclasses.Field[object]) -> bool:
        return bool(getattr(self, field.name) != field.default)  # a field without one differs from MISSING

    def _number(self, field: str, expected: str = "", allows: Callable[[float], bool] = lambda _: True) -> None:
        """Hold a field as a float, with one zero: equal models have one text."""
        value = getattr(self, field)
        number = isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= _FLOAT32_MAX
        if not (number and allows(value)):
            raise ConfigError(
                f"{self.kind}: {field} must be a finite number{expected}, got {value!r} (float32 ends at 3.4e38)"
            )
        object.__setattr__(self, field, float(value) + 0.0)

    def _integer(self, field: str, low: int, high: int) -> None:
        value = getattr(self, field)
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            raise ConfigError(f"{self.kind}: {field} must be an integer in {low}..{high}, got {value!r}")

    def _choice(self, field: str, choices: Sequence[str]) -> None:
        if getattr(self, field) not in choices:
            raise unknown(f"{field} of {self.kind}", getattr(self, field), choices)


@_register("relative-gaussian")
@dataclass(frozen=True)
class RelativeGaussian(ErrorModel):
    """``y' = y + sigma z |y|``, or ``y + sigma z m`` with ``m = |A| @ |B|`` of a product for ``reference=absdot``.

    The first misses by a share of the result, the second by a share of what was added up to it.

    Raises:
        ConfigError: sigma is negative, NaN or infinite.
        UnknownNameError: no such reference or draw.
    """

    sigma: float
    reference: str = "output"
    draw: str = "per_phase"

    def __post_init__(self) -> None:
        self._number("sigma", " >= 0", lambda v: v >= 0)
        self._choice("reference", REFERENCES)
        self._choice("draw", DRAWS)


@_register("absolute-gaussian")
@dataclass(frozen=True)
class AbsoluteGaussian(ErrorModel):
    """``y' = y + sigma z``.

    Raises:
        ConfigError: sigma is negative, NaN or infinite.
        UnknownNameError: no such draw.
    """

    sigma: float
    draw: str = "per_phase"

    def __post_init__(self) -> None:
        self._number("sigma", " >= 0", lambda v: v >= 0)
        self._choice("draw", DRAWS)


@_register("systematic-bias")
@dataclass(frozen=True)
class SystematicBias(ErrorModel):
    """``y' = y + (gain y + offset)``.

    Raises:
        ConfigError: gain or offset is not finite, or both are 0.
    """

    gain: float = 0.0
    offset: float = 0.0

    def __post_init__(self) -> None:
        self._number("gain")
        self._number("offset")
        if self.gain == self.offset == 0:
            raise ConfigError(f"{self.kind}: gain and offset are both 0, which changes nothing: give one of them")


@_register("dead-zone")
@dataclass(frozen=True)
class DeadZone(ErrorModel):
    """``y' = +0`` where ``|y| < threshold``.

    Raises:
        ConfigError: threshold is not finite or not above 0.
    """

    threshold: float

    def __post_init__(self) -> None:
        self._number("threshold", " > 0", lambda v: v > 0)


@_register("saturation")
@dataclass(frozen=True)
class Saturation(ErrorModel):
    """``y' = max(-limit, min(y, limit))``.

    Raises:
        ConfigError: limit is not finite or not above 0.
    """

    limit: float

    def __post_init__(self) -> None:
        self._number("limit", " > 0", lambda v: v > 0)


class _Rated(ErrorModel):
    """A model that hits each element with a probability."""

    rate: float

    def _check_rate(self) -> None:
        self._number("rate", " in 2^-32..1", lambda v: 2**-32 <= v <= 1)

    @property
    def last_hit(self) -> int:
        """An element is hit where its 32-bit random word is at most this: ``rate * 2^32``, rounded, of 2^32 words."""
        return round(self.rate * 2**32) - 1


@_register("spike")
@dataclass(frozen=True)
class Spike(_Rated):
    """``y' = size z`` with probability ``rate``.

    Raises:
        ConfigError: rate is not in 2^-32 .. 1, or size not finite or not above 0.
        UnknownNameError: no such draw.
    """

    rate: float
    size: float
    draw: str = "per_phase"

    def __post_init__(self) -> None:
        self._check_rate()
        self._number("size", " > 0", lambda v: v > 0)
        self._choice("draw", DRAWS)


@_register("stuck")
@dataclass(frozen=True)
class Stuck(_Rated):
    """``y' = value`` with probability ``rate``, decided for each element, or for ``column mod lanes`` alone.

    With ``lanes``, all rows share what row 0 would draw: a broken lane of a matrix unit repeats.

    Raises:
        ConfigError: rate is not in 2^-32 .. 1, value not finite, or lanes not in 0 .. 2^31 - 1.
        UnknownNameError: no such draw.
    """

    rate: float
    value: float
    draw: str = "per_phase"
    lanes: int = 0

    def __post_init__(self) -> None:
        self._check_rate()
        self._number("value")
        self._choice("draw", DRAWS)
        self._integer("lanes", 0, 2**31 - 1)


@_register("bit-flip")
@dataclass(frozen=True)
class BitFlip(_Rated):
    """One bit of the stored pattern flips with probability ``rate``; ``bit=-1`` draws which, 0 is the lowest.

    The pattern is that of the output's dtype, after rounding, for ``target=value``; ``codes`` and ``scales`` are those
    of a cast. So it is the last model of a chain.

    Raises:
        ConfigError: rate is not in 2^-32 .. 1, or bit not in -1 .. 31.
        UnknownNameError: no such target or draw.
    """

    rate: float
    bit: int = -1
    target: str = "value"
    draw: str = "per_phase"

    def __post_init__(self) -> None:
        self._check_rate()
        self._integer("bit", -1, 31)
        self._choice("target", TARGETS)
        self._choice("draw", DRAWS)


@lru_cache(maxsize=4096)
def parse(text: str) -> ErrorModel:
    """The error model of a text such as ``relative-gaussian(sigma=0.05)``.

    Raises:
        ConfigError: the text is not ``kind(field=value, ...)``, a field is missing, unknown or given twice, or its
            value cannot be.
        UnknownNameError: no such kind, or no such choice of a field.
    """
    expected = f"error model {text!r}: expected kind(field=value, ...), such as {RelativeGaussian(0.05)}"
    match = _SPELT.match(text)
    if match is None:
        raise ConfigError(expected)
    kind, inner = match.groups()
    if kind not in MODELS:
        raise unknown("error model", kind, MODELS)
    known = {f.name: f for f in dataclasses.fields(MODELS[kind])}
    required = [name for name, f in known.items() if f.default is dataclasses.MISSING]
    pairs = [tuple(s.strip() for s in part.split("=")) for part in inner.split(",")] if inner.strip() else []
    names = [pair[0] for pair in pairs]
    if any(len(pair) != 2 for pair in pairs) or len(set(names)) < len(names):
        raise ConfigError(expected)
    if not set(required) <= set(names) <= set(known):
        optional = ", ".join(name for name in known if name not in required)
        raise ConfigError(f"{expected}; {kind} takes: {', '.join(required)}; optional: {optional or 'nothing'}")
    of_type: dict[object, Callable[[str], object]] = {"float": float, "int": int, "str": str}
    try:
        fields = {name: of_type[known[name].type](value) for name, value in pairs}
    except ValueError as error:
        raise ConfigError(f"{expected}; {error}") from error
    return MODELS[kind](**fields)


@lru_cache(maxsize=4096)
def chain(text: str) -> tuple[ErrorModel, ...]:
    """The models of a text such as ``systematic-bias(gain=0.01) + absolute-gaussian(sigma=0.1)``, in order.

    Raises:
        ConfigError, UnknownNameError: as for :func:`parse`; also a bit flip of the value that is not the last model.
    """
    models = tuple(parse(part) for part in _PLUS.split(text))
    if any(isinstance(m, BitFlip) and m.target == "value" for m in models[:-1]):
        raise ConfigError(f"error {text!r}: bit-flip acts on the stored pattern and must be the last of its chain")
    return models


def chain_text(models: Sequence[ErrorModel]) -> str:
    """The canonical text of a chain.

    >>> chain_text([SystematicBias(gain=0.01), AbsoluteGaussian(0.1)])
    'systematic-bias(gain=0.01) + absolute-gaussian(sigma=0.1)'
    """
    return " + ".join(map(str, models))


def sigma_of(models: Sequence[ErrorModel]) -> float | None:
    """The sigma of a chain that is exactly one Gaussian model; None for any other, whose shift has no one sigma."""
    one = models[0] if len(models) == 1 else None
    return one.sigma if isinstance(one, (RelativeGaussian, AbsoluteGaussian)) else None


def needs_magnitude(models: Sequence[ErrorModel]) -> bool:
    """Whether a model of a chain misses by a share of ``|A| @ |B|``."""
    return any(isinstance(m, RelativeGaussian) and m.reference == "absdot" for m in models)


def rate_of(models: Sequence[ErrorModel]) -> float:
    """Hits that a chain asks for, an element: the sum of the rates of its models; 0 where none has a rate."""
    return sum(m.rate for m in models if isinstance(m, _Rated))
