"""What tests of the Triton backend share: kernels compiled for a GPU that is not there."""

from __future__ import annotations

import os
import re
import subprocess
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


class AbsentGpu:
    """As much of a driver as compiling needs."""

    def __init__(self, arch: int) -> None:
        self.target = GPUTarget("cuda", arch, 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


class Aligned:
    """A tensor as a launch sees it: its dtype, and an address that is a multiple of 16."""

    def __init__(self, tensor: Tensor) -> None:
        self.dtype = tensor.dtype

    @staticmethod
    def data_ptr() -> int:
        return 0

    @staticmethod
    def ptr_range() -> int:
        return 0


@dataclass(frozen=True)
class Compiled:
    """A kernel as a launch would have it: its name, PTX, machine code and resources."""

    name: str
    ptx: str
    sass: str
    usage: str
    elements: int
    threads: int

    def instructions(self) -> Counter[str]:
        """How often each mnemonic stands in the machine code."""
        found = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]+)", self.sass)
        return Counter(found)

    def per_element(self) -> float:
        """Instructions that a thread runs for each of its elements, where there is no loop."""
        return sum(self.instructions().values()) * self.threads / self.elements


def compiled(arch: int, modules: list[Any], call: Callable[[], object], folder: Path) -> list[Compiled]:
    """The kernels that ``call`` would launch on a GPU of compute capability ``arch``, in order; none runs."""
    found: list[Compiled] = []

    def launch(kernel: Any, programs: int, *args: Any, elements: int, **constants: Any) -> None:
        given = [Aligned(a) if isinstance(a, Tensor) else a for a in args]
        from aqnsim.backends.triton.launch import OPTIONS, warps

        made = kernel.warmup(*given, grid=(programs,), **constants, **OPTIONS, num_warps=warps(elements))
        binary = folder / f"{len(found)}.cubin"
        binary.write_bytes(made.asm["cubin"])
        sass = _tool("nvdisasm", "-c", binary)
        usage = _tool("cuobjdump", "-res-usage", binary)
        name = made.metadata.name
        found.append(Compiled(name, made.asm["ptx"], sass, usage, elements, 32 * made.metadata.num_warps))

    before = [m.launch for m in modules]
    driver.set_active(AbsentGpu(arch))
    try:
        for m in modules:
            m.launch = launch
        call()
    finally:
        for m, real in zip(modules, before, strict=True):
            m.launch = real
        driver._active = None
    return found


def _tool(name: str, *args: object) -> str:
    done = subprocess.run([TOOLS / name, *map(str, args)], capture_output=True, text=True, check=True)
    return done.stdout


def interpreted() -> dict[str, str]:
    """The environment of a process whose kernels run in Triton's interpreter."""
    return {**os.environ, "TRITON_INTERPRET": "1"}
