"""Errors of logical coordinates: the twin of ``csrc/cpu/perturb.h``. A chain is one kernel, its numbers arguments."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from aqnsim._errors import BackendError
from aqnsim.backends.checks import check_chain, check_dtype
from aqnsim.backends.fields import KINDS, model_numbers
from aqnsim.backends.half import perturbs_half
from aqnsim.backends.triton.bits import as_held, narrowed, of, widened
from aqnsim.backends.triton.launch import TILE, launch, power_of_two
from aqnsim.backends.triton.measure import measure_perturb, no_stats, partial_sums, totals
from aqnsim.backends.triton.noise import at, kind_of, length, missed
from aqnsim.backends.triton.rows import check_rows, row_mode, rows_at, shape_in_rows
from aqnsim.errors import ErrorModel


@triton.jit
def chain_of(y, magnitude, column, each, row, key, clock, numbers, last_hits, CHAIN: tl.constexpr, OUT: tl.constexpr):
    """``y`` after a chain, and how many of its models hit each value."""
    hits = tl.zeros(y.shape, tl.int32)
    for i in tl.static_range(length(CHAIN)):
        y, hit = missed(
            y, magnitude, column, each, row, key, clock, numbers[2 * i], numbers[2 * i + 1], last_hits[i],
            at(CHAIN, i), i, OUT,
        )  # fmt: skip
        hits += hit.to(tl.int32)
    return y, hits


@triton.jit
def unit_of(before, magnitude, CHAIN: tl.constexpr):
    """What a lone Gaussian model misses by a share of; 0 for any other chain, whose shift has no one unit."""
    unit = tl.zeros(before.shape, tl.float32)
    if length(CHAIN) == 1:
        if kind_of(at(CHAIN, 0)) == "relative-gaussian":
            unit = magnitude if of(at(CHAIN, 0), "reference") == "absdot" else before
        elif kind_of(at(CHAIN, 0)) == "absolute-gaussian":
            unit += 1.0
    return unit


@triton.jit
def perturb_kernel(
    y, out, magnitude, stats, rows, clock, key, count, columns, numbers, last_hits,
    CHAIN: tl.constexpr, MAGNITUDE: tl.constexpr, MEASURE: tl.constexpr, MODE: tl.constexpr,
    TR: tl.constexpr, TC: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    """TR rows x TC columns of a contiguous matrix, from a column on that is logically a multiple of 4: so a tile is
    made of whole Philox blocks wherever its rows begin."""
    tiles = tl.cdiv(columns + 3 if MODE == "pairs" else columns, TC)
    r = (tl.program_id(0) // tiles).to(INDEX) * TR + tl.arange(0, TR)[:, None]
    start = (tl.program_id(0) % tiles) * TC
    row, first = rows_at(rows, tl.minimum(r, count - 1), MODE)
    c, quad = start + tl.arange(0, TC)[None, :], start + 4 * tl.arange(0, TC // 4)[None, :]
    if MODE == "pairs":
        shift = (first & 3).to(tl.int32)
        c -= shift
        column, each = first - shift + quad, first + c
    else:
        column, each = quad, c
    inside = (r < count) & (c >= 0) & (c < columns)
    offset = r * columns + c
    before = widened(tl.load(y + offset, mask=inside, other=0.0))
    size = tl.load(magnitude + offset, mask=inside, other=0.0) if MAGNITUDE else before
    OUT: tl.constexpr = out.dtype.element_ty
    after, hits = chain_of(before, size, column, each, row, key, tl.load(clock), numbers, last_hits, CHAIN, OUT)
    held = narrowed(after, OUT)
    tl.store(out + offset, held, mask=inside)
    if MEASURE:
        measure_perturb(
            stats, before, after, as_held(before, OUT), widened(held), unit_of(before, size, CHAIN),
            tl.where(inside, hits, 0), inside, tl.program_id(0), tl.num_programs(0),
        )  # fmt: skip


# ---- on the host ----------------------------------------------------------------------------------------------------


@lru_cache(maxsize=4096)
def numbers_of(models: Sequence[ErrorModel]) -> tuple[float, ...]:
    """Two a model: sigma; gain, offset; threshold; limit; size; value.

    Raises:
        BackendError: kernels have no branch for a model.
    """
    for m in models:
        if type(m) not in KINDS:
            raise BackendError(f"backend 'triton' has no kernel for {m}; it has: {', '.join(k.kind for k in KINDS)}")
    return tuple(n for m in models for n in model_numbers(m))


@lru_cache(maxsize=4096)
def last_hits_of(models: Sequence[ErrorModel]) -> tuple[int, ...]:
    """The largest random word that is a hit, as int32, one a model."""
    hits = (getattr(m, "last_hit", 0) for m in models)
    return tuple(h - (1 << 32) if h >> 31 else h for h in hits)


@lru_cache(maxsize=4096)
def shape_of(models: Sequence[ErrorModel]) -> tuple[ErrorModel, ...]:
    """A chain without its numbers: what a kernel is compiled for."""
    return tuple(
        dataclasses.replace(m, **dict.fromkeys([*KINDS[type(m)], *(["rate"] if hasattr(m, "rate") else [])], 1.0))
        for m in models
    )


@perturbs_half
def perturb(
    y: Tensor,
    error: str,
    key: int,
    step: Tensor,
    rows: Tensor | None,
    magnitude: Tensor | None,
    dtype: torch.dtype | None,
    measure: bool,
) -> tuple[Tensor, Tensor]:
    y = y.contiguous()
    out = torch.empty_like(y, dtype=dtype or y.dtype)
    check_dtype(y), check_dtype(out)
    rows = check_rows("perturb", y, rows)
    models, magnitude = check_chain(error, y, magnitude, out.dtype)
    if y.numel() == 0:
        return out, no_stats(y, measure)
    count, columns = shape_in_rows(y)
    shifted = columns + 3 * (row_mode(rows) == "pairs")
    tc = max(min(power_of_two(shifted), TILE), 4)
    tr = min(max(TILE // tc, 1), power_of_two(count))
    programs = -(-count // tr) * -(-shifted // tc)
    stats = partial_sums(y, programs) if measure else None
    launch(
        perturb_kernel, programs,
        y, out, magnitude, stats, rows, step.to(y.device, torch.int64), key, count, columns,
        numbers_of(models), last_hits_of(models),
        CHAIN=shape_of(models), MAGNITUDE=magnitude is not None, MEASURE=measure, MODE=row_mode(rows),
        TR=tr, TC=tc, INDEX=tl.int64 if y.numel() >= 1 << 30 else tl.int32, elements=tr * tc,
    )  # fmt: skip
    return out, no_stats(y) if stats is None else totals(stats, models)
