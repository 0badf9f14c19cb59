"""Codes of values and values of codes, for whole arrays."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from aqnsim import formats
from aqnsim.formats import Format
from aqnsim.reference.rounding import F32

_TABLE_BITS = 16
"""Codes of at most so many bits are looked up; wider ones, of signed floating-point formats alone, are computed."""


@lru_cache(maxsize=64)
def _value_table(fmt: Format) -> F32:
    """The value of every code."""
    return np.array([fmt.decode(code) for code in range(fmt.codes)], np.float32)


@lru_cache(maxsize=64)
def _code_table(fmt: Format) -> tuple[F32, npt.NDArray[np.int64]]:
    """Every finite value ascending, -0 and 0 as one, and the code of each."""
    values = formats.all_values(fmt)
    return np.array(values, np.float32), np.array([fmt.encode(v) for v in values], np.int64)


def decode(codes: npt.NDArray[Any], fmt: Format) -> F32:
    """Values of integer codes; see :meth:`Format.decode`."""
    codes = np.asarray(codes, np.int64)
    if fmt.bits <= _TABLE_BITS:
        return np.asarray(_value_table(fmt)[codes])
    fraction = codes & ((1 << fmt.mantissa_bits) - 1)
    field = (codes >> fmt.mantissa_bits) & ((1 << fmt.exponent_bits) - 1)
    significand = fraction + np.where(field > 0, 1 << fmt.mantissa_bits, 0)
    magnitude = np.ldexp(significand.astype(np.float64), np.maximum(field, 1) - fmt.bias - fmt.mantissa_bits)
    if fmt.specials == "ieee":
        ends = field == (1 << fmt.exponent_bits) - 1
        magnitude = np.where(ends, np.where(fraction > 0, np.nan, np.inf), magnitude)
    ones = (1 << (fmt.bits - 1)) - 1
    if fmt.specials == "fn":
        magnitude = np.where(codes & ones == ones, np.nan, magnitude)
    if fmt.specials == "fnuz":
        magnitude = np.where(codes == ones + 1, np.nan, magnitude)
    return np.asarray(np.where(codes >> (fmt.bits - 1), -magnitude, magnitude), np.float32)


def encode(x: F32, fmt: Format) -> npt.NDArray[np.int64]:
    """Codes of values that ``fmt`` holds; see :meth:`Format.encode`."""
    x = np.asarray(x, np.float32)
    finite = np.where(np.isfinite(x), x, np.float32(0))
    if fmt.bits <= _TABLE_BITS:
        values, codes = _code_table(fmt)
        found = codes[np.minimum(np.searchsorted(values, finite), len(values) - 1)]
        if fmt.has_negative_zero:
            found = np.where((x == 0) & np.signbit(x), fmt.encode(-0.0), found)
    else:
        exponent = np.maximum(np.frexp(finite)[1].astype(np.int64) - 1, fmt.min_exponent)
        exponent = np.where(finite == 0, fmt.min_exponent, exponent)
        steps = np.ldexp(np.abs(finite).astype(np.float64), fmt.mantissa_bits - exponent).astype(np.int64)
        found = steps + ((exponent - fmt.min_exponent) << fmt.mantissa_bits)
        found |= np.signbit(x).astype(np.int64) << (fmt.bits - 1)
    specials = ([math.inf, -math.inf][: 1 + fmt.signed] if fmt.has_inf else []) + ([math.nan] if fmt.has_nan else [])
    for special in specials:
        found = np.where(np.isnan(x) if math.isnan(special) else x == special, fmt.encode(special), found)
    return np.asarray(found)
