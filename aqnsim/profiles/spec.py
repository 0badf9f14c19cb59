"""OpSpec: what one op does, in the forward and for each gradient on its own. The standard library only."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from aqnsim import accumulator, approximation, errors, formats
from aqnsim._errors import ConfigError, did_you_mean

GEMMS = ("linear", "matmul", "qk", "pv")
"""Kinds of op that multiply matrices: two operands, an accumulator, three products in a training step."""

ELEMENTWISE = (
    "embedding",
    "norm",
    "rope",
    "kv_cache",
    "softmax",
    "activation",
    "multiply",
    "add",
    "conv",
    "loss",
)
"""Kinds of op that compute in fp32 on operands that enter, and whose result leaves through the error and a cast."""

KINDS = (*GEMMS, *ELEMENTWISE)
"""Kinds of site that a rule can match."""

BIASES = ("exact", "missed")


@lru_cache(maxsize=1024)
def operand(text: str) -> tuple[str, errors.BitFlip | None]:
    """The format of a text such as ``mxfp4`` or ``mxfp4 + bit-flip(rate=1e-6, target=codes)``, and the fault in it.

    Raises:
        ConfigError: what stands after the format is not one flip of its codes or scales.
        UnknownNameError: no such format or error model.

    >>> operand("mxfp4"), operand("hif8 + bit-flip(rate=0.5, target=codes)")[1].rate
    (('mxfp4', None), 0.5)
    """
    name, plus, fault = text.partition(" + ")
    fmt = str(formats.get(name.strip()))
    if not plus:
        return fmt, None
    model = errors.parse(fault)
    if not isinstance(model, errors.BitFlip) or model.target == "value":
        raise ConfigError(
            f"operand {text!r}: after a format stands a bit-flip with target=codes or target=scales, got {fault!r}; "
            "other errors act on results"
        )
    return fmt, model


def operand_draws(text: str) -> bool:
    """Whether an operand's cast draws random numbers: its rounding is stochastic or it has a fault."""
    fmt, fault = operand(text)
    return fault is not None or bool(formats.random_bits(formats.get(fmt)))


def _canonical_operand(text: Any, where: str) -> str | None:
    """One text for one format and fault, so that two spellings of it have the same fingerprint."""
    if text is None:
        return None
    if not isinstance(text, str):
        raise ConfigError(f"{where}: expected the name of a format, got {text!r}")
    fmt, fault = operand(text)
    return fmt if fault is None else f"{fmt} + {fault}"


def _canonical_error(text: Any, where: str) -> str | None:
    """One text for one chain of error models, so that ``5e-2`` and ``0.05`` have the same fingerprint."""
    if text is None:
        return None
    if not isinstance(text, str):
        raise ConfigError(f"{where}: expected an error model's text, got {text!r}")
    return errors.chain_text(errors.chain(text))


def _canonical_accumulator(text: Any, where: str) -> str | None:
    """The accumulator itself, whether it was given by a unit's name or field by field."""
    if text is None:
        return None
    if not isinstance(text, str):
        raise ConfigError(f"{where}: expected a matrix unit or an accumulator's text, got {text!r}")
    return str(accumulator.get(text))


def _canonical_approximation(text: Any, where: str) -> str | None:
    """The tables' canonical text."""
    if text is None:
        return None
    if not isinstance(text, str):
        raise ConfigError(f"{where}: expected the text of tables, got {text!r}")
    return str(approximation.parse(text))


_CANONICAL = {
    "input": _canonical_operand,
    "weight": _canonical_operand,
    "grad": _canonical_operand,
    "output": _canonical_operand,
    "error": _canonical_error,
    "accumulator": _canonical_accumulator,
    "approximation": _canonical_approximation,
}


class _Part:
    """One direction of an op; its texts are made canonical when it is made."""

    def __post_init__(self) -> None:
        for f in dataclasses.fields(self):  # type: ignore[arg-type]
            if f.name in _CANONICAL:
                value = _CANONICAL[f.name](getattr(self, f.name), f"{type(self).__name__}.{f.name}")
                object.__setattr__(self, f.name, value)

    @property
    def asked(self) -> dict[str, Any]:
        """The fields that ask for something, by name."""
        fields = dataclasses.fields(self)  # type: ignore[arg-type]
        return {f.name: getattr(self, f.name) for f in fields if getattr(self, f.name) != f.default}


@dataclass(frozen=True, kw_only=True)
class Forward(_Part):
    """``y = cast(input) @ cast(weight)^T``, then the error in fp32, then the bias, then the cast of the output.

    ``None`` leaves an operand or the result as torch makes it. Blocks of operands run along the contraction.

    Attributes:
        input: format of the first operand; of every operand of an elementwise op, with blocks along its last axis.
            After a format, `` + bit-flip(...)`` flips bits of its codes or scales; so for every format below.
        weight: format of the second operand: a weight, the keys of ``qk``, the values of ``pv``.
        accumulator: how the products are added, a name of :data:`aqnsim.accumulator.MATRIX_UNITS` or an accumulator's
            text; None adds as torch does, in fp32.
        approximation: tables that the op's elementary functions are read from, see :mod:`aqnsim.approximation`: of
            ``exp`` for softmax and SiLU (and ``reciprocal``), ``rsqrt`` for norms, ``erf`` or ``tanh`` for GELU.
        error: the error model.
        output: format of the result, with blocks along its last axis.
        bias: ``exact`` adds the bias of a linear layer after the error, ``missed`` before it.
    """

    input: str | None = None
    weight: str | None = None
    accumulator: str | None = None
    approximation: str | None = None
    error: str | None = None
    output: str | None = None
    bias: str = "exact"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.bias not in BIASES:
            raise ConfigError(f"Forward.bias: expected one of {', '.join(BIASES)}, got {self.bias!r}")


@dataclass(frozen=True, kw_only=True)
class _Gradient(_Part):
    """The product that makes one gradient.

    Attributes:
        grad: format of the incoming gradient, as an operand of this product.
        accumulator: as in :class:`Forward`.
        error: the error model, in fp32.
        output: format of the gradient that comes out, with blocks along its last axis.
        hadamard: size of a random Hadamard transform along the contraction of both operands, before their casts.
    """

    grad: str | None = None
    accumulator: str | None = None
    error: str | None = None
    output: str | None = None
    hadamard: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.hadamard is not None and self.hadamard not in (16, 32, 64, 128):
            raise ConfigError(f"{type(self).__name__}.hadamard: expected 16, 32, 64 or 128, got {self.hadamard!r}")


@dataclass(frozen=True, kw_only=True)
class GradInput(_Gradient):
    """The gradient of the first operand, ``cast(grad) @ weight``.

    Attributes:
        weight: format of the second operand in this product, with blocks along *its* contraction; None takes the
            operand that the forward had cast (straight-through).
    """

    weight: str | None = None

    @property
    def other(self) -> str | None:
        """Format of the operand beside the gradient."""
        return self.weight


@dataclass(frozen=True, kw_only=True)
class GradWeight(_Gradient):
    """The gradient of the second operand, ``cast(grad)^T @ input``.

    Attributes:
        input: format of the first operand in this product, with blocks along *its* contraction, the tokens; None takes
            the operand that the forward had cast (straight-through).
    """

    input: str | None = None

    @property
    def other(self) -> str | None:
        """Format of the operand beside the gradient."""
        return self.input


PARTS: dict[str, type[Any]] = {"forward": Forward, "grad_input": GradInput, "grad_weight": GradWeight}
"""The directions of an op."""

_FROM_TABLES: dict[str, tuple[str, ...]] = {
    "softmax": ("exp", "reciprocal"),
    "norm": ("rsqrt",),
    "activation": (),  # which function an activation is, the model says
}
"""Kinds of op that are computed from tables, and of what."""


def fields_of(kind: str) -> dict[str, tuple[str, ...]]:
    """What an op of a kind may be asked for, direction by direction.

    >>> fields_of("embedding")
    {'forward': ('error', 'output'), 'grad_input': ('grad',), 'grad_weight': ()}
    """
    if kind in GEMMS:
        of_tables = ("approximation",)
        return {n: tuple(f.name for f in dataclasses.fields(c) if f.name not in of_tables) for n, c in PARTS.items()}
    if kind == "embedding":  # a look-up has no operand to cast, and its table's gradient is the one that comes in
        return {"forward": ("error", "output"), "grad_input": ("grad",), "grad_weight": ()}
    tables = ("approximation",) if kind in _FROM_TABLES else ()
    weight = ("weight",) if kind == "conv" else ()
    return {
        "forward": ("input", *weight, *tables, "error", "output"),
        "grad_input": ("grad", "error", "output"),
        "grad_weight": ("error", "output") if kind in ("norm", "conv") else (),
    }


@dataclass(frozen=True, kw_only=True)
class OpSpec:
    """What one op does, forward and for each gradient on its own."""

    forward: Forward = Forward()
    grad_input: GradInput = GradInput()
    grad_weight: GradWeight = GradWeight()

    @property
    def text(self) -> str:
        """Canonical JSON: what ops take as an argument."""
        return json.dumps(plain(self), sort_keys=True, separators=(",", ":"))

    @staticmethod
    @lru_cache(maxsize=1024)
    def parse(text: str) -> OpSpec:
        """The spec of a canonical text."""
        spec: OpSpec = build(OpSpec, json.loads(text), "spec")
        return spec

    @property
    def parts(self) -> Iterator[tuple[str, Any]]:
        """Each direction with its name."""
        return ((name, getattr(self, name)) for name in PARTS)

    @property
    def is_empty(self) -> bool:
        """Whether the op runs as torch makes it."""
        return not any(part.asked for _, part in self.parts)

    @property
    def only_weight(self) -> bool:
        """Whether the forward's cast of the second operand is all that is asked."""
        return self == OpSpec(forward=Forward(weight=self.forward.weight)) and not self.is_empty

    @property
    def has_error(self) -> bool:
        """Whether any of the three results misses."""
        return any(part.error for _, part in self.parts)

    @property
    def draws(self) -> bool:
        """Whether anything random enters: an error, a stochastic rounding or a fault."""
        return self.has_error or any(operand_draws(text) for text in self._operands)

    @property
    def formats(self) -> list[str]:
        """Every format that is named, sorted."""
        return sorted({operand(text)[0] for text in self._operands})

    @property
    def _operands(self) -> set[str]:
        fields = ((k, v) for _, part in self.parts for k, v in part.asked.items())
        return {v for k, v in fields if _CANONICAL.get(k) is _canonical_operand}

    def check(self, kind: str, where: str) -> None:
        """Refuse what an op of a kind has not got.

        Raises:
            ConfigError: such as a weight format for a softmax.
        """
        for name, allowed in fields_of(kind).items():
            for key in getattr(self, name).asked:
                if key not in allowed:
                    raise ConfigError(
                        f"{where}: {name}.{key} means nothing for an op of kind {kind!r}; "
                        f"there it may have: {', '.join(allowed) or 'nothing'}"
                    )
        if self.forward.approximation is not None and _FROM_TABLES[kind]:
            approximation.parse(self.forward.approximation).check(f"{where}: a {kind}", *_FROM_TABLES[kind])


def plain(value: Any) -> Any:
    """Dataclasses as dicts without the fields that ask for nothing."""
    if isinstance(value, _Part):
        return value.asked
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        items = ((f.name, plain(getattr(value, f.name))) for f in dataclasses.fields(value))
        return {k: v for k, v in items if v not in (None, {})}
    return list(value) if isinstance(value, tuple) else value


def build(cls: type[Any], table: Any, where: str) -> Any:
    """A dataclass from a table, unknown keys rejected.

    Raises:
        ConfigError: no table, a key missing or unknown.
    """
    if not isinstance(table, dict):
        raise ConfigError(f"{where}: expected a table, got {table!r}")
    check_keys(table, [f.name for f in dataclasses.fields(cls)], where)
    nested = {}
    if cls is OpSpec:
        nested = {k: build(c, table[k], f"{where}.{k}") for k, c in PARTS.items() if k in table}
    try:
        return cls(**{**table, **nested})
    except TypeError as error:
        raise ConfigError(f"{where}: {error}") from error


def check_keys(table: dict[str, Any], known: list[str], where: str) -> None:
    """Refuse keys that are not known.

    Raises:
        ConfigError: an unknown key; the message names the closest.
    """
    for key in table:
        if key not in known:
            raise ConfigError(f"{where}: unknown key {key!r}{did_you_mean(key, known)}; known: {', '.join(known)}")
