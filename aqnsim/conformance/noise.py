"""Laws of ``perturb``: every error model, bit for bit."""

from __future__ import annotations

import torch
from torch import Tensor

from aqnsim.conformance.compare import kind, same, same_stats
from aqnsim.conformance.inputs import chains, magnitude, normal_values, random_patterns, some_rows
from aqnsim.conformance.registry import KEY, STEP, Subject, law, truth


def _perturb_agrees(
    s: Subject, y: Tensor, text: str, rows: Tensor | None, dtype: torch.dtype | None, what: str
) -> None:
    arguments = (y, text, KEY, STEP, rows, magnitude(text, y), dtype, True)
    (got, stats), (expected, true_stats) = s("perturb", *arguments), truth("perturb", *arguments)
    what = f"{what} in {kind(y)}, result {str(got.dtype).removeprefix('torch.')}"
    same(got, expected, what, y)
    same_stats(stats, true_stats, what, sums=False)


@law("perturb", "bit", "perturb", chains)
def _perturb(s: Subject, text: str) -> str:
    """Every error model and chain, whatever the columns, the rows and where they begin, and the result's dtype."""
    widths = (1, 127, 130) if s.quick else (1, 3, 127, 128, 129, 260)
    for columns in widths:
        for y in (normal_values(17, columns, seed=8), normal_values(17, columns, seed=8).bfloat16()):
            for rows in (None, some_rows(17, False), some_rows(17, True)):
                for dtype in (None, torch.float32, torch.bfloat16):
                    _perturb_agrees(s, y, text, rows, dtype, "rows" if rows is not None else "no rows")
    return f"17 rows of {', '.join(map(str, widths))} columns"


@law("perturb random bits", "bit", "perturb", chains)
def _perturb_random_bits(s: Subject, text: str) -> str:
    """fp32 of all exponents, Inf and NaN, which pass; odd shapes, float16."""
    y = random_patterns(1 << (13 if s.quick else 15), seed=10).view(-1, 256)
    _perturb_agrees(s, y, text, None, None, "random bits")
    _perturb_agrees(s, y, text, None, torch.bfloat16, "random bits")
    if "bit-flip" not in text:
        _perturb_agrees(s, normal_values(9, 70).half(), text, None, None, "float16")
    for shape in ((), (5,), (0,), (3, 0), (2, 3, 4)):
        _perturb_agrees(s, normal_values(*shape, seed=11).reshape(shape), text, None, None, "shapes")
    return f"{y.numel()} values"
