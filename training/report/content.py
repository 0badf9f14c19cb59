"""What a report says, as plain values for its template: tables, alarms, caveats. Nothing here draws."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from aqnsim.aqn import layer_of
from aqnsim.receipts import Receipt, by_request, merge
from aqnsim.report import Report
from training import config
from training.compare import ComparisonError, compare
from training.config import Difference
from training.records import MODES, Resume, Score
from training.report.figures import colour_of
from training.rundir import RESUMES
from training.summary import ArmSummary, RunSummary, mean_interval

ALARMS = "alarms.jsonl"
PREFERRED_PHASES = ("attach", "rollout", "train", "eval", "reference")
MAX_MAPS = 12
"""Heat maps that a report draws; the tables of receipts are always complete."""


@dataclass(frozen=True)
class Cell:
    """A cell of a heat map: its text and its colours, as CSS."""

    text: str
    background: str
    colour: str


@dataclass(frozen=True)
class HeatMap:
    """One measured value of one stream, layers by roles; `arms` are all those in which it is the same."""

    title: str
    unit: str
    roles: list[str]
    rows: list[tuple[str, list[Cell | None]]]
    low: str
    high: str
    arms: list[str]


@dataclass(frozen=True)
class Pair:
    """An arm beside its control: what they differ in, and the comparison of each pair of runs of one seed."""

    arm: str
    control: str
    declared: list[Difference]
    undeclared: list[Difference]
    verdicts: list[dict[str, str]] = field(default_factory=list)


def percent(share: float) -> str:
    """A share in percent: 0.125 as "12.5"."""
    return f"{100 * share:.1f}"


def setups(arms: Sequence[ArmSummary]) -> list[str]:
    """Model, task and preset, each combination once."""
    experiments = [arm.runs[0].directory.experiment for arm in arms]
    return list(dict.fromkeys(f"{e.model.name}, task {e.task.name}, preset {e.preset or 'none'}" for e in experiments))


def accuracy_rows(arms: Sequence[ArmSummary]) -> list[dict[str, Any]]:
    """For each arm the mean over seeds, and below it each of its runs."""
    rows = []
    for arm in arms:
        means = {}
        for mode in MODES:
            values = arm.accuracies(mode)
            if values:
                mean, interval = mean_interval(values)
                means[mode] = (percent(mean), _interval(interval.low, interval.high) if interval else "one run")
        rows.append({"arm": arm, "means": means, "runs": [_run_row(run) for run in arm.runs]})
    return rows


def _run_row(run: RunSummary) -> dict[str, Any]:
    first = run.scores.get(0)
    return {
        "run": run,
        "start": percent(first["emulated"].accuracy) if first and run.final and run.final.step else "–",
        "n": run.final.emulated.n if run.final else None,
        "scores": {mode: _score(run.final.score(mode)) for mode in MODES} if run.final else {},
    }


def _score(score: Score) -> tuple[str, str]:
    return percent(score.accuracy), _interval(*score.wilson)


def _interval(low: float, high: float) -> str:
    return f"{percent(low)} to {percent(high)}"


def schedule_rows(arms: Sequence[ArmSummary]) -> list[dict[str, str]]:
    """For each run with noise: sigma from and to, and where the realised one was farthest from the requested one."""
    rows = []
    for arm in arms:
        for run in arm.runs:
            asked = [(r.step, r.sigma_requested, r.sigma_realised) for r in run.metrics if r.sigma_requested]
            if asked:
                off = {step: (realised or 0.0) / sigma - 1 for step, sigma, realised in asked}
                worst = max(off, key=lambda step: abs(off[step]))
                rows.append(
                    {
                        "arm": arm.label,
                        "seed": str(run.seed),
                        "from": f"{asked[0][1]:.3g}",
                        "to": f"{asked[-1][1]:.3g}",
                        "steps": f"{len(asked)} of {len(run.metrics)}",
                        "worst": f"{100 * off[worst]:+.2f} % (step {worst})",
                    }
                )
    return rows


def receipt_rows(run: RunSummary) -> list[dict[str, str]]:
    """Receipts merged over sites, one row for each phase, stream and request."""
    rows = []
    for group in by_request(run.receipts):
        merged = merge(group)
        measured = merged.elements > 0
        rows.append(
            {
                "phase": merged.phase,
                "stream": merged.stream,
                "requested": merged.requested,
                "sites": str(len(group)),
                "calls": f"{merged.calls:,}",
                "elements": f"{merged.elements:,}" if measured else "–",
                "changed": f"{merged.changed:.1%}" if measured else "–",
                "sigma asked": _or_dash(merged.requested_sigma, ".4g"),
                "realised": _or_dash(merged.realised_sigma, ".4g"),
                "worst SQNR, dB": _or_dash(merged.sqnr_db, ".1f"),
                "saturated": f"{merged.saturated:.2%}" if measured else "–",
                "non-finite": str(merged.nonfinite),
            }
        )
    return rows


def _or_dash(value: float | None, spec: str) -> str:
    return "–" if value is None else format(value, spec)


def heat_maps(arms: Sequence[ArmSummary]) -> list[HeatMap]:
    """What each stream realised, layers by roles, of the first run of each arm that has receipts; equal maps once.

    Of a stream that several phases have, the first of `PREFERRED_PHASES` that measured anything is shown.
    """
    maps: dict[str, HeatMap] = {}
    for arm in arms:
        run = next((run for run in arm.runs if run.receipts), None)
        for (stream, requested), group in _by_stream(run.receipts if run else ()).items():
            for value, unit, spec in _values(group):
                found = _heat_map(arm.label, stream, requested, group, value, unit, spec)
                if found is not None:
                    key = repr((found.title, found.unit, found.rows))
                    maps.setdefault(key, found)
                    if arm.label not in maps[key].arms:
                        maps[key].arms.append(arm.label)
    return list(maps.values())


def _by_stream(receipts: Iterable[Receipt]) -> dict[tuple[str, str], list[Receipt]]:
    phases: dict[tuple[str, str], dict[str, list[Receipt]]] = {}
    for r in receipts:
        if r.elements:
            phases.setdefault((r.stream, r.requested), {}).setdefault(r.phase, []).append(r)
    return {key: next(by[p] for p in PREFERRED_PHASES if p in by) for key, by in phases.items()}


def _values(group: Sequence[Receipt]) -> list[tuple[str, str, str]]:
    """Which values of a stream are shown: sigma realised over asked for noise, SQNR, share changed."""
    noise = [("realised", "realised sigma / requested", ".3f")] if any(r.requested_sigma for r in group) else []
    return [*noise, ("sqnr_db", "SQNR, dB", ".1f"), ("changed", "values changed, %", ".1f")]


def _value(receipt: Receipt, name: str) -> float | None:
    if name == "realised":
        asked, realised = receipt.requested_sigma, receipt.realised_sigma
        return realised / asked if asked and realised is not None else None
    value: float | None = getattr(receipt, name)
    return 100 * value if name == "changed" and value is not None else value


def _heat_map(
    arm: str, stream: str, requested: str, group: Sequence[Receipt], value: str, unit: str, spec: str
) -> HeatMap | None:
    cells: dict[tuple[str, str], list[Receipt]] = {}
    for r in group:
        layer = layer_of(f"{r.site}.")
        cells.setdefault(("–" if layer is None else str(layer), r.role), []).append(r)
    known = {key: v for key, rs in cells.items() if (v := _value(merge(rs), value)) is not None}
    if not known:
        return None
    low, high = min(known.values()), max(known.values())
    layers = sorted({layer for layer, _ in known}, key=lambda name: (name == "–", int(name) if name != "–" else 0))
    roles = list(dict.fromkeys(role for _, role in known))

    def cell(key: tuple[str, str]) -> Cell | None:
        return Cell(format(known[key], spec), *colour_of(known[key], low, high)) if key in known else None

    return HeatMap(
        title=f"{stream}, {requested}, phase {group[0].phase}",
        unit=unit,
        roles=roles,
        rows=[(layer, [cell((layer, role)) for role in roles]) for layer in layers],
        low=format(low, spec),
        high=format(high, spec),
        arms=[arm],
    )


def pairs(arms: Sequence[ArmSummary]) -> list[Pair]:
    """Each arm beside its control; where none is another's control, each beside the first."""
    found = []
    for arm in arms:
        question = arm.runs[0].directory.experiment.question
        for other in arms:
            if other is not arm and other.runs[0].directory.experiment.id == question.control_id:
                found.append(_pair(arm, other, question.differs_in))
    return found or [_pair(arm, arms[0], ()) for arm in arms[1:]]


def _pair(arm: ArmSummary, control: ArmSummary, declared: Sequence[str]) -> Pair:
    a, b = arm.runs[0].directory.experiment, control.runs[0].directory.experiment
    differences = config.diff(a, b)
    pair = Pair(
        arm.label,
        control.label,
        [item for item in differences if config.covers(declared, item.key)],
        [item for item in differences if not config.covers(declared, item.key)],
    )
    seeds = {run.seed: run for run in control.counted}
    for run in arm.counted:
        if run.seed in seeds:
            pair.verdicts.append(_verdict(run, seeds[run.seed]))
    return pair


def _verdict(run: RunSummary, control: RunSummary) -> dict[str, str]:
    try:
        comparison = compare(run.directory.path, control.directory.path)
    except ComparisonError as error:
        return {"seed": str(run.seed), "kind": "not comparable", "text": str(error)}
    effect = next(effect for effect in comparison.effects if effect.mode == "emulated")
    low, high = effect.paired.interval.low, effect.paired.interval.high
    return {
        "seed": str(run.seed),
        "kind": comparison.verdict.kind,
        "text": comparison.verdict.text,
        "difference": f"{100 * effect.paired.difference:+.1f}",
        "interval": f"{100 * low:+.1f} to {100 * high:+.1f}",
        "p": f"{effect.paired.p_value:.3g}",
        "detectable": percent(effect.detectable),
        "beside": ", ".join(item.key for item in comparison.undeclared) or "nothing",
    }


def alarms(arms: Sequence[ArmSummary]) -> list[dict[str, str]]:
    """What a reader has to see before any number, the gravest first: one row for each run and kind."""
    rows = []
    for arm in arms:
        for run in arm.runs:
            rows += [
                {"level": level, "arm": arm.label, "run": run.name, "seed": str(run.seed), "text": text}
                for level, text in _alarms_of(run)
            ]
    return sorted(rows, key=lambda row: ("stop", "watch").index(row["level"]))


def _alarms_of(run: RunSummary) -> Iterable[tuple[str, str]]:
    if run.invalid:
        yield "stop", f"marked invalid since {run.invalid.since}: {run.invalid.reason}"
    if (state := run.directory.status).state in ("failed", "interrupted"):
        yield "stop", f"{state.state}" + (f": {state.message}" if state.message else "")
    if run.final is not None and run.final.fingerprint != run.directory.run.fingerprint:
        yield "stop", f"evaluated under profile {run.final.profile}, another than it was trained under"
    profile = run.directory.run
    for text in Report(profile.profile, profile.fingerprint, run.seed, 0, tuple(run.receipts)).violations():
        yield "stop", text
    nonfinite = [row.step for row in run.metrics if row.nonfinite]
    if nonfinite:
        yield "stop", f"NaN or infinite metrics in {_steps(nonfinite)}"
    overflowed = sum(receipt.nonfinite for receipt in run.receipts)
    if overflowed:
        yield "stop", f"{overflowed:,} values came out NaN or infinite"
    starved = [row.step for row in run.metrics if row.starved]
    if starved:
        yield "watch", f"starved batches in {_steps(starved)} of {len(run.metrics)}: too few groups with a gradient"
    recorded = run.directory.path / ALARMS
    for line in recorded.read_text(encoding="utf-8").splitlines() if recorded.exists() else ():
        yield "watch", line


def _steps(steps: Sequence[int]) -> str:
    shown = ", ".join(map(str, steps[:8]))
    return f"{len(steps)} steps ({shown}{', …' if len(steps) > 8 else ''})"


def environment(runs: Sequence[RunSummary]) -> tuple[list[tuple[str, str]], list[tuple[str, list[str]]]]:
    """What is the same in all runs, and, by run, what is not."""
    tables = [run.directory.environment() | {"processes": run.directory.run.processes} for run in runs]
    keys = list(dict.fromkeys(itertools.chain.from_iterable(tables)))
    same, differing = [], []
    for key in keys:
        values = ["–" if table.get(key) is None else str(table[key]) for table in tables]
        if len(set(values)) == 1:
            same.append((key, values[0]))
        else:
            differing.append((key, values))
    return same, differing


def caveats(arms: Sequence[ArmSummary]) -> list[str]:
    """What the numbers do not say."""
    found = [
        "Intervals of single runs (Wilson) cover the choice of held-out problems, not the training seed. Those over "
        "seeds (Student's t) cover the seed on these problems, not other problems."
    ]
    few = [f"{arm.label} ({len(arm.counted)})" for arm in arms if len(arm.counted) < 3]
    if few:
        found.append(f"Fewer than three finished runs: {', '.join(few)}. Such an arm says little about other seeds.")
    for arm in arms:
        for run in arm.runs:
            environment = run.directory.environment()
            if environment.get("git.revision") is None:
                found.append(f"{run.name} does not know the revision of its code.")
            elif environment.get("git.dirty"):
                found.append(f"{run.name} ran on uncommitted changes: its revision does not tell its code.")
            for resume in run.directory.read_jsonl(RESUMES, Resume):
                if resume.changed:
                    found.append(f"{run.name} was resumed in another environment: {', '.join(resume.changed)} changed.")
    if any(arm.runs[0].directory.experiment.preset == "smoke" for arm in arms):
        found.append("The preset smoke shows that the machinery works; it says nothing about the question.")
    return found
