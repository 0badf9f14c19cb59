"""The tensors that laws run on, and the cases that they run over."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from aqnsim import formats
from aqnsim.formats import ROUNDINGS, SCALE_RULES, AnyFormat, BlockFormat, Format

SPECIAL = (0.0, 2.0**-149, 2.0**-127, 2.0**-126, 1.0, 3.4028234663852886e38, math.inf, math.nan)


def normal_values(*shape: int, seed: int = 0) -> Tensor:
    """fp32 standard normals of a seed."""
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape).astype(np.float32))


def random_patterns(n: int, seed: int = 0) -> Tensor:
    """fp32 values of uniform bit patterns: all exponents, subnormals, Inf and NaN."""
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 1 << 32, n, dtype=np.uint32).view(np.float32))


@lru_cache(maxsize=1)
def every_bf16() -> Tensor:
    """Every bfloat16, as fp32."""
    return torch.from_numpy((np.arange(1 << 16, dtype=np.uint32) << 16).view(np.float32))


def edges(fmt: Format) -> Tensor:
    """Where a format's rounding decides: numbers and midpoints, one ulp around each, what lies beyond; both signs.

    Of a format of more than 8 bits a sample, with all that is special about it.
    """
    points = _grid(fmt) if fmt.bits <= 8 else _sampled_grid(fmt)
    with np.errstate(over="ignore"):
        exact = np.concatenate([points, SPECIAL]).astype(np.float32)
        around = [np.nextafter(exact, np.float32(s)) for s in (-np.inf, np.inf)]
    x = np.unique(np.abs(np.concatenate([exact, *around])))  # one NaN
    return torch.from_numpy(np.concatenate([x, -x]))


def _grid(fmt: Format) -> np.ndarray[Any, Any]:
    values = np.array(fmt.values())
    step = values[-1] - values[-2]
    grid = np.concatenate([[0.0] if values[0] else [], values, values[-1] + step * np.arange(1, 5)])
    return np.concatenate([grid, (grid[:-1] + grid[1:]) / 2])


def _sampled_grid(fmt: Format) -> np.ndarray[Any, Any]:
    step = 2.0**-fmt.mantissa_bits
    leading = 1 + step / 2 * np.arange(0, 2 << min(fmt.mantissa_bits, 10))
    binades = 2.0 ** np.linspace(fmt.min_exponent, fmt.max_exponent, 9).round()[:, None]
    subnormal = fmt.min_subnormal / 2 * np.arange(0, 1 << 10)
    beyond = fmt.max + fmt.max * step / 4 * np.arange(-8, 8)
    return np.concatenate([(leading * binades).ravel(), subnormal, beyond])


def every_magnitude() -> Tensor:
    """Rows from fp32's smallest values to its largest, with zeros, infinities and NaN in some of them."""
    exponents = torch.linspace(-148, 126, 140).round()[:, None]
    x = normal_values(140, 70, seed=1) * torch.exp2(exponents)
    x[7], x[9], x[11, 5], x[13, 40], x[15, 3] = 0.0, -0.0, torch.inf, torch.nan, -torch.inf
    return x


# ---- cases ----------------------------------------------------------------------------------------------------------


def named(quick: bool) -> list[str]:
    return list(formats.ALL)


def elements(quick: bool) -> list[str]:
    return [name for name, f in formats.ALL.items() if isinstance(f, Format)]


def blocks(quick: bool) -> list[str]:
    return [name for name, f in formats.ALL.items() if isinstance(f, BlockFormat)]


def roundings(quick: bool) -> list[str]:
    names = ("fp4_e2m1", "hif8") if quick else ("fp4_e2m1", "fp8_e4m3", "hif8", "int8", "bf16", "e8m0")
    roundings = [r for r in (*ROUNDINGS, "stochastic-8") if r != "stochastic"]
    found = [f"{name}(rounding={r})" for name in names for r in roundings if r != "hif8-hybrid" or name == "hif8"]
    return [*found, "mxfp4(rounding=nearest-away)", "nvfp4(rounding=toward-zero)"]


def stochastic(quick: bool) -> list[str]:
    names = ("fp8_e4m3", "mxfp4") if quick else ("fp8_e4m3", "hif8", "int8", "bf16", "mxfp4", "nvfp4", "hif4")
    return [f"{name}(rounding=stochastic{bits})" for name in names for bits in ("", "-1")]


def choices(quick: bool) -> list[str]:
    """What formats leave open: overflow, subnormals and NaN of elements; scale rules, tiles and specials of blocks."""
    rules = [f"mxfp4(scale={rule})" for rule in SCALE_RULES["e8m0"]]
    rules += [f"nvfp4(scale={rule})" for rule in SCALE_RULES["fp8_e4m3"]]
    rules += [f"fp8_e4m3_1x128(scale={rule})" for rule in SCALE_RULES["fp32"]]
    tiles = ["mxfp4(block=32x32)", "nvfp4(block=16x16)", "mxfp8_e4m3(block=7)"]
    special = ["mxfp4(special=element)", "mxfp4(zero_scale=one)", "nvfp4(scale=4over6-mae, scale_max=256)"]
    if quick:
        return rules + tiles + special
    elements = ["fp8_e5m2(overflow=inf)", "fp8_e4m3(overflow=nan)", "fp16(subnormals=flush)", "hif8(overflow=inf)"]
    elements += ["fp4_e2m1(nan=zero)", "int8(nan=max)", "e5m0", "e3m4", "e8m10", "e4m3fn", "e5m2fnuz"]
    blocks = ["mxfp4(element=fp4_e1m2)", "mxint8(scale=mse)", "mxfp4(block=32x32, scale=mse)", "int4_g128(amax_to=7.5)"]
    return rules + tiles + special + elements + blocks


CHAINS = (
    "relative-gaussian(sigma=0.05)",
    "relative-gaussian(sigma=0.05, draw=frozen)",
    "relative-gaussian(sigma=0.05, reference=absdot, draw=per_run)",
    "absolute-gaussian(sigma=0.3, draw=per_step)",
    "systematic-bias(gain=-2, offset=3)",
    "dead-zone(threshold=0.5)",
    "saturation(limit=1.5)",
    "spike(rate=0.01, size=100)",
    "stuck(rate=0.01, value=-7)",
    "stuck(rate=0.3, value=1, lanes=300)",
    "bit-flip(rate=0.3)",
    "bit-flip(rate=0.2, bit=15)",
    "relative-gaussian(sigma=0.05) + relative-gaussian(sigma=0.05)",
    "systematic-bias(gain=0.01) + absolute-gaussian(sigma=0.1) + saturation(limit=2)",
    "spike(rate=0.1, size=3) + spike(rate=0.1, size=3) + bit-flip(rate=0.1, bit=3)",
)
"""Every error model, and chains of several."""


def chains(quick: bool) -> tuple[str, ...]:
    return CHAINS


def axes(fmt: AnyFormat) -> tuple[int, ...]:
    return (-1, -2) if isinstance(fmt, BlockFormat) and fmt.block != "tensor" else (-1,)


def some_rows(n: int, pairs: bool) -> Tensor:
    """Logical rows of up to 63 bits; as pairs, with first columns of up to 33."""
    rng = np.random.default_rng(9)
    rows, first = torch.from_numpy(rng.integers(0, 1 << 63, n)), torch.from_numpy(rng.integers(0, 1 << 33, n))
    first[::3] = torch.arange(len(first[::3]))
    return torch.stack([rows, first], 1) if pairs else rows


def whole_numbers(*shape: int, seed: int) -> Tensor:
    """Small integers: products of their casts add up exactly, in whatever order."""
    return torch.from_numpy(np.random.default_rng(seed).integers(-8, 9, shape).astype(np.float32))


def magnitude(text: str, y: Tensor) -> Tensor | None:
    return 1 + normal_values(*y.shape, seed=7).reshape(y.shape).abs() if "absdot" in text else None
