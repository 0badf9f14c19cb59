"""What a run measured: rows with the seconds of every round, the environment, and the files that hold both."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import os
import platform
import subprocess
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from statistics import quantiles
from typing import Any

import torch

import aqnsim

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("numpy", "torch", "triton", "cupy-cuda12x", "cupy-cuda13x", "transformers")


@dataclass(frozen=True, kw_only=True)
class Row:
    """One thing that was timed beside another, in the same rounds.

    Attributes:
        suite: where it belongs.
        kernel: what ran.
        dtype: of its input, ``float32`` or ``bfloat16``.
        elements: of its input; 0 where that says nothing.
        threads: of the CPU.
        moved: bytes that it has to read and write; 0 where memory is not its limit.
        seconds: of each round.
        beside: what ran in the same rounds; empty for nothing.
        beside_seconds, beside_moved: of that.
        metric: what its target is about, a name of :data:`METRICS`.
        target: what is to be reached; None where nothing was set.
    """

    suite: str
    kernel: str
    dtype: str = ""
    elements: int = 0
    threads: int = 0
    moved: int = 0
    seconds: Sequence[float]
    beside: str = ""
    beside_seconds: Sequence[float] = ()
    beside_moved: int = 0
    metric: str
    target: float | None = None

    @property
    def key(self) -> tuple[str, ...]:
        """What tells a row from the others of its run, and finds it in another run."""
        return (self.suite, self.kernel, self.dtype, str(self.elements), str(self.threads), self.beside)

    @property
    def spread(self) -> Spread:
        """The row's metric over its rounds."""
        return spread_of(self, self.metric)

    @property
    def met(self) -> bool | None:
        """Whether the median reaches the target; None without one."""
        if self.target is None:
            return None
        value = self.spread.median
        return value >= self.target if METRICS[self.metric].higher else value <= self.target


@dataclass(frozen=True)
class Metric:
    """A figure of one round: of the seconds of what was timed, those of what ran beside it, and the row."""

    value: Callable[[float, float, Row], float]
    higher: bool


METRICS = {
    "of copy_": Metric(lambda own, beside, row: beside / own, True),
    "of limit": Metric(lambda own, beside, row: row.moved / row.beside_moved * beside / own, True),
    "times": Metric(lambda own, beside, row: beside / own, True),
    "of plain": Metric(lambda own, beside, row: own / beside, False),
    "Gelt/s": Metric(lambda own, beside, row: row.elements / own / 1e9, True),
    "us": Metric(lambda own, beside, row: own * 1e6, False),
    "ms": Metric(lambda own, beside, row: own * 1e3, False),
}
"""``of limit``: the share that the bytes moved would take at ``copy_``'s bandwidth; ``times``: how often faster."""


@dataclass(frozen=True)
class Spread:
    """Median and quartiles over the rounds."""

    low: float
    median: float
    high: float

    @property
    def relative(self) -> float:
        """The distance of the quartiles, as a share of the median."""
        return (self.high - self.low) / self.median


def spread_of(row: Row, metric: str) -> Spread:
    """A metric of a row, from each round's own two timings."""
    beside = row.beside_seconds or [1.0] * len(row.seconds)
    value = METRICS[metric].value
    values = [value(own, other, row) for own, other in zip(row.seconds, beside, strict=True)]
    return Spread(*quantiles(values, n=4, method="inclusive")) if len(values) > 1 else Spread(*values * 3)


# ---- the environment ------------------------------------------------------------------------------------------------


def environment(backends: Sequence[str], device: str) -> dict[str, Any]:
    """What the timings depend on."""
    found = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": _output("git", "rev-parse", "HEAD") + ("+" if _output("git", "status", "--porcelain") else ""),
        "aqnsim": aqnsim.__version__,
        "python": platform.python_version(),
        "system": platform.platform(),
        "cpu": _cpu(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "backend": ", ".join(dict.fromkeys(backends)),
        "packages": {name: version for name in PACKAGES if (version := version_of(name))},
    }
    if "cpu" in backends:
        from aqnsim import _core

        found["isa"] = _core.isa()
    if torch.device(device).type == "cuda":
        found["gpu"] = torch.cuda.get_device_name(device)
        found["driver"] = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        found["cuda"] = torch.version.cuda
    return found


def version_of(package: str) -> str:
    """The version of an installed package; empty for one that is absent."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def _output(*command: str) -> str:
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return ""
    return done.stdout.strip()


# ---- files and tables -----------------------------------------------------------------------------------------------


def write(path: Path, text: str) -> None:
    """A file that appears whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(path.suffix + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def save(path: Path, rows: Iterable[Row], about: dict[str, Any]) -> None:
    """Rows and their environment as JSON."""
    lines = ",\n".join(json.dumps(dataclasses.asdict(row)) for row in rows)
    write(path, f'{{"environment": {json.dumps(about)},\n"rows": [\n{lines}\n]}}\n')


def load(path: Path) -> tuple[list[Row], dict[str, Any]]:
    """Rows and environment of a file that :func:`save` wrote."""
    record = json.loads(path.read_text(encoding="utf-8"))
    return [Row(**row) for row in record["rows"]], record["environment"]


Table = list[tuple[str, ...]]


def table(rows: Iterable[Row]) -> Table:
    """Rows as text, the header first."""
    header = (
        "kernel",
        "dtype",
        "elements",
        "threads",
        "ms",
        "result",
        "quartiles",
        "of limit",
        "beside",
        "target",
        "met",
    )
    return [header, *(_cells(row) for row in rows)]


def _cells(row: Row) -> tuple[str, ...]:
    spread, limited = row.spread, row.moved and row.beside_moved
    bound = ">=" if METRICS[row.metric].higher else "<="
    return (
        row.kernel,
        row.dtype,
        str(row.elements or ""),
        str(row.threads or ""),
        f"{spread_of(row, 'ms').median:.4g}",
        f"{spread.median:.3g} {row.metric}",
        f"{spread.low:.3g} .. {spread.high:.3g}",
        f"{spread_of(row, 'of limit').median:.2f}" if limited else "-",
        row.beside or "-",
        "-" if row.target is None else f"{bound} {row.target:g}",
        {None: "-", True: "yes", False: "no"}[row.met],
    )


def aligned(lines: Table) -> str:
    """A table in columns."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    padded = ["  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in lines]
    return "\n".join(padded)
