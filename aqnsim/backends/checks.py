"""What every backend asks of its arguments."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from aqnsim._errors import ConfigError
from aqnsim.formats import AnyFormat, random_bits

DTYPES = (torch.float32, torch.bfloat16)


def check_dtype(x: Tensor) -> torch.dtype:
    """The tensor's dtype.

    Raises:
        ConfigError: neither float32 nor bfloat16.
    """
    if x.dtype not in DTYPES:
        raise ConfigError(f"expected a float32 or bfloat16 tensor, got {x.dtype}: convert it first")
    return x.dtype


def check_gemm(a: Tensor, b: Tensor) -> tuple[int, int, int, int]:
    """Batch, m, k and n of a product of ``[..., m, k]`` and ``[..., k, n]``.

    Raises:
        ConfigError: shapes that do not fit, or dtypes that differ or are neither float32 nor bfloat16.
    """
    if a.dim() < 2 or a.dim() != b.dim() or a.shape[:-2] != b.shape[:-2] or a.shape[-1] != b.shape[-2]:
        raise ConfigError(
            f"gemm: expected [..., m, k] and [..., k, n] of equal batch dimensions, got {list(a.shape)} and "
            f"{list(b.shape)}"
        )
    if check_dtype(a) != check_dtype(b):
        raise ConfigError(f"gemm: expected operands of one dtype, got {a.dtype} and {b.dtype}: convert one")
    return math.prod(a.shape[:-2]), a.shape[-2], a.shape[-1], b.shape[-1]


def shape_in_rows(x: Tensor) -> tuple[int, int]:
    """The tensor as (rows, columns): the last axis is the column, all others together the row."""
    columns = x.shape[-1] if x.dim() else 1
    return (x.numel() // columns if columns else 0), columns


def check_rows(what: str, x: Tensor, rows: Tensor | None) -> Tensor | None:
    """The logical rows, flat and contiguous.

    Raises:
        ConfigError: not one int64 for each row of ``x``.
    """
    count, _ = shape_in_rows(x)
    if rows is not None and (rows.numel() != count or rows.dtype != torch.int64):
        raise ConfigError(f"{what}: expected {count} int64 rows, got {rows.numel()} of {rows.dtype}")
    return None if rows is None else rows.reshape(-1).contiguous()


def check_step(fmt: AnyFormat, step: Tensor | None) -> int | None:
    """The step of a stochastic rounding's random bits; None for a rounding that draws nothing.

    Raises:
        ConfigError: the rounding is stochastic and no step is given.
    """
    if not random_bits(fmt):
        return None
    if step is None:
        raise ConfigError(f"cast: the rounding of {fmt} draws random bits: pass a key")
    return int(step) & 0xFFFFFFFF
