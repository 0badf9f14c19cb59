"""The picture of the formats: what is drawn is what casts do, and a file is whole or not there."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import matplotlib.image
import ml_dtypes
import numpy as np
import pytest
from matplotlib.figure import Figure

from aqnsim import cli, formats
from aqnsim.cli import plots
from aqnsim.cli.plots import Curve
from aqnsim.formats import BlockFormat, Format, element_of

Curves = dict[str, Curve]


@pytest.fixture(scope="module")
def curves() -> Curves:
    return {str(c.format): c for c in plots.sqnr_curves([formats.get(name) for name in plots.DEFAULT])}


def at(curve: Curve, exponent: int) -> float:
    return float(curve.sqnr_db[list(curve.exponents).index(exponent)])


# ---- what is measured -----------------------------------------------------------------------------------------------


def test_every_scale_is_measured(curves: Curves) -> None:
    assert list(curves) == list(plots.DEFAULT)
    for curve in curves.values():
        assert curve.exponents.tolist() == list(range(-40, 41))
        assert curve.sqnr_db.shape == curve.exponents.shape
        assert not np.isnan(curve.sqnr_db).any()


@pytest.mark.parametrize("name", ["mxfp4", "nvfp4", "mxfp6_e2m3", "mxfp8_e4m3", "bf16"])
def test_scaled_blocks_do_not_depend_on_the_scale_of_the_values(name: str, curves: Curves) -> None:
    middle = np.abs(curves[name].exponents) <= 20
    assert np.ptp(curves[name].sqnr_db[middle]) < 0.2
    assert curves[name].sqnr_db.min() > 18


def test_elements_without_a_scale_lose_everything_outside_their_range(curves: Curves) -> None:
    # 2^-30 is far below E4M3's smallest number, 2^-9, and 2^30 far above its largest, 448
    assert [round(at(curves["fp8_e4m3"], e), 2) for e in (-30, 30)] == [0, 0]
    assert at(curves["fp8_e4m3"], 0) > 30
    assert at(curves["hif4"], 0) > 20
    assert at(curves["hif4"], 30) < 0.1  # its scale ends at 49152


def test_formats_are_ordered_as_their_mantissas_are(curves: Curves) -> None:
    at_one = {name: at(curve, 0) for name, curve in curves.items()}
    ordered = ["mxfp4", "nvfp4", "hif4", "fp8_e5m2", "mxfp8_e4m3", "bf16"]
    assert sorted(ordered, key=lambda name: at_one[name]) == ordered
    # 6 dB a bit: bf16 has four bits more than E4M3
    assert at_one["bf16"] - at_one["fp8_e4m3"] == pytest.approx(20 * math.log10(2) * 4, abs=0.3)


def test_hif8_is_finest_around_1_and_overflows_to_inf(curves: Curves) -> None:
    hif8, e5m2 = curves["hif8"], curves["fp8_e5m2"]
    assert at(hif8, 0) > at(e5m2, 0) + 5
    assert at(hif8, 11) < at(e5m2, 11) - 5
    assert at(hif8, -18) > at(e5m2, -18) + 10
    assert at(hif8, 16) == -math.inf


@pytest.mark.parametrize("exponent", [-8, 0, 5])
def test_a_point_is_what_another_library_gives(exponent: int, curves: Curves) -> None:
    x = np.random.default_rng(0).standard_normal(plots.SHAPE).astype(np.float32) * np.float32(2.0**exponent)
    y = x.astype(ml_dtypes.float8_e4m3fn).astype(np.float64)
    expected = 10 * np.log10(np.sum(x.astype(np.float64) ** 2) / np.sum((y - x) ** 2))
    assert at(curves["fp8_e4m3"], exponent) == pytest.approx(expected, abs=1e-9)


def test_a_stochastic_format_can_be_drawn() -> None:
    nearest, stochastic = plots.sqnr_curves([formats.get("mxfp4"), formats.get("mxfp4(rounding=stochastic)")])
    assert 1 < at(nearest, 0) - at(stochastic, 0) < 6


def test_each_format_is_a_step_of_the_progress() -> None:
    steps: list[str] = []
    plots.sqnr_curves([formats.get("hif8"), formats.get("mxfp4")], steps.append)
    assert steps == ["hif8", "mxfp4"]


# ---- what is drawn --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fmt", [f for f in formats.ALL.values() if isinstance(f, Format) and f.bits <= 8], ids=str)
def test_a_number_line_has_a_tick_for_every_number(fmt: Format) -> None:
    ticks = plots.positions(fmt, -200, 200)
    solid = plots.spans(fmt, -200, 200)
    expected = np.log2([v for v in fmt.values() if v > 0])
    inside = np.array([any(a <= v <= b for a, b in solid) for v in expected], bool)
    assert ticks.tolist() == expected[~inside].tolist()
    assert all(b - a == 1 or b == math.log2(fmt.max) for a, b in solid)


def test_numbers_too_dense_to_tell_apart_are_drawn_as_a_bar_up_to_the_largest() -> None:
    fp16 = element_of(formats.get("fp16"))
    spans = plots.spans(fp16, -200, 200)
    assert spans[-1] == (15, math.log2(65504))
    assert spans[0][0] == -18  # subnormals: 64 numbers from 2^-18
    assert plots.positions(fp16, -200, 200).max() < -18
    assert plots.positions(fp16, -20, 200).min() == -20


def labels(figure: Figure) -> list[list[str]]:
    lines, sqnr = figure.axes
    legend = sqnr.get_legend()
    assert legend is not None
    return [[t.get_text() for t in lines.get_yticklabels()], [t.get_text().split("  ")[0] for t in legend.get_texts()]]


def test_both_panels_name_every_format_and_draw_its_data(curves: Curves) -> None:
    figure = plots.picture(list(curves.values()))
    rows, legend = labels(figure)
    assert rows == list(curves)
    assert sorted(legend) == sorted(curves)
    sqnr = figure.axes[1]
    assert sqnr.get_ylim()[0] == 0
    for line, curve in zip(sqnr.get_lines(), curves.values(), strict=True):
        assert np.array_equal(np.asarray(line.get_ydata()), np.maximum(curve.sqnr_db, 0))


def test_block_formats_are_told_by_their_lines_and_no_two_look_alike() -> None:
    chosen = [Curve(f, np.zeros(1), np.zeros(1)) for f in list(formats.ALL.values())[::2]]
    styles = [(colour, str(dashes)) for _, colour, dashes in plots.styled(chosen)]
    assert len(set(styles)) == len(styles)
    dashes = [
        {s[1] for s, c in zip(styles, chosen, strict=True) if isinstance(c.format, BlockFormat) == k} for k in (0, 1)
    ]
    assert dashes[0].isdisjoint(dashes[1])


# ---- the file -------------------------------------------------------------------------------------------------------


def test_the_command_writes_a_png_of_the_expected_size(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "formats.png"
    assert cli.main(["formats", "--plot", str(out), "--format", "mxfp4", "--format", "e3m4"]) == 0
    assert capsys.readouterr().out == f"{out}\n"
    image = matplotlib.image.imread(out)
    height = sum(plots.heights(2))
    assert image.shape[:2] == (int(height * plots.DPI), int(plots.WIDTH * plots.DPI))
    assert np.ptp(image[..., :3]) > 0.9  # something is drawn on it
    assert list(tmp_path.iterdir()) == [out]


def test_the_default_file_is_in_the_current_folder(
    tmp_path: Path, curves: Curves, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(plots, "sqnr_curves", lambda chosen, step: [curves[str(f)] for f in chosen])
    assert cli.main(["formats", "--plot"]) == 0
    assert matplotlib.image.imread("formats.png").shape[1] == 1800


def test_a_failure_leaves_the_old_picture_and_nothing_else(
    tmp_path: Path, curves: Curves, monkeypatch: pytest.MonkeyPatch
) -> None:
    def half(self: Figure, path: Path, **_: Any) -> None:
        path.write_bytes(b"half a picture")
        raise OSError("made up")

    out = tmp_path / "formats.png"
    out.write_bytes(b"old")
    monkeypatch.setattr(Figure, "savefig", half)
    with pytest.raises(OSError, match="made up"):
        plots.draw([curves["hif8"]], out)
    assert out.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [out]


def test_a_folder_that_is_not_there_is_one_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["formats", "--plot", str(tmp_path / "none" / "a.png"), "--format", "hif8"]) == 2
    assert capsys.readouterr().err.endswith("none/a.png: No such file or directory\n")
