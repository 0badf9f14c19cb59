"""Alternating runs, so that whatever else the machine does falls on all candidates alike."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from statistics import median


def alternate(candidates: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Median seconds of each candidate over ``repeats`` rounds, each round running all of them once.

    One round before the first is not counted: it touches the memory and fills the caches.
    """
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for repeat in range(repeats + 1):
        for name, run in candidates.items():
            start = time.perf_counter()
            run()
            if repeat:
                seconds[name].append(time.perf_counter() - start)
    return {name: median(times) for name, times in seconds.items()}
