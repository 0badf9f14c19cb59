"""The C++ kernels of ``csrc/cpu``, called with raw pointers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from aqnsim import _core, accumulator
from aqnsim._errors import BackendError, ConfigError
from aqnsim.backends import Backend, host, register
from aqnsim.backends.checks import (
    check_chain,
    check_dtype,
    check_gemm,
    check_models,
    check_rows,
    check_step,
    perturb_stats,
    shape_in_rows,
)
from aqnsim.backends.compose import compositions, finished, missed_product
from aqnsim.backends.fields import (
    KINDS,
    accumulator_fields,
    blocks_view,
    element_fields,
    model_numbers,
    needs_amax,
    scaling_fields,
)
from aqnsim.backends.half import casts_half, perturbs_half
from aqnsim.errors import ErrorModel, chain, needs_magnitude
from aqnsim.formats import AnyFormat, BlockFormat, Format, element_of, get, random_bits, scale_shape
from aqnsim.packing import (
    Parts,
    check_no_nan_is_lost,
    code_dtype,
    empty_parts,
    nan_is_lost,
    packed_shape,
    stored_scales,
)
from aqnsim.profiles.spec import operand
from aqnsim.receipts import STATS
from aqnsim.rng import coordinates

_DTYPES = {torch.float32: 0, torch.bfloat16: 1}
_STORED = {"e8m0": 1, "fp8_e4m3": 2, "fp32": 3, "hif4": 4}  # the enum ScaleCode of csrc/cpu/kernels.h
_PARALLEL_FROM = 1 << 15  # elements: below, waking threads costs more than they save


def _threads(t: Tensor) -> int:
    return torch.get_num_threads() if t.numel() >= _PARALLEL_FROM else 1


def _stats(values: list[float], measure: bool, models: Sequence[ErrorModel] = ()) -> Tensor:
    """What a kernel measured, in the order of ``receipts.STATS``."""
    return perturb_stats(values, models) if measure else torch.zeros(len(STATS), dtype=torch.float64)


class _Plan(NamedTuple):
    """A format as ``_core.cast`` takes it."""

    element: object
    scaling: object
    needs_amax: bool
    one_scale: bool  # or none


@lru_cache(maxsize=1024)
def _plan(text: str) -> _Plan:
    fmt = get(text)
    element, scaling = _core.Element(**element_fields(element_of(fmt))), _core.Scaling(**scaling_fields(fmt))
    return _Plan(element, scaling, needs_amax(fmt), not isinstance(fmt, BlockFormat) or fmt.block == "tensor")


def _row_ids(rows: Tensor | None) -> tuple[int, bool]:
    """The logical rows as kernels take them: an address, 0 for none, and whether they have first columns."""
    return (0, False) if rows is None else (rows.data_ptr(), rows.dim() == 2)


class _Draws(NamedTuple):
    """Where the random words of a stochastic rounding come from: rows and columns as ``_core`` counts them."""

    rows: Tensor | None
    columns: int
    key: int
    word: int


def _random_words(x: Tensor, fmt: str, key: int, step: Tensor | None, rows: Tensor | None) -> _Draws | None:
    at = check_step(get(fmt), step)
    if at is None:
        return None
    return _Draws(check_rows("cast", x, rows), shape_in_rows(x)[1], *coordinates(key, at))


def _run_cast(
    x: Tensor, out: Tensor, scales: Tensor | None, fmt: str, axis: int, draws: _Draws | None, measure: bool
) -> tuple[list[float], float]:
    plan, (shape, row_major) = _plan(fmt), blocks_view(get(fmt), tuple(x.shape), axis)
    code, threads = _DTYPES[check_dtype(x)], _threads(x)
    amax = _core.amax(x.data_ptr(), code, x.numel(), threads) if plan.needs_amax else 0.0
    stats = _core.cast(
        x.data_ptr(),
        out.data_ptr(),
        0 if scales is None else scales.data_ptr(),
        (*_row_ids(draws.rows), *draws[1:]) if draws else (0, False, 0, 0, 0),
        code,
        shape,
        row_major,
        plan.element,
        plan.scaling,
        amax,
        scales is not None,
        measure,
        threads,
    )
    return stats, amax


@casts_half
def cast(
    x: Tensor, fmt: str, axis: int, key: int, step: Tensor | None, rows: Tensor | None, measure: bool
) -> tuple[Tensor, Tensor]:
    scale_shape(get(fmt), tuple(x.shape), axis)  # refuses what the kernels cannot see
    x = x.contiguous()
    out = torch.empty_like(x)
    stats, _ = _run_cast(x, out, None, fmt, axis, _random_words(x, fmt, key, step, rows), measure)
    return out, _stats(stats, measure)


def cast_out(x: Tensor, fmt: str, axis: int, key: int, step: Tensor | None, rows: Tensor | None, out: Tensor) -> None:
    if x.dtype not in _DTYPES:
        out.copy_(cast(x, fmt, axis, key, step, rows, False)[0])
        return
    scale_shape(get(fmt), tuple(x.shape), axis)
    x = x.contiguous()
    _run_cast(x, out, None, fmt, axis, _random_words(x, fmt, key, step, rows), False)


@lru_cache(maxsize=1024)
def _codes(e: Format) -> object:
    return _core.Codes(
        spelling=2 if e.taper else 1 if e.is_integer else 0,
        bits=e.bits,
        mantissa_bits=e.mantissa_bits,
        min_exponent=e.min_exponent,
        is_signed=e.signed,
        has_zero=e.has_zero,
        has_negative_zero=e.has_negative_zero,
        inf=e.encode(math.inf) if e.has_inf else -1,
        nan=e.encode(math.nan) if e.has_nan else -1,
    )


class _Packing(NamedTuple):
    """A format as ``_core.pack`` and ``_core.unpack`` take it."""

    codes: object
    scale_code: int
    scale_use: int
    one_pass: bool  # with blocks along the last axis


@lru_cache(maxsize=1024)
def _packing(text: str) -> _Packing:
    fmt, plan = get(text), _plan(text)
    codes = _codes(element_of(fmt))
    one_pass = not random_bits(fmt) and _core.packs(plan.element, plan.scaling, codes)
    if not isinstance(fmt, BlockFormat):
        return _Packing(codes, 0, 0, one_pass)
    scale_use = {"torchao": 1, "modelopt": 1, "compressed_tensors": 2}.get(fmt.scale, 3)
    return _Packing(codes, _STORED[fmt.scale_format], scale_use if fmt.scale_format == "fp8_e4m3" else 0, one_pass)


def elements(
    x: Tensor, fmt: str, axis: int, key: int, step: Tensor | None, rows: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    f = get(fmt)
    check_dtype(x)
    x = x.float().contiguous()
    words, out = _random_words(x, fmt, key, step, rows), torch.empty_like(x)
    if not isinstance(f, BlockFormat):
        _run_cast(x, out, None, fmt, axis, words, False)
        return out, torch.ones(()), torch.ones(())
    shape = scale_shape(f, tuple(x.shape), axis)
    scales = torch.empty(shape, dtype=torch.int32 if f.scale_format == "hif4" else torch.float32)
    _, amax = _run_cast(x, out, scales, fmt, axis, words, False)
    return out, scales, torch.tensor(_core.tensor_scale(_plan(fmt).scaling, amax))


def quantize(x: Tensor, fmt: str, axis: int, key: int, step: Tensor | None, rows: Tensor | None) -> Parts:
    parts = empty_parts(x, get(fmt), axis)
    quantize_out(x, fmt, axis, key, step, rows, *parts)
    return parts


def quantize_out(
    x: Tensor,
    fmt: str,
    axis: int,
    key: int,
    step: Tensor | None,
    rows: Tensor | None,
    codes: Tensor,
    scales: Tensor,
    tensor_scale: Tensor,
) -> None:
    f, plan, how = get(fmt), _plan(fmt), _packing(fmt)
    along_rows = axis % max(x.dim(), 1) == max(x.dim(), 1) - 1
    if not how.one_pass or not (along_rows or plan.one_scale):
        _quantize_elements(elements(x, fmt, axis, key, step, rows), f, axis, codes, scales, tensor_scale)
        return
    x = x if check_dtype(x) in _DTYPES else x.float()
    x, code, threads = x.contiguous(), _DTYPES[x.dtype], _threads(x)
    amax = _core.amax(x.data_ptr(), code, x.numel(), threads) if plan.needs_amax else 0.0
    lost = _core.pack(
        x.data_ptr(),
        codes.data_ptr(),
        scales.data_ptr(),
        code,
        shape_in_rows(x),
        plan.element,
        plan.scaling,
        how.codes,
        how.scale_code,
        amax,
        threads,
    )
    if lost:
        raise nan_is_lost(f)
    if not isinstance(f, BlockFormat):
        scales.fill_(1.0)
    tensor_scale.fill_(_core.tensor_scale(plan.scaling, amax))


def _quantize_elements(
    parts: Parts, fmt: AnyFormat, axis: int, codes: Tensor, scales: Tensor, tensor_scale: Tensor
) -> None:
    """The codes and stored scales of a tensor that was cast to elements before."""
    values, found, of_tensor = parts
    how = _codes(element_of(fmt))
    if _core.encode(values.data_ptr(), codes.data_ptr(), shape_in_rows(values), how, _threads(values)):
        check_no_nan_is_lost(*parts, fmt, axis)
    scales.copy_(stored_scales(found, fmt) if isinstance(fmt, BlockFormat) else found)
    tensor_scale.copy_(of_tensor)


def _blocks(fmt: AnyFormat, shape: tuple[int, ...], axis: int) -> tuple[int, int, int, int]:
    """Rows as ``[outer, along, inner]``: the sizes of the last two, and how many rows and columns share a scale."""
    shape = shape or (1,)
    rows, columns = max(math.prod(shape[:-1]), 1), max(shape[-1], 1)
    if not isinstance(fmt, BlockFormat) or fmt.block == "tensor":
        return rows, 1, rows, columns
    axis %= len(shape)
    high, wide = fmt.tile or (1, max(shape[axis], 1))
    if axis == len(shape) - 1:
        return (shape[-2] if len(shape) > 1 else 1), 1, high, wide
    return shape[axis], math.prod(shape[axis + 1 : -1]), wide, high


def dequantize(
    codes: Tensor, scales: Tensor, of: Tensor, fmt: str, axis: int, shape: Sequence[int], dtype: torch.dtype
) -> Tensor:
    out = torch.empty(shape, dtype=dtype)
    dequantize_out(codes, scales, of, fmt, axis, out)
    return out


def dequantize_out(codes: Tensor, scales: Tensor, of: Tensor, fmt: str, axis: int, out: Tensor) -> None:
    f, how = get(fmt), _packing(fmt)
    bits, kept = element_of(f).bits, scale_shape(f, tuple(out.shape), axis)
    if codes.shape != packed_shape(out.shape, bits) or codes.dtype != code_dtype(bits) or scales.shape != kept:
        raise ConfigError(
            f"dequantize: expected codes {code_dtype(bits)} {list(packed_shape(out.shape, bits))} and scales "
            f"{list(kept)} for {fmt} of shape {list(out.shape)}, got {codes.dtype} {list(codes.shape)} and "
            f"{list(scales.shape)}"
        )
    if out.dtype not in _DTYPES:
        out.copy_(dequantize(codes, scales, of, fmt, axis, out.shape, torch.float32))
        return
    codes, scales = codes.contiguous(), scales.contiguous()
    _core.unpack(
        codes.data_ptr(),
        scales.data_ptr(),
        out.data_ptr(),
        _DTYPES[out.dtype],
        shape_in_rows(out),
        _blocks(f, tuple(out.shape), axis),
        how.codes,
        how.scale_code,
        how.scale_use,
        float(of),
        _threads(out),
    )


def _error_model(model: ErrorModel, place: int, key: int, clock: int, bf16: bool) -> object:
    """A model of a chain as the kernel takes it."""
    if type(model) not in KINDS:
        raise BackendError(f"backend 'cpu' has no kernel for {model}; it has: {', '.join(k.kind for k in KINDS)}")
    a, b = model_numbers(model)
    draw = getattr(model, "draw", "frozen")
    drawn, word = coordinates(key, clock, draw, place)
    hit_key, _ = coordinates(key, clock, draw, place, part=1)
    return _core.ErrorModel(
        kind=list(KINDS).index(type(model)),
        key=drawn,
        hit_key=hit_key,
        word=word,
        last_hit=getattr(model, "last_hit", 0),
        a=a,
        b=b,
        by_magnitude=getattr(model, "reference", "output") == "absdot",
        lanes=getattr(model, "lanes", 0),
        bit=getattr(model, "bit", -1),
        low_bit=16 if bf16 else 0,
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
    out = torch.empty(y.shape, dtype=dtype or y.dtype)
    stats, models = _run_perturb(y, out, error, key, step, rows, magnitude, measure)
    return out, _stats(stats, measure, models)


def perturb_out(
    y: Tensor, error: str, key: int, step: Tensor, rows: Tensor | None, magnitude: Tensor | None, out: Tensor
) -> None:
    if torch.float16 in (y.dtype, out.dtype):
        out.copy_(perturb(y, error, key, step, rows, magnitude, out.dtype, False)[0])
        return
    _run_perturb(y, out, error, key, step, rows, magnitude, False)


def _run_perturb(
    y: Tensor,
    out: Tensor,
    error: str,
    key: int,
    step: Tensor,
    rows: Tensor | None,
    magnitude: Tensor | None,
    measure: bool,
) -> tuple[list[float], tuple[ErrorModel, ...]]:
    y = y.contiguous()
    codes = _DTYPES[check_dtype(y)], _DTYPES[check_dtype(out)]
    rows = check_rows("perturb", y, rows)
    models, magnitude = check_chain(error, y, magnitude, out.dtype)
    clock, bf16 = int(step), out.dtype == torch.bfloat16
    stats = _core.perturb(
        y.data_ptr(),
        out.data_ptr(),
        *codes,
        *shape_in_rows(y),
        *_row_ids(rows),
        0 if magnitude is None else magnitude.data_ptr(),
        [_error_model(m, i, key, clock, bf16) for i, m in enumerate(models)],
        measure,
        _threads(y),
    )
    return stats, models


_finished = finished(cast, perturb)


def finish(
    x: Tensor,
    error: str,
    output: str,
    dtype: torch.dtype,
    keys: Sequence[int],
    step: Tensor,
    rows: Tensor | None,
    measure: bool,
) -> tuple[Tensor, Tensor]:
    """``compose.finished`` in one pass over memory, where a block of the format needs no other than itself."""
    if not output or not _casts_lines(output) or {x.dtype, dtype} - set(_DTYPES):
        return _finished(x, error, output, dtype, keys, step, rows, measure)
    x, clock = x.contiguous(), int(step)
    out = torch.empty_like(x, dtype=dtype)
    rows = check_rows("perturb", x, rows) if error else None
    models = check_chain(error, x, None, x.dtype)[0] if error else ()
    plan = _plan(operand(output)[0])
    missed, held = _core.finish(
        x.data_ptr(),
        out.data_ptr(),
        _DTYPES[x.dtype],
        _DTYPES[dtype],
        *shape_in_rows(x),
        *_row_ids(rows),
        [_error_model(m, i, keys[0], clock, x.dtype == torch.bfloat16) for i, m in enumerate(models)],
        plan.element,
        plan.scaling,
        measure,
        _threads(x),
    )
    return out, torch.stack([_stats(missed, measure and bool(error), models), _stats(held, measure)])


@lru_cache(maxsize=1024)
def _casts_lines(text: str) -> bool:
    """Whether each line of a tensor can be cast for itself: nothing is drawn, and no scale sees more than its block."""
    name, fault = operand(text)
    fmt = get(name)
    if fault is not None or random_bits(fmt):
        return False
    if not isinstance(fmt, BlockFormat):
        return True
    return not _plan(name).needs_amax and (fmt.tile is None or fmt.tile[0] == 1)


@lru_cache(maxsize=1024)
def _accumulator(text: str) -> object:
    return _core.Accumulator(**accumulator_fields(text))


def gemm(a: Tensor, b: Tensor, text: str) -> Tensor:
    if text == accumulator.HOST:
        return host.gemm(a, b)
    shape = check_gemm(a, b)
    a, b = a.contiguous(), b.contiguous()
    out = torch.empty((*a.shape[:-1], b.shape[-1]), dtype=torch.float32)
    _core.gemm(
        a.data_ptr(),
        b.data_ptr(),
        out.data_ptr(),
        _DTYPES[a.dtype],
        shape,
        _accumulator(text),
        torch.get_num_threads() if math.prod(shape) >= _PARALLEL_FROM else 1,
    )
    return out


_composed = missed_product(gemm, perturb)


def missed(
    a: Tensor,
    b: Tensor,
    unit: str,
    bias: Tensor | None,
    bias_is_missed: bool,
    error: str,
    key: int,
    step: Tensor,
    rows: Tensor | None,
    dtype: torch.dtype,
    measure: bool,
) -> tuple[Tensor, Tensor]:
    """``compose.missed_product``, of bf16 in one pass where the host has an instruction for it."""
    if unit != accumulator.HOST or needs_magnitude(chain(error)) or dtype not in _DTYPES or not host.multiplies(a, b):
        return _composed(a, b, unit, bias, bias_is_missed, error, key, step, rows, dtype, measure)
    rows = check_rows("perturb", a, rows)
    flips_bf16 = dtype == torch.bfloat16 and (bias is None or bias_is_missed)
    models = check_models(error, dtype if flips_bf16 else torch.float32)
    clock = int(step)
    y, stats = host.product(
        a,
        b,
        dtype,
        bias,
        bias_is_missed,
        _row_ids(rows),
        [_error_model(m, i, key, clock, flips_bf16) for i, m in enumerate(models)],
        measure,
    )
    return y, _stats(stats, measure, models)


BACKEND = register(
    Backend(
        name="cpu",
        devices=("cpu",),
        ops={
            "cast": cast,
            "elements": elements,
            "quantize": quantize,
            "quantize_out": quantize_out,
            "dequantize": dequantize,
            "dequantize_out": dequantize_out,
            "perturb": perturb,
            "gemm": gemm,
            **compositions(cast, perturb, gemm, missed, finish),
            "cast_out": cast_out,
            "perturb_out": perturb_out,
        },
    )
)
