"""A linear layer in one kernel: both operands cast on their way in, fp32 sums, the error and the cast of the result.

By definition it equals the composition of :mod:`aqnsim.backends.compose`: operands, noise and casts bit for bit, sums
up to the order in which fp32 adds.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from aqnsim.backends.triton.bits import INTERPRETED, as_held, fp32, magnitude_of, narrowed, of, widened
from aqnsim.backends.triton.cast import Plan, plan
from aqnsim.backends.triton.launch import launch, power_of_two
from aqnsim.backends.triton.measure import measure_cast, measure_perturb, no_stats, partial_sums, totals
from aqnsim.backends.triton.perturb import chain_of, last_hits_of, numbers_of, shape_of, unit_of
from aqnsim.backends.triton.rounding import round_to
from aqnsim.backends.triton.rows import check_rows, row_mode, rows_at
from aqnsim.backends.triton.scales import block_scale
from aqnsim.errors import RelativeGaussian, chain
from aqnsim.formats import random_bits
from aqnsim.profiles.spec import OpSpec, operand


@triton.jit
def cast_operand(v, E: tl.constexpr, S: tl.constexpr, DTYPE: tl.constexpr):
    """Rows ``[n, k]`` of whole blocks, as they reach the element's rounding and as they are held after the cast."""
    n: tl.constexpr = v.shape[0]
    k: tl.constexpr = v.shape[1]
    word = tl.zeros((1, 1), tl.uint32)
    if S is None:
        scaled = v
        result = round_to(scaled, word, E)
    else:
        C: tl.constexpr = of(S, "columns")
        m = magnitude_of(tl.reshape(v, (n, k // C, C)))
        if of(S, "finite_only"):
            m = tl.where(m < 0x7F800000, m, 0)
        largest = tl.max(m, 2)
        factor, _, decode = block_scale(largest, largest.to(tl.int32), fp32(1.0), S)
        blocks = tl.reshape(v, (n, k // C, C))
        blocks = tl.div_rn(blocks, factor[:, :, None]) if of(S, "divides") else blocks * factor[:, :, None]
        scaled = tl.reshape(blocks, (n, k))
        elements = tl.reshape(round_to(scaled, word, E), (n, k // C, C))
        result = tl.reshape(elements * decode[:, :, None], (n, k))
    return scaled, narrowed(result, DTYPE)


@triton.jit
def load_operand(
    x, index, size, k, depth, stats, part, parts, measures,
    E: tl.constexpr, S: tl.constexpr,
):  # fmt: skip
    """Rows ``index`` of a contiguous ``[size, depth]`` matrix at columns ``k``, cast along them."""
    inside = (index < size)[:, None] & (k < depth)[None, :]
    v = tl.load(x + index.to(tl.int64)[:, None] * depth + k[None, :], mask=inside, other=0.0)
    if E is None:
        return v
    else:
        scaled, held = cast_operand(widened(v), E, S, x.dtype.element_ty)
        if measures:
            measure_cast(
                stats, widened(v), widened(held), scaled, inside,
                fp32(of(E, "max")), -fp32(of(E, "max_negative")), part, parts,
            )  # fmt: skip
        return held


@triton.jit
def linear_kernel(
    x, weight, bias, out, x_stats, weight_stats, error_stats, cast_stats, rows, clock, key,
    count, width, depth, numbers, last_hits,
    XE: tl.constexpr, XS: tl.constexpr, WE: tl.constexpr, WS: tl.constexpr,
    CHAIN: tl.constexpr, OE: tl.constexpr, BIAS: tl.constexpr, MODE: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """BM rows x BN columns of ``cast(x) @ cast(weight)^T``. Noise knows a value's row and column alone."""
    tiles_m, tiles_n, steps = tl.cdiv(count, BM), tl.cdiv(width, BN), tl.cdiv(depth, BK)
    pid = tl.program_id(0)
    group = pid // (GROUP * tiles_n) * GROUP  # rows of tiles that run at a time, so that they share weights in cache
    high = tl.minimum(tiles_m - group, GROUP)
    pid_m, pid_n = group + pid % (GROUP * tiles_n) % high, pid % (GROUP * tiles_n) // high
    m, n = pid_m * BM + tl.arange(0, BM), pid_n * BN + tl.arange(0, BN)
    acc = tl.zeros((BM, BN), tl.float32)
    for step in range(steps):
        k = step * BK + tl.arange(0, BK)
        a = load_operand(x, m, count, k, depth, x_stats, pid_m * steps + step, tiles_m * steps, pid_n == 0, XE, XS)
        b = load_operand(
            weight, n, width, k, depth, weight_stats, pid_n * steps + step, tiles_n * steps, pid_m == 0, WE, WS
        )
        if INTERPRETED:  # whose dot takes bfloat16 for integers
            a, b = widened(a), widened(b)
        acc = tl.dot(a, tl.trans(b), acc, input_precision="ieee")
    if BIAS:
        acc += widened(tl.load(bias + n, mask=n < width, other=0.0))[None, :]

    inside = (m < count)[:, None] & (n < width)[None, :]
    OUT: tl.constexpr = out.dtype.element_ty
    if CHAIN is not None:
        row, _ = rows_at(rows, tl.minimum(m, count - 1)[:, None], MODE)
        quad, each = pid_n * BN + 4 * tl.arange(0, BN // 4)[None, :], n[None, :]
        STORED: tl.constexpr = OUT if OE is None else tl.float32
        after, hits = chain_of(acc, acc, quad, each, row, key, tl.load(clock), numbers, last_hits, CHAIN, STORED)
        held = narrowed(after, STORED)
        measure_perturb(
            error_stats, acc, after, as_held(acc, STORED), widened(held), unit_of(acc, acc, CHAIN),
            tl.where(inside, hits, 0), inside, pid, tl.num_programs(0),
        )  # fmt: skip
        acc = widened(held)
    if OE is not None:
        cast = round_to(acc, tl.zeros((1, 1), tl.uint32), OE)
        measure_cast(
            cast_stats, acc, cast, acc, inside,
            fp32(of(OE, "max")), -fp32(of(OE, "max_negative")), pid, tl.num_programs(0),
        )  # fmt: skip
        acc = cast
    tl.store(out + m.to(tl.int64)[:, None] * width + n[None, :], narrowed(acc, OUT), mask=inside)


# ---- on the host ----------------------------------------------------------------------------------------------------

Linear = Callable[..., tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Tiles:
    """The part of the result that a program makes, and how much of the contraction it takes at a time."""

    rows: int
    columns: int
    depth: int


def tiles_of(dtype: torch.dtype) -> Tiles:
    """Such that the sums and what is drawn for each of them fit the registers of 8 warps."""
    if INTERPRETED.value:
        return Tiles(128, 128, 256)
    return Tiles(128, 64, 64) if dtype == torch.bfloat16 else Tiles(64, 64, 32)


def fused_operand(text: str | None) -> Plan | None:
    """A format that the kernel can cast on the way in: elements, or blocks along the contraction whose scale depends on
    their largest value alone. None where there is no cast.

    Raises:
        LookupError: the kernel cannot; the composition can.
    """
    if text is None:
        return None
    fmt, fault = operand(text)
    p = plan(fmt)
    s = p.scaling
    blocks = s is None or (p.scale == "block" and s.rows == 1 and not s.two_level and not s.searches)
    if fault is not None or random_bits(p.fmt) or not blocks or (s and power_of_two(s.columns) != s.columns):
        raise LookupError(text)
    return p


def fuses(part: Any, x: Tensor, weight: Tensor, bias: Tensor | None, rows: Tensor | None) -> bool:
    """Whether the kernel has all that one direction of a spec asks for."""
    if x.dtype not in (torch.float32, torch.bfloat16) or weight.dtype != x.dtype or 0 in (x.numel(), weight.numel()):
        return False
    if part.accumulator is not None or getattr(part, "hadamard", None) or row_mode(rows) == "pairs":
        return False
    if part.error is None and part.output is None:  # a plain product, of torch
        return False
    if bias is not None and part.bias != "missed":
        return False
    models = () if part.error is None else chain(part.error)
    if any(isinstance(m, RelativeGaussian) and m.reference == "absdot" for m in models):
        return False
    try:
        output = fused_operand(part.output)
        fused_operand(part.input), fused_operand(part.weight)
    except LookupError:
        return False
    return output is None or output.scaling is None


def fused(composed: Linear) -> Linear:
    """``linear``: the kernel where it has all that the spec asks for, else the composition."""

    def linear(
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        spec_text: str,
        cast_weight: bool,
        keys: list[int],
        clock: Tensor,
        rows: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        part = OpSpec.parse(spec_text).forward
        if not fuses(part, x, weight, bias, rows):
            return composed(x, weight, bias, spec_text, cast_weight, keys, clock, rows)
        return run_linear(x, weight, bias, part, cast_weight, keys, clock, rows)

    return linear


def run_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    part: Any,
    cast_weight: bool,
    keys: list[int],
    clock: Tensor,
    rows: Tensor | None,
) -> tuple[Tensor, Tensor]:
    flat, weight = x.reshape(-1, x.shape[-1]).contiguous(), weight.contiguous()
    (count, depth), width = flat.shape, weight.shape[0]
    out = torch.empty(count, width, dtype=x.dtype, device=x.device)
    rows = check_rows("linear", out, rows)
    xp, op = fused_operand(part.input), fused_operand(part.output)
    wp = fused_operand(part.weight) if cast_weight else None
    models = () if part.error is None else chain(part.error)
    t = tiles_of(x.dtype)
    bk = max([t.depth, *(p.scaling.columns for p in (xp, wp) if p is not None and p.scaling is not None)])
    tiles_m, tiles_n, steps = -(-count // t.rows), -(-width // t.columns), -(-depth // bk)
    parts = [(wp, tiles_n * steps), (xp, tiles_m * steps), (models, tiles_m * tiles_n), (op, tiles_m * tiles_n)]
    sums = [partial_sums(x, n) if used else None for used, n in parts]
    launch(
        linear_kernel, tiles_m * tiles_n,
        flat, weight, bias, out, sums[1], sums[0], sums[2], sums[3], rows, clock.to(x.device, torch.int64), keys[2],
        count, width, depth, numbers_of(models), last_hits_of(models),
        XE=xp and xp.element, XS=xp and xp.scaling, WE=wp and wp.element, WS=wp and wp.scaling,
        CHAIN=shape_of(models) if models else None, OE=op and op.element, BIAS=bias is not None, MODE=row_mode(rows),
        BM=t.rows, BN=t.columns, BK=bk, GROUP=8, elements=4096,
    )  # fmt: skip
    each = [no_stats(x) if s is None else totals(s, models if i == 2 else ()) for i, s in enumerate(sums)]
    return out.reshape(*x.shape[:-1], width), torch.stack(each)
