"""Logical rows on the device: none for 0, 1, 2, ..., one number a row, or pairs of a row and its first column."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from aqnsim._errors import ConfigError
from aqnsim.backends.checks import check_rows as check_values
from aqnsim.backends.checks import shape_in_rows
from aqnsim.formats import AnyFormat, random_bits

__all__ = ["check_draw", "check_rows", "row_mode", "rows_at", "shape_in_rows"]


@triton.jit
def rows_at(rows, index, MODE: tl.constexpr, mask=None):
    """The logical rows, int64, of the rows at ``index``, and the columns at which they begin."""
    if MODE == "none":
        return index.to(tl.int64), tl.zeros((), tl.int64)
    elif MODE == "one":
        return tl.load(rows + index, mask=mask), tl.zeros((), tl.int64)
    else:
        return tl.load(rows + 2 * index, mask=mask), tl.load(rows + 2 * index + 1, mask=mask)


def row_mode(rows: Tensor | None) -> str:
    """How ``rows_at`` reads them."""
    return "none" if rows is None else "one" if rows.dim() == 1 else "pairs"


def check_rows(what: str, x: Tensor, rows: Tensor | None) -> Tensor | None:
    """As of :mod:`aqnsim.backends.checks`, but for the values on a GPU, which a check would wait for."""
    if rows is None or not rows.is_cuda:
        return check_values(what, x, rows)
    count, _ = shape_in_rows(x)
    if rows.dtype != torch.int64 or tuple(rows.shape) not in ((count,), (count, 2)):
        raise ConfigError(
            f"{what}: expected {count} int64 rows, as [{count}] or with their first columns as [{count}, 2], "
            f"got {rows.dtype} {list(rows.shape)}"
        )
    return rows.contiguous()


def check_draw(fmt: AnyFormat, step: Tensor | None, x: Tensor) -> Tensor | None:
    """The clock of a stochastic rounding on the device of ``x``; None for a rounding that draws nothing.

    Raises:
        ConfigError: the rounding is stochastic and no clock is given.
    """
    if not random_bits(fmt):
        return None
    if step is None:
        raise ConfigError(f"cast: the rounding of {fmt} draws random bits: pass a key")
    return step.to(x.device, torch.int64)
