"""``aqnsim.reference`` as a backend: the numpy definitions under the same ops, to compare any other backend with."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from aqnsim import reference
from aqnsim._errors import ConfigError
from aqnsim.backends import Backend, register
from aqnsim.backends.compose import linear_ops
from aqnsim.errors import RelativeGaussian, parse
from aqnsim.formats import BlockFormat, element_of, get
from aqnsim.receipts import STATS
from aqnsim.reference import F32


def _numpy(x: Tensor) -> F32:
    if x.dtype not in (torch.float32, torch.bfloat16):
        raise ConfigError(f"expected a float32 or bfloat16 tensor, got {x.dtype}: convert it first")
    return x.detach().float().numpy()


def _held(values: F32, dtype: torch.dtype) -> tuple[Tensor, F32]:
    """Values as a tensor of ``dtype`` and, again, as the fp32 values that it holds."""
    held = reference.to_bf16(values) if dtype == torch.bfloat16 else np.asarray(values, np.float32)
    return torch.from_numpy(np.array(held, order="C")).to(dtype), held  # keeps 0 dimensions


def _sum2(x: F32) -> float:
    return float(np.sum(np.asarray(x, np.float64) ** 2))


def _different(a: F32, b: F32) -> int:
    other = np.asarray(a).view(np.uint32) != np.asarray(b).view(np.uint32)
    return int(np.sum(other & ~(np.isnan(a) & np.isnan(b))))


def cast(x: Tensor, fmt: str, axis: int, rounding: str, measure: bool) -> tuple[Tensor, Tensor]:
    f, values = get(fmt), _numpy(x)
    out, held = _held(reference.cast(values, f, axis), x.dtype)
    stats = torch.zeros(len(STATS), dtype=torch.float64)
    if measure:
        scaled = _scaled(values, f, axis)
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
                int(np.sum(np.abs(scaled) > element_of(f).max)),
                int(np.sum(~np.isfinite(held))),
                0,
            ]
        )
    return out, stats


def _scaled(x: F32, f: object, axis: int) -> F32:
    """What reaches the element format: ``x`` times its block's factor."""
    if not isinstance(f, BlockFormat):
        return x
    if x.ndim == 0:
        return _scaled(x.reshape(1), f, 0).reshape(())
    moved = np.moveaxis(x, axis, -1)
    factors = np.repeat(reference.blocks_of(moved, f).factors, f.block, axis=-1)
    with np.errstate(all="ignore"):
        return moved * factors[..., : moved.shape[-1]]


def quantize(x: Tensor, fmt: str, axis: int) -> tuple[Tensor, Tensor, Tensor]:
    f, values = get(fmt), np.atleast_1d(_numpy(x))
    if not isinstance(f, BlockFormat):
        return (
            torch.from_numpy(reference.cast(values, f)).reshape(x.shape),
            torch.ones(()),
            torch.ones(()),
        )
    b = reference.blocks_of(np.moveaxis(values, axis, -1), f)
    back = [np.ascontiguousarray(np.moveaxis(p, -1, axis)) for p in (b.elements, b.scales)]
    return (
        torch.from_numpy(back[0]).reshape(x.shape),
        torch.from_numpy(back[1]),
        torch.tensor(b.tensor_scale),
    )


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
    count = y.numel() // y.shape[-1] if y.dim() and y.shape[-1] else int(y.dim() == 0)
    if rows is not None and (rows.numel() != count or rows.dtype != torch.int64):
        raise ConfigError(f"perturb: expected {count} int64 rows, got {rows.numel()} of {rows.dtype}")
    after = reference.perturb(before, model, key, int(step), None if rows is None else rows.reshape(-1).numpy())
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


BACKEND = register(
    Backend(
        name="reference",
        devices=("cpu",),
        ops={"cast": cast, "quantize": quantize, "perturb": perturb, **linear_ops(cast, perturb)},
    )
)
