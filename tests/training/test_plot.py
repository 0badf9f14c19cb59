"""The picture of a run: it is drawn from whatever a run has recorded so far."""

from __future__ import annotations

from pathlib import Path

import fake_runs
import matplotlib.image
import numpy as np
import pytest
from fake_runs import WriteRun, metrics_row, weight_receipt
from matplotlib.figure import Figure

from aqnsim.receipts import Receipt
from training.plot import PlotError, _plot_accuracy, _plot_sigma, _plot_weights, plot_run
from training.records import EVALUATION, FINAL_RECEIPTS, METRICS, PROBLEMS
from training.summary import RunSummary

write_run = fake_runs.write_run


def shape_of(path: Path) -> tuple[int, ...]:
    image = matplotlib.image.imread(path)
    assert np.ptp(image[..., :3]) > 0.5  # something is drawn on it
    return image.shape[:2]


def test_a_finished_run_gives_a_picture(write_run: WriteRun, tmp_path: Path) -> None:
    run = write_run(correct=[i % 3 == 0 for i in range(60)], clean=[i % 2 == 0 for i in range(60)])
    out = plot_run(run.path, tmp_path / "new" / "run.png")
    assert shape_of(out) == (975, 1430)
    assert out.stat().st_size > 40_000


@pytest.mark.parametrize("missing", [PROBLEMS, EVALUATION, FINAL_RECEIPTS])
def test_an_unfinished_run_can_be_plotted(write_run: WriteRun, tmp_path: Path, missing: str) -> None:
    run = write_run(state="interrupted")
    (run.path / missing).unlink()
    assert shape_of(plot_run(run.path, tmp_path / "run.png"))


def test_values_that_are_not_finite_leave_a_gap(write_run: WriteRun, tmp_path: Path) -> None:
    run = write_run(steps=2)
    nan = float("nan")
    row = metrics_row(3).model_copy(update={"accuracy": nan, "sigma_realised": None, "reward": nan})
    run.append_jsonl(METRICS, row)
    assert shape_of(plot_run(run.path, tmp_path / "run.png"))


def test_a_run_without_steps_is_refused(write_run: WriteRun, tmp_path: Path) -> None:
    with pytest.raises(PlotError, match="recorded no step"):
        plot_run(write_run(steps=0).path, tmp_path / "run.png")
    assert not (tmp_path / "run.png").exists()


def test_sigma_panel_has_the_requested_and_the_realised_values() -> None:
    axes = Figure().subplots()
    rows = [metrics_row(step) for step in range(1, 9)]
    _plot_sigma(axes, rows)
    drawn = {line.get_label(): line.get_ydata() for line in axes.get_lines()}
    assert list(drawn["requested"]) == [row.sigma_requested for row in rows]
    assert list(drawn["realised"]) == [row.sigma_realised for row in rows]


def test_weights_panel_has_one_line_for_each_role() -> None:
    axes = Figure().subplots()
    _plot_weights(axes, [Receipt(**weight_receipt(i, role)) for i in range(3) for role in ("a", "b")])
    lines = axes.get_lines()
    assert [line.get_label() for line in lines] == ["a", "b"]
    assert list(lines[0].get_ydata()) == pytest.approx([18.5, 18.6, 18.7])


def test_scores_start_from_the_first_evaluation_and_end_with_the_final_one(
    write_run: WriteRun,
) -> None:
    scores = RunSummary.read(write_run(correct=[True] * 10, steps=5).path).scores
    assert list(scores) == [0, 5]
    assert scores[0]["emulated"].accuracy == 0.5
    assert scores[5]["emulated"].accuracy == 1.0
    axes = Figure().subplots()
    _plot_accuracy(axes, scores)
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["step 0", "step 5"]
