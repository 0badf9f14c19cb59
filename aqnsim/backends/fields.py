"""The structs of csrc/core that tell compiled kernels of formats, error models and accumulators, field by field."""

from __future__ import annotations

import math
from typing import Any

from aqnsim import accumulator
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
from aqnsim.formats import ROUNDINGS, AnyFormat, BlockFormat, Format, float32, random_bits

OVERFLOWS = {"saturate": 0, "inf": 1, "nan": 2}
SCALES = {  # the enum Scale of csrc/core/block.h, by scale format and rule
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
KINDS: dict[type[ErrorModel], tuple[str, ...]] = {  # in the order of ErrorKind of csrc/core/error.h: a and b
    RelativeGaussian: ("sigma",),
    AbsoluteGaussian: ("sigma",),
    SystematicBias: ("gain", "offset"),
    DeadZone: ("threshold",),
    Saturation: ("limit",),
    Spike: ("size",),
    Stuck: ("value",),
    BitFlip: (),
}


def element_fields(e: Format) -> dict[str, Any]:
    """The struct Element of csrc/core/format.h, in its order."""
    name = "stochastic" if random_bits(e) else e.rounding
    return {
        "mantissa_bits": e.mantissa_bits,
        "min_exponent": -e.taper[-1][0] if e.taper else e.min_exponent,
        "bias": e.code_bias,
        "max": float32(e.max),
        "max_negative": float32(-e.min if e.signed else e.max),
        "min_normal": e.min_normal,
        "nan": {"keep": math.nan, "zero": 0.0, "max": float32(e.max)}[e.nan],
        "overflow": OVERFLOWS[e.overflow],
        "rounding": ROUNDINGS.index(name),
        "random_bits": random_bits(e),
        "is_signed": e.signed,
        "has_zero": e.has_zero,
        "has_negative_zero": e.has_negative_zero,
        "flush": e.subnormals == "flush",
        "tapered": bool(e.taper),
    }


def carry_from(fmt: BlockFormat) -> int:
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


def scaling_fields(fmt: AnyFormat) -> dict[str, Any]:
    """The struct Scaling of csrc/core/block.h, in its order; all 0 for a format without blocks."""
    names = ("rule", "rows", "columns", "emax", "carry_from", "zero_exponent", "finite_only", "largest")
    if not isinstance(fmt, BlockFormat):
        return dict(zip(names, (0, 0, 0, 0, 0, 0, False, 0.0), strict=True))
    rows, columns = fmt.tile or {"axis": (1, 0), "tensor": (0, 0)}[str(fmt.block)]
    largest = 6 * fmt.scale_max if fmt.scale_format == "fp8_e4m3" else fmt.amax_to or fmt.element.max
    values = (
        SCALES[fmt.scale_format, fmt.scale],
        rows,
        columns,
        fmt.element.max_exponent,
        carry_from(fmt),
        0 if fmt.zero_scale == "one" else -127,
        fmt.special == "element",
        float32(largest),
    )
    return dict(zip(names, values, strict=True))


def needs_amax(fmt: AnyFormat) -> bool:
    """Whether a cast needs the largest magnitude of the tensor first."""
    return isinstance(fmt, BlockFormat) and (fmt.scale_format == "fp8_e4m3" or fmt.block == "tensor")


def blocks_view(fmt: AnyFormat, shape: tuple[int, ...], axis: int) -> tuple[tuple[int, int, int], bool]:
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


def model_numbers(model: ErrorModel) -> tuple[float, float]:
    """The two numbers of a model, a and b of the struct ErrorModel of csrc/core/error.h."""
    a, b, *_ = *(getattr(model, name) for name in KINDS[type(model)]), 0.0, 0.0
    return a, b


def accumulator_fields(text: str) -> dict[str, Any]:
    """The struct Accumulator of csrc/core/accumulate.h, in its order."""
    a = accumulator.get(text)
    return {
        "fraction_bits": a.fraction_bits,
        "chunk": a.chunk,
        "order": accumulator.ORDERS.index(a.order),
        "nearest": a.rounding == "nearest-even",
        "result_bits": a.result_bits,
        "nearest_result": a.result_rounding == "nearest-even",
        "flush": a.subnormals == "flush",
        "min_exponent": a.min_exponent,
        "promote": a.promote,
    }
