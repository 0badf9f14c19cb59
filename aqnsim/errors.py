"""Error models: how an op misses the right answer. The standard library only.

An error model is a frozen dataclass with a canonical text, which profiles, ops, receipts and fingerprints share:

>>> str(RelativeGaussian(0.05))
'relative-gaussian(sigma=0.05)'
>>> parse("relative-gaussian(sigma=0.05)") == RelativeGaussian(0.05)
True

The exceptions of the package stand here too, under the names that callers catch.
"""

from __future__ import annotations

import ast
import dataclasses
import math
from collections.abc import Callable
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

__all__ = [
    "MODELS",
    "AbsoluteGaussian",
    "AqnsimError",
    "BackendError",
    "ConfigError",
    "ErrorModel",
    "RealisationError",
    "RelativeGaussian",
    "UnknownNameError",
    "did_you_mean",
    "parse",
]

MODELS: dict[str, type[ErrorModel]] = {}
"""Every error model by its kind."""

T = TypeVar("T", bound="type[ErrorModel]")


def _register(kind: str) -> Callable[[T], T]:
    def add(cls: T) -> T:
        cls.kind = kind
        MODELS[kind] = cls
        return cls

    return add


@dataclass(frozen=True)
class ErrorModel:
    """What an op's output misses; ``z`` below is a standard normal of the element's logical coordinates."""

    kind: ClassVar[str]

    def __str__(self) -> str:
        fields = ", ".join(f"{f.name}={getattr(self, f.name)!r}" for f in dataclasses.fields(self))
        return f"{self.kind}({fields})"


@dataclass(frozen=True)
class _Gaussian(ErrorModel):
    sigma: float

    def __post_init__(self) -> None:
        if not (isinstance(self.sigma, (int, float)) and math.isfinite(self.sigma) and self.sigma >= 0):
            raise ConfigError(f"{type(self).__name__}: sigma must be a finite number >= 0, got {self.sigma!r}")


@_register("relative-gaussian")
@dataclass(frozen=True)
class RelativeGaussian(_Gaussian):
    """``y' = y + sigma z |y|``: each output misses by a share of itself.

    Raises:
        ConfigError: sigma is negative, NaN or infinite.
    """


@_register("absolute-gaussian")
@dataclass(frozen=True)
class AbsoluteGaussian(_Gaussian):
    """``y' = y + sigma z``.

    Raises:
        ConfigError: sigma is negative, NaN or infinite.
    """


@lru_cache(maxsize=4096)
def parse(text: str) -> ErrorModel:
    """The error model of a canonical text such as ``relative-gaussian(sigma=0.05)``.

    Raises:
        ConfigError: the text is not ``kind(field=number, ...)``, or a field is missing or unknown.
        UnknownNameError: no such kind.
    """
    expected = f"error model {text!r}: expected kind(field=number, ...), such as {RelativeGaussian(0.05)}"
    kind, paren, rest = text.partition("(")
    if not paren or not rest.endswith(")"):
        raise ConfigError(expected)
    if kind not in MODELS:
        raise unknown("error model", kind, MODELS)
    try:
        call = ast.parse(f"f({rest}", mode="eval").body
        assert isinstance(call, ast.Call)
        fields = {str(k.arg): ast.literal_eval(k.value) for k in call.keywords}
    except (SyntaxError, ValueError, AssertionError) as error:
        raise ConfigError(expected) from error
    known = [f.name for f in dataclasses.fields(MODELS[kind])]
    if call.args or sorted(fields) != sorted(known):
        raise ConfigError(f"{expected}; {kind} takes exactly: {', '.join(known)}")
    return MODELS[kind](**fields)
