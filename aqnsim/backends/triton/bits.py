"""Bit casts and constants: the twin of ``csrc/core/bits.h``.

A kernel here uses only operations whose result IEEE 754 fixes to the last bit, and is compiled without contraction (see
:mod:`aqnsim.backends.triton.launch`). Patterns are uint32; a constant is made by ``fp32``, as a subnormal
literal would become fp64.
"""

from __future__ import annotations

import os
from typing import Any

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")
"""Whether kernels run in Triton's interpreter, on CPU tensors."""


@triton.constexpr_function
def of(parameters: Any, field: str) -> Any:
    """A field of what a kernel is compiled for."""
    return getattr(parameters, field)


@triton.jit
def fp32(VALUE: tl.constexpr):
    """A constant."""
    return tl.full((), VALUE, tl.float32)


@triton.jit
def bits_of(x):
    return x.to(tl.uint32, bitcast=True)


@triton.jit
def float_of(u):
    return u.to(tl.float32, bitcast=True)


@triton.jit
def magnitude_of(x):
    """The bits of ``|x|``."""
    return bits_of(x) & 0x7FFFFFFF


@triton.jit
def abs_of(x):
    return float_of(magnitude_of(x))


@triton.jit
def is_finite(x):
    return magnitude_of(x) < 0x7F800000


@triton.jit
def is_nan(x):
    return magnitude_of(x) > 0x7F800000


@triton.jit
def differs(a, b):
    """Other bits, where all NaNs count as one."""
    return (bits_of(a) != bits_of(b)) & ~(is_nan(a) & is_nan(b))


@triton.jit
def exp2_of(e):
    """2^e for -127 <= e <= 127, int32."""
    return float_of(tl.where(e > -127, (e + 127) << 23, 0x00400000).to(tl.uint32))


@triton.jit
def widened(x):
    """Values of a float32 or bfloat16 tensor in fp32; bfloat16 is its upper half."""
    if x.dtype == tl.bfloat16:
        return float_of(x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16)
    else:
        return x


@triton.jit
def narrowed(x, DTYPE: tl.constexpr):
    """fp32 values as a tensor of ``DTYPE`` holds them, to nearest even.

    A GPU has an instruction for it. Triton's interpreter drops the low bits instead, and loses subnormals.
    """
    if tl.bfloat16 != DTYPE:
        return x
    elif INTERPRETED:
        u = bits_of(x)
        nearest = tl.where(is_nan(x), u | 0x00400000, u + 0x7FFF + ((u >> 16) & 1))
        return (nearest >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        return x.to(tl.bfloat16)


@triton.jit
def as_held(x, DTYPE: tl.constexpr):
    """The same, back in fp32."""
    return widened(narrowed(x, DTYPE))
