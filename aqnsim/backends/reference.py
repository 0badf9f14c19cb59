"""``aqnsim.reference`` as a backend: the numpy definitions under the same ops, to compare any other backend with."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from aqnsim import accumulator, reference
from aqnsim.backends import Backend, register
from aqnsim.backends.checks import check_dtype, check_gemm, check_rows, check_step, shape_in_rows
from aqnsim.backends.compose import compositions
from aqnsim.errors import RelativeGaussian, parse
from aqnsim.formats import AnyFormat, BlockFormat, element_of, get
from aqnsim.receipts import STATS
from aqnsim.reference import F32, U32


def _numpy(x: Tensor) -> F32:
    check_dtype(x)
    return x.detach().float().numpy()


def _held(values: F32, dtype: torch.dtype) -> tuple[Tensor, F32]:
    """Values as a tensor of ``dtype`` and, again, as the fp32 values that it holds."""
    held = reference.to_bf16(values) if dtype == torch.bfloat16 else np.asarray(values, np.float32)
    return _tensor(held).to(dtype), held


def _sum2(x: F32) -> float:
    return float(np.sum(np.asarray(x, np.float64) ** 2))


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
    return reference.random_words(ids, columns, key, at).reshape(tuple(x.shape))


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
    stats = torch.zeros(len(STATS), dtype=torch.float64)
    if measure:
        with np.errstate(all="ignore"):
            error = held - values
        finite = np.isfinite(error)  # one Inf must not spoil the sums of all others
        stats[:] = torch.tensor(
            [
                1,
                values.size,
                _different(held, values),
                _sum2(np.where(finite, error, 0)),
                _sum2(np.where(finite, values, 0)),
                0,
                0,
                int(np.sum((scaled > element.max) | (scaled < (element.min if element.signed else -element.max)))),
                int(np.sum(~np.isfinite(held))),
                0,
            ]
        )
    return out, stats


def quantize(
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


def perturb(
    y: Tensor,
    error: str,
    key: int,
    step: Tensor,
    rows: Tensor | None,
    dtype: torch.dtype | None,
    measure: bool,
) -> tuple[Tensor, Tensor]:
    model, before = parse(error), _numpy(y)
    rows = check_rows("perturb", y, rows)
    after = reference.perturb(before, model, key, int(step) & 0xFFFFFFFF, None if rows is None else rows.numpy())
    out, held = _held(after, dtype or y.dtype)
    stats = torch.zeros(len(STATS), dtype=torch.float64)
    if measure:
        _, clean = _held(before, dtype or y.dtype)
        relative = isinstance(model, RelativeGaussian)
        measurable = np.isfinite(before) & ((before != 0) | (not relative))
        finite = np.isfinite(held)
        with np.errstate(all="ignore"):
            shift = held - clean
            unit = before if relative else np.float32(1)
            injected = np.where(measurable, (after - before) / np.where(measurable, unit, 1), 0)
        stats[:] = torch.tensor(
            [
                1,
                before.size,
                _different(held, clean),
                _sum2(np.where(np.isfinite(shift), shift, 0)),
                _sum2(np.where(finite, before, 0)),
                _sum2(injected),
                int(measurable.sum()),
                0,
                int(np.sum(~finite)),
                model.sigma**2 * int(measurable.sum()),  # type: ignore[attr-defined]
            ]
        )
    return out, stats


def gemm(a: Tensor, b: Tensor, text: str) -> Tensor:
    check_gemm(a, b)
    return _tensor(reference.gemm(_numpy(a), _numpy(b), accumulator.get(text)))


BACKEND = register(
    Backend(
        name="reference",
        devices=("cpu",),
        ops={
            "cast": cast,
            "quantize": quantize,
            "perturb": perturb,
            "gemm": gemm,
            **compositions(cast, perturb, gemm),
        },
    )
)
