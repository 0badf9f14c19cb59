"""What a rewritten module's operations go through: first a recorder, then the emulated ops."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from aqnsim.emulation import approximate
from aqnsim.emulation.attention import PARTS, Attention, is_attention
from aqnsim.emulation.audit import Activations
from aqnsim.emulation.binding import Binding, autocasted
from aqnsim.emulation.rewriting import OPERATORS, TORCH, Operation

_OPERANDS = {"add": (0, 1), "multiply": (0, 1), "rope": (0, 1)}
"""Which arguments are operands, by kind of op; of other kinds the first."""

MATMULS = (operator.matmul, torch.matmul, torch.mm, torch.bmm)
"""Functions of two matrices, or batches of them."""


class Emulated(Protocol):
    """An operation that is emulated: called with what the forward calls, and the arguments."""

    @property
    def kind(self) -> str: ...

    @property
    def acts(self) -> bool: ...

    def __call__(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any: ...


def kind_of(operation: Operation, function: Any, args: tuple[Any, ...]) -> str | None:
    """The kind of op that a call is, now that its function and arguments are known; None for no op."""
    if isinstance(function, nn.Module):
        return None
    function = function.func if isinstance(function, functools.partial) else function
    kind = operation.kind
    if kind is None:
        if is_attention(function, args):
            return "attention"
        if getattr(function, "__module__", "").startswith("transformers.loss"):
            return "loss"
        kind = TORCH.get(function) if function.__hash__ is not None else None
    if kind in ("add", "multiply"):
        return kind if _joins([args[i] for i in _operands(kind, function) if i < len(args)]) else None
    if kind == "matmul" and function in OPERATORS:
        return kind if all(isinstance(t, Tensor) and t.is_floating_point() for t in args[:2]) else None
    return kind


def _operands(kind: str, function: Any) -> tuple[int, ...]:
    """Which arguments are operands."""
    return (0, 3) if function is torch.Tensor.index_add_ else _OPERANDS.get(kind, (0,))


def _joins(operands: list[Any]) -> bool:
    """Whether two tensors meet, of which one has rows, rather than one being scaled or shifted by a number."""
    are = [isinstance(x, Tensor) and x.is_floating_point() and x.numel() > 1 for x in operands]
    return len(are) == 2 and all(are) and max(x.dim() for x in operands) > 1


@dataclass(frozen=True)
class Found:
    """An operation that a forward really ran.

    Attributes:
        operation: where it stands.
        kind: of op; ``attention`` stands for its four.
        shapes: of its tensor arguments.
    """

    operation: Operation
    kind: str
    shapes: tuple[tuple[int, ...], ...]


@dataclass
class Recorder:
    """Runs a module's operations as they are, and notes which are ops that an activation enters."""

    module: nn.Module
    operations: tuple[Operation, ...]
    activations: Activations
    found: dict[int, Found] = field(default_factory=dict)

    is_off = False

    def kind_of(self, ordinal: int, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
        """The kind of op that a call is; None for no op, or one of constants."""
        operation = self.operations[ordinal]
        kind = kind_of(operation, function, args)
        if kind is None or not self.activations.enter(args, kwargs):
            return None
        multiplies = kind == "matmul" and function in MATMULS and operation.target in self.module._parameters
        return "linear" if multiplies else kind

    def call(self, ordinal: int, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        kind = self.kind_of(ordinal, function, args, kwargs)
        if kind is not None:
            shapes = tuple(tuple(a.shape) for a in (*args, *kwargs.values()) if isinstance(a, Tensor))
            self.found[ordinal] = Found(self.operations[ordinal], kind, shapes)
        return function(*args, **kwargs)


@dataclass
class Functions:
    """Runs a module's operations, the emulated ones as their sites say."""

    emulation: Any
    ops: dict[int, Emulated]

    def call(self, ordinal: int, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        op = self.ops.get(ordinal)
        if op is None or self.emulation.is_off:
            return function(*args, **kwargs)
        return op(function, args, kwargs)

    @property
    def is_off(self) -> bool:
        return bool(self.emulation.is_off)

    def acting_kind(self, ordinal: int) -> str | None:
        """The kind of an operation that is emulated now; None where it is not."""
        op = self.ops.get(ordinal)
        return op.kind if op is not None and op.acts else None

    def __deepcopy__(self, memo: dict[int, Any]) -> Functions:
        return self


def emulated(kind: str, bindings: dict[str, Binding]) -> Emulated:
    """The emulated op of a kind; ``attention`` takes a binding for each of its parts."""
    if kind == "attention":
        return Attention({part: bindings[part] for part in PARTS if part in bindings})
    run = {"linear": _linear, "matmul": _matmul, "conv": _conv, "loss": _loss}.get(kind, _elementwise)
    return _Op(run, bindings[kind])


@dataclass(frozen=True)
class _Op:
    run: Callable[..., Any]
    binding: Binding

    @property
    def kind(self) -> str:
        return self.binding.site.kind

    @property
    def acts(self) -> bool:
        return self.binding.acts

    def __call__(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not self.acts:
            return function(*args, **kwargs)
        return self.run(self.binding, function, args, kwargs)


def _elementwise(b: Binding, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Operands enter in fp32, torch computes, the result leaves. Other tensors, such as rotary tables, are fp32."""
    kind = b.site.kind
    if function is torch.Tensor.index_add_:
        return _index_add(b, *args)
    operands = _operands(kind, function)
    heads = "bhsd" if kind == "rope" else ""
    dtype = kwargs.get("dtype") or next(a.dtype for a in args if isinstance(a, Tensor) and a.is_floating_point())

    def entered(i: int, a: Any) -> Any:
        if not isinstance(a, Tensor) or not a.is_floating_point():
            return a
        if i not in operands:
            return a.float()
        return b.enter(a, operands.index(i), b.rows(a, heads) if a.dim() > 1 else None)  # a vector has no token

    if b.plan.approximation:
        function = approximate.of_function(function, b.plan.approximation)
    result = function(*(entered(i, a) for i, a in enumerate(args)), **{k: entered(-1, v) for k, v in kwargs.items()})
    if isinstance(result, tuple):
        return tuple(b.leave(y, dtype, i, b.rows(y, heads)) for i, y in enumerate(result))
    return b.leave(result, dtype, 0, b.rows(result, heads))


def _index_add(b: Binding, x: Tensor, dim: int, index: Tensor, source: Tensor) -> Tensor:
    """A sum into some rows of a tensor, in place."""
    before = x.index_select(dim, index)
    rows = b.rows(before)
    y = b.leave(b.enter(before, 0, rows) + b.enter(source, 1, rows), x.dtype, 0, rows)
    return x.index_copy_(dim, index, y)


def _linear(b: Binding, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    x, weight, bias = [*args, *([None] * 3)][:3]
    if function not in MATMULS:
        return b.linear(x, kwargs.get("weight", weight), kwargs.get("bias", bias))
    if weight.dim() == 2:
        return b.linear(x, weight.mT, None)
    return b.matmul(x, weight, False, x.dtype, b.rows(x))


_FACTORS = ("batch1", "batch2", "mat1", "mat2", "other")


def _conv(b: Binding, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A convolution: blocks of both operands run along the channels, the bias is added before the error."""
    given = {
        **dict(zip(("input", "weight", "bias", "stride", "padding", "dilation", "groups"), args, strict=False)),
        **kwargs,
    }
    x, weight, bias = given.pop("input"), given.pop("weight"), given.pop("bias", None)
    entered = b.enter(x.movedim(1, -1), 0, b.rows(x.movedim(1, -1))).movedim(-1, 1)
    w = b.enter_weight(weight.movedim(1, -1)).movedim(-1, 1)
    y = function(entered, w, None if bias is None else bias.float(), **given).movedim(1, -1)
    return b.leave(y, x.dtype, 0, b.rows(y)).movedim(-1, 1)


def _matmul(b: Binding, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A product that a module calls itself; operands of one dimension, sums and einsum are brought to that form."""
    if function is torch.einsum:
        return _einsum(b, args)
    scale, addend = kwargs.get("alpha", 1), None
    args = (*args, *(kwargs[name] for name in _FACTORS if name in kwargs))
    if function in (torch.addmm, torch.baddbmm):
        addend, *args = args  # type: ignore[assignment]
        addend = addend * kwargs.get("beta", 1) if kwargs.get("beta", 1) else None
    x, y = autocasted(*args[:2])
    y = y.expand(*torch.broadcast_shapes(x.shape[:-2], y.shape[:-2]), *y.shape[-2:]) if x.dim() > 2 else y
    product = (
        b.matmul(x, y, False, x.dtype, b.rows(x)) * scale if scale != 1 else b.matmul(x, y, False, x.dtype, b.rows(x))
    )
    return product if addend is None else addend + product


def _einsum(b: Binding, args: tuple[Any, ...]) -> Tensor:
    """A contraction of two operands as one batched product."""
    x, y = autocasted(*(args[1] if isinstance(args[1], list | tuple) else args[1:]))
    inputs, _, output = args[0].replace(" ", "").partition("->")
    left, right = inputs.split(",")
    batch = [i for i in left if i in right and i in output]
    summed = [i for i in left if i in right and i not in output]
    rows = [i for i in left if i not in right]
    columns = [i for i in right if i not in left]
    sizes = {**dict(zip(left, x.shape, strict=True)), **dict(zip(right, y.shape, strict=True))}

    def arranged(t: Tensor, own: str, *groups: list[str]) -> Tensor:
        t = t.permute([own.index(i) for group in groups for i in group])
        return t.reshape([int(torch.tensor([sizes[i] for i in group]).prod()) if group else 1 for group in groups])

    product = b.matmul(
        arranged(x, left, batch, rows, summed), arranged(y, right, batch, summed, columns), False, x.dtype
    )
    product = product.reshape([sizes[i] for i in (*batch, *rows, *columns)])
    return product.permute([(*batch, *rows, *columns).index(i) for i in output])


def _loss(b: Binding, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A log-softmax, emulated, or a loss on its result: the log-softmax of a log-softmax is itself."""
    name = "logits" if "logits" in kwargs else None
    logits = kwargs["logits"] if name else args[0]
    entered = b.enter(logits, 0, b.rows(logits))
    logs = b.leave(torch.log_softmax(entered, -1), torch.float32, 0, b.rows(logits))
    if function in (torch.nn.functional.log_softmax, torch.log_softmax):
        return logs.to(logits.dtype)
    return function(**{**kwargs, "logits": logs}) if name else function(logs, *args[1:], **kwargs)
