"""Casts: the twin of ``csrc/cpu/cast.h``. Blocks are ``[down, rows, across, columns]`` wherever they lie in memory."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from aqnsim.backends.checks import check_dtype
from aqnsim.backends.half import casts_half
from aqnsim.backends.triton.bits import exp2_of, float_of, fp32, is_finite, magnitude_of, narrowed, of, widened
from aqnsim.backends.triton.launch import TILE, launch, power_of_two
from aqnsim.backends.triton.measure import measure_cast, no_stats, partial_sums, totals
from aqnsim.backends.triton.noise import block, coordinates, picked, words_of
from aqnsim.backends.triton.rounding import Element, element, round_to
from aqnsim.backends.triton.rows import check_draw, check_rows, row_mode, rows_at, shape_in_rows
from aqnsim.backends.triton.scales import (
    Scaling,
    block_scale,
    e8m0_exponent,
    hif4_scaled,
    scaling,
    tensor_scale,
    two_level,
)
from aqnsim.formats import AnyFormat, BlockFormat, get, scale_shape


@triton.jit
def amax_kernel(
    x, amax, high, wide, steps, PER_ROW: tl.constexpr, TH: tl.constexpr, TW: tl.constexpr, INDEX: tl.constexpr
):
    """The bits of the largest magnitude, of each row of ``[batch, high, wide]`` or of all; ``amax`` starts at 0."""
    down, across = tl.cdiv(high, TH), tl.cdiv(wide, TW)
    pid = tl.program_id(0)
    batch, inner = pid // (down * across), pid % (down * across)
    h = (inner // across).to(INDEX) * TH + tl.arange(0, TH)[:, None]
    w = (inner % across).to(INDEX) * TW + tl.arange(0, TW)[None, :]
    at = x + batch.to(tl.int64) * steps[0] + (h * steps[1] + w * steps[2])
    v = widened(tl.load(at, mask=(h < high) & (w < wide), other=0.0))
    largest = tl.max(magnitude_of(v).to(tl.int32), 1)
    if PER_ROW:
        rows = (inner // across).to(INDEX) * TH + tl.arange(0, TH)
        tl.atomic_max(amax + batch * high + rows, largest, mask=rows < high)
    else:
        tl.atomic_max(amax, tl.max(largest))


@triton.jit
def drawn_words(at, rows, clock, key, last_row, columns, DRAW_QUADS: tl.constexpr, MODE: tl.constexpr):
    """The random words of elements at offsets ``at`` of a contiguous tensor: one Philox block for four where they lie
    side by side in one row, from a multiple of 4 on."""
    key, word = coordinates(key, tl.load(clock), "per_phase", 0, 0)
    row, first = rows_at(rows, tl.minimum(at // columns, last_row), MODE)  # a tile may reach beyond the tensor
    column = (at % columns).to(tl.int64) + first
    if DRAW_QUADS:
        return words_of(column, row, key, word)
    else:
        w0, w1, w2, w3 = block(column, row, key, word)
        return picked(w0, w1, w2, w3, column)


@triton.jit
def cast_kernel(
    x, y, scales, tensor, amax, choice, stats, rows, clock, key,
    high, wide, last_row, columns, steps, scale_steps,
    E: tl.constexpr, S: tl.constexpr, SCALE: tl.constexpr,
    R: tl.constexpr, C: tl.constexpr, NH: tl.constexpr, RP: tl.constexpr, NW: tl.constexpr, CP: tl.constexpr,
    STORES_SCALES: tl.constexpr, UNSCALED: tl.constexpr, MEASURE: tl.constexpr,
    QUADS: tl.constexpr, MODE: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    """NH x NW blocks of R x C elements, in a tile that is filled up to powers of two.

    ``SCALE`` says where scales come from: ``none``, ``block`` (the tile), ``row`` or ``tensor`` (``amax``), ``hif4``.
    """
    down, across = tl.cdiv(high, R), tl.cdiv(wide, C)
    tiles_down, tiles_across = tl.cdiv(down, NH), tl.cdiv(across, NW)
    pid = tl.program_id(0)
    batch, inner = pid // (tiles_down * tiles_across), pid % (tiles_down * tiles_across)
    bh = (inner // tiles_across).to(INDEX) * NH + tl.arange(0, NH)[:, None, None, None]
    bw = (inner % tiles_across).to(INDEX) * NW + tl.arange(0, NW)[None, None, :, None]
    r, c = tl.arange(0, RP)[None, :, None, None], tl.arange(0, CP)[None, None, None, :]
    h, w = bh * R + r, bw * C + c
    inside = (h < high) & (w < wide)
    if RP != R:
        inside &= r < R
    if CP != C:
        inside &= c < C
    base = batch.to(tl.int64) * steps[0]
    offset = h * steps[1] + w * steps[2]
    v = widened(tl.load(x + base + offset, mask=inside, other=0.0))

    word = tl.zeros((1, 1, 1, 1), tl.uint32)
    if of(E, "random_bits") > 0:
        if QUADS:
            wq = bw * C + 4 * tl.arange(0, CP // 4)[None, None, None, :]
            word = drawn_words(base + (h * steps[1] + wq * steps[2]), rows, clock, key, last_row, columns, True, MODE)
        else:
            word = drawn_words(base + offset, rows, clock, key, last_row, columns, False, MODE)

    encode, decode_all = fp32(1.0), fp32(1.0)
    if SCALE == "none":
        scaled = v
    elif SCALE == "hif4":
        n: tl.constexpr = NH * NW
        scaled, decode, levels = hif4_scaled(tl.reshape(v, (n, CP)), S)
        scaled, decode = tl.reshape(scaled, (NH, RP, NW, CP)), tl.reshape(decode, (NH, RP, NW, CP))
        s = tl.reshape(levels, (NH, 1, NW, 1))
    else:
        if SCALE == "block":
            m = magnitude_of(v)
            if of(S, "finite_only"):
                m = tl.where(m < 0x7F800000, m, 0)
            largest = tl.max(tl.max(m, 3), 1)[:, None, :, None]
        elif SCALE == "row":
            largest = tl.load(amax + batch * high + h, mask=h < high, other=0).to(tl.uint32)
        else:
            largest = tl.load(amax + h * 0).to(tl.uint32)
        chosen = tl.zeros((1, 1, 1, 1), tl.int32)
        place = batch * scale_steps[0] + bh * scale_steps[1] + bw * scale_steps[2]
        if of(S, "two_level"):
            encode, decode_all, stored = tensor_scale(float_of(tl.load(amax).to(tl.uint32)), S)
            if STORES_SCALES:
                tl.store(tensor, stored, mask=pid == 0)
        if of(S, "searches"):
            chosen = tl.load(choice + place, mask=(bh < down) & (bw < across), other=0)
        factor, s, decode = block_scale(largest, chosen, encode, S)
        scaled = tl.div_rn(v, factor) if of(S, "divides") else v * factor

    out = round_to(scaled, word, E)
    if SCALE != "none":
        if STORES_SCALES:
            at = batch * scale_steps[0] + bh * scale_steps[1] + bw * scale_steps[2]
            if SCALE == "tensor":
                tl.store(scales + h * 0, s, mask=h + pid == 0)
            elif SCALE == "row":
                tl.store(scales + batch * high + h, s, mask=(h < high) & (h * 0 + inner % tiles_across == 0))
            else:
                tl.store(scales + at, s, mask=(bh < down) & (bw < across))
        if not UNSCALED:
            out = out * decode
            if of(S, "two_level"):
                out = out * decode_all
    held = narrowed(out, y.dtype.element_ty)
    tl.store(y + base + offset, held, mask=inside)
    if MEASURE:
        measure_cast(
            stats,
            v,
            widened(held),
            scaled,
            inside,
            fp32(of(E, "max")),
            -fp32(of(E, "max_negative")),
            pid,
            tl.num_programs(0),
        )


@triton.jit
def error_sum(rows, RP: tl.constexpr):
    """Rows ``[n, RP]`` of errors added pairwise, first half and second."""
    n: tl.constexpr = rows.shape[0]
    SIZE: tl.constexpr = RP
    if SIZE > 1:
        rows = tl.sum(tl.reshape(rows, (n, 2, SIZE // 2)), 1)
        return error_sum(rows, SIZE // 2)
    else:
        return tl.reshape(rows, (n,))


@triton.jit
def search_kernel(
    x, amax, choice, blocks, high, wide, steps, scale_steps,
    NEAREST: tl.constexpr, S: tl.constexpr, R: tl.constexpr, C: tl.constexpr, RP: tl.constexpr, N: tl.constexpr,
    INDEX: tl.constexpr,
):  # fmt: skip
    """What a rule finds that looks at all values of a block: of N blocks, column after column.

    Errors of a row are added up from left to right, then rows pairwise, so that no layout changes a choice.
    """
    down, across = tl.cdiv(high, R), tl.cdiv(wide, C)
    index = tl.program_id(0).to(INDEX) * N + tl.arange(0, N)
    batch, bh, bw = index // (down * across), index % (down * across) // across, index % across
    r = tl.arange(0, RP)[None, :]
    h = bh[:, None] * R + r
    at = x + batch[:, None].to(tl.int64) * steps[0] + h * steps[1]
    inside = (index[:, None] < blocks) & (r < R) & (h < high)

    m = tl.zeros((N, RP), tl.uint32)
    for j in range(C):
        w = bw[:, None] * C + j
        u = magnitude_of(widened(tl.load(at + w * steps[2], mask=inside & (w < wide), other=0.0)))
        if of(S, "finite_only"):
            u = tl.where(u < 0x7F800000, u, 0)
        m = tl.maximum(m, u)
    largest = tl.max(m, 1)

    errors0, errors1, errors2 = (
        tl.zeros((N, RP), tl.float32),
        tl.zeros((N, RP), tl.float32),
        tl.zeros((N, RP), tl.float32),
    )
    if of(S, "rule") == "mse":
        e = e8m0_exponent(largest, S)
        up, below = tl.minimum(e + 1, 127), tl.maximum(e - 1, -127)
        f0, f1, f2 = exp2_of(-e)[:, None], exp2_of(-up)[:, None], exp2_of(-below)[:, None]
        for j in range(C):
            w = bw[:, None] * C + j
            v = widened(tl.load(at + w * steps[2], mask=inside & (w < wide), other=0.0))
            if of(S, "finite_only"):
                v = tl.where(is_finite(v), v, 0.0)
            errors0 += squared_error(v * f0, NEAREST)
            errors1 += squared_error(v * f1, NEAREST)
            errors2 += squared_error(v * f2, NEAREST)
        least = error_sum(errors0, RP)
        found = e
        error = error_sum(errors1, RP) * exp2_of(2 * (up - e))
        found, least = tl.where(error < least, up, found), tl.where(error < least, error, least)
        error = error_sum(errors2, RP) * exp2_of(2 * (below - e))
        found = tl.where(error < least, below, found)
    else:
        all_amax = float_of(tl.load(amax).to(tl.uint32))
        encode, _, _ = tensor_scale(all_amax, S)
        base = tl.div_rn(float_of(largest), fp32(6.0)) * encode
        f0, s0 = two_level(encode, base, S)
        f1, s1 = two_level(encode, base * 1.5, S)
        for j in range(C):
            w = bw[:, None] * C + j
            v = widened(tl.load(at + w * steps[2], mask=inside & (w < wide), other=0.0))
            errors0 += tensor_error(v, f0[:, None], s0[:, None], all_amax, NEAREST, S)
            errors1 += tensor_error(v, f1[:, None], s1[:, None], all_amax, NEAREST, S)
        found = (error_sum(errors1, RP) < error_sum(errors0, RP)).to(tl.int32)
    place = batch * scale_steps[0] + bh * scale_steps[1] + bw * scale_steps[2]
    tl.store(choice + place, found, mask=index < blocks)


@triton.jit
def squared_error(scaled, NEAREST: tl.constexpr):
    off = round_to(scaled, tl.zeros((1, 1), tl.uint32), NEAREST) - scaled
    return off * off


@triton.jit
def tensor_error(v, factor, s, amax, NEAREST: tl.constexpr, S: tl.constexpr):
    """By 4over6: in the tensor's own units."""
    trial = (round_to(v * factor, tl.zeros((1, 1), tl.uint32), NEAREST) * s) * amax
    off = tl.div_rn(trial, fp32(of(S, "largest"))) - v
    return off * off if of(S, "rule") == "4over6-mse" else tl.abs(off)


# ---- on the host ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class View:
    """A contiguous tensor as matrices ``[batch, high, wide]``, blocks along ``wide``.

    Attributes:
        steps: from one matrix, row and column to the next, in elements.
    """

    batch: int
    high: int
    wide: int
    steps: tuple[int, int, int]

    @property
    def row_major(self) -> bool:
        return self.steps[2] == 1

    def scale_steps(self, s: Scaling) -> tuple[int, int, int]:
        """The same of the scales, which are numbered as their blocks lie in memory."""
        down, across = -(-self.high // max(s.rows, 1)), -(-self.wide // max(s.columns or self.wide, 1))
        return (down * across, across, 1) if self.row_major else (down * across, 1, down)


@lru_cache(maxsize=4096)
def view_of(fmt: AnyFormat, shape: tuple[int, ...], axis: int) -> View:
    """How a format's blocks lie in a tensor; rows of whole blocks are one row."""
    shape = shape or (1,)
    if not isinstance(fmt, BlockFormat) or fmt.block == "tensor":
        n = math.prod(shape)
        return View(1, 1, n, (n, n, 1))
    axis %= len(shape)
    before, n, after = shape[:axis], shape[axis], shape[axis + 1 :]
    if fmt.tile is not None and fmt.tile[0] > 1:
        if after:
            return View(math.prod(before), after[0], n, (n * after[0], 1, after[0]))
        high = before[-1] if before else 1
        return View(math.prod(before[:-1]), high, n, (high * n, n, 1))
    inner = math.prod(after)
    if inner > 1:
        return View(math.prod(before), inner, n, (n * inner, 1, inner))
    high = math.prod(before)
    if fmt.tile is not None and n % fmt.tile[1] == 0:
        high, n = 1, high * n
    return View(1, high, n, (high * n, n, 1))


@dataclass(frozen=True)
class Tile:
    """What one program takes: ``down`` x ``across`` blocks of ``rows`` x ``columns``."""

    rows: int
    columns: int
    down: int
    across: int

    @property
    def elements(self) -> int:
        return self.down * power_of_two(self.rows) * self.across * power_of_two(self.columns)

    def programs(self, v: View) -> int:
        down, across = -(-v.high // self.rows), -(-v.wide // self.columns)
        return v.batch * -(-down // self.down) * -(-across // self.across)


def tile_of(s: Scaling | None, v: View, size: int) -> Tile:
    """A tile of about ``size`` elements; across rows in memory, 64 of them, so that loads are whole lines."""
    rows, columns = (s.rows, s.columns) if s is not None and s.columns else (1, 128)
    block = power_of_two(rows) * power_of_two(columns)
    down, across = power_of_two(-(-v.high // rows)), power_of_two(-(-v.wide // columns))
    if v.row_major:
        across = min(across, max(size // block, 1))
        return Tile(rows, columns, min(down, max(size // (block * across), 1)), across)
    down = min(down, max(size // block, 64 // power_of_two(rows), 1))
    return Tile(rows, columns, down, min(across, max(size // (block * down), 1)))


def largest_bits(x: Tensor, v: View, per_row: bool) -> Tensor:
    """The bits of the largest magnitude of the tensor, or of each row of the view."""
    amax = torch.zeros(v.batch * v.high if per_row else 1, dtype=torch.int32, device=x.device)
    if not per_row:
        v = View(1, 1, x.numel(), (x.numel(), x.numel(), 1))
    size = 8 * TILE
    if v.row_major:
        tw = min(power_of_two(v.wide), size)
        th = min(power_of_two(v.high), max(size // tw, 1))
    else:
        th = min(power_of_two(v.high), 64)
        tw = min(power_of_two(v.wide), max(size // th, 1))
    launch(
        amax_kernel, v.batch * -(-v.high // th) * -(-v.wide // tw),
        x, amax, v.high, v.wide, v.steps,
        PER_ROW=per_row, TH=th, TW=tw, INDEX=index_type(x), elements=th * tw,
    )  # fmt: skip
    return amax


def index_type(x: Tensor) -> tl.dtype:
    """Of offsets within a tensor."""
    return tl.int64 if x.numel() >= 1 << 30 else tl.int32


def searched(x: Tensor, v: View, e: Element, s: Scaling, amax: Tensor | None) -> Tensor:
    """What a rule that looks at all values of a block finds, one a block."""
    blocks = v.batch * -(-v.high // s.rows) * -(-v.wide // s.columns)
    choice = torch.empty(blocks, dtype=torch.int32, device=x.device)
    rp = power_of_two(s.rows)
    n = min(max(TILE // rp // 4, 1), power_of_two(blocks))
    launch(
        search_kernel, -(-blocks // n),
        x, amax, choice, blocks, v.high, v.wide, v.steps, v.scale_steps(s),
        NEAREST=dataclasses.replace(e, rounding="nearest-even", random_bits=0), S=s,
        R=s.rows, C=s.columns, RP=rp, N=n, INDEX=index_type(x), elements=4 * rp * n,
    )  # fmt: skip
    return choice


@dataclass(frozen=True)
class Plan:
    """A format as kernels take it."""

    fmt: AnyFormat
    element: Element
    scaling: Scaling | None
    scale: str  # SCALE of cast_kernel


@lru_cache(maxsize=1024)
def plan(text: str) -> Plan:
    fmt = get(text)
    if not isinstance(fmt, BlockFormat):
        return Plan(fmt, element(fmt), None, "none")
    scale = {"axis": "row", "tensor": "tensor"}.get(str(fmt.block), "hif4" if fmt.scale_format == "hif4" else "block")
    return Plan(fmt, element(fmt.element), scaling(fmt), scale)


def run_cast(
    x: Tensor, y: Tensor, p: Plan, axis: int, key: int, step: Tensor | None, rows: Tensor | None,
    scales: Tensor | None, tensor: Tensor | None, measure: bool,
) -> Tensor | None:  # fmt: skip
    """The cast of a contiguous tensor into ``y``; its partial sums, if it is measured."""
    v, s = view_of(p.fmt, tuple(x.shape), axis), p.scaling
    clock = check_draw(p.fmt, step, x)
    rows = None if clock is None else check_rows("cast", x, rows)
    count, columns = shape_in_rows(x)
    tile = tile_of(s, v, TILE)
    programs = max(tile.programs(v), scales is not None)
    if programs == 0:
        return None
    amax = choice = None
    if s is not None and (s.two_level or p.scale in ("row", "tensor")):
        amax = largest_bits(x, v, p.scale == "row")
    if s is not None and s.searches:
        choice = searched(x, v, p.element, s, amax)
    stats = partial_sums(x, programs) if measure else None
    quads = v.row_major and columns % 4 == 0 and tile.columns % 4 == 0 and row_mode(rows) != "pairs"
    launch(
        cast_kernel, programs,
        x, y, scales, tensor, amax, choice, stats, rows, clock, key,
        v.high, v.wide, max(count - 1, 0), max(columns, 1), v.steps, (0, 0, 0) if s is None else v.scale_steps(s),
        E=p.element, S=s, SCALE=p.scale,
        R=tile.rows, C=tile.columns, NH=tile.down, RP=power_of_two(tile.rows),
        NW=tile.across, CP=power_of_two(tile.columns),
        STORES_SCALES=scales is not None, UNSCALED=scales is not None, MEASURE=measure,
        QUADS=quads, MODE=row_mode(rows), INDEX=index_type(x), elements=tile.elements,
    )  # fmt: skip
    return stats


@casts_half
def cast(
    x: Tensor, fmt: str, axis: int, key: int, step: Tensor | None, rows: Tensor | None, measure: bool
) -> tuple[Tensor, Tensor]:
    p = plan(fmt)
    scale_shape(p.fmt, tuple(x.shape), axis)  # refuses what the kernels cannot see
    check_dtype(x)
    x = x.contiguous()
    out = torch.empty_like(x)
    stats = run_cast(x, out, p, axis, key, step, rows, None, None, measure)
    return out, no_stats(x, measure) if stats is None else totals(stats)


def elements(
    x: Tensor, fmt: str, axis: int, key: int, step: Tensor | None, rows: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    p = plan(fmt)
    check_dtype(x)
    x = x.float().contiguous()
    out, one = torch.empty_like(x), torch.ones((), device=x.device)
    if p.scaling is None:
        run_cast(x, out, p, axis, key, step, rows, None, None, False)
        return out, one, one
    dtype = torch.int32 if p.scale == "hif4" else torch.float32
    scales = torch.empty(scale_shape(p.fmt, tuple(x.shape), axis), dtype=dtype, device=x.device)
    run_cast(x, out, p, axis, key, step, rows, scales, one, False)
    return out, scales, one
