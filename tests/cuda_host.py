"""The kernels of csrc/cuda built for the host, and the CUDA backend on top of them: on CPU tensors, without a GPU."""

from __future__ import annotations

import ctypes
import itertools
import re
import struct
import subprocess
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

import torch

from aqnsim.backends.cuda import MOST_BLOCKS, kernels
from aqnsim.backends.cuda.kernels import Kernel

HERE = Path(__file__).parent
CSRC = HERE.parent / "csrc"
TYPES = ("float", "bf16")
FILES = ("cast.cuh", "perturb.cuh", "gemm.cuh", "measure.cuh")

# What a compiled kernel has as literals, the host build has as variables, set before each launch: one build serves all
# formats. The values come from the very text that NVRTC compiles.
SPEC = """
struct Spec {
  static inline Element made_element;
  static inline Scaling made_scaling;
  static inline Accumulator made_accumulator;
  static inline ModelSpec made_models[kMostModels];
  static inline int kCount = 0;
  static inline bool kByMagnitude = false, kWholeDraws = false;
  static Element element() { return made_element; }
  static Scaling scaling() { return made_scaling; }
  static Accumulator accumulator() { return made_accumulator; }
  static ModelSpec model(int i) { return made_models[i]; }
};
"""


def calls() -> Iterator[tuple[str, str]]:
    """Every kernel that a backend can launch: the function and its struct of arguments."""
    yield "finish", "FinishArgs"
    yield "tensor_scale<Spec>", "TensorScaleArgs"
    for t in TYPES:
        yield f"amax<{t}>", "AmaxArgs"
        yield f"gemm<Spec, {t}>", "GemmArgs"
        for mode in range(3 if t == "float" else 2):
            common = f"Spec, {t}, Mode({mode})"
            yield f"cast_elements<{common}>", "CastArgs"
            for n in (16, 32, 64, 128):
                yield f"cast_rows<{common}, {n}>", "CastArgs"
                yield f"cast_held<{common}, {n}, true>", "CastArgs"
                yield f"cast_held<{common}, {n}, false>", "CastArgs"
            for team in (32, 256):
                yield f"cast_team<{common}, {team}>", "CastArgs"
        for out, *flags in itertools.product(TYPES, *[("true", "false")] * 3):
            yield f"perturb<Spec, {t}, {out}, {', '.join(flags)}>", "PerturbArgs"


def source() -> str:
    includes = "".join(f'#include "{CSRC}/cuda/{file}"\n' for file in FILES)
    exported = "".join(
        f'extern "C" void launch{i}(const void* args, int blocks) {{\n'
        f"  shim::run([](const void* a) {{ {call}(*static_cast<const {args}*>(a)); }}, args, blocks);\n}}\n"
        for i, (call, args) in enumerate(calls())
    )
    setters = "".join(
        f'extern "C" void* spec_{name}() {{ return {at}Spec::{name}; }}\n'
        for name, at in [
            ("made_element", "&"),
            ("made_scaling", "&"),
            ("made_accumulator", "&"),
            ("made_models", ""),
            ("kCount", "&"),
            ("kByMagnitude", "&"),
            ("kWholeDraws", "&"),
        ]
    )
    return (
        f'#include "{HERE}/cuda_host_shim.h"\n{includes}'
        f"namespace aqn::cuda {{{SPEC}}}\nusing namespace aqn;\nusing namespace aqn::cuda;\n{setters}{exported}"
    )


@lru_cache
def library(folder: str) -> ctypes.CDLL:
    text, built = Path(folder) / "kernels.cpp", Path(folder) / "kernels.so"
    text.write_text(source())
    flags = ["-std=c++17", "-O2", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-w"]
    subprocess.run(["c++", *flags, "-shared", "-fPIC", text, "-o", built], check=True)
    return ctypes.CDLL(str(built))


# The fields of the structs that Spec has, as struct formats: bool, int, float and what pads them.
LAYOUTS = {"Element": "iiiffffiii?????xxx", "Scaling": "iiiiIi?xxxf", "Accumulator": "iii?xxxi??xxiq"}
MODEL = "ii???x"


def number(text: str) -> float | int:
    """A literal of a spec as its value."""
    if text in ("true", "false"):
        return int(text == "true")
    bits = re.fullmatch(r"float_of\(0x([0-9a-f]{8})u\)", text)
    if bits:
        return float(struct.unpack("<f", bytes.fromhex(bits[1])[::-1])[0])
    return int(re.sub(r"^\w+\((.*)\)$", r"\1", text).removesuffix("u"))


def values(text: str) -> list[float | int]:
    return [number(part.strip()) for part in text.split(",")]


class Host:
    """A launcher that runs kernels on the host.

    Args:
        folder: where the kernels are built, once.
        blocks: of each unmeasured launch, if not what the backend asks for.
    """

    def __init__(self, folder: Path, blocks: int | None = None) -> None:
        self._folder, self._blocks = folder, blocks
        self._library = library(str(folder))
        self._numbers = {call: i for i, (call, _) in enumerate(calls())}

    def with_blocks(self, blocks: int) -> Host:
        return Host(self._folder, blocks)

    def _set(self, name: str, content: bytes) -> None:
        at = self._library[f"spec_{name}"]
        at.restype = ctypes.c_void_p
        ctypes.memmove(at(), content, len(content))

    def _specialise(self, spec: str) -> None:
        for kind, made in re.findall(r"static (\w+) \w+\(\) \{ return \{(.*)\}; \}", spec):
            self._set(f"made_{kind.lower()}", struct.pack(LAYOUTS[kind], *values(made)))
        self._set("kWholeDraws", struct.pack("?", "kWholeDraws = true" in spec))
        models = re.findall(r"ModelSpec\{([^}]*)\}", spec)
        if models:
            self._set("made_models", b"".join(struct.pack(MODEL, *values(m)) for m in models))
            self._set("kCount", struct.pack("i", len(models)))
            self._set("kByMagnitude", struct.pack("?", "kByMagnitude = true" in spec))

    def __call__(self, kernel: Kernel, blocks: int, args: ctypes.Structure, device: torch.device) -> None:
        assert device.type == "cpu"
        assert 1 <= blocks <= MOST_BLOCKS
        assert type(args) is getattr(kernels, kernel.args)
        self._specialise(kernel.spec)
        measured = bool(getattr(args, "parts", 0))
        run = self._library[f"launch{self._numbers[kernel.call]}"]
        run(ctypes.byref(args), blocks if measured or self._blocks is None else self._blocks)
