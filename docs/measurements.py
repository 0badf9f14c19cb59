"""Tables of the documentation that were measured: the committed records of the benchmarks."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT))  # the benchmarks are not installed

from aqnsim.cli.output import Table  # noqa: E402
from benchmarks.records import METRICS, Row, load, spread_of  # noqa: E402

RECORDS = ROOT / "docs" / "results" / "benchmarks"
COLUMNS = ("what", "dtype", "result", "quartiles", "share of the memory limit", "target", "met", "beside")


def _records() -> list[tuple[str, list[Row], dict[str, Any]]]:
    """Name, rows and environment of every record, the oldest first."""
    found = [(path.stem, *load(path)) for path in sorted(RECORDS.glob("*.json"))]
    return sorted(found, key=lambda record: record[2]["date"])


def environment_table() -> Table:
    """What each record was measured on."""
    lines: Table = [("record", "date", "commit", "machine", "backend", "versions")]
    for name, _, about in _records():
        cpu = f"{about['cpu']}, {about.get('isa', '')} {about['threads']} threads".replace(",  ", ", ")
        gpu = f"{about['gpu']}, driver {about['driver']}, CUDA {about['cuda']}; " if "gpu" in about else ""
        versions = ", ".join(f"{package} {version}" for package, version in about["packages"].items())
        lines.append((name, about["date"][:10], about["commit"][:12], gpu + cpu, about["backend"], versions))
    return lines


def _newest(*suites: str) -> list[Row]:
    """The rows of some suites; of rows that several records have, the newest."""
    rows = {row.key: row for _, found, _ in _records() for row in found if row.suite in suites}
    return list(rows.values())


def row_table(*suites: str) -> Callable[[], Table]:
    """What some suites measured."""
    return lambda: [COLUMNS, *(_cells(row) for row in _newest(*suites))]


def _cells(row: Row) -> tuple[str, ...]:
    spread, bound = row.spread, "at least" if METRICS[row.metric].higher else "at most"
    return (
        row.kernel,
        row.dtype,
        f"{spread.median:.3g} {row.metric}",
        f"{spread.low:.3g} to {spread.high:.3g}",
        f"{spread_of(row, 'of limit').median:.2f}" if row.moved and row.beside_moved else "-",
        "-" if row.target is None else f"{bound} {row.target:g}",
        {None: "-", True: "yes", False: "no"}[row.met],
        row.beside or "-",
    )


def wall_table() -> Table:
    """What ``copy_`` reached beside the kernels, and the casts that its bandwidth allows."""
    lines: Table = [("suite", "dtype", "copy_, GB/s", "one pass, Gelt/s", "two reads, Gelt/s")]
    seen = set()
    for row in _newest("cpu", "cuda", "triton"):
        if row.beside != "copy_" or (row.suite, row.dtype) in seen:
            continue
        seen.add((row.suite, row.dtype))
        seconds = sorted(row.beside_seconds)[len(row.beside_seconds) // 2]
        passes = row.elements / seconds / 1e9
        shown = (f"{row.beside_moved / seconds / 1e9:.1f}", f"{passes:.2f}", f"{passes * 2 / 3:.2f}")
        lines.append((row.suite, row.dtype, *shown))
    return lines


def scaling_table() -> Table:
    """Throughput over size and threads."""
    lines: Table = [("what", "elements", "threads", "Gelt/s", "of copy_")]
    for row in _newest("scaling"):
        speed, share = (f"{spread_of(row, metric).median:.3g}" for metric in ("Gelt/s", "of copy_"))
        lines.append((row.kernel, str(row.elements), str(row.threads), speed, share))
    return lines


TABLES: dict[str, Callable[[], Table]] = {
    "benchmark-environments": environment_table,
    "benchmark-walls": wall_table,
    "benchmark-cpu": row_table("cpu"),
    "benchmark-overhead": row_table("overhead"),
    "benchmark-scaling": scaling_table,
    "benchmark-e2e": row_table("linear", "train", "e2e", "step"),
    "benchmark-peers": row_table("peers"),
    "benchmark-cuda": row_table("cuda"),
    "benchmark-triton": row_table("triton"),
}
