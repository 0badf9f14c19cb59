"""Casts in exact arithmetic: an oracle that shares no code and no method with the package.

An element format is the sorted list of all its numbers, by the formula or the table of its specification. Rounding
looks a value up in that list. No float is computed with: magnitudes are integers in units of 2^-149, of which every
binary32 number is a multiple, or binary32 bit patterns, which are ordered as the magnitudes are.

Where a block format's definition computes in binary32 or in bfloat16, every single step is rounded here, from the exact
result.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

F32 = npt.NDArray[np.float32]
Row = list[Fraction]
Tile = list[Row]

UNITS = 149
FLOAT_MAX = Fraction(2**24 - 1) * Fraction(2) ** 104
FLOAT_TINY = Fraction(1, 2**126)
INF, NAN, SIGN = 0x7F800000, 0x7FC00000, 0x80000000


# ---- element formats ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Element:
    """An element format as its specification gives it.

    Attributes:
        bits: width of a code.
        grid: all magnitudes, ascending, in units of 2^-149, and behind them the one that would come next.
        codes: the code of each magnitude, without a sign.
        largest: index of the largest positive number.
        lowest: index of the magnitude of the lowest number.
        min_normal: the smallest number with a leading 1, in the same units.
        fraction_bits: fraction bits of the largest number.
        signed: whether there are negative numbers.
        negative_zero: whether -0 has a code.
        complement: whether negative codes are two's complements.
        specials: the codes that are no numbers.
    """

    bits: int
    grid: tuple[int, ...]
    codes: tuple[int, ...]
    largest: int
    lowest: int
    min_normal: int
    fraction_bits: int
    signed: bool = True
    negative_zero: bool = True
    complement: bool = False
    specials: dict[int, float] = field(default_factory=dict)

    @property
    def max(self) -> Fraction:
        return Fraction(self.grid[self.largest], 2**UNITS)


def floating(
    exponent_bits: int,
    mantissa_bits: int,
    bias: int,
    largest: float,
    specials: str,
    signed: bool = True,
    zero: bool = True,
) -> Element:
    """A format of sign, exponent and fraction, with the largest number that its specification states.

    Args:
        specials: ``inf``: Inf, then NaNs, above the largest number; ``nan``: the last code; ``-0``: the code of -0;
            ``none``.
        signed: whether there is a sign bit.
        zero: whether an exponent field of 0 stands for zero and subnormals.
    """
    width = exponent_bits + mantissa_bits

    def magnitude(code: int) -> int:
        exponent, fraction = divmod(code, 1 << mantissa_bits)
        leading = (exponent > 0 or not zero) << mantissa_bits
        exponent = max(exponent, 1) if zero else exponent
        return (leading + fraction) << (exponent - bias - mantissa_bits + UNITS)

    end = Fraction(largest) * 2**UNITS
    count = next(i for i in itertools.count() if magnitude(i) > end)
    assert magnitude(count - 1) == end, "the stated largest number is one"
    nans = {"inf": range(count, 1 << width), "nan": [(1 << width) - 1], "-0": [1 << width], "none": []}
    found = dict.fromkeys(nans[specials], np.nan)
    if specials == "inf":
        found[count] = np.inf
    if signed and specials != "-0":
        found |= {c | 1 << width: -v for c, v in found.items()}
    return Element(
        bits=width + signed,
        grid=tuple(magnitude(i) for i in range(count + 1)),
        codes=tuple(range(count + 1)),
        largest=count - 1,
        lowest=count - 1 if signed else 0,
        min_normal=1 << (UNITS - bias + zero),
        fraction_bits=mantissa_bits,
        signed=signed,
        negative_zero=signed and specials != "-0",
        specials=found,
    )


def ieee(exponent_bits: int, mantissa_bits: int) -> Element:
    """The format that IEEE 754 makes of two widths."""
    bias = 2 ** (exponent_bits - 1) - 1
    largest = Fraction(2 ** (mantissa_bits + 1) - 1, 2**mantissa_bits) * Fraction(2) ** bias
    return floating(exponent_bits, mantissa_bits, bias, float(largest), "inf")


def integer(bits: int, step: Fraction, symmetric: bool) -> Element:
    """Two's complement in steps of ``step``."""
    half = 1 << (bits - 1)
    unit = int(step * 2**UNITS)
    return Element(
        bits=bits,
        grid=tuple(i * unit for i in range(half + 2)),
        codes=tuple(range(half + 2)),
        largest=half - 1,
        lowest=half - symmetric,
        min_normal=unit,
        fraction_bits=bits - 2,
        negative_zero=False,
        complement=True,
    )


# HiFloat8, arXiv 2409.16626: exponent, code of 2^exponent, numbers in that binade
HIF8_TABLE = [
    *[(code - 23, code, 1) for code in range(1, 8)],
    *[(-15, 0x7E, 2), (-14, 0x7C, 2), (-13, 0x7A, 2), (-12, 0x78, 2)],
    *[(-11, 0x76, 2), (-10, 0x74, 2), (-9, 0x72, 2), (-8, 0x70, 2)],
    *[(-7, 0x5C, 4), (-6, 0x58, 4), (-5, 0x54, 4), (-4, 0x50, 4)],
    *[(-3, 0x38, 8), (-2, 0x30, 8), (-1, 0x18, 8), (0, 0x08, 8), (1, 0x10, 8), (2, 0x20, 8), (3, 0x28, 8)],
    *[(4, 0x40, 4), (5, 0x44, 4), (6, 0x48, 4), (7, 0x4C, 4)],
    *[(8, 0x60, 2), (9, 0x62, 2), (10, 0x64, 2), (11, 0x66, 2), (12, 0x68, 2), (13, 0x6A, 2), (14, 0x6C, 2)],
    *[(15, 0x6E, 2)],  # the second of them, 1.5 * 2^15, gave its code to Inf
]


def hif8() -> Element:
    """HiFloat8, by its published table."""
    numbers = [(0, 0)]
    for exponent, code, count in HIF8_TABLE:
        numbers += [((count + i) * 2 ** (exponent + UNITS) // count, code + i) for i in range(count)]
    grid, codes = zip(*numbers, strict=True)
    return Element(
        bits=8,
        grid=grid,
        codes=codes,
        largest=len(grid) - 2,
        lowest=len(grid) - 2,
        min_normal=1 << (UNITS - 15),
        fraction_bits=0,
        negative_zero=False,
        specials={0x6F: np.inf, 0xEF: -np.inf, 0x80: np.nan},
    )


ELEMENTS: dict[str, Callable[[], Element]] = {
    # OCP MX v1.0 table 5, OFP8 table 1
    "fp4_e2m1": lambda: floating(2, 1, 1, 6, "none"),
    "fp6_e2m3": lambda: floating(2, 3, 1, 7.5, "none"),
    "fp6_e3m2": lambda: floating(3, 2, 3, 28, "none"),
    "fp8_e4m3": lambda: floating(4, 3, 7, 448, "nan"),
    "fp8_e5m2": lambda: floating(5, 2, 15, 57344, "inf"),
    "e8m0": lambda: floating(8, 0, 127, 2.0**127, "nan", signed=False, zero=False),
    "mxint8_element": lambda: integer(8, Fraction(1, 64), symmetric=True),
    # HiFloat4, arXiv 2602.11287
    "fp4_e1m2": lambda: floating(1, 2, 1, 1.75, "none"),
    "fp8_ue6m2": lambda: floating(6, 2, 48, 49152, "nan", signed=False, zero=False),
    "hif8": hif8,
    # arXiv 2206.02915
    "fp8_e4m3fnuz": lambda: floating(4, 3, 8, 240, "-0"),
    "fp8_e5m2fnuz": lambda: floating(5, 2, 16, 57344, "-0"),
    # IEEE 754 with other widths
    "fp8_e3m4": lambda: floating(3, 4, 3, 15.5, "inf"),
    "fp8_e4m3_ieee": lambda: floating(4, 3, 7, 240, "inf"),
    "fp8_ue5m3": lambda: floating(5, 3, 15, 114688, "nan", signed=False),
    "fp16": lambda: floating(5, 10, 15, 65504, "inf"),
    "bf16": lambda: floating(8, 7, 127, float.fromhex("0x1.FEp127"), "inf"),
    "tf32": lambda: floating(8, 10, 127, float.fromhex("0x1.FFCp127"), "inf"),
    "hf32": lambda: floating(8, 11, 127, float.fromhex("0x1.FFEp127"), "inf"),
    "int2": lambda: integer(2, Fraction(1), symmetric=False),
    "int4": lambda: integer(4, Fraction(1), symmetric=False),
    "int8": lambda: integer(8, Fraction(1), symmetric=False),
}


@lru_cache
def element(name: str) -> Element:
    return ELEMENTS[name]()


def decoded(e: Element) -> npt.NDArray[np.float64]:
    """The value of every code."""
    table = np.full(1 << e.bits, np.nan)
    for units, code in zip(e.grid[:-1], e.codes[:-1], strict=True):
        value = float(units) * 2.0**-UNITS
        if e.complement:
            table[-code % (1 << e.bits)] = -value or 0.0
        elif e.signed:
            table[code | 1 << (e.bits - 1)] = -value
        if code <= e.codes[e.largest] or not e.complement:
            table[code] = value
    for code, special in e.specials.items():
        table[code] = special
    return table


# ---- rounding -------------------------------------------------------------------------------------------------------


def pattern(units: int) -> int:
    """The binary32 bit pattern of a magnitude; every magnitude asked for has one, or is 2^128 or more."""
    shift = max(units.bit_length() - 24, 0)
    assert units >> shift << shift == units, "not a binary32 number"
    return (shift << 23) + (units >> shift)


def units_of(bits: int) -> int:
    """The magnitude of a binary32 bit pattern."""
    exponent, fraction = bits >> 23, bits & 0x7FFFFF
    return fraction if exponent == 0 else (fraction | 1 << 23) << (exponent - 1)


@lru_cache
def _patterns(e: Element) -> tuple[Any, Any, Any]:
    """Of all magnitudes and of the midpoints between them; and which magnitudes have an odd code."""
    middles = [(a + b) // 2 for a, b in itertools.pairwise(e.grid)]
    assert all(2 * m == a + b for m, (a, b) in zip(middles, itertools.pairwise(e.grid), strict=True))
    odd = np.array(e.codes) % 2 == 1
    return np.array([pattern(g) for g in e.grid]), np.array([pattern(m) for m in middles]), odd


def rounded(
    x: F32,
    to: str | Element,
    rounding: str = "nearest-even",
    *,
    overflow: str = "saturate",
    subnormals: str = "keep",
    nan: str = "keep",
    words: npt.ArrayLike | None = None,
) -> F32:
    """Each value as a number of the format."""
    e = element(to) if isinstance(to, str) else to
    grid, middles, odd = _patterns(e)
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32).astype(np.int64)
    magnitude, negative = bits & 0x7FFFFFFF, bits >= SIGN
    low = np.clip(np.searchsorted(grid, magnitude, side="right") - 1, 0, len(middles) - 1)
    between = (magnitude > grid[low]) & (magnitude < grid[-1])
    above, tie = magnitude > middles[low], magnitude == middles[low]
    if rounding.startswith("stochastic"):
        assert words is not None
        up = _stochastic(e, magnitude, low, between, int(rounding.partition("-")[2] or 32), np.asarray(words))
    elif rounding == "hif8-hybrid":
        up = _hybrid(magnitude, above | tie)
    else:
        up = {
            "nearest-even": above | (tie & odd[low]),
            "nearest-away": above | tie,
            "nearest-down": above,
            "toward-zero": np.zeros_like(above),
            "up": ~negative,
            "down": negative,
        }[rounding]
    index = np.where(magnitude >= grid[-1], len(grid) - 1, low + (up & between))
    limit = np.where(negative, e.lowest, e.largest)
    finite = magnitude < INF
    inner = {"toward-zero": finite, "up": finite & negative, "down": finite & ~negative}.get(rounding, False)
    beyond = index > limit
    out = grid[np.where(beyond, limit, index)]
    if subnormals == "flush":
        out = np.where(out < pattern(e.min_normal), 0, out)
    if overflow != "saturate":
        out = np.where(beyond & ~np.asarray(inner), INF if overflow == "inf" else NAN, out)
    out = np.where(negative & ((out > 0) | e.negative_zero), out | SIGN, out)
    if not e.signed:
        out = np.where(negative & (magnitude > 0), NAN, np.where(negative, grid[0], out))
    out = np.where(magnitude > INF, {"keep": NAN, "zero": 0, "max": grid[e.largest]}[nan], out)
    return out.astype(np.uint32).view(np.float32)


def _stochastic(e: Element, magnitude: Any, low: Any, between: Any, bits: int, words: Any) -> Any:
    """Up where the share of the gap, in units of 2^-bits and cut off, and the random number reach 2^bits."""
    up = np.zeros(magnitude.shape, bool)
    for i in zip(*np.nonzero(between), strict=True):
        below, above = e.grid[low[i]], e.grid[low[i] + 1]
        share = ((units_of(int(magnitude[i])) - below) << bits) // (above - below)
        up[i] = share + (int(words[i]) >> (32 - bits)) >= 1 << bits
    return up


def _hybrid(magnitude: Any, away: Any) -> Any:
    """HiFloat8's CAST_HYBRID of binary32: by the bits that are discarded, where exponents are large or small."""
    up = np.array(away)
    fraction_bits = {exponent: count.bit_length() - 1 for exponent, _, count in HIF8_TABLE}
    for i in zip(*np.nonzero((magnitude >= (127 - 23) << 23) & (magnitude < pattern(40960 << UNITS))), strict=True):
        exponent, fraction = (int(magnitude[i]) >> 23) - 127, int(magnitude[i]) & 0x7FFFFF
        if abs(exponent) < 4:
            continue
        if exponent == -23:
            up[i] = (fraction >> 10) + 2**13 >= fraction & 0x3FFF
            continue
        drop = 23 - fraction_bits[exponent]
        rest = fraction & ((1 << drop) - 1)
        up[i] = rest >> (drop - 14) >= rest & 0x3FFF
    return up


def floats(values: Iterable[Fraction]) -> F32:
    """Fractions as binary32, all of them exactly."""
    out = []
    for v in values:
        units = abs(v) * 2**UNITS
        assert units.denominator == 1, "not a binary32 number"
        out.append(pattern(units.numerator) | (SIGN if v < 0 else 0))
    return np.array(out, np.uint32).view(np.float32)


def fractions(x: Any) -> Row:
    """Finite binary32 values as fractions."""
    bits = np.ascontiguousarray(x, np.float32).reshape(-1).view(np.uint32).tolist()
    return [Fraction(units_of(b & 0x7FFFFFFF) * (-1 if b >= SIGN else 1), 2**UNITS) for b in bits]


def to_element(values: Sequence[Fraction], name: str, rounding: str = "nearest-even", words: Any = None) -> Row:
    """Binary32 values rounded to a format, saturating."""
    return fractions(rounded(floats(values), name, rounding, words=words))


def floor_log2(x: Fraction) -> int:
    """The largest e with 2^e <= x."""
    e = x.numerator.bit_length() - x.denominator.bit_length()
    return e if (Fraction(2) ** e if e < 0 else 2**e) <= x else e - 1


def ceil_log2(x: Fraction) -> int:
    """The smallest e with 2^e >= x."""
    e = floor_log2(x)
    return e if Fraction(2) ** e == x else e + 1


def _to_precision(x: Fraction, digits: int) -> Fraction:
    if x == 0:
        return x
    shift = max(floor_log2(abs(x)), -126) - digits + 1
    steps, rest = divmod(x.numerator << max(-shift, 0), x.denominator << max(shift, 0))
    twice = 2 * rest - (x.denominator << max(shift, 0))
    steps += twice > 0 or (twice == 0 and steps % 2 == 1)
    result = Fraction(steps << shift) if shift >= 0 else Fraction(steps, 1 << -shift)
    assert abs(result) < 2**128, "overflow: keep clear of it"
    return result


def binary32(x: Fraction) -> Fraction:
    """Rounded to binary32, nearest even; the caller keeps clear of overflow."""
    return _to_precision(x, 24)


def bfloat16(x: Fraction) -> Fraction:
    """Rounded to bfloat16, nearest even; the caller keeps clear of overflow."""
    return _to_precision(x, 8)


# ---- blocks ---------------------------------------------------------------------------------------------------------


def positions(shape: Sequence[int], block: int | tuple[int, int] | str, axis: int = -1) -> list[list[list[int]]]:
    """The blocks of a tensor: of each, its rows, and of each row the places of its elements in C order.

    Blocks come in C order of a tensor with their scales, in which an axis with blocks along it counts blocks.
    """
    shape = tuple(shape) or (1,)
    strides = [math.prod(shape[i + 1 :]) for i in range(len(shape))]
    if block == "tensor":
        return [[list(range(math.prod(shape)))]]
    axis %= len(shape)
    rows, columns = block if isinstance(block, tuple) else (1, shape[axis] if block == "axis" else block)
    assert isinstance(columns, int)
    sizes = [1] * len(shape)
    sizes[axis] = columns
    across = {len(shape) - 1: len(shape) - 2, len(shape) - 2: len(shape) - 1}[axis] if rows > 1 else -1
    if across >= 0:
        sizes[across] = rows
    found = []
    for start in itertools.product(*(range(0, n, max(size, 1)) for n, size in zip(shape, sizes, strict=True))):
        first = sum(i * s for i, s in zip(start, strides, strict=True))
        high = min(rows, shape[across] - start[across]) if across >= 0 else 1
        wide = min(columns, shape[axis] - start[axis])
        step = strides[across] if across >= 0 else 0
        found.append([[first + r * step + c * strides[axis] for c in range(wide)] for r in range(high)])
    return found


@dataclass(frozen=True)
class Block:
    """A block's scale, the numbers of the element format and what they stand for."""

    scale: Fraction
    elements: Tile
    values: Tile


def _largest(tile: Tile) -> Fraction:
    return max((abs(v) for row in tile for v in row), default=Fraction(0))


def _map(tile: Tile, change: Callable[[Fraction], Fraction]) -> Tile:
    return [[change(v) for v in row] for row in tile]


def _error_sum(errors: Tile, rows: int) -> Fraction:
    """In binary32: each row from left to right, then the rows of a full tile, the first half plus the second."""
    sums = [Fraction(0)] * (1 << (rows - 1).bit_length())
    for i, row in enumerate(errors):
        for v in row:
            sums[i] = binary32(sums[i] + v)
    while len(sums) > 1:
        half = len(sums) // 2
        sums = [binary32(sums[i] + sums[i + half]) for i in range(half)]
    return sums[0]


def _e8m0_exponent(amax: Fraction, e: Element, rule: str) -> int:
    emax, top = floor_log2(e.max), floor_log2(amax)
    digits = amax / Fraction(2) ** top
    if rule == "ceil":
        return ceil_log2(amax) - emax
    if rule == "rceil":
        return ceil_log2(amax / e.max)
    if rule == "even":
        steps = 2**e.fraction_bits
        carried = (digits * steps + Fraction(1, 2)) // 1 == 2 * steps
        return top + carried - emax
    return top + (rule == "amct" and digits > Fraction(7, 4)) - emax


def mx(tile: Tile, name: str, rule: str = "floor", rounding: str = "nearest-even", rows: int = 1) -> Block:
    """One block with an E8M0 scale, not all zeros."""
    e = element(name)

    def clamp(exponent: int) -> int:
        return min(max(exponent, -127), 127)

    def scaled(exponent: int) -> Tile:
        return _map(tile, lambda v: binary32(v / Fraction(2) ** exponent))

    exponent = clamp(_e8m0_exponent(_largest(tile), e, rule))
    if rule == "mse":
        errors = {}
        for candidate in (exponent, clamp(exponent + 1), clamp(exponent - 1)):
            if candidate in errors:
                continue
            off = [
                [binary32(q - v) for q, v in zip(to_element(row, name), row, strict=True)] for row in scaled(candidate)
            ]
            total = _error_sum(_map(off, lambda v: binary32(v * v)), rows)
            errors[candidate] = binary32(total * Fraction(4) ** (candidate - exponent))
        exponent = min(errors, key=lambda k: errors[k])
    x = Fraction(2) ** exponent
    elements = [to_element(row, name, rounding) for row in scaled(exponent)]
    return Block(x, elements, _map(elements, lambda v: binary32(v * x)))


def fp32_scaled(tile: Tile, name: str, rule: str = "amax", to: Fraction | None = None) -> Block:
    """One block with a binary32 scale."""
    largest, to = _largest(tile), to or element(name).max
    if rule == "amax":
        scale = binary32(largest / to) or Fraction(1)
        scaled = _map(tile, lambda v: binary32(v / scale))
    else:
        encode = binary32(min(to / largest, FLOAT_MAX)) if largest else Fraction(1)
        if rule == "te-pow2":
            encode = Fraction(2) ** floor_log2(encode)
        scale = binary32(1 / encode)
        scaled = _map(tile, lambda v: binary32(v * encode))
    elements = [to_element(row, name) for row in scaled]
    return Block(scale, elements, _map(elements, lambda v: binary32(v * scale)))


def _e4m3(x: Fraction) -> Fraction:
    return to_element([x], "fp8_e4m3")[0]


def _e2m1(tile: Tile, scale: Callable[[Fraction], Fraction]) -> Tile:
    return [to_element([binary32(_clip(scale(v), -FLOAT_MAX, FLOAT_MAX)) for v in row], "fp4_e2m1") for row in tile]


def _reciprocal(x: Fraction) -> Fraction:
    return binary32(min(1 / x, FLOAT_MAX)) if x else FLOAT_MAX


def _clip(x: Fraction, low: Fraction, high: Fraction) -> Fraction:
    return min(max(x, low), high)


def nvfp4(tiles: list[Tile], rule: str = "te", scale_max: int = 448, rows: int = 1) -> tuple[list[Block], Fraction]:
    """A tensor in blocks, by the order of operations of a library; and the tensor's scale. It is not all zeros."""
    amax = max(_largest(t) for t in tiles)
    one, sixth = Fraction(1), binary32(Fraction(1, 6))
    tensor_scale = binary32(amax / 2688)

    def te(tile: Tile) -> Block:
        encode = binary32(min(2688 / amax, FLOAT_MAX))
        s = _e4m3(binary32(min(_largest(tile) * binary32(encode * sixth), FLOAT_MAX)))
        inverse = _reciprocal(binary32(s * binary32(1 / encode)))
        q = _e2m1(tile, lambda v: v * inverse)
        return Block(s, q, _map(q, lambda v: binary32(binary32(v * s) * tensor_scale)))

    def qutlass(tile: Tile) -> Block:
        s = _e4m3(binary32(6 * binary32(_largest(tile) * sixth)))
        inverse = _reciprocal(binary32(s * sixth)) if s else Fraction(0)
        q = _e2m1(tile, lambda v: v * inverse)
        return Block(s, q, _map(q, lambda v: binary32(binary32(v * s) * sixth)))

    def torchao(tile: Tile) -> Block:
        wanted = binary32(binary32(_largest(tile) / 6) / tensor_scale)
        s = _e4m3(_clip(wanted, Fraction(1, 64), Fraction(448)))
        inverse, decode = binary32(binary32(one / tensor_scale) / s), binary32(tensor_scale * s)
        q = _e2m1(tile, lambda v: v * inverse)
        return Block(s, q, _map(q, lambda v: binary32(v * decode)))

    def modelopt(tile: Tile) -> Block:
        wanted = binary32(_largest(tile) / binary32(6 * tensor_scale)) or one
        s = _e4m3(_clip(wanted, Fraction(1, 512), Fraction(448)))
        decode = binary32(s * tensor_scale)
        q = _e2m1(tile, lambda v: v / decode)
        return Block(s, q, _map(q, lambda v: binary32(v * decode)))

    def compressed_tensors(tile: Tile) -> Block:
        s = _e4m3(binary32(binary32(_largest(tile) / 6) * encode_ct)) or Fraction(1, 8)
        decode = binary32(s / encode_ct)
        q = _e2m1(tile, lambda v: v / decode)
        return Block(s, q, _map(q, lambda v: binary32(v * decode)))

    def four_over_six(tile: Tile) -> Block:
        top = Fraction(6 * scale_max)
        encode = binary32(min(top / amax, FLOAT_MAX))
        base = binary32(binary32(_largest(tile) / 6) * encode)
        found: list[tuple[Fraction, Fraction, Tile]] = []
        for wanted in (base, binary32(base * Fraction(3, 2))):
            s = _e4m3(wanted)
            inverse = _reciprocal(binary32(s * binary32(1 / encode)))
            q = _e2m1(tile, lambda v, inverse=inverse: v * inverse)  # type: ignore[misc]
            y = _map(q, lambda v, s=s: binary32(binary32(binary32(v * s) * amax) / top))  # type: ignore[misc]
            off = [[binary32(a - b) for a, b in zip(*r, strict=True)] for r in zip(y, tile, strict=True)]
            size = _map(off, lambda v: binary32(v * v) if rule == "4over6-mse" else abs(v))
            found.append((_error_sum(size, rows), s, q))
        _, s, q = found[found[1][0] < found[0][0]]
        decode = binary32(amax / top)
        return Block(s, q, _map(q, lambda v: binary32(binary32(v * s) * decode)))

    if rule.startswith("4over6"):
        return [four_over_six(t) for t in tiles], binary32(amax / (6 * scale_max))
    if rule == "compressed_tensors":
        exact = 2688 * binary32(1 / max(amax, FLOAT_TINY))  # torch divides a number by a tensor so
        encode_ct = binary32(exact) if exact < 2**128 else one
        return [compressed_tensors(t) for t in tiles], encode_ct
    by_rule = {"te": te, "qutlass": qutlass, "torchao": torchao, "modelopt": modelopt}[rule]
    return [by_rule(t) for t in tiles], sixth if rule == "qutlass" else tensor_scale


@dataclass(frozen=True)
class HiF4:
    """A HiFloat4 block of 64: its scale, one bit for each 8 and one for each 4, the numbers and their meaning."""

    scale: Fraction
    eights: list[int]
    fours: list[int]
    elements: Row
    values: Row


def hif4(block: Row) -> HiF4:
    """HiFloat4: binary32 products, and bfloat16 where its reference rounds to it."""
    largest = max(abs(v) for v in block)
    wanted = bfloat16(binary32(largest * bfloat16(Fraction(1, 7))))
    s = to_element([_clip(wanted, Fraction(1, 2**48), Fraction(49152))], "fp8_ue6m2")[0]
    inverse = bfloat16(1 / s)
    m = [binary32(abs(v) * inverse) for v in block]
    eights = [int(max(m[i : i + 8]) >= 4) for i in range(0, 64, 8)]
    fours = [int(max(m[i : i + 4]) / 2 ** eights[i // 8] >= 2) for i in range(0, 64, 4)]
    elements, values = [], []
    for i, v in enumerate(block):
        shift = eights[i // 8] + fours[i // 4]
        code = min(7, int(4 * bfloat16(m[i] / 2**shift) + Fraction(1, 2)))
        q = Fraction(code, 4) * (-1 if v < 0 else 1)
        elements.append(q)
        values.append(q * 2**shift * s)
    return HiF4(s, eights, fours, elements, values)
