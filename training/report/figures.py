"""The figures of a report, as SVG for a page that is read in light and in dark.

Matplotlib draws them in the palette of `training.plot`; in the SVG each colour becomes a variable of the page's style,
so that one drawing fits both, and text stays text.
"""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from training import curves
from training.plot import GREY, MARKERS, MODE_STYLES, PALETTE, VERMILION, numbers, sigma_scale, smooth
from training.records import MODES, RobustnessPoint
from training.summary import ArmSummary, mean_interval

INK = "#1A1A1B"
"""Drawn in, then replaced by the page's own colour of text; no colour of the palette."""

VARIABLES = {
    INK: "--ink",
    GREY: "--muted",
    **{colour: f"--series-{i}" for i, colour in enumerate(PALETTE)},
}
"""Colours of the drawings, and the variables of the page that stand for them."""

WIDTH = 9.2  # inches; the page scales it to its column

_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "report",
    "font.size": 10,
    "text.color": INK,
    "axes.axisbelow": True,
    "axes.edgecolor": GREY,
    "axes.grid": True,
    "axes.labelcolor": INK,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "grid.alpha": 0.25,
    "grid.color": GREY,
    "legend.frameon": False,
    "xtick.color": INK,
    "ytick.color": INK,
}
_LINES = ("-", "--", ":", "-.")


@mpl.rc_context(_STYLE)
def accuracy(arms: Sequence[ArmSummary]) -> str:
    """Final accuracy: each run with its Wilson interval, and the mean over seeds with Student's."""
    shown = [arm for arm in arms if arm.counted]
    figure = Figure(figsize=(WIDTH, 1.1 + 0.9 * len(shown)), layout="constrained")
    axes = figure.subplots()
    for place, arm in enumerate(shown):
        for (mode, colour, marker), offset in zip(MODE_STYLES, (0.1, -0.3), strict=True):
            scores = [run.final.score(mode) for run in arm.counted if run.final]
            below = np.linspace(0.09, 0.23, len(scores)) if len(scores) > 1 else [0.0]
            for score, shift in zip(scores, below, strict=True):
                y, value = place + offset + shift, 100 * score.accuracy
                axes.plot([100 * end for end in score.wilson], [y, y], color=colour, lw=1, alpha=0.5)
                axes.plot(value, y, marker, color=colour, ms=4, mfc="none")
            mean, interval = mean_interval(arm.accuracies(mode))
            if interval is not None:
                axes.plot([100 * interval.low, 100 * interval.high], [place + offset] * 2, color=colour, lw=3.5)
            axes.plot(100 * mean, place + offset, marker, color=colour, ms=8, label=mode if place == 0 else None)
    axes.set_yticks(range(len(shown)), [arm.label for arm in shown])
    axes.set(ylim=(len(shown) - 0.5, -0.5), xlabel="held-out accuracy, %")
    axes.grid(visible=False, axis="y")
    axes.legend(ncols=2, loc="lower right", bbox_to_anchor=(1, 1), borderaxespad=0)
    return svg(figure, "accuracy", _accuracy_words(shown))


@mpl.rc_context(_STYLE)
def learning(arms: Sequence[ArmSummary]) -> str:
    """Accuracy of the rollouts over steps, and the held-out score along the way: each seed, and their mean."""
    shown = [arm for arm in arms if any(run.metrics for run in arm.runs)]
    figure = Figure(figsize=(WIDTH, 3.6 + 0.22 * -(-len(shown) // 3)), layout="constrained")
    rollouts, held_out = figure.subplots(1, 2)
    for index, arm in enumerate(shown):
        look: dict[str, Any] = {"color": PALETTE[index % len(PALETTE)], "ls": _LINES[index // len(PALETTE) % 4]}
        marker = MARKERS[index % len(MARKERS)]
        curves = [
            ([row.step for row in run.metrics], smooth(numbers(row.accuracy for row in run.metrics)))
            for run in arm.runs
            if run.metrics
        ]
        scores = [{step: s["emulated"].accuracy for step, s in run.scores.items()} for run in arm.runs]
        for axes, series in ((rollouts, curves), (held_out, [(list(s), list(s.values())) for s in scores if s])):
            for steps, values in series:
                axes.plot(steps, 100 * np.asarray(values), lw=0.9, alpha=0.45, **look)
            steps, mean = _mean_over(series)
            axes.plot(steps, 100 * mean, lw=2.4, marker=marker, ms=5, markevery=max(1, len(steps) // 6), **look)
        rollouts.plot([], [], lw=2.4, marker=marker, label=arm.label, **look)
    rollouts.set(title="Rollouts (mean of 5 steps)", xlabel="step", ylabel="accuracy, %")
    held_out.set(title="Held-out problems, emulated", xlabel="step")
    for axes in (rollouts, held_out):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.legend(ncols=3, loc="outside lower center")
    words = f"Learning curves of {len(shown)} arms; the start and the end of each stand in the table below."
    return svg(figure, "learning", words)


@mpl.rc_context(_STYLE)
def schedules(arms: Sequence[ArmSummary]) -> str | None:
    """Sigma of AQN requested beside realised, for each arm that asks for noise; None where none does."""
    noisy = [arm for arm in arms if any(row.sigma_requested for run in arm.runs for row in run.metrics)]
    if not noisy:
        return None
    rows = -(-len(noisy) // 2)
    figure = Figure(figsize=(WIDTH, 0.4 + 2.7 * rows), layout="constrained")
    grid = figure.subplots(rows, min(2, len(noisy)), squeeze=False).flatten()
    for axes, arm in zip(grid, noisy, strict=False):
        runs = [run for run in arm.runs if run.metrics]
        longest = max(runs, key=lambda run: len(run.metrics))
        requested = numbers(row.sigma_requested for row in longest.metrics)
        axes.step([r.step for r in longest.metrics], requested, where="mid", color=GREY, lw=2.4, label="requested")
        for i, run in enumerate(runs):
            realised = numbers(row.sigma_realised for row in run.metrics)
            label = "realised, each run" if i == 0 else None
            axes.plot([r.step for r in run.metrics], realised, "o", ms=4, mfc="none", color=VERMILION, label=label)
        axes.set(title=arm.label, xlabel="step")
        sigma_scale(axes, requested[requested > 0].min(), np.nanmax(requested))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    for axes in grid[len(noisy) :]:
        axes.set_axis_off()
    for axes in grid[:: min(2, len(noisy))]:
        axes.set_ylabel("sigma")
    figure.legend(*grid[0].get_legend_handles_labels(), ncols=2, loc="outside lower center")
    return svg(figure, "schedule", f"Sigma over steps, requested and realised, for {len(noisy)} arms.")


@mpl.rc_context(_STYLE)
def robustness(points: Mapping[str, Sequence[RobustnessPoint]]) -> str:
    """Accuracy over noise, for each adapter and each profile that it was evaluated under."""
    figure = Figure(figsize=(WIDTH, 4.6), layout="constrained")
    curves.draw(figure, points)
    return svg(figure, "robustness", f"Accuracy over noise of {len(points)} runs; the table below has the numbers.")


def svg(figure: Figure, name: str, words: str) -> str:
    """A figure as an SVG element whose ids are its own; `words` is what a screen reader says instead."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    text = re.sub(r'\bid="', f'id="{name}-', text)
    text = re.sub(r'(url\(#|href="#)', rf"\g<1>{name}-", text)
    for colour, variable in VARIABLES.items():
        text = re.sub(re.escape(colour), f"var({variable})", text, flags=re.IGNORECASE)
    text = re.sub(r' (width|height)="[\d.]+pt"', "", text, count=2)
    escaped = words.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;")
    return text.replace("<svg", f'<svg role="img" aria-label="{escaped}"', 1)


def colour_of(value: float, low: float, high: float) -> tuple[str, str]:
    """Background, from a map that colour-blind readers can read, and the text's colour, that contrasts with it."""
    place = (value - low) / (high - low) if high > low else 0.5
    red, green, blue, _ = mpl.colormaps["cividis"](0.12 + 0.88 * place)
    bright = 0.2126 * red**2.2 + 0.7152 * green**2.2 + 0.0722 * blue**2.2 > 0.18
    return mpl.colors.to_hex((red, green, blue)), "#000" if bright else "#fff"


def _mean_over(series: Sequence[tuple[Sequence[int], Any]]) -> tuple[list[int], np.ndarray]:
    """The mean of curves at the steps that all of them have."""
    curves = [dict(zip(steps, values, strict=True)) for steps, values in series]
    common = sorted(set.intersection(*(set(curve) for curve in curves))) if curves else []
    return common, np.array([np.mean([curve[step] for curve in curves]) for step in common])


def _accuracy_words(arms: Sequence[ArmSummary]) -> str:
    said = [
        f"{arm.label}: " + ", ".join(f"{mode} {100 * mean_interval(arm.accuracies(mode))[0]:.1f} %" for mode in MODES)
        for arm in arms
    ]
    return f"Held-out accuracy by arm. {'; '.join(said)}."
