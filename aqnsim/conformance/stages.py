"""Laws of stages: how an operand enters an elementwise op, and how the result leaves it."""

from __future__ import annotations

import torch

from aqnsim.conformance.compare import kind, same, same_stats
from aqnsim.conformance.inputs import normal_values, some_rows
from aqnsim.conformance.registry import STEP, Subject, law, truth
from aqnsim.rng import key_of

STEPS = {
    "nothing": ("", "", ""),
    "cast in": ("mxfp8_e4m3", "", ""),
    "error": ("", "relative-gaussian(sigma=0.05)", ""),
    "error, then cast": ("", "relative-gaussian(sigma=0.05)", "bf16"),
    "all three": ("fp8_e4m3(rounding=stochastic)", "systematic-bias(gain=0.01)", "mxfp4"),
}


@law("stage", "bit", "stage", lambda quick: tuple(STEPS))
def _stage(s: Subject, case: str) -> str:
    """Cast on the way in, error before the rounding of the result, cast on the way out; receipts of each."""
    keys = [key_of(0, "conformance", str(i)) for i in range(3)]
    rows = some_rows(51, True)
    x = normal_values(3, 17, 130, seed=23)
    for t in (x, x.bfloat16()):
        for dtype in (torch.float32, torch.bfloat16):
            arguments = (t, list(STEPS[case]), dtype, keys, STEP, rows)
            (got, stats), (expected, true_stats) = s("stage", *arguments), truth("stage", *arguments)
            what = f"{kind(t)} to {str(dtype).removeprefix('torch.')}"
            same(got, expected, what, t)
            for i, (a, b) in enumerate(zip(stats, true_stats, strict=True)):
                same_stats(a, b, f"receipt {i} of {what}")
    return f"{4 * x.numel()} values"
