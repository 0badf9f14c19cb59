"""The directory of one run: never overwritten, written durably, and complete enough to resume.

Every write leaves the old or the new state: files are replaced atomically, lines are appended with
fsync and taken back where the disk is full. Ranks other than 0 read, and write nothing.
"""

from __future__ import annotations

import fcntl
import json
import math
import os
import platform
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from aqnsim._errors import AqnsimError
from training import config
from training.config import Experiment
from training.records import ALARMS, METRICS, PROBLEMS, RECEIPTS, Resume, Run, State, Status
from training.sources import flatten

CHECKOUT = Path(__file__).resolve().parents[1]
PACKAGES = ("aqnsim", "torch", "transformers", "trl", "peft", "accelerate", "tokenizers", "numpy")
CONFIG, RUN, STATUS = "config.json", "run.json", "status.json"
ENVIRONMENT, RESUMES, LOCK = "environment.json", "resumes.jsonl", ".lock"

Model = TypeVar("Model", bound=BaseModel)


class RunDirectoryError(AqnsimError):
    """A run directory that cannot be read, written or continued."""


@dataclass(frozen=True)
class RunDirectory:
    """One run on disk.

    Attributes:
        path: the directory.
        experiment: the resolved experiment that the run belongs to.
        run: how the run was started: seed, command, profile fingerprint.
        rank: of this process; only rank 0 writes.
    """

    path: Path
    experiment: Experiment
    run: Run
    rank: int = 0

    @classmethod
    def create(
        cls,
        root: Path,
        experiment: Experiment,
        *,
        seed: int,
        fingerprint: str,
        command: Sequence[str] = (),
        processes: int = 1,
    ) -> RunDirectory:
        """Make a new directory below `root` and describe the run in it.

        To be called by rank 0 alone; the other ranks `open` the path that it tells them.

        Args:
            root: where runs are kept; made if need be.
            experiment: what is run.
            seed: of the run.
            fingerprint: of the profile, as the emulation reports it.
            command: the command-line arguments.
            processes: ranks that take part.

        Raises:
            RunDirectoryError: the directory cannot be written.
        """
        now = datetime.now(UTC)
        run = Run(
            created=now.isoformat(timespec="seconds"),
            command=tuple(_without_home(argument) for argument in command),
            seed=seed,
            processes=processes,
            profile=experiment.profile.name,
            fingerprint=fingerprint,
        )
        parts = [experiment.id, experiment.preset, f"seed{seed}", f"{now:%Y%m%dT%H%M%SZ}"]
        name = "-".join(part for part in (*parts, experiment.digest[:8]) if part)
        directory = cls(_make_unique(Path(root), name), experiment, run)
        directory.write_json(
            CONFIG,
            {"digest": experiment.digest, "experiment": experiment.model_dump(mode="json")},
        )
        directory.write_json(RUN, run)
        directory.write_json(ENVIRONMENT, environment())
        directory.set_status("running")
        return directory

    @classmethod
    def open(cls, path: Path, experiment: Experiment | None = None, *, rank: int = 0) -> RunDirectory:
        """Open an existing run; where `experiment` is given, it has to be the run's own.

        Raises:
            RunDirectoryError: not a run directory, an edited config, or another experiment's run.
        """
        path = Path(path)
        stored = _parse(path / CONFIG, _read(path / CONFIG))
        if not (isinstance(stored, dict) and stored.keys() == {"digest", "experiment"}):
            raise RunDirectoryError(f"{path / CONFIG}: expected the keys 'digest' and 'experiment'")
        own = config.from_json(json.dumps(stored["experiment"]), str(path / CONFIG))
        digest = config.digest_of(stored["experiment"])  # as it was stored: `own` has the settings added since
        if digest != stored["digest"]:
            raise RunDirectoryError(
                f"{path / CONFIG} does not fit its digest (recorded {str(stored['digest'])[:8]}, "
                f"now {digest[:8]}): it was edited"
            )
        if experiment is not None and experiment.digest != own.digest:
            changes = ", ".join(
                f"{change.key} ({change.a!r} there, {change.b!r} here)" for change in config.diff(own, experiment)
            )
            raise RunDirectoryError(f"{path} is a run with other settings: {changes}")
        run = _validate(Run, _read(path / RUN), str(path / RUN))
        return cls(path, own, run, rank)

    def write_json(self, name: str, value: Any) -> None:
        """Write a file as JSON, atomically.

        Raises:
            RunDirectoryError: the disk refused it; the previous file is as it was.
        """
        if self.rank == 0:
            text = json.dumps(_finite(value), indent=2, allow_nan=False)
            replace(self.path / name, f"{text}\n".encode())

    def append_jsonl(self, name: str, *records: Any) -> None:
        """Append records as lines, durably: they are on the disk when this returns.

        Raises:
            RunDirectoryError: the disk refused them; the previous lines are as they were.
        """
        if self.rank != 0:
            return
        lines = "".join(f"{json.dumps(_finite(record), allow_nan=False)}\n" for record in records)
        path = self.path / name
        try:
            with path.open("ab", buffering=0) as file:
                size = file.tell()
                try:
                    _write_all(file.fileno(), lines.encode())
                except OSError:
                    file.truncate(size)
                    raise
        except OSError as error:
            raise _refused(path, error) from error

    def read_json(self, name: str, model: type[Model]) -> Model:
        """Read a file that holds one record.

        Raises:
            RunDirectoryError: there is no such file, or it does not hold such a record.
        """
        return _validate(model, _read(self.path / name), str(self.path / name))

    def load_json(self, name: str) -> Any:
        """Read a file of JSON that has no record type of its own.

        Raises:
            RunDirectoryError: there is no such file, or it is not JSON.
        """
        return _parse(self.path / name, _read(self.path / name))

    def read_jsonl(self, name: str, model: type[Model]) -> list[Model]:
        """Read a file of one record a line; empty where nothing was written yet.

        A last line that was cut short, as by a power failure, is not a record yet.

        Raises:
            RunDirectoryError: a line does not hold such a record.
        """
        path = self.path / name
        return [_validate(model, line, f"{path}, line {number}") for number, line in enumerate(_lines(path), start=1)]

    def set_status(self, state: State, message: str | None = None) -> None:
        """Record where the run stands."""
        self.write_json(STATUS, Status(state=state, message=message, time=_now()))

    @property
    def status(self) -> Status:
        """Where the run stands."""
        return self.read_json(STATUS, Status)

    @contextmanager
    def recording(self) -> Iterator[None]:
        """The run itself: running inside; then finished, interrupted (Ctrl-C) or failed.

        Raises:
            RunDirectoryError: another process is running in this directory.
        """
        if self.rank != 0:
            yield
            return
        with (self.path / LOCK).open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise RunDirectoryError(f"another process is running in {self.path}") from error
            self.set_status("running")
            try:
                yield
            except KeyboardInterrupt as error:
                self._end("interrupted", None, error)
                raise
            except BaseException as error:
                self._end("failed", _without_home(f"{type(error).__name__}: {error}"), error)
                raise
            self.set_status("finished")

    def resume(self, step: int | None) -> None:
        """Take the records back to the checkpoint of `step` (None: there is none yet).

        What lies after it is dropped, as the resumed run writes it again: the result is that of a
        run that was never interrupted. Files are replaced atomically; doing it twice is harmless.

        Raises:
            RunDirectoryError: the run is finished already.
        """
        if self.status.state == "finished":
            raise RunDirectoryError(f"{self.path} is finished: there is nothing to resume")
        if self.rank != 0:
            return
        for name in (METRICS, RECEIPTS, PROBLEMS, ALARMS):
            path = self.path / name
            if path.exists():
                kept = [line for line in _lines(path) if _precedes(_parse(path, line), step)]
                replace(path, "".join(f"{line}\n" for line in kept).encode())
        before, now = self.environment(), flatten(environment())
        changed = {
            key: (_text(before.get(key)), _text(now.get(key)))
            for key in sorted(before.keys() | now.keys())
            if before.get(key) != now.get(key)
        }
        self.append_jsonl(RESUMES, Resume(step=step, time=_now(), changed=changed))

    def environment(self) -> dict[str, Any]:
        """The environment that the run was started in, under flattened dotted keys."""
        return flatten(self.load_json(ENVIRONMENT))

    def _end(self, state: State, message: str | None, cause: BaseException) -> None:
        """Record the end of a run that is ending anyway: a full disk must not hide the cause."""
        try:
            self.set_status(state, message)
        except RunDirectoryError as error:
            cause.add_note(str(error))


def environment() -> dict[str, Any]:
    """What numbers may depend on beside the config: versions, hardware, code. Nothing personal."""
    import torch

    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": {"model": _cpu_model(), "count": os.cpu_count(), "threads": torch.get_num_threads()},
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "packages": {name: _version(name) for name in PACKAGES},
        "git": {"revision": _git("rev-parse", "HEAD"), "dirty": _is_dirty()},
    }


def replace(path: Path, data: bytes) -> None:
    """Write a file so that it holds the old or the new bytes, whatever happens.

    Raises:
        RunDirectoryError: the disk refused it; the previous file is as it was.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("wb", buffering=0) as file:
            _write_all(file.fileno(), data)
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise _refused(path, error) from error


def _write_all(descriptor: int, data: bytes) -> None:
    """Write and sync; a short write, which a nearly full disk gives, goes on with the rest."""
    while data:
        data = data[os.write(descriptor, data) :]
    os.fsync(descriptor)


def _refused(path: Path, error: OSError) -> RunDirectoryError:
    return RunDirectoryError(
        f"cannot write {path}: {error.strerror}; what it held before is intact. "
        "Mend that (free some space?) and continue with --resume"
    )


def _make_unique(root: Path, name: str) -> Path:
    attempt = 1
    while True:
        path = root / (name if attempt == 1 else f"{name}-{attempt}")
        try:
            root.mkdir(parents=True, exist_ok=True)
            path.mkdir(exist_ok=False)
        except FileExistsError:
            if not root.is_dir():
                raise RunDirectoryError(f"{root} is not a directory") from None
            attempt += 1
        except OSError as error:
            raise RunDirectoryError(f"cannot make {path}: {error.strerror}") from error
        else:
            return path


def _finite(value: Any) -> Any:
    """The value with null for NaN and infinity, each named under "nonfinite" beside it."""
    if isinstance(value, BaseModel):
        return _finite(value.model_dump(exclude_defaults=True))
    if isinstance(value, Mapping):
        lost = {key: str(item) for key, item in value.items() if _is_nonfinite(item)}
        kept = {key: None if key in lost else _finite(item) for key, item in value.items()}
        return kept | {"nonfinite": lost} if lost else kept
    if isinstance(value, list | tuple):
        if any(_is_nonfinite(item) for item in value):
            raise ValueError("NaN or infinity in a list: there is no key to record it under")
        return [_finite(item) for item in value]
    if _is_nonfinite(value):
        raise ValueError(f"{value} on its own: there is no key to record it under")
    return value


def _is_nonfinite(value: Any) -> bool:
    return isinstance(value, float) and not math.isfinite(value)


def _precedes(row: Any, step: int | None) -> bool:
    """Whether a row stays when a run resumes at `step`; final results are always made again."""
    return step is not None and row["step"] <= step and not row.get("split_is_final", False)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError) as error:
        raise RunDirectoryError(f"{path.parent} has no {path.name}") from error


def _lines(path: Path) -> list[str]:
    """The complete lines of a file; none where it does not exist."""
    return _read(path).split("\n")[:-1] if path.exists() else []


def _parse(path: Path, text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise RunDirectoryError(f"{path} is not valid JSON: {error}") from error


def _validate(model: type[Model], text: str, origin: str) -> Model:
    try:
        return model.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise RunDirectoryError(f"{origin}: {place}: {first['msg']}") from error


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _text(value: Any) -> str | None:
    return None if value is None else str(value)


def _without_home(text: str) -> str:
    home = str(Path.home())
    return text if home == "/" else text.replace(home, "~")


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor()


def _git(*arguments: str) -> str | None:
    """What git says of the checkout; None where there is no git, no checkout or no commit."""
    try:
        done = subprocess.run(["git", *arguments], cwd=CHECKOUT, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _is_dirty() -> bool | None:
    changes = _git("status", "--porcelain")
    return None if changes is None else bool(changes)
