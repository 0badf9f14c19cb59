"""Inputs that tests share: exhaustive, edge and random fp32 values, and comparison by bits."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import numpy.typing as npt
import torch

from aqnsim.formats import Format

F32 = npt.NDArray[np.float32]


def bits(x: object) -> npt.NDArray[np.uint32]:
    """fp32 bit patterns with one NaN: a NaN's payload has no meaning, everything else has."""
    a = np.ascontiguousarray(np.asarray(x, np.float32))
    return np.where(np.isnan(a), np.uint32(0x7FC00000), a.view(np.uint32))


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal dtype, shape and bits, except for NaN payloads."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return np.array_equal(bits(a.detach().float().numpy()), bits(b.detach().float().numpy()))


@lru_cache
def all_bf16() -> F32:
    """Every bfloat16, as fp32."""
    return (np.arange(1 << 16, dtype=np.uint32) << 16).view(np.float32)


@lru_cache
def all_fp16() -> F32:
    """Every IEEE binary16, as fp32."""
    with np.errstate(invalid="ignore"):
        return np.arange(1 << 16, dtype=np.uint16).view(np.float16).astype(np.float32)


def random_bits(n: int, seed: int) -> F32:
    """fp32 values of uniform bit patterns: all exponents, subnormals, Inf and NaN."""
    return np.random.default_rng(seed).integers(0, 1 << 32, n, dtype=np.uint32).view(np.float32)


EDGES = np.array([0.0, 2**-149, 2**-127, 2**-126, 1.0, 3.4028235e38, np.inf, np.nan], np.float32)

MANY = 1 << 12


def critical(fmt: Format) -> F32:
    """Values of a format, the midpoints between neighbours, one ulp around each, edges; both signs.

    Of a format with more than 2^16 values, a sample with all powers of two.
    """
    values = np.array(fmt.values())
    largest, step = values[-1], values[-1] - values[-2] if len(values) > 1 else values[-1]
    following = largest + step * np.arange(1, 5)  # what would come after max
    grid = np.concatenate([[0.0] if values[0] else [], values, following])
    low, high = grid[:-1], grid[1:]
    if len(grid) > 1 << 16:
        whole = np.frexp(high)[0] == 0.5
        kept = whole | np.roll(whole, -1) | (np.random.default_rng(0).random(len(low)) < MANY / len(low))
        kept[-6:] = True
        low, high = low[kept], high[kept]
    points = np.concatenate([low, high, (low + high) / 2])
    with np.errstate(over="ignore"):
        exact = points.astype(np.float32)
        assert np.array_equal(exact[np.isfinite(exact)], points[np.isfinite(exact)])
        around = [np.nextafter(exact, np.float32(s)) for s in (-np.inf, np.inf)]
    x = np.concatenate([exact, *around, EDGES])
    x = np.unique(x[~np.isnan(x)])
    return np.concatenate([x, -x, EDGES[-1:]])
