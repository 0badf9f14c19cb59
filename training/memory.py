"""What glibc does with freed memory."""

from __future__ import annotations

import ctypes
import platform

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # malloc.h


def keep_freed_memory() -> None:
    """Let glibc reuse what tensors free, instead of giving it back to the system and faulting it in again.

    By default an array of 32 MiB and more is mapped anew at each allocation, and every page of it costs a fault at its
    first touch; a training step on the CPU makes hundreds. Results do not depend on it. Other C libraries are left
    alone.

    >>> keep_freed_memory()
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
