"""What a kernel measures of its own effect: partial sums of each program, added up in a fixed order in fp64.

A sum of squares is a number and a power of two: the squares of all finite fp32 values are finite and not 0 then, and no
kernel needs fp64.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from aqnsim.backends.triton.bits import bits_of, differs, exp2_of, is_finite
from aqnsim.errors import ErrorModel, rate_of, sigma_of
from aqnsim.receipts import STATS

MEASURED = STATS[: STATS.index("requested2")]
"""What kernels measure, in the order of their partial sums; the rest of STATS is what was asked for."""


@triton.jit
def put(stats, ROW: tl.constexpr, value, exponent, part, parts):
    """A partial sum, ``value 2^exponent``, into ``[2, len(MEASURED), parts]``."""
    tl.store(stats + ROW * parts + part, value.to(tl.float32))
    tl.store(stats + (10 + ROW) * parts + part, exponent.to(tl.float32))


@triton.jit
def put_count(stats, ROW: tl.constexpr, true, part, parts):
    put(stats, ROW, tl.sum(true.to(tl.int32)), tl.zeros((), tl.int32), part, parts)


@triton.jit
def put_squares(stats, ROW: tl.constexpr, x, doubled, part, parts):
    """The sum of the squares of finite values, or of those of twice the values."""
    largest = tl.max((bits_of(x) & 0x7FFFFFFF).to(tl.int32))
    e = tl.maximum(largest >> 23, 1) - 127
    x = x * exp2_of(-e)
    put(stats, ROW, tl.sum(x * x), 2 * e + 2 * doubled, part, parts)


@triton.jit
def measure_cast(stats, x, held, scaled, inside, highest, lowest, part, parts):
    """A cast from ``x`` to ``held``, which reached the element's rounding as ``scaled``."""
    finite = is_finite(x) & is_finite(held) & inside  # one Inf must not spoil the sums of all others
    put(stats, 0, (part == 0).to(tl.int32), tl.zeros((), tl.int32), part, parts)
    put_count(stats, 1, inside, part, parts)
    put_count(stats, 2, differs(held, x) & inside, part, parts)
    put_squares(stats, 3, tl.where(finite, held - x, 0.0), 0, part, parts)
    put_squares(stats, 4, tl.where(finite, x, 0.0), 0, part, parts)
    put_count(stats, 7, ((scaled > highest) | (scaled < lowest)) & inside, part, parts)
    put_count(stats, 8, ~is_finite(held) & inside, part, parts)


@triton.jit
def measure_perturb(stats, before, after, clean, held, unit, hits, inside, part, parts):
    """A perturbation in fp32, from ``before`` to ``after``, and the two as the output holds them.

    What was injected is measured in units of what a lone Gaussian model misses by a share of.
    """
    finite = is_finite(held) & inside
    sound = is_finite(before) & is_finite(unit) & (unit != 0.0) & inside
    share = (after - before) / tl.where(sound, unit, 1.0)
    measurable = sound & is_finite(share)
    put(stats, 0, (part == 0).to(tl.int32), tl.zeros((), tl.int32), part, parts)
    put_count(stats, 1, inside, part, parts)
    put_count(stats, 2, differs(held, clean) & inside, part, parts)
    both = finite & is_finite(clean)
    error, half = tl.where(both, held - clean, 0.0), tl.where(both, 0.5 * held - 0.5 * clean, 0.0)
    beyond = tl.max((~is_finite(error)).to(tl.int32))  # an error may exceed fp32, its half never
    put_squares(stats, 3, tl.where(beyond == 1, half, error), beyond, part, parts)
    put_squares(stats, 4, tl.where(finite, before, 0.0), 0, part, parts)
    put_squares(stats, 5, tl.where(measurable, share, 0.0), 0, part, parts)
    put_count(stats, 6, measurable, part, parts)
    put_count(stats, 8, ~is_finite(held) & inside, part, parts)
    put(stats, 9, tl.sum(hits), tl.zeros((), tl.int32), part, parts)


def partial_sums(like: Tensor, parts: int) -> Tensor:
    """Where a kernel puts them."""
    return torch.zeros(2, len(MEASURED), parts, dtype=torch.float32, device=like.device)


def totals(partial: Tensor, models: Sequence[ErrorModel] = ()) -> Tensor:
    """``STATS`` of a call, on the device; nothing waits for it."""
    value, exponent = partial.double()
    measured = torch.ldexp(value, exponent).sum(-1)
    sigma, rate = sigma_of(models) or 0.0, rate_of(models)
    return torch.cat([measured, measured[6:7] * sigma**2, measured[1:2] * rate])


def no_stats(like: Tensor, measure: bool = False) -> Tensor:
    """``STATS`` of a call that measured nothing, or one on no elements."""
    stats = torch.zeros(len(STATS), dtype=torch.float64, device=like.device)
    if measure:
        stats[0] = 1
    return stats
