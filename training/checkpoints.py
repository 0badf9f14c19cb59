"""Checkpoints that are complete or not there.

A checkpoint is written into a staging directory and gets its name by one rename, so a run that is killed, or a disk
that fills up while saving, leaves the previous checkpoint as the newest one.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from aqnsim._errors import AqnsimError, ConfigError

STAGING = ".checkpoint-in-progress"


class CheckpointError(AqnsimError, RuntimeError):
    """A checkpoint that could not be written; the previous one is intact."""


def latest_checkpoint(directory: str | Path) -> Path | None:
    """The checkpoint of the highest step in a run's directory, or None where there is none."""
    numbered = _numbered(Path(directory))
    return numbered[max(numbered)] if numbered else None


def require_checkpoint(directory: str | Path) -> Path:
    """The newest checkpoint of a run that is to be resumed.

    Raises:
        ConfigError: there is none.
    """
    checkpoint = latest_checkpoint(directory)
    if checkpoint is None:
        raise ConfigError(f"nothing to resume in {directory}: it holds no checkpoint-<step>; start a new run instead")
    return checkpoint


@contextmanager
def explained(directory: Path, step: int) -> Iterator[None]:
    """Turn what the writers raise on a full or failing disk into one error that says what is safe.

    Raises:
        CheckpointError: a write failed.
    """
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        shutil.rmtree(directory / STAGING, ignore_errors=True)
        previous = latest_checkpoint(directory)
        raise CheckpointError(
            f"could not write the checkpoint of step {step} in {directory}: {error}. "
            f"Free disk space is {shutil.disk_usage(directory).free / 2**20:.0f} MiB. "
            + (
                f"The previous checkpoint, {previous.name}, is intact: make room, then resume."
                if previous
                else "There is no earlier checkpoint: make room, then start again."
            )
        ) from error


def clear_staging(directory: Path) -> Path:
    """The empty staging directory; what a killed run left there is removed."""
    staging = directory / STAGING
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    return staging


def publish(directory: Path, step: int, keep: int) -> None:
    """Give the staged checkpoint its name, then remove all but the newest `keep` checkpoints."""
    staged = directory / STAGING / f"checkpoint-{step}"
    for path in staged.rglob("*"):
        if path.is_file():
            _flush(path)
    final = directory / staged.name
    if final.exists():  # of a run that was resumed from an earlier step: it is about to be repeated
        os.replace(final, directory / STAGING / "replaced")
    os.replace(staged, final)
    shutil.rmtree(directory / STAGING)
    for old in sorted(n for n in _numbered(directory) if n <= step)[:-keep]:
        shutil.rmtree(directory / f"checkpoint-{old}")


def _numbered(directory: Path) -> dict[int, Path]:
    """The checkpoints of a run by their step."""
    return {
        int(match[1]): path
        for path in directory.glob("checkpoint-*")
        if (match := re.fullmatch(r"checkpoint-(\d+)", path.name))
    }


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
