"""Approximations of elementary functions by tables, as data. The standard library only.

Accelerators compute softmax, norms and activations from tables: an exact range reduction, an entry or a line between
two, an exact way back. An :class:`Approximation` holds a :class:`Table` for each function that is not exact, and has a
canonical text; fields that have their default are left out:

>>> both = parse("table(function='exp', index_bits=6, order=1) + table(function='reciprocal', index_bits=7, newton=1)")
>>> str(both)
"table(function='exp', index_bits=6) + table(function='reciprocal', index_bits=7, newton=1)"
>>> both.of("exp")
Table(function='exp', index_bits=6, order=1, newton=0)

:mod:`aqnsim.functions` computes with them; docs/semantics.md has the formulas.
"""

from __future__ import annotations

import ast
import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from aqnsim._errors import ConfigError, unknown
from aqnsim.formats import float32

FUNCTIONS = ("exp", "reciprocal", "rsqrt", "tanh", "erf")
"""The functions that have tables."""

LIMITS = {"tanh": 8.0, "erf": 4.0}
"""The magnitude from which on a function is its limit, 1, for those that are tabulated without a range reduction."""

MAX_INDEX_BITS = 16

_NEWTON = ("reciprocal", "rsqrt")
_ROUNDINGS = 2.0**-22  # the fp32 roundings of an entry, of a line and of a Newton step, each at most 2^-24


@dataclass(frozen=True)
class Table:
    """How one function is computed: ``2^index_bits`` intervals, and what is done within one.

    Attributes:
        function: one of :data:`FUNCTIONS`.
        index_bits: 1 .. 16. The intervals divide: for ``exp`` the fraction f of ``2^f``; for ``reciprocal`` the
            significand in [1, 2); for ``rsqrt`` the significand in [1, 4), half of them to each octave; for ``tanh``
            the magnitudes up to 8; for ``erf`` those up to 4.
        order: 0 for the nearest entry, 1 for the line between two.
        newton: Newton steps after the table, 0 .. 3; ``reciprocal`` and ``rsqrt`` only.

    Raises:
        UnknownNameError: no such function.
        ConfigError: a field out of its range.
    """

    function: str
    index_bits: int
    order: int = 1
    newton: int = 0

    def __post_init__(self) -> None:
        if self.function not in FUNCTIONS:
            raise unknown("tabulated function", self.function, FUNCTIONS)
        for field, low, high in (("index_bits", 1, MAX_INDEX_BITS), ("order", 0, 1), ("newton", 0, 3)):
            value = getattr(self, field)
            if type(value) is not int or not low <= value <= high:
                raise ConfigError(
                    f"table of {self.function}: {field} must be an integer in {low}..{high}, got {value!r}"
                )
        if self.newton and self.function not in _NEWTON:
            raise ConfigError(
                f"table of {self.function}: Newton steps are defined for {' and '.join(_NEWTON)}; set newton=0"
            )

    @property
    def intervals(self) -> int:
        """How many intervals there are; the table has one entry more."""
        return 1 << self.index_bits

    @property
    def max_error(self) -> float:
        """Bound of the error: relative for ``exp``, ``reciprocal`` and ``rsqrt``, absolute for ``tanh`` and ``erf``.

        It is the error of the nearest entry or of the chord, ``h^2 / 8`` times the second derivative, at most squared
        by each Newton step, plus the roundings. ``exp`` misses ``e^x`` by ``2^-23 |x|`` more, relative, as
        ``x log2(e)`` is rounded to fp32; results below 2^-126 are rounded to fp32's subnormal grid.

        >>> 2**-17 < Table("exp", 6).max_error < 2**-16
        True
        """
        h = 1 / self.intervals
        error = (_LINE if self.order else _NEAREST)[self.function](h) + _ROUNDINGS
        for _ in range(self.newton):
            error = (error**2 if self.function == "reciprocal" else 1.5 * error**2 + 0.5 * error**3) + _ROUNDINGS
        return error

    def __str__(self) -> str:
        given = [f for f in dataclasses.fields(self) if getattr(self, f.name) != f.default]
        return f"table({', '.join(f'{f.name}={getattr(self, f.name)!r}' for f in given)})"


# The error bounds by the width h of an interval as a share of the range; for tanh and erf the range is LIMITS wide,
# and what the function lacks of 1 at its end is added. 0.7699 is the largest |tanh''|, 0.9679 the largest |erf''|.
_NEAREST: dict[str, Callable[[float], float]] = {
    "exp": lambda h: 2 ** (h / 2) - 1,
    "reciprocal": lambda h: h / 2,
    "rsqrt": lambda h: h / 2,
    "tanh": lambda h: 8 * h / 2 + 1 - math.tanh(8),
    "erf": lambda h: 4 * h / 2 * (2 / math.sqrt(math.pi)) + math.erfc(4),
}
_LINE: dict[str, Callable[[float], float]] = {
    "exp": lambda h: (math.log(2) * h) ** 2 / 8 * 2**h,
    "reciprocal": lambda h: h**2 / 4,
    "rsqrt": lambda h: 3 * (2 * h) ** 2 / 32,
    "tanh": lambda h: (8 * h) ** 2 / 8 * 0.7699 + 1 - math.tanh(8),
    "erf": lambda h: (4 * h) ** 2 / 8 * 0.9679 + math.erfc(4),
}


@lru_cache(maxsize=256)
def entries(function: str, index_bits: int) -> tuple[float, ...]:
    """The function at the ends of all intervals, computed in fp64 and rounded to fp32; ``2^index_bits + 1`` values.

    The last entry of ``tanh`` and ``erf`` is their limit, 1. Neighbours lie within a factor of two but for the first,
    0, so their differences are exact and a line meets both its ends: no step between intervals runs backwards.

    >>> entries("exp", 1)
    (1.0, 1.4142135381698608, 2.0)
    >>> entries("rsqrt", 2) == tuple(float32(x**-0.5) for x in (1, 1.5, 2, 3, 4))
    True
    """
    n = 1 << index_bits
    if function == "exp":
        found = [2.0 ** (i / n) for i in range(n + 1)]
    elif function == "reciprocal":
        found = [n / (n + i) for i in range(n + 1)]
    elif function == "rsqrt":
        octave = [1 + 2 * i / n for i in range(n // 2)]
        found = [1 / math.sqrt(x) for x in [*octave, *(2 * x for x in octave), 4.0]]
    else:
        exact = {"tanh": math.tanh, "erf": math.erf}[function]
        found = [exact(LIMITS[function] * i / n) for i in range(n)] + [1.0]
    return tuple(map(float32, found))


@dataclass(frozen=True)
class Approximation:
    """The tables by which an op computes; a function without one is exact.

    Attributes:
        tables: one for each function, in any order; at least one.

    Raises:
        ConfigError: no table, or two of one function.
    """

    tables: tuple[Table, ...]

    def __post_init__(self) -> None:
        names = [table.function for table in self.tables]
        if not names or len(set(names)) < len(names):
            raise ConfigError(f"an approximation takes one table for each function, at least one; got {names}")

    def of(self, function: str) -> Table | None:
        """The table of a function; None where it is exact."""
        return next((table for table in self.tables if table.function == function), None)

    def check(self, what: str, needed: str, *optional: str) -> Approximation:
        """This, if it has a table of ``needed`` and none of what neither ``needed`` nor ``optional`` names.

        Raises:
            ConfigError: a table is missing, or would have no effect.
        """
        if self.of(needed) is None:
            raise ConfigError(f"{what} needs a table of {needed!r}, got {self}")
        for table in self.tables:
            if table.function not in (needed, *optional):
                raise ConfigError(
                    f"{what} computes no {table.function!r}, so {table} would have no effect: leave it out; "
                    f"tables it uses: {', '.join((needed, *optional))}"
                )
        return self

    def __str__(self) -> str:
        return " + ".join(map(str, self.tables))


@lru_cache(maxsize=4096)
def parse(text: str) -> Approximation:
    """The approximation of a text: ``table(function='exp', index_bits=6)``, or several such joined by ``+``.

    Raises:
        ConfigError: the text is no such thing, a field is missing, unknown or out of its range.
        UnknownNameError: no such function.
    """
    expected = f"approximation {text!r}: expected table(field=value, ...), such as {Table('exp', 6)}, joined by +"
    if not isinstance(text, str):
        raise ConfigError(expected)
    try:
        return Approximation(tuple(_tables(ast.parse(text.strip(), mode="eval").body)))
    except (SyntaxError, TypeError, _NoTableError) as error:
        raise ConfigError(expected) from error


class _NoTableError(Exception):
    """A piece of a text that is not ``table(field=value, ...)``."""


def _tables(node: ast.expr) -> list[Table]:
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return _tables(node.left) + _tables(node.right)
    if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name) or node.func.id != "table" or node.args:
        raise _NoTableError
    fields: dict[str, Any] = {}
    for keyword in node.keywords:
        if keyword.arg is None or not isinstance(keyword.value, ast.Constant):
            raise _NoTableError
        fields[keyword.arg] = keyword.value.value
    return [Table(**fields)]
