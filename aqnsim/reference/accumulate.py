"""How a matrix unit adds up products, in exact integers (see :mod:`aqnsim.accumulator`)."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from aqnsim.accumulator import Accumulator
from aqnsim.reference.rounding import F32

_I64 = npt.NDArray[np.int64]
_NONE = -4096  # exponent of zero: takes no part in any maximum


def gemm(a: F32, b: F32, accumulator: Accumulator) -> F32:
    """``a @ b`` as the unit computes it: ``[..., m, k]`` and ``[..., k, n]`` of equal batch dimensions; fp32.

    >>> from aqnsim.accumulator import get
    >>> a, b = np.float32([[1, 2**-14]]), np.float32([[1], [1]])
    >>> gemm(a, b, get("hopper_fp8")).item(), gemm(a, b, get("hopper_bf16")).item()
    (1.0, 1.00006103515625)
    """
    a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
    batch = a.shape[:-2]
    out = np.zeros((*batch, a.shape[-2], b.shape[-1]), np.float32)
    for i in np.ndindex(batch):
        out[i] = _matrix(a[i], b[i], accumulator)
    return out


def _matrix(a: F32, b: F32, acc: Accumulator) -> F32:
    if acc.subnormals == "flush":
        a, b = (np.where(np.abs(x) < 2.0**acc.min_exponent, np.float32(0), x) for x in (a, b))
    add = _pairwise if acc.order == "pairwise" else _aligned
    inner = a.shape[1]
    total = np.zeros((len(a), b.shape[1]), np.float32)
    running = np.zeros_like(total)
    with np.errstate(all="ignore"):
        for k in range(0, inner, acc.chunk):
            running = add(a[:, k : k + acc.chunk], b[k : k + acc.chunk], running, acc)
            if acc.promote and (k + acc.chunk) % acc.promote == 0:
                total, running = total + running, np.zeros_like(total)
        result = total + running if acc.promote else running
        return result + np.float32(0)  # zero is +0


def _pairwise(a: F32, b: F32, running: F32, acc: Accumulator) -> F32:
    """IEEE fp32: the products' tree of sums, then the running sum."""

    def held(x: F32) -> F32:
        return np.where(np.abs(x) < 2.0**-126, np.float32(0), x) if acc.subnormals == "flush" else x

    sums = np.zeros((len(a), acc.chunk, b.shape[1]), np.float32)
    sums[:, : len(b)] = held(a[:, :, None] * b[None])
    while sums.shape[1] > 1:
        sums = held(sums[:, 0::2] + sums[:, 1::2])
    return held(running + sums[:, 0])


def _aligned(a: F32, b: F32, running: F32, acc: Accumulator) -> F32:
    """One chunk in fixed point: [m, chunk] and [chunk, n] added to the running sum [m, n]."""
    special = _specials(a, b, acc)
    before = np.where(np.isfinite(running), running, 0)
    (sa, ea, aligned_a), (sb, eb, aligned_b) = _split(a, acc.min_exponent), _split(b, acc.min_exponent)
    product = _to_bits(sa[:, :, None] * sb[None], 24)  # in units of 2^(exponent - 46)
    exponent = np.where(product == 0, _NONE, ea[:, :, None] + eb[None])
    aligned = np.where(product == 0, _NONE, aligned_a[:, :, None] + aligned_b[None])
    total, unit = _SUMS[acc.order](product, exponent, aligned, before, acc)
    result = _to_float(total, unit, acc)
    outside = running + special
    return np.where(np.isfinite(outside), result, outside)


def _specials(a: F32, b: F32, acc: Accumulator) -> F32:
    """The sum of the products that are not numbers of the unit: infinities and NaNs, by IEEE's rules; else 0."""
    product = a[:, :, None] * b[None]
    outside = ~(np.isfinite(a)[:, :, None] & np.isfinite(b)[None])
    if acc.order != "fused":
        outside |= ~np.isfinite(product)  # these units' products have the range of fp32
    return np.asarray(np.where(outside, product, np.float32(0)).sum(axis=1), np.float32)


def _split(x: F32, min_exponent: int) -> tuple[_I64, _I64, _I64]:
    """Significand in units of 2^(exponent - 23), exponent, and the exponent by which the unit aligns it."""
    finite = np.where(np.isfinite(x), x, 0).astype(np.float64)
    fraction, e = np.frexp(finite)
    exponent = e.astype(np.int64) - 1
    return (fraction * 2**24).astype(np.int64), exponent, np.maximum(exponent, min_exponent)


def _to_bits(x: _I64, bits: int) -> _I64:
    """Rounded to ``bits`` leading bits, to nearest even, as fp32 rounds a product."""
    length = np.frexp(np.abs(x).astype(np.float64))[1]  # at most 48 bits: exact
    drop = np.maximum(length - bits, 0).astype(np.int64)
    return np.asarray(_shifted(x, -drop, "nearest-even") << drop, np.int64)


def _shifted(x: _I64, by: Any, rounding: str) -> _I64:
    """``x * 2^by`` as an integer: toward zero, to nearest even, or down."""
    right = np.clip(-np.asarray(by, np.int64), 0, 62)
    left = np.maximum(by, 0)
    if rounding == "down":
        return np.asarray((x >> right) << left, np.int64)
    magnitude = np.abs(x)
    whole = magnitude >> right
    if rounding == "nearest-even":
        rest, half = magnitude - (whole << right), np.where(right > 0, 1 << np.maximum(right - 1, 0), 0)
        whole += (right > 0) & ((rest > half) | ((rest == half) & (whole % 2 == 1)))
    return np.asarray(np.sign(x) * (whole << left), np.int64)


def _exponent(x: F32) -> _I64:
    """The exponent of a running sum, of at least -126; that of zero is none."""
    e = np.maximum(np.frexp(x.astype(np.float64))[1].astype(np.int64) - 1, -126)
    return np.where(x == 0, _NONE, e)


def _significand(x: F32, exponent: _I64) -> _I64:
    """In units of 2^(exponent - 23)."""
    return np.ldexp(x.astype(np.float64), np.where(x == 0, 0, 23 - exponent).astype(np.int32)).astype(np.int64)


def _fused(product: _I64, exponent: _I64, aligned: _I64, running: F32, acc: Accumulator) -> tuple[_I64, _I64]:
    """Products and running sum under their largest exponent: the sum, and the exponent of its units."""
    own = _exponent(running)
    largest = np.maximum(np.maximum(aligned.max(axis=1), own), -126)
    unit = largest - acc.fraction_bits
    total = _shifted(product, exponent - 46 - unit[:, None], acc.rounding).sum(axis=1)
    return total + _shifted(_significand(running, own), own - 23 - unit, acc.rounding), unit


def _products(product: _I64, exponent: _I64, aligned: _I64, acc: Accumulator) -> tuple[_I64, _I64]:
    """The sum of products under their largest exponent, and that exponent."""
    largest = np.maximum(aligned.max(axis=1, initial=_NONE), -300)  # below all products
    unit = largest - acc.fraction_bits
    return _shifted(product, exponent - 46 - unit[:, None], acc.rounding).sum(axis=1), largest


def _products_first(product: _I64, exponent: _I64, aligned: _I64, running: F32, acc: Accumulator) -> tuple[_I64, _I64]:
    """The products' sum and the running sum under the larger exponent, both rounded down; the first 7 bits finer."""
    total, largest = _products(product, exponent, aligned, acc)
    return _with_running(total, largest, running, acc)


def _even_odd(product: _I64, exponent: _I64, aligned: _I64, running: F32, acc: Accumulator) -> tuple[_I64, _I64]:
    """As ``_products_first``; products at even and odd places are added apart, then together, rounded down."""
    even, e0 = _products(product[:, 0::2], exponent[:, 0::2], aligned[:, 0::2], acc)
    odd, e1 = _products(product[:, 1::2], exponent[:, 1::2], aligned[:, 1::2], acc)
    largest = np.maximum(e0, e1)
    total = _shifted(even, e0 - largest, "down") + _shifted(odd, e1 - largest, "down")
    common = np.maximum(np.maximum(largest, _exponent(running)), -126)
    far = _exponent(running) < common - 25  # such a negative sum is dropped, not rounded down to the last unit
    return _with_running(total, largest, np.where(far, np.float32(0), running), acc)


def _with_running(total: _I64, largest: _I64, running: F32, acc: Accumulator) -> tuple[_I64, _I64]:
    own = _exponent(running)
    common = np.maximum(np.maximum(largest, own), -126)
    below = _shifted(_significand(running, own), own - 23 - (common - acc.fraction_bits), "down")
    return _shifted(total, largest - common + 7, "down") + (below << 7), common - acc.fraction_bits - 7


_SUMS = {"fused": _fused, "products-first": _products_first, "even-odd": _even_odd}


def _to_float(total: _I64, unit: _I64, acc: Accumulator) -> F32:
    """``total * 2^unit`` with ``result_bits`` fraction bits; beyond the range of fp32 it is infinite."""
    exponent = np.maximum(np.frexp(np.abs(total).astype(np.float64))[1] - 1 + unit, -126)
    quantum = exponent - acc.result_bits
    result = np.ldexp(_shifted(total, unit - quantum, acc.result_rounding).astype(np.float64), quantum.astype(np.int32))
    if acc.subnormals == "flush":
        result = np.where(np.abs(result) < 2.0**-126, 0, result)
    return result.astype(np.float32)
