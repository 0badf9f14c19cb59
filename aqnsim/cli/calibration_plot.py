"""How well an error model fits, in one picture: sigma by K, and the law's probabilities beside uniform ones."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from aqnsim.calibrate import Calibration
from aqnsim.cli.output import whole_file

DPI = 150
_LINE, _OTHER, _TEXT = "#0072B2", "#D55E00", "#666666"


def draw(found: Sequence[Calibration], out: Path) -> None:
    """Draw calibrations into a PNG, a row each.

    Raises:
        ConfigError: the file cannot be written.
    """
    figure = Figure(figsize=(9, 3.4 * len(found)), dpi=DPI, layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.12))
    FigureCanvasAgg(figure)
    for row, calibration in zip(figure.subplots(len(found), 2, squeeze=False), found, strict=True):
        _sigmas(row[0], calibration)
        _probabilities(row[1], calibration)
    with whole_file(out) as temporary:
        figure.savefig(temporary, format="png", dpi=DPI)


def _sigmas(axes: Axes, found: Calibration) -> None:
    ks = [f.k for f in found.by_k]
    axes.loglog(ks, [f.sigma for f in found.by_k], "o-", color=_LINE, label="each K")
    axes.axhline(found.fit.sigma, color=_OTHER, lw=1.2, ls="--", label="all")
    axes.set(xlabel="K", ylabel=f"sigma, of {found.fit.reference}")
    axes.set_title(f"{found.dtype}: {found.fit.error or 'no error'}", loc="left", fontsize=9)
    axes.legend(frameon=False, fontsize=8)
    _plain(axes)


def _probabilities(axes: Axes, found: Calibration) -> None:
    for f in found.by_k:
        bins = np.asarray(f.histogram)
        edges = np.linspace(0, 1, len(bins) + 1)
        axes.stairs(bins / bins.mean(), edges, label=f"K = {f.k}, p = {f.p_value:.2g}")
    axes.axhline(1, color=_TEXT, lw=0.8)
    axes.set(xlabel="probability under the law", ylabel="values, of what is expected", xlim=(0, 1), ylim=(0, None))
    axes.set_title("level where the law holds", loc="left", fontsize=9, color=_TEXT)
    axes.legend(frameon=False, fontsize=7, ncols=2)
    _plain(axes)


def _plain(axes: Axes) -> None:
    axes.grid(color="#E4E4E4", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
