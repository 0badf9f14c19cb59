"""Formats in one picture: which numbers they have, and what a cast leaves of normally distributed values."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import FuncFormatter, MultipleLocator

import aqnsim
from aqnsim.cli.output import whole_file
from aqnsim.cli.pages import binades
from aqnsim.cli.tables import block_text, scale_text
from aqnsim.formats import AnyFormat, BlockFormat, Format, element_of, random_bits

DEFAULT = ("mxfp4", "nvfp4", "hif4", "mxfp6_e2m3", "mxfp8_e4m3", "fp8_e4m3", "fp8_e5m2", "hif8", "bf16")
"""What is drawn when no format is named."""

EXPONENTS = range(-40, 41)
"""log2 of the standard deviations at which formats are measured."""

SHAPE = (256, 256)
"""Of the values that are cast at each of them: 65,536, the same draw each time."""

F64 = npt.NDArray[np.float64]

WIDTH, DPI = 12.0, 150

# Okabe and Ito's palette, which colour-blind readers can tell apart, and two greys; block formats have solid lines.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8C6D1F", "#7F7F7F")
_DENSE = 64  # numbers a binade, from which they are drawn as one bar


@dataclass(frozen=True)
class Curve:
    """What a cast to a format leaves of N(0, s) values.

    Attributes:
        format: the format.
        exponents: log2 s.
        sqnr_db: signal to quantisation noise at each of them in dB; -inf where results are Inf or NaN.
    """

    format: AnyFormat
    exponents: F64
    sqnr_db: F64


def sqnr_curves(chosen: Sequence[AnyFormat], step: Callable[[str], None] = lambda _: None) -> list[Curve]:
    """Cast the same normal values at every scale of :data:`EXPONENTS` to each format; ``step`` is told each name."""
    values = np.random.default_rng(0).standard_normal(SHAPE).astype(np.float32)
    curves = []
    for fmt in chosen:
        step(str(fmt))
        decibels = [_sqnr(values * np.float32(2.0**e), fmt) for e in EXPONENTS]
        curves.append(Curve(fmt, np.array(EXPONENTS, np.float64), np.array(decibels)))
    return curves


def _sqnr(x: npt.NDArray[np.float32], fmt: AnyFormat) -> float:
    key = aqnsim.NoiseKey(site="plot") if random_bits(fmt) else None
    y = aqnsim.cast(torch.from_numpy(x), fmt, key=key).numpy()
    wide = x.astype(np.float64)
    signal, noise = float(np.sum(wide**2)), float(np.sum((y - wide) ** 2))
    if not math.isfinite(noise):
        return -math.inf
    return 10 * math.log10(signal / noise) if noise else math.inf


def draw(curves: Sequence[Curve], out: Path) -> None:
    """Draw the formats of some curves into a PNG, which is there as a whole or not at all.

    Raises:
        ConfigError: the file cannot be written.
    """
    figure = picture(curves)
    with whole_file(out) as temporary:
        figure.savefig(temporary, format="png", dpi=DPI)


def heights(count: int) -> tuple[float, float]:
    """The two panels' shares of the height in inches, for a number of formats."""
    return 0.9 + 0.32 * count, max(5.0, 0.22 * count)


def picture(curves: Sequence[Curve]) -> Figure:
    """The number lines above, the curves below."""
    both = heights(len(curves))
    engine = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.12)
    figure = Figure(figsize=(WIDTH, sum(both)), dpi=DPI, layout=engine)
    FigureCanvasAgg(figure)
    lines, sqnr = figure.subplots(2, 1, height_ratios=both)
    _number_lines(lines, curves)
    _sqnr_panel(sqnr, curves)
    return figure


# ---- number lines ---------------------------------------------------------------------------------------------------


def _number_lines(axes: Axes, curves: Sequence[Curve]) -> None:
    low, high = _visible([element_of(curve.format) for curve in curves])
    for row, (curve, colour, _) in enumerate(styled(curves)):
        fmt, element = curve.format, element_of(curve.format)
        if isinstance(fmt, BlockFormat):
            start, end = _reach(fmt)
            axes.barh(
                row, min(end, high) - max(start, low), left=max(start, low), height=0.74, color=colour, alpha=0.13
            )
        places = positions(element, low, high)
        axes.vlines(places, row - 0.3, row + 0.3, color=colour, linewidth=0.8)
        for start, end in spans(element, low, high):
            axes.barh(row, end - start, left=start, height=0.6, color=colour)
        axes.annotate(_summary(fmt), (1, row), (6, 0), _AT_THE_RIGHT, "offset points", **_SMALL)
    axes.set_yticks(range(len(curves)), [str(curve.format) for curve in curves], fontsize=9)
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(len(curves) - 0.4, -0.6)
    axes.set_xlim(low, high)
    axes.set_title("Which positive numbers a format has; shaded, what the scale of its blocks can reach", **_TITLE)
    axes.set_xlabel("value")
    axes.spines["left"].set_visible(False)
    _finish(axes, every=4)


def positions(element: Format, low: float, high: float) -> F64:
    """log2 of the positive numbers from ``2^low`` to ``2^high``, but for binades that are drawn as a bar."""
    sparse = [b for b in binades(element) if b.values < _DENSE and low <= b.exponent < high]
    return np.array([math.log2(b.value(i)) for b in sparse for i in range(b.values)])


def spans(element: Format, low: float, high: float) -> list[tuple[float, float]]:
    """log2 of the ends of the bars."""
    dense = [b for b in binades(element) if b.values >= _DENSE and low <= b.exponent < high]
    return [
        (b.exponent, math.log2(element.max) if b.exponent == element.max_exponent else b.exponent + 1) for b in dense
    ]


def _visible(elements: Sequence[Format]) -> tuple[int, int]:
    """log2 of the ends of the axis: all numbers of the formats that do not span most of binary32's range."""
    ends = [(math.frexp(e.min_subnormal)[1] - 1, e.max_exponent + 1) for e in elements]
    narrow = [span for span in ends if span[1] - span[0] <= 80] or [(EXPONENTS[0], EXPONENTS[-1])]
    return min(low for low, _ in narrow) - 1, max(high for _, high in narrow) + 1


def _reach(fmt: BlockFormat) -> tuple[float, float]:
    """log2 of the smallest and the largest number that an element and its scale can make."""
    low, high = math.log2(fmt.element.min_subnormal), math.log2(fmt.element.max)
    if fmt.scale_format == "hif4":  # UE6M2, doubled at most twice
        scale = element_of(aqnsim.formats.get("fp8_ue6m2"))
        return low + math.log2(scale.min), high + math.log2(scale.max) + 2
    return low - 127, high + 127


def _summary(fmt: AnyFormat) -> str:
    bits = f"{fmt.bits:.4g} bits"
    if isinstance(fmt, BlockFormat):
        return f"{bits}, block {block_text(fmt)}, {scale_text(fmt)}"
    return f"{bits}, $2^{{{math.log2(fmt.min_subnormal):.0f}}}$ to $2^{{{fmt.max_exponent}}}$"


# ---- signal to noise ------------------------------------------------------------------------------------------------


def _sqnr_panel(axes: Axes, curves: Sequence[Curve]) -> None:
    lines = []
    for curve, colour, dashes in styled(curves):
        shown = np.clip(curve.sqnr_db, 0, None)
        lines += axes.plot(curve.exponents, shown, color=colour, linestyle=dashes, linewidth=1.8)
    peaks = [float(curve.sqnr_db[np.isfinite(curve.sqnr_db)].max(initial=0.0)) for curve in curves]
    axes.set_ylim(0, 1.06 * max(*peaks, 1.0))
    axes.set_xlim(EXPONENTS[0], EXPONENTS[-1])
    axes.set_title(
        "Signal to quantisation noise of normally distributed values; 0 where a result is Inf or NaN", **_TITLE
    )
    axes.set_xlabel(f"standard deviation of the {math.prod(SHAPE):,} values")
    axes.set_ylabel("SQNR in dB")
    axes.grid(axis="y", color="#E4E4E4", linewidth=0.8)
    axes.set_axisbelow(True)
    order = sorted(range(len(curves)), key=lambda i: -peaks[i])
    axes.legend(
        [lines[i] for i in order],
        [f"{curves[i].format}  {peaks[i]:.1f} dB" for i in order],
        title="highest SQNR",
        loc="center left",
        bbox_to_anchor=(1, 0.5),
        frameon=False,
        fontsize=9,
    )
    _finish(axes, every=8)


# ---- both -----------------------------------------------------------------------------------------------------------

_TITLE: dict[str, Any] = {"loc": "left", "fontsize": 11, "fontweight": "bold", "pad": 8}
_SMALL: dict[str, Any] = {"va": "center", "fontsize": 8, "color": "#666666"}
_AT_THE_RIGHT: Any = ("axes fraction", "data")
_DASHES: dict[bool, Any] = {True: ("-", (0, (8, 1.5, 1, 1.5))), False: ((0, (4, 1.5)), (0, (1, 1)))}


def styled(curves: Sequence[Curve]) -> Iterator[tuple[Curve, str, Any]]:
    """Each curve with its colour and dashes; a second round of colours has other dashes."""
    for i, curve in enumerate(curves):
        dashes = _DASHES[isinstance(curve.format, BlockFormat)]
        yield curve, _COLOURS[i % len(_COLOURS)], dashes[i // len(_COLOURS) % len(dashes)]


def _finish(axes: Axes, every: int) -> None:
    axes.xaxis.set_major_locator(MultipleLocator(every))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda e, _: f"$2^{{{e:.0f}}}$"))
    axes.spines[["top", "right"]].set_visible(False)
