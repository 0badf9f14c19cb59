"""What each scale rule makes of blocks: in the order of operations of its source, in fp32."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from aqnsim import formats
from aqnsim.formats import BlockFormat, Format, element_of
from aqnsim.reference.codes import encode
from aqnsim.reference.rounding import F32, U32, round_to, to_bf16

_FLOAT_MAX = np.finfo(np.float32).max
_FLOAT_TINY = np.finfo(np.float32).tiny
_ONE = np.float32(1)


@dataclass(frozen=True)
class Scaling:
    """What a rule makes of blocks ``[..., rows, columns]``: parts as in :class:`Blocks`, scales ``[...]``."""

    scaled: F32
    elements: F32
    values: F32
    scales: npt.NDArray[Any]
    tensor_scale: np.float32 = _ONE


def _spread(per_block: npt.NDArray[Any]) -> npt.NDArray[Any]:
    return per_block[..., None, None]


def _largest(blocks: F32) -> F32:
    return np.asarray(np.abs(blocks).max(axis=(-2, -1), initial=0.0), np.float32)


def _error_sum(errors: F32) -> F32:
    """Errors of a block, added up in fp32: each row from left to right, then rows pairwise, first half and second."""
    rows: npt.NDArray[np.float32] = np.zeros(errors.shape[:-1], np.float32)
    for column in range(errors.shape[-1]):
        rows = rows + errors[..., column]
    size = 1 << (errors.shape[-2] - 1).bit_length()
    rows = np.concatenate([rows, np.zeros((*errors.shape[:-2], size - errors.shape[-2]), np.float32)], axis=-1)
    while size > 1:
        size //= 2
        rows = rows[..., :size] + rows[..., size:]
    return rows[..., 0]


# ---- E8M0 scales: OCP MX --------------------------------------------------------------------------------------------


def _e8m0(blocks: F32, fmt: BlockFormat, words: U32 | None) -> Scaling:
    """X = 2^e, with e by the rule, clamped to E8M0's 2^-127 .. 2^127; OCP MX v1.0 section 6.3 for ``floor``.

    With ``special = block`` a block with a NaN or an Inf gets the scale NaN, and so becomes NaN as a whole.
    """
    element = fmt.element
    counted = blocks if fmt.special == "block" else np.where(np.isfinite(blocks), blocks, np.float32(0))
    largest = _largest(counted)
    finite = np.where(np.isfinite(largest), largest, 1.0)
    exponent = np.frexp(finite)[1] - 1 - element.max_exponent
    clamped = np.clip(exponent + _carries(finite, fmt), -127, 127)
    if fmt.scale == "mse":
        clamped = _least_error(counted, np.clip(exponent, -127, 127), element)
    clamped = np.where(finite == 0, -127 if fmt.zero_scale == "min" else 0, clamped)
    nan = np.where(np.isfinite(largest), 1.0, np.nan)
    scales = (np.ldexp(1.0, clamped) * nan).astype(np.float32)
    scaled = blocks * _spread((np.ldexp(1.0, -clamped) * nan).astype(np.float32))
    elements = round_to(scaled, element, words)
    return Scaling(scaled, elements, elements * _spread(scales), scales)


def _carries(largest: Any, fmt: BlockFormat) -> Any:
    """Whether a rule takes the next power of two above ``floor``'s, by the leading digits of the largest value."""
    element = fmt.element
    digits = 2 * np.frexp(largest.astype(np.float64))[0]  # in [1, 2)
    width = element.mantissa_bits - element.is_integer  # fraction bits at max
    return {
        "floor": digits < 0,
        "ceil": digits > 1,
        "rceil": digits > math.ldexp(element.max, -element.max_exponent),  # ceil(log2(amax / max))
        "even": np.floor(digits * 2**width + 0.5) == 2 ** (width + 1),  # amax rounded to the element's width
        "amct": digits > 1.75,
        "mse": digits < 0,
    }[fmt.scale]


def _least_error(blocks: F32, exponent: Any, element: Format) -> Any:
    """The exponent of ``floor``, one more or one less: the first whose squared error is least.

    Candidates are compared in the element's units, errors scaled by exact powers of four. The elements of the trial are
    rounded to nearest even.
    """
    nearest = formats.with_rounding(element, "nearest-even")
    best, least = exponent, None
    for shift in (0, 1, -1):
        candidate = np.clip(exponent + shift, -127, 127)
        scaled = blocks * _spread(np.ldexp(1.0, -candidate).astype(np.float32))
        off = round_to(scaled, element_of(nearest)) - scaled
        error = _error_sum(off * off) * np.ldexp(1.0, 2 * (candidate - exponent)).astype(np.float32)
        if least is None:
            least = error
            continue
        better = error < least
        best, least = np.where(better, candidate, best), np.where(better, error, least)
    return best


# ---- E4M3 scales and one fp32 scale a tensor: NVFP4 -----------------------------------------------------------------

_E4M3 = Format(name="fp8_e4m3", exponent_bits=4, mantissa_bits=3, bias=7, specials="fn")


@dataclass(frozen=True)
class _Level:
    """Scales of NVFP4's blocks: x is multiplied with ``factor`` or divided by it; y = (q decode) tensor_decode."""

    scales: F32
    factor: F32
    decode: F32
    stored: np.float32
    divides: bool = False
    tensor_decode: np.float32 = _ONE


def _te(amax_b: F32, encode: np.float32, decode: np.float32) -> _Level:
    """s = E4M3(amax_b (S_enc / 6)), q = E2M1(x / (s / S_enc)), y = (q s) decode."""
    scales = round_to(amax_b * (encode * np.float32(1 / 6)), _E4M3)
    return _Level(scales, _te_factor(scales, encode), scales, decode, tensor_decode=decode)


def _te_factor(scales: F32, encode: np.float32) -> F32:
    return np.asarray(np.minimum(_ONE / (scales * (_ONE / encode)), _FLOAT_MAX))


def _qutlass(amax_b: F32) -> _Level:
    """As ``te`` with S_enc = 6: a block's scale holds its largest magnitude itself."""
    sixth = _ONE / np.float32(6)
    scales = round_to(np.float32(6) * (amax_b * sixth), _E4M3)
    factor = np.where(scales == 0, np.float32(0), _te_factor(scales, np.float32(6)))
    return _Level(scales, factor, scales, sixth, tensor_decode=sixth)


def _torchao(amax_b: F32, per_tensor: np.float32) -> _Level:
    wanted = (amax_b / np.float32(6)) / per_tensor
    scales = round_to(np.clip(wanted, np.float32(2**-6), np.float32(448)), _E4M3)
    return _Level(scales, (_ONE / per_tensor) / scales, per_tensor * scales, per_tensor)


def _modelopt(amax_b: F32, per_tensor: np.float32) -> _Level:
    wanted = amax_b / (np.float32(6) * per_tensor)
    wanted = np.where(wanted == 0, _ONE, wanted)
    scales = round_to(np.clip(wanted, np.float32(2**-9), np.float32(448)), _E4M3)
    return _Level(scales, scales * per_tensor, scales * per_tensor, per_tensor, divides=True)


def _compressed_tensors(amax_b: F32, amax: np.float32) -> _Level:
    encode = np.float32(2688) * (_ONE / np.maximum(amax, _FLOAT_TINY))  # so torch divides a number by a tensor
    encode = encode if np.isfinite(encode) else _ONE
    scales = round_to((amax_b / np.float32(6)) * encode, _E4M3)
    scales = np.where(scales == 0, np.float32(0.125), scales)
    return _Level(scales, scales / encode, scales / encode, encode, divides=True)


def _nvfp4(blocks: F32, fmt: BlockFormat, words: U32 | None) -> Scaling:
    """Two levels of scales, in the order of operations of the library that ``fmt.scale`` names."""
    amax_b = _largest(blocks)
    amax = np.float32(amax_b.max(initial=0.0))
    if fmt.scale.startswith("4over6"):
        return _four_over_six(blocks, fmt, words, amax_b, amax)
    per_tensor = amax / np.float32(2688)
    level = {
        "te": lambda: _te(amax_b, _encode_scale(amax, np.float32(2688)), per_tensor),
        "qutlass": lambda: _qutlass(amax_b),
        "torchao": lambda: _torchao(amax_b, per_tensor),
        "modelopt": lambda: _modelopt(amax_b, per_tensor),
        "compressed_tensors": lambda: _compressed_tensors(amax_b, amax),
    }[fmt.scale]()
    scaled = blocks / _spread(level.factor) if level.divides else blocks * _spread(level.factor)
    elements = round_to(scaled, fmt.element, words)
    return Scaling(
        scaled, elements, (elements * _spread(level.decode)) * level.tensor_decode, level.scales, level.stored
    )


def _encode_scale(amax: np.float32, largest: np.float32) -> np.float32:
    encode = np.minimum(largest / amax, _FLOAT_MAX)
    return np.float32(1) if amax == 0 or encode == 0 else encode


def _four_over_six(blocks: F32, fmt: BlockFormat, words: U32 | None, amax_b: F32, amax: np.float32) -> Scaling:
    """NVIDIA TransformerEngine's 4over6: a block's largest value goes to 6 or, with a scale 1.5 times as large, to 4.

    The candidate with the smaller error in the tensor's own units is taken; a tie goes to 6.
    """
    f = np.float32
    largest = f(6 * fmt.scale_max)
    encode = _encode_scale(amax, largest)
    base = (amax_b / f(6)) * encode
    trial_element = element_of(formats.with_rounding(fmt.element, "nearest-even"))

    def candidate(wanted: F32) -> tuple[F32, F32, F32]:
        scales = round_to(wanted, _E4M3)
        scaled = blocks * _spread(_te_factor(scales, encode))
        trial = ((round_to(scaled, trial_element) * _spread(scales)) * amax) / largest
        off = trial - blocks
        return scales, scaled, _error_sum(off * off if fmt.scale == "4over6-mse" else np.abs(off))

    scales6, scaled6, error6 = candidate(base)
    scales4, scaled4, error4 = candidate(base * f(1.5))
    four = error4 < error6
    scales, scaled = np.where(four, scales4, scales6), np.where(_spread(four), scaled4, scaled6)
    elements = round_to(scaled, fmt.element, words)
    decode = amax / largest
    return Scaling(scaled, elements, (elements * _spread(scales)) * decode, scales, decode)


# ---- fp32 scales ----------------------------------------------------------------------------------------------------


def _fp32(blocks: F32, fmt: BlockFormat, words: U32 | None) -> Scaling:
    """``amax``: s = amax_b / amax_to, q = round(x / s). ``te``: e = max / amax_b, q = round(x e), s = 1 / e."""
    f = np.float32
    amax_b = _largest(blocks)
    to = f(fmt.element.max if fmt.amax_to is None else fmt.amax_to)
    if fmt.scale == "amax":
        scales = amax_b / to
        scales = np.where(scales == 0, f(1), scales)
        scaled = blocks / _spread(scales)
    else:
        encode = np.minimum(to / amax_b, _FLOAT_MAX)
        encode = np.where((amax_b == 0) | ~np.isfinite(amax_b), f(1), encode)
        if fmt.scale == "te-pow2":
            encode = (encode.view(np.uint32) & np.uint32(0xFF800000)).view(np.float32)
        scales = f(1) / encode
        scaled = blocks * _spread(encode)
    elements = round_to(scaled, fmt.element, words)
    return Scaling(scaled, elements, elements * _spread(scales), scales)


# ---- HiFloat4 -------------------------------------------------------------------------------------------------------


def _hif4(blocks: F32, fmt: BlockFormat, words: U32 | None) -> Scaling:
    """One UE6M2 scale for 64 elements, one bit for 8 and one bit for 4: y = q 2^(bits) s, as Ascend's amct computes."""
    f = np.float32
    ue6m2 = element_of(formats.get("fp8_ue6m2"))
    x = blocks[..., 0, :]
    magnitude = np.abs(x)
    of4 = magnitude.reshape(*x.shape[:-1], 16, 4).max(-1)
    of8, of64 = of4.reshape(*x.shape[:-1], 8, 2).max(-1), of4.max(-1)
    wanted = to_bf16(of64 * to_bf16(np.asarray(f(1) / f(7))))
    scale = round_to(np.clip(wanted, f(2**-48), f(49152)), ue6m2)
    inverse = to_bf16(f(1) / scale)
    level8 = (of8 * inverse[..., None] >= 4).astype(np.int64)
    spread8 = np.repeat(level8, 2, axis=-1)
    level4 = ((of4 * inverse[..., None]) * np.ldexp(f(1), -spread8) >= 2).astype(np.int64)
    shift = np.repeat(spread8 + level4, 4, axis=-1)
    finite = np.isfinite(of64)
    scaled = to_bf16((magnitude * inverse[..., None]) * np.ldexp(f(1), -shift))
    scaled = np.where(finite[..., None], np.where(x < 0, -scaled, scaled), f(np.nan))
    elements = round_to(scaled[..., None, :], fmt.element, words)
    values = elements * (np.ldexp(f(1), shift) * scale[..., None])[..., None, :]
    byte = np.where(finite, encode(scale, ue6m2).astype(np.int64), 0xFF)
    bits8 = (level8 << np.arange(8)).sum(-1)
    bits4 = (level4 << np.arange(16)).sum(-1)
    levels = np.where(finite, bits8 << 8 | bits4 << 16, 0) | byte
    return Scaling(scaled[..., None, :], elements, values, levels.astype(np.uint32).view(np.int32))


RULES: dict[str, Callable[[F32, BlockFormat, U32 | None], Scaling]] = {
    "e8m0": _e8m0,
    "fp8_e4m3": _nvfp4,
    "fp32": _fp32,
    "hif4": _hif4,
}
