"""``aqnsim aqn``: what a schedule of adaptive quantization noise does in a run of so many steps."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from aqnsim import aqn
from aqnsim._errors import ConfigError
from aqnsim.cli.output import Section, Table, print_json, show

DTYPE, WEIGHT = "bf16", 1.0
"""The stored weight for which it is told what survives: norms are made with ones, and most are stored in bf16."""

SURVIVES = f"survives in {DTYPE}"


def aqn_command(
    name: Annotated[str | None, typer.Argument(metavar="[PRESET]", help="A preset.", show_default=False)] = None,
    schedule: Annotated[
        str | None,
        typer.Option(
            metavar="TEXT",
            help="A schedule, such as 'k-stage(sigma_start=0.01, sigma_end=0.0001, stages=10)'.",
            show_default=False,
        ),
    ] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Steps of the run.", show_default=False)] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE.png", help="Draw the schedule there.", show_default=False)
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List the presets of AQN, or show sigma over a run: by steps, and what of it a bf16 weight of 1 could hold."""
    if name is None and schedule is None:
        if steps is not None or out is not None:
            raise ConfigError("give a preset or a --schedule to show; without them, the presets are listed")
        print_json(preset_list()) if as_json else show(Section("", preset_table()))
        return
    if name is not None and schedule is not None:
        raise ConfigError(f"a preset ({name}) has a schedule: leave out either it or --schedule")
    if steps is None:
        raise ConfigError("--steps is missing: how long the stages are depends on the length of the run")
    chosen = aqn.parse(schedule) if schedule is not None else aqn.preset(str(name)).schedule
    chosen.check(steps)
    if out is not None:
        _plot(chosen, steps, out)
    report = {"name": name, "source": aqn.SOURCES.get(str(name)), **describe(chosen, steps)}
    print_json(report) if as_json else show(*page(report, out))


def _plot(schedule: aqn.Schedule, steps: int, out: Path) -> None:
    if out.suffix.lower() != ".png":
        raise ConfigError(f"--out writes a file that ends in .png, got {str(out)!r}")
    try:
        from aqnsim.cli import noise_plot
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "matplotlib":
            raise
        raise ConfigError("--out needs matplotlib: pip install 'aqnsim[plot]'") from error
    noise_plot.draw(schedule, steps, out)


def preset_list() -> list[dict[str, str]]:
    """Every preset with its schedule as text and its source."""
    return [
        {"name": name, "schedule": preset.schedule.text, "source": aqn.SOURCES[name]}
        for name, preset in aqn.PRESETS.items()
    ]


def preset_table() -> Table:
    """:func:`preset_list` as a table."""
    rows = preset_list()
    return [tuple(rows[0]), *(tuple(row.values()) for row in rows)]


def describe(schedule: aqn.Schedule, steps: int) -> dict[str, Any]:
    """The stretches of equal sigma of a run, what an addition in place would keep of them, and what never acts."""
    return {
        "schedule": schedule.text,
        "steps": steps,
        "intervals": [
            {"first": first, "last": last, "sigma": sigma, "survives": aqn.survives(sigma, [WEIGHT], DTYPE)}
            for first, last, sigma in schedule.intervals(steps)
        ],
        "skipped": list(schedule.skipped(steps)),
    }


def page(report: dict[str, Any], out: Path | None) -> list[Section]:
    """A description as a page: the schedule, its intervals, what is left out of it."""
    rows: Table = [("steps", "sigma", SURVIVES)]
    for i in report["intervals"]:
        share = f"{i['survives']:.1%}" if i["sigma"] else "-"
        reach = str(i["first"]) if i["first"] == i["last"] else f"{i['first']} to {i['last']}"
        rows.append((reach, f"{i['sigma']:.4g}", share))
    sections = [
        Section(report["schedule"], f"preset {report['name']}: {report['source']}" if report["name"] else "no preset"),
        Section("", rows),
        Section(
            "", f"{SURVIVES}: share of weights of {WEIGHT:g} that change where the noise is added to them in place"
        ),
    ]
    if report["skipped"]:
        left_out = ", ".join(f"{sigma:.4g}" for sigma in report["skipped"])
        sections.append(Section("", f"never acts in {report['steps']} steps: sigma {left_out}"))
    if out is not None:
        sections.append(Section("", f"written: {out}"))
    return sections
