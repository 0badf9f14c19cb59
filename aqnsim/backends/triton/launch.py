"""How kernels are launched: without contraction, on the device of their tensors."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
import triton
from torch import Tensor

from aqnsim.backends.triton.bits import INTERPRETED

TILE = 1 << 16 if INTERPRETED.value else 2048
"""About how many elements a program takes."""

OPTIONS = {"enable_fp_fusion": False}
"""Triton contracts a product and a sum to one fma otherwise, which rounds once instead of twice."""


def warps(elements: int) -> int:
    """Warps for a program of so many elements, a power of two: 16 elements a thread."""
    return min(max(elements // 512, 1), 16)


def launch(kernel: Any, programs: int, *args: Any, elements: int, **constants: Any) -> None:
    """Run ``programs`` programs of a kernel, of so many elements each."""
    device = next(a.device for a in args if isinstance(a, Tensor))
    context = torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
    with context:
        kernel[(programs,)](*args, **constants, **OPTIONS, num_warps=warps(elements))


def power_of_two(n: int) -> int:
    """The next one from ``n`` on."""
    return int(triton.next_power_of_2(max(n, 1)))
