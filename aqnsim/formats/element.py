"""Element formats: a grid of numbers, their codes, and how other values are brought onto it."""

from __future__ import annotations

import bisect
import math
import re
import struct
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, get_args

from aqnsim._errors import ConfigError, unknown

Specials = Literal["ieee", "fn", "fnuz", "none"]
Overflow = Literal["saturate", "inf", "nan"]
Subnormals = Literal["keep", "flush"]
NanInput = Literal["keep", "zero", "max"]

ROUNDINGS = (
    "nearest-even",
    "nearest-away",
    "nearest-down",
    "toward-zero",
    "up",
    "down",
    "stochastic",
    "hif8-hybrid",
)
"""Rounding by name; ``stochastic-N`` draws N random bits instead of 32."""

_STOCHASTIC = re.compile(r"stochastic-([1-9]\d?)\Z")


def stochastic_bits(rounding: str) -> int:
    """How many random bits a rounding draws: 0 for a deterministic one."""
    if rounding == "stochastic":
        return 32
    match = _STOCHASTIC.match(rounding)
    return int(match[1]) if match else 0


def check_rounding(rounding: str) -> str:
    """``rounding``, if it is one of :data:`ROUNDINGS` or ``stochastic-N`` with N of 1..32.

    Raises:
        UnknownNameError: it is not.
    """
    if rounding not in ROUNDINGS and not 1 <= stochastic_bits(rounding) <= 32:
        raise unknown("rounding", rounding, ROUNDINGS)
    return rounding


_CHOICES: dict[str, tuple[str, ...]] = {
    "specials": get_args(Specials),
    "overflow": get_args(Overflow),
    "subnormals": get_args(Subnormals),
    "nan": get_args(NanInput),
}


@dataclass(frozen=True, kw_only=True)
class Format:
    """An element format: a grid of numbers, and how other values are brought onto it.

    A normal number is ``(-1)^s 2^(E - bias) (1 + M / 2^mantissa_bits)``; with ``E == 0`` it is
    ``(-1)^s 2^(1 - bias) (M / 2^mantissa_bits)``. Without exponent bits only the second line is left: an integer in
    two's complement, in steps of ``2^(1 - bias - mantissa_bits)``.

    Attributes:
        name: lower-case, as vendors spell it.
        exponent_bits: width of the exponent field; 0 for integers.
        mantissa_bits: explicit fraction bits; the largest, for a tapered format.
        bias: exponent bias.
        specials: which codes are no numbers. ``ieee``: the all-ones exponent (Inf and NaN). ``fn``: the all-ones code
            (NaN). ``fnuz``: the code of -0 (NaN). ``none``: none.
        signed: False for scale formats; negative values then become NaN.
        has_zero: False where even the field 0 is an exponent (E8M0, UE6M2).
        symmetric: for integers, whether the lowest code of two's complement is left unused.
        taper: for tapered formats, ``(limit, mantissa bits)`` pairs: the fraction's width for exponents of magnitude up
            to each limit. Empty for all others.
        rounding: one of :data:`ROUNDINGS` or ``stochastic-N``.
        overflow: what a value that rounds beyond ``max`` becomes.
        subnormals: ``flush`` turns results below ``min_normal`` into zeros of their sign.
        nan: what a NaN becomes where the format has no code for it; ``keep`` leaves it a NaN, which no code can store.
        source: where the definition stands.
        unverified: why the definition is not certain; empty where it is.
    """

    name: str
    exponent_bits: int
    mantissa_bits: int
    bias: int
    specials: Specials = "ieee"
    signed: bool = True
    has_zero: bool = True
    symmetric: bool = True
    taper: tuple[tuple[int, int], ...] = ()
    rounding: str = "nearest-even"
    overflow: Overflow = "saturate"
    subnormals: Subnormals = "keep"
    nan: NanInput = "keep"
    source: str = ""
    unverified: str = ""

    def __post_init__(self) -> None:
        where = f"format {self.name!r}"
        if not (0 <= self.exponent_bits <= 8 and 0 <= self.mantissa_bits <= 22 and self.bits <= 32):
            raise ConfigError(
                f"{where}: e{self.exponent_bits}m{self.mantissa_bits} is not supported; "
                "expected 0..8 exponent bits and 0..22 mantissa bits"
            )
        for field, allowed in _CHOICES.items():
            if getattr(self, field) not in allowed:
                raise unknown(f"{field} of {where}", getattr(self, field), allowed)
        check_rounding(self.rounding)
        if self.exponent_bits == 0 and (self.mantissa_bits == 0 or self.specials != "none" or not self.signed):
            raise ConfigError(f"{where}: an integer needs a magnitude bit, a sign and specials = 'none'")
        if self.overflow == "inf" and not self.has_inf:
            raise ConfigError(f"{where}: overflow = 'inf', but the format has no code for Inf; use saturate or nan")
        if self.overflow == "nan" and not self.has_nan:
            raise ConfigError(f"{where}: overflow = 'nan', but the format has no code for NaN; use saturate")
        if self.nan != "keep" and self.has_nan:
            raise ConfigError(f"{where}: nan = {self.nan!r}, but the format has a code for NaN; use keep")
        if self.taper and (self.exponent_bits, self.mantissa_bits, self.bias, self.specials) != (5, 3, 16, "ieee"):
            raise ConfigError(f"{where}: a tapered format is HiFloat8, whose widths and bias are fixed")
        if self.rounding == "hif8-hybrid" and not self.taper:
            raise ConfigError(f"{where}: rounding 'hif8-hybrid' is defined for HiFloat8 only")
        if self.specials == "fnuz" and not (self.signed and self.has_zero):
            raise ConfigError(f"{where}: specials = 'fnuz' needs a sign and a zero, whose negative is the NaN")
        if not self.is_integer and not self.taper and self._top < self.has_zero:
            raise ConfigError(f"{where}: no positive number is left beside the special codes")
        if not (-149 <= self._last_exponent <= 128 and self.min_subnormal >= 2.0**-149 and self.max < 2.0**128):
            raise ConfigError(f"{where}: bias {self.bias} puts numbers outside of binary32's range")

    # ---- the grid ---------------------------------------------------------------------------------------------------

    @property
    def bits(self) -> int:
        """Width of a code, sign included."""
        if self.taper:
            return 8
        return int(self.signed) + self.exponent_bits + self.mantissa_bits

    @property
    def codes(self) -> int:
        """How many codes there are."""
        return 1 << self.bits

    @property
    def is_integer(self) -> bool:
        """Whether the numbers are evenly spaced, in two's complement."""
        return self.exponent_bits == 0

    @property
    def has_inf(self) -> bool:
        """Whether a code stands for Inf."""
        return self.specials == "ieee"

    @property
    def has_nan(self) -> bool:
        """Whether a code stands for NaN."""
        return self.specials == "fn" or self.specials == "fnuz" or (self.specials == "ieee" and self.mantissa_bits > 0)

    @property
    def has_negative_zero(self) -> bool:
        """Whether -0 has a code of its own."""
        return self.signed and self.has_zero and self.specials != "fnuz" and not self.is_integer and not self.taper

    @property
    def min_exponent(self) -> int:
        """Exponent of the smallest normal number; subnormals are spaced as numbers of this exponent are."""
        return 1 - self.bias if self.has_zero else -self.bias

    @property
    def code_bias(self) -> int:
        """What added to an exponent gives the code, where numbers have no fraction bits."""
        return 1 + self.taper[-1][0] if self.taper else self.bias

    @property
    def _last_exponent(self) -> int:
        """Exponent of the largest code that the exponent field can spell, special or not."""
        return (1 << self.exponent_bits) - 1 - self.bias

    @property
    def max_exponent(self) -> int:
        """Exponent of ``max``: the *emax* of the OCP MX scale rule."""
        return math.frexp(self.max)[1] - 1

    @property
    def max(self) -> float:
        """Largest finite number."""
        if self.taper:
            return 32768.0
        if self.is_integer:
            return ((1 << self.mantissa_bits) - 1) * self.min_subnormal
        return self.decode(self._top)

    @property
    def _top(self) -> int:
        """The largest positive code of a number; the special codes lie above it."""
        ones = (1 << (self.exponent_bits + self.mantissa_bits)) - 1
        if self.specials == "ieee":  # the all-ones exponent is not a number's
            return ones - (1 << self.mantissa_bits)
        return ones - (self.specials == "fn")

    @property
    def min(self) -> float:
        """Lowest finite number: ``-max``, or one step lower in two's complement; without a sign 0 or ``min_normal``."""
        if not self.signed:
            return 0.0 if self.has_zero else self.min_normal
        return -self.max - (0.0 if self.symmetric or not self.is_integer else self.min_subnormal)

    @property
    def min_normal(self) -> float:
        """Smallest positive number with a leading 1; for an integer, which has none, the smallest positive one."""
        return self.min_subnormal if self.is_integer else 2.0**self.min_exponent

    @property
    def min_subnormal(self) -> float:
        """Smallest positive number."""
        if self.taper:
            return 2.0 ** -self.taper[-1][0]
        return 2.0 ** (self.min_exponent - (self.mantissa_bits if self.has_zero else 0))

    @property
    def eps(self) -> float:
        """Distance from 1 to the next number; for an integer, the distance of all neighbours."""
        return self.min_subnormal if self.is_integer else 2.0**-self.mantissa_bits

    # ---- codes ------------------------------------------------------------------------------------------------------

    def decode(self, code: int) -> float:
        """The value of a ``code``.

        Raises:
            ConfigError: the code is wider than the format.

        >>> from aqnsim.formats import get
        >>> get("fp8_e4m3").decode(0x7E), get("fp8_e5m2").decode(0x7C), get("int8").decode(0xFF)
        (448.0, inf, -1.0)
        """
        if not 0 <= code < self.codes:
            raise ConfigError(f"{self.name}: code {code} is out of range 0..{self.codes - 1}")
        if self.taper:
            return _decode_hif8(code)
        if self.is_integer:
            half = self.codes // 2
            return ((code ^ half) - half) * self.min_subnormal
        magnitude_bits = self.exponent_bits + self.mantissa_bits
        sign = -1.0 if code >> magnitude_bits else 1.0
        ones = (1 << magnitude_bits) - 1
        magnitude = code & ones
        if self.specials == "fn" and magnitude == ones:
            return math.nan
        if self.specials == "fnuz" and code == 1 << magnitude_bits:
            return math.nan
        field, fraction = magnitude >> self.mantissa_bits, magnitude & ((1 << self.mantissa_bits) - 1)
        if self.specials == "ieee" and field == (1 << self.exponent_bits) - 1:
            return math.nan if fraction else sign * math.inf
        if field == 0 and self.has_zero:
            return sign * fraction * self.min_subnormal
        return sign * math.ldexp(1 + fraction * self.eps, field - self.bias)

    def encode(self, value: float) -> int:
        """The code of a value that the format holds; of NaN, the quiet one with the fewest bits set.

        Raises:
            ConfigError: the format has no code for the value; cast it first.

        >>> from aqnsim.formats import get
        >>> hex(get("hif8").encode(-1.0)), get("e8m0").encode(2.0)
        ('0x88', 128)
        """
        code = _codes_of(self).get(_key(value)) if self.bits <= 16 else self._encode_wide(value)
        if code is None:
            raise ConfigError(f"{self.name} holds no {value!r}; expected one of its values: cast it first")
        return code

    def _encode_wide(self, value: float) -> int | None:
        """The code by arithmetic, for floating-point formats that are too wide for a table."""
        sign = int(math.copysign(1.0, value) < 0) << (self.bits - 1)
        ones = (1 << (self.bits - 1)) - 1
        if math.isnan(value):
            quiet = ones & ~((1 << (self.mantissa_bits - 1)) - 1)
            return {"ieee": quiet, "fn": ones, "fnuz": ones + 1, "none": None}[self.specials]
        if math.isinf(value):
            return sign | ones & ~((1 << self.mantissa_bits) - 1) if self.has_inf else None
        if value == 0 and sign and not self.has_negative_zero:
            return None
        if abs(value) > self.max:
            return None
        exponent = max(math.frexp(value)[1] - 1, self.min_exponent) if value else self.min_exponent
        steps = math.ldexp(abs(value), self.mantissa_bits - exponent)
        if steps != int(steps):
            return None
        return sign | (int(steps) + ((exponent - self.min_exponent) << self.mantissa_bits))

    def values(self) -> tuple[float, ...]:
        """All finite non-negative values, ascending."""
        return _values_of(self)

    def next_up(self, value: float) -> float:
        """The smallest number of the format above ``value``; Inf (or NaN, without one) above ``max``.

        >>> from aqnsim.formats import get
        >>> get("fp4_e2m1").next_up(1.0), get("fp4_e2m1").next_up(-0.5)
        (1.5, 0.0)
        """
        if math.isnan(value):
            return value
        values = all_values(self)
        at = bisect.bisect_right(values, value)
        return values[at] if at < len(values) else (math.inf if self.has_inf else math.nan)

    def next_down(self, value: float) -> float:
        """The largest number of the format below ``value``; -Inf (or NaN, without one) below ``min``."""
        if math.isnan(value):
            return value
        values = all_values(self)
        at = bisect.bisect_left(values, value)
        return values[at - 1] if at else (-math.inf if self.has_inf and self.signed else math.nan)

    def __str__(self) -> str:
        from aqnsim.formats.texts import text_of  # texts know the names, and names know this class

        return text_of(self)


def _decode_hif8(code: int) -> float:
    """HiFloat8 (arXiv 2409.16626): ``S | D | E | M``, where the dot field D is a prefix code for the width of E."""
    sign, low = (-1.0 if code & 0x80 else 1.0), code & 0x7F
    if low == 0x6F:
        return sign * math.inf
    if low == 0:
        return math.nan if code else 0.0
    if low < 8:  # 0000: one value a binade
        return sign * 2.0 ** (low - 23)
    if low < 16:  # 0001: exponent 0
        return sign * (1 + (low & 7) / 8)
    if low < 32:  # 001 e mmm, 01 ee mmm, 10 eee mm, 11 eeee m
        width, fraction_bits = 1, 3
    else:
        width, fraction_bits = {1: (2, 3), 2: (3, 2), 3: (4, 1)}[low >> 5]
    field = (low >> fraction_bits) & ((1 << width) - 1)
    magnitude = 1 << (width - 1) | field & ((1 << (width - 1)) - 1)  # its leading 1 is implied
    exponent = -magnitude if field >> (width - 1) else magnitude
    fraction = (low & ((1 << fraction_bits) - 1)) / (1 << fraction_bits)
    return sign * math.ldexp(1 + fraction, exponent)


def _key(value: float) -> bytes:
    return b"nan" if math.isnan(value) else struct.pack("<d", value)


@lru_cache(maxsize=256)
def _codes_of(fmt: Format) -> dict[bytes, int]:
    """Code by value; of several codes, as NaN has, the smallest quiet one."""
    found: dict[bytes, int] = {}
    quiet = 1 << (fmt.mantissa_bits - 1) if fmt.specials == "ieee" and fmt.mantissa_bits and not fmt.taper else 0
    for code in range(fmt.codes):
        value = fmt.decode(code)
        if not (math.isnan(value) and quiet and not code & quiet):
            found.setdefault(_key(value), code)
    return found


@lru_cache(maxsize=256)
def all_values(fmt: Format) -> tuple[float, ...]:
    """Every finite value that a format uses, once and ascending; -0 and 0 are one."""
    lowest = fmt.min
    values = {v for v in map(fmt.decode, range(fmt.codes)) if math.isfinite(v) and v >= lowest}
    return tuple(sorted(v + 0.0 for v in values))


@lru_cache(maxsize=256)
def _values_of(fmt: Format) -> tuple[float, ...]:
    return tuple(v for v in all_values(fmt) if v >= 0)


def float32(value: float) -> float:
    """``value`` rounded to binary32, for constants that kernels read."""
    return float(struct.unpack("<f", struct.pack("<f", value))[0])
