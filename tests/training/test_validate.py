"""Sweeps that survive anything, questions decided from intervals, archives that analyses read as runs."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fake_runs
import numpy as np
import pytest
from typer.testing import CliRunner

from training import arms, validate
from training.__main__ import app
from training.archive import archive
from training.arms import ComparisonError, find_runs, mark_invalid
from training.config import load
from training.power import table_of
from training.questions import MATRIX, QUESTIONS, decision, question
from training.rundir import CHECKOUT, RunDirectory
from training.sweep import planned, sweep
from training.validate import attest

WriteRun = Callable[..., RunDirectory]
write_run = fake_runs.write_run
SMALL = ["task.eval_problems=8", "algorithm.steps=6", "aqn.stages=3"]


# ---- sweeps ---------------------------------------------------------------------------------------------------------


def fake(write: WriteRun, state: str = "finished") -> Callable[[list[str]], int]:
    def execute(arguments: list[str]) -> int:
        if "--resume" in arguments:
            RunDirectory.open(Path(arguments[arguments.index("--resume") + 1])).set_status("finished")
        else:
            write(arguments[1], seed=int(arguments[arguments.index("--seed") + 1]), state=state)
        return 0

    return execute


def test_what_is_done_is_skipped_and_what_was_cut_off_goes_on(write_run: WriteRun, tmp_path: Path) -> None:
    wanted = planned(["e12", "e6a-lora-mxfp4"], 2, "smoke")
    write_run("e12", seed=0)
    write_run("e6a-lora-mxfp4", seed=1, state="interrupted")
    outcomes = sweep(wanted, tmp_path, execute=fake(write_run))
    assert [o.state for o in outcomes] == ["finished", "started", "started", "resumed"]
    assert [o.state for o in sweep(wanted, tmp_path, execute=lambda a: 1)] == ["finished"] * 4


def test_a_crash_is_reported_and_does_not_stop_the_others(write_run: WriteRun, tmp_path: Path) -> None:
    good = fake(write_run)
    wanted = planned(["e12", "e6a-lora-mxfp4", "e7a-lora-bf16"], 1, "smoke")
    outcomes = sweep(wanted, tmp_path, execute=lambda a: 137 if "e6a-lora-mxfp4" in a else good(a))
    assert [o.state for o in outcomes] == ["started", "failed", "started"]
    assert outcomes[1].message == "exit status 137"


def test_runs_of_other_settings_and_invalid_ones_are_not_taken(write_run: WriteRun, tmp_path: Path) -> None:
    (wanted,) = planned(["e12"], 1, "smoke")
    write_run(load("e12", "smoke", ["lora.rank=8"]))
    assert wanted.find(find_runs(tmp_path)) is None
    run = write_run("e12")
    assert wanted.find(find_runs(tmp_path)) is not None
    mark_invalid(run.path, "the noise was not there", "0.1.0")
    assert wanted.find(find_runs(tmp_path)) is None
    with pytest.raises(ComparisonError, match=r"marked invalid since 0\.1\.0: the noise was not there"):
        arms.load_arm(run.path)


def test_a_sweep_that_is_killed_goes_on_where_it_was(tmp_path: Path) -> None:
    """A real run, killed without warning in the middle of its training; the next sweep ends it."""
    settings = [part for text in SMALL for part in ("--set", text)]
    command = [sys.executable, "-m", "training", "sweep", "e12", "--seeds", "1", "--preset", "smoke", *settings]
    command += ["--runs", str(tmp_path)]
    started = subprocess.Popen(command, cwd=CHECKOUT, stdout=subprocess.DEVNULL, start_new_session=True)
    deadline = time.monotonic() + 120
    while not any(path.read_text().count("\n") >= 2 for path in tmp_path.glob("*/metrics.jsonl")):
        assert time.monotonic() < deadline
        assert started.poll() is None
        time.sleep(0.05)
    os.killpg(started.pid, signal.SIGKILL)
    started.wait()
    (run,) = find_runs(tmp_path)
    assert run.status.state == "running"
    done = subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "goes on" in done.stdout
    (run,) = find_runs(tmp_path)
    assert run.status.state == "finished"
    steps = [json.loads(line)["step"] for line in (run.path / "metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3, 4, 5, 6]
    assert "done before" in subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True).stdout


# ---- questions ------------------------------------------------------------------------------------------------------


def answers(rng: np.random.Generator, base: np.ndarray, gain: float, jitter: float = 0.02) -> list[bool]:
    """Answers of one seed to the problems that `base` knows the difficulty of, `gain` better."""
    return list(map(bool, rng.random(len(base)) < np.clip(base + gain + rng.normal(0, jitter), 0, 1)))


def write_arms(write: WriteRun, gains: dict[str, float], seeds: int, problems: int = 400) -> None:
    rng = np.random.default_rng(0)
    base = np.where(rng.random(problems) < 0.5, 0.05, 0.85)
    for seed in range(seeds):
        for name, gain in gains.items():
            write(name, seed=seed, correct=answers(rng, base, gain))


@pytest.mark.parametrize(
    ("gain", "outcome"), [(0.15, "better"), (-0.15, "worse"), (0.0, "undecided"), (0.02, "undecided")]
)
def test_outcomes_follow_the_intervals(
    gain: float,
    outcome: str,
    write_run: WriteRun,
    tmp_path: Path,
) -> None:
    write_arms(write_run, {"e12": gain, "e6a-lora-mxfp4": 0.0, "e7a-lora-bf16": 0.0}, 4)
    found = validate.validate([question("e12")], "smoke", [tmp_path], seeds=4)
    primary = found.decided["e12"][0]
    assert primary.outcome == outcome
    assert (primary.seeds_needed is not None) == (outcome == "undecided")
    assert found.decision is None
    assert outcome in found.to_markdown()
    assert json.loads(json.dumps(found.to_dict()))["questions"]["e12"][0]["outcome"] == outcome


def test_equality_takes_a_margin_and_seeds(write_run: WriteRun, tmp_path: Path) -> None:
    write_arms(write_run, {"e12": 0.0, "e6a-lora-mxfp4": 0.0, "e7a-lora-bf16": 0.0}, 6, problems=2000)
    found = validate.validate([question("e12")], "smoke", [tmp_path], seeds=6, margin=0.1)
    assert found.decided["e12"][0].outcome == "equal"


def test_one_seed_decides_nothing(write_run: WriteRun, tmp_path: Path) -> None:
    write_arms(write_run, {"e12": 0.3, "e6a-lora-mxfp4": 0.0, "e7a-lora-bf16": 0.0}, 1)
    primary = validate.validate([question("e12")], "smoke", [tmp_path], seeds=1).decided["e12"][0]
    assert primary.outcome == "undecided"
    assert primary.p_value is None
    assert primary.seeds_needed is not None


def test_arms_that_differ_in_more_are_not_attributable(write_run: WriteRun, tmp_path: Path) -> None:
    write_arms(write_run, {"e12": 0.3, "e7a-lora-bf16": 0.0}, 3)
    rng = np.random.default_rng(1)
    base = np.where(rng.random(400) < 0.5, 0.05, 0.85)
    for seed in range(3):
        write_run("e6a-lora-mxfp4", seed=seed, correct=answers(rng, base, -0.2), fingerprint="ab" * 32)
    primary = validate.validate([question("e12")], "smoke", [tmp_path], seeds=3).decided["e12"][0]
    assert primary.outcome == "not attributable"
    assert "profile.fingerprint" in primary.text


def test_a_missing_arm_is_an_error_that_says_how_to_run_it(write_run: WriteRun, tmp_path: Path) -> None:
    write_arms(write_run, {"e12": 0.0}, 2)
    with pytest.raises(ComparisonError, match=r"no finished run of 'e6a-lora-mxfp4'.*training sweep e6a-lora-mxfp4"):
        validate.validate([question("e12")], "smoke", [tmp_path], seeds=2)


def test_noise_that_was_not_realised_is_refused(write_run: WriteRun, monkeypatch: pytest.MonkeyPatch) -> None:
    row = fake_runs.metrics_row

    def silent(step: int) -> Any:
        return row(step).model_copy(update={"sigma_realised": 0.0})

    monkeypatch.setattr(fake_runs, "metrics_row", silent)
    arm = arms.load_arm(write_run("e12").path)
    with pytest.raises(ComparisonError, match=r"asked for epoch-aware noise, and its records show none: step 3 asked"):
        attest(arm)


def test_the_matrix_decides_what_the_plan_says() -> None:
    assert decision("equal", "better") == decision("worse", "equal")
    assert decision("better", "not attributable") == "Not decided: targeting is not attributable."
    assert {decision("better", o) for o in ("equal", "better", "worse")} == set(MATRIX.values())  # type: ignore[arg-type]
    assert all(any(c.primary for c in q.contrasts) for q in QUESTIONS.values())


def test_an_archive_reads_as_the_run_does(write_run: WriteRun, tmp_path: Path) -> None:
    runs = [
        write_run(name, correct=[True, False, True, seed == 0], seed=seed)
        for seed in (0, 1)
        for name in ("e12", "e6a-lora-mxfp4")
    ]
    kept = [archive(run.path, tmp_path / "kept") for run in runs]
    for run, copy in zip(runs, kept, strict=True):
        assert arms.load_arm(copy).results == arms.load_arm(run.path).results
        assert not (copy / "problems.jsonl").exists()
    assert sum(f.stat().st_size for f in kept[0].iterdir()) < 40_000
    with pytest.raises(ComparisonError, match="is there already"):
        archive(runs[0].path, tmp_path / "kept")
    with pytest.raises(ComparisonError, match="only finished runs are archived"):
        archive(write_run("e7a-lora-bf16", state="failed").path, tmp_path / "kept")


# ---- commands -------------------------------------------------------------------------------------------------------


def test_power_says_what_seeds_detect() -> None:
    found = table_of(None, 0.2, 200, 0.02)
    assert found.detectable[3] > found.detectable[5] > found.detectable[20]
    assert "six published runs" in str(found)
    shown = CliRunner().invoke(app, ["power", "--seed-sd", "0.01", "--problems", "1319", "--json"])
    assert shown.exit_code == 0, shown.output
    assert json.loads(shown.output)["problems"] == 1319


def test_validate_decides_from_runs_that_are_there(write_run: WriteRun, tmp_path: Path) -> None:
    write_arms(write_run, {"e12": 0.2, "e6a-lora-mxfp4": 0.0, "e7a-lora-bf16": 0.0}, 3)
    out = tmp_path / "decided.json"
    asked = ["validate", "--question", "e12", "--preset", "smoke", "--seeds", "3", "--runs", str(tmp_path)]
    shown = CliRunner().invoke(app, [*asked, "--no-run", "--out", str(out)])
    assert shown.exit_code == 0, shown.output
    assert "`e12` - `e6a-lora-mxfp4` | 3 |" in shown.output
    assert out.with_suffix(".md").read_text().startswith("### e12")
    forecast = CliRunner().invoke(app, [*asked, "--dry-run"])
    assert "0 runs to go" in forecast.output
    measured = CliRunner().invoke(app, ["power", "--from", str(tmp_path), "--preset", "smoke"])
    assert measured.exit_code == 0, measured.output
