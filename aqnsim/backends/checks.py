"""What every backend asks of its arguments."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from aqnsim._errors import ConfigError
from aqnsim.errors import BitFlip, ErrorModel, chain, needs_magnitude, rate_of, sigma_of
from aqnsim.formats import AnyFormat, random_bits
from aqnsim.receipts import STATS
from aqnsim.rng import COLUMN_BITS

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def check_dtype(x: Tensor) -> torch.dtype:
    """The tensor's dtype.

    Raises:
        ConfigError: none of float32, bfloat16 and float16.
    """
    if x.dtype not in DTYPES:
        raise ConfigError(f"expected a float32, bfloat16 or float16 tensor, got {x.dtype}: convert it first")
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
    if not {a.dtype, b.dtype} <= {torch.float32, torch.bfloat16}:
        raise ConfigError(
            f"gemm: expected float32 or bfloat16 operands, got {a.dtype} and {b.dtype}: convert them first"
        )
    if a.dtype != b.dtype:
        raise ConfigError(f"gemm: expected operands of one dtype, got {a.dtype} and {b.dtype}: convert one")
    return math.prod(a.shape[:-2]), a.shape[-2], a.shape[-1], b.shape[-1]


def shape_in_rows(x: Tensor) -> tuple[int, int]:
    """The tensor as (rows, columns): the last axis is the column, all others together the row."""
    columns = x.shape[-1] if x.dim() else 1
    return (x.numel() // columns if columns else 0), columns


def check_rows(what: str, x: Tensor, rows: Tensor | None) -> Tensor | None:
    """The logical rows, contiguous: ``[n]``, or ``[n, 2]`` of (logical row, first column).

    Raises:
        ConfigError: not one int64 or pair for each row of ``x``, or, of rows on the CPU, a first column out of range.
    """
    if rows is None:
        return None
    count, _ = shape_in_rows(x)
    if rows.dtype != torch.int64 or tuple(rows.shape) not in ((count,), (count, 2)):
        raise ConfigError(
            f"{what}: expected {count} int64 rows, as [{count}] or with their first columns as [{count}, 2], "
            f"got {rows.dtype} {list(rows.shape)}"
        )
    if rows.dim() == 2 and count and rows.device.type == "cpu":  # to look at values on a device is to wait for it
        least, most = (int(v) for v in rows[:, 1].aminmax())
        if least < 0 or most >> COLUMN_BITS:
            raise ConfigError(f"{what}: expected first columns in 0..2^{COLUMN_BITS}-1, got {least}..{most}")
    return rows.contiguous()


def check_models(error: str, dtype: torch.dtype) -> tuple[ErrorModel, ...]:
    """The models of a chain that ``perturb`` can apply to a result of a dtype.

    Raises:
        ConfigError: no chain, a flip of codes or scales, or a bit that the dtype lacks.
    """
    models = chain(error)
    for m in models:
        if isinstance(m, BitFlip) and m.target != "value":
            raise ConfigError(f"perturb: {m} acts on the {m.target} of a cast; perturb has none: use target=value")
        if isinstance(m, BitFlip) and dtype == torch.bfloat16 and m.bit > 15:
            raise ConfigError(f"perturb: {m} on a bfloat16 result: expected bit in -1..15")
    return models


def check_out(what: str, out: Tensor, shape: Sequence[int], dtype: torch.dtype, *inputs: Tensor) -> None:
    """Whether a result can be written to ``out``, which may be the input itself.

    Raises:
        ConfigError: another shape, dtype or device, or memory that is not contiguous or that an input shares in part.
    """
    if out.dtype != dtype or out.shape != torch.Size(shape):
        raise ConfigError(f"{what}: expected out {dtype} {list(shape)}, got {out.dtype} {list(out.shape)}")
    if not out.is_contiguous():
        raise ConfigError(f"{what}: expected a contiguous out, got strides {list(out.stride())}: pass a contiguous one")
    for t in inputs:
        if t.device != out.device:
            raise ConfigError(f"{what}: expected out on {t.device}, got {out.device}")
        if t is not out and not _is_apart(t, out):
            raise ConfigError(
                f"{what}: out shares a part of its memory with an input; pass the input itself or another tensor"
            )


def _is_apart(t: Tensor, out: Tensor) -> bool:
    """Whether two tensors share no memory, or lie in the very same."""
    first, begin = t.data_ptr(), out.data_ptr()
    contiguous = t.is_contiguous()
    if first == begin and contiguous and t.dtype == out.dtype and t.shape == out.shape:
        return True
    count = t.numel() if contiguous else sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True)) + 1
    return first + count * t.element_size() <= begin or begin + out.nbytes <= first or not t.numel()


def check_chain(
    error: str, y: Tensor, magnitude: Tensor | None, dtype: torch.dtype
) -> tuple[tuple[ErrorModel, ...], Tensor | None]:
    """The models of a chain that ``perturb`` can apply to ``y``, and the magnitude, contiguous.

    Args:
        error: a text of :func:`aqnsim.errors.chain`.
        magnitude: ``|A| @ |B|``, which ``reference=absdot`` asks for.
        dtype: of the result, whose pattern a bit flip changes.

    Raises:
        ConfigError: no chain, a flip of codes or scales, a bit that the dtype lacks, or a magnitude that is missing,
            not used or of another shape or dtype.
    """
    models = check_models(error, dtype)
    if not needs_magnitude(models):
        if magnitude is not None:
            raise ConfigError(f"perturb: no model of {error!r} uses a magnitude; do not pass one")
        return models, None
    if magnitude is None:
        raise ConfigError(f"perturb: {error!r} is relative to |A| @ |B|: pass it as magnitude")
    if magnitude.dtype != torch.float32 or magnitude.shape != y.shape:
        raise ConfigError(
            f"perturb: expected a float32 magnitude of shape {list(y.shape)}, "
            f"got {magnitude.dtype} {list(magnitude.shape)}"
        )
    return models, magnitude.contiguous()


def perturb_stats(values: Sequence[float], models: Sequence[ErrorModel]) -> Tensor:
    """``STATS`` of a perturbation: what was measured, from ``count`` to ``hits``, and what the chain asked for."""
    measured = dict(zip(STATS[1:], values, strict=False))
    sigma = sigma_of(models) or 0.0
    asked = [sigma * sigma * measured["injected_n"], rate_of(models) * measured["count"]]
    return torch.tensor([1.0, *values, *asked], dtype=torch.float64)


def check_step(fmt: AnyFormat, step: Tensor | None) -> int | None:
    """The clock of a stochastic rounding's random bits; None for a rounding that draws nothing.

    Raises:
        ConfigError: the rounding is stochastic and no clock is given.
    """
    if not random_bits(fmt):
        return None
    if step is None:
        raise ConfigError(f"cast: the rounding of {fmt} draws random bits: pass a key")
    return int(step)
