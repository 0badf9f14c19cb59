"""The ops: schemas, fake kernels and gradients under ``torch.ops.aqnsim``; the one call path to a backend.

Each op is a pure function of its arguments: formats and errors are canonical texts, noise coordinates are integers
and tensors. Gradients are registered once for all devices, straight-through: ``cast`` and ``perturb`` are the identity
for autograd, and ``linear`` differentiates the GEMM of the cast operands.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.library import Library, register_autograd, register_fake

from aqnsim import backends
from aqnsim._errors import ConfigError
from aqnsim.backends.checks import check_dtype, check_out
from aqnsim.formats import BlockFormat, get, scale_shape
from aqnsim.packing import empty_parts
from aqnsim.profiles.spec import OpSpec
from aqnsim.receipts import STATS, STREAMS

_LIB = Library("aqnsim", "DEF")

_SCHEMAS = {
    "cast": ("(Tensor x, str format, int axis, int key, Tensor? step, Tensor? rows, bool measure) -> (Tensor, Tensor)"),
    "cast_out": "(Tensor x, str format, int axis, int key, Tensor? step, Tensor? rows, Tensor(a!) out) -> ()",
    "elements": "(Tensor x, str format, int axis, int key, Tensor? step, Tensor? rows) -> (Tensor, Tensor, Tensor)",
    "quantize": "(Tensor x, str format, int axis, int key, Tensor? step, Tensor? rows) -> (Tensor, Tensor, Tensor)",
    "quantize_out": (
        "(Tensor x, str format, int axis, int key, Tensor? step, Tensor? rows,"
        " Tensor(a!) codes, Tensor(b!) scales, Tensor(c!) tensor_scale) -> ()"
    ),
    "dequantize": (
        "(Tensor codes, Tensor scales, Tensor tensor_scale, str format, int axis, SymInt[] shape, ScalarType dtype)"
        " -> Tensor"
    ),
    "dequantize_out": (
        "(Tensor codes, Tensor scales, Tensor tensor_scale, str format, int axis, Tensor(a!) out) -> ()"
    ),
    "perturb": (
        "(Tensor y, str error, int key, Tensor step, Tensor? rows, Tensor? magnitude, ScalarType? dtype,"
        " bool measure) -> (Tensor, Tensor)"
    ),
    "perturb_out": (
        "(Tensor y, str error, int key, Tensor step, Tensor? rows, Tensor? magnitude, Tensor(a!) out) -> ()"
    ),
    "gemm": "(Tensor a, Tensor b, str accumulator) -> Tensor",
    "linear": (
        "(Tensor x, Tensor weight, Tensor? bias, str spec, bool cast_weight, int[] keys, Tensor step,"
        " Tensor? rows, Tensor? receipt) -> (Tensor, Tensor)"
    ),
    "native_linear": (
        "(Tensor x, Tensor weight, Tensor? bias, str spec, bool cast_weight, int[] keys, Tensor step,"
        " Tensor? rows, Tensor? receipt) -> (Tensor, Tensor)"
    ),
    "linear_backward": (
        "(Tensor grad, Tensor x, Tensor weight, str spec, bool cast_weight, int[] keys, Tensor step,"
        " Tensor? rows, bool need_input, bool need_weight) -> (Tensor, Tensor, Tensor)"
    ),
    "matmul": (
        "(Tensor a, Tensor b, bool transposed, str spec, ScalarType dtype, int[] keys, Tensor step,"
        " Tensor? rows, Tensor? first_rows, Tensor? other_rows, Tensor? receipt) -> (Tensor, Tensor)"
    ),
    "matmul_backward": (
        "(Tensor grad, Tensor a, Tensor b, bool transposed, str spec, int[] keys, Tensor step,"
        " Tensor? rows, Tensor? first_rows, Tensor? other_rows, bool need_a, bool need_b) -> (Tensor, Tensor, Tensor)"
    ),
    "stage": (
        "(Tensor x, str[] forward, str[] backward, ScalarType dtype, int[] keys, Tensor step,"
        " Tensor? rows, Tensor? receipt) -> (Tensor, Tensor)"
    ),
    "record": "(Tensor(a!) totals, Tensor stats) -> ()",
}
for _name, _schema in _SCHEMAS.items():
    _LIB.define(_name + _schema, tags=(torch.Tag.pt2_compliant_tag,))


# ---- kernels: whatever backend serves the device --------------------------------------------------------------------


def _primitive(op: str) -> Callable[..., Any]:
    def run(x: Tensor, *args: Any) -> Any:
        return backends.resolve(op, x.device.type)(x, *args)

    return run


def _cast_out(x: Tensor, *args: Any) -> None:
    check_out("cast", args[-1], x.shape, x.dtype, x)
    backends.resolve("cast_out", x.device.type)(x, *args)


def _perturb_out(y: Tensor, *args: Any) -> None:
    out = args[-1]
    check_dtype(out)
    check_out("perturb", out, y.shape, out.dtype, y, *(t for t in args if isinstance(t, Tensor)))
    backends.resolve("perturb_out", y.device.type)(y, *args)


def _quantize_out(x: Tensor, fmt: str, axis: int, *args: Any) -> None:
    for out, like in zip(args[-3:], empty_parts(x.to("meta"), get(fmt), axis), strict=True):
        check_out("quantize", out, like.shape, like.dtype, x)
    backends.resolve("quantize_out", x.device.type)(x, fmt, axis, *args)


def _dequantize_out(codes: Tensor, scales: Tensor, of: Tensor, fmt: str, axis: int, out: Tensor) -> None:
    check_dtype(out)
    check_out("dequantize", out, out.shape, out.dtype, codes, scales, of)
    backends.resolve("dequantize_out", codes.device.type)(codes, scales, of, fmt, axis, out)


def _run(op: str, x: Tensor, *args: Any) -> Any:
    """A backend's composition; autocast, which has done its work where the op was called, must not reach into it."""
    run = backends.resolve(op, x.device.type)
    if not torch.is_autocast_enabled(x.device.type):
        return run(x, *args)
    with torch.autocast(x.device.type, enabled=False):
        return run(x, *args)


def _linear(x: Tensor, *args: Any) -> Any:
    return _run("linear", x, *args[:-1])  # the receipt is the backward's


def _native_linear(x: Tensor, weight: Tensor, bias: Tensor | None, spec: str, *args: Any) -> tuple[Tensor, Tensor]:
    """What the device makes of the two formats; it says nothing of its own error, so that only the call is counted."""
    forward = OpSpec.parse(spec).forward
    flat = x.reshape(-1, x.shape[-1]).contiguous()
    y = _run("native_linear", flat, weight, bias, forward.input, forward.weight)
    stats = torch.zeros(4, len(STATS), dtype=torch.float64, device=x.device)
    stats[STREAMS.index("output"), STATS.index("calls")] = 1
    return y.to(x.dtype).reshape(*x.shape[:-1], weight.shape[0]), stats


def _linear_backward(grad: Tensor, *args: Any) -> Any:
    return _run("linear_backward", grad, *args)


def _matmul(a: Tensor, *args: Any) -> Any:
    return _run("matmul", a, *args[:-1])


def _matmul_backward(grad: Tensor, *args: Any) -> Any:
    return _run("matmul_backward", grad, *args)


def _stage(x: Tensor, forward: list[str], backward: list[str], dtype: torch.dtype, keys: list[int], *args: Any) -> Any:
    return _run("stage", x, forward, dtype, keys[:3], *args[:-1])


def _record(totals: Tensor, stats: Tensor) -> None:
    totals.add_(stats)


for _name, _kernel in {
    **{op: _primitive(op) for op in ("cast", "elements", "quantize", "dequantize", "perturb", "gemm")},
    "cast_out": _cast_out,
    "quantize_out": _quantize_out,
    "dequantize_out": _dequantize_out,
    "perturb_out": _perturb_out,
    "linear": _linear,
    "native_linear": _native_linear,
    "linear_backward": _linear_backward,
    "matmul": _matmul,
    "matmul_backward": _matmul_backward,
    "stage": _stage,
    "record": _record,
}.items():
    _LIB.impl(_name, _kernel, "CompositeExplicitAutograd")


# ---- fake kernels: shapes and dtypes --------------------------------------------------------------------------------


def _stats_like(x: Tensor, *rows: int) -> Tensor:
    return x.new_empty((*rows, len(STATS)), dtype=torch.float64)


def _dense(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    return torch.empty(x.shape, dtype=dtype or x.dtype, device=x.device)


@register_fake("aqnsim::cast", lib=_LIB)
def _(x: Tensor, fmt: str, *args: Any) -> tuple[Tensor, Tensor]:
    return _dense(x), _stats_like(x)


@register_fake("aqnsim::elements", lib=_LIB)
def _(x: Tensor, fmt: str, axis: int, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    f = get(fmt)
    levels = isinstance(f, BlockFormat) and f.scale_format == "hif4"
    return (
        _dense(x, torch.float32),
        x.new_empty(scale_shape(f, tuple(x.shape), axis), dtype=torch.int32 if levels else torch.float32),
        x.new_empty((), dtype=torch.float32),
    )


@register_fake("aqnsim::quantize", lib=_LIB)
def _(x: Tensor, fmt: str, axis: int, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    return empty_parts(x, get(fmt), axis)


@register_fake("aqnsim::dequantize", lib=_LIB)
def _(codes: Tensor, scales: Tensor, of: Tensor, fmt: str, axis: int, shape: Any, dtype: torch.dtype) -> Tensor:
    return codes.new_empty(shape, dtype=dtype)


@register_fake("aqnsim::perturb", lib=_LIB)
def _(
    y: Tensor,
    error: str,
    key: int,
    step: Tensor,
    rows: Tensor | None,
    magnitude: Tensor | None,
    dtype: torch.dtype | None,
    measure: bool,
) -> tuple[Tensor, Tensor]:
    return _dense(y, dtype), _stats_like(y)


@register_fake("aqnsim::gemm", lib=_LIB)
def _(a: Tensor, b: Tensor, accumulator: str) -> Tensor:
    return a.new_empty((*a.shape[:-1], b.shape[-1]), dtype=torch.float32)


@register_fake("aqnsim::native_linear", lib=_LIB)
@register_fake("aqnsim::linear", lib=_LIB)
def _(x: Tensor, weight: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    return x.new_empty((*x.shape[:-1], weight.shape[0])), _stats_like(x, 4)


@register_fake("aqnsim::linear_backward", lib=_LIB)
def _(grad: Tensor, x: Tensor, weight: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    need_input, need_weight = args[-2:]
    return (
        x.new_empty(x.shape if need_input else (0,)),
        weight.new_empty(weight.shape if need_weight else (0,)),
        _stats_like(grad, 8),
    )


@register_fake("aqnsim::matmul", lib=_LIB)
def _(a: Tensor, b: Tensor, transposed: bool, spec: str, dtype: torch.dtype, *args: Any) -> tuple[Tensor, Tensor]:
    columns = b.shape[-2] if transposed else b.shape[-1]
    return a.new_empty((*a.shape[:-1], columns), dtype=dtype), _stats_like(a, 4)


@register_fake("aqnsim::matmul_backward", lib=_LIB)
def _(grad: Tensor, a: Tensor, b: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    need_a, need_b = args[-2:]
    return (
        a.new_empty(a.shape if need_a else (0,)),
        b.new_empty(b.shape if need_b else (0,)),
        _stats_like(grad, 8),
    )


@register_fake("aqnsim::stage", lib=_LIB)
def _(x: Tensor, forward: list[str], backward: list[str], dtype: torch.dtype, *args: Any) -> tuple[Tensor, Tensor]:
    return _dense(x, dtype), _stats_like(x, 3)


for _name in ("cast_out", "quantize_out", "dequantize_out", "perturb_out", "record"):
    register_fake(f"aqnsim::{_name}", lambda *args: None, lib=_LIB)


# ---- gradients ------------------------------------------------------------------------------------------------------


def _straight_through(name: str, arguments: int) -> None:
    def setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.dtype = inputs[0].dtype
        ctx.mark_non_differentiable(output[1])

    def backward(ctx: Any, grad: Tensor, _stats: Tensor | None) -> tuple[Tensor | None, ...]:
        return (grad.to(ctx.dtype), *[None] * (arguments - 1))

    register_autograd(f"aqnsim::{name}", backward, setup_context=setup, lib=_LIB)


_straight_through("cast", 7)
_straight_through("perturb", 8)


def _linear_setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    x, weight, bias, spec, cast_weight, keys, step, rows, receipt = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.has_bias = bias is not None
    ctx.spec, ctx.cast_weight, ctx.keys = spec, cast_weight, keys
    ctx.receipt = receipt  # only added to, never read by the gradient
    # x is needed for the weight's gradient alone; its shape is enough otherwise
    # and a frozen weight as it is now: the module may hold its master again when the backward runs
    trains = weight.requires_grad
    ctx.save_for_backward(x if trains else None, weight if trains else weight.detach(), step, rows)


def _linear_grad(ctx: Any, grad: Tensor, _stats: Tensor | None) -> tuple[Tensor | None, ...]:
    x, weight, step, rows = ctx.saved_tensors
    need_x, need_w, need_b = ctx.needs_input_grad[:3]
    if not need_w:
        x = grad.new_empty(1).expand(*grad.shape[:-1], weight.shape[1])  # a shape without storage
    grad_x, grad_w, stats = torch.ops.aqnsim.linear_backward(
        grad, x, weight, ctx.spec, ctx.cast_weight, ctx.keys, step, rows, need_x, need_w
    )
    if ctx.receipt is not None:
        torch.ops.aqnsim.record(ctx.receipt[4:12], stats)
    grad_b = grad.reshape(-1, grad.shape[-1]).sum(0) if ctx.has_bias and need_b else None
    return (grad_x if need_x else None, grad_w if need_w else None, grad_b, *[None] * 6)


for _name in ("linear", "native_linear"):
    register_autograd(f"aqnsim::{_name}", _linear_grad, setup_context=_linear_setup, lib=_LIB)


def _matmul_setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    a, b, transposed, spec, _, keys, step, rows, first_rows, other_rows, receipt = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.transposed, ctx.spec, ctx.keys, ctx.receipt = transposed, spec, keys, receipt
    ctx.save_for_backward(a, b, step, rows, first_rows, other_rows)


def _matmul_grad(ctx: Any, grad: Tensor, _stats: Tensor | None) -> tuple[Tensor | None, ...]:
    a, b, step, rows, first_rows, other_rows = ctx.saved_tensors
    need_a, need_b = ctx.needs_input_grad[:2]
    grad_a, grad_b, stats = torch.ops.aqnsim.matmul_backward(
        grad, a, b, ctx.transposed, ctx.spec, ctx.keys, step, rows, first_rows, other_rows, need_a, need_b
    )
    if ctx.receipt is not None:
        torch.ops.aqnsim.record(ctx.receipt[4:12], stats)
    return (grad_a if need_a else None, grad_b if need_b else None, *[None] * 9)


register_autograd("aqnsim::matmul", _matmul_grad, setup_context=_matmul_setup, lib=_LIB)

_NOTHING = ["", "", ""]


def _stage_setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    x, _, backward, _, keys, step, rows, receipt = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.dtype, ctx.steps, ctx.keys, ctx.receipt = x.dtype, backward, keys, receipt
    ctx.save_for_backward(step, rows)


def _stage_grad(ctx: Any, grad: Tensor, _stats: Tensor | None) -> tuple[Tensor | None, ...]:
    if not any(ctx.steps):
        return (grad.to(ctx.dtype), *[None] * 7)
    step, rows = ctx.saved_tensors
    keys = [*ctx.keys[3:], *ctx.keys[3:]]
    grad_x, stats = torch.ops.aqnsim.stage(grad, ctx.steps, _NOTHING, ctx.dtype, keys, step, rows, None)
    if ctx.receipt is not None:
        torch.ops.aqnsim.record(ctx.receipt, stats)
    return (grad_x, *[None] * 7)


register_autograd("aqnsim::stage", _stage_grad, setup_context=_stage_setup, lib=_LIB)


def _refuse_second(ctx: Any, *grads: Any) -> Any:
    raise ConfigError(
        "the gradient of an emulated product is itself computed on emulated hardware, and has no gradient: "
        "take second derivatives (create_graph=True) under emulation.off()"
    )


for _name in ("linear_backward", "matmul_backward"):
    register_autograd(f"aqnsim::{_name}", _refuse_second, lib=_LIB)
