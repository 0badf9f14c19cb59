"""The emulated ops as what they mean: compositions of ``cast``, ``perturb`` and a product.

A backend without fused kernels uses these; a fused kernel is by definition equal to them. Each returns, beside its
results, what it measured of its own effect: a row of STATS for each stream of each direction (``receipts.STREAMS``).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from aqnsim._errors import ConfigError
from aqnsim.accumulator import HOST
from aqnsim.errors import chain, needs_magnitude
from aqnsim.faults import faulty_cast
from aqnsim.formats import get
from aqnsim.packing import Parts, decoded, encoded
from aqnsim.profiles.spec import OpSpec, operand, operand_draws
from aqnsim.receipts import STATS
from aqnsim.rng import coordinates, key_of
from aqnsim.rotation import hadamard

_SPREAD = 0x9E3779B97F4A7C15 - (1 << 64)  # 2^64 over the golden ratio, odd, as a signed integer
_SIGNS = 62  # of a Hadamard transform, in one word
_OTHER, _FIRST, _ERROR, _CAST = range(4)  # the four streams of a direction

Cast = Callable[..., tuple[Tensor, Tensor]]
Perturb = Callable[..., tuple[Tensor, Tensor]]
Gemm = Callable[[Tensor, Tensor, str], Tensor]
Missed = Callable[..., tuple[Tensor, Tensor]]
Finish = Callable[..., tuple[Tensor, Tensor]]


def _rows_2d(x: Tensor) -> Tensor:
    # Flat and contiguous: torch runs a non-contiguous 3-D input with a frozen weight as a batched matmul that is
    # hundreds of times slower.
    return x.reshape(-1, x.shape[-1]).contiguous()


def _no_stats(like: Tensor, streams: int = 4) -> Tensor:
    return torch.zeros(streams, len(STATS), dtype=torch.float64, device=like.device)


def _check_rows(rows: Tensor | None, x: Tensor) -> None:
    count = math.prod(x.shape[:-1])
    if rows is not None and rows.shape[0] != count:
        raise ConfigError(
            f"{rows.shape[0]} logical rows are set but the op has {count}; it runs on other "
            "tokens than the model's input: exclude it in the profile or set its rows"
        )


def _stored(
    cast: Cast, x: Tensor, text: str, axis: int, key: int, clock: Tensor, rows: Tensor | None, measure: bool = True
) -> tuple[Tensor, Tensor]:
    """A tensor after its cast to an operand's format, and after the fault in what is stored, if there is one."""
    fmt, fault = operand(text)
    rows = rows if operand_draws(text) else None
    _check_rows(rows, x)
    y, stats = cast(x, fmt, axis, key, clock, rows, measure)
    if fault is None:
        return y, stats
    drawn, word = coordinates(key, int(clock), fault.draw, part=1)
    bit = None if fault.bit < 0 else fault.bit
    y, hits, expected = faulty_cast(
        x, fmt, axis, target=fault.target, rate=fault.rate, bit=bit, key=drawn, step=word, rows=rows
    )
    if measure:
        _as_stored(stats, x, y)
        stats[STATS.index("hits")], stats[STATS.index("expected_hits")] = hits, expected
    return y, stats


@dataclass(frozen=True)
class _Operand:
    """A matrix in a product.

    Attributes:
        value: ``[..., rows, columns]``.
        axis: -1 or -2, the contraction.
        rows: logical rows of the matrix, for stochastic rounding; None for 0, 1, 2, ...
    """

    value: Tensor
    axis: int
    rows: Tensor | None = None


def _pad(x: Tensor, axis: int, size: int) -> Tensor:
    """``x`` with zeros at the end of an axis, up to a multiple of ``size``: they add nothing to a product."""
    missing = -x.shape[axis] % size
    if not missing:
        return x
    shape = list(x.shape)
    shape[axis] = missing
    return torch.cat([x, x.new_zeros(shape)], axis)


def _as_stored(stats: Tensor, clean: Tensor, stored: Tensor, reference: Tensor | None = None) -> None:
    """What an error did once the bias was added and the result rounded: either may absorb it.

    Args:
        reference: ``clean`` before it was rounded.
    """
    other = (stored != clean) & ~(stored.isnan() & clean.isnan())
    error = stored.float() - clean.float()
    finite = error.isfinite()
    reference = clean if reference is None else reference
    stats[STATS.index("changed")] = other.sum()
    stats[STATS.index("error2")] = error.where(finite, 0.0).double().square().sum()
    stats[STATS.index("reference2")] = reference.where(finite, 0.0).double().square().sum()
    stats[STATS.index("nonfinite")] = stored.numel() - stored.isfinite().sum()


def missed_product(gemm: Gemm, perturb: Perturb) -> Missed:
    """A product that misses, from a backend's primitives; a fused kernel is by definition equal to it."""

    def missed(
        a: Tensor,
        b: Tensor,
        unit: str,
        bias: Tensor | None,
        bias_is_missed: bool,
        error: str,
        key: int,
        clock: Tensor,
        rows: Tensor | None,
        dtype: torch.dtype,
        measure: bool,
    ) -> tuple[Tensor, Tensor]:
        y = gemm(a, b, unit)
        if bias is not None and bias_is_missed:
            y, bias = y + bias.float(), None
        magnitude = a.float().abs() @ b.float().abs() if needs_magnitude(chain(error)) else None
        if bias is None:
            return perturb(y, error, key, clock, rows, magnitude, dtype, measure)
        stored, stats = perturb(y, error, key, clock, rows, magnitude, None, measure)
        stored, clean = (stored + bias.float()).to(dtype), y + bias.float()
        if measure:
            _as_stored(stats, clean.to(dtype), stored, clean)
        return stored, stats

    return missed


@dataclass(frozen=True)
class _Direction:
    """One product of an op: ``cast(first) @ cast(other)``, then the error, the bias and the cast of the result.

    Attributes:
        part: the direction of the OpSpec.
        keys: of its four streams.
        clock: phase and step.
    """

    cast: Cast
    gemm: Gemm
    missed: Missed
    part: Any
    keys: Sequence[int]
    clock: Tensor

    def operand(self, operand: _Operand, fmt: str | None, stream: int, stats: Tensor | None) -> Tensor:
        """The operand as the product gets it: rotated, then cast along the contraction; unmeasured without stats."""
        x, axis, rows = operand.value, operand.axis, operand.rows
        size = getattr(self.part, "hadamard", None)
        if size:
            x = hadamard(_pad(x, axis, size), size, axis, self._signs(size, x))
            rows = rows if x.shape[:-1] == operand.value.shape[:-1] else None  # padding has no logical rows
        if fmt is None:
            return x
        x, measured = _stored(self.cast, x, fmt, axis, self.keys[stream], self.clock, rows, stats is not None)
        if stats is not None:
            stats[stream] = measured
        return x

    def _signs(self, size: int, x: Tensor) -> Tensor:
        seed = self.keys[_CAST] ^ _SPREAD  # the same signs for both operands, fixed for the site
        words = (seed, *(key_of(seed, "hadamard", str(i)) for i in range(1, math.ceil(size / _SIGNS))))
        bits = (words[i // _SIGNS] >> (i % _SIGNS) & 1 for i in range(size))
        return torch.tensor([1.0 - 2.0 * bit for bit in bits], device=x.device)

    def product(
        self, first: Tensor, other: Tensor, rows: Tensor | None, dtype: torch.dtype, stats: Tensor, bias: Tensor | None
    ) -> Tensor:
        """``first @ other`` as the part asks for it, in ``dtype``."""
        error, output, unit = self.part.error, self.part.output, self.part.accumulator
        if error is None and output is None and unit is None:
            return (first @ other).to(dtype)
        if not first.dtype == other.dtype == torch.bfloat16:  # products of float16 are exact in float32, too
            first, other = first.float(), other.float()
        if error is None:
            y = self.gemm(first, other, unit or HOST)
            y = y if bias is None else y + bias.float()
        else:
            _check_rows(rows, first)
            y, stats[_ERROR] = self.missed(
                first,
                other,
                unit or HOST,
                bias,
                bias is not None and self.part.bias == "missed",
                error,
                self.keys[_ERROR],
                self.clock,
                rows,
                dtype if output is None else torch.float32,
                True,
            )
        if unit is not None:
            stats[_ERROR, STATS.index("calls")] = 1
        if output is not None:
            y, stats[_CAST] = _stored(self.cast, y, output, -1, self.keys[_CAST], self.clock, rows)
        return y.to(dtype)


def finished(cast: Cast, perturb: Perturb) -> Finish:
    """How a result leaves an op, from a backend's primitives; a fused kernel is by definition equal to it."""

    def finish(
        x: Tensor,
        error: str,
        output: str,
        dtype: torch.dtype,
        keys: Sequence[int],
        clock: Tensor,
        rows: Tensor | None,
        measure: bool,
    ) -> tuple[Tensor, Tensor]:
        """``x`` after its error and its cast along the last axis, in ``dtype``; a row of STATS for each of the two.

        Args:
            error, output: empty for none.
            keys: of the error and of the cast.
        """
        stats = _no_stats(x, 2)
        if error:
            x, stats[0] = perturb(x, error, keys[0], clock, rows, None, None if output else dtype, measure)
        if output:
            x, stats[1] = _stored(cast, x, output, -1, keys[1], clock, rows, measure)
        return x.to(dtype), stats

    return finish


def compositions(
    cast: Cast, perturb: Perturb, gemm: Gemm, missed: Missed | None = None, finish: Finish | None = None
) -> dict[str, Callable[..., Any]]:
    """The emulated ops from a backend's primitives.

    Args:
        missed: a kernel for :func:`missed_product`.
        finish: a kernel for :func:`finished`.
    """
    missed = missed or missed_product(gemm, perturb)
    finish = finish or finished(cast, perturb)

    def direction(part: Any, keys: Sequence[int], clock: Tensor) -> _Direction:
        return _Direction(cast, gemm, missed, part, keys, clock)

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
        d, stats = direction(part, keys[:4], clock), _no_stats(x)
        xq = d.operand(_Operand(_rows_2d(x), -1, rows), part.input, _FIRST, stats)
        wq = d.operand(_Operand(weight, -1), part.weight if cast_weight else None, _OTHER, stats)
        if part.error is None and part.output is None and part.accumulator is None:
            y = torch.nn.functional.linear(xq, wq, bias)
        else:
            y = d.product(xq, wq.t(), rows, x.dtype, stats, bias)
        return y.reshape(*x.shape[:-1], weight.shape[0]), stats

    def linear_backward(
        grad: Tensor,
        x: Tensor,
        weight: Tensor,
        spec_text: str,
        cast_weight: bool,
        keys: list[int],
        clock: Tensor,
        rows: Tensor | None,
        need_input: bool,
        need_weight: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        spec = OpSpec.parse(spec_text)
        g, stats = _rows_2d(grad), _no_stats(grad, 8)
        grad_x = grad_w = grad.new_empty(0)
        straight = direction(spec.forward, keys[:4], clock)
        if need_input:
            d, own = direction(spec.grad_input, keys[4:8], clock), stats[:4]
            if spec.grad_input.weight is None:  # straight-through: what the forward multiplied by
                held = straight.operand(
                    _Operand(weight, -1), spec.forward.weight if cast_weight else None, _OTHER, None
                )
            else:
                held = weight
            wq = d.operand(_Operand(held, -2), spec.grad_input.weight, _OTHER, own)
            gq = d.operand(_Operand(g, -1, rows), spec.grad_input.grad, _FIRST, own)
            grad_x = d.product(gq, wq, rows, grad.dtype, own, None).reshape(x.shape)
        if need_weight:
            d, own = direction(spec.grad_weight, keys[8:], clock), stats[4:]
            x2 = _rows_2d(x)
            if spec.grad_weight.input is None:
                x2 = straight.operand(_Operand(x2, -1, rows), spec.forward.input, _FIRST, None)
            xq = d.operand(_Operand(x2, -2, rows), spec.grad_weight.input, _OTHER, own)
            gq = d.operand(_Operand(g, -2, rows), spec.grad_weight.grad, _FIRST, own)
            grad_w = d.product(gq.t(), xq, _weight_rows(weight, rows), grad.dtype, own, None)
        return grad_x, grad_w, stats

    def matmul(
        a: Tensor,
        b: Tensor,
        transposed: bool,
        spec_text: str,
        dtype: torch.dtype,
        keys: list[int],
        clock: Tensor,
        rows: Tensor | None,
        first_rows: Tensor | None,
        other_rows: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        part = OpSpec.parse(spec_text).forward
        d, stats = direction(part, keys[:4], clock), _no_stats(a)
        aq = d.operand(_Operand(a, -1, first_rows), part.input, _FIRST, stats)
        bq = d.operand(_Operand(b, -1 if transposed else -2, other_rows), part.weight, _OTHER, stats)
        return d.product(aq, bq.mT if transposed else bq, rows, dtype, stats, None), stats

    def matmul_backward(
        grad: Tensor,
        a: Tensor,
        b: Tensor,
        transposed: bool,
        spec_text: str,
        keys: list[int],
        clock: Tensor,
        rows: Tensor | None,
        first_rows: Tensor | None,
        other_rows: Tensor | None,
        need_a: bool,
        need_b: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        spec = OpSpec.parse(spec_text)
        g, stats = grad.to(a.dtype), _no_stats(grad, 8)
        grad_a = grad_b = a.new_empty(0)
        straight = direction(spec.forward, keys[:4], clock)
        along, across = (-1, -2) if transposed else (-2, -1)  # b's axis in the forward's contraction, and the other
        if need_a:
            d, own = direction(spec.grad_input, keys[4:8], clock), stats[:4]
            held = b
            if spec.grad_input.weight is None:
                held = straight.operand(_Operand(b, along, other_rows), spec.forward.weight, _OTHER, None)
            bq = d.operand(_Operand(held, across, other_rows), spec.grad_input.weight, _OTHER, own)
            gq = d.operand(_Operand(g, -1, rows), spec.grad_input.grad, _FIRST, own)
            grad_a = d.product(gq, bq if transposed else bq.mT, first_rows, a.dtype, own, None)
        if need_b:
            d, own = direction(spec.grad_weight, keys[8:], clock), stats[4:]
            held = a
            if spec.grad_weight.input is None:
                held = straight.operand(_Operand(a, -1, first_rows), spec.forward.input, _FIRST, None)
            aq = d.operand(_Operand(held, -2, first_rows), spec.grad_weight.input, _OTHER, own)
            gq = d.operand(_Operand(g, -2, rows), spec.grad_weight.grad, _FIRST, own)
            left, right = (gq, aq) if transposed else (aq, gq)
            grad_b = d.product(left.mT, right, other_rows, b.dtype, own, None)
        return grad_a, grad_b, stats

    def stage(
        x: Tensor, steps: list[str], dtype: torch.dtype, keys: list[int], clock: Tensor, rows: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        stats, y = _no_stats(x, 3), x
        given, error, output = steps
        if error:
            _check_rows(rows, x)
        if given:
            between = x.dtype if error or output else dtype
            y, row = finish(x, "", given, between, [keys[0]] * 2, clock, rows, True)
            stats[0] = row[1]
        if error or output:
            y, stats[1:] = finish(y, error, output, dtype, keys[1:], clock, rows, True)
        y = y.to(dtype)
        return (y.clone() if y is x else y), stats  # an op's result is a tensor of its own

    def cast_out(x: Tensor, *args: Any) -> None:
        *given, out = args
        out.copy_(cast(x, *given, False)[0])

    def perturb_out(y: Tensor, *args: Any) -> None:
        *given, out = args
        out.copy_(perturb(y, *given, out.dtype, False)[0])

    return {
        "cast_out": cast_out,
        "perturb_out": perturb_out,
        "linear": linear,
        "linear_backward": linear_backward,
        "matmul": matmul,
        "matmul_backward": matmul_backward,
        "stage": stage,
    }


def packings(elements: Callable[..., Parts]) -> dict[str, Callable[..., Any]]:
    """``quantize`` and ``dequantize`` in terms of ``elements``, for a backend without kernels of its own."""

    def quantize(x: Tensor, fmt: str, axis: int, *draws: Any) -> Parts:
        return encoded(*elements(x, fmt, axis, *draws), get(fmt), axis)

    def dequantize(
        codes: Tensor, scales: Tensor, of: Tensor, fmt: str, axis: int, shape: Sequence[int], dtype: torch.dtype
    ) -> Tensor:
        return decoded(codes, scales, of, get(fmt), axis, shape, dtype)

    def quantize_out(x: Tensor, *args: Any) -> None:
        *given, codes, scales, tensor_scale = args
        for to, part in zip((codes, scales, tensor_scale), quantize(x, *given), strict=True):
            to.copy_(part)

    def dequantize_out(codes: Tensor, scales: Tensor, of: Tensor, fmt: str, axis: int, out: Tensor) -> None:
        out.copy_(dequantize(codes, scales, of, fmt, axis, out.shape, out.dtype))

    return {
        "elements": elements,
        "quantize": quantize,
        "quantize_out": quantize_out,
        "dequantize": dequantize,
        "dequantize_out": dequantize_out,
    }


def _weight_rows(weight: Tensor, rows: Tensor | None) -> Tensor | None:
    """A weight gradient has no token of its own: its rows are told apart by the batch's first token, spread over all
    64 bits (the product wraps)."""
    if rows is None:
        return None
    return torch.arange(weight.shape[0], device=rows.device) + rows[:1] * _SPREAD
