"""The command line of the experiments: `python -m training run | list | plan | compare | plot`."""

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


def _noise(aqn: dict[str, Any]) -> str:
    """The schedule in brief, with what it is by layer."""
    if aqn["schedule"] == "none":
        return "none"
    sigma = " -> ".join(f"{value:g}" for key, value in aqn.items() if key.startswith("sigma"))
    drawn = f", {aqn['random_layers']} random layers" if aqn["random_layers"] else ""
    return f"{sigma}{', by layer' if aqn['multipliers'] or aqn['zones'] else drawn}"


if __name__ == "__main__":
    app(prog_name="python -m training")
