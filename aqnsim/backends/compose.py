"""The linear op as what it means: a composition of ``cast`` and ``perturb`` around torch's own GEMM.

A backend without fused kernels uses these; a fused kernel is by definition equal to them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from aqnsim._errors import ConfigError
from aqnsim.profiles import OpSpec
from aqnsim.receipts import STATS

_SPREAD = 0x9E3779B97F4A7C15 - (1 << 64)  # 2^64 over the golden ratio, odd, as a signed integer

Cast = Callable[..., tuple[Tensor, Tensor]]
Perturb = Callable[..., tuple[Tensor, Tensor]]


def _rows_2d(x: Tensor) -> Tensor:
    # Flat and contiguous: torch runs a non-contiguous 3-D input with a frozen weight as a batched matmul that is
    # hundreds of times slower.
    return x.reshape(-1, x.shape[-1]).contiguous()


def _no_stats(like: Tensor) -> Tensor:
    return torch.zeros(len(STATS), dtype=torch.float64, device=like.device)


def _check_rows(rows: Tensor | None, count: int) -> None:
    if rows is not None and rows.numel() != count:
        raise ConfigError(
            f"linear: {rows.numel()} logical rows are set but the input has {count}; the op runs on other "
            "tokens than the model's input: exclude it in the profile or set its rows"
        )


class _Gemm:
    """One matrix product whose result an error may reach in fp32, before it is rounded to the operands' dtype."""

    def __init__(self, perturb: Perturb, step: Tensor) -> None:
        self.perturb, self.step = perturb, step

    def __call__(
        self, a: Tensor, b: Tensor, error: str | None, key: int, rows: Tensor | None, bias: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """``a @ b``, perturbed where there is an error, then ``bias``, which only a product with an error may have."""
        if error is None:
            return a @ b, _no_stats(a)
        product = a.float() @ b.float()
        if bias is None:
            return self.perturb(product, error, key, self.step, rows, a.dtype, True)
        missed, stats = self.perturb(product, error, key, self.step, rows, None, True)
        clean, stored = ((y + bias.float()).to(a.dtype) for y in (product, missed))
        return stored, _as_stored(stats, clean, stored)


def _as_stored(stats: Tensor, clean: Tensor, stored: Tensor) -> Tensor:
    """What an error did once the bias was added and the result rounded: either may absorb it."""
    other = (stored != clean) & ~(stored.isnan() & clean.isnan())
    error = stored.float() - clean.float()
    finite = error.isfinite()
    stats[STATS.index("changed")] = other.sum()
    stats[STATS.index("error2")] = error.where(finite, 0.0).double().square().sum()
    stats[STATS.index("reference2")] = clean.where(finite, 0.0).double().square().sum()
    stats[STATS.index("nonfinite")] = stored.numel() - stored.isfinite().sum()
    return stats


def linear_ops(cast: Cast, perturb: Perturb) -> dict[str, Callable[..., Any]]:
    """``linear`` and ``linear_backward`` from a backend's primitives."""

    def operand(t: Tensor, fmt: str | None) -> tuple[Tensor, Tensor]:
        return cast(t, fmt, -1, 0, None, None, True) if fmt else (t, _no_stats(t))

    def linear(
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        spec_text: str,
        cast_weight: bool,
        keys: list[int],
        step: Tensor,
        rows: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        spec = OpSpec.parse(spec_text)
        xq, x_stats = operand(_rows_2d(x), spec.forward.input)
        wq, w_stats = operand(weight, spec.forward.weight if cast_weight else None)
        if spec.forward.error is None:
            y, y_stats = torch.nn.functional.linear(xq, wq, bias), _no_stats(x)
        else:
            _check_rows(rows, xq.shape[0])
            y, y_stats = _Gemm(perturb, step)(xq, wq.t(), spec.forward.error, keys[0], rows, bias)
        return y.reshape(*x.shape[:-1], weight.shape[0]), torch.stack([w_stats, x_stats, y_stats])

    def linear_backward(
        grad: Tensor,
        x: Tensor,
        weight: Tensor,
        spec_text: str,
        cast_weight: bool,
        keys: list[int],
        step: Tensor,
        rows: Tensor | None,
        need_input: bool,
        need_weight: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        spec = OpSpec.parse(spec_text)
        g = _rows_2d(grad)
        gemm = _Gemm(perturb, step)
        grad_x, x_stats = grad.new_empty(0), _no_stats(grad)
        grad_w, w_stats = grad.new_empty(0), _no_stats(grad)
        if need_input:
            _check_rows(rows if spec.grad_input.error else None, g.shape[0])
            wq, _ = operand(weight, spec.forward.weight if cast_weight else None)
            grad_x, x_stats = gemm(g, wq, spec.grad_input.error, keys[1], rows)
            grad_x = grad_x.reshape(x.shape)
        if need_weight:
            # A weight gradient has no token of its own: its rows are told apart by the batch's first token, spread
            # over all 64 bits (the product wraps).
            own = None
            if rows is not None:
                own = torch.arange(weight.shape[0], device=rows.device) + rows[:1] * _SPREAD
            xq, _ = operand(_rows_2d(x), spec.forward.input)
            grad_w, w_stats = gemm(g.t(), xq, spec.grad_weight.error, keys[2], own)
        return grad_x, grad_w, torch.stack([x_stats, w_stats])

    return {"linear": linear, "linear_backward": linear_backward}
