"""What of a run is kept in a repository: its records, without weights, checkpoints and texts."""

from __future__ import annotations

import shutil
from itertools import groupby
from pathlib import Path

from training.arms import ComparisonError
from training.records import (
    ALARMS,
    EVALUATION,
    FINAL_RECEIPTS,
    INVALID,
    METRICS,
    PREFLIGHT,
    PROBLEM_COLUMNS,
    PROBLEMS,
    AnswerColumn,
    ProblemColumns,
    ProblemRecord,
)
from training.rundir import CONFIG, ENVIRONMENT, RESUMES, RUN, STATUS, RunDirectory

KEPT = (CONFIG, RUN, ENVIRONMENT, STATUS, RESUMES, METRICS, EVALUATION, FINAL_RECEIPTS, PREFLIGHT, ALARMS, INVALID)


def archive(run: Path, out: Path) -> Path:
    """Copy a finished run's records into a folder of its name below `out`; analyses read it as they read the run.

    Answers are kept as right or wrong, a character a problem; completions are not.

    Raises:
        ComparisonError: the run is not finished, or the folder is there already.
        RunDirectoryError: not a run directory.
    """
    directory = RunDirectory.open(run)
    if directory.status.state != "finished":
        raise ComparisonError(f"{run} is {directory.status.state}: only finished runs are archived")
    target = out / directory.path.name
    if target.exists():
        raise ComparisonError(f"{target} is there already: an archive is never overwritten")
    staging = out / f".{directory.path.name}.tmp"
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    for name in KEPT:
        if (directory.path / name).exists():
            shutil.copyfile(directory.path / name, staging / name)
    columns = columns_of(directory.read_jsonl(PROBLEMS, ProblemRecord))
    (staging / PROBLEM_COLUMNS).write_text(columns.model_dump_json(indent=1) + "\n", encoding="utf-8")
    return staging.rename(target)


def columns_of(rows: list[ProblemRecord]) -> ProblemColumns:
    """Answers by evaluation; every evaluation has the same problems, in the order of their names."""
    evaluations, ids = [], tuple(sorted({row.problem_id for row in rows}))
    rows = sorted(rows, key=lambda r: (r.step, r.split_is_final, r.mode, r.problem_id))
    for (step, is_final, mode), group in groupby(rows, key=lambda r: (r.step, r.split_is_final, r.mode)):
        right = {row.problem_id: row.correct for row in group}
        if right.keys() != set(ids):
            raise ComparisonError(f"the {mode} evaluation at step {step} lacks {sorted(set(ids) - right.keys())[:3]}")
        marks = "".join("1" if right[i] else "0" for i in ids)
        evaluations.append(AnswerColumn(step=step, is_final=is_final, mode=mode, correct=marks))
    return ProblemColumns(problem_ids=ids, evaluations=tuple(evaluations))
