"""A module's own arithmetic, spelled so that the emulation sees it.

A forward computes more than its submodules do: ``residual + hidden``, ``act(gate) * up``, a call of F.linear or of an
attention function. ``rewritten`` compiles a copy of a forward in which each such operation is a call to
``self.aqnsim_functions``. It is ordinary Python in a subclass, so recompute, torch.compile and copies run it as they
run any forward. Nothing global is patched, and what the source does not say is not touched.

Helper functions of the same file are followed. Every operation has an ordinal, its place in the source.
"""

from __future__ import annotations

import ast
import inspect
import itertools
import linecache
import operator
import sys
import textwrap
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

FUNCTIONS = "aqnsim_functions"
"""The attribute of a rewritten module that its operations go through."""

TORCH: dict[Any, str] = {
    F.linear: "linear",
    torch.addmm: "matmul",
    torch.matmul: "matmul",
    torch.mm: "matmul",
    torch.bmm: "matmul",
    torch.baddbmm: "matmul",
    torch.einsum: "matmul",
    F.conv1d: "conv",
    F.embedding: "embedding",
    F.layer_norm: "norm",
    F.rms_norm: "norm",
    F.softmax: "softmax",
    torch.softmax: "softmax",
    F.log_softmax: "loss",
    torch.log_softmax: "loss",
    F.cross_entropy: "loss",
    F.silu: "activation",
    F.gelu: "activation",
    F.relu: "activation",
    F.softplus: "activation",
    F.sigmoid: "activation",
    torch.sigmoid: "activation",
    torch.tanh: "activation",
    torch.relu: "activation",
    F.scaled_dot_product_attention: "attention",
    torch.add: "add",
    torch.Tensor.index_add_: "add",
    torch.sub: "add",
    torch.mul: "multiply",
    torch.div: "multiply",
}
"""Functions of torch by the kind of op that they are."""

METHODS = {
    "matmul": torch.matmul,
    "mm": torch.mm,
    "bmm": torch.bmm,
    "addmm": torch.addmm,
    "baddbmm": torch.baddbmm,
    "index_add_": torch.Tensor.index_add_,
    "softmax": torch.softmax,
    "log_softmax": torch.log_softmax,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "relu": torch.relu,
    "add": torch.add,
    "sub": torch.sub,
    "mul": torch.mul,
    "div": torch.div,
}
"""Methods of a tensor that are such functions."""

_OPERATORS: dict[type[ast.operator], tuple[Callable[..., Any], str]] = {
    ast.Add: (operator.add, "add"),
    ast.Sub: (operator.sub, "add"),
    ast.Mult: (operator.mul, "multiply"),
    ast.Div: (operator.truediv, "multiply"),
    ast.MatMult: (operator.matmul, "matmul"),
}
_IN_PLACE: dict[type[ast.operator], Callable[..., Any]] = {
    ast.Add: operator.iadd,
    ast.Sub: operator.isub,
    ast.Mult: operator.imul,
    ast.Div: operator.itruediv,
    ast.MatMult: operator.imatmul,
}
OPERATORS = {**dict(_OPERATORS.values()), operator.imatmul: "matmul"}
"""The operators' functions by the kind of op that they are."""


@dataclass(frozen=True)
class Operation:
    """One operation in the source of a forward.

    Attributes:
        ordinal: its place.
        kind: of op; None where only the run can tell what is called.
        target: the parameter that a linear multiplies by, such as ``gate_up_proj``; else empty.
    """

    ordinal: int
    kind: str | None
    target: str = ""


@dataclass(frozen=True)
class Rewritten:
    """A forward whose operations go through :data:`FUNCTIONS`, and the operations."""

    forward: Callable[..., Any]
    operations: tuple[Operation, ...]


_CACHE: dict[type[nn.Module], Rewritten | None] = {}
_NUMBERS = itertools.count()


def rewritten(cls: type[nn.Module]) -> Rewritten | None:
    """The rewritten forward of a class, or None where it does no arithmetic of its own, or has no source."""
    if cls not in _CACHE:
        _CACHE[cls] = _rewrite_class(cls)
    return _CACHE[cls]


def _rewrite_class(cls: type[nn.Module]) -> Rewritten | None:
    function = cls.forward
    found: list[Operation] = []
    copy = _copy(function, cls, found, method=True)
    return Rewritten(copy, tuple(found)) if copy is not None and found else None


def _copy(
    function: Callable[..., Any], cls: type[nn.Module] | None, found: list[Operation], method: bool, depth: int = 0
) -> Any:
    """A compiled copy of a function; a helper (not ``method``) takes the functions as its first argument."""
    inner = inspect.unwrap(function)
    if not isinstance(inner, types.FunctionType):
        return None
    try:
        source = textwrap.dedent(inspect.getsource(inner))
        tree = ast.parse(source)
    except (OSError, SyntaxError, TypeError):  # no source, or a lambda in the middle of an expression
        return None
    definition = tree.body[0]
    if not isinstance(definition, ast.FunctionDef) or not definition.args.args:
        return None
    scope = dict(inner.__globals__)
    for name, cell in zip(inner.__code__.co_freevars, inner.__closure__ or (), strict=True):
        scope[name] = cell.cell_contents
    rewriter = _Rewriter(scope, cls, found, inner, depth)
    before = len(found)
    definition.body = [rewriter.visit(statement) for statement in definition.body]
    if len(found) == before:
        return None
    definition.decorator_list = [d for d in definition.decorator_list if "docstring" not in ast.unparse(d)]
    first = definition.args.args[0].arg
    own = ast.parse(f"{_NAME} = {first}.{FUNCTIONS}").body
    if method:
        definition.body[:0] = own
    else:
        definition.args.args.insert(0, ast.arg(_NAME))
        definition.decorator_list = []
    _strip_annotations(definition)
    return _compile(tree, definition.name, {**scope, **rewriter.helpers})


_NAME = "_aqnsim"


def _strip_annotations(definition: ast.FunctionDef) -> None:
    """Annotations are not needed to compute, and may name what only a type checker imports."""
    arguments = definition.args
    for a in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs, arguments.vararg, arguments.kwarg):
        if a is not None:
            a.annotation = None
    definition.returns = None


def _compile(tree: ast.Module, name: str, scope: dict[str, Any]) -> Any:
    """The function of a tree, in a module of its own: torch.compile looks globals up by the module's name."""
    text = ast.unparse(ast.fix_missing_locations(tree))
    module = types.ModuleType(f"aqnsim_rewritten_{next(_NUMBERS)}")
    file = f"<{module.__name__} {name}>"
    linecache.cache[file] = (len(text), None, text.splitlines(keepends=True), file)  # tracebacks show the source
    module.__dict__.update({**scope, "__name__": module.__name__})
    sys.modules[module.__name__] = module
    exec(compile(text, file, "exec"), module.__dict__)
    return module.__dict__[name]


class _Rewriter(ast.NodeTransformer):
    """Turns operations into calls; resolves names in the function's own globals."""

    def __init__(
        self, scope: dict[str, Any], cls: type[nn.Module] | None, found: list[Operation], function: Any, depth: int
    ) -> None:
        self.scope, self.cls, self.found, self.depth = scope, cls, found, depth
        self.module, self.locals = function.__module__, set(function.__code__.co_varnames)
        self.helpers: dict[str, Any] = {}

    def _through(
        self, kind: str | None, node: ast.expr, arguments: list[ast.expr], keywords: Any, target: str = ""
    ) -> Any:
        ordinal = len(self.found)
        self.found.append(Operation(ordinal, kind, target))
        function = ast.Attribute(ast.Name(_NAME, ast.Load()), "call", ast.Load())
        return ast.Call(function, [ast.Constant(ordinal), node, *arguments], keywords)

    def _constant(self, value: Any) -> ast.expr:
        name = f"{_NAME}_{len(self.helpers)}_{self.depth}"
        self.helpers[name] = value
        return ast.Name(name, ast.Load())

    def visit_BinOp(self, node: ast.BinOp) -> Any:
        self.generic_visit(node)
        if (
            type(node.op) not in _OPERATORS
            or isinstance(node.left, ast.Constant)
            or isinstance(node.right, ast.Constant)
        ):
            return node
        function, kind = _OPERATORS[type(node.op)]
        target = _own_attribute(node.right)
        return self._through(kind, self._constant(function), [node.left, node.right], [], target)

    def visit_AugAssign(self, node: ast.AugAssign) -> Any:
        self.generic_visit(node)
        if (
            type(node.op) not in _OPERATORS
            or not isinstance(node.target, ast.Name)
            or isinstance(node.value, ast.Constant)
        ):
            return node
        function, kind = _IN_PLACE[type(node.op)], _OPERATORS[type(node.op)][1]
        left = ast.Name(node.target.id, ast.Load())
        return ast.Assign(
            [node.target], self._through(kind, self._constant(function), [left, node.value], []), lineno=0
        )

    def visit_Call(self, node: ast.Call) -> Any:
        self.generic_visit(node)
        function: Any = self._resolve(node.func)
        if function is super and not node.args:  # its implicit class is lost in a copy
            return ast.Call(node.func, [self._constant(self.scope["__class__"]), ast.Name("self", ast.Load())], [])
        if function is _UNKNOWN:
            return self._unknown(node)
        if callable(function) and _hashable(function) and function in TORCH:
            return self._through(TORCH[function], node.func, node.args, node.keywords, _target(node))
        if _is_rope(function):
            return self._through("rope", node.func, node.args, node.keywords)
        if self._is_helper(function):
            return self._followed(node, function, None, node.args)
        return node

    def _is_helper(self, function: Any) -> bool:
        """Whether a function stands in the same file, so that following it is following the model's own code."""
        return isinstance(function, types.FunctionType) and function.__module__ == self.module and self.depth < 8

    def _unknown(self, node: ast.Call) -> Any:
        """A call of something that only the run knows: a local name, a method, an attribute of the module."""
        if isinstance(node.func, ast.Name):
            return self._through(None, node.func, node.args, node.keywords)
        if not isinstance(node.func, ast.Attribute):
            return node
        if isinstance(node.func.value, ast.Name) and node.func.value.id == "self" and self.cls is not None:
            member = inspect.getattr_static(self.cls, node.func.attr, None)
            if self._is_helper(member):
                return self._followed(node, member, self.cls, [node.func.value, *node.args])
            if member is None or isinstance(member, property):
                return self._through(None, node.func, node.args, node.keywords)
            return node
        if node.func.attr in METHODS:
            function = METHODS[node.func.attr]
            arguments = [node.func.value, *node.args]
            return self._through(TORCH[function], self._constant(function), arguments, node.keywords)
        return node

    def _followed(self, node: ast.Call, function: Any, cls: type[nn.Module] | None, arguments: list[ast.expr]) -> Any:
        """A call of the helper's rewritten copy, if the helper computes anything."""
        copy = _copy(function, cls, self.found, method=False, depth=self.depth + 1)
        if copy is None:
            return node
        return ast.Call(self._constant(copy), [ast.Name(_NAME, ast.Load()), *arguments], node.keywords)

    def _resolve(self, node: ast.expr) -> Any:
        """What a name or a dotted path stands for in the function's globals."""
        if isinstance(node, ast.Name):
            if node.id in self.locals:
                return _UNKNOWN
            if node.id in self.scope:
                return self.scope[node.id]
            builtins = self.scope.get("__builtins__", {})
            builtins = builtins if isinstance(builtins, dict) else vars(builtins)
            return builtins.get(node.id, _UNKNOWN)
        if isinstance(node, ast.Attribute):
            owner = self._resolve(node.value)
            if isinstance(owner, types.ModuleType | type):
                return getattr(owner, node.attr, _UNKNOWN)
        return _UNKNOWN


_UNKNOWN = object()


def _hashable(value: Any) -> bool:
    return value.__hash__ is not None


def _is_rope(function: Any) -> bool:
    """Whether a function is a rotary position embedding of queries and keys, by the convention of its name."""
    name = getattr(function, "__name__", "")
    return callable(function) and "rotary" in name and "apply" in name and not isinstance(function, type)


def _target(node: ast.Call) -> str:
    """The attribute of ``self`` that a product multiplies by."""
    keyword = next((k.value for k in node.keywords if k.arg == "weight"), None)
    weight = keyword if keyword is not None else (node.args[1] if len(node.args) > 1 else None)
    return _own_attribute(weight)


def _own_attribute(node: ast.expr | None) -> str:
    """The attribute of ``self`` that an expression reads: of ``self.w`` or ``self.w[i]``, ``w``; else empty."""
    while isinstance(node, ast.Subscript):
        node = node.value
    is_own = isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "self"
    return node.attr if is_own else ""  # type: ignore[union-attr]
