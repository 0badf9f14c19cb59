"""Casts in exact rational arithmetic: an oracle that shares no code and no method with the package.

Rounding looks a value up in the sorted list of all numbers of a format; a tie goes to the even code. Where a
specification computes in binary32, every single step is rounded to binary32 here, from the exact result.
"""

from __future__ import annotations

from bisect import bisect_right
from fractions import Fraction
from functools import lru_cache

FLOAT_MAX = Fraction(2**24 - 1) * Fraction(2) ** 104

# exponent bits, mantissa bits, bias, largest magnitude: OCP MX v1.0 table 5, OFP8 table 1
ELEMENTS = {
    "fp4_e2m1": (2, 1, 1, 6),
    "fp6_e2m3": (2, 3, 1, Fraction(15, 2)),
    "fp6_e3m2": (3, 2, 3, 28),
    "fp8_e4m3": (4, 3, 7, 448),
    "fp8_e5m2": (5, 2, 15, 57344),
}
MX = {
    "mxfp4": "fp4_e2m1",
    "mxfp6_e2m3": "fp6_e2m3",
    "mxfp6_e3m2": "fp6_e3m2",
    "mxfp8_e4m3": "fp8_e4m3",
    "mxfp8_e5m2": "fp8_e5m2",
}


@lru_cache
def magnitudes(element: str) -> list[Fraction]:
    """All magnitudes of an element format; the index is the code."""
    e_bits, m_bits, bias, largest = ELEMENTS[element]
    found = []
    for code in range(1 << (e_bits + m_bits)):
        field, fraction = divmod(code, 1 << m_bits)
        exponent = max(field, 1) - bias
        value = (Fraction(fraction, 1 << m_bits) + (field > 0)) * Fraction(2) ** exponent
        if value <= largest:
            found.append(value)
    return found


def nearest_even(x: Fraction, element: str) -> Fraction:
    """The nearest number of the format, ties to the even code, saturating."""
    grid = magnitudes(element)
    above = bisect_right(grid, abs(x))
    if above == len(grid):
        return grid[-1] if x > 0 else -grid[-1]
    low, high = grid[above - 1], grid[above]
    down = abs(x) - low < high - abs(x) or (abs(x) - low == high - abs(x) and (above - 1) % 2 == 0)
    return (low if down else high) * (1 if x >= 0 else -1)


def floor_log2(x: Fraction) -> int:
    """The largest e with 2^e <= x."""
    e = x.numerator.bit_length() - x.denominator.bit_length()
    while Fraction(2) ** e > x:
        e -= 1
    while Fraction(2) ** (e + 1) <= x:
        e += 1
    return e


def binary32(x: Fraction) -> Fraction:
    """Rounded to binary32, nearest even; the caller keeps clear of overflow."""
    if x == 0:
        return x
    quantum = Fraction(2) ** (max(floor_log2(abs(x)), -126) - 23)
    return round(x / quantum) * quantum  # Python rounds a Fraction half to even


def mx_floor(block: list[Fraction], fmt: str) -> list[Fraction]:
    """One block under OCP MX v1.0 section 6.3."""
    element = MX[fmt]
    amax = max(abs(v) for v in block)
    if amax == 0:
        return block
    emax = floor_log2(magnitudes(element)[-1])
    x = Fraction(2) ** min(max(floor_log2(amax) - emax, -127), 127)
    return [nearest_even(v / x, element) * x for v in block]


def nvfp4(rows: list[list[Fraction]]) -> list[list[Fraction]]:
    """A tensor, blocks of 16 along its rows, in the order of operations of TransformerEngine's NVFP4."""
    amax = max(abs(v) for row in rows for v in row)
    if amax == 0:
        return rows
    encode = min(binary32(Fraction(2688) / amax), FLOAT_MAX)
    sixth = binary32(Fraction(1, 6))
    decode = binary32(amax / 2688)

    def block(values: list[Fraction]) -> list[Fraction]:
        largest = max(abs(v) for v in values)
        s = nearest_even(min(binary32(largest * binary32(encode * sixth)), FLOAT_MAX), "fp8_e4m3")
        product = binary32(s * binary32(1 / encode))
        inverse = min(binary32(1 / product), FLOAT_MAX) if product else FLOAT_MAX
        q = [nearest_even(binary32(v * inverse), "fp4_e2m1") for v in values]
        return [binary32(binary32(v * s) * decode) for v in q]

    return [[v for i in range(0, len(row), 16) for v in block(row[i : i + 16])] for row in rows]
