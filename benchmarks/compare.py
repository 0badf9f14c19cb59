"""Two runs beside each other: what became slower by more than their noise."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.records import METRICS, Row, Table

THRESHOLD = 0.05


@dataclass(frozen=True)
class Change:
    """A row in both runs.

    Attributes:
        before, after: the row.
        slower: how many times worse its metric became: 1 for the same, above 1 for worse.
        noise: the quartiles' distance of both runs together, as a share.
    """

    before: Row
    after: Row
    slower: float
    noise: float

    def is_regression(self, threshold: float) -> bool:
        """Whether it is worse by more than the threshold and the noise."""
        return self.slower > 1 + max(threshold, self.noise)


def changes(before: Sequence[Row], after: Sequence[Row]) -> list[Change]:
    """Rows that both runs have, compared by their metric: beside what ran with them, where something did."""
    known = {row.key: row for row in before}
    return [_change(known[row.key], row) for row in after if row.key in known]


def _change(before: Row, after: Row) -> Change:
    a, b = before.spread, after.spread
    slower = a.median / b.median if METRICS[after.metric].higher else b.median / a.median
    return Change(before, after, slower, math.hypot(a.relative, b.relative))


def table(found: Sequence[Change], threshold: float) -> Table:
    """Changes as text, the header first."""
    lines: Table = [("kernel", "dtype", "elements", "metric", "before", "after", "slower by", "noise", "verdict")]
    for c in found:
        verdict = "REGRESSION" if c.is_regression(threshold) else "faster" if 1 / c.slower > 1 + c.noise else "same"
        lines.append(
            (
                c.after.kernel,
                c.after.dtype,
                str(c.after.elements or ""),
                c.after.metric,
                f"{c.before.spread.median:.3g}",
                f"{c.after.spread.median:.3g}",
                f"{c.slower - 1:+.1%}",
                f"{c.noise:.1%}",
                verdict,
            )
        )
    return lines
