"""Run directories as a real run writes them, without training anything."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from training import rundir
from training.config import Experiment, load
from training.records import (
    EVALUATION,
    FINAL_RECEIPTS,
    METRICS,
    PROBLEMS,
    RECEIPTS,
    Evaluation,
    Mode,
    ProblemRecord,
    Score,
    State,
    StepMetrics,
)
from training.rundir import RunDirectory

FINGERPRINTS = {"mxfp4-w4a16": "4d" * 32, "ideal": "1d" * 32}
ENVIRONMENT = {"python": "3.11.7", "git": {"revision": "c0ffee", "dirty": False}}

WriteRun = Callable[..., RunDirectory]


def metrics_row(step: int, loss: float = 0.1) -> StepMetrics:
    """Sigma is zero in the first two steps, the batch of step 4 starved."""
    return StepMetrics(
        step=step,
        reward=0.2 + 0.01 * step,
        accuracy=0.25 + 0.01 * step,
        sigma_requested=0.0 if step < 3 else 0.05 * 0.8**step,
        sigma_realised=0.0 if step < 3 else 0.0501 * 0.8**step,
        kept_groups=5,
        generation_batches=2,
        starved=step == 4,
        loss=loss,
        grad_norm=1.0,
        completion_length=4.5,
        seconds=2.0,
    )


def weight_receipt(layer: int, role: str) -> dict[str, Any]:
    """What casting one weight of a layer realised: 18.5 dB in layer 0, 0.1 more in each next."""
    return {
        "site": f"model.layers.{layer}.self_attn.{role}",
        "role": role,
        "phase": "train",
        "stream": "weight",
        "requested": "mxfp4",
        "calls": 1,
        "elements": 1024,
        "measurable": 0,
        "changed": 0.9,
        "requested_sigma": None,
        "realised_sigma": None,
        "requested_rate": None,
        "realised_rate": None,
        "sqnr_db": 18.5 + 0.1 * layer,
        "saturated": 0.0,
        "nonfinite": 0,
    }


def problem_rows(answers: dict[Mode, Sequence[bool]], step: int, is_final: bool, first: int) -> list[ProblemRecord]:
    """One row for each mode and problem; before the end only every second one can be right."""
    return [
        ProblemRecord(
            step=step,
            split_is_final=is_final,
            mode=mode,
            problem_id=f"p{first + i}",
            correct=right and (is_final or i % 2 == 0),
            completion="7",
            answer="7",
        )
        for mode, rows in answers.items()
        for i, right in enumerate(rows)
    ]


@pytest.fixture
def write_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> WriteRun:
    """Writes a run; `correct[i]` says whether held-out problem i was solved in the end."""
    monkeypatch.setattr(rundir, "environment", lambda: ENVIRONMENT)

    def write(
        experiment: Experiment | str = "e12",
        *,
        correct: Sequence[bool] = (True, False),
        clean: Sequence[bool] | None = None,
        steps: int = 12,
        state: State = "finished",
        seed: int = 0,
        fingerprint: str | None = None,
        first_problem: int = 0,
    ) -> RunDirectory:
        if isinstance(experiment, str):
            experiment = load(experiment, "smoke")
        fingerprint = fingerprint or FINGERPRINTS[experiment.profile.name]
        run = RunDirectory.create(tmp_path, experiment, seed=seed, fingerprint=fingerprint)
        answers: dict[Mode, Sequence[bool]] = {
            "clean": correct if clean is None else clean,
            "emulated": correct,
        }
        run.append_jsonl(PROBLEMS, *problem_rows(answers, 0, False, first_problem))
        for step in range(1, steps + 1):
            run.append_jsonl(METRICS, metrics_row(step))
            run.append_jsonl(RECEIPTS, {"step": step, "receipts": []})
        run.append_jsonl(PROBLEMS, *problem_rows(answers, steps, True, first_problem))
        roles = ("q_proj", "o_proj")
        run.write_json(FINAL_RECEIPTS, [weight_receipt(i, role) for i in range(4) for role in roles])
        scores = {mode: Score.of(sum(rows), len(rows)) for mode, rows in answers.items()}
        evaluation = Evaluation(
            step=steps,
            is_final=True,
            clean=scores["clean"],
            emulated=scores["emulated"],
            profile=experiment.profile.name,
            fingerprint=fingerprint,
        )
        run.write_json(EVALUATION, evaluation)
        run.set_status(state)
        return run

    return write
