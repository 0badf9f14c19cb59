"""The command line of the experiments: `python -m training run | list | compare | plot | report | robustness`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from aqnsim._errors import AqnsimError
from training.config import load
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
    )


@app.command("list")
def list_command(
    preset: Annotated[str, typer.Option(help="Preset to resolve with.")] = DEFAULT_PRESET,
) -> None:
    """List the experiments, with what they ask and what was claimed."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(
        "experiment",
        "question",
        show_lines=True,
        caption="Published scores are claims to compare with, never evidence.",
    )
    for name in names():
        experiment = load(name, preset)
        question, published = experiment.question, experiment.published
        setup = [
            f"[bold]{name}[/bold]",
            f"profile {experiment.profile.name}",
            f"AQN {_noise(experiment.aqn.model_dump())}",
            f"control {question.control_id or 'none'}",
        ]
        claim = f"published {published.score}: {published.caveat}" if published else "unpublished"
        table.add_row("\n".join(setup), f"{escape(question.ask)}\n[dim]{escape(claim)}[/dim]")
    Console().print(table)


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


def _noise(aqn: dict[str, object]) -> str:
    """The schedule with its sigma and stages, and what it acts on."""
    if aqn["schedule"] == "none":
        return "none"
    sigma = " -> ".join(str(value) for key, value in aqn.items() if key.startswith("sigma"))
    stages = f", {aqn['stages']} stages" if "stages" in aqn else ""
    return f"{aqn['schedule']}\n  sigma {sigma}{stages}\n  on {aqn['targets']}"


if __name__ == "__main__":
    app(prog_name="python -m training")
