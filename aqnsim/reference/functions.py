"""Elementary functions from tables, and the layers that are made of them (see :mod:`aqnsim.approximation`)."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from aqnsim.approximation import LIMITS, Approximation, Table, entries
from aqnsim.reference.rounding import F32

I32 = npt.NDArray[np.int32]

_f = np.float32


def evaluate(x: F32, function: str, approximation: Approximation) -> F32:
    """The function of each element; ``sigmoid`` is ``1 / (1 + exp(-x))``."""
    x = np.asarray(x, np.float32)
    with np.errstate(all="ignore"):
        if function == "sigmoid":
            return _reciprocal_by(_f(1) + evaluate(-x, "exp", approximation), approximation)
        table = approximation.of(function)
        assert table is not None
        if function == "exp":
            return _exp(x, table)
        if function == "reciprocal":
            return _reciprocal(x, table)
        if function == "rsqrt":
            return _rsqrt(x, table)
        return _limited(x, table)


def _looked_up(position: F32, table: Table) -> F32:
    """The nearest entry, or the point of the line, at positions 0 .. ``intervals``, counted in intervals."""
    values = np.array(entries(table.function, table.index_bits), np.float32)
    if table.order == 0:
        return np.asarray(values[np.floor(position + _f(0.5)).astype(np.int64)])
    index = np.minimum(np.floor(position), _f(table.intervals - 1))
    at = index.astype(np.int64)
    return np.asarray(values[at] + (position - index) * (values[at + 1] - values[at]))


def _power_of_two(exponent: I32) -> F32:
    return ((exponent + np.int32(127)) << np.int32(23)).view(np.float32)


def _scaled(y: F32, exponent: I32) -> F32:
    """``y 2^exponent``, rounded once: the first of two factors leaves a normal number."""
    half = exponent >> np.int32(1)
    return y * _power_of_two(half) * _power_of_two(exponent - half)


def _parts(x: F32) -> tuple[I32, F32]:
    """Of each magnitude ``2^exponent (1 + fraction)``, for finite numbers but 0."""
    tiny = np.abs(x) < _f(2**-126)
    bits = np.where(tiny, np.abs(x) * _f(2**24), np.abs(x)).view(np.int32)
    exponent = (bits >> np.int32(23)) - np.where(tiny, np.int32(127 + 24), np.int32(127))
    return exponent, (bits & np.int32(0x7FFFFF)).astype(np.float32) * _f(2**-23)


def _exp(x: F32, table: Table) -> F32:
    """``2^n 2^f`` for ``n + f = x log2(e)``, rounded to fp32."""
    power = np.where(np.isnan(x), _f(0), x * _f(1.4426950408889634))
    power = np.clip(power, _f(-151), _f(129))  # beyond, the result is 0 or Inf already
    whole = np.floor(power)
    y = _looked_up((power - whole) * _f(table.intervals), table)
    return np.where(np.isnan(x), x, _scaled(y, whole.astype(np.int32)))


def _reciprocal(x: F32, table: Table) -> F32:
    exponent, fraction = _parts(x)
    y = _looked_up(fraction * _f(table.intervals), table)
    for _ in range(table.newton):
        y = y * (_f(2) - (_f(1) + fraction) * y)
    y = np.where(x == 0, _f(np.inf), np.where(np.isinf(x), _f(0), _scaled(y, -exponent)))
    return np.where(np.isnan(x), x, np.copysign(y, x))


def _rsqrt(x: F32, table: Table) -> F32:
    """``2^-k / sqrt(m)`` for ``x = 4^k m``, m in [1, 4)."""
    exponent, fraction = _parts(x)
    odd = exponent & np.int32(1)
    octave = odd.astype(np.float32)
    y = _looked_up((octave + fraction) * _f(table.intervals // 2), table)
    half = _f(0.5) * ((_f(1) + fraction) * (_f(1) + octave))
    for _ in range(table.newton):
        y = y * (_f(1.5) - half * y * y)
    y = np.where(np.isinf(x), _f(0), _scaled(y, -(exponent >> np.int32(1))))
    y = np.where(x == 0, np.copysign(_f(np.inf), x), y)
    return np.where(np.isnan(x) | (x < 0), _f(np.nan), y)


def _limited(x: F32, table: Table) -> F32:
    """An odd function that is 1 from its limit on."""
    position = np.where(np.isnan(x), _f(0), np.abs(x) * _f(table.intervals / LIMITS[table.function]))
    y = _looked_up(np.minimum(position, _f(table.intervals)), table)
    return np.where(np.isnan(x), x, np.copysign(y, x))


def _reciprocal_by(x: F32, approximation: Approximation) -> F32:
    """``1 / x``, by a table where there is one."""
    return _f(1) / x if approximation.of("reciprocal") is None else evaluate(x, "reciprocal", approximation)


# ---- layers ---------------------------------------------------------------------------------------------------------


def tree_sum(x: F32) -> F32:
    """Sums along the last axis, ``[..., 1]``: the second half is added to the first until one is left."""
    while (n := x.shape[-1]) > 1:
        low, high = x[..., : n - n // 2], x[..., n - n // 2 :]
        x = low + np.concatenate([high, np.zeros((*x.shape[:-1], n % 2), np.float32)], axis=-1)
    return x


def softmax(x: F32, dim: int, approximation: Approximation) -> F32:
    """``e / sum(e)`` for ``e = exp(x - max(x))``."""
    x = np.moveaxis(np.asarray(x, np.float32), dim, -1)
    with np.errstate(all="ignore"):
        e = evaluate(x - x.max(-1, keepdims=True), "exp", approximation)
        total = tree_sum(e)
        exact = approximation.of("reciprocal") is None
        p = e / total if exact else e * evaluate(total, "reciprocal", approximation)
    return np.moveaxis(p, -1, dim)


def rms_norm(x: F32, weight: F32 | None, eps: float, offset: float, approximation: Approximation) -> F32:
    """``x rsqrt(mean(x^2) + eps) (offset + weight)``."""
    with np.errstate(all="ignore"):
        y = x * evaluate(tree_sum(x * x) / _f(x.shape[-1]) + _f(eps), "rsqrt", approximation)
        return y if weight is None else y * (_f(offset) + weight)


def layer_norm(
    x: F32, weight: F32 | None, bias: F32 | None, eps: float, approximation: Approximation
) -> npt.NDArray[Any]:
    """``c rsqrt(mean(c^2) + eps) weight + bias`` for ``c = x - mean(x)``."""
    n = _f(x.shape[-1])
    with np.errstate(all="ignore"):
        centred = x - tree_sum(x) / n
        y = centred * evaluate(tree_sum(centred * centred) / n + _f(eps), "rsqrt", approximation)
        y = y if weight is None else y * weight
        return y if bias is None else y + bias


def silu(x: F32, approximation: Approximation) -> F32:
    """``x sigmoid(x)``."""
    with np.errstate(all="ignore"):
        return x * evaluate(x, "sigmoid", approximation)


def gelu(x: F32, variant: str, approximation: Approximation) -> F32:
    """``x / 2 (1 + erf(x / sqrt(2)))``, or with ``tanh(sqrt(2 / pi) (x + 0.044715 x^3))`` for erf."""
    with np.errstate(all="ignore"):
        inner = x * _f(0.5**0.5)
        if variant == "tanh":
            inner = _f((2 / np.pi) ** 0.5) * (x + _f(0.044715) * (x * x * x))
        return _f(0.5) * x * (_f(1) + evaluate(inner, variant, approximation))
