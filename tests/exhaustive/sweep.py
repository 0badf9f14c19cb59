"""Every one of the 2^32 binary32 inputs through the CPU kernel: ``python tests/exhaustive/sweep.py [FORMAT ...]``.

A deterministic rounding of ordered inputs is a staircase. Its steps come from the exact model in
``tests/fraction_model.py``, which shares no code with the package: between two neighbours of a format lies one bit
pattern at which the result changes. So the expected results of all inputs cost little more than the kernel itself.

The outcome of each format and rounding is written to ``results.json`` beside this file, which the documentation reads.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import fraction_model as model

from aqnsim import _core, formats
from aqnsim.backends import cpu

RESULTS = Path(__file__).with_name("results.json")
ROUNDINGS = ("nearest-even", "nearest-away", "nearest-down", "toward-zero", "up", "down")
CHUNK = 1 << 24
U32 = npt.NDArray[np.uint32]


def staircase(name: str, rounding: str, overflow: str, negative: bool) -> tuple[U32, U32]:
    """Where results of magnitudes ``0 .. Inf`` change, as bit patterns, and the bits of the result from there on."""
    e = model.element(name)
    grid, middles, odd = model._patterns(e)
    inward = rounding == "toward-zero" or rounding == ("up" if negative else "down")
    if inward:
        starts = grid[1:]
    elif rounding in ("up", "down"):
        starts = grid[:-1] + 1
    else:
        ties_up = {"nearest-even": odd[:-1], "nearest-away": np.True_, "nearest-down": np.False_}[rounding]
        starts = middles + np.where(ties_up, 0, 1)
    limit = e.lowest if negative else e.largest
    above = {"saturate": grid[limit], "inf": model.INF, "nan": model.NAN}[overflow]
    values = np.append(grid[: limit + 1], grid[limit] if inward else above)
    starts = np.concatenate([[0], starts[: limit + 1], [model.INF]])
    values = np.append(values, above)  # of Inf itself
    if negative and e.signed:
        values = np.where(values == model.NAN, values, values | model.SIGN)
        values[0] = model.SIGN if e.negative_zero else 0
    elif negative:
        values, zero = np.full_like(values, model.NAN), values[0]
        starts, values = np.insert(starts, 1, 1), np.insert(values, 0, zero)  # -0 is 0, or the smallest number
    return starts.astype(np.uint32), values.astype(np.uint32)


def expected(first: int, starts: U32, values: U32) -> U32:
    """The results of the magnitudes ``first .. first + CHUNK``; NaN beyond Inf."""
    inside = np.searchsorted(starts, np.array([first, first + CHUNK - 1], np.uint32), side="right") - 1
    steps = starts[inside[0] + 1 : inside[1] + 1].astype(np.int64)
    lengths = np.diff(np.concatenate([[first], steps, [first + CHUNK]]))
    result = np.repeat(values[inside[0] : inside[1] + 1], lengths)
    result[max(model.INF + 1 - first, 0) :] = model.NAN
    return result


def sweep(name: str, rounding: str) -> dict[str, object]:
    """All inputs through one format; the count of results that differ from the model, and the first such input."""
    torch.set_num_threads(1)
    fmt = formats.with_rounding(formats.get(name), rounding)
    assert isinstance(fmt, formats.Format)
    start, mismatches, first_bad = time.perf_counter(), 0, None
    out = torch.empty(CHUNK)
    for negative in (False, True):
        steps = staircase(name, rounding, fmt.overflow, negative)
        for first in range(0, 1 << 31, CHUNK):
            bits = np.arange(first, first + CHUNK, dtype=np.uint32) | np.uint32(model.SIGN if negative else 0)
            x = torch.from_numpy(bits.view(np.float32))
            cpu._run_cast(x, out, None, str(fmt), -1, None, False)
            got = out.numpy().view(np.uint32)
            got = np.where(np.isnan(out.numpy()), np.uint32(model.NAN), got)
            wrong = np.flatnonzero(got != expected(first, *steps))
            mismatches += len(wrong)
            if len(wrong) and first_bad is None:
                first_bad = hex(bits[wrong[0]])
    return {
        "format": name,
        "rounding": rounding,
        "inputs": 1 << 32,
        "mismatches": mismatches,
        "first": first_bad,
        "isa": _core.isa(),
        "seconds": round(time.perf_counter() - start, 1),
    }


def record(outcomes: list[dict[str, object]]) -> None:
    """Merge outcomes into the results file, which is replaced whole."""
    known = json.loads(RESULTS.read_text()) if RESULTS.exists() else []
    merged = {(o["format"], o["rounding"]): o for o in [*known, *outcomes]}
    temporary = RESULTS.with_suffix(".tmp")
    temporary.write_text(json.dumps([merged[k] for k in sorted(merged)], indent=1) + "\n")
    os.replace(temporary, RESULTS)


def main() -> int:
    parser = argparse.ArgumentParser(description="Every binary32 input through the element formats.")
    parser.add_argument("formats", nargs="*", metavar="FORMAT", help="element formats; default: all")
    parser.add_argument("--rounding", default="default", choices=["default", "all", *ROUNDINGS])
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    arguments = parser.parse_args()
    names = arguments.formats or [n for n, f in formats.ALL.items() if isinstance(f, formats.Format)]
    work = []
    for name in names:
        own = formats.element_of(formats.get(name)).rounding
        asked = {"default": [own], "all": list(ROUNDINGS)}.get(arguments.rounding, [arguments.rounding])
        work += [(name, rounding) for rounding in asked]
    outcomes = []
    with ProcessPoolExecutor(arguments.jobs) as pool:
        for outcome in pool.map(sweep, *zip(*work, strict=True)):
            outcomes.append(outcome)
            record([outcome])
            print(*(outcome[k] for k in ("format", "rounding", "mismatches")), "mismatches in 2^32 inputs", flush=True)
    return int(any(o["mismatches"] for o in outcomes))


if __name__ == "__main__":
    sys.exit(main())
