"""Two results held together: bit for bit, count by count, or as chance allows."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from aqnsim.conformance.registry import Violation
from aqnsim.receipts import STATS

COUNTS = ("calls", "count", "changed", "injected_n", "saturated", "nonfinite", "hits")
"""Statistics that are whole numbers; the others are sums, held to SUM_TOLERANCE."""

SUM_TOLERANCE = 1e-6


def words(t: Tensor) -> Tensor:
    """Bit patterns, of NaNs one: their payload has no meaning, everything else has."""
    if not t.is_floating_point():
        return t.contiguous()
    integers = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.uint8}[t.element_size()]
    words, nan = t.contiguous().view(integers), t.float().isnan()
    return words.masked_fill(nan, torch.iinfo(integers).max)


def same(got: Tensor, expected: Tensor, what: str, x: Tensor | None = None) -> None:
    """Hold two results together bit for bit.

    Raises:
        Violation: they differ; says how often, and where first, for which of ``x``.
    """
    if got.dtype != expected.dtype or got.shape != expected.shape:
        raise Violation(f"{what}: expected {kind(expected)}, got {kind(got)}")
    other = words(got) != words(expected)
    if bool(other.any()):
        at = int(other.flatten().nonzero()[0])
        of = f" of {shown(x.reshape(-1)[at])}" if x is not None and x.shape == got.shape else ""
        raise Violation(
            f"{what}: {int(other.sum())} of {other.numel()} values differ, first at {at}{of}: "
            f"expected {shown(expected.reshape(-1)[at])}, got {shown(got.reshape(-1)[at])}"
        )


def kind(t: Tensor) -> str:
    return f"{str(t.dtype).removeprefix('torch.')} {list(t.shape)}"


def shown(value: Tensor) -> str:
    return float(value).hex() if value.is_floating_point() else str(int(value))


def same_stats(got: Tensor, expected: Tensor, what: str, sums: bool = True) -> None:
    """Hold two vectors of STATS together: counts exactly, sums, if asked for, to SUM_TOLERANCE.

    Raises:
        Violation: one of them differs.
    """
    for name, a, b in zip(STATS, got.tolist(), expected.tolist(), strict=True):
        right = a == b if name in COUNTS else not sums or math.isclose(a, b, rel_tol=SUM_TOLERANCE)
        if not right:
            raise Violation(f"{what}: {name} is {a!r}, expected {b!r}")


SPREAD = 4.5  # standard deviations that a statistic may be off: less than one in 10^5


def within_chance(what: str, got: float, expected: float, deviation: float) -> None:
    if not abs(got - expected) <= SPREAD * deviation:
        raise Violation(f"{what} is {got:.6g}, expected {expected:g} +- {SPREAD * deviation:.2g}")
