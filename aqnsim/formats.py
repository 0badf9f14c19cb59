"""Number formats as data: which values exist. The standard library only.

A :class:`Format` says which numbers an element can hold; a :class:`BlockFormat` adds the scale that a block of
elements shares. Every format is one value in :data:`ALL`; kernels, tests, tables and the command line read it there.

>>> get("fp4_e2m1").values()
(0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
>>> get("mxfp4").block
32
"""

from __future__ import annotations

import math
import re
import struct
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal, get_args

from aqnsim._errors import ConfigError, unknown

Overflow = Literal["saturate", "inf", "nan"]
ScaleRule = Literal["e8m0-floor", "e4m3-two-level"]

ROUNDINGS = ("nearest-even",)


@dataclass(frozen=True, kw_only=True)
class Format:
    """A binary floating-point element format with a sign bit and subnormals.

    A normal number is ``(-1)^s 2^(E - bias) (1 + M / 2^mantissa_bits)``; with ``E == 0`` it is
    ``(-1)^s 2^(1 - bias) (M / 2^mantissa_bits)``.

    Attributes:
        name: lower-case, as vendors spell it.
        exponent_bits: width of the exponent field.
        mantissa_bits: explicit fraction bits.
        bias: exponent bias.
        max: largest finite magnitude; codes above it, if any, are Inf or NaN.
        overflow: what a value that rounds beyond ``max`` becomes in :func:`aqnsim.cast`.
        source: where the definition stands.
    """

    name: str
    exponent_bits: int
    mantissa_bits: int
    bias: int
    max: float
    overflow: Overflow = "saturate"
    source: str = ""

    def __post_init__(self) -> None:
        if not (1 <= self.exponent_bits <= 8 and 0 <= self.mantissa_bits <= 10):
            raise ConfigError(
                f"format {self.name!r}: e{self.exponent_bits}m{self.mantissa_bits} is not supported; "
                "expected 1..8 exponent bits and 0..10 mantissa bits"
            )
        if not 0 < self.max < math.inf:
            raise ConfigError(f"format {self.name!r}: max must be positive, got {self.max}")
        if self.overflow not in get_args(Overflow):
            raise unknown("overflow", self.overflow, get_args(Overflow))

    @property
    def bits(self) -> int:
        """Width of a code, sign included."""
        return 1 + self.exponent_bits + self.mantissa_bits

    @property
    def min_exponent(self) -> int:
        """Exponent of the smallest normal number."""
        return 1 - self.bias

    @property
    def max_exponent(self) -> int:
        """Exponent of ``max``: the *emax* of the OCP MX scale rule."""
        return math.frexp(self.max)[1] - 1

    @property
    def min_normal(self) -> float:
        return 2.0**self.min_exponent

    @property
    def min_subnormal(self) -> float:
        return 2.0 ** (self.min_exponent - self.mantissa_bits)

    @property
    def eps(self) -> float:
        """Distance from 1 to the next number."""
        return 2.0**-self.mantissa_bits

    def decode(self, code: int) -> float:
        """The value of a ``code``; codes beyond ``max`` are Inf where the IEEE rule says so, else NaN.

        >>> get("fp8_e4m3").decode(0x7E), get("fp8_e5m2").decode(0x7C)
        (448.0, inf)
        """
        if not 0 <= code < 1 << self.bits:
            raise ConfigError(f"{self.name}: code {code} is out of range 0..{(1 << self.bits) - 1}")
        sign = -1.0 if code >> (self.bits - 1) else 1.0
        field = (code >> self.mantissa_bits) & ((1 << self.exponent_bits) - 1)
        fraction = code & ((1 << self.mantissa_bits) - 1)
        if field == 0:
            return sign * fraction * self.min_subnormal
        value = math.ldexp(1 + fraction * self.eps, field - self.bias)
        if value <= self.max:
            return sign * value
        return sign * math.inf if self.has_inf and fraction == 0 else math.nan

    @property
    def has_inf(self) -> bool:
        """Whether the all-ones exponent is reserved as in IEEE 754 (Inf and NaN)."""
        largest = math.ldexp(2 - self.eps, (1 << self.exponent_bits) - 2 - self.bias)
        return self.max == largest

    def values(self) -> tuple[float, ...]:
        """All finite non-negative values, ascending."""
        codes = range(1 << (self.bits - 1))
        return tuple(v for v in map(self.decode, codes) if math.isfinite(v))


@dataclass(frozen=True, kw_only=True)
class BlockFormat:
    """Elements in blocks that share a scale.

    Attributes:
        name: lower-case, as vendors spell it.
        element: the element format.
        block: how many elements along the cast's axis share one scale; the last block may be shorter.
        scale: the scale rule. ``e8m0-floor``: OCP MX v1.0 section 6.3. ``e4m3-two-level``: an E4M3 scale a
            block and an fp32 scale a tensor, in TransformerEngine's order of operations.
        source: where the definition stands.
    """

    name: str
    element: Format
    block: int
    scale: ScaleRule
    source: str = ""

    def __post_init__(self) -> None:
        if not 1 <= self.block <= 256:
            raise ConfigError(f"format {self.name!r}: block must be 1..256, got {self.block}")
        if self.scale not in get_args(ScaleRule):
            raise unknown("scale rule", self.scale, get_args(ScaleRule))
        if self.scale == "e4m3-two-level" and self.element.max != 6.0:
            raise ConfigError(
                f"format {self.name!r}: e4m3-two-level is defined for elements up to 6 (FP4 E2M1), "
                f"got {self.element.name}"
            )

    @property
    def bits(self) -> float:
        """Storage a value, the block's scale included, the tensor's not."""
        return self.element.bits + 8 / self.block


AnyFormat = Format | BlockFormat

_OCP_FP8 = "OCP 8-bit Floating Point Specification (OFP8) v1.0"
_OCP_MX = "OCP Microscaling Formats (MX) Specification v1.0"
_IEEE = "IEEE 754-2019"


def _build() -> dict[str, AnyFormat]:
    e2m1 = Format(name="fp4_e2m1", exponent_bits=2, mantissa_bits=1, bias=1, max=6.0, source=_OCP_MX)
    e2m3 = Format(name="fp6_e2m3", exponent_bits=2, mantissa_bits=3, bias=1, max=7.5, source=_OCP_MX)
    e3m2 = Format(name="fp6_e3m2", exponent_bits=3, mantissa_bits=2, bias=3, max=28.0, source=_OCP_MX)
    e4m3 = Format(name="fp8_e4m3", exponent_bits=4, mantissa_bits=3, bias=7, max=448.0, source=_OCP_FP8)
    e5m2 = Format(name="fp8_e5m2", exponent_bits=5, mantissa_bits=2, bias=15, max=57344.0, source=_OCP_FP8)
    fp16 = Format(
        name="fp16",
        exponent_bits=5,
        mantissa_bits=10,
        bias=15,
        max=65504.0,
        overflow="inf",
        source=_IEEE,
    )
    bf16 = Format(
        name="bf16",
        exponent_bits=8,
        mantissa_bits=7,
        bias=127,
        max=math.ldexp(2 - 2**-7, 127),
        overflow="inf",
        source="upper half of IEEE 754 binary32",
    )

    def mx(name: str, element: Format) -> BlockFormat:
        return BlockFormat(name=name, element=element, block=32, scale="e8m0-floor", source=_OCP_MX)

    formats: list[AnyFormat] = [
        e2m1,
        e2m3,
        e3m2,
        e4m3,
        e5m2,
        fp16,
        bf16,
        mx("mxfp4", e2m1),
        mx("mxfp6_e2m3", e2m3),
        mx("mxfp6_e3m2", e3m2),
        mx("mxfp8_e4m3", e4m3),
        mx("mxfp8_e5m2", e5m2),
        BlockFormat(
            name="nvfp4",
            element=e2m1,
            block=16,
            scale="e4m3-two-level",
            source="NVIDIA TransformerEngine, NVFP4 recipe (core_nvfp4.cuh)",
        ),
    ]
    return {f.name: f for f in formats}


ALL: MappingProxyType[str, AnyFormat] = MappingProxyType(_build())
"""Every named format."""

_PARAMETRIC = re.compile(r"e([1-8])m(\d+)\Z")


def get(name: str | AnyFormat) -> AnyFormat:
    """The format of that name, or the IEEE-like format that ``e{E}m{M}`` spells.

    ``e{E}m{M}`` has bias ``2^(E-1) - 1``, an all-ones exponent reserved for Inf and NaN, and overflows to Inf.

    Raises:
        UnknownNameError: no such format; the message names the closest.

    >>> get("e3m4").max
    15.5
    """
    if isinstance(name, (Format, BlockFormat)):
        if get(name.name) != name:
            raise ConfigError(
                f"format {name.name!r} differs from the registered format of that name; "
                "formats are passed between processes by name: add it to aqnsim.formats.ALL"
            )
        return name
    if name in ALL:
        return ALL[name]
    if match := _PARAMETRIC.match(name):
        e, m = int(match[1]), int(match[2])
        if e >= 2 and m <= 10:
            bias = 2 ** (e - 1) - 1
            return Format(
                name=name,
                exponent_bits=e,
                mantissa_bits=m,
                bias=bias,
                max=math.ldexp(2 - 2.0**-m, bias),
                overflow="inf",
                source=_IEEE,
            )
    raise unknown("format", name, ALL)


def element_of(fmt: AnyFormat) -> Format:
    """The element format of either kind."""
    return fmt.element if isinstance(fmt, BlockFormat) else fmt


def check_rounding(rounding: str | None) -> str:
    """``rounding``, or the default where it is None.

    Raises:
        UnknownNameError: not one of :data:`ROUNDINGS`.
    """
    if rounding is None:
        return "nearest-even"
    if rounding not in ROUNDINGS:
        raise unknown("rounding", rounding, ROUNDINGS)
    return rounding


def float32(value: float) -> float:
    """``value`` rounded to binary32, for constants that kernels read."""
    return float(struct.unpack("<f", struct.pack("<f", value))[0])
