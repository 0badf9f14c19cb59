"""Many runs on a cluster, by submitit: one job a command, through Slurm, in local processes, or in this one."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from aqnsim._errors import AqnsimError, ConfigError

Executor = Literal["slurm", "local", "debug"]


class JobError(AqnsimError, RuntimeError):
    """A job of a sweep that failed; the others were waited for."""


def execute(command: Sequence[str]) -> int:
    """What a job does: run the command, its output into the job's log.

    Raises:
        JobError: the command ended with an exit status that is not 0.
    """
    done = subprocess.run(list(command), check=False)
    if done.returncode:
        raise JobError(f"{' '.join(command)}: exit status {done.returncode}")
    return done.returncode


def submit(
    commands: Sequence[Sequence[str]],
    *,
    folder: Path,
    executor: Executor = "slurm",
    at_once: int | None = None,
    **parameters: Any,
) -> list[Any]:
    """Submit one job a command.

    Args:
        commands: each with its arguments, such as ``["torchrun", "--nproc_per_node", "8", "-m", "training", "run",
            "e12", "--processes", "8"]``.
        folder: of submitit's logs and pickles; it has to be on a file system that the nodes see.
        executor: "slurm"; "local" for processes of this machine; "debug" for this process.
        at_once: how many may run at the same time, of a Slurm array.
        parameters: of submitit, such as `slurm_partition`, `gpus_per_node`, `timeout_min`, `name`.

    Returns:
        submitit's jobs, in the order of the commands: see `wait`.

    Raises:
        ConfigError: no commands, or a parameter that the executor does not know.
    """
    from submitit import AutoExecutor  # here, so that a sweep without a cluster needs no submitit

    if not commands:
        raise ConfigError("nothing to submit: there are no commands")
    chosen = AutoExecutor(folder=str(folder / "%j"), cluster=executor)
    if at_once is not None and executor == "slurm":
        parameters["slurm_array_parallelism"] = at_once
    try:
        chosen.update_parameters(**parameters)
    except (NameError, TypeError, ValueError) as error:
        raise ConfigError(f"submitit refuses the parameters {', '.join(parameters)}: {error}") from error
    jobs: list[Any] = chosen.map_array(execute, [list(command) for command in commands])
    return jobs


def wait(jobs: Sequence[Any]) -> None:
    """Wait for all jobs.

    Raises:
        JobError: naming every job that failed and where its log is.
    """
    failed = []
    for job in jobs:
        error = job.exception()
        if error is not None:
            lines = str(error).splitlines()  # of submitit's own, with the job's traceback in it
            reason = next((line for line in lines if f"{JobError.__name__}: " in line), lines[0])
            failed.append(f"job {job.job_id} ({job.paths.stderr}): {reason.strip()}")
    if failed:
        raise JobError(f"{len(failed)} of {len(jobs)} jobs failed: {'; '.join(failed)}")
