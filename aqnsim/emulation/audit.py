"""What a forward really runs: every op that torch dispatches, with the module or operation that it belongs to.

The audit knows nothing of profiles. It is the second source beside the candidates: an op that it sees and that no
candidate claims cannot be emulated.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from math import prod
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from aqnsim.emulation.attention import PARTS
from aqnsim.emulation.rewriting import FUNCTIONS
from aqnsim.emulation.sites import EXPERTS

_KINDS = {
    "softmax": ("_softmax", "_safe_softmax"),
    "loss": ("_log_softmax", "nll_loss_forward"),
    "activation": (
        *("silu", "gelu", "relu", "sigmoid", "tanh", "softplus", "elu", "leaky_relu", "hardswish", "hardtanh", "mish"),
        *("erf", "log_sigmoid_forward", "hardsigmoid", "relu6", "celu", "prelu", "glu"),
    ),
    "norm": ("native_layer_norm", "native_group_norm", "_fused_rms_norm", "rsqrt"),
    "embedding": ("embedding", "_embedding_bag"),
    "add": ("add", "sub", "rsub", "index_add"),
    "multiply": ("mul", "div"),
    "conv": ("convolution",),
}
_KIND_OF = {name: kind for kind, names in _KINDS.items() for name in names}
_BINARY = ("add", "multiply")
_EXACT = (
    *("clone", "copy", "_to_copy", "cat", "stack", "repeat", "_unsafe_view", "constant_pad_nd", "roll", "flip", "fill"),
    *("index", "index_select", "index_put", "index_copy", "gather", "scatter", "select_scatter", "slice_scatter"),
    *("where", "masked_fill", "masked_scatter", "tril", "triu", "topk", "sort", "clamp", "max", "min", "amax", "amin"),
    *("maximum", "minimum", "neg", "abs", "zero", "zeros_like", "ones_like", "full_like", "empty_like", "new_zeros"),
    *("new_ones", "new_full", "new_empty", "repeat_interleave", "bernoulli", "native_dropout", "lift_fresh", "one_hot"),
)
"""Ops that move, choose or negate values, and so cannot miss."""
_LIKE_PRODUCTS = ("mm", "matmul", "linear", "conv", "attention", "lstm", "gru", "rnn")
"""Parts of the names of ops that multiply matrices in ways that no FLOPs are known for."""
_GEMMS = ("linear", "matmul", "attention", "experts", "conv")
"""Kinds of scope in which a product of matrices is expected."""


class Key(NamedTuple):
    """An op of a module: its operation's ordinal, if its forward runs it, and which of several products it is."""

    module: nn.Module
    ordinal: int | None = None
    part: str = ""


@dataclass
class Work:
    """What an op did in one forward.

    Attributes:
        calls: of the op, or of torch's op where nothing else is known.
        flops: of products of matrices, 2 for each multiply-add.
        elements: of results.
        shape: of what the op got, first.
        names: torch's ops.
    """

    calls: int = 0
    flops: int = 0
    elements: int = 0
    shape: tuple[int, ...] = ()
    names: set[str] = field(default_factory=set)


@dataclass
class _Scope:
    """What is running: a module, or an operation of its own forward; ``kind`` is None where that is no op."""

    module: nn.Module
    ordinal: int | None
    kind: str | None
    products: int = 0


KindOf = Callable[[Any, int, Any, tuple[Any, ...], dict[str, Any]], str | None]
"""The kind of op of a call: of a rewritten module's functions, an ordinal, what is called and its arguments."""

Loose = tuple[nn.Module, str]
"""A module and a kind of op that ran in its forward, outside of any known op."""


class Activations(TorchDispatchMode):
    """Follows what is computed from the inputs of a forward: activations, in contrast to tables that a model makes.

    Memory is followed, not tensors: a table that an activation is written into, through whichever view, holds one.

    Args:
        inputs: keyword arguments of the forward.
    """

    def __init__(self, inputs: Mapping[str, Any]) -> None:
        super().__init__()
        self._known: dict[int, StorageWeakRef] = {}  # by address, which is not used again while a reference is held
        self._mark(_tensors(inputs))

    def enter(self, *values: Any) -> bool:
        """Whether an activation is among some values, such as the arguments of a call."""
        return any(t.untyped_storage()._cdata in self._known for t in _tensors(values))

    def _mark(self, tensors: list[Tensor]) -> None:
        for t in tensors:
            reference = StorageWeakRef(t.untyped_storage())
            self._known[reference.cdata] = reference

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        entered = self.enter(args, kwargs)
        if entered:
            self._mark(_tensors(result))
        if not func.is_view:
            self.ran(func._schema.name, args, kwargs or {}, result, entered)
        return result

    def ran(self, name: str, args: Any, kwargs: Any, result: Any, entered: bool) -> None:
        """Note an op of torch that is no view; ``entered`` says whether an activation was among its operands."""


class Audit(Activations):
    """Counts the ops of a forward.

    Args:
        inputs: keyword arguments of the forward.
        kinds: of the modules that are an op as a whole; ``experts`` for those of a mixture.

    Attributes:
        work: of known ops, run by torch.
        emulated: of known ops, run by torch.ops.aqnsim; products only.
        loose: of no known op, though an activation entered.
        constant: of no known op, and no activation entered: tables that the model makes.
        other: calls of arithmetic outside any op for which there is no kind.

    An op of another library than torch, or a product of matrices that is none of the usual ones, has the kind
    ``unknown``.
    """

    def __init__(self, inputs: Mapping[str, Any], kinds: Mapping[nn.Module, str]) -> None:
        super().__init__(inputs)
        self.kinds = kinds
        self.work: dict[Key, Work] = {}
        self.emulated: dict[Key, Work] = {}
        self.loose: dict[Loose, Work] = {}
        self.constant: dict[Loose, Work] = {}
        self.other: dict[str, int] = {}
        self._scopes: list[_Scope] = []

    # ---- scopes ------------------------------------------------------------------------------------------------------

    @contextmanager
    def listening(
        self,
        model: nn.Module,
        kind_of: KindOf,
    ) -> Iterator[None]:
        """Listen to every module, and to the operations of every rewritten one.

        Args:
            kind_of: None for no op.
        """
        with ExitStack() as stack:
            for module in model.modules():
                enter = module.register_forward_pre_hook(self._enter_module, with_kwargs=True, prepend=True)
                leave = module.register_forward_hook(self._leave_module, always_call=True)
                stack.callback(enter.remove)
                stack.callback(leave.remove)
                if FUNCTIONS in module.__dict__:
                    functions = module.__dict__[FUNCTIONS]
                    stack.callback(module.__dict__.__setitem__, FUNCTIONS, functions)
                    module.__dict__[FUNCTIONS] = _Heard(self, module, functions, kind_of)
            stack.enter_context(self)
            yield

    def _enter_module(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.begin(module, None, self.kinds.get(module), (*args, *kwargs.values()))

    def _leave_module(self, module: nn.Module, args: tuple[Any, ...], result: Any) -> None:
        self.end(result)

    def begin(self, module: nn.Module, ordinal: int | None, kind: str | None, args: tuple[Any, ...]) -> None:
        self._scopes.append(_Scope(module, ordinal, kind))
        if kind is None:
            return
        if kind == "attention":
            self._note_attention(Key(module, ordinal), _tensors(args))
            return
        shape = next((tuple(a.shape) for a in args if isinstance(a, Tensor)), ())
        work = self.work.setdefault(Key(module, ordinal), Work(shape=shape))
        work.calls += 1

    def end(self, result: Any) -> None:
        scope = self._scopes.pop()
        if scope.kind not in (None, "attention"):
            results = result if isinstance(result, tuple) else (result,)
            work = self.work[Key(scope.module, scope.ordinal)]
            work.elements += sum(t.numel() for t in results if isinstance(t, Tensor))

    def _note_attention(self, key: Key, tensors: list[Tensor]) -> None:
        """The work of an attention's ops, from the shapes of query, key and value ``[batch, heads, length, width]``."""
        query, keys, values = tensors[:3]
        scores = prod(query.shape[:-1]) * keys.shape[-2]
        sizes = (keys.numel() + values.numel(), scores, scores, prod(query.shape[:-1]) * values.shape[-1])
        for part, elements in zip(PARTS, sizes, strict=True):
            shape = tuple(keys.shape) if part == "kv_cache" else tuple(query.shape)
            work = self.work.setdefault(key._replace(part=part), Work(shape=shape))
            work.calls += 1
            work.elements += elements

    def _op(self) -> _Scope | None:
        """The innermost op that is running."""
        return next((s for s in reversed(self._scopes) if s.kind is not None), None)

    # ---- ops ---------------------------------------------------------------------------------------------------------

    def ran(self, name: str, args: Any, kwargs: Any, result: Any, entered: bool) -> None:
        name, results = name.removeprefix("aten::").rstrip("_"), _tensors(result)
        flops = flops_of(name, args, results)
        if flops:
            self._product(name, flops, args, results, entered)
        elif self._op() is None:
            self._elementwise(name, _tensors((args, kwargs)), results, entered)

    def _product(self, name: str, flops: list[int], args: Any, results: list[Tensor], entered: bool) -> None:
        scope, module = self._op(), self._scopes[-1].module
        if not entered:
            _count(self.constant, (module, "matmul"), name, sum(flops), results)
        elif scope is None or scope.kind not in _GEMMS:
            _count(self.loose, (module, "matmul"), name, sum(flops), results)
        else:
            found = self.emulated if name.startswith("aqnsim") else self.work
            for flop in flops:
                key = Key(scope.module, scope.ordinal, self._part(scope, name, args))
                _count(found, key, name, flop, [])

    def _part(self, scope: _Scope, name: str, args: Any) -> str:
        """Which of an op's products this is: the first and second of an attention, the weights of experts."""
        if scope.kind == "attention":
            scope.products += 1
            return "qk" if scope.products % 2 else "pv"
        if scope.kind != "experts":
            return ""
        a, b = args[:2]
        outputs = b.shape[0] if name == "aqnsim::linear" else b.shape[-1]
        if name == "bmm" and outputs == 1:  # a weight for each token, times the token
            outputs = a.shape[-2]
        sizes = {n: set(scope.module.get_parameter(n).shape[1:]) for n in EXPERTS}
        return next((n for n, size in sizes.items() if size == {outputs, a.shape[-1]}), "")

    def _elementwise(self, name: str, tensors: list[Tensor], results: list[Tensor], entered: bool) -> None:
        if not self._scopes or not any(t.is_floating_point() for t in results):
            return
        kind = _KIND_OF.get(name)
        if kind in _BINARY and not _joins(tensors):
            return
        if kind is None and ("::" in name or any(part in name for part in _LIKE_PRODUCTS)):
            kind = "unknown"
        if kind is not None:
            _count(self.loose if entered else self.constant, (self._scopes[-1].module, kind), name, 0, results)
        elif entered and name not in _EXACT:
            self.other[name] = self.other.get(name, 0) + 1


def _count(found: dict[Any, Work], key: Any, name: str, flops: int, results: list[Tensor]) -> None:
    work = found.setdefault(key, Work())
    work.calls += 1
    work.flops += flops
    work.elements += results[0].numel() if results else 0
    work.names.add(name)


def _joins(tensors: list[Tensor]) -> bool:
    """Whether two operands meet, rather than one being scaled or shifted by a number."""
    return sum(t.is_floating_point() and t.numel() > 1 for t in tensors) > 1


def _tensors(value: Any) -> list[Tensor]:
    return [t for t in tree_leaves(value) if isinstance(t, Tensor)]


@dataclass(frozen=True)
class _Heard:
    """A rewritten module's functions, with the audit told where each operation begins and ends."""

    audit: Audit
    module: nn.Module
    functions: Any
    kind_of: KindOf

    @property
    def is_off(self) -> bool:
        return bool(self.functions.is_off)

    def call(self, ordinal: int, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        kind = self.kind_of(self.functions, ordinal, function, args, kwargs)
        result = None
        self.audit.begin(self.module, ordinal, kind, (*args, *kwargs.values()))
        try:
            result = self.functions.call(ordinal, function, *args, **kwargs)
        finally:
            self.audit.end(result)
        return result


# ---- how many ------------------------------------------------------------------------------------------------------


def flops_of(name: str, args: Any, results: list[Tensor]) -> list[int]:
    """The floating-point operations of a product of matrices, 2 for each multiply-add; empty for any other op.

    Attention that torch runs as one op has two: those of the scores and those of the weighted values, all of them,
    whatever a mask hides.

    >>> import torch
    >>> flops_of("mm", (torch.ones(2, 3), torch.ones(3, 5)), [torch.ones(2, 5)])
    [60]
    """
    if "scaled_dot_product" in name or name in ("_efficient_attention_forward", "_flash_attention_forward"):
        query, key, value = args[:3]
        scores = prod(query.shape[:-1]) * key.shape[-2]
        return [2 * scores * query.shape[-1], 2 * scores * value.shape[-1]]
    if name in ("mv", "dot"):
        return [2 * args[0].numel()]
    if name == "addmv":
        return [2 * args[1].numel()]
    if name in ("mm", "bmm", "_grouped_mm", "transformers::grouped_mm_fallback"):
        return [2 * args[0].numel() * args[1].shape[-1]]
    if name in ("addmm", "baddbmm", "addbmm"):
        return [2 * args[1].numel() * args[2].shape[-1]]
    if name == "convolution":
        return [2 * results[0].numel() * prod(args[1].shape[1:])]
    if name in ("aqnsim::linear", "aqnsim::matmul"):
        return [2 * results[0].numel() * args[0].shape[-1]]
    return []
