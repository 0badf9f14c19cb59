"""Which independent implementation may judge which format, and what of it.

:data:`ORACLES` is for element formats, :data:`BLOCK_ORACLES` for formats of blocks. The tests run exactly what stands
here, so that :func:`confirmed_by`, from which the documentation has its table, cannot say more than was compared.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import en_dtypes
import fraction_model
import gfloat
import ml_dtypes
import numpy as np
import numpy.typing as npt
import torch
from gfloat import formats as gfloat_formats
from gfloat.types import Domain, FormatInfo, RoundMode

F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]
Mask = npt.NDArray[np.bool_]
Codes = npt.NDArray[np.int64]
Round = Callable[[F32, str, str, "npt.NDArray[np.uint32] | None"], F32]
"""``(values, rounding, overflow, random words)`` to numbers of the format."""

NEAREST = ("nearest-even", "nearest-away", "nearest-down")
DETERMINISTIC = (*NEAREST, "toward-zero", "up", "down")
STOCHASTIC = ("stochastic-1", "stochastic-2", "stochastic-7", "stochastic-8", "stochastic-16", "stochastic-29")
WIDE_STOCHASTIC = ("stochastic-31", "stochastic-32", "stochastic")
OVERFLOWS = ("saturate", "inf", "nan")


def every_code(codes: Codes) -> Mask:
    return np.ones(codes.shape, bool)


@dataclass(frozen=True)
class Oracle:
    """An implementation of one element format that shares no code with the package.

    Attributes:
        name: the library, and what it calls the format.
        decode: the value of each code; None where it does not decode.
        codes: which codes it decodes as the format's definition says.
        round: the cast; None where it may not judge one.
        roundings: the roundings that it may judge.
        overflows: what it makes of values beyond the range; it may judge no other policy there.
        inside: the values whose cast it may judge.
        limits: what it may not judge, and why.
        info: an object with the properties of ``finfo``; None where there is none.
    """

    name: str
    decode: Callable[[Codes], F64] | None = None
    codes: Callable[[Codes], Mask] = every_code
    round: Round | None = None
    roundings: tuple[str, ...] = ()
    overflows: tuple[str, ...] = ()
    inside: Callable[[F32], Mask] = lambda x: np.ones(x.shape, bool)
    limits: str = ""
    info: Any = None

    def judges(self, x: F32, overflow: str, edge: float) -> Mask:
        """Which values it may judge; from the magnitude ``edge`` on, nearest roundings overflow."""
        return self.inside(x) & (np.abs(x) < edge if overflow not in self.overflows else True)


def edge(name: str) -> float:
    """The midpoint between the largest number of a format and what would follow it."""
    grid = fraction_model.element(name).grid
    return float(grid[-2] + grid[-1]) * 2.0 ** -(fraction_model.UNITS + 1)


# ---- dtypes of numpy, ml_dtypes, en_dtypes and torch ----------------------------------------------------------------


def _dtype(
    dtype: Any, name: str, overflow: str = "", rounding: str = "nearest-even", info: Any = None, **other: Any
) -> Oracle:
    """A numpy dtype that casts from float32 by one rounding."""
    kind = np.dtype(dtype)

    def decode(codes: Codes) -> F64:
        with np.errstate(invalid="ignore"):  # signalling NaNs
            return codes.astype(f"u{kind.itemsize}").view(kind).astype(np.float64)

    def cast(x: F32, rounding: str, overflow: str, words: object) -> F32:
        with np.errstate(invalid="ignore", over="ignore"):
            return x.astype(kind).astype(np.float32)

    return Oracle(
        name,
        decode=decode,
        round=cast if rounding else None,
        roundings=(rounding,) if rounding else (),
        overflows=(overflow,) if overflow else (),
        info=info,
        **other,
    )


def _ml(name: str, overflow: str = "", **other: Any) -> Oracle:
    dtype = getattr(ml_dtypes, name)
    return _dtype(dtype, f"ml_dtypes.{name}", overflow, info=ml_dtypes.finfo(dtype), **other)


def _ml_int(name: str) -> Oracle:
    return _dtype(
        getattr(ml_dtypes, name), f"ml_dtypes.{name}", rounding="", limits="decoding only: its cast truncates"
    )


def _torch(name: str, overflow: str = "") -> Oracle:
    """A torch dtype; its casts to 8 bits differ between versions and are not used."""
    dtype = getattr(torch, name)
    width = torch.empty(0, dtype=dtype).element_size()

    def decode(codes: Codes) -> F64:
        raw = torch.from_numpy(codes.astype(f"i{width}") if width > 1 else codes.astype("u1"))
        return raw.view(dtype).to(torch.float32).to(torch.float64).numpy()

    def cast(x: F32, rounding: str, overflow: str, words: object) -> F32:
        return torch.from_numpy(np.array(x)).to(dtype).float().numpy()

    return Oracle(
        f"torch.{name}",
        decode=decode,
        round=cast if overflow else None,
        roundings=("nearest-even",) if overflow else (),
        overflows=(overflow,) if overflow else (),
        limits="" if overflow else "decoding only: its cast is another in each version",
    )


def _numpy_int(bits: int, step: float = 1.0, lowest: int | None = None) -> Oracle:
    """numpy's own roundings to whole numbers, in float64, and two's complement as numpy reads it."""
    low, high = -(2 ** (bits - 1)) if lowest is None else lowest, 2 ** (bits - 1) - 1
    by_name: dict[str, Callable[[F64], F64]] = {
        "nearest-even": np.rint,
        "nearest-away": lambda v: np.copysign(np.floor(np.abs(v) + 0.5), v),
        "nearest-down": lambda v: np.copysign(np.ceil(np.abs(v) - 0.5), v),
        "toward-zero": np.trunc,
        "up": np.ceil,
        "down": np.floor,
    }

    def cast(x: F32, rounding: str, overflow: str, words: object) -> F32:
        with np.errstate(invalid="ignore"):
            whole = by_name[rounding](x.astype(np.float64) / step)
        return (np.clip(whole, low, high) * step + 0.0).astype(np.float32)

    def decode(codes: Codes) -> F64:
        return ((codes << (8 - bits)).astype(np.uint8).view(np.int8) >> (8 - bits)) * np.float64(step)

    return Oracle(
        "numpy.rint, trunc, floor, ceil; numpy.int8",
        decode=decode,
        round=cast,
        roundings=DETERMINISTIC,
        overflows=("saturate",),
    )


def _upper_bits(bits: int) -> Oracle:
    """Formats that are the upper bits of binary32: integer arithmetic on its bits."""
    cut = 32 - bits
    mask = (1 << cut) - 1

    def decode(codes: Codes) -> F64:
        with np.errstate(invalid="ignore"):
            return (codes << cut).astype(np.uint32).view(np.float32).astype(np.float64)

    def cast(x: F32, rounding: str, overflow: str, words: object) -> F32:
        b = x.view(np.uint32).astype(np.int64)
        half = {"nearest-away": (mask + 1) // 2, "nearest-even": (mask >> 1) + (b >> cut & 1), "toward-zero": 0}
        return (b + half[rounding] & ~mask).astype(np.uint32).view(np.float32)

    return Oracle(
        "upper bits of binary32",
        decode=decode,
        round=cast,
        roundings=("nearest-even", "nearest-away", "toward-zero"),
        overflows=("inf",),
        inside=lambda x: ~np.isnan(x),
        limits="not NaN: an addition to its payload may carry out of it",
    )


# ---- gfloat ---------------------------------------------------------------------------------------------------------


def info(
    exponent_bits: int,
    mantissa_bits: int,
    bias: int,
    *,
    inf: bool = False,
    nans: int = 0,
    signed: bool = True,
    negative_zero: bool | None = None,
    subnormals: bool = True,
) -> FormatInfo:
    """A gfloat description of a format that gfloat has no name for."""
    return FormatInfo(
        f"e{exponent_bits}m{mantissa_bits}",
        int(signed) + exponent_bits + mantissa_bits,
        mantissa_bits + 1,
        bias=bias,
        is_signed=signed,
        domain=Domain.Extended if inf else Domain.Finite,
        has_nz=signed if negative_zero is None else negative_zero,
        num_high_nans=nans,
        has_subnormals=subnormals,
        is_twos_complement=False,
    )


def ieee_info(exponent_bits: int, mantissa_bits: int) -> FormatInfo:
    """An IEEE 754 format of any width."""
    bias = 2 ** (exponent_bits - 1) - 1
    return info(exponent_bits, mantissa_bits, bias, inf=True, nans=(1 << mantissa_bits) - 1)


def _integer_info(bits: int, bias: int) -> FormatInfo:
    return FormatInfo(
        f"int{bits}",
        bits,
        bits,
        bias=bias,
        is_signed=True,
        domain=Domain.Finite,
        has_nz=False,
        num_high_nans=0,
        has_subnormals=True,
        is_twos_complement=True,
    )


_MODES = {
    "nearest-even": RoundMode.TiesToEven,
    "nearest-away": RoundMode.TiesToAway,
    "toward-zero": RoundMode.TowardZero,
    "up": RoundMode.TowardPositive,
    "down": RoundMode.TowardNegative,
}


def gfloat_round(
    to: FormatInfo, x: F32, rounding: str, overflow: str, words: npt.NDArray[np.uint32] | None = None
) -> F32:
    """gfloat's cast, from float64; its stochastic rounding is StochasticFastest with the uppermost random bits.

    Ties toward zero, which gfloat has not, are ties away from zero of the next float64 toward zero.
    """
    with np.errstate(invalid="ignore"):  # signalling NaNs
        wide = x.astype(np.float64)
    saturate = overflow == "saturate"
    if rounding == "nearest-down":
        wide = np.where(np.isfinite(wide), np.nextafter(wide, np.copysign(0.0, wide)), wide)
        rounding = "nearest-away"
    if rounding.startswith("stochastic"):
        assert words is not None
        bits = int(rounding.partition("-")[2] or 32)
        drawn = (words >> np.uint32(32 - bits)).astype(np.int64)
        y = gfloat.round_ndarray(to, wide, RoundMode.StochasticFastest, saturate, drawn, bits)
    else:
        y = gfloat.round_ndarray(to, wide, _MODES[rounding], saturate)
    if overflow == "nan":
        y = np.where(np.isinf(y), np.nan, y)
    return y.astype(np.float32)


def _gfloat(to: FormatInfo, **other: Any) -> Oracle:
    return Oracle(
        f"gfloat {to.name}",
        decode=lambda codes: gfloat.decode_ndarray(to, codes),
        round=lambda x, rounding, overflow, words: gfloat_round(to, x, rounding, overflow, words),
        roundings=DETERMINISTIC + STOCHASTIC,
        overflows=OVERFLOWS,
        info=to,
        **other,
    )


def _gfloat_hif8(x: F32, rounding: str, overflow: str, words: npt.NDArray[np.uint32] | None) -> F32:
    """HiFloat8 as four of gfloat's formats, each where its exponents are."""
    exponent = np.frexp(np.abs(x))[1] - 1
    y = gfloat_round(info(5, 0, 23), x, rounding, "saturate", words)  # one number a binade
    for limit, mantissa_bits in ((15, 1), (7, 2), (3, 3)):
        of_binade = gfloat_round(info(8, mantissa_bits, 127), x, rounding, "saturate", words)
        y = np.where(np.abs(exponent) <= limit, of_binade, y)
    return np.where(x == 0, np.float32(0), y) + np.float32(0)


# ---- the registry ---------------------------------------------------------------------------------------------------


def _model(name: str) -> Oracle:
    def cast(x: F32, rounding: str, overflow: str, words: npt.NDArray[np.uint32] | None) -> F32:
        return fraction_model.rounded(x, name, rounding, overflow=overflow, words=words)

    hybrid = ("hif8-hybrid",) if name == "hif8" else ()
    return Oracle(
        "exact rational model",
        decode=lambda codes: fraction_model.decoded(fraction_model.element(name))[codes],
        round=cast,
        roundings=DETERMINISTIC + STOCHASTIC + WIDE_STOCHASTIC + hybrid,
        overflows=OVERFLOWS,
    )


def not_nan(x: F32) -> Mask:
    return ~np.isnan(x)


def _registry() -> dict[str, tuple[Oracle, ...]]:
    g = gfloat_formats
    no_nan = {"inside": not_nan, "limits": "not NaN: it has no code and becomes a zero"}
    above = {"inside": lambda x: ~np.signbit(x), "limits": "not negative values: it drops their sign"}
    found: dict[str, tuple[Oracle, ...]] = {
        "fp4_e2m1": (_ml("float4_e2m1fn", "saturate", **no_nan), _gfloat(g.format_info_ocp_e2m1)),
        "fp4_e1m2": (
            _dtype(
                en_dtypes.float4_e1m2,
                "en_dtypes.float4_e1m2",
                "saturate",
                info=en_dtypes.finfo(en_dtypes.float4_e1m2),
                **no_nan,
            ),
            _gfloat(info(1, 2, 1)),
        ),
        "fp6_e2m3": (_ml("float6_e2m3fn", "saturate", **no_nan), _gfloat(g.format_info_ocp_e2m3)),
        "fp6_e3m2": (_ml("float6_e3m2fn", "saturate", **no_nan), _gfloat(g.format_info_ocp_e3m2)),
        "fp8_e4m3": (_ml("float8_e4m3fn", "nan"), _torch("float8_e4m3fn"), _gfloat(g.format_info_ocp_e4m3)),
        "fp8_e5m2": (_ml("float8_e5m2", "inf"), _torch("float8_e5m2"), _gfloat(g.format_info_ocp_e5m2)),
        "fp8_e4m3fnuz": (
            _ml("float8_e4m3fnuz", "nan"),
            _torch("float8_e4m3fnuz"),
            _gfloat(info(4, 3, 8, negative_zero=False)),
        ),
        "fp8_e5m2fnuz": (
            _ml("float8_e5m2fnuz", "nan"),
            _torch("float8_e5m2fnuz"),
            _gfloat(info(5, 2, 16, negative_zero=False)),
        ),
        "fp8_e3m4": (_ml("float8_e3m4", "inf"), _gfloat(ieee_info(3, 4))),
        "fp8_e4m3_ieee": (_ml("float8_e4m3", "inf"), _gfloat(ieee_info(4, 3))),
        "fp8_ue5m3": (
            Oracle(
                "numpy.float16, upper bits",
                decode=lambda codes: (codes << 7).astype(np.uint16).view(np.float16).astype(np.float64),
                codes=lambda codes: codes < 31 << 3,
                limits="not the last binade, which is Inf and NaN in float16",
            ),
            _gfloat(info(5, 3, 15, nans=1, signed=False), **above),
        ),
        "fp8_ue6m2": (
            _gfloat(
                info(6, 2, 48, nans=1, signed=False, subnormals=False),
                codes=lambda codes: codes > 0,
                inside=lambda x: (x >= 2.0**-48) | np.isnan(x),
                limits="not below 2^-48 nor code 0, which it takes for a zero; not negative values",
            ),
        ),
        "e8m0": (
            _ml(
                "float8_e8m0fnu",
                "nan",
                inside=lambda x: (x >= 2.0**-126) & (x.view(np.uint32) & 0x7FFFFF != 0x400000),
                limits="not ties, which it rounds up; not below 2^-126, where it rounds up, too",
            ),
            _torch("float8_e8m0fnu"),
            _gfloat(
                g.format_info_ocp_e8m0,
                inside=lambda x: (x >= 2.0**-127) | np.isnan(x),
                limits="not below 2^-127, which it does not clamp; not negative values",
            ),
        ),
        "hif8": (
            _dtype(
                en_dtypes.hifloat8,
                "en_dtypes.hifloat8",
                "inf",
                "nearest-away",
                info=en_dtypes.finfo(en_dtypes.hifloat8),
            ),
            Oracle(
                "gfloat, one format for each width of fraction",
                round=_gfloat_hif8,
                roundings=DETERMINISTIC + STOCHASTIC,
                inside=lambda x: np.abs(x) <= 32768,
                limits="not beyond the range, nor decoding",
            ),
        ),
        "bf16": (
            _ml("bfloat16", "inf"),
            _torch("bfloat16", "inf"),
            _upper_bits(16),
            _gfloat(g.format_info_bfloat16),
        ),
        "fp16": (
            _dtype(np.float16, "numpy.float16", "inf", info=np.finfo(np.float16)),
            _torch("float16", "inf"),
            _gfloat(g.format_info_binary16),
        ),
        "tf32": (_upper_bits(19), _gfloat(ieee_info(8, 10))),
        "hf32": (_upper_bits(20), _gfloat(ieee_info(8, 11))),
        "int2": (_ml_int("int2"), _numpy_int(2), _gfloat(_integer_info(2, 0))),
        "int4": (_ml_int("int4"), _numpy_int(4), _gfloat(_integer_info(4, -2))),
        "int8": (_numpy_int(8), _gfloat(_integer_info(8, -6))),
        "mxint8_element": (
            _numpy_int(8, 2.0**-6, lowest=-127),
            _gfloat(
                g.format_info_ocp_int8,
                inside=lambda x: ~(np.abs(x) > 127 / 64),
                limits="not beyond the range: it uses the code of -2",
            ),
        ),
    }
    return {name: (*oracles, _model(name)) for name, oracles in found.items()}


ORACLES = _registry()
"""Oracles by element format."""

SINGLE = {
    ("hif8", "hif8-hybrid"): "one public source, followed by the exact rational model alone; no silicon was compared",
    **{
        (name, rounding): "gfloat adds 31 or 32 random bits in float64, which may round: it judges bf16 and fp16 only"
        for name in ORACLES
        for rounding in WIDE_STOCHASTIC
    },
}
"""Casts that only one oracle may judge, and why."""


# ---- formats of blocks ----------------------------------------------------------------------------------------------

MX_RULES = ("floor", "ceil", "rceil", "even", "amct", "mse")
MX_NAMES = ("mxfp4", "mxfp6_e2m3", "mxfp6_e3m2", "mxfp8_e4m3", "mxfp8_e5m2", "mxint8")
NVFP4_RULES = ("te", "modelopt", "compressed_tensors", "torchao", "qutlass", "4over6-mae", "4over6-mse")

MODEL = "exact rational model"
TORCHAO = "torchao"
COMPRESSED_TENSORS = "compressed_tensors"


@cache
def _block_oracles() -> dict[str, tuple[str, ...]]:
    found: dict[str, tuple[str, ...]] = {}
    for name in MX_NAMES:
        for rule in MX_RULES:
            run = name != "mxint8" and rule in ("floor", "ceil", "rceil", "even")
            found[f"{name}(scale={rule})"] = (MODEL, TORCHAO) if run else (MODEL,)
    for name in ("mxfp4", "mxfp6_e2m3"):
        found[f"{name}(scale=even)"] += (COMPRESSED_TENSORS,)
    for rule in NVFP4_RULES:
        run = {"torchao": (TORCHAO,), "compressed_tensors": (COMPRESSED_TENSORS,)}.get(rule, ())
        found[f"nvfp4(scale={rule})"] = (MODEL, *run)
        if rule.startswith("4over6"):
            found[f"nvfp4(scale={rule}, scale_max=256)"] = (MODEL,)
    found["hif4"] = (MODEL,)
    for name in ("fp8_e4m3_tensor", "fp8_e5m2_tensor"):
        for rule in ("amax", "te", "te-pow2"):
            found[f"{name}(scale={rule})"] = (MODEL,)
    found["fp8_e4m3_tensor(scale=amax)"] += (COMPRESSED_TENSORS,)
    for name in ("fp8_e4m3_token", "fp8_e4m3_channel", "fp8_e4m3_1x128", "fp8_e4m3_128x128"):
        found[name] = (MODEL, COMPRESSED_TENSORS) if name == "fp8_e4m3_channel" else (MODEL,)
    for name in ("int4_g128", "int8_channel", "int8_token"):
        found[name] = (MODEL,)
    for text in ("int4_g128(amax_to=7.5)", "int8_channel(amax_to=127.5)"):
        found[text] = (MODEL, COMPRESSED_TENSORS)
    return found


BLOCK_ORACLES = _block_oracles()
"""By the text of a format of blocks, what was compared with it; the tests take their cases from here."""


def judged_by(oracle: str) -> list[str]:
    """The formats of blocks that are compared with an oracle."""
    return [text for text, oracles in BLOCK_ORACLES.items() if oracle in oracles]


# ---- what confirms what ---------------------------------------------------------------------------------------------


def _named(oracle: Oracle) -> str:
    return f"{oracle.name} ({oracle.limits})" if oracle.limits else oracle.name


# The conversions of NVIDIA's CUDA headers, built on the host: which header, and which roundings it has.
HEADERS: dict[str, tuple[str, tuple[str, ...]]] = {
    "fp8_e4m3": ("cuda_fp8.h", ("nearest-even",)),
    "fp8_e5m2": ("cuda_fp8.h", ("nearest-even",)),
    "fp6_e2m3": ("cuda_fp6.h", ("nearest-even",)),
    "fp6_e3m2": ("cuda_fp6.h", ("nearest-even",)),
    "fp4_e2m1": ("cuda_fp4.h", ("nearest-even",)),
    "e8m0": ("cuda_fp8.h (not negative values, whose sign it drops)", ("toward-zero", "up")),
}


def confirmed_by() -> dict[str, dict[str, str]]:
    """For each named format, what of it was compared (``decoding``, a rounding, a scale rule) and with what."""
    table: dict[str, dict[str, str]] = {}
    for name, oracles in ORACLES.items():
        row = {"decoding": "; ".join(o.name if o.codes is every_code else _named(o) for o in oracles if o.decode)}
        for rounding in (*DETERMINISTIC, "stochastic-N", "hif8-hybrid"):
            asked = "stochastic-8" if rounding == "stochastic-N" else rounding
            judges = [_named(o) for o in oracles if asked in o.roundings]
            if judges:
                row[rounding] = "; ".join(judges)
        if name in HEADERS:
            header, roundings = HEADERS[name]
            for what in ("decoding", *roundings):
                row[what] += f"; NVIDIA's {header}"
        table[name] = row
    for text, names in BLOCK_ORACLES.items():
        name, _, fields = text.rstrip(")").partition("(")
        table.setdefault(name, {})[fields or "as it is"] = "; ".join(names)
    return table
