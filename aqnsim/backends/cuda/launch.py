"""Kernels compiled by CuPy's NVRTC and launched on torch's stream. CuPy is imported at the first launch."""

from __future__ import annotations

import ctypes
from typing import Any, Protocol

import numpy as np
import torch

from aqnsim._errors import BackendError
from aqnsim.backends.cuda.kernels import OPTIONS, THREADS, Kernel


class Launcher(Protocol):
    """How a kernel runs: on a GPU, or, in tests, built for the host."""

    def __call__(self, kernel: Kernel, blocks: int, args: ctypes.Structure, device: torch.device) -> None: ...


def _cupy() -> Any:
    try:
        import cupy
    except ImportError as error:
        raise BackendError(
            "backend 'cuda' compiles its kernels with CuPy, which cannot be imported "
            f"({error}): pip install 'aqnsim[cuda]', or cupy-cuda12x where the driver is of CUDA 12"
        ) from error
    return cupy


class Nvrtc:
    """Each kernel is compiled once a device; CuPy keeps the binary on disk.

    Nothing here waits for the device or allocates on it, so a launch can be captured in a CUDA graph once its kernel
    has run before: loading a module is no work of a stream.
    """

    def __init__(self) -> None:
        self._functions: dict[tuple[Kernel, int], Any] = {}

    def __call__(self, kernel: Kernel, blocks: int, args: ctypes.Structure, device: torch.device) -> None:
        if not torch.cuda.is_available():
            raise BackendError(f"backend 'cuda' runs on a GPU, and torch {torch.__version__} sees none")
        cupy = _cupy()
        index = torch.cuda.current_device() if device.index is None else device.index
        stream = torch.cuda.current_stream(index).cuda_stream
        with cupy.cuda.Device(index), cupy.cuda.ExternalStream(stream, index):
            function = self._functions.get((kernel, index))
            if function is None:
                function = cupy.RawModule(code=kernel.source(), options=OPTIONS).get_function("run")
                self._functions[kernel, index] = function
            function((blocks,), (THREADS,), (np.frombuffer(bytes(args), np.uint8),))  # a struct, by value
