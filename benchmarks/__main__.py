"""``python -m benchmarks run --suite cpu,overhead,e2e`` and ``python -m benchmarks compare BEFORE.json AFTER.json``."""

from __future__ import annotations

import argparse
import sys
from importlib.util import find_spec
from pathlib import Path

from benchmarks import compare, plots, records, suites
from benchmarks.timing import keep_freed_memory


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    commands = parser.add_subparsers(required=True)
    run = commands.add_parser("run", help="the gate, then timings")
    run.add_argument("--suite", default="cpu", help=f"some of {', '.join(suites.SUITES)}, separated by commas")
    run.add_argument("--peers", action="store_true", help="also casts of other libraries, of those that are installed")
    run.add_argument("--save", type=Path, metavar="DIR", help="write JSON, tables and pictures here")
    run.add_argument("--name", help="of the files; default: the suites")
    run.add_argument("--repeats", type=int, default=9, help="rounds that count")
    run.add_argument("--quick", action="store_true", help="tiny tensors, to see that everything runs")
    run.add_argument("--only", default="*", metavar="PATTERN", help="kernels whose name matches, such as 'cast mx*'")
    run.add_argument("--dtypes", default="float32,bfloat16")
    run.add_argument("--backend", help="time this one instead of the suite's")
    run.add_argument("--device", help="time on this one instead of the suite's")
    run.set_defaults(call=_run)
    both = commands.add_parser("compare", help="what became slower from one run to another, beyond the noise")
    both.add_argument("before", type=Path)
    both.add_argument("after", type=Path)
    both.add_argument("--threshold", type=float, default=compare.THRESHOLD, help="share that may be lost at least")
    both.set_defaults(call=_compare)
    parsed = parser.parse_args(arguments)
    return int(parsed.call(parsed))


def _run(given: argparse.Namespace) -> int:
    names = given.suite.split(",")
    wanted = [
        suites.setting(name, given.backend, given.device, given.repeats, given.quick, given.only, given.dtypes)
        for name in names
    ]
    if any(s.threads for s in wanted):
        keep_freed_memory()
    rows: list[records.Row] = []
    for s in wanted:
        suites.gate(s)
        for row in suites.rows(s, given.peers):
            rows.append(row)
            print(f"{row.kernel} {row.dtype}: {row.spread.median:.3g} {row.metric}", file=sys.stderr, flush=True)
    about = records.environment([s.backend for s in wanted], wanted[0].device)
    table = records.aligned(records.table(rows))
    judged = [row.met for row in rows if row.met is not None]
    print(f"{table}\n\n{sum(judged)} of {len(judged)} targets are met; {about}")
    if given.save:
        stem = given.name or "-".join(names)
        records.save(given.save / f"{stem}.json", rows, about)
        records.write(given.save / f"{stem}.txt", table + "\n")
        if find_spec("matplotlib"):
            plots.save(given.save, stem, rows)
        else:
            print("no pictures: matplotlib is not installed")
        print(f"wrote {given.save / stem}.*")
    return 0


def _compare(given: argparse.Namespace) -> int:
    found = compare.changes(records.load(given.before)[0], records.load(given.after)[0])
    if not found:
        raise SystemExit(f"{given.before} and {given.after} have no row in common: nothing can be compared")
    print(records.aligned(compare.table(found, given.threshold)))
    return 1 if any(c.is_regression(given.threshold) for c in found) else 0


if __name__ == "__main__":
    sys.exit(main())
