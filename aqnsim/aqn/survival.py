"""What an implementation that adds noise to stored weights in place would keep of it."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping

from aqnsim._errors import ConfigError, unknown
from aqnsim.aqn.schedules import is_size

DTYPES = {"fp32": (8, 23), "bf16": (8, 7), "fp16": (5, 10)}
"""Exponent and fraction bits of the dtypes of weights."""


def survives(sigma: float, weights: Iterable[float] | Mapping[float, int], dtype: str) -> float:
    """The expected share of weights whose stored value changes when N(0, sigma^2) is added to it in place.

    A sum that rounds back to the weight loses its noise. With h above and l below the distances from the weight to
    the midpoints to its neighbours, it changes with probability ``(erfc(h / (sigma sqrt 2)) + erfc(l / (sigma sqrt
    2))) / 2``. The sum is taken as exact before it is rounded to nearest even. The noise here is added in fp32 to a
    copy, so it loses none of this: the share says what an implementation in place would be compared with.

    Args:
        sigma: standard deviation, in units of the weights; 0 changes none.
        weights: values, or a histogram {value: count}; each is first rounded to the dtype, as it would be stored.
        dtype: ``fp32``, ``bf16`` or ``fp16``.

    Returns:
        A share from 0 to 1.

    Raises:
        ConfigError: a sigma that is negative or not finite, no weight, a count below 1, a weight that is not finite in
            the dtype.
        UnknownNameError: another dtype.

    >>> [round(survives(sigma, [1.0], "bf16"), 4) for sigma in (5e-4, 9e-4, 2.8e-3)]
    [0.0, 0.015, 0.3242]
    """
    if dtype not in DTYPES:
        raise unknown("dtype of weights", dtype, DTYPES)
    if not is_size(sigma, zero=True):
        raise ConfigError(f"survives: sigma must be a finite number >= 0, got {sigma!r}")
    counts = Counter(weights)
    if not counts or min(counts.values()) < 1:
        raise ConfigError("survives: expected weights, or a histogram of them with counts above 0")
    if sigma == 0:
        return 0.0
    changed = math.fsum(count * _changes(sigma, weight, dtype) for weight, count in counts.items())
    return changed / counts.total()


def _changes(sigma: float, weight: float, dtype: str) -> float:
    stored = abs(_stored(weight, dtype))
    above = _spacing(stored, dtype)
    below = _spacing(math.nextafter(stored, 0.0), dtype)  # finer below a power of two
    scale = 2 * sigma * math.sqrt(2)
    return (math.erfc(above / scale) + math.erfc(below / scale)) / 2


def _stored(weight: float, dtype: str) -> float:
    """A weight rounded to nearest even."""
    end = math.ldexp(1.0, 2 ** (DTYPES[dtype][0] - 1))
    spacing = _spacing(weight, dtype)
    stored = round(weight / spacing) * spacing if math.isfinite(weight) else math.inf
    if abs(stored) >= end:
        raise ConfigError(f"survives: {weight!r} is not finite in {dtype}: expected weights as they are stored")
    return stored


def _spacing(value: float, dtype: str) -> float:
    """The distance of neighbouring numbers in a value's binade; that of the subnormals below the normal ones."""
    exponent_bits, fraction_bits = DTYPES[dtype]
    lowest = 2 - 2 ** (exponent_bits - 1)
    exponent = max(math.frexp(value)[1] - 1, lowest) if value else lowest
    return math.ldexp(1.0, exponent - fraction_bits)
