"""``aqnsim calibrate``: fit an error model to a device, and write the profile."""

from __future__ import annotations

import json
import platform
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from aqnsim._errors import ConfigError
from aqnsim.cli.output import Section, Table, show, whole_file

if TYPE_CHECKING:
    from aqnsim.calibrate import Calibration, Sample


def calibrate_command(
    device: Annotated[str, typer.Option(metavar="DEVICE", help="A torch device to measure.")] = "cpu",
    dtypes: Annotated[
        list[str] | None, typer.Option("--dtype", metavar="DTYPE", help="bfloat16, float16, float32; repeatable.")
    ] = None,
    lengths: Annotated[
        list[int] | None, typer.Option("--k", metavar="K", help="Products that are added; repeatable.")
    ] = None,
    dump: Annotated[
        Path | None, typer.Option("--from", metavar="FILE", help="Read products from a dump instead of measuring.")
    ] = None,
    save: Annotated[
        Path | None, typer.Option("--save", metavar="FILE", help="Write the measured products as a dump.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the operands.")] = 0,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="NAME.toml", help="Write a profile; of one dtype.")
    ] = None,
    json_file: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write what was found.")] = None,
    plot: Annotated[Path | None, typer.Option("--plot", metavar="FILE.png", help="Draw how well it fits.")] = None,
) -> None:
    """Fit how far a device's products are off before they are rounded, and how well that law holds."""
    try:
        from aqnsim import calibrate
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "scipy":
            raise
        raise ConfigError("calibrate needs scipy: pip install 'aqnsim[calibrate]'") from error
    samples = calibrate.read(dump) if dump else _measured(device, dtypes, lengths, seed)
    found = calibrate.calibrate(samples)
    if save is not None:
        with whole_file(save) as temporary:
            calibrate.write(samples, temporary)
    if json_file is not None:
        with whole_file(json_file) as temporary:
            temporary.write_text(json.dumps([c.to_dict() for c in found], indent=2) + "\n", encoding="utf-8")
    if plot is not None:
        _draw(found, plot)
    for calibration in found:
        show(*page(calibration))
    if out is not None:
        _write_profile(found, out, f"dump {dump.name}" if dump else f"device {device}, seed {seed}")


def _measured(device: str, dtypes: list[str] | None, lengths: list[int] | None, seed: int) -> list[Sample]:
    from aqnsim.calibrate.samples import SHAPES, measure

    shapes = [(128, k, 128) for k in lengths] if lengths else SHAPES
    return measure(device, dtypes or ("bfloat16",), shapes, seed)


def page(found: Calibration) -> list[Section]:
    """What was found for one dtype."""
    fit = found.fit
    rows: Table = [("K", "sigma", "p", "rounded right", "MERE", "MARE", "RMSE")]
    for f in found.by_k:
        e = found.errors[f.k or 0]
        told = (f"{f.sigma:.3g}", f"{f.p_value:.2g}", f"{e.rounded_right:.3%}", f"{e.mere:.3g}", f"{e.mare:.3g}")
        rows.append((str(f.k), *told, f"{e.rmse:.3g}"))
    verdict = f"{fit.error or 'no error before rounding'}, from {fit.n} values, p = {fit.p_value:.2g}"
    other = f"with {found.other.reference} as reference: p = {found.other.p_value:.2g}, and a likelihood of " + (
        f"e^{found.other.log_likelihood - fit.log_likelihood:.0f} of this one's"
    )
    sections = [Section(f"{found.dtype}: {verdict}", rows), Section("", other)]
    if found.units:
        sections.append(Section("", f"bit for bit the sums of {', '.join(found.units)}, on a part of the values"))
    return [*sections, *(Section("", f"warning: {w}") for w in found.warnings)]


def _write_profile(found: list[Calibration], out: Path, measured: str) -> None:
    from aqnsim.calibrate.profile import to_profile
    from aqnsim.profiles import texts

    if out.suffix != ".toml" or len(found) != 1:
        raise ConfigError(
            f"--out writes one profile of one dtype to a file that ends in .toml, got {str(out)!r} for "
            f"{', '.join(c.dtype for c in found)}"
        )
    source = {"measured": f"{measured}, on {platform.machine()}, {datetime.now(UTC):%Y-%m-%d}, by aqnsim calibrate"}
    profile = to_profile(found[0], out.stem, source)
    with whole_file(out) as temporary:
        temporary.write_text(texts.to_toml(profile), encoding="utf-8")
    print(out)


def _draw(found: list[Calibration], path: Path) -> None:
    try:
        from aqnsim.cli.calibration_plot import draw
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "matplotlib":
            raise
        raise ConfigError("--plot needs matplotlib: pip install 'aqnsim[plot]'") from error
    draw(found, path)
