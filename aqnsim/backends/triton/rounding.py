"""Rounding to an element format: the twin of ``csrc/core/format.h``. A kernel is compiled for one format."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import triton
import triton.language as tl

from aqnsim.backends.triton.bits import abs_of, bits_of, float_of, fp32, of
from aqnsim.formats import Format, float32, random_bits


@dataclass(frozen=True)
class Element:
    """What a rounding needs to know of a format, as ``Element`` of the C++ core."""

    mantissa_bits: int
    min_exponent: int
    bias: int
    max: float
    max_negative: float
    min_normal: float
    nan: str
    overflow: str
    rounding: str
    random_bits: int
    signed: bool
    has_zero: bool
    has_negative_zero: bool
    flush: bool
    tapered: bool

    @property
    def plain(self) -> bool:
        """Whether ``round_plain`` gives the same: IEEE-like, nearest even, all of fp32's zeros and NaNs kept."""
        return (
            self.rounding == "nearest-even"
            and (self.signed and self.has_zero and self.has_negative_zero and not self.flush and not self.tapered)
            and (self.max == self.max_negative and self.nan == "keep")
            and (self.mantissa_bits > 0 or self.bias % 2 == 1)
        )

    @property
    def half_minus_one(self) -> int:
        return (1 << (22 - self.mantissa_bits)) - 1

    @property
    def keep_mask(self) -> int:
        return ~((1 << (23 - self.mantissa_bits)) - 1) & 0xFFFFFFFF

    @property
    def subnormal_magic(self) -> float:
        """Adding it pushes the bits below the subnormal quantum out of fp32's fraction: the addition rounds."""
        return math.ldexp(1.0, self.min_exponent - self.mantissa_bits + 23)

    @property
    def smallest_normal(self) -> float:
        return math.ldexp(1.0, self.min_exponent)

    @property
    def random_mask(self) -> int:
        return (~0 << (32 - self.random_bits) % 32) & 0xFFFFFFFF

    @property
    def above(self) -> float:
        """What lies beyond the range."""
        return {"saturate": self.max, "inf": math.inf, "nan": math.nan}[self.overflow]

    @property
    def above_negative(self) -> float:
        return self.max_negative if self.overflow == "saturate" else self.above

    @property
    def low(self) -> float:
        """Magnitudes below it become ``low_result``."""
        return 0.0 if self.has_zero and not self.flush else self.min_normal

    @property
    def low_result(self) -> float:
        return 0.0 if self.has_zero else self.min_normal

    @property
    def nan_result(self) -> float:
        return {"keep": math.nan, "zero": 0.0, "max": self.max}[self.nan]


@lru_cache(maxsize=1024)
def element(fmt: Format) -> Element:
    """The parameters of a format's kernels."""
    return Element(
        mantissa_bits=fmt.mantissa_bits,
        min_exponent=-fmt.taper[-1][0] if fmt.taper else fmt.min_exponent,
        bias=fmt.code_bias,
        max=float32(fmt.max),
        max_negative=float32(-fmt.min if fmt.signed else fmt.max),
        min_normal=fmt.min_normal,
        nan=fmt.nan,
        overflow=fmt.overflow,
        rounding="stochastic" if random_bits(fmt) else fmt.rounding,
        random_bits=random_bits(fmt),
        signed=fmt.signed,
        has_zero=fmt.has_zero,
        has_negative_zero=fmt.has_negative_zero,
        flush=fmt.subnormals == "flush",
        tapered=bool(fmt.taper),
    )


@triton.jit
def round_plain(x, E: tl.constexpr):
    """Nearest, ties to even, by a plain element. NaN stays NaN; the sign of zero is kept."""
    magnitude = bits_of(x) & 0x7FFFFFFF
    odd = (magnitude >> (23 - of(E, "mantissa_bits"))) & 1
    normal = float_of((magnitude + of(E, "half_minus_one") + odd) & of(E, "keep_mask"))
    small = float_of(magnitude)
    magic = fp32(of(E, "subnormal_magic"))
    r = tl.where(small < fp32(of(E, "smallest_normal")), (small + magic) - magic, normal)
    r = tl.where(r > fp32(of(E, "max")), fp32(of(E, "above")), r)
    r = tl.where(magnitude > 0x7F800000, small, r)
    return float_of(bits_of(r) | (bits_of(x) & 0x80000000))


@triton.jit
def fraction_bits(exponent, E: tl.constexpr):
    """The width of the fraction of numbers of an exponent; HiFloat8's depends on it (arXiv 2409.16626)."""
    a = tl.where(exponent < 0, -exponent, exponent)
    tapered = tl.where(a <= 3, 3, tl.where(a <= 7, 2, tl.where(a <= 15, 1, 0)))
    return tapered if of(E, "tapered") else tl.full(exponent.shape, of(E, "mantissa_bits"), tl.int32)


@triton.jit
def dropped_share(significand, rest, dropped):
    """The top 32 bits of the share of a step that is dropped."""
    down = dropped - 32
    high = rest << ((32 - dropped) & 31).to(tl.uint32)
    low = significand >> (down & 31).to(tl.uint32)
    return tl.where(down < 0, high, tl.where(down < 32, low, 0))


@triton.jit
def rounds_up(rest, half, odd, significand, exponent, dropped, negative, x, word, E: tl.constexpr):
    """Whether a magnitude with the remainder ``rest`` goes to the larger neighbour."""
    above = (rest > half) | ((rest == half) & odd)
    away = rest >= half
    if of(E, "rounding") == "nearest-even":
        up = above
    elif of(E, "rounding") == "nearest-away":
        up = away
    elif of(E, "rounding") == "nearest-down":
        up = rest > half
    elif of(E, "rounding") == "up":
        up = (rest != 0) & ~negative
    elif of(E, "rounding") == "down":
        up = (rest != 0) & negative
    elif of(E, "rounding") == "stochastic":  # up where share + word carries out of the random bits
        share = dropped_share(significand, rest, dropped) & of(E, "random_mask")
        up = share + (word & of(E, "random_mask")) < share
    elif of(E, "rounding") == "hif8-hybrid":  # the 14 leading discarded bits against the 14 trailing ones
        shift = tl.minimum(dropped, 31)
        leading, trailing = rest >> ((shift - 14) & 31).to(tl.uint32), rest & 0x3FFF
        pseudo = (leading >= trailing) & (rest != 0) & (exponent >= -23)  # an exact value stays
        near = ((exponent > -4) & (exponent < 4)) | (abs_of(x) >= 40960.0)
        up = (near & away) | (~near & pseudo)
    else:  # toward zero
        up = rest != rest
    return up


@triton.jit
def round_any(x, word, E: tl.constexpr):
    """Any rounding to any element format; ``word`` is read by a stochastic one."""
    magnitude, negative = bits_of(x) & 0x7FFFFFFF, bits_of(x) >= 0x80000000
    tiny = magnitude < 0x00800000  # an fp32 subnormal, or zero
    u = bits_of(float_of(magnitude) * tl.where(tiny, 16777216.0, 1.0))
    exponent = (u >> 23).to(tl.int32) - tl.where(tiny, 127 + 24, 127)
    significand = tl.where(magnitude == 0, 0, (u & 0x007FFFFF) | 0x00800000)
    width = fraction_bits(exponent, E)
    quantum = tl.maximum(exponent, of(E, "min_exponent")) - width
    dropped = 23 + quantum - exponent
    shift = tl.minimum(dropped, 31).to(tl.uint32)
    whole = significand >> shift
    one = tl.full(x.shape, 1, tl.uint32)
    rest, half = significand & ((one << shift) - 1), one << (shift - 1)
    odd_exponent = (whole == 1) & (((quantum + of(E, "bias")) & 1) == 1)
    odd = tl.where(width == 0, odd_exponent, (whole & 1) == 1)
    up = rounds_up(rest, half, odd, significand, exponent, dropped, negative, x, word, E)
    steps = (whole + tl.where(up, one, 0)).to(tl.int32).to(tl.float32)  # exact: at most 23 bits
    normal, subnormal = (quantum + 127).to(tl.uint32) << 23, one << ((quantum + 149) & 31).to(tl.uint32)
    r = steps * float_of(tl.where(quantum >= -126, normal, subnormal))
    r = tl.where(r < fp32(of(E, "low")), fp32(of(E, "low_result")), r)
    r = tl.where(magnitude == 0x7F800000, fp32(float("inf")), r)
    limit = tl.where(negative, fp32(of(E, "max_negative")), fp32(of(E, "max")))
    above = tl.where(negative, fp32(of(E, "above_negative")), fp32(of(E, "above")))
    # a directed rounding leaves the range on its outer side only
    if of(E, "rounding") == "toward-zero":
        above = tl.where(magnitude < 0x7F800000, limit, above)
    elif of(E, "rounding") == "up":
        above = tl.where(negative & (magnitude < 0x7F800000), limit, above)
    elif of(E, "rounding") == "down":
        above = tl.where(~negative & (magnitude < 0x7F800000), limit, above)
    r = tl.where(r > limit, above, r)
    if of(E, "signed"):
        signed = negative if of(E, "has_negative_zero") else negative & (r != 0.0)
        r = float_of(bits_of(r) | tl.where(signed, 0x80000000, 0).to(tl.uint32))
    else:
        r = tl.where(negative & (magnitude != 0), fp32(float("nan")), r)
    return tl.where(magnitude > 0x7F800000, fp32(of(E, "nan_result")), r)


@triton.jit
def round_to(x, word, E: tl.constexpr):
    """``x`` as a number of the format; see ``round_to`` of ``aqnsim/reference/rounding.py``."""
    return round_plain(x, E) if of(E, "plain") else round_any(x, word, E)
