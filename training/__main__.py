"""The command line of the experiments: `python -m training --help` lists what there is."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from aqnsim._errors import AqnsimError
from training.config import Experiment, load
from training.sources import DEFAULT_PRESET, names


class _Group(TyperGroup):
    """Errors that name their cause end in one line; every other exception keeps its traceback."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except AqnsimError as error:
            typer.echo(f"error: {error}", err=True)
            raise typer.Exit(2) from error
        except KeyboardInterrupt as error:
            typer.echo("interrupted", err=True)
            raise typer.Exit(130) from error


app = typer.Typer(
    cls=_Group,
    help="Fine-tuning experiments on emulated hardware: DAPO with LoRA and AQN, with receipts.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

RunPath = Annotated[Path, typer.Argument(help="Directory of a run.", metavar="RUN")]


@app.command("run")
def run_command(
    experiment: Annotated[str, typer.Argument(help="Name of an experiment, or path to a TOML.")],
    preset: Annotated[
        str, typer.Option(help="Model, task and scale: a preset's name, or path to a TOML.")
    ] = DEFAULT_PRESET,
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="TABLE.KEY=VALUE", help="Override a setting; repeatable."),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of everything that is drawn.")] = 0,
    runs: Annotated[Path, typer.Option(help="Where runs are kept.")] = Path("runs"),
    resume: Annotated[Path | None, typer.Option(metavar="RUN", help="Continue this interrupted run.")] = None,
    processes: Annotated[
        int | None, typer.Option(min=1, help="Refuse to run in any other number of processes.")
    ] = None,
    fsdp: Annotated[bool, typer.Option("--fsdp", help="Keep weights in shards over the processes (FSDP2).")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the scale, then run a few tiny steps.")] = False,
) -> None:
    """Run an experiment; Ctrl-C leaves a run that --resume continues."""
    from training.run import run  # here, so that --help does not load torch

    run(
        experiment,
        preset=preset,
        overrides=overrides or [],
        seed=seed,
        runs=runs,
        resume=resume,
        processes=processes,
        fsdp=fsdp,
        dry_run=dry_run,
    )


@app.command("list")
def list_command(
    preset: Annotated[str, typer.Option(help="Preset to resolve with.")] = DEFAULT_PRESET,
) -> None:
    """List the experiments, with what they ask and what was claimed."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    families: dict[str, list[Experiment]] = {}
    for name in names():
        experiment = load(name, preset)
        families.setdefault(experiment.question.family, []).append(experiment)
    console = Console()
    for family, members in sorted(families.items()):
        table = Table("experiment", "question", "profile", "AQN", "claim", box=None, padding=(0, 1), expand=True)
        table.title = f"\n[bold]{escape(family)}[/bold]"
        table.columns[0].width, table.columns[2].width, table.columns[3].width = 19, 13, 14
        for experiment in members:
            published = experiment.published
            ask, claim = escape(experiment.question.ask), f"{published.score:.2f}" if published else "-"
            aqn = _noise(experiment.aqn.model_dump())
            table.add_row(experiment.id, f"[dim]{ask}[/dim]", experiment.profile.name, aqn, claim)
        console.print(table)
    console.print("Published scores are claims, never evidence; `plan` tells what speaks against each.")


@app.command("compare")
def compare_command(run_a: RunPath, run_b: RunPath) -> None:
    """Compare two finished runs: paired difference, what it can detect, what the arms differ in."""
    from rich.console import Console

    from training.compare import compare, render

    Console().print(render(compare(run_a, run_b)))


@app.command("plot")
def plot_command(
    run: RunPath,
    out: Annotated[Path | None, typer.Option(help="PNG to write; default: RUN/run.png.")] = None,
) -> None:
    """Draw a run: reward, sigma, held-out accuracy, realised error of the weights."""
    from training.plot import plot_run

    typer.echo(plot_run(run, out or run / "run.png"))


@app.command("plan")
def plan_command(
    experiment: Annotated[str, typer.Argument(help="Name of an experiment, or path to a TOML.")],
    preset: Annotated[str, typer.Option(help="Model, task and scale: a preset's name, or path to a TOML.")] = (
        DEFAULT_PRESET
    ),
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="TABLE.KEY=VALUE", help="Override a setting; repeatable."),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the run.")] = 0,
    runs: Annotated[Path, typer.Option(help="Where finished runs are looked for, to tell the time.")] = Path("runs"),
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Tell what a run would do: steps, noise, emulated sites, memory, time, what it can detect."""
    from training.plan import plan  # here, so that --help does not load torch
    from training.plan_page import as_text, page

    made = plan(experiment, preset, overrides or [], seed=seed, runs=runs)
    if as_json:
        typer.echo(as_text(made))
        return
    from rich.console import Console

    Console(highlight=False).print(page(made))


PresetOption = Annotated[
    str, typer.Option("--preset", help="Model, task and scale: a preset's name, or path to a TOML.")
]
SeedsOption = Annotated[int, typer.Option("--seeds", min=1, help="Seeds of each arm, from 0 on.")]
RunsOption = Annotated[Path, typer.Option("--runs", help="Where runs are kept.")]
JobsOption = Annotated[int, typer.Option("--jobs", min=1, help="Runs at a time.")]


@app.command("sweep")
def sweep_command(
    experiments: Annotated[
        list[str], typer.Argument(help="Names of experiments, or paths to TOMLs.", metavar="IDS...")
    ],
    seeds: SeedsOption = 3,
    preset: PresetOption = DEFAULT_PRESET,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="TABLE.KEY=VALUE", help="Override a setting; repeatable.")
    ] = None,
    runs: RunsOption = Path("runs"),
    jobs: JobsOption = 1,
) -> None:
    """Run arms with several seeds: skips what is done, continues what was cut off."""
    from training.sweep import planned, sweep

    _report_failures(sweep(planned(experiments, seeds, preset, overrides or []), runs, jobs=jobs, say=typer.echo))


def _report_failures(outcomes: Any) -> None:
    failed = [o for o in outcomes if o.state == "failed"]
    for outcome in failed:
        typer.echo(f"failed: {outcome.planned.label}: {outcome.message}", err=True)
    if failed:
        raise typer.Exit(1)


@app.command("validate")
def validate_command(
    questions: Annotated[
        list[str] | None, typer.Option("--question", help="One of the plan's questions; repeatable. Default: all.")
    ] = None,
    preset: PresetOption = DEFAULT_PRESET,
    seeds: SeedsOption = 3,
    runs: Annotated[
        list[Path] | None, typer.Option("--runs", help="Folders of runs; new ones go to the first.")
    ] = None,
    margin: Annotated[float, typer.Option(help="Differences below this share are equal.")] = 0.02,
    no_run: Annotated[bool, typer.Option("--no-run", help="Decide from the runs that are there.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would run, and for how long.")] = False,
    jobs: JobsOption = 1,
    out: Annotated[Path | None, typer.Option(help="JSON to write, and Markdown beside it.")] = None,
) -> None:
    """Run what the plan's questions need, and decide them from intervals over seeds."""
    from training.questions import QUESTIONS, question
    from training.sweep import forecast, planned, sweep

    asked = [question(name) for name in questions or QUESTIONS]
    roots = runs or [Path("runs")]
    wanted = planned([arm for q in asked for arm in q.arms], seeds, preset)
    if dry_run:
        typer.echo(forecast(wanted, roots[0]))
        return
    if not no_run:
        _report_failures(sweep(wanted, roots[0], jobs=jobs, say=typer.echo))
    from training.validate import validate, write

    found = validate(asked, preset, roots, seeds=seeds, margin=margin)
    write(found, out or roots[0] / f"validate-{Path(preset).stem}.json")
    typer.echo(found.to_markdown())


@app.command("power")
def power_command(
    runs: Annotated[
        list[Path] | None, typer.Option("--from", help="Folders of runs of two arms over seeds, to measure the spread.")
    ] = None,
    treatment: Annotated[str, typer.Option(help="Of those runs: the arm.")] = "e12",
    control: Annotated[str, typer.Option(help="Of those runs: its control.")] = "e6a-lora-mxfp4",
    preset: PresetOption = DEFAULT_PRESET,
    seed_sd: Annotated[
        float | None, typer.Option(help="Standard deviation of the difference from seed to seed, as a share.")
    ] = None,
    discordance: Annotated[float, typer.Option(help="Share of problems that exactly one arm solves.")] = 0.2,
    problems: Annotated[int, typer.Option(min=1, help="Held-out problems.")] = 200,
    effect: Annotated[float, typer.Option(help="The difference that matters, as a share.")] = 0.02,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Say what differences so many seeds and problems detect, and how many seeds one takes."""
    import json

    from training.power import measured_spread, table_of

    if runs:
        seed_sd, discordance, problems = measured_spread(runs, treatment, control, preset)
    found = table_of(seed_sd, discordance, problems, effect)
    typer.echo(json.dumps(found.to_dict(), indent=2) if as_json else str(found))


@app.command("archive")
def archive_command(
    runs: Annotated[list[Path], typer.Argument(help="Directories of finished runs.", metavar="RUNS...")],
    out: Annotated[Path, typer.Option(help="Folder to copy their records into.")],
) -> None:
    """Copy what analyses need of finished runs: no weights, no checkpoints, no texts."""
    from training.archive import archive

    for run in runs:
        typer.echo(archive(run, out))


@app.command("invalidate")
def invalidate_command(
    run: RunPath,
    reason: Annotated[str, typer.Option(help="What was found to be wrong.")],
    since: Annotated[str, typer.Option(help="Version or revision in which it was found.")],
) -> None:
    """Take a run out of every analysis and table; it stays where it is."""
    from training.arms import mark_invalid

    mark_invalid(run, reason, since)


@app.command("traps")
def traps_command(
    out: Annotated[Path | None, typer.Option(help="Write the page there instead of printing it.")] = None,
) -> None:
    """Re-create the false findings of earlier work, and show what is said here to each."""
    from training.rundir import replace
    from training.traps import page

    text = page()
    if out is None:
        typer.echo(text)
    else:
        replace(out, text.encode())
        typer.echo(out)


@app.command("report")
def report_command(
    runs: Annotated[list[Path], typer.Argument(help="Directories of runs, or folders that hold some.", metavar="RUNS")],
    out: Annotated[Path, typer.Option(help="HTML to write: one file that loads nothing.")] = Path("report.html"),
    validation: Annotated[
        Path | None, typer.Option(help="What `validate` wrote; default: validate.json beside the runs.")
    ] = None,
    picture: Annotated[
        Path | None, typer.Option(help="PNG of the page's beginning to write, too; needs a Chromium.")
    ] = None,
) -> None:
    """Report on runs: accuracy over seeds, schedules, receipts, differences of arms, alarms, caveats."""
    from training.report import write_report

    typer.echo(write_report(runs, out, validation))
    if picture is not None:
        from training.report.browser import open_page

        typer.echo(open_page(out, picture, height=1900).picture)


@app.command("robustness")
def robustness_command(
    adapters: Annotated[
        list[Path],
        typer.Argument(help="Directories of finished runs, or checkpoints in runs.", metavar="RUN_OR_CHECKPOINT"),
    ],
    profiles: Annotated[
        str, typer.Option(help="Comma-separated: clean, trained (what was trained with), names or files.")
    ] = "clean,trained",
    noise: Annotated[
        str, typer.Option(help="Comma-separated sigmas of relative Gaussian noise on linear layers.")
    ] = "0,0.01,0.02,0.03,0.04,0.05,0.06,0.07,0.08,0.09,0.1",
    draws: Annotated[int, typer.Option(min=1, help="Draws of the noise, each with a seed of its own.")] = 5,
    form: Annotated[str, typer.Option(help="Adapters: unmerged, merged (before the cast) or both.")] = "both",
    out: Annotated[Path | None, typer.Option(help="Folder for JSON and picture; default: the first run.")] = None,
) -> None:
    """Evaluate adapters on other hardware and under noise; points that are done are not made again."""
    from training.robustness import command

    command(adapters, profiles.split(","), noise.split(","), draws, form, out)


def _noise(aqn: dict[str, Any]) -> str:
    """The schedule in brief, with what it is by layer."""
    if aqn["schedule"] == "none":
        return "none"
    sigma = " -> ".join(f"{value:g}" for key, value in aqn.items() if key.startswith("sigma"))
    drawn = f", {aqn['random_layers']} random layers" if aqn["random_layers"] else ""
    return f"{sigma}{', by layer' if aqn['multipliers'] or aqn['zones'] else drawn}"


if __name__ == "__main__":
    app(prog_name="python -m training")
