"""``python -m benchmarks.sass``: what CUDA kernels cost a value, read from their machine code without a GPU.

Derivation. A GPU of S multiprocessors has 4 schedulers in each, and a scheduler issues one instruction for 32 lanes a
clock. So at f clocks a second it issues at most S * 4 * 32 * f instructions a second, counted by lane. A kernel that
moves b bytes a value at a bandwidth of B bytes a second takes b / B seconds a value where memory is what it waits for.
In this time the GPU issues

    threshold = S * 4 * 32 * f * b / B

instructions a value. A kernel whose main loop has fewer instructions a value can wait for memory; one with more waits
for the schedulers, and reaches threshold / instructions of the bandwidth at best.

Instructions are counted in the body of the loop that reads and writes: everything between its first instruction and the
branch back to it, paths that are rarely taken (a subnormal divisor, 64-bit division) included where the compiler put
them there. Values are those that the body writes. What is not counted: the start of a kernel, once a thread; two
instructions of one pipe in a row, which the integer pipe of sm_80 and sm_90 takes at half the rate of a scheduler; and
latencies, which other warps hide. So this is a bound from above on the fraction of peak bandwidth, not a measurement.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

import torch

from aqnsim._errors import ConfigError
from aqnsim.backends import cuda
from aqnsim.backends.cuda.kernels import OPTIONS, Kernel
from aqnsim.errors import chain
from benchmarks.records import aligned, write


@dataclass(frozen=True)
class Device:
    """What bounds a kernel: figures of a datasheet.

    Attributes:
        arch: what kernels are compiled for.
        multiprocessors: how many.
        clock: boost, in Hz.
        bandwidth: of memory, in bytes a second.
    """

    arch: str
    multiprocessors: int
    clock: float
    bandwidth: float

    def threshold(self, moved: int) -> float:
        """Instructions a value that can be issued while ``moved`` bytes a value move."""
        return self.multiprocessors * 4 * 32 * self.clock * moved / self.bandwidth


DEVICES = {
    "A100": Device("sm_80", 108, 1.41e9, 2.039e12),  # NVIDIA A100 datasheet, SXM 80 GB; whitepaper: clock
    "H100": Device("sm_90", 132, 1.98e9, 3.35e12),  # NVIDIA H100 datasheet, SXM: 67 TFLOPS fp32 give the clock
    "B200": Device("sm_100", 148, 1.98e9, 8.0e12),  # NVIDIA DGX B200 datasheet, one of 8: 75 TFLOPS fp32 give the clock
}
ARCHS = ("sm_80", "sm_90", "sm_100", "sm_120")

_F, _B = torch.float32, torch.bfloat16
_SIZES = {_F: 4, _B: 2}
_TEXTS = ("fp8_e4m3", "hif8", "mxfp4", "mxfp8_e4m3", "nvfp4", "fp8_e4m3_1x128", "mxfp4(rounding=stochastic)")
_ROWS, _ACROSS = (4096, 1, 4096), (1, 4096, 4096)  # blocks along contiguous rows of 4096, and across them


@dataclass(frozen=True)
class Case:
    """A kernel of the table: its name, what it reads and writes, and whether it is to move 16 bytes at a time."""

    name: str
    dtype: torch.dtype
    kernel: Kernel
    fast: bool
    noise: bool = False

    @property
    def moved(self) -> int:
        """Bytes a value, read and written."""
        return 2 * _SIZES[self.dtype]


def _cast(text: str, dtype: torch.dtype, view: tuple[int, int, int] = _ROWS, mode: int = cuda.PLAIN) -> Kernel:
    return cuda.cast_kernel(text, view, dtype, mode)[0]


def _chain(text: str, dtype: torch.dtype) -> Kernel:
    return cuda.chain_kernel(chain(text), (dtype, dtype), True, False, False)


def cases() -> list[Case]:
    """What the table has a row for."""
    found = []
    for dtype in (_F, _B):
        for text in (
            "fp8_e4m3",
            "hif8",
            "mxfp4",
            "mxfp8_e4m3",
            "nvfp4",
            "fp8_e4m3_1x128",
            "mxfp4(rounding=stochastic)",
        ):
            found.append(Case(f"cast {text}", dtype, _cast(text, dtype), True))
        for text in ("relative-gaussian(sigma=0.05)", "saturation(limit=1)", "spike(rate=0.01, size=3)"):
            found.append(Case(f"perturb {text.partition('(')[0]}", dtype, _chain(text, dtype), True, True))
        found.append(Case("cast mxfp4, measured", dtype, _cast("mxfp4", dtype, mode=cuda.MEASURED), True))
        found.append(Case("cast mxfp4, across rows", dtype, _cast("mxfp4", dtype, _ACROSS), False))
        found.append(Case("cast hif4", dtype, _cast("hif4", dtype), True))
    return found


# ---- compilers ------------------------------------------------------------------------------------------------------


def _wheels() -> list[Path]:
    """Where NVIDIA's wheels of CUDA 13 lie."""
    spec = find_spec("nvidia")
    places = [Path(p) / "cu13" for p in (spec.submodule_search_locations or [])] if spec else []
    return [p for p in places if p.is_dir()]


def _in_wheels(name: str) -> Path | None:
    return next((p / name for p in _wheels() if (p / name).exists()), None)


def include_options() -> list[str]:
    """For nvcc: the headers of the wheels."""
    return [f"-I{p / 'include'}" for p in _wheels()]


def tool(name: str) -> str:
    """The path of nvcc, cuobjdump or nvdisasm: of NVIDIA's wheels or of a toolkit.

    Raises:
        FileNotFoundError: it is in neither.
    """
    path = str(_in_wheels(f"bin/{name}") or shutil.which(name) or "")
    if not path:
        raise FileNotFoundError(f"{name}: not found; pip install nvidia-cuda-{name}, or put a CUDA toolkit on the PATH")
    return path


@lru_cache
def _nvrtc() -> ctypes.CDLL:
    library = _in_wheels("lib/libnvrtc.so.13")
    if library is None:
        return ctypes.CDLL("libnvrtc.so.13")
    for builtins in library.parent.glob("libnvrtc-builtins.so.*"):  # which it looks for by name alone
        ctypes.CDLL(str(builtins))
    return ctypes.CDLL(str(library))


def compiled(source: str, arch: str) -> bytes:
    """The cubin that NVRTC makes of a source, as the backend has it made.

    Raises:
        RuntimeError: it does not compile; the compiler's log.
    """
    nvrtc, program = _nvrtc(), ctypes.c_void_p()
    nvrtc.nvrtcCreateProgram(ctypes.byref(program), source.encode(), b"run.cu", 0, None, None)
    options = [o.encode() for o in (*OPTIONS, f"--gpu-architecture={arch}")]
    failed = nvrtc.nvrtcCompileProgram(program, len(options), (ctypes.c_char_p * len(options))(*options))

    def text(what: str) -> bytes:
        size = ctypes.c_size_t()
        getattr(nvrtc, f"nvrtcGet{what}Size")(program, ctypes.byref(size))
        buffer = ctypes.create_string_buffer(size.value)
        getattr(nvrtc, f"nvrtcGet{what}")(program, buffer)
        return buffer.raw

    log, cubin = text("ProgramLog").decode(), b"" if failed else text("CUBIN")
    nvrtc.nvrtcDestroyProgram(ctypes.byref(program))
    if failed:
        raise RuntimeError(f"NVRTC, {arch}: {log}")
    return cubin


# ---- machine code ---------------------------------------------------------------------------------------------------

_INSTRUCTION = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+ )?\s*([^;]+?)\s*;", re.MULTILINE)
_TARGET = re.compile(r"^BRA(?:\.\w+)*\s.*?(?:`\(\.\w+\)|0x([0-9a-f]+))$")
_WIDTHS = {"128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1}


@dataclass(frozen=True)
class Code:
    """A kernel's machine code.

    Attributes:
        instructions: (address, text) of each, without the padding at the end.
        registers, local: of a thread: registers, and bytes of local memory.
    """

    instructions: tuple[tuple[int, str], ...]
    registers: int
    local: int

    @property
    def opcodes(self) -> list[str]:
        return [text.split()[0] for _, text in self.instructions]

    def loops(self) -> list[list[str]]:
        """The bodies of all loops: from the target of a branch back to that branch."""
        bodies = []
        for at, text in self.instructions:
            match = _TARGET.match(text)
            if match and match[1] and int(match[1], 16) < at:
                bodies.append([t for a, t in self.instructions if int(match[1], 16) <= a <= at])
        return bodies

    def per_value(self, size: int) -> float:
        """Instructions a value of ``size`` bytes, in the cheapest loop that reads and writes memory."""
        costs = [len(body) * size / stored_bytes(body) for body in self.loops() if stored_bytes(body)]
        if not costs:
            raise RuntimeError("no loop writes to memory: the kernel has another form than this reads")
        return min(costs)


def stored_bytes(body: Sequence[str]) -> int:
    """Bytes that a lane writes to global memory."""
    stores = [text.split()[0].split(".") for text in body if text.startswith("STG")]
    return sum(next((_WIDTHS[part] for part in parts if part in _WIDTHS), 4) for parts in stores)


def disassembled(cubin: bytes) -> Code:
    """What cuobjdump says of a cubin with one kernel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        path = os.pathsep.join([str(Path(tool("nvdisasm")).parent), os.environ.get("PATH", "")])
        run = [tool("cuobjdump"), "-sass", "-res-usage", file.name]
        done = subprocess.run(run, capture_output=True, text=True, check=True, env={**os.environ, "PATH": path})
    usage = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", done.stdout + done.stderr)
    if usage is None:
        raise RuntimeError(f"cuobjdump says nothing of registers: {done.stdout[:400]}{done.stderr[:400]}")
    found = [(int(at, 16), text) for at, text in _INSTRUCTION.findall(done.stdout) if text != "NOP"]
    return Code(tuple(found), int(usage[1]), int(usage[2]) + int(usage[3]))


@lru_cache(maxsize=512)
def code(kernel: Kernel, arch: str) -> Code:
    """The machine code of a kernel."""
    return disassembled(compiled(kernel.source(), arch))


HEADER = ("kernel", "dtype", "GPU", "registers", "instructions", "threshold", "bound by", "of peak")


def rows() -> list[tuple[str, ...]]:
    """A row for each kernel and GPU: instructions a value, how many are free, and the bandwidth that this allows."""
    found: list[tuple[str, ...]] = []
    for case in cases():
        for name, device in DEVICES.items():
            c = code(case.kernel, device.arch)
            cost, free = c.per_value(_SIZES[case.dtype]), device.threshold(case.moved)
            found.append(
                (
                    case.name,
                    str(case.dtype).removeprefix("torch."),
                    name,
                    str(c.registers),
                    f"{cost:.1f}",
                    f"{free:.1f}",
                    "memory" if cost <= free else "issue",
                    f"{min(1.0, free / cost):.0%}",
                )
            )
    return found


_BLOCK = re.compile(r"(<!-- sass -->\n)(.*?)(<!-- end of sass -->)", re.DOTALL)


def compiler() -> str:
    """The version of NVRTC: another one may make other instructions."""
    major, minor = ctypes.c_int(), ctypes.c_int()
    _nvrtc().nvrtcVersion(ctypes.byref(major), ctypes.byref(minor))
    return f"NVRTC {major.value}.{minor.value}"


def page_with_table(text: str) -> str:
    """A page whose table, between ``<!-- sass -->`` and ``<!-- end of sass -->``, is that of this compiler.

    Raises:
        ConfigError: the page marks no place for it.
    """
    table = [HEADER, tuple("---" for _ in HEADER), *rows()]
    lines = "".join("| " + " | ".join(row) + " |\n" for row in table)
    text, count = _BLOCK.subn(lambda m: f"{m[1]}Compiled by {compiler()}.\n\n{lines}{m[3]}", text)
    if not count:
        raise ConfigError("no place for the table: expected <!-- sass --> and <!-- end of sass -->")
    return text


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sass", description=__doc__.partition("\n")[0])
    parser.add_argument("--page", type=Path, help="rewrite the table of this page between its marks instead")
    page = parser.parse_args().page
    if page is None:
        print(aligned([HEADER, *rows()]))
        return
    text = page_with_table(page.read_text(encoding="utf-8"))
    write(page, text)


if __name__ == "__main__":
    main()
