"""A sweep's commands as jobs of submitit, on its local executor."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from aqnsim._errors import ConfigError
from training.launch.submit import JobError, submit, wait


def touch(path: Path) -> list[str]:
    return [sys.executable, "-c", f"open({str(path)!r}, 'w').write('done')"]


def test_each_command_is_a_job_of_its_own(tmp_path: Path) -> None:
    made = [tmp_path / f"{i}.txt" for i in range(2)]
    wait(submit([touch(path) for path in made], folder=tmp_path / "jobs", executor="local", timeout_min=2))
    assert [path.read_text() for path in made] == ["done", "done"]


def test_a_failed_job_is_an_error_that_names_it_and_the_others_run(tmp_path: Path) -> None:
    commands = [[sys.executable, "-c", "raise SystemExit(3)"], touch(tmp_path / "other")]
    jobs = submit(commands, folder=tmp_path / "jobs", executor="local", timeout_min=2)
    with pytest.raises(JobError, match=rf"1 of 2 jobs failed: job {jobs[0].job_id} .*exit status 3"):
        wait(jobs)
    assert (tmp_path / "other").read_text() == "done"


def test_what_cannot_be_submitted_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no commands"):
        submit([], folder=tmp_path, executor="debug")
    with pytest.raises(ConfigError, match="no_such_parameter"):
        submit([["true"]], folder=tmp_path, executor="local", no_such_parameter=1)
