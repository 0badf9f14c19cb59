"""``python -m benchmarks cast | leave | step | train``: print a table; ``--json FILE`` keeps it and the environment."""

from __future__ import annotations

import argparse
import json
import os
import platform
from pathlib import Path
from typing import Any

import torch

import aqnsim
from benchmarks import cast, leave, step, train

SUITES = {"cast": cast.rows, "leave": leave.rows, "step": step.rows, "train": train.rows}


def environment() -> dict[str, Any]:
    """What the timings depend on."""
    from aqnsim import _core

    return {
        "aqnsim": aqnsim.__version__,
        "torch": torch.__version__,
        "isa": _core.isa(),
        "threads": torch.get_num_threads(),
        "machine": platform.machine(),
        "system": platform.system(),
    }


def print_table(rows: list[dict[str, Any]]) -> None:
    """Rows as aligned columns."""
    header = list(rows[0])
    cells = [header, *[[str(row[key]) for key in header] for row in rows]]
    widths = [max(len(line[i]) for line in cells) for i in range(len(header))]
    for line in cells:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("suite", choices=SUITES)
    parser.add_argument("--repeats", type=int, default=9, help="runs of each; the median counts")
    parser.add_argument("--json", type=Path, help="also write the rows and the environment here")
    arguments = parser.parse_args()
    rows = SUITES[arguments.suite](arguments.repeats)
    print_table(rows)
    if arguments.json:
        record = {"suite": arguments.suite, "environment": environment(), "rows": rows}
        temporary = arguments.json.with_suffix(".tmp")
        temporary.write_text(json.dumps(record, indent=2) + "\n")
        os.replace(temporary, arguments.json)


if __name__ == "__main__":
    main()
