"""Rounding to an element format."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from aqnsim import formats
from aqnsim._errors import ConfigError
from aqnsim.formats import Format, element_of, random_bits

F32 = npt.NDArray[np.float32]
U32 = npt.NDArray[np.uint32]


def round_to(x: F32, fmt: Format, words: U32 | None = None) -> F32:
    """Each value as one of ``fmt``'s, by ``fmt.rounding``; beyond its range as ``fmt.overflow`` says.

    NaN stays NaN unless ``fmt.nan`` says otherwise, the sign of zero is kept where the format has one, Inf counts as
    beyond the range, and a format without a sign makes NaN of negative values.

    Args:
        words: random words, one a value, for a stochastic rounding.
    """
    x = np.asarray(x, np.float32)
    with np.errstate(invalid="ignore"):  # signalling NaNs
        wide = np.abs(x).astype(np.float64)
    negative, finite = np.signbit(x), np.where(np.isfinite(wide), wide, 0.0)
    exponent = np.frexp(finite)[1].astype(np.int64) - 1
    width = _fraction_bits(exponent, fmt)
    quantum = np.maximum(exponent, -fmt.taper[-1][0] if fmt.taper else fmt.min_exponent) - width  # log2 of a step
    steps = np.ldexp(finite, -quantum)  # exact in float64, as is all that follows
    whole = np.floor(steps)
    whole += _rounds_up(x, steps - whole, _is_odd(whole, quantum, width, fmt), negative, exponent, quantum, fmt, words)
    magnitude = np.ldexp(whole, quantum)
    if fmt.subnormals == "flush":
        magnitude = np.where(magnitude < fmt.min_normal, 0.0, magnitude)
    if not fmt.has_zero:
        magnitude = np.maximum(magnitude, fmt.min_normal)
    magnitude = np.where(np.isinf(wide), np.inf, magnitude)
    limit = np.where(negative, -fmt.min, fmt.max) if fmt.signed else fmt.max
    magnitude = np.where(magnitude > limit, _beyond(limit, negative, np.isfinite(wide), fmt), magnitude)
    with np.errstate(invalid="ignore"):
        sign = np.copysign(1.0, x)
    result = magnitude * sign if fmt.has_negative_zero else magnitude * sign + 0.0
    if not fmt.signed:
        result = np.where(negative & (wide > 0), np.nan, magnitude)
    nan = {"keep": np.nan, "zero": 0.0, "max": fmt.max}[fmt.nan]
    return np.asarray(np.where(np.isnan(wide), nan, result), np.float32)


def _fraction_bits(exponent: npt.NDArray[np.int64], fmt: Format) -> npt.NDArray[np.int64]:
    """The width of the fraction of numbers of an exponent."""
    if not fmt.taper:
        return np.full_like(exponent, fmt.mantissa_bits)
    width = np.zeros_like(exponent)
    for limit, bits in reversed(fmt.taper):
        width = np.where(np.abs(exponent) <= limit, bits, width)
    return width


def _is_odd(whole: Any, quantum: Any, width: Any, fmt: Format) -> Any:
    """Whether the code of ``whole * 2^quantum`` is odd. Without fraction bits codes are exponents."""
    return np.where(width == 0, (whole == 1) & ((quantum + fmt.code_bias) % 2 == 1), whole % 2 == 1)


def _rounds_up(
    x: F32, rest: Any, odd: Any, negative: Any, exponent: Any, quantum: Any, fmt: Format, words: U32 | None
) -> Any:
    """Whether a magnitude with the remainder ``rest``, a share of the quantum, goes to the larger neighbour."""
    rounding = fmt.rounding
    if bits := random_bits(fmt):
        if words is None:
            raise ConfigError(f"rounding {rounding!r} of {fmt.name} needs random words: pass a key")
        return np.floor(np.ldexp(rest, bits)) + (words >> np.uint32(32 - bits)) >= 2.0**bits
    away = rest >= 0.5
    if rounding == "hif8-hybrid":
        # The 14 leading discarded bits against the 14 trailing ones, for binary32 with `dropped` bits to discard. An
        # exact value stays, which the one public source does not say.
        dropped = (23 + quantum - exponent).astype(np.float64)
        discarded = np.ldexp(rest, dropped.astype(np.int64))
        leading = np.floor(np.ldexp(rest, 14))
        pseudo = (leading >= discarded % 2**14) & (rest > 0) & (exponent >= -23)
        return np.where(np.abs(exponent) < 4, away, np.where(np.abs(x) < 40960, pseudo, away))
    return {
        "nearest-even": lambda: (rest > 0.5) | ((rest == 0.5) & odd),
        "nearest-away": lambda: away,
        "nearest-down": lambda: rest > 0.5,
        "toward-zero": lambda: np.zeros_like(away),
        "up": lambda: (rest > 0) & ~negative,
        "down": lambda: (rest > 0) & negative,
    }[rounding]()


def _beyond(limit: Any, negative: Any, finite: Any, fmt: Format) -> Any:
    """What a magnitude beyond the range becomes; a directed rounding does not leave the range on its inner side."""
    above = {"saturate": limit, "inf": np.inf, "nan": np.nan}[fmt.overflow]
    inner = {"toward-zero": np.ones_like(negative), "up": negative, "down": ~negative}.get(fmt.rounding)
    return above if inner is None else np.where(inner & finite, limit, above)


def to_bf16(x: F32) -> F32:
    """fp32 values rounded to bfloat16 (nearest, ties to even), kept as fp32."""
    return round_to(x, element_of(formats.get("bf16")))
