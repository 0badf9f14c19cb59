"""Tables of the documentation that are computed: where rules disagree, and what confirms which format."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np

from aqnsim import formats, reference
from aqnsim.cli.output import Table
from aqnsim.formats import BlockFormat, Format

TESTS = Path(__file__).resolve().parents[1] / "tests"

NVFP4_RULES = ("te", "modelopt", "compressed_tensors", "torchao", "qutlass", "4over6-mae")


def _shown(value: float) -> str:
    return f"{float(value):.6g}"


def _cast(text: str, x: list[float]) -> list[float]:
    values: list[float] = reference.cast(np.array(x, np.float32), formats.get(text)).tolist()
    return values


def tie_table() -> Table:
    """FP4 E2M1 at its ties, and below 0, by each deterministic rounding."""
    inputs = [0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, -0.75, 5.5]
    names = ("nearest-even", "nearest-away", "nearest-down", "toward-zero", "up", "down")
    columns = [_cast(f"fp4_e2m1(rounding={name})", inputs) for name in names]
    rows = zip(inputs, *columns, strict=True)
    return [("x", *names), *(tuple(map(_shown, row)) for row in rows)]


def scale_table() -> Table:
    """The scale that each E8M0 rule gives a block ``[amax, 1, 0, ...]``, and what amax becomes."""
    rules = [r for r in formats.SCALE_RULES["e8m0"] if r != "mse"]
    rows: Table = [("element", "amax", *rules)]
    for name, amax in [
        ("mxfp4", 7.9999995),
        ("mxfp4", 7.0),
        ("mxfp4", 6.0000005),
        ("mxfp4", 5.0),
        ("mxfp4", 3e38),
        ("mxfp8_e4m3", 448.00003),
        ("mxfp8_e4m3", 480.0),
        ("mxfp8_e4m3", 496.0),
        ("mxfp8_e4m3", 1.75),
    ]:
        cells = []
        for rule in rules:
            fmt = formats.get(f"{name}(scale={rule})")
            assert isinstance(fmt, BlockFormat)
            blocks = reference.blocks_of(np.array([amax, 1.0], np.float32), fmt)
            exponent = int(np.frexp(blocks.scales[0])[1]) - 1
            cells.append(f"2^{exponent}: {_shown(blocks.values[0])}")
        rows.append((fmt.element.name, f"{amax:.9g}", *cells))
    return rows


def nvfp4_table() -> Table:
    """Two blocks of 16, the first ``[1, 0, ...]``: what the second one's first value becomes by each library's rule."""
    second = {
        "2^-15": 2.0**-15,
        "1.49 2^-9 / 448": 1.49 * 2**-9 / 448,
        "0.4 2^-9 / 448": 0.4 * 2**-9 / 448,
        "0.3": 0.3,
    }
    cases: dict[str, list[float]] = {}
    for name, value in second.items():
        cases[name] = [1.0] + [0.0] * 15 + [value]
    cases["0, in a tensor of zeros"] = [0.0] * 17
    cases["5e-39, largest of the tensor 1e-38"] = [1e-38] + [0.0] * 15 + [5e-39]
    cases["1, with an Inf in the first block"] = [float("inf")] + [0.0] * 15 + [1.0]
    cases["1, with a NaN in the first block"] = [float("nan")] + [0.0] * 15 + [1.0]
    rows: Table = [("second block", *NVFP4_RULES)]
    for name, x in cases.items():
        rows.append((name, *(_shown(_cast(f"nvfp4(scale={rule})", x)[16]) for rule in NVFP4_RULES)))
    return rows


def confirmation_table() -> Table:
    """What of each named format was compared with which independent implementation: what the tests run."""
    sys.path.insert(0, str(TESTS))
    try:
        from oracles import confirmed_by
    finally:
        sys.path.remove(str(TESTS))
    rows: Table = [("format", "what", "confirmed by")]
    for name, found in confirmed_by().items():
        by: dict[str, list[str]] = {}
        for what, judges in found.items():
            by.setdefault(judges, []).append(what)
        rows += [(name, ", ".join(whats), judges) for judges, whats in by.items()]
    return rows


def exhaustive_table() -> Table:
    """The recorded sweeps over all 2^32 binary32 inputs."""
    outcomes = json.loads((TESTS / "exhaustive" / "results.json").read_text())
    rows: Table = [("format", "roundings swept", "inputs of each", "mismatches")]
    for name, fmt in formats.ALL.items():
        own = [o for o in outcomes if o["format"] == name]
        if isinstance(fmt, Format) and own:
            roundings = ", ".join(o["rounding"] for o in own)
            rows.append((name, roundings, "2^32", str(sum(o["mismatches"] for o in own))))
    return rows
