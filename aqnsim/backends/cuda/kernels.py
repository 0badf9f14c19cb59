"""CUDA kernels as text: the headers of csrc as one source, and what a kernel is specialised to as literals in it."""

from __future__ import annotations

import ctypes
import re
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

from aqnsim._errors import BackendError
from aqnsim.backends.fields import KINDS, accumulator_fields, element_fields, scaling_fields
from aqnsim.errors import ErrorModel
from aqnsim.formats import AnyFormat, element_of
from aqnsim.rng import DRAWS

THREADS = 256
"""Of a block; kThreads of csrc/cuda/device.cuh."""

SUMS = 8
"""What a block measures; kSums of csrc/cuda/measure.cuh."""

MOST_MODELS = 8
"""Of a chain; kMostModels of csrc/cuda/perturb.cuh."""

# What -ftz, -prec-div and -prec-sqrt say is the default; results depend on it, so it is written down.
OPTIONS = ("-std=c++17", "--fmad=false", "--ftz=false", "--prec-div=true", "--prec-sqrt=true")

Fields = Mapping[str, Any]


@dataclass(frozen=True)
class Kernel:
    """One specialised kernel.

    Attributes:
        file: of csrc/cuda.
        call: the function and its template arguments.
        args: the struct that it takes.
        spec: the body of the struct Spec that its template arguments name.
        alone: whether one block a multiprocessor is enough, so that threads may take all registers.
    """

    file: str
    call: str
    args: str
    spec: str = ""
    alone: bool = False

    def source(self) -> str:
        """All of it, for a compiler that is given no headers; the kernel's name is ``run``."""
        bounds = f"{THREADS}, 1" if self.alone else str(THREADS)
        return (
            f"{header(self.file)}\n"
            f"namespace aqn::cuda {{\nstruct Spec {{\n{self.spec}}};\n}}\n"
            f'extern "C" __global__ void __launch_bounds__({bounds}) run(const aqn::cuda::{self.args} args) {{\n'
            f"  using namespace aqn;\n  using namespace aqn::cuda;\n  aqn::cuda::{self.call}(args);\n}}\n"
        )


def sources() -> Traversable:
    """The folder csrc: in an installed package its copy, in a checkout itself.

    Raises:
        BackendError: it is in neither place.
    """
    installed, checkout = files("aqnsim") / "csrc", Path(__file__).parents[3] / "csrc"
    for folder in (installed, checkout):
        if (folder / "cuda" / "device.cuh").is_file():
            return folder
    raise BackendError(f"the sources of the CUDA kernels are neither in {installed} nor in {checkout}: reinstall it")


_INCLUDE = re.compile(r'^#include "([^"]+)"\n', re.MULTILINE)


@lru_cache
def header(file: str) -> str:
    """A header of csrc/cuda with all that it includes, each once.

    A compiler's cache goes by the source that it is given: it would not see a change in what the source includes.
    """
    seen: set[str] = set()

    def expanded(folder: str, name: str) -> str:
        folder, name = ("core", name.removeprefix("../core/")) if name.startswith("../core/") else (folder, name)
        if name in seen:
            return ""
        seen.add(name)
        text = (sources() / folder / name).read_text().replace("#pragma once\n", "")
        return _INCLUDE.sub(lambda m: expanded(folder, m[1]), text)

    return expanded("cuda", file)


# ---- literals -------------------------------------------------------------------------------------------------------


def literal(value: Any) -> str:
    """A number as C++ text that means the same bits."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        return f"float_of(0x{struct.unpack('<I', struct.pack('<f', value))[0]:08x}u)"
    return f"{value}u" if value > 0x7FFFFFFF else str(value)


_ENUMS = {"overflow": "Overflow", "rounding": "Rounding", "rule": "Scale", "order": "Order"}


def _made(kind: str, fields: Fields) -> str:
    """The definition of a function of Spec that returns a struct."""
    values = [f"{_ENUMS[name]}({v})" if name in _ENUMS else literal(v) for name, v in fields.items()]
    return f"  AQN_HD static {kind} {kind.lower()}() {{ return {{{', '.join(values)}}}; }}\n"


def format_spec(fmt: AnyFormat, whole_draws: bool = True) -> str:
    """Spec of csrc/cuda/cast.cuh."""
    return (
        _made("Element", element_fields(element_of(fmt)))
        + _made("Scaling", scaling_fields(fmt))
        + f"  static constexpr bool kWholeDraws = {literal(whole_draws)};\n"
    )


def accumulator_spec(text: str) -> str:
    """Spec of csrc/cuda/gemm.cuh."""
    return _made("Accumulator", accumulator_fields(text))


def model_fields(model: ErrorModel) -> dict[str, Any]:
    """The struct ModelSpec of csrc/cuda/perturb.cuh, in its order."""
    return {
        "kind": list(KINDS).index(type(model)),
        "draw": DRAWS.index(getattr(model, "draw", "frozen")),
        "by_magnitude": getattr(model, "reference", "output") == "absdot",
        "by_lane": getattr(model, "lanes", 0) > 0,
        "drawn_bit": getattr(model, "bit", 0) < 0,
    }


def chain_spec(models: Sequence[ErrorModel]) -> str:
    """Spec of csrc/cuda/perturb.cuh."""
    fields = [model_fields(m) for m in models]
    made = [
        f"ModelSpec{{ErrorKind({kind}), Draw({draw}), {', '.join(map(literal, flags))}}}"
        for kind, draw, *flags in (f.values() for f in fields)
    ]
    chosen = "".join(f"i == {i} ? {text} : " for i, text in enumerate(made[:-1])) + made[-1]
    return (
        f"  static constexpr int kCount = {len(made)};\n"
        f"  static constexpr bool kByMagnitude = {literal(any(f['by_magnitude'] for f in fields))};\n"
        f"  AQN_HD static ModelSpec model([[maybe_unused]] int i) {{ return {chosen}; }}\n"
    )


# ---- arguments: the structs of csrc/cuda, in their order -------------------------------------------------------------

_POINTER, _INT = ctypes.c_uint64, ctypes.c_int64


class _RowIds(ctypes.Structure):
    _fields_ = [("at", _POINTER), ("pairs", _INT)]


class _Clock(ctypes.Structure):
    _fields_ = [("at", _POINTER), ("value", _INT)]


class AmaxArgs(ctypes.Structure):
    _fields_ = [("x", _POINTER), ("amax", _POINTER), ("n", _INT)]


class TensorScaleArgs(ctypes.Structure):
    _fields_ = [("amax", _POINTER), ("scale", _POINTER)]


class CastArgs(ctypes.Structure):
    _fields_ = [
        *((name, _POINTER) for name in ("x", "y", "scales", "amax", "parts")),
        ("rows", _RowIds),
        ("clock", _Clock),
        ("key", ctypes.c_uint64),
        *((name, _INT) for name in ("columns", "batch", "high", "wide", "row_major")),
    ]


class ModelNumbers(ctypes.Structure):
    _fields_ = [
        ("a", ctypes.c_float),
        ("b", ctypes.c_float),
        ("last_hit", ctypes.c_uint32),
        *((name, ctypes.c_int32) for name in ("lanes", "bit", "unused")),
    ]


class PerturbArgs(ctypes.Structure):
    _fields_ = [
        *((name, _POINTER) for name in ("y", "out", "magnitude", "parts")),
        ("ids", _RowIds),
        ("clock", _Clock),
        ("key", ctypes.c_uint64),
        ("rows", _INT),
        ("columns", _INT),
        ("models", ModelNumbers * MOST_MODELS),
    ]


class FinishArgs(ctypes.Structure):
    _fields_ = [
        ("parts", _POINTER),
        ("stats", _POINTER),
        ("rows", _INT),
        *((name, ctypes.c_double) for name in ("count", "sigma2", "rate")),
    ]


class GemmArgs(ctypes.Structure):
    _fields_ = [*((name, _POINTER) for name in ("a", "b", "out")), *((name, _INT) for name in ("batch", "m", "k", "n"))]
