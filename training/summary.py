"""What a run comes to, and arms over seeds: what reports and the tables of the documentation print.

An archived run is a run directory without weights, so both are read here. A record that is marked invalid is read, and
kept out of every mean.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from scipy.stats import sem, t

from aqnsim.receipts import Receipt
from training.records import (
    EVALUATION,
    FINAL_RECEIPTS,
    INVALID,
    METRICS,
    PROBLEM_COLUMNS,
    PROBLEMS,
    ROBUSTNESS,
    Evaluation,
    Invalid,
    Mode,
    ProblemRecord,
    RobustnessPoint,
    Score,
    StepMetrics,
)
from training.rundir import CONFIG, RunDirectory, RunDirectoryError
from training.statistics import Interval


@dataclass(frozen=True)
class RunSummary:
    """One run's records, read once.

    Attributes:
        directory: of the run, or of its archive.
        invalid: why its numbers must not be used; None where they may.
    """

    directory: RunDirectory
    invalid: Invalid | None

    @classmethod
    def read(cls, path: Path) -> RunSummary:
        """Open a run.

        Raises:
            RunDirectoryError: not a run directory, or a damaged one.
        """
        directory = RunDirectory.open(path)
        marked = (directory.path / INVALID).exists()
        return cls(directory, directory.read_json(INVALID, Invalid) if marked else None)

    @property
    def name(self) -> str:
        """The directory's name."""
        return self.directory.path.resolve().name

    @property
    def label(self) -> str:
        """The experiment's id and the seed."""
        return f"{self.directory.experiment.id}, seed {self.seed}"

    @property
    def seed(self) -> int:
        """Of everything that was drawn."""
        return self.directory.run.seed

    @cached_property
    def state(self) -> str:
        """Where the run stands: one of `records.State`, or "invalid"."""
        return "invalid" if self.invalid else self.directory.status.state

    @property
    def counts(self) -> bool:
        """Whether its final scores enter a mean: finished, evaluated and not invalid."""
        return self.state == "finished" and self.final is not None

    @cached_property
    def metrics(self) -> list[StepMetrics]:
        """Each step of training."""
        return self.directory.read_jsonl(METRICS, StepMetrics)

    @cached_property
    def final(self) -> Evaluation | None:
        """The final evaluation; None where there is none yet."""
        if not (self.directory.path / EVALUATION).exists():
            return None
        return self.directory.read_json(EVALUATION, Evaluation)

    @cached_property
    def scores(self) -> dict[int, dict[Mode, Score]]:
        """Held-out scores by step: those along the way from the problems, the last one from the evaluation."""
        right: dict[int, dict[Mode, list[bool]]] = {}
        for step, mode, correct in self._answers():
            right.setdefault(step, {"clean": [], "emulated": []})[mode] += correct
        found = {
            step: {mode: Score.of(sum(rows), len(rows)) for mode, rows in modes.items()}
            for step, modes in sorted(right.items())
            if all(modes.values())
        }
        if self.final is not None:
            found[self.final.step] = {"clean": self.final.clean, "emulated": self.final.emulated}
        return found

    def _answers(self) -> Iterator[tuple[int, Mode, list[bool]]]:
        """Step, mode and what was right, of evaluations before the end; an archive holds columns, not lines."""
        columns = json_or_none(self, PROBLEM_COLUMNS)
        for column in columns["evaluations"] if columns else ():
            if not column["is_final"]:
                yield column["step"], column["mode"], [bit == "1" for bit in column["correct"]]
        for row in self.directory.read_jsonl(PROBLEMS, ProblemRecord):
            if not row.split_is_final:
                yield row.step, row.mode, [row.correct]

    @cached_property
    def receipts(self) -> list[Receipt]:
        """The receipts of the whole run; none where it has not ended."""
        if not (self.directory.path / FINAL_RECEIPTS).exists():
            return []
        blank = dict.fromkeys(Receipt.__dataclass_fields__)
        return [Receipt(**{**blank, "measurable": 0, **row}) for row in self.directory.load_json(FINAL_RECEIPTS)]

    @cached_property
    def robustness(self) -> list[RobustnessPoint]:
        """Evaluations on other hardware and under noise; none where there were none."""
        return self.directory.read_jsonl(ROBUSTNESS, RobustnessPoint)


@dataclass(frozen=True)
class ArmSummary:
    """The runs of one experiment under equal settings, which differ in their seeds.

    Attributes:
        label: the experiment's id, with its preset or digest where the id alone would be ambiguous.
        runs: sorted by seed.
    """

    label: str
    runs: tuple[RunSummary, ...]

    @property
    def counted(self) -> list[RunSummary]:
        """The runs that enter a mean."""
        return [run for run in self.runs if run.counts]

    def accuracies(self, mode: Mode) -> list[float]:
        """Final accuracy of each run that counts."""
        return [run.final.score(mode).accuracy for run in self.counted if run.final]


def arms(runs: Iterable[RunSummary]) -> list[ArmSummary]:
    """Group runs by their settings, in order of first appearance."""
    groups: dict[str, list[RunSummary]] = {}
    for run in runs:
        groups.setdefault(run.directory.experiment.digest, []).append(run)
    experiments = [group[0].directory.experiment for group in groups.values()]
    ids = [e.id for e in experiments]
    presets = [f"{e.id} ({e.preset or 'no preset'})" for e in experiments]
    labels = []
    for e, with_preset in zip(experiments, presets, strict=True):
        if ids.count(e.id) == 1:
            labels.append(e.id)
        else:
            labels.append(with_preset if presets.count(with_preset) == 1 else f"{with_preset} {e.digest[:6]}")
    return [
        ArmSummary(label, tuple(sorted(group, key=lambda run: (run.seed, run.name))))
        for label, group in zip(labels, groups.values(), strict=True)
    ]


def read_all(paths: Sequence[Path]) -> list[RunSummary]:
    """Open runs; a folder that is none stands for the runs below it.

    Raises:
        RunDirectoryError: a folder is neither a run nor holds one, or a run is damaged.
    """
    found: dict[Path, RunSummary] = {}
    for path in paths:
        inside = [path] if (path / CONFIG).exists() else sorted(p.parent for p in path.rglob(CONFIG))
        if not inside:
            raise RunDirectoryError(f"{path} is not a run directory, and holds none (a run has a {CONFIG})")
        found |= {p.resolve(): RunSummary.read(p) for p in inside if p.resolve() not in found}
    return list(found.values())


def mean_interval(values: Sequence[float], confidence: float = 0.95) -> tuple[float, Interval | None]:
    """The mean of shares, with Student's t interval of it, cut to 0..1; None for less than two values.

    Raises:
        ValueError: there are no values.

    >>> mean, interval = mean_interval([0.50, 0.54, 0.52])
    >>> f"{mean:.3f} {interval.low:.3f} {interval.high:.3f}"
    '0.520 0.470 0.570'
    """
    if not values:
        raise ValueError("no values: a mean needs at least one")
    mean = sum(values) / len(values)
    if len(values) < 2:
        return mean, None
    half = float(sem(values) * t.ppf((1 + confidence) / 2, len(values) - 1))
    return mean, Interval(max(0.0, mean - half), min(1.0, mean + half))


def json_or_none(run: RunSummary, name: str) -> Any:
    """A file of JSON of a run; None where the run has none."""
    return run.directory.load_json(name) if (run.directory.path / name).exists() else None
