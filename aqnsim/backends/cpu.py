"""The C++ kernels of ``csrc/cpu``, called with raw pointers."""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

from aqnsim import _core
from aqnsim._errors import BackendError, ConfigError
from aqnsim.backends import Backend, register
from aqnsim.backends.compose import linear_ops
from aqnsim.errors import AbsoluteGaussian, ErrorModel, RelativeGaussian, parse
from aqnsim.formats import BlockFormat, element_of, float32, get
from aqnsim.receipts import STATS

_DTYPES = {torch.float32: 0, torch.bfloat16: 1}
_OVERFLOWS = {"saturate": 0, "inf": 1, "nan": 2}
_SCALES = {"e8m0-floor": 1, "e4m3-two-level": 2}
_KINDS: dict[type[ErrorModel], int] = {RelativeGaussian: 0, AbsoluteGaussian: 1}
_INJECTED = STATS.index("injected_n") - 1
_PARALLEL_FROM = 1 << 15  # elements: below, waking threads costs more than they save


def _dtype(t: Tensor) -> int:
    if t.dtype not in _DTYPES:
        raise ConfigError(f"expected a float32 or bfloat16 tensor, got {t.dtype}: convert it first")
    return _DTYPES[t.dtype]


def _threads(t: Tensor) -> int:
    return torch.get_num_threads() if t.numel() >= _PARALLEL_FROM else 1


def _stats(values: list[float], measure: bool, sigma: float = 0.0) -> Tensor:
    """What a kernel measured, in the order of ``receipts.STATS``."""
    if not measure:
        return torch.zeros(len(STATS), dtype=torch.float64)
    return torch.tensor([1.0, *values, sigma * sigma * values[_INJECTED]], dtype=torch.float64)


@lru_cache(maxsize=1024)
def _format_args(name: str) -> tuple[int, int, int, float, int, int]:
    """(block, mantissa bits, min exponent, max, overflow, scale rule) as ``_core.cast`` takes them."""
    fmt = get(name)
    e = element_of(fmt)
    block, scale = (fmt.block, _SCALES[fmt.scale]) if isinstance(fmt, BlockFormat) else (1, 0)
    return block, e.mantissa_bits, e.min_exponent, float32(e.max), _OVERFLOWS[e.overflow], scale


def _run_cast(
    x: Tensor, out: Tensor, scales: int, fmt: str, axis: int, unscaled: bool, measure: bool
) -> tuple[list[float], float]:
    args = _format_args(fmt)
    shape = x.shape if x.dim() else (1,)
    axis %= len(shape)
    view = (math.prod(shape[:axis]), shape[axis], math.prod(shape[axis + 1 :]))
    code, threads = _dtype(x), _threads(x)
    amax = _core.amax(x.data_ptr(), code, x.numel(), threads) if args[5] == 2 else 0.0
    stats = _core.cast(x.data_ptr(), out.data_ptr(), scales, code, view, *args, amax, unscaled, measure, threads)
    return stats, amax


def cast(x: Tensor, fmt: str, axis: int, rounding: str, measure: bool) -> tuple[Tensor, Tensor]:
    x = x.contiguous()
    out = torch.empty_like(x)
    stats, _ = _run_cast(x, out, 0, fmt, axis, False, measure)
    return out, _stats(stats, measure)


def quantize(x: Tensor, fmt: str, axis: int) -> tuple[Tensor, Tensor, Tensor]:
    f = get(fmt)
    x = x.float().contiguous()
    out = torch.empty_like(x)
    shape = list(x.shape) or [1]
    scales = torch.ones(())
    if isinstance(f, BlockFormat):
        shape[axis] = -(-shape[axis] // f.block)
        scales = torch.empty(shape)
    _, amax = _run_cast(x, out, scales.data_ptr() if scales.dim() else 0, fmt, axis, True, False)
    tensor_scale = torch.tensor(amax) / 2688.0 if _format_args(fmt)[5] == 2 else torch.ones(())
    return out, scales, tensor_scale


def perturb(
    y: Tensor,
    error: str,
    key: int,
    step: Tensor,
    rows: Tensor | None,
    dtype: torch.dtype | None,
    measure: bool,
) -> tuple[Tensor, Tensor]:
    model = parse(error)
    if type(model) not in _KINDS:
        raise BackendError(f"backend 'cpu' has no kernel for {model}; it has: {', '.join(k.kind for k in _KINDS)}")
    y = y.contiguous()
    out = torch.empty_like(y, dtype=dtype or y.dtype)
    columns = y.shape[-1] if y.dim() else 1
    count = y.numel() // columns if columns else 0
    if rows is not None:
        rows = rows.contiguous()
        if rows.numel() != count or rows.dtype != torch.int64:
            raise ConfigError(f"perturb: expected {count} int64 rows, got {rows.numel()} of {rows.dtype}")
    stats = _core.perturb(
        y.data_ptr(),
        out.data_ptr(),
        _dtype(y),
        _dtype(out),
        count,
        columns,
        0 if rows is None else rows.data_ptr(),
        key & 0xFFFFFFFFFFFFFFFF,
        int(step),
        _KINDS[type(model)],
        model.sigma,  # type: ignore[attr-defined]
        measure,
        _threads(y),
    )
    return out, _stats(stats, measure, model.sigma)  # type: ignore[attr-defined]


BACKEND = register(
    Backend(
        name="cpu",
        devices=("cpu",),
        ops={"cast": cast, "quantize": quantize, "perturb": perturb, **linear_ops(cast, perturb)},
    )
)
