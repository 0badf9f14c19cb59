"""Run directories: never overwritten, never half-written, and resumed to the same records."""

from __future__ import annotations

import errno
import json
import math
import os
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import fake_runs
import pytest
from fake_runs import WriteRun, metrics_row

from training import rundir
from training.config import load
from training.records import METRICS, PROBLEMS, RECEIPTS, ProblemRecord, StepMetrics
from training.rundir import RunDirectory, RunDirectoryError

write_run = fake_runs.write_run

Create = Callable[..., RunDirectory]


@pytest.fixture
def create(tmp_path: Path) -> Callable[..., RunDirectory]:
    def create(**options: Any) -> RunDirectory:
        options = {"seed": 0, "fingerprint": "4d" * 32} | options
        return RunDirectory.create(tmp_path / "runs", load("e12", "smoke"), **options)

    return create


def refuse_writes(monkeypatch: pytest.MonkeyPatch, after: int) -> None:
    """A disk that is full after `after` more bytes."""
    left, real = after, os.write

    def write(descriptor: int, data: bytes) -> int:
        nonlocal left
        if left == 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        written = real(descriptor, bytes(data)[:left])
        left -= written
        return written

    monkeypatch.setattr(os, "write", write)


def test_names_are_unique_and_tell_what_ran(create: Create, monkeypatch: pytest.MonkeyPatch) -> None:
    class Frozen(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> datetime:
            return datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)

    monkeypatch.setattr(rundir, "datetime", Frozen)
    first, second, third = create(), create(), create()
    digest = first.experiment.digest[:8]
    assert first.path.name == f"e12-smoke-seed0-20260102T030405Z-{digest}"
    assert second.path.name == f"{first.path.name}-2"
    assert third.path.name == f"{first.path.name}-3"


def test_a_run_is_described_completely(create: Create) -> None:
    home = str(Path.home())
    run = create(seed=7, command=["run", "e12", "--runs", f"{home}/runs"], processes=2)
    stored = json.loads((run.path / "config.json").read_text())
    assert stored["digest"] == run.experiment.digest
    assert stored["experiment"]["aqn"]["sigma_start"] == 0.05
    described = json.loads((run.path / "run.json").read_text())
    assert described["command"] == ["run", "e12", "--runs", "~/runs"]
    assert (described["seed"], described["processes"]) == (7, 2)
    assert (described["profile"], described["fingerprint"]) == ("mxfp4-w4a16", "4d" * 32)
    environment = json.loads((run.path / "environment.json").read_text())
    assert environment.keys() == {"python", "platform", "cpu", "gpu", "packages", "git"}
    assert environment["packages"].keys() >= {"torch", "trl", "peft", "transformers", "aqnsim"}
    assert environment["packages"]["torch"].startswith("2.")
    assert environment["git"].keys() == {"revision", "dirty"}
    assert environment["cpu"]["threads"] >= 1
    assert home not in (run.path / "environment.json").read_text()
    assert run.status.state == "running"


def test_no_variable_of_the_environment_is_written(create: Create, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_TOKEN", "hush-hush")
    run = create()
    assert all(b"hush-hush" not in path.read_bytes() for path in run.path.iterdir())


def test_open_gives_back_what_was_created(create: Create) -> None:
    run = create(seed=3, command=["run"])
    again = RunDirectory.open(run.path)
    assert (again.experiment, again.run) == (run.experiment, run.run)


def test_open_refuses_another_config(create: Create) -> None:
    run = create()
    assert RunDirectory.open(run.path, load("e12", "smoke")).path == run.path
    with pytest.raises(RunDirectoryError, match=r"other settings: lora\.rank \(32 there, 8 here\)"):
        RunDirectory.open(run.path, load("e12", "smoke", ["lora.rank=8"]))


def test_open_refuses_an_edited_config(create: Create) -> None:
    run = create()
    path = run.path / "config.json"
    path.write_text(path.read_text().replace('"rank": 32', '"rank": 64'))
    with pytest.raises(RunDirectoryError, match=r"does not fit its digest .* it was edited"):
        RunDirectory.open(run.path)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("config.json", None, "has no config.json"),
        ("config.json", "{", "not valid JSON"),
        ("config.json", "[]", "expected the keys"),
        ("run.json", "{}", "created: Field required"),
    ],
)
def test_open_refuses_what_is_no_run(create: Create, name: str, text: str | None, message: str) -> None:
    run = create()
    path = run.path / name
    path.unlink() if text is None else path.write_text(text)
    with pytest.raises(RunDirectoryError, match=message):
        RunDirectory.open(run.path)


def test_other_ranks_write_nothing(create: Create) -> None:
    run = create()
    run.append_jsonl(METRICS, metrics_row(1))
    before = {path: path.read_bytes() for path in run.path.iterdir()}
    other = RunDirectory.open(run.path, rank=1)
    with other.recording():
        other.append_jsonl(METRICS, metrics_row(2))
        other.write_json("receipts.json", [])
        other.resume(None)
    assert {path: path.read_bytes() for path in run.path.iterdir()} == before


def test_records_come_back_as_written(create: Create) -> None:
    run = create()
    assert run.read_jsonl(METRICS, StepMetrics) == []
    run.append_jsonl(METRICS, metrics_row(1))
    run.append_jsonl(METRICS, metrics_row(2), metrics_row(3))
    assert run.read_jsonl(METRICS, StepMetrics) == [metrics_row(step) for step in (1, 2, 3)]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_null_with_a_reason(create: Create, value: float) -> None:
    run = create()
    run.append_jsonl(METRICS, metrics_row(1, loss=value))
    run.write_json("receipts.json", [{"site": "a", "sqnr_db": value, "inner": {"x": value}}])
    line = json.loads((run.path / METRICS).read_text(), parse_constant=pytest.fail)
    assert (line["loss"], line["nonfinite"]) == (None, {"loss": str(value)})
    receipt = json.loads((run.path / "receipts.json").read_text(), parse_constant=pytest.fail)[0]
    assert (receipt["sqnr_db"], receipt["nonfinite"]) == (None, {"sqnr_db": str(value)})
    assert receipt["inner"] == {"x": None, "nonfinite": {"x": str(value)}}
    assert run.read_jsonl(METRICS, StepMetrics)[0].loss is None


def test_a_bare_nan_is_refused(create: Create) -> None:
    with pytest.raises(ValueError, match="no key to record it under"):
        create().write_json("x.json", {"values": [1.0, math.nan]})


def test_full_disk_leaves_the_previous_file(create: Create, monkeypatch: pytest.MonkeyPatch) -> None:
    run = create()
    run.write_json("receipts.json", {"old": 1})
    with monkeypatch.context() as patch:
        refuse_writes(patch, after=5)
        with pytest.raises(RunDirectoryError, match=r"receipts\.json: No space left on device"):
            run.write_json("receipts.json", {"new": "x" * 1000})
    assert json.loads((run.path / "receipts.json").read_text()) == {"old": 1}
    assert not [path for path in run.path.iterdir() if path.suffix == ".tmp"]


def test_full_disk_leaves_the_previous_lines(create: Create, monkeypatch: pytest.MonkeyPatch) -> None:
    run = create()
    run.append_jsonl(METRICS, metrics_row(1))
    with monkeypatch.context() as patch:
        refuse_writes(patch, after=20)
        with pytest.raises(RunDirectoryError, match=r"metrics\.jsonl: No space left on device"):
            run.append_jsonl(METRICS, metrics_row(2))
    run.append_jsonl(METRICS, metrics_row(3))
    assert [row.step for row in run.read_jsonl(METRICS, StepMetrics)] == [1, 3]


def test_status_follows_the_run(create: Create) -> None:
    run = create()
    with run.recording():
        assert run.status.state == "running"
    assert run.status.state == "finished"


def test_ctrl_c_leaves_an_interrupted_run(create: Create) -> None:
    run = create()
    with pytest.raises(KeyboardInterrupt), run.recording():
        raise KeyboardInterrupt
    assert run.status.state == "interrupted"


def test_a_failure_is_recorded_with_its_reason(create: Create) -> None:
    run = create()
    with pytest.raises(RuntimeError, match="boom"), run.recording():
        raise RuntimeError("boom")
    assert (run.status.state, run.status.message) == ("failed", "RuntimeError: boom")


def test_a_full_disk_does_not_hide_the_failure(create: Create, monkeypatch: pytest.MonkeyPatch) -> None:
    run = create()

    def fail() -> None:
        with run.recording():
            refuse_writes(monkeypatch, after=0)
            raise RuntimeError("boom")

    with pytest.raises(RuntimeError, match="boom") as caught:
        fail()
    assert "No space left" in caught.value.__notes__[0]


def test_two_processes_cannot_run_in_one_directory(create: Create) -> None:
    run = create()
    with (
        run.recording(),
        pytest.raises(RunDirectoryError, match="another process"),
        RunDirectory.open(run.path).recording(),
    ):
        pytest.fail("a second process got in")


def test_resume_equals_a_run_that_was_never_interrupted(write_run: WriteRun) -> None:
    whole = write_run(steps=8)
    cut = write_run(steps=8, state="interrupted")
    cut.resume(5)
    assert [row.step for row in cut.read_jsonl(METRICS, StepMetrics)] == [1, 2, 3, 4, 5]
    assert not any(row.split_is_final for row in cut.read_jsonl(PROBLEMS, ProblemRecord))
    for step in range(6, 9):
        cut.append_jsonl(METRICS, metrics_row(step))
        cut.append_jsonl(RECEIPTS, {"step": step, "receipts": []})
    final = [row for row in whole.read_jsonl(PROBLEMS, ProblemRecord) if row.split_is_final]
    cut.append_jsonl(PROBLEMS, *final)
    for name in (METRICS, RECEIPTS, PROBLEMS):
        assert (cut.path / name).read_bytes() == (whole.path / name).read_bytes()


def test_resume_without_a_checkpoint_starts_over(write_run: WriteRun) -> None:
    run = write_run(state="interrupted")
    run.resume(None)
    assert run.read_jsonl(METRICS, StepMetrics) == []
    assert run.read_jsonl(PROBLEMS, ProblemRecord) == []


def test_resume_drops_a_line_that_was_cut_short(write_run: WriteRun) -> None:
    run = write_run(steps=4, state="running")
    path = run.path / METRICS
    path.write_bytes(path.read_bytes() + b'{"step": 5, "rew')
    assert len(run.read_jsonl(METRICS, StepMetrics)) == 4
    run.resume(4)
    assert path.read_bytes().endswith(b"}\n")
    assert len(run.read_jsonl(METRICS, StepMetrics)) == 4


def test_resume_of_a_finished_run_is_refused(write_run: WriteRun) -> None:
    with pytest.raises(RunDirectoryError, match="is finished: there is nothing to resume"):
        write_run().resume(3)


def test_resume_records_what_changed_in_the_environment(write_run: WriteRun, monkeypatch: pytest.MonkeyPatch) -> None:
    run = write_run(state="failed")
    changed = {"python": "3.12.0", "git": {"revision": "c0ffee", "dirty": False}}
    monkeypatch.setattr(rundir, "environment", lambda: changed)
    run.resume(2)
    line = json.loads((run.path / "resumes.jsonl").read_text())
    assert (line["step"], line["changed"]) == (2, {"python": ["3.11.7", "3.12.0"]})


def test_damaged_records_are_named(write_run: WriteRun) -> None:
    run = write_run(steps=2)
    path = run.path / METRICS
    path.write_text('{"step": 1}\n')
    with pytest.raises(RunDirectoryError, match=r"metrics\.jsonl, line 1: reward: Field required"):
        run.read_jsonl(METRICS, StepMetrics)


def test_a_root_that_cannot_hold_runs_is_named(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("a file")
    with pytest.raises(RunDirectoryError, match="not a directory"):
        RunDirectory.create(tmp_path / "runs", load("e12", "smoke"), seed=0, fingerprint="4d" * 32)
