"""Pictures of a run: each kernel's share of its memory limit, and throughput over size."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.records import Row, spread_of


def plots(rows: Sequence[Row]) -> dict[str, Any]:
    """Figures by name; of rows that have a limit of memory and of those of the scaling suite."""
    from matplotlib.figure import Figure

    found: dict[str, Any] = {}
    scaled = [r for r in rows if r.suite == "scaling"]
    limited = [r for r in rows if r.moved and r.beside_moved and r.suite != "scaling"]
    if limited:
        found["limits"] = _limits(Figure(figsize=(9, 1 + 0.18 * len(limited)), layout="constrained"), limited)
    if scaled:
        found["scaling"] = _scaling(Figure(figsize=(8, 5), layout="constrained"), scaled)
    return found


def _limits(figure: Any, rows: Sequence[Row]) -> Any:
    """Bars as in a roofline: 1 is the bandwidth that ``copy_`` reached on the bytes that the kernel must move."""
    axes = figure.subplots()
    labels = [f"{r.kernel} {r.dtype}" for r in rows]
    spreads = [spread_of(r, "of limit") for r in rows]
    errors = [[s.median - s.low for s in spreads], [s.high - s.median for s in spreads]]
    axes.barh(range(len(rows)), [s.median for s in spreads], xerr=errors, height=0.7, color="#4878a8", ecolor="#333333")
    for i, row in enumerate(rows):
        if row.target is not None and row.metric in ("of copy_", "of limit"):
            share = row.target * (row.moved / row.beside_moved if row.metric == "of copy_" else 1)
            axes.plot([share, share], [i - 0.4, i + 0.4], color="#c44e52", linewidth=2)
    axes.axvline(1, color="black", linewidth=1)
    axes.set_yticks(range(len(rows)), labels, fontsize=7)
    axes.invert_yaxis()
    axes.set_xlabel("share of the memory limit (red: target)")
    return figure


def _scaling(figure: Any, rows: Sequence[Row]) -> Any:
    axes = figure.subplots()
    for kernel, threads in dict.fromkeys((r.kernel, r.threads) for r in rows):
        line = [r for r in rows if (r.kernel, r.threads) == (kernel, threads)]
        speeds = [spread_of(r, "Gelt/s").median for r in line]
        axes.plot([r.elements for r in line], speeds, marker="o", label=f"{kernel}, threads: {threads or '-'}")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xlabel("elements, bf16")
    axes.set_ylabel("Gelt/s")
    axes.legend()
    axes.grid(alpha=0.3)
    return figure


def save(directory: Path, stem: str, rows: Sequence[Row]) -> None:
    """Write the figures as PNG, each whole or not at all."""
    for name, figure in plots(rows).items():
        path, temporary = directory / f"{stem}-{name}.png", directory / f"{stem}-{name}.tmp"
        figure.savefig(temporary, format="png", dpi=120)
        temporary.replace(path)
