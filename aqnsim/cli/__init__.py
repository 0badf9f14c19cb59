"""The command line ``aqnsim``: look at formats, profiles, models and backends; measure what a cast does to a file.

Only the commands that cast load torch, and only the plot loads matplotlib.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from aqnsim import formats, profiles
from aqnsim._errors import AqnsimError, ConfigError
from aqnsim.cli import calibrating, conforming, noise, pages, scanning, tables
from aqnsim.cli.output import Section, print_json, progress, show, whole_file
from aqnsim.profiles import texts

DEFAULT_PLOT = Path("formats.png")

app = typer.Typer(
    help="Number formats of accelerators: look at them, plot them, cast a checkpoint to one, see what is emulated.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
profile_app = typer.Typer(help="List, show, compare and start profiles.", rich_markup_mode=None)
app.add_typer(profile_app, name="profile")
app.command("aqn")(noise.aqn_command)
app.command("scan")(scanning.scan_command)
app.command("calibrate")(calibrating.calibrate_command)
app.command("conformance")(conforming.conformance_command)

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@app.command("formats")
def formats_command(
    name: Annotated[
        str | None,
        typer.Argument(
            metavar="[NAME | OUT.png]",
            help="A format, such as hif8, e3m4 or 'nvfp4(scale=torchao)'; with --plot the PNG to write.",
            show_default=False,
        ),
    ] = None,
    plot: Annotated[bool, typer.Option("--plot", help=f"Draw formats into a PNG; default: {DEFAULT_PLOT}.")] = False,
    plotted: Annotated[
        list[str] | None, typer.Option("--format", metavar="NAME", help="A format to plot; repeatable.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """List the number formats, show all about one, or plot some."""
    if plot:
        if as_json:
            raise ConfigError("--plot draws a PNG and --json prints: give one of them")
        _plot(Path(name) if name else DEFAULT_PLOT, plotted)
        return
    if plotted:
        raise ConfigError("--format chooses what --plot draws; for the page of a format give its name alone")
    if name is None:
        print_json(tables.format_list()) if as_json else show(Section("", tables.format_table()))
        return
    fmt = formats.get(name)
    print_json(pages.describe(fmt)) if as_json else show(*pages.page(fmt))


def _plot(out: Path, names: Sequence[str] | None) -> None:
    try:
        from aqnsim.cli import plots
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "matplotlib":
            raise
        raise ConfigError("--plot needs matplotlib: pip install 'aqnsim[plot]'") from error
    if out.suffix.lower() != ".png":
        raise ConfigError(
            f"--plot writes a file that ends in .png, got {str(out)!r}; choose formats with --format NAME"
        )
    chosen = [formats.get(name) for name in names or plots.DEFAULT]
    with progress("casting", total=len(chosen)) as step:
        curves = plots.sqnr_curves(chosen, step)
    plots.draw(curves, out)
    print(out)


@app.command("cast")
def cast_command(
    file: Annotated[Path, typer.Argument(metavar="FILE.safetensors", help="The tensors to cast.")],
    fmt: Annotated[str, typer.Option("--format", metavar="NAME", help="The format.")],
    axis: Annotated[int, typer.Option(help="The axis along which blocks run.")] = -1,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write the cast tensors there.", show_default=False)
    ] = None,
    include: Annotated[
        list[str] | None, typer.Option(metavar="GLOB", help="Cast only tensors with such a name; repeatable.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of a stochastic rounding.", show_default="0")] = None,
    as_json: AsJson = False,
) -> None:
    """Cast every float tensor of a file, and print what that changes."""
    from aqnsim.cli import tensors

    report = tensors.cast_file(file, formats.get(fmt), axis, include or ["*"], out, seed)
    print_json(report.to_dict()) if as_json else show(*report.page())


@app.command("export")
def export_command(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="A checkpoint folder of transformers.")],
    to: Annotated[str, typer.Option("--to", metavar="LIBRARY", help="compressed-tensors or torchao.")],
    fmt: Annotated[str, typer.Option("--format", metavar="NAME", help="The format.")],
    out: Annotated[Path, typer.Option(metavar="DIR", help="The folder to write; it must not exist.")],
    exclude: Annotated[
        list[str] | None,
        typer.Option(
            metavar="GLOB",
            help="Leave layers with such a name as they are; repeatable.",
            show_default="lm_head, embed_tokens, router, gate",
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Write a checkpoint whose linear layers are packed for another library."""
    from aqnsim import export
    from aqnsim.cli import exporting

    excluded = export.DEFAULT_EXCLUDE if exclude is None else exclude
    report = export.export(model, out, to=to, format=fmt, exclude=excluded, progress=progress)
    print_json(exporting.to_dict(report)) if as_json else show(*exporting.page(report))


@app.command("sites")
def sites_command(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="A checkpoint folder of transformers, a config.json, or a model_type such as llama (made small).",
        ),
    ],
    profile: Annotated[
        str | None, typer.Option(metavar="NAME", help="A profile, or path to a TOML file.", show_default=False)
    ] = None,
    length: Annotated[int, typer.Option(help="Tokens in each row of the batch.")] = 128,
    batch: Annotated[int, typer.Option(help="Rows of the batch.")] = 1,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write every op to a file.", show_default=False)
    ] = None,
    every: Annotated[bool, typer.Option("--all", help="Show every layer, not repeated ones as one.")] = False,
) -> None:
    """List the ops that a model runs, and which of them a profile emulates."""
    from aqnsim.cli import sites
    from aqnsim.emulation.coverage import survey

    chosen = None if profile is None else profiles.load(profile)
    coverage = survey(sites.load_model(model), chosen, batch=batch, length=length)
    if json_file is not None:
        with whole_file(json_file) as temporary:
            temporary.write_text(json.dumps(coverage.to_dict(), indent=2), encoding="utf-8")
    show(*sites.page(coverage, chosen, every))


@profile_app.command("list")
def profile_list_command(as_json: AsJson = False) -> None:
    """List the profiles that come with the package."""
    if as_json:
        print_json([texts.to_dict(profiles.load(name)) for name in profiles.names()])
        return
    show(Section("", tables.profile_table()))


ProfileName = Annotated[str, typer.Argument(metavar="NAME", help="Name of a profile, or path to a TOML file.")]


@profile_app.command("show")
def profile_show_command(
    name: ProfileName,
    as_json: AsJson = False,
    as_toml: Annotated[bool, typer.Option("--toml", help="Print TOML that reads back as the same profile.")] = False,
) -> None:
    """Show a profile's rules, source and fingerprint."""
    if as_json and as_toml:
        raise ConfigError("--json and --toml are two ways to print a profile: give one of them")
    profile = profiles.load(name)
    if as_json:
        print_json(texts.to_dict(profile))
    elif as_toml:
        print(texts.to_toml(profile), end="")
    else:
        show(*tables.profile_page(profile))


@profile_app.command("diff")
def profile_diff_command(
    a: Annotated[str, typer.Argument(metavar="A", help="Name of a profile, or path to a TOML file.")],
    b: Annotated[str, typer.Argument(metavar="B", help="The other.")],
    as_json: AsJson = False,
) -> None:
    """Say what two profiles do differently, kind of op by kind of op, and whether that changes a number."""
    pair = profiles.load(a), profiles.load(b)
    print_json(tables.difference_dict(*pair)) if as_json else show(*tables.difference_page(*pair))


@profile_app.command("new")
def profile_new_command(
    path: Annotated[Path, typer.Argument(metavar="NAME.toml", help="The file to write; it must not exist.")],
    start: Annotated[
        str,
        typer.Option("--from", metavar="PROFILE", help="Name of the profile to start from, or path to a TOML file."),
    ] = "bf16",
) -> None:
    """Write a profile to start from: valid as it is, with every kind and field explained in comments."""
    if path.suffix != ".toml":
        raise ConfigError(f"a profile is a file that ends in .toml, got {str(path)!r}")
    profile = profiles.load(start)
    source = {**profile.source, "start": f"profile {profile.name} ({profile.fingerprint})"}
    mine = dataclasses.replace(profile, name=path.stem, source=source)
    with whole_file(path, overwrite=False) as temporary:
        temporary.write_text(texts.commented(mine), encoding="utf-8")
    print(path)


@app.command("backends")
def backends_command() -> None:
    """List the backends and the devices that they serve."""
    show(Section("", tables.backend_table()))


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return the exit status: 0, 2 for an error that names its cause, 130 when interrupted."""
    try:
        status = app(None if argv is None else list(argv), prog_name="aqnsim", standalone_mode=False)
    except AqnsimError as error:
        print(f"aqnsim: error: {error}", file=sys.stderr)
        return 2
    except typer.TyperException as error:  # what was typed is not a command
        print(f"aqnsim: error: {error.format_message().rstrip('.')}; see aqnsim --help", file=sys.stderr)
        return 2
    return int(status or 0)
