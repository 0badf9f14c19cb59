"""What ``aqnsim export`` prints."""

from __future__ import annotations

from collections import Counter
from typing import Any

from aqnsim.cli.output import Section, Table
from aqnsim.export import Report


def to_dict(report: Report) -> dict[str, Any]:
    """All of a report as plain values."""
    return {
        "out": str(report.out),
        "to": report.to,
        "format": report.format,
        "exported": list(report.exported),
        "skipped": dict(report.skipped),
        "bytes_before": report.bytes_before,
        "bytes_after": report.bytes_after,
        "notes": list(report.notes),
    }


def page(report: Report) -> list[Section]:
    """How many tensors were packed or copied, and why; sizes; what to know about the checkpoint."""
    rows: Table = [("tensors", "what was done")]
    rows.append((str(len(report.exported)), f"packed as {report.format} for {report.to}"))
    rows += [(str(count), f"copied: {reason}") for reason, count in Counter(report.skipped.values()).most_common()]
    lines = [
        f"{report.bytes_before} bytes of weights became {report.bytes_after}",
        *(f"note: {n}" for n in report.notes),
    ]
    return [Section("", rows), Section("", "\n".join(lines)), Section("", f"written: {report.out}")]
