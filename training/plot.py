"""A picture of one run: reward, noise, held-out accuracy, realised error of the weights."""

from __future__ import annotations

import io
import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from aqnsim._errors import AqnsimError
from aqnsim.aqn import layer_of
from aqnsim.receipts import Receipt
from training.records import Mode, Score, StepMetrics
from training.rundir import replace
from training.summary import RunSummary

# Okabe and Ito's palette, which colour-blind readers can tell apart; markers differ as well.
BLUE, ORANGE, GREEN, VERMILION = "#0072B2", "#E69F00", "#009E73", "#D55E00"
PALETTE = (BLUE, ORANGE, GREEN, VERMILION, "#CC79A7", "#56B4E9", "#000000", "#B8A800")
MARKERS = "osD^vP*X"
GREY = "#767676"

MODE_STYLES: tuple[tuple[Mode, str, str], ...] = (("clean", BLUE, "o"), ("emulated", ORANGE, "s"))
"""Colour and marker of the two modes of an evaluation."""


class PlotError(AqnsimError):
    """A run that holds nothing to plot."""


def plot_run(run_dir: Path, out_png: Path) -> Path:
    """Draw a run, finished or not, into a PNG.

    Args:
        run_dir: the run directory.
        out_png: the file to write; its folder is made if need be.

    Returns:
        `out_png`.

    Raises:
        PlotError: no step of training was recorded.
        RunDirectoryError: not a run directory, or a damaged one.
    """
    summary = RunSummary.read(run_dir)
    run, metrics = summary.directory, summary.metrics
    if not metrics:
        raise PlotError(f"{run_dir} has recorded no step of training yet: nothing to plot")
    figure = Figure(figsize=(11, 7.5), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    (reward, sigma), (accuracy, weights) = figure.subplots(2, 2)
    experiment = run.experiment
    figure.suptitle(
        f"{experiment.id}   {experiment.model.name}   "
        f"{run.run.profile} [{run.run.fingerprint[:12]}]   seed {run.run.seed}   "
        f"{summary.state}",
        fontsize=11,
        fontweight="bold",
    )
    _plot_reward(reward, metrics)
    _plot_sigma(sigma, metrics)
    _plot_accuracy(accuracy, summary.scores)
    _plot_weights(weights, [receipt for receipt in summary.receipts if receipt.stream == "weight"])
    for axes in (reward, sigma, accuracy, weights):
        axes.spines[["top", "right"]].set_visible(False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    out_png = Path(out_png)
    out_png.parent.mkdir(parents=True, exist_ok=True)
    replace(out_png, buffer.getvalue())
    return out_png


def _plot_reward(axes: Axes, metrics: Sequence[StepMetrics]) -> None:
    steps = [row.step for row in metrics]
    rewards = numbers(row.reward for row in metrics)
    accuracies = numbers(row.accuracy for row in metrics)
    axes.plot(steps, accuracies, color=BLUE, marker="o", ms=3, lw=0.8, alpha=0.45)
    axes.plot(steps, smooth(accuracies), color=BLUE, lw=2.2, label="accuracy (5-step mean)")
    axes.plot(steps, rewards, color=ORANGE, lw=1.2, ls="--", label="reward")
    starved = [row.step for row in metrics if row.starved]
    if starved:
        level = np.full(len(starved), np.nanmin([*accuracies, *rewards]))
        axes.plot(starved, level, "x", color=VERMILION, label="starved batch")
    axes.set(title="Training rollouts", xlabel="step", ylabel="accuracy, reward")
    axes.grid(alpha=0.25)
    axes.legend(frameon=False, fontsize=8)


def _plot_sigma(axes: Axes, metrics: Sequence[StepMetrics]) -> None:
    steps = [row.step for row in metrics]
    requested = numbers(row.sigma_requested for row in metrics)
    realised = numbers(row.sigma_realised for row in metrics)
    axes.set(title="AQN: sigma of the norm weights in the rollout", xlabel="step", ylabel="sigma")
    positive = requested[requested > 0]
    if not positive.size:
        _say(axes, "no noise was asked for")
        return
    axes.step(steps, requested, where="mid", color=GREY, lw=2, label="requested")
    axes.plot(steps, realised, "o", ms=4.5, mfc="none", mew=1.4, color=VERMILION, label="realised")
    sigma_scale(axes, positive.min(), positive.max())
    axes.grid(alpha=0.25)
    axes.legend(frameon=False, fontsize=8)


def sigma_scale(axes: Axes, smallest: float, largest: float) -> None:
    """A logarithmic axis for sigmas from the smallest to the largest, with room for the zeros of a warm-up."""
    axes.set_yscale("symlog", linthresh=smallest, linscale=0.4)
    axes.set_ylim(bottom=-0.15 * smallest, top=2 * largest)
    decades = range(math.ceil(math.log10(smallest)), math.floor(math.log10(2 * largest)) + 1)
    axes.set_yticks([0, *(10.0**power for power in decades)])


def _plot_accuracy(axes: Axes, scores: dict[int, dict[Mode, Score]]) -> None:
    axes.set(title="Held-out accuracy (95 % Wilson intervals)", ylabel="accuracy", ylim=(0, 1))
    axes.set_xticks(range(len(scores)), [f"step {step}" for step in scores])
    axes.set_xlim(-0.5, max(len(scores), 2) - 0.5)
    if not scores:
        _say(axes, "not evaluated yet")
        return
    for (mode, colour, marker), offset in zip(MODE_STYLES, (-0.04, 0.04), strict=True):
        places = np.arange(len(scores)) + offset
        column = [modes[mode] for modes in scores.values()]
        heights = np.array([score.accuracy for score in column])
        lows, highs = np.array([score.wilson for score in column]).T
        axes.errorbar(
            places,
            heights,
            yerr=np.abs([heights - lows, highs - heights]),
            color=colour,
            marker=marker,
            capsize=4,
            lw=1.6,
            label=mode,
        )
        for place, score in zip(places, column, strict=True):
            # To the outer side of each mode's marker, off the lines between the two evaluations.
            side, shift = ("right", (-7, 5)) if offset < 0 else ("left", (7, -7))
            axes.annotate(
                f"{score.accuracy:.1%}",
                (place, score.accuracy),
                shift,
                textcoords="offset points",
                ha=side,
                va="center",
                fontsize=8,
                color=colour,
            )
    axes.grid(alpha=0.25, axis="y")
    axes.legend(frameon=False, fontsize=8, loc="upper left")


def _plot_weights(axes: Axes, receipts: Sequence[Receipt]) -> None:
    axes.set(title="Realised error of the weights", xlabel="layer", ylabel="SQNR (dB)")
    by_role: dict[str, dict[int, float]] = defaultdict(dict)
    for receipt in receipts:
        layer = layer_of(receipt.site)
        if layer is not None and receipt.sqnr_db is not None:
            by_role[receipt.role][layer] = receipt.sqnr_db
    if not by_role:
        _say(axes, "no weight was cast")
        return
    for index, (role, values) in enumerate(sorted(by_role.items())):
        axes.plot(
            sorted(values),
            [values[layer] for layer in sorted(values)],
            color=PALETTE[index % len(PALETTE)],
            marker=MARKERS[index % len(MARKERS)],
            ms=4,
            lw=1,
            label=role,
        )
    requested = sorted({receipt.requested for receipt in receipts})
    axes.set_title(f"Realised error of the weights ({', '.join(requested)})")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.25)
    axes.legend(frameon=False, fontsize=8, ncols=4, loc="upper center", bbox_to_anchor=(0.5, -0.14))


def numbers(values: Iterable[float | None]) -> np.ndarray:
    return np.array([np.nan if value is None else value for value in values], dtype=float)


def smooth(values: np.ndarray, window: int = 5) -> np.ndarray:
    """Mean over the last `window` values, NaN left out."""
    rows = [values[max(0, end - window) : end] for end in range(1, len(values) + 1)]
    return np.array([np.nan if np.isnan(row).all() else np.nanmean(row) for row in rows])


def _say(axes: Axes, text: str) -> None:
    """Say why a panel is empty."""
    axes.set(xticks=[], yticks=[])
    axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", color=GREY)
