"""A noise schedule in one picture: sigma over the steps of a run."""

from __future__ import annotations

from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import MaxNLocator

from aqnsim.aqn import Schedule, survives
from aqnsim.cli.noise import DTYPE, WEIGHT
from aqnsim.cli.output import whole_file

WIDTH, HEIGHT, DPI = 9.0, 4.5, 150

_LINE, _QUIET, _TEXT = "#0072B2", "#EEEEEE", "#666666"


def draw(schedule: Schedule, steps: int, out: Path) -> None:
    """Draw a schedule into a PNG, which is there as a whole or not at all.

    Raises:
        ConfigError: the file cannot be written.
    """
    figure = picture(schedule, steps)
    with whole_file(out) as temporary:
        figure.savefig(temporary, format="png", dpi=DPI)


def picture(schedule: Schedule, steps: int) -> Figure:
    """A line an interval on a logarithmic axis, with the share that survives above it; grey where there is no noise."""
    figure = Figure(figsize=(WIDTH, HEIGHT), dpi=DPI, layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.12))
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.set_yscale("log")
    axes.set_xlim(0, steps)
    for first, last, sigma in schedule.intervals(steps):
        if sigma == 0:
            axes.axvspan(first, last + 1, color=_QUIET, linewidth=0)
            continue
        axes.hlines(sigma, first, last + 1, color=_LINE, linewidth=2.2)
        share = f"{survives(sigma, [WEIGHT], DTYPE):.0%}"
        middle = ((first + last + 1) / 2, sigma)
        axes.annotate(share, middle, (0, 4), textcoords="offset points", ha="center", fontsize=8, color=_TEXT)
    axes.margins(y=0.12)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("step; grey: no noise")
    axes.set_ylabel("sigma")
    axes.set_title(schedule.text, loc="left", fontsize=10, fontweight="bold", wrap=True)
    figure.supxlabel(
        f"above a line: share of {DTYPE} weights of {WEIGHT:g} that change where noise is added to them in place",
        fontsize=8,
        color=_TEXT,
    )
    axes.grid(axis="y", color="#E4E4E4", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    return figure
