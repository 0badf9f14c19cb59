"""What every backend asks of its arguments."""

from __future__ import annotations

import torch
from torch import Tensor

from aqnsim._errors import ConfigError
from aqnsim.formats import AnyFormat, random_bits

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def check_dtype(x: Tensor) -> torch.dtype:
    """The tensor's dtype.

    Raises:
        ConfigError: none of float32, bfloat16 and float16.
    """
    if x.dtype not in DTYPES:
        raise ConfigError(f"expected a float32, bfloat16 or float16 tensor, got {x.dtype}: convert it first")
    return x.dtype


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
