"""Shared scales: from a block's largest magnitude to the factors around its rounding. The twin of ``csrc/core/block.h``
and ``hif4.h``; a kernel is compiled for one format."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import triton
import triton.language as tl

from aqnsim.backends.fields import carry_from
from aqnsim.backends.triton.bits import abs_of, as_held, bits_of, exp2_of, float_of, fp32, is_finite, of
from aqnsim.backends.triton.rounding import Element, element, round_plain
from aqnsim.formats import BlockFormat, element_of, float32, get


@dataclass(frozen=True)
class Scaling:
    """What a scale rule needs to know of a block format, as ``Scaling`` of the C++ core."""

    format: str
    rule: str
    rows: int
    columns: int  # 0: the whole axis, or with 0 rows the whole tensor
    emax: int
    carry_from: int
    zero_exponent: int
    finite_only: bool
    largest: float
    e4m3: Element
    ue6m2: Element

    @property
    def divides(self) -> bool:
        """Whether a value is divided by the first factor, not multiplied with it."""
        return self.rule in ("modelopt", "compressed_tensors", "amax")

    @property
    def searches(self) -> bool:
        """Whether the rule looks at all values of a block, not only at the largest."""
        return self.rule == "mse" or self.rule.startswith("4over6")

    @property
    def two_level(self) -> bool:
        """Whether there is a scale of the tensor."""
        return self.format == "fp8_e4m3"


@lru_cache(maxsize=1024)
def scaling(fmt: BlockFormat) -> Scaling:
    """The parameters of a block format's kernels."""
    rows, columns = fmt.tile or {"axis": (1, 0), "tensor": (0, 0)}[str(fmt.block)]
    largest = 6 * fmt.scale_max if fmt.scale_format == "fp8_e4m3" else fmt.amax_to or fmt.element.max
    return Scaling(
        format=fmt.scale_format,
        rule=fmt.scale,
        rows=rows,
        columns=columns,
        emax=fmt.element.max_exponent,
        carry_from=carry_from(fmt),
        zero_exponent=0 if fmt.zero_scale == "one" else -127,
        finite_only=fmt.special == "element",
        largest=float32(largest),
        e4m3=element(element_of(get("fp8_e4m3"))),
        ue6m2=element(element_of(get("fp8_ue6m2"))),
    )


@triton.jit
def at_most_float_max(x):
    return tl.where(x > fp32(3.4028234663852886e38), fp32(3.4028234663852886e38), x)


@triton.jit
def clamped(x, LOW: tl.constexpr, HIGH: tl.constexpr):
    return tl.where(x < fp32(LOW), fp32(LOW), tl.where(x > fp32(HIGH), fp32(HIGH), x))


@triton.jit
def e8m0_exponent(amax, S: tl.constexpr):
    """OCP MX v1.0 section 6.3, floor(log2 amax) - emax from the exponent bits, or the next one; clamped to E8M0."""
    tiny = amax < 0x00800000
    u = bits_of(float_of(amax) * tl.where(tiny, 16777216.0, 1.0))
    e = (u >> 23).to(tl.int32) - tl.where(tiny, 127 + 24, 127) - of(S, "emax")
    e += tl.where((u & 0x007FFFFF) >= of(S, "carry_from"), 1, 0)
    return tl.minimum(tl.maximum(e, -127), 127)


@triton.jit
def e8m0_scale(amax, e, S: tl.constexpr):
    """The factors of 2^e; a NaN or an Inf in the block makes them NaN, and with them the whole block."""
    e = tl.where(amax == 0, of(S, "zero_exponent"), e)
    finite = amax < 0x7F800000
    return tl.where(finite, exp2_of(-e), fp32(float("nan"))), tl.where(finite, exp2_of(e), fp32(float("nan")))


@triton.jit
def tensor_scale(amax, S: tl.constexpr):
    """NVFP4's scale of a tensor with the largest magnitude ``amax``: encode, decode, stored."""
    one = tl.full((), 1.0, tl.float32)
    if of(S, "rule") == "torchao" or of(S, "rule") == "modelopt":
        encode = tl.div_rn(amax, fp32(2688.0))
        decode, stored = one, encode
    elif of(S, "rule") == "compressed_tensors":  # so torch divides a number by a tensor
        encode = 2688.0 * tl.div_rn(
            one, tl.where(amax < fp32(1.1754943508222875e-38), fp32(1.1754943508222875e-38), amax)
        )
        encode = tl.where(is_finite(encode), encode, one)
        decode, stored = one, encode
    elif of(S, "rule") == "qutlass":  # a block's scale holds its largest magnitude itself
        encode = 6.0 * one
        decode = tl.div_rn(one, encode)
        stored = decode
    else:
        encode = at_most_float_max(tl.div_rn(fp32(of(S, "largest")), amax))
        encode = tl.where((amax == 0.0) | (encode == 0.0), one, encode)
        decode = tl.div_rn(amax, fp32(of(S, "largest")))
        stored = decode
    return encode, decode, stored


@triton.jit
def two_level(encode, wanted, S: tl.constexpr):
    """What multiplies the values of a block, and its scale, which is E4M3 next to ``wanted``."""
    s = round_plain(wanted, of(S, "e4m3"))
    one = tl.full(s.shape, 1.0, tl.float32)
    return at_most_float_max(tl.div_rn(one, s * tl.div_rn(fp32(1.0), encode))), s


@triton.jit
def nvfp4_scale(amax, choice, encode, S: tl.constexpr):
    """NVFP4's factors of a block, in the order of operations of the library that the rule names."""
    if of(S, "rule") == "torchao":
        s = round_plain(clamped(tl.div_rn(tl.div_rn(amax, fp32(6.0)), encode), 0.015625, 448.0), of(S, "e4m3"))
        factor, decode = tl.div_rn(tl.div_rn(fp32(1.0), encode), s), encode * s
    elif of(S, "rule") == "modelopt":
        wanted = tl.div_rn(amax, 6.0 * encode)
        wanted = tl.where(wanted == 0.0, 1.0, wanted)
        s = round_plain(clamped(wanted, 0.001953125, 448.0), of(S, "e4m3"))
        factor = s * encode
        decode = factor
    elif of(S, "rule") == "compressed_tensors":
        s = round_plain(tl.div_rn(amax, fp32(6.0)) * encode, of(S, "e4m3"))
        s = tl.where(s == 0.0, 0.125, s)
        factor = tl.div_rn(s, encode)
        decode = factor
    elif of(S, "rule") == "qutlass":
        factor, s = two_level(encode, encode * (amax * fp32(1 / 6)), S)
        factor, decode = tl.where(s == 0.0, 0.0, factor), s
    elif of(S, "searches"):  # 4over6: to 6, or with a scale 1.5 times as large to 4
        base = tl.div_rn(amax, fp32(6.0)) * encode
        factor, s = two_level(encode, tl.where(choice == 1, base * 1.5, base), S)
        decode = s
    else:
        factor, s = two_level(encode, amax * (encode * fp32(1 / 6)), S)
        decode = s
    return factor, s, decode


@triton.jit
def fp32_scale(amax, S: tl.constexpr):
    """The factors of an fp32 scale."""
    if of(S, "rule") == "amax":
        quotient = tl.div_rn(amax, fp32(of(S, "largest")))
        factor = tl.where(quotient == 0.0, 1.0, quotient)
        s = factor
    else:
        factor = at_most_float_max(tl.div_rn(fp32(of(S, "largest")), amax))
        factor = tl.where((amax == 0.0) | ~is_finite(amax), 1.0, factor)
        if of(S, "rule") == "te-pow2":
            factor = float_of(bits_of(factor) & 0xFF800000)
        s = tl.div_rn(tl.full(factor.shape, 1.0, tl.float32), factor)
    return factor, s


@triton.jit
def block_scale(amax, choice, encode, S: tl.constexpr):
    """Of blocks with the largest magnitudes ``amax``, as bits: the factor before rounding, the scale, the factor after.

    ``choice`` is what a search found: the exponent by ``mse``, whether to map to 4 by 4over6.
    """
    if of(S, "format") == "e8m0":
        factor, s = e8m0_scale(amax, choice if of(S, "searches") else e8m0_exponent(amax, S), S)
        decode = s
    elif of(S, "format") == "fp8_e4m3":
        factor, s, decode = nvfp4_scale(float_of(amax), choice, encode, S)
    else:
        factor, s = fp32_scale(float_of(amax), S)
        decode = s
    return factor, s, decode


@triton.jit
def hif4_scaled(x, S: tl.constexpr):
    """HiFloat4 (arXiv 2602.11287), in the order of operations of Ascend's model compression toolkit.

    Of blocks ``[n, 64]``: what is rounded to an element, the factor after rounding, and the levels, one a block.
    """
    n: tl.constexpr = x.shape[0]
    of4 = tl.max(tl.reshape(bits_of(x) & 0x7FFFFFFF, (n, 16, 4)), 2)
    of8 = tl.max(tl.reshape(of4, (n, 8, 2)), 2)
    of64 = tl.max(of8, 1)
    finite = of64 < 0x7F800000
    seventh = as_held(tl.div_rn(fp32(1.0), fp32(7.0)), tl.bfloat16)
    wanted = as_held(float_of(of64) * seventh, tl.bfloat16)
    scale = round_plain(clamped(wanted, 2.0**-48, 49152.0), of(S, "ue6m2"))
    inverse = as_held(tl.div_rn(tl.full(scale.shape, 1.0, tl.float32), scale), tl.bfloat16)
    outer = float_of(of8) * inverse[:, None] >= 4.0
    spread = tl.reshape(tl.broadcast_to(outer.to(tl.int32)[:, :, None], (n, 8, 2)), (n, 16))
    reached = (float_of(of4) * inverse[:, None]) * tl.where(spread == 1, 0.5, 1.0)
    inner = (reached >= 2.0).to(tl.int32)
    shift = tl.reshape(tl.broadcast_to((spread + inner)[:, :, None], (n, 16, 4)), (n, 64))
    m = as_held((abs_of(x) * inverse[:, None]) * exp2_of(-shift), tl.bfloat16)
    m = tl.where(x < 0.0, float_of(bits_of(m) | 0x80000000), m)  # Triton 3.6 takes -m for 0 - m, which loses -0
    scaled = tl.where(finite[:, None], m, fp32(float("nan")))
    decode = exp2_of(shift) * tl.where(finite, scale, fp32(float("nan")))[:, None]
    levels = ((bits_of(scale) >> 21) - ((127 - 48) << 2)).to(tl.int32)
    levels |= tl.sum(outer.to(tl.int32) << (8 + tl.arange(0, 8))[None, :], 1)
    levels |= tl.sum(inner << (16 + tl.arange(0, 16))[None, :], 1)
    return scaled, decode, tl.where(finite, levels, 0xFF)
