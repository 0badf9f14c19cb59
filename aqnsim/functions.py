"""Elementary functions from tables, and the layers that are made of them, on tensors.

Each takes and returns float32, on any device. Only operations that IEEE 754 fixes, integer operations and lookups are
used, sums run in a fixed order, and :mod:`aqnsim.reference.functions` gives the same bits. Gradients are those of the
exact function at the approximated result: training sees a smooth function, not the steps of a table.

What :mod:`aqnsim.approximation` describes is one opaque op, ``torch.ops.aqnsim.evaluate``, so a compiler changes none
of its bits. What stands around it, such as the division of a softmax, a compiler for a GPU may contract or approximate.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.library import Library, register_autograd, register_fake

from aqnsim._errors import ConfigError, unknown
from aqnsim.approximation import FUNCTIONS, LIMITS, Table, entries, parse

_LIB = Library("aqnsim", "FRAGMENT")
_LIB.define("evaluate(Tensor x, str function, str approximation) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))


def evaluate(x: Tensor, function: str, approximation: str) -> Tensor:
    """A function of each element, from its table.

    Args:
        x: float32, any shape.
        function: one of :data:`aqnsim.approximation.FUNCTIONS`, or ``sigmoid``, which is ``1 / (1 + exp(-x))`` from a
            table of ``exp`` and, where there is one, of ``reciprocal``.
        approximation: the tables, as text of :func:`aqnsim.approximation.parse`.

    Raises:
        ConfigError: not float32, a table that is missing, or one that would have no effect.
        UnknownNameError: no such function.

    Formula: docs/semantics.md; the error's bound is :attr:`aqnsim.approximation.Table.max_error`. The gradient is
    ``y``, ``-y^2``, ``-y^3 / 2``, ``1 - y^2`` and ``y (1 - y)`` for exp, reciprocal, rsqrt, tanh and sigmoid, of the
    result y; and ``2 / sqrt(pi) exp(-x^2)`` for erf.

    >>> evaluate(torch.tensor([0.0, 1.0, -torch.inf]), "exp", "table(function='exp', index_bits=6)").tolist()
    [1.0, 2.7183172702789307, 0.0]
    """
    if function == "sigmoid":
        _check("sigmoid", approximation, "exp", "reciprocal")
    elif function in FUNCTIONS:
        _check(function, approximation, function)
    else:
        raise unknown("function", function, [*FUNCTIONS, "sigmoid"])
    return _evaluate(x, function, approximation)


def _check(what: str, approximation: str, needed: str, *optional: str) -> None:
    """Refuse tables that are not those of what is computed.

    Not while a graph is traced, which cannot read texts: the op itself refuses a table that is missing.
    """
    if not torch.compiler.is_compiling():
        parse(approximation).check(what, needed, *optional)


def _check_dtype(what: str, x: Tensor) -> None:
    if not isinstance(x, Tensor) or x.dtype != torch.float32:
        got = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise ConfigError(f"{what}: expected a float32 tensor, got {got}: convert it first")


def _evaluate(x: Tensor, function: str, approximation: str) -> Tensor:
    _check_dtype(function, x)
    out: Tensor = torch.ops.aqnsim.evaluate(x, function, approximation)
    return out


# ---- the op ---------------------------------------------------------------------------------------------------------


def _kernel(x: Tensor, function: str, approximation: str) -> Tensor:
    found, x = parse(approximation), x.contiguous()
    if function != "sigmoid":
        return _by_table(x, found.of(function))
    below = 1 + _by_table(-x, found.of("exp"))
    table = found.of("reciprocal")
    return torch.ones_like(below) / below if table is None else _by_table(below, table)


_LIB.impl("evaluate", _kernel, "CompositeExplicitAutograd")


@register_fake("aqnsim::evaluate", lib=_LIB)
def _(x: Tensor, function: str, approximation: str) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.function = inputs[1]
    ctx.save_for_backward(inputs[0] if ctx.function == "erf" else output)


def _gradient(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
    (saved,) = ctx.saved_tensors
    return grad * _DERIVATIVES[ctx.function](saved), None, None


_DERIVATIVES = {  # of the result; erf's of the input
    "exp": lambda y: y,
    "reciprocal": lambda y: -y * y,
    "rsqrt": lambda y: -0.5 * y * y * y,
    "tanh": lambda y: 1 - y * y,
    "sigmoid": lambda y: y * (1 - y),
    "erf": lambda x: 2 / math.sqrt(math.pi) * torch.exp(-x * x),
}

register_autograd("aqnsim::evaluate", _gradient, setup_context=_setup, lib=_LIB)


def _by_table(x: Tensor, table: Table | None) -> Tensor:
    assert table is not None  # the callers of the op have checked it
    return {"exp": _exp, "reciprocal": _reciprocal, "rsqrt": _rsqrt}.get(table.function, _limited)(x, table)


@lru_cache(maxsize=64)
def _entries(function: str, index_bits: int, device: torch.device) -> Tensor:
    return torch.tensor(entries(function, index_bits), dtype=torch.float32, device=device)


def _looked_up(position: Tensor, table: Table) -> Tensor:
    """The nearest entry, or the point of the line, at positions 0 .. ``intervals``, counted in intervals."""
    values = _entries(table.function, table.index_bits, position.device)
    if table.order == 0:
        return _at(values, (position + 0.5).to(torch.int32))
    index = position.floor().clamp(max=table.intervals - 1)
    at = index.to(torch.int32)
    low, high = _at(values, at), _at(values, at + 1)
    return low + (position - index) * (high - low)


def _at(values: Tensor, index: Tensor) -> Tensor:
    # Eight times as fast as values[index].
    return values.index_select(0, index.reshape(-1)).view(index.shape)


def _power_of_two(exponent: Tensor) -> Tensor:
    return ((exponent + 127) << 23).view(torch.float32)


def _scaled(y: Tensor, exponent: Tensor) -> Tensor:
    """``y 2^exponent``, rounded once: the first of two factors leaves a normal number."""
    half = exponent >> 1
    return y * _power_of_two(half) * _power_of_two(exponent - half)


def _parts(x: Tensor) -> tuple[Tensor, Tensor]:
    """Of each magnitude ``2^exponent (1 + fraction)``, for finite numbers but 0."""
    magnitude = x.abs()
    tiny = magnitude < 2.0**-126
    bits = torch.where(tiny, magnitude * 2.0**24, magnitude).view(torch.int32)
    exponent = (bits >> 23) - 127 - 24 * tiny.to(torch.int32)
    return exponent, (bits & 0x7FFFFF).float() * 2.0**-23


def _exp(x: Tensor, table: Table) -> Tensor:
    """``2^n 2^f`` for ``n + f = x log2(e)``, rounded to fp32."""
    nan = x.isnan()
    power = (x * _LOG2E).masked_fill(nan, 0.0).clamp(-151, 129)  # beyond, the result is 0 or Inf already
    whole = power.floor()
    y = _looked_up((power - whole) * table.intervals, table)
    return torch.where(nan, x, _scaled(y, whole.to(torch.int32)))


def _reciprocal(x: Tensor, table: Table) -> Tensor:
    exponent, fraction = _parts(x)
    y = _looked_up(fraction * table.intervals, table)
    for _ in range(table.newton):
        y = y * (2 - (1 + fraction) * y)
    y = _scaled(y, -exponent).masked_fill(x.isinf(), 0.0).masked_fill(x == 0, torch.inf)
    return torch.where(x.isnan(), x, y.copysign(x))


def _rsqrt(x: Tensor, table: Table) -> Tensor:
    """``2^-k / sqrt(m)`` for ``x = 4^k m``, m in [1, 4)."""
    exponent, fraction = _parts(x)
    octave = (exponent & 1).float()
    y = _looked_up((octave + fraction) * (table.intervals // 2), table)
    half = 0.5 * ((1 + fraction) * (1 + octave))
    for _ in range(table.newton):
        y = y * (1.5 - half * y * y)
    y = _scaled(y, -(exponent >> 1)).masked_fill(x.isinf(), 0.0)
    y = torch.where(x == 0, torch.full_like(x, torch.inf).copysign(x), y)
    return y.masked_fill(x.isnan() | (x < 0), torch.nan)


def _limited(x: Tensor, table: Table) -> Tensor:
    """An odd function that is 1 from its limit on."""
    nan = x.isnan()
    position = (x.abs() * (table.intervals / LIMITS[table.function])).masked_fill(nan, 0.0)
    y = _looked_up(position.clamp(max=table.intervals), table)
    return torch.where(nan, x, y.copysign(x))


_LOG2E = 1 / math.log(2)  # torch's kernels round a number to the tensor's dtype


# ---- layers ---------------------------------------------------------------------------------------------------------


def _tree_sum(x: Tensor) -> Tensor:
    """Sums along the last axis, ``[..., 1]``: the second half is added to the first until one is left."""
    while (n := x.shape[-1]) > 1:
        low, high = x.split([n - n // 2, n // 2], dim=-1)
        x = low + torch.nn.functional.pad(high, (0, n % 2))
    return x


def _mean(x: Tensor) -> Tensor:
    return _tree_sum(x) / x.new_full((1,), x.shape[-1])  # by a number, CUDA would multiply with its reciprocal


def _check_axis(what: str, x: Tensor, axis: int) -> None:
    _check_dtype(what, x)
    if not -x.dim() <= axis < x.dim() or x.shape[axis] == 0:
        raise ConfigError(f"{what}: axis {axis} of shape {list(x.shape)} must exist and hold an element")


def softmax(x: Tensor, dim: int, approximation: str) -> Tensor:
    """``e / sum(e)`` for ``e = exp(x - max(x))`` along an axis.

    Args:
        x: float32, any shape; the axis must hold an element.
        dim: the axis.
        approximation: a table of ``exp``, and one of ``reciprocal`` for a product instead of the exact division.

    Raises:
        ConfigError: not float32, no such axis, a table that is missing or would have no effect.

    The sum is a tree of halves in fp32. The gradient is ``p (g - sum(g p))`` of the approximated p.

    >>> softmax(torch.tensor([0.0, 0.0, -torch.inf]), -1, "table(function='exp', index_bits=4)").tolist()
    [0.5, 0.5, 0.0]
    """
    _check("softmax", approximation, "exp", "reciprocal")
    _check_axis("softmax", x, dim)
    x = x.movedim(dim, -1)
    e = _evaluate(x - x.detach().amax(-1, keepdim=True), "exp", approximation)
    total = _tree_sum(e)
    p = e * _evaluate(total, "reciprocal", approximation) if "reciprocal" in approximation else e / total
    return p.movedim(-1, dim)


def rms_norm(x: Tensor, weight: Tensor | None, eps: float, offset: float, approximation: str) -> Tensor:
    """``x rsqrt(mean(x^2) + eps) (offset + weight)`` along the last axis.

    Args:
        x: float32, ``[..., n]``.
        weight: ``[n]``, widened to float32; None for no factor, ``offset`` then has no effect.
        eps: added to the mean.
        offset: 0, or 1 for models that store the weight less 1.
        approximation: a table of ``rsqrt``.

    Raises:
        ConfigError: not float32, an empty axis, a table that is missing or would have no effect.

    Source: RMSNorm (arXiv 1910.07467). The sum of the mean is a tree of halves in fp32.

    >>> rms_norm(torch.full((2,), 2.0), torch.ones(2), 0.0, 0, "table(function='rsqrt', index_bits=5)").tolist()
    [1.0, 1.0]
    """
    _check("rms_norm", approximation, "rsqrt")
    _check_axis("rms_norm", x, -1)
    y = x * _evaluate(_mean(x * x) + eps, "rsqrt", approximation)
    return y if weight is None else y * (offset + weight.float())


def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, approximation: str) -> Tensor:
    """``c rsqrt(mean(c^2) + eps) weight + bias`` for ``c = x - mean(x)`` along the last axis.

    Args:
        x: float32, ``[..., n]``.
        weight, bias: ``[n]``, widened to float32; None for none.
        eps: added to the variance.
        approximation: a table of ``rsqrt``.

    Raises:
        ConfigError: as for :func:`rms_norm`.

    Source: layer normalization (arXiv 1607.06450). Sums are trees of halves in fp32.

    >>> layer_norm(torch.tensor([1.0, 3.0]), None, None, 0.0, "table(function='rsqrt', index_bits=5)").tolist()
    [-1.0, 1.0]
    """
    _check("layer_norm", approximation, "rsqrt")
    _check_axis("layer_norm", x, -1)
    centred = x - _mean(x)
    y = centred * _evaluate(_mean(centred * centred) + eps, "rsqrt", approximation)
    y = y if weight is None else y * weight.float()
    return y if bias is None else y + bias.float()


def silu(x: Tensor, approximation: str) -> Tensor:
    """``x sigmoid(x)``, the sigmoid as for :func:`evaluate`.

    Args:
        x: float32, any shape.
        approximation: a table of ``exp``, and one of ``reciprocal`` instead of the exact division.

    Raises:
        ConfigError: not float32, a table that is missing or would have no effect.

    >>> silu(torch.tensor([0.0, 100.0]), "table(function='exp', index_bits=6)").tolist()
    [0.0, 100.0]
    """
    return x * evaluate(x, "sigmoid", approximation)


def gelu(x: Tensor, variant: str, approximation: str) -> Tensor:
    """``x / 2 (1 + erf(x / sqrt(2)))``, or with ``tanh(sqrt(2 / pi) (x + 0.044715 x^3))`` for the erf.

    Args:
        x: float32, any shape.
        variant: ``erf`` or ``tanh``.
        approximation: a table of the variant's function.

    Raises:
        ConfigError: not float32, a table that is missing or would have no effect.
        UnknownNameError: no such variant.

    Source: Gaussian error linear units (arXiv 1606.08415).

    >>> gelu(torch.tensor([0.0, -9.0, 9.0]), "erf", "table(function='erf', index_bits=8)").tolist()
    [0.0, -0.0, 9.0]
    """
    if variant not in ("erf", "tanh"):
        raise unknown("variant of gelu", variant, ("erf", "tanh"))
    _check(f"gelu of variant {variant!r}", approximation, variant)
    inner = x * 0.5**0.5 if variant == "erf" else (2 / math.pi) ** 0.5 * (x + 0.044715 * (x * x * x))
    return 0.5 * x * (1 + _evaluate(inner, variant, approximation))
