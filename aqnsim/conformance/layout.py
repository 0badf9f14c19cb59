"""Laws of both primitives: no layout, thread count or second call changes a bit; receipts tell the truth."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

from aqnsim import formats
from aqnsim.conformance.compare import kind, same, same_stats
from aqnsim.conformance.inputs import CHAINS, magnitude, normal_values
from aqnsim.conformance.registry import KEY, STEP, Subject, law, truth
from aqnsim.receipts import STATS

DRAWN = (
    "cast fp8_e4m3(rounding=stochastic)",
    "cast mxfp4(rounding=stochastic-8)",
    "perturb relative-gaussian(sigma=0.05)",
    "perturb spike(rate=0.1, size=3) + absolute-gaussian(sigma=0.1)",
)


def _drawn(quick: bool) -> tuple[str, ...]:
    return DRAWN


def _op_on(s: Subject, case: str, x: Tensor, rows: Tensor | None, measure: bool = False) -> tuple[Tensor, ...]:
    op, text = case.split(" ", 1)
    if op == "cast":
        return s("cast", x, text, -1, KEY, STEP, rows, measure)
    return s("perturb", x, text, KEY, STEP, rows, None, None, measure)


@law("layout", "bit", "cast perturb", _drawn)
def _layout(s: Subject, case: str) -> str:
    """Split batches, permuted rows, other strides and dimensions: an element keeps its bits."""
    x, rng = normal_values(300, 320, seed=12).to(s.device), np.random.default_rng(13)
    rows = torch.from_numpy(rng.permutation(300)).to(s.device)
    order = torch.from_numpy(rng.permutation(300)).to(s.device)
    wide = torch.zeros(300, 640, device=s.device)
    wide[:, ::2] = x

    def of(t: Tensor, ids: Tensor) -> Tensor:
        return _op_on(s, case, t, ids)[0]

    whole = of(x, rows)
    same(torch.cat([of(x[i : i + 77], rows[i : i + 77]) for i in range(0, 300, 77)]), whole, "split batch")
    same(of(x[order], rows[order]), whole[order.cpu()], "permuted rows")
    same(of(x[:, :128], rows), whole[:, :128], "fewer columns")
    same(of(x.t().contiguous().t(), rows), whole, "transposed in memory")
    same(of(wide[:, ::2], rows), whole, "strided columns")
    same(of(x.view(20, 15, 320), rows).view(300, 320), whole, "more dimensions")
    pairs = torch.stack([rows, torch.full_like(rows, 64)], 1)
    same(of(x[:, 64:], pairs), whole[:, 64:], "rows that begin further on")
    return "7 layouts of 300 x 320"


def _measured(quick: bool) -> tuple[str, ...]:
    return ("cast mxfp4", "cast nvfp4", "cast fp8_e4m3_128x128", *DRAWN)


@law("determinism", "bit", "cast perturb", _measured)
def _determinism(s: Subject, case: str) -> str:
    """The same call gives the same bits and receipts; on a CPU, with another number of threads, too."""
    x = normal_values(300, 701, seed=15)
    first = _op_on(s, case, x, None, True)
    for again in _again(s, lambda: _op_on(s, case, x, None, True)):
        same(again[0], first[0], "result of a second call", x)
        same(again[1], first[1], "receipt of a second call")
    return "2 calls more"


def _again(s: Subject, call: Callable[[], tuple[Tensor, ...]]) -> Iterator[tuple[Tensor, ...]]:
    before = torch.get_num_threads()
    try:
        for count in (1, 2):
            if torch.device(s.device).type == "cpu":
                torch.set_num_threads(count)
            yield call()
    finally:
        torch.set_num_threads(before)


@law(
    "receipts",
    "bit",
    "cast perturb",
    lambda quick: [f"cast {t}" for t in formats.ALL] + [f"perturb {t}" for t in CHAINS],
)
def _receipts(s: Subject, case: str) -> str:
    """What an op says of itself: counts exactly, sums to 1e-6; and unmeasured it gives the same bits and says 0."""
    op, text = case.split(" ", 1)
    x = normal_values(90, 130, seed=16)
    for t in (x, x.bfloat16()):
        rest = (-1, KEY, STEP, None) if op == "cast" else (KEY, STEP, None, magnitude(text, t), None)
        (got, stats), (expected, true_stats) = (call(op, t, text, *rest, True) for call in (s, truth))
        quiet, zeros = s(op, t, text, *rest, False)
        same(got, expected, "measured", t)
        same(quiet, got, "unmeasured", t)
        same_stats(stats, true_stats, f"receipt of {kind(t)}")
        same(zeros, torch.zeros(len(STATS), dtype=torch.float64), "receipt of an unmeasured call")
    return f"{x.numel()} values"
