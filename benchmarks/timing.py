"""Alternating runs, so that whatever else the machine does falls on all candidates alike."""

from __future__ import annotations

import ctypes
import sys
import time
from collections.abc import Callable, Mapping

import torch

Call = Callable[[], object]
Clock = Callable[[Call], float]

PATIENCE = 20.0  # seconds
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of malloc.h
_RUN_AHEAD = 2_000_000  # cycles that a GPU idles so that the CPU can queue what is timed: about a millisecond


def wall(run: Call) -> float:
    """Seconds of a call on the CPU."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def cuda_events(run: Call) -> float:
    """Seconds of what a call queues on the GPU. The GPU waits first, so that launches do not count unless a call
    itself waits for the device."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(_RUN_AHEAD)
    start.record()
    run()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1e3


def clock_of(device: str) -> Clock:
    """The clock for calls on a device."""
    return cuda_events if torch.device(device).type == "cuda" else wall


def alternate(candidates: Mapping[str, Call], repeats: int, clock: Clock = wall) -> dict[str, list[float]]:
    """Seconds of each candidate in each of ``repeats`` rounds; a round runs all of them once.

    One round before the first is not counted: it touches the memory, fills the caches and compiles. What takes longer
    than PATIENCE there is named and not timed: its rounds would leave no time for the others.
    """
    first = {name: wall(run) for name, run in candidates.items()}
    for name, spent in first.items():
        if spent > PATIENCE:
            print(f"not timed: {name} took {spent:.0f} s in its first round", file=sys.stderr)
    kept = {name: run for name, run in candidates.items() if first[name] <= PATIENCE}
    seconds: dict[str, list[float]] = {name: [] for name in kept}
    for _ in range(repeats):
        for name, run in kept.items():
            seconds[name].append(clock(run))
    return seconds


def keep_freed_memory() -> None:
    """Let malloc keep what is freed, so that an op's result lies in memory that has been touched before.

    Otherwise each large result is mapped anew, and the kernel that zeroes its pages is timed with the op. It is as if
    results went to buffers that are there already, which ``copy_`` has, too.
    """
    libc = ctypes.CDLL(None)
    if not (libc.mallopt(_M_MMAP_MAX, 0) and libc.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)):
        raise RuntimeError("mallopt refused to keep freed memory: results would be timed with their page faults")
