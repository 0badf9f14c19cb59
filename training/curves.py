"""Robustness curves from the records of `robustness`: accuracy over noise, as a picture, a table and JSON."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich.table import Table

from training.plot import MARKERS, PALETTE
from training.records import RobustnessPoint
from training.rundir import replace
from training.statistics import wilson
from training.summary import mean_interval

Points = Mapping[str, Sequence[RobustnessPoint]]
"""The points of each run, by what a reader calls the run."""


@dataclass(frozen=True)
class Curve:
    """One adapter in one form under one profile: for each noise, its draws.

    Attributes:
        run: what a reader calls the run.
        points: sorted by noise; those of one noise differ in their seed.
    """

    run: str
    points: tuple[RobustnessPoint, ...]

    @property
    def first(self) -> RobustnessPoint:
        """Any of the points: they share all but noise and seed."""
        return self.points[0]

    @property
    def label(self) -> str:
        """Run, step and profile, with a word where the profile is the one that was trained with."""
        own = " (trained with)" if self.first.fingerprint == self.first.trained_fingerprint else ""
        return f"{self.run}, step {self.first.step}: {self.first.profile}{own}"

    @property
    def by_noise(self) -> dict[float, list[RobustnessPoint]]:
        """The draws of each noise."""
        found: dict[float, list[RobustnessPoint]] = {}
        for point in self.points:
            found.setdefault(point.noise, []).append(point)
        return found


def curves(points: Points) -> list[Curve]:
    """Group points into curves; a point that is there twice counts once."""
    groups: dict[tuple[object, ...], dict[tuple[object, ...], RobustnessPoint]] = {}
    for run, found in points.items():
        for point in found:
            group = groups.setdefault((run, point.adapters, point.fingerprint, point.merged), {})
            group[point.key] = point
    return [
        Curve(str(key[0]), tuple(sorted(group.values(), key=lambda point: (point.noise, point.seed))))
        for key, group in groups.items()
    ]


def rows(points: Points) -> list[dict[str, str]]:
    """The table: a row for each curve and noise, accuracies in percent."""
    found = []
    for curve in curves(points):
        first = curve.first
        about = {
            "run": curve.run,
            "step": str(first.step),
            "adapters": "merged" if first.merged else "unmerged",
            "trained under": first.trained_under,
            "evaluated under": first.profile,
        }
        found += [about | _row(draws) for draws in curve.by_noise.values()]
    return found


def _row(draws: Sequence[RobustnessPoint]) -> dict[str, str]:
    """What the draws of one noise say together."""
    first = draws[0]
    mean, interval = mean_interval([point.score.accuracy for point in draws])
    problems = wilson(round(mean * first.score.n), first.score.n)
    realised = [point.realised for point in draws if point.realised is not None]
    return {
        "fingerprint": first.evaluated_under,
        "noise, %": f"{100 * first.noise:g}",
        "realised, %": f"{100 * sum(realised) / len(realised):.3f}" if realised else "–",
        "draws": str(len(draws)) if first.draws_anything else "none",
        "accuracy, %": f"{100 * mean:.1f}",
        "95 % over draws": f"{100 * interval.low:.1f} to {100 * interval.high:.1f}" if interval else "–",
        "95 % over problems": f"{100 * problems.low:.1f} to {100 * problems.high:.1f}",
    }


def tables(points: Points) -> list[Table]:
    """For a terminal: a table for each curve."""
    found = []
    for curve in curves(points):
        form = "merged" if curve.first.merged else "unmerged"
        lines = [_row(draws) for draws in curve.by_noise.values()]
        table = Table(*lines[0], title=f"{curve.label}, {form}", title_justify="left")
        for line in lines:
            table.add_row(*line.values())
        found.append(table)
    return found


def draw(figure: Figure, points: Points) -> None:
    """Draw accuracy over noise: a panel for each form of the adapters, a line for each run and profile."""
    found = curves(points)
    forms = sorted({curve.first.merged for curve in found})
    labels = list(dict.fromkeys(curve.label for curve in found))
    panels = figure.subplots(1, len(forms), sharey=True, squeeze=False)[0]
    for axes, merged in zip(panels, forms, strict=True):
        for curve in found:
            if curve.first.merged is merged:
                place = labels.index(curve.label)
                colour, marker = PALETTE[place % len(PALETTE)], MARKERS[place % len(MARKERS)]
                aside = 0.06 * (place - (len(labels) - 1) / 2)  # so that intervals of one noise stand side by side
                noises = [100 * noise + aside for noise in curve.by_noise]
                accuracies = [[100 * p.score.accuracy for p in draws] for draws in curve.by_noise.values()]
                for noise, values in zip(noises, accuracies, strict=True):
                    axes.plot([noise] * len(values), values, marker, color=colour, ms=4, mfc="none", alpha=0.5)
                means = [mean_interval([value / 100 for value in values]) for values in accuracies]
                axes.plot(noises, [100 * m for m, _ in means], marker=marker, ms=5, lw=2, color=colour)
                for noise, (_, interval) in zip(noises, means, strict=True):
                    if interval is not None:
                        axes.plot([noise, noise], [100 * interval.low, 100 * interval.high], color=colour, lw=1.2)
        axes.set(title="Merged adapters" if merged else "Unmerged adapters", xlabel="relative noise, %")
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("held-out accuracy, %")
    for place, label in enumerate(labels):
        look = {"color": PALETTE[place % len(PALETTE)], "marker": MARKERS[place % len(MARKERS)]}
        panels[0].plot([], [], lw=2, label=label, **look)
    figure.legend(ncols=2, loc="outside lower center", frameon=False, fontsize=9)


def write(points: Points, folder: Path) -> tuple[Path, Path]:
    """Write `robustness.json` (points and table) and `robustness.png` into a folder, which is made if need be.

    Returns:
        The paths of both.
    """
    folder.mkdir(parents=True, exist_ok=True)
    content = {
        "points": {run: [point.model_dump(mode="json") for point in found] for run, found in points.items()},
        "table": rows(points),
    }
    figure = Figure(figsize=(11, 5.5), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    draw(figure, points)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    as_json, picture = folder / "robustness.json", folder / "robustness.png"
    replace(as_json, f"{json.dumps(content, indent=2)}\n".encode())
    replace(picture, buffer.getvalue())
    return as_json, picture
