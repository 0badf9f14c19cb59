"""One self-contained HTML page about some runs: what came out, whether it may be believed, and what was claimed."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from aqnsim._errors import AqnsimError
from training import curves
from training.plot import PALETTE
from training.report import content, figures
from training.rundir import replace
from training.summary import arms as arms_of
from training.summary import read_all

HERE = Path(__file__).parent
VALIDATION = "validate.json"


class ReportError(AqnsimError):
    """A report that cannot be made."""


def write_report(paths: Sequence[Path], out: Path, validation: Path | None = None) -> Path:
    """Write a report on runs, finished or not.

    The page loads nothing from anywhere: style and figures (SVG) are in it, and it has no script.

    Args:
        paths: run directories, or folders that hold some.
        out: the HTML to write; its folder is made if need be.
        validation: what `python -m training validate` wrote; by default the `validate.json` of one of the folders.

    Returns:
        `out`.

    Raises:
        RunDirectoryError: a folder is neither a run nor holds one, or a run is damaged.
        ReportError: the validation is not JSON.
    """
    arms = arms_of(read_all(paths))
    runs = [run for arm in arms for run in arm.runs]
    maps = content.heat_maps(arms)
    same, differing = content.environment(runs)
    points = {run.label: run.robustness for run in runs if run.robustness and not run.invalid}
    counted = [arm for arm in arms if arm.counted]
    page = _template().render(
        arms=arms,
        runs=runs,
        setups=content.setups(arms),
        palette=PALETTE,
        accuracy=figures.accuracy(arms) if counted else None,
        accuracy_rows=content.accuracy_rows(arms),
        learning=figures.learning(arms) if any(run.metrics for run in runs) else None,
        schedule=figures.schedules(arms),
        schedule_rows=content.schedule_rows(arms),
        maps=maps[: content.MAX_MAPS],
        maps_left_out=max(0, len(maps) - content.MAX_MAPS),
        receipts=[(arm.label, run, rows) for arm in arms for run in arm.runs if (rows := content.receipt_rows(run))],
        pairs=content.pairs(arms),
        validation=_validation(paths, validation),
        alarms=content.alarms(arms),
        same=same,
        differing=differing,
        caveats=content.caveats(arms),
        published=[(arm.label, arm.runs[0].directory.experiment.published) for arm in arms],
        robustness=figures.robustness(points) if points else None,
        robustness_rows=curves.rows(points),
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    replace(out, page.encode())
    return out


def _validation(paths: Sequence[Path], given: Path | None) -> Any:
    """What `validate` decided; None where it has not been run."""
    beside = (folder / VALIDATION for path in paths for folder in (path, path.parent))
    path = given or next((found for found in beside if found.exists()), None)
    if path is None:
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise ReportError(f"{path}: expected the JSON that `python -m training validate` writes: {error}") from error


def _template() -> Any:
    environment = Environment(
        loader=FileSystemLoader(HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.tests["table"] = lambda value: (
        isinstance(value, list) and bool(value) and all(isinstance(row, dict) for row in value)
    )
    return environment.get_template("report.html.j2")
