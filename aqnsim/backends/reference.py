"""``aqnsim.reference`` as a backend: the numpy definitions under the same ops, to compare any other backend with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from aqnsim import accumulator, reference
from aqnsim.backends import Backend, host, register
from aqnsim.backends.checks import (
    check_chain,
    check_dtype,
    check_gemm,
    check_rows,
    check_step,
    perturb_stats,
    shape_in_rows,
)
from aqnsim.backends.compose import compositions, packings
from aqnsim.backends.half import casts_half, perturbs_half
from aqnsim.errors import ErrorModel, RelativeGaussian, sigma_of
from aqnsim.formats import AnyFormat, BlockFormat, element_of, get
from aqnsim.receipts import STATS
from aqnsim.reference import F32, U32
from aqnsim.rng import coordinates


def _numpy(x: Tensor) -> F32:
    check_dtype(x)
    return x.detach().float().numpy()


def _held(values: F32, dtype: torch.dtype) -> tuple[Tensor, F32]:
    """Values as a tensor of ``dtype`` and, again, as the fp32 values that it holds."""
    held = reference.to_bf16(values) if dtype == torch.bfloat16 else np.asarray(values, np.float32)
    return _tensor(held).to(dtype), held


def _sum2(x: npt.NDArray[Any], where: npt.NDArray[np.bool_]) -> float:
    """The sum of squares in fp64, where those of all finite fp32 values are finite and not 0."""
    return float(np.sum(np.where(where, x, 0).astype(np.float64) ** 2))


def _error(a: F32, b: F32) -> npt.NDArray[np.float64]:
    with np.errstate(invalid="ignore"):
        return np.asarray(a, np.float64) - b


def _different(a: F32, b: F32) -> int:
    other = np.asarray(a).view(np.uint32) != np.asarray(b).view(np.uint32)
    return int(np.sum(other & ~(np.isnan(a) & np.isnan(b))))


def _words(x: Tensor, fmt: AnyFormat, key: int, step: Tensor | None, rows: Tensor | None) -> U32 | None:
    at = check_step(fmt, step)
    if at is None:
        return None
    count, columns = shape_in_rows(x)
    rows = check_rows("cast", x, rows)
    ids = np.arange(count) if rows is None else rows.numpy()
    return reference.random_words(ids, columns, *coordinates(key, at)).reshape(tuple(x.shape))


@casts_half
def cast(
    x: Tensor, fmt: str, axis: int, key: int, step: Tensor | None, rows: Tensor | None, measure: bool
) -> tuple[Tensor, Tensor]:
    f, values = get(fmt), _numpy(x)
    element, words = element_of(f), _words(x, f, key, step, rows)
    if isinstance(f, BlockFormat):
        blocks = reference.blocks_of(values, f, axis, words)
        scaled, result = blocks.scaled, blocks.values
    else:
        scaled, result = values, reference.round_to(values, f, words)
    out, held = _held(result, x.dtype)
    if not measure:
        return out, torch.zeros(len(STATS), dtype=torch.float64)
    finite = np.isfinite(held) & np.isfinite(values)  # one Inf must not spoil the sums of all others
    measured = [
        values.size,
        _different(held, values),
        _sum2(_error(held, values), finite),
        _sum2(values, finite),
        0,
        0,
        int(np.sum((scaled > element.max) | (scaled < (element.min if element.signed else -element.max)))),
        int(np.sum(~np.isfinite(held))),
        0,
    ]
    return out, perturb_stats(measured, ())


def elements(
    x: Tensor, fmt: str, axis: int, key: int, step: Tensor | None, rows: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    f, values = get(fmt), _numpy(x)
    words = _words(x, f, key, step, rows)
    if not isinstance(f, BlockFormat):
        return _tensor(reference.round_to(values, f, words)), torch.ones(()), torch.ones(())
    b = reference.blocks_of(values, f, axis, words)
    return _tensor(b.elements), _tensor(b.scales), torch.tensor(b.tensor_scale)


def _tensor(values: npt.NDArray[Any]) -> Tensor:
    return torch.from_numpy(np.array(values, order="C"))  # keeps 0 dimensions


def _unit(models: Sequence[ErrorModel], y: F32, magnitude: F32 | None) -> F32:
    """What a lone Gaussian model misses by a share of; 0 for any other chain, whose shift has no one unit."""
    if sigma_of(models) is None:
        return np.zeros_like(y)
    if not isinstance(models[0], RelativeGaussian):
        return np.ones_like(y)
    return y if magnitude is None else magnitude


@perturbs_half
def perturb(
    y: Tensor,
    error: str,
    key: int,
    step: Tensor,
    rows: Tensor | None,
    magnitude: Tensor | None,
    dtype: torch.dtype | None,
    measure: bool,
) -> tuple[Tensor, Tensor]:
    before, dtype = _numpy(y), dtype or y.dtype
    rows = check_rows("perturb", y, rows)
    models, magnitude = check_chain(error, y, magnitude, dtype)
    m = None if magnitude is None else magnitude.numpy()
    after, hits = reference.perturb(
        before, models, key, int(step), None if rows is None else rows.numpy(), m, dtype == torch.bfloat16
    )
    out, held = _held(after, dtype)
    if not measure:
        return out, torch.zeros(len(STATS), dtype=torch.float64)
    _, clean = _held(before, dtype)
    unit, finite = _unit(models, before, m), np.isfinite(held)
    measurable = np.isfinite(before) & np.isfinite(after) & np.isfinite(unit) & (unit != 0)
    with np.errstate(all="ignore"):
        injected = _error(after, before) / unit
    measured = [
        before.size,
        _different(held, clean),
        _sum2(_error(held, clean), finite & np.isfinite(clean)),
        _sum2(before, finite),
        _sum2(injected, measurable),
        int(measurable.sum()),
        0,
        int(np.sum(~finite)),
        hits,
    ]
    return out, perturb_stats(measured, models)


def gemm(a: Tensor, b: Tensor, text: str) -> Tensor:
    if text == accumulator.HOST:
        return host.gemm(a, b)
    check_gemm(a, b)
    return _tensor(reference.gemm(_numpy(a), _numpy(b), accumulator.get(text)))


BACKEND = register(
    Backend(
        name="reference",
        devices=("cpu",),
        ops={
            "cast": cast,
            **packings(elements),
            "perturb": perturb,
            "gemm": gemm,
            **compositions(cast, perturb, gemm),
        },
    )
)
