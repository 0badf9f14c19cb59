"""Tables of the documentation about training: what archived runs recorded, those marked invalid left out and named."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.append(str(ROOT))  # the application is not installed

from aqnsim.cli.output import Table  # noqa: E402
from training.records import Mode  # noqa: E402
from training.rundir import CONFIG  # noqa: E402
from training.summary import ArmSummary, RunSummary, arms, mean_interval  # noqa: E402

ARCHIVE = ROOT / "docs" / "results"


def archived() -> list[RunSummary]:
    """Every archived run, sorted by its folder."""
    return [RunSummary.read(path.parent) for path in sorted(ARCHIVE.rglob(CONFIG))]


def valid() -> list[RunSummary]:
    """The archived runs whose numbers may be used."""
    return [run for run in archived() if run.counts]


def arm_table() -> Table:
    """Accuracy by arm, over seeds."""
    rows: Table = [("arm", "model", "task", "seeds", "problems", "emulated, %", "clean, %", "profile", "fingerprint")]
    for arm in arms(valid()):
        first = arm.runs[0]
        assert first.final is not None
        experiment = first.directory.experiment
        rows.append(
            (
                arm.label,
                experiment.model.name,
                experiment.task.name,
                ", ".join(str(run.seed) for run in arm.runs),
                str(first.final.emulated.n),
                _mean(arm, "emulated"),
                _mean(arm, "clean"),
                first.directory.run.profile,
                first.directory.run.fingerprint,
            )
        )
    return rows


def _mean(arm: ArmSummary, mode: Mode) -> str:
    mean, interval = mean_interval(arm.accuracies(mode))
    return f"{100 * mean:.1f}" + (f" ({100 * interval.low:.1f} to {100 * interval.high:.1f})" if interval else "")


def run_table() -> Table:
    """Each run: where it started, where it ended, on what it ran."""
    rows: Table = [("record", "steps", "emulated, start", "emulated, end", "clean, end", "revision", "machine")]
    for run in valid():
        assert run.final is not None
        start = run.scores[min(run.scores)]["emulated"]
        environment = run.directory.environment()
        machine = environment.get("gpu") or f"{environment.get('cpu.model')}, {environment.get('cpu.threads')} threads"
        dirty = ", changed" if environment.get("git.dirty") else ""
        rows.append(
            (
                run.name,
                str(run.final.step),
                f"{100 * start.accuracy:.1f}" if min(run.scores) < run.final.step else "-",
                *(_wilson(run, mode) for mode in ("emulated", "clean")),
                f"{str(environment.get('git.revision'))[:12]}{dirty}",
                machine,
            )
        )
    return rows


def _wilson(run: RunSummary, mode: Mode) -> str:
    assert run.final is not None
    score = run.final.score(mode)
    low, high = score.wilson
    return f"{100 * score.accuracy:.1f} ({100 * low:.1f} to {100 * high:.1f})"


def receipt_table() -> Table:
    """What the receipts of each run say of its weights, and of its noise at the step where it was farthest off."""
    rows: Table = [("record", "weights", "worst SQNR, dB", "steps with noise", "largest deviation of sigma")]
    for run in valid():
        weights = [r for r in run.receipts if r.stream == "weight" and r.sqnr_db is not None]
        noisy = [(r.sigma_requested, r.sigma_realised or 0.0) for r in run.metrics if r.sigma_requested]
        worst = max((realised / asked - 1 for asked, realised in noisy), key=abs, default=None)
        rows.append(
            (
                run.name,
                ", ".join(sorted({r.requested for r in weights})) or "-",
                f"{min(r.sqnr_db for r in weights if r.sqnr_db is not None):.1f}" if weights else "-",
                f"{len(noisy)} of {len(run.metrics)}",
                "-" if worst is None else f"{100 * worst:+.2f} %",
            )
        )
    return rows


def invalid_table() -> Table:
    """The records that no table above uses any more, and why."""
    rows: Table = [("record", "since", "reason")]
    rows += [(run.name, run.invalid.since, run.invalid.reason) for run in archived() if run.invalid]
    return rows


def _or_none(table: Callable[[], Table]) -> Callable[[], Table]:
    """A table that says so where it has no row."""

    def filled() -> Table:
        rows = table()
        return rows if len(rows) > 1 else [rows[0], ("none", *[""] * (len(rows[0]) - 1))]

    return filled


TABLES: dict[str, Callable[[], Table]] = {
    name: _or_none(table)
    for name, table in {
        "results-arms": arm_table,
        "results-runs": run_table,
        "results-receipts": receipt_table,
        "results-invalid": invalid_table,
    }.items()
}
