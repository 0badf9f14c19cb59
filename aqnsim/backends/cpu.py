"""The C++ kernels of ``csrc/cpu``, called with raw pointers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from aqnsim import _core, accumulator
from aqnsim._errors import BackendError
from aqnsim.backends import Backend, register
from aqnsim.backends.checks import (
    check_chain,
    check_dtype,
    check_gemm,
    check_rows,
    check_step,
    perturb_stats,
    shape_in_rows,
)
from aqnsim.backends.compose import compositions, finished
from aqnsim.backends.half import casts_half, perturbs_half
from aqnsim.errors import (
    AbsoluteGaussian,
    BitFlip,
    DeadZone,
    ErrorModel,
    RelativeGaussian,
    Saturation,
    Spike,
    Stuck,
    SystematicBias,
)
from aqnsim.formats import (
    ROUNDINGS,
    AnyFormat,
    BlockFormat,
    Format,
    float32,
    get,
    random_bits,
    scale_shape,
)
from aqnsim.profiles.spec import operand
from aqnsim.receipts import STATS
from aqnsim.rng import coordinates

_DTYPES = {torch.float32: 0, torch.bfloat16: 1}
_OVERFLOWS = {"saturate": 0, "inf": 1, "nan": 2}
_SCALES = {  # the enum Scale of csrc/core/block.h, by scale format and rule
    **{("e8m0", rule): 1 for rule in ("floor", "ceil", "rceil", "even", "amct")},
    ("e8m0", "mse"): 2,
    ("fp8_e4m3", "te"): 3,
    ("fp8_e4m3", "torchao"): 4,
    ("fp8_e4m3", "modelopt"): 5,
    ("fp8_e4m3", "compressed_tensors"): 6,
    ("fp8_e4m3", "4over6-mae"): 7,
    ("fp8_e4m3", "4over6-mse"): 8,
    ("fp8_e4m3", "qutlass"): 9,
    ("fp32", "amax"): 10,
    ("fp32", "te"): 11,
    ("fp32", "te-pow2"): 12,
    ("hif4", "hif4"): 13,
}
_KINDS: dict[type[ErrorModel], tuple[str, ...]] = {  # in the order of ErrorKind of csrc/core/error.h: a and b
    RelativeGaussian: ("sigma",),
    AbsoluteGaussian: ("sigma",),
    SystematicBias: ("gain", "offset"),
    DeadZone: ("threshold",),
    Saturation: ("limit",),
    Spike: ("size",),
    Stuck: ("value",),
    BitFlip: (),
}
_PARALLEL_FROM = 1 << 15  # elements: below, waking threads costs more than they save


def _threads(t: Tensor) -> int:
    return torch.get_num_threads() if t.numel() >= _PARALLEL_FROM else 1


def _stats(values: list[float], measure: bool, models: Sequence[ErrorModel] = ()) -> Tensor:
    """What a kernel measured, in the order of ``receipts.STATS``."""
    return perturb_stats(values, models) if measure else torch.zeros(len(STATS), dtype=torch.float64)


def _element(e: Format) -> object:
    name = "stochastic" if random_bits(e) else e.rounding
    return _core.Element(
        mantissa_bits=e.mantissa_bits,
        min_exponent=-e.taper[-1][0] if e.taper else e.min_exponent,
        bias=e.code_bias,
        max=float32(e.max),
        max_negative=float32(-e.min if e.signed else e.max),
        min_normal=e.min_normal,
        nan={"keep": math.nan, "zero": 0.0, "max": float32(e.max)}[e.nan],
        overflow=_OVERFLOWS[e.overflow],
        rounding=ROUNDINGS.index(name),
        random_bits=random_bits(e),
        is_signed=e.signed,
        has_zero=e.has_zero,
        has_negative_zero=e.has_negative_zero,
        flush=e.subnormals == "flush",
        tapered=bool(e.taper),
    )


def _carry_from(fmt: BlockFormat) -> int:
    """The fraction bits of a block's largest magnitude from which its rule takes the next power of two."""
    e, never = fmt.element, 1 << 23
    width = e.mantissa_bits - e.is_integer
    leading = math.ldexp(e.max, -e.max_exponent) - 1
    return {
        "ceil": 1,
        "rceil": int(leading * never) + 1,
        "even": never - (1 << (22 - width)),
        "amct": 3 * never // 4 + 1,
    }.get(fmt.scale, never)


def _scaling(fmt: BlockFormat) -> object:
    rule = _SCALES[fmt.scale_format, fmt.scale]
    rows, columns = fmt.tile or {"axis": (1, 0), "tensor": (0, 0)}[str(fmt.block)]
    largest = 6 * fmt.scale_max if fmt.scale_format == "fp8_e4m3" else fmt.amax_to or fmt.element.max
    return _core.Scaling(
        rule=rule,
        rows=rows,
        columns=columns,
        emax=fmt.element.max_exponent,
        carry_from=_carry_from(fmt),
        zero_exponent=0 if fmt.zero_scale == "one" else -127,
        finite_only=fmt.special == "element",
        largest=float32(largest),
    )


class _Plan(NamedTuple):
    """A format as ``_core.cast`` takes it."""

    element: object
    scaling: object
    needs_amax: bool


@lru_cache(maxsize=1024)
def _plan(text: str) -> _Plan:
    fmt = get(text)
    if not isinstance(fmt, BlockFormat):
        return _Plan(_element(fmt), _core.Scaling(rule=0), False)
    return _Plan(_element(fmt.element), _scaling(fmt), fmt.scale_format == "fp8_e4m3" or fmt.block == "tensor")


def _view(fmt: AnyFormat, shape: tuple[int, ...], axis: int) -> tuple[tuple[int, int, int], bool]:
    """A contiguous tensor as [batch, high, wide], blocks along ``wide``; whether neighbours there are so in memory."""
    if not isinstance(fmt, BlockFormat) or fmt.block == "tensor":
        return (1, 1, math.prod(shape)), True
    shape = shape or (1,)
    axis %= len(shape)
    before, n, after = shape[:axis], shape[axis], shape[axis + 1 :]
    if fmt.tile is None or fmt.tile[0] == 1:
        return (math.prod(before), math.prod(after), n), False
    if after:
        return (math.prod(before), after[0], n), False
    return (math.prod(before[:-1]), before[-1] if before else 1, n), True


def _row_ids(rows: Tensor | None) -> tuple[int, bool]:
    """The logical rows as kernels take them: an address, 0 for none, and whether they have first columns."""
    return (0, False) if rows is None else (rows.data_ptr(), rows.dim() == 2)


def _random_words(x: Tensor, fmt: str, key: int, step: Tensor | None, rows: Tensor | None) -> Tensor | None:
    at = check_step(get(fmt), step)
    if at is None:
        return None
    rows = check_rows("cast", x, rows)
    words = torch.empty(x.shape, dtype=torch.int32)
    _core.random_words(words.data_ptr(), *_row_ids(rows), *shape_in_rows(x), *coordinates(key, at), _threads(x))
    return words


def _run_cast(
    x: Tensor, out: Tensor, scales: Tensor | None, fmt: str, axis: int, words: Tensor | None, measure: bool
) -> tuple[list[float], float]:
    plan, (shape, row_major) = _plan(fmt), _view(get(fmt), tuple(x.shape), axis)
    code, threads = _DTYPES[check_dtype(x)], _threads(x)
    amax = _core.amax(x.data_ptr(), code, x.numel(), threads) if plan.needs_amax else 0.0
    stats = _core.cast(
        x.data_ptr(),
        out.data_ptr(),
        0 if scales is None else scales.data_ptr(),
        0 if words is None else words.data_ptr(),
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


def quantize(
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


def _error_model(model: ErrorModel, place: int, key: int, clock: int, bf16: bool) -> object:
    """A model of a chain as the kernel takes it."""
    if type(model) not in _KINDS:
        raise BackendError(f"backend 'cpu' has no kernel for {model}; it has: {', '.join(k.kind for k in _KINDS)}")
    a, b, *_ = *(getattr(model, name) for name in _KINDS[type(model)]), 0.0, 0.0
    draw = getattr(model, "draw", "frozen")
    drawn, word = coordinates(key, clock, draw, place)
    hit_key, _ = coordinates(key, clock, draw, place, part=1)
    return _core.ErrorModel(
        kind=list(_KINDS).index(type(model)),
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
    y = y.contiguous()
    out = torch.empty_like(y, dtype=dtype or y.dtype)
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
    return out, _stats(stats, measure, models)


_composed = finished(cast, perturb)


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
        return _composed(x, error, output, dtype, keys, step, rows, measure)
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
    a = accumulator.get(text)
    return _core.Accumulator(
        fraction_bits=a.fraction_bits,
        chunk=a.chunk,
        order=accumulator.ORDERS.index(a.order),
        nearest=a.rounding == "nearest-even",
        result_bits=a.result_bits,
        nearest_result=a.result_rounding == "nearest-even",
        flush=a.subnormals == "flush",
        min_exponent=a.min_exponent,
        promote=a.promote,
    )


def gemm(a: Tensor, b: Tensor, text: str) -> Tensor:
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


BACKEND = register(
    Backend(
        name="cpu",
        devices=("cpu",),
        ops={
            "cast": cast,
            "quantize": quantize,
            "perturb": perturb,
            "gemm": gemm,
            **compositions(cast, perturb, gemm, finish),
        },
    )
)
