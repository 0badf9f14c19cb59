"""How a matrix unit adds up products: the accumulator of a GEMM. The standard library only.

An accumulator is a frozen dataclass with a canonical text, and the units of real devices are a table of them:

>>> str(Accumulator(fraction_bits=13, chunk=32, result_bits=13))
'accumulator(fraction_bits=13, chunk=32, result_bits=13)'
>>> get("hopper_fp8") == Accumulator(fraction_bits=13, chunk=32, result_bits=13)
True

The formulas stand in docs/semantics.md, their executable form in :mod:`aqnsim.reference.accumulate`.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from types import MappingProxyType
from typing import Any

from aqnsim._errors import ConfigError, unknown

ORDERS = ("fused", "products-first", "even-odd", "pairwise")
"""In which order a chunk's products and the running sum are added, see :class:`Accumulator`."""

ROUNDINGS = ("truncate", "nearest-even")

HOST = "host"
"""What op ``gemm`` takes in place of an accumulator's text: fp32 sums as the host makes them. No profile asks for it by
name: it is what a product without an accumulator is."""

_CHOICES = {
    "order": ORDERS,
    "rounding": ROUNDINGS,
    "result_rounding": ROUNDINGS,
    "subnormals": ("keep", "flush"),
}
_LARGEST_CHUNK = 256
# Sums of a chunk must be exact in the 53 bits of a double: a product is below 2^2 times its unit's exponent. What is
# added after the products is cut 7 bits lower, and floors need a bit and a sign to spare.
_WIDEST = {"fused": 51, "products-first": 42, "even-odd": 42, "pairwise": 51}


@dataclass(frozen=True)
class Accumulator:
    """How a matrix unit adds the K products of an output to its running sum, ``chunk`` products at a time.

    Attributes:
        fraction_bits: bits that are kept below the largest exponent of a chunk; all below is cut off before adding.
        chunk: products that are added at a time, 1..256; a power of two for ``order="pairwise"``.
        order: ``fused``: products and running sum are aligned and added at once; ``products-first``: the products are,
            and then their sum and the running sum, both rounded down; ``even-odd``: the same with the products at even
            and odd places added apart; ``pairwise``: in fp32, as a tree of IEEE additions.
        rounding: how a summand is cut: ``truncate`` toward zero, or ``nearest-even``.
        result_bits: fraction bits of a chunk's result, 1..23.
        result_rounding: how it becomes them: ``truncate`` or ``nearest-even``.
        subnormals: ``keep``, or ``flush``: operands below ``2^min_exponent`` and results below 2^-126 count as 0.
        min_exponent: smallest exponent of the operands' format; smaller operands are aligned as if they had it. -126
            for scaled operands, whose scale hides which were subnormal.
        promote: after so many products the running sum is added to an IEEE fp32 sum and starts anew; 0: never.

    Raises:
        ConfigError: a value out of range, or values that do not go together.

    >>> Accumulator(fraction_bits=25, chunk=16).promote
    0
    """

    fraction_bits: int
    chunk: int
    order: str = "fused"
    rounding: str = "truncate"
    result_bits: int = 23
    result_rounding: str = "truncate"
    subnormals: str = "keep"
    min_exponent: int = -126
    promote: int = 0

    def __post_init__(self) -> None:
        for field, choices in _CHOICES.items():
            if (value := getattr(self, field)) not in choices:
                raise ConfigError(f"accumulator: {field} must be one of {', '.join(choices)}, got {value!r}")
        self._check_range("chunk", 1, _LARGEST_CHUNK)
        self._check_range("fraction_bits", 1, _WIDEST[self.order] - self.chunk.bit_length())
        self._check_range("result_bits", 1, 23)
        self._check_range("min_exponent", -126, 127)
        self._check_range("promote", 0, 1 << 30)
        if self.promote % self.chunk:
            raise ConfigError(f"accumulator: promote={self.promote} must be a multiple of chunk={self.chunk}")
        if self.order == "pairwise":
            ieee = (self.fraction_bits, self.rounding, self.result_bits, self.result_rounding)
            if ieee != (23, "nearest-even", 23, "nearest-even") or self.chunk.bit_count() != 1:
                raise ConfigError(
                    "accumulator: order=pairwise adds in fp32: it needs fraction_bits=23, rounding=nearest-even, "
                    f"result_bits=23, result_rounding=nearest-even and a power of two as chunk, got {self}"
                )

    def _check_range(self, field: str, low: int, high: int) -> None:
        value = getattr(self, field)
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            raise ConfigError(f"accumulator: {field} must be an integer in {low}..{high}, got {value!r}")

    def __str__(self) -> str:
        spelt = [f"{f.name}={getattr(self, f.name)}" for f in _FIELDS if getattr(self, f.name) != f.default]
        return f"accumulator({', '.join(spelt)})"


_FIELDS = dataclasses.fields(Accumulator)


@dataclass(frozen=True)
class MatrixUnit:
    """The matrix unit of a device for operands of some formats.

    Attributes:
        accumulator: how it adds.
        formats: its operands' formats, names of :data:`aqnsim.formats.ALL`.
        source: where the figures come from.
        verified: whether an independent model of the same unit gives the same bits in our tests.
    """

    accumulator: Accumulator
    formats: tuple[str, ...]
    source: str
    verified: bool = False


_FP8 = ("fp8_e4m3", "fp8_e5m2")
_NARROW = (*_FP8, "fp6_e2m3", "fp6_e3m2", "fp4_e2m1")
_MMA_SIM = "microsoft/MMA-Sim (arXiv 2511.10909)"
_MMA = f"{_MMA_SIM}: mmasim/simulator/nv_ptx.py, class mma; mmasim/isa/nv_ptx/nv_mma.py"
_WGMMA = f"{_MMA_SIM}: mmasim/simulator/nv_ptx.py, class wgmma; mmasim/isa/nv_ptx/nv_wgmma.py"
_TCGEN05 = f"{_MMA_SIM}: mmasim/simulator/nv_ptx.py, class tcgen05mma; mmasim/isa/nv_ptx/nv_tcgen05mma.py"
_MFMA = f"{_MMA_SIM}: mmasim/simulator/amd.py; mmasim/isa/amd.py"
_AMD_SUM = f"{_MFMA}; mmasim/simulator/arithmetic.py, amd_fused_dot_rd_add"
_MMAEMU = "; mmaemu 0.1.0: mmaemu/model/presets.py"


def _pairwise(chunk: int, **other: Any) -> Accumulator:
    return Accumulator(23, chunk, "pairwise", "nearest-even", result_rounding="nearest-even", **other)


def _cdna3(chunk: int, order: str = "products-first", **other: Any) -> Accumulator:
    return Accumulator(24, chunk, order, result_rounding="nearest-even", **other)


def _units() -> dict[str, MatrixUnit]:
    units = {
        "volta_fp16": MatrixUnit(Accumulator(23, 4, min_exponent=-14), ("fp16",), _MMA),
        "turing_fp16": MatrixUnit(Accumulator(24, 8, min_exponent=-14), ("fp16",), _MMA),
    }
    # Half of an instruction's K at a time ("is_split_k")
    for name in ("ampere", "ada"):
        units[f"{name}_fp16"] = MatrixUnit(Accumulator(24, 8, min_exponent=-14), ("fp16",), _MMA)
        units[f"{name}_bf16"] = MatrixUnit(Accumulator(24, 8), ("bf16",), _MMA)
        units[f"{name}_tf32"] = MatrixUnit(Accumulator(24, 4), ("tf32",), _MMA)
    units["ada_fp8"] = MatrixUnit(Accumulator(13, 16, result_bits=13), _FP8, _MMA + _MMAEMU, verified=True)
    for name, source in (("hopper", _WGMMA), ("blackwell", _TCGEN05)):
        units[f"{name}_fp16"] = MatrixUnit(Accumulator(25, 16, min_exponent=-14), ("fp16",), source)
        units[f"{name}_bf16"] = MatrixUnit(Accumulator(25, 16), ("bf16",), source)
        units[f"{name}_tf32"] = MatrixUnit(Accumulator(25, 8), ("tf32",), source)
    units["hopper_fp8"] = MatrixUnit(Accumulator(13, 32, result_bits=13), _FP8, _WGMMA + _MMAEMU, verified=True)
    units["blackwell_fp8"] = MatrixUnit(Accumulator(25, 32), _NARROW, _TCGEN05)
    units |= {
        "cdna1_fp16": MatrixUnit(_pairwise(4), ("fp16",), _MFMA),
        "cdna1_bf16": MatrixUnit(_pairwise(2), ("bf16",), _MFMA),
        "cdna2_fp16": MatrixUnit(_pairwise(4, subnormals="flush", min_exponent=-14), ("fp16",), _MFMA),
        "cdna2_bf16": MatrixUnit(_pairwise(4, subnormals="flush"), ("bf16",), _MFMA + ": the _1k instructions"),
        "cdna3_fp16": MatrixUnit(_cdna3(8, min_exponent=-14), ("fp16",), _AMD_SUM),
        "cdna3_bf16": MatrixUnit(_cdna3(8), ("bf16",), _AMD_SUM),
        "cdna3_xf32": MatrixUnit(_cdna3(4), ("tf32",), _AMD_SUM),
        "cdna3_fp8": MatrixUnit(_cdna3(16, "even-odd"), ("fp8_e4m3fnuz", "fp8_e5m2fnuz"), _AMD_SUM),
        "ieee_fp32": MatrixUnit(_pairwise(1), ("bf16", "fp16", "tf32"), "IEEE 754-2019: one product after the other"),
    }
    return units


MATRIX_UNITS: Mapping[str, MatrixUnit] = MappingProxyType(_units())
"""Matrix units by name. The fp8 units take scaled operands; for unscaled ones give ``min_exponent``, too."""

_SPELT = re.compile(r"\s*(\w+)\s*(?:\(([^()]*)\))?\s*\Z")


def get(text: str | Accumulator) -> Accumulator:
    """The accumulator of a text: ``accumulator(field=value, ...)``, or a name of :data:`MATRIX_UNITS`.

    After a unit's name, in brackets, fields with other values.

    Raises:
        UnknownNameError: no such unit or field; the message names the closest.
        ConfigError: not such a text, or a value that the field cannot have.

    >>> print(get("hopper_fp8(promote=128)"))
    accumulator(fraction_bits=13, chunk=32, result_bits=13, promote=128)
    """
    if isinstance(text, Accumulator):
        return text
    if not isinstance(text, str):
        raise ConfigError(f"expected an accumulator or its text, got {text!r}")
    return _get(text)


@lru_cache(maxsize=1024)
def _get(text: str) -> Accumulator:
    match = _SPELT.match(text)
    if match is None or (match[1] != "accumulator" and match[1] not in MATRIX_UNITS):
        raise unknown("matrix unit", text, (*MATRIX_UNITS, "accumulator(fraction_bits=..., chunk=...)"))
    fields: dict[str, Any] = {}
    for part in match[2].split(",") if match[2] else ():
        key, equals, value = (s.strip() for s in part.partition("="))
        if not equals or not value:
            raise ConfigError(f"accumulator {text!r}: expected field=value, got {part.strip()!r}")
        if key not in (f.name for f in _FIELDS):
            raise unknown("field of an accumulator", key, (f.name for f in _FIELDS))
        if key in fields:
            raise ConfigError(f"accumulator {text!r}: field {key!r} is given twice")
        fields[key] = value if key in _CHOICES else _integer(text, key, value)
    if match[1] != "accumulator":
        return dataclasses.replace(MATRIX_UNITS[match[1]].accumulator, **fields)
    if not {"fraction_bits", "chunk"} <= set(fields):
        raise ConfigError(f"accumulator {text!r}: fraction_bits and chunk must be given")
    return Accumulator(**fields)


def _integer(text: str, key: str, value: str) -> int:
    try:
        return int(value)
    except ValueError as error:
        raise ConfigError(f"accumulator {text!r}: {key} must be an integer, got {value!r}") from error
