"""Arms times seeds: what is done is skipped, what was cut off goes on, and a crash of one run is not the end.

The state of a sweep is what the run directories hold, and nothing else: it may be killed at any point and started anew.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Literal

from filelock import FileLock, Timeout

from training.arms import find_runs, invalid
from training.config import Experiment, load
from training.rundir import CHECKOUT, RunDirectory

State = Literal["finished", "resumed", "started", "running elsewhere", "failed"]
LOCKS = ".sweep"
"""Beside the runs: a lock for each arm and seed, so that two sweeps do not run the same."""


@dataclass(frozen=True)
class Planned:
    """A run that is wanted.

    Attributes:
        name: of the experiment, or path to its TOML.
        experiment: it, resolved.
        seed: of the run.
        preset, overrides: it was resolved with.
    """

    name: str
    experiment: Experiment
    seed: int
    preset: str
    overrides: tuple[str, ...] = ()

    @property
    def label(self) -> str:
        """The experiment and the seed."""
        return f"{self.experiment.id} seed {self.seed}"

    def find(self, runs: Sequence[RunDirectory]) -> RunDirectory | None:
        """The run of these settings and this seed: the finished one, else the newest; one marked invalid is none."""
        own = [
            r
            for r in runs
            if r.run.seed == self.seed and r.experiment.digest == self.experiment.digest and invalid(r) is None
        ]
        finished = [r for r in own if r.status.state == "finished"]
        return (finished or sorted(own, key=lambda r: r.run.created))[-1] if own else None

    def command(self, root: Path, cut_off: RunDirectory | None) -> list[str]:
        """The arguments after `python -m training` that start the run, or continue one that was cut off."""
        if cut_off is not None:
            return ["run", self.name, "--resume", str(cut_off.path)]
        settings = [part for text in self.overrides for part in ("--set", text)]
        return ["run", self.name, "--preset", self.preset, "--seed", str(self.seed), "--runs", str(root), *settings]


@dataclass(frozen=True)
class Outcome:
    """What became of a planned run; the directory of a finished one."""

    planned: Planned
    state: State
    directory: Path | None = None
    message: str | None = None


def planned(names: Sequence[str], seeds: int, preset: str, overrides: Sequence[str] = ()) -> list[Planned]:
    """Every arm with every seed, a seed of all arms before the next: an early end leaves whole comparisons.

    >>> [p.label for p in planned(["e12", "e6a-lora-mxfp4"], 2, "smoke")]
    ['e12 seed 0', 'e6a-lora-mxfp4 seed 0', 'e12 seed 1', 'e6a-lora-mxfp4 seed 1']

    Raises:
        UnknownNameError, ConfigError: see `config.load`.
    """
    arms = [(name, load(name, preset, overrides)) for name in dict.fromkeys(names)]
    return [Planned(name, e, seed, preset, tuple(overrides)) for seed in range(seeds) for name, e in arms]


def sweep(
    wanted: Sequence[Planned],
    root: Path,
    *,
    jobs: int = 1,
    say: Callable[[str], None] = lambda text: None,
    execute: Callable[[list[str]], int] | None = None,
) -> list[Outcome]:
    """Run what is not done yet.

    Args:
        wanted: in this order.
        root: where runs are kept.
        jobs: runs at a time.
        say: is told what starts and ends.
        execute: runs `python -m training` with arguments and gives its exit status; by default a process of its own.

    Returns:
        One outcome a planned run; failures are among them, and do not stop the others.
    """
    start = execute or _in_a_process
    root.mkdir(parents=True, exist_ok=True)
    (root / LOCKS).mkdir(exist_ok=True)
    with ThreadPoolExecutor(max_workers=jobs) as pool:
        return list(pool.map(lambda p: _one(p, root, say, start), wanted))


def _one(wanted: Planned, root: Path, say: Callable[[str], None], execute: Callable[[list[str]], int]) -> Outcome:
    name = f"{wanted.experiment.id}-{wanted.experiment.digest[:12]}-seed{wanted.seed}.lock"
    try:
        with FileLock(root / LOCKS / name, blocking=False):
            return _under_lock(wanted, root, say, execute)
    except Timeout:
        say(f"{wanted.label}: runs in another sweep")
        return Outcome(wanted, "running elsewhere")


def _under_lock(
    wanted: Planned, root: Path, say: Callable[[str], None], execute: Callable[[list[str]], int]
) -> Outcome:
    before = wanted.find(find_runs(root))
    if before is not None and before.status.state == "finished":
        say(f"{wanted.label}: done before, {before.path.name}")
        return Outcome(wanted, "finished", before.path)
    say(f"{wanted.label}: {'goes on, ' + before.path.name if before else 'starts'}")
    status = execute(wanted.command(root, before))
    after = wanted.find(find_runs(root))
    if after is None or after.status.state != "finished":
        message = after.status.message if after is not None else None
        say(f"{wanted.label}: FAILED (exit status {status}){': ' + message if message else ''}")
        return Outcome(wanted, "failed", None if after is None else after.path, message or f"exit status {status}")
    return Outcome(wanted, "resumed" if before else "started", after.path)


def _in_a_process(arguments: list[str]) -> int:
    return subprocess.run([sys.executable, "-m", "training", *arguments], cwd=CHECKOUT).returncode


def seconds_of(run: RunDirectory) -> float | None:
    """How long a finished run took from its start to its end, interruptions included; None of one that is not."""
    if run.status.state != "finished":
        return None
    return (datetime.fromisoformat(run.status.time) - datetime.fromisoformat(run.run.created)).total_seconds()


def forecast(wanted: Sequence[Planned], root: Path) -> str:
    """What a sweep would run, and how long that takes by the runs of the same preset that are there."""
    runs = find_runs(root)
    known = [s for r in runs if r.experiment.preset == wanted[0].experiment.preset and (s := seconds_of(r)) is not None]
    found = [(p, p.find(runs)) for p in wanted]
    lines = [f"{p.label}: {'wanted' if run is None else run.status.state}" for p, run in found]
    left = sum(run is None or run.status.state != "finished" for _, run in found)
    if known:
        each = sorted(known)[len(known) // 2]
        lines.append(f"{left} runs to go, {left * each / 3600:.1f} hours by the median of {len(known)} finished runs")
    else:
        lines.append(f"{left} runs to go; no finished run tells how long one takes")
    return "\n".join(lines)
