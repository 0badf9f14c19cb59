"""``aqnsim aqn``: what is printed and drawn is what the schedule does, and a wrong request is an error in one line."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure

from aqnsim import aqn, cli
from aqnsim.aqn import KStage
from aqnsim.cli import noise_plot

Capture = pytest.CaptureFixture[str]

K10 = KStage(sigma_start=0.05, sigma_end=0.0005, stages=10)


def printed(capsys: Capture, *arguments: str) -> str:
    assert cli.main(["aqn", *arguments]) == 0
    return capsys.readouterr().out


def table_of(page: str) -> list[list[str]]:
    """The cells of a page's table, without its header."""
    _, table, *_ = page.split("\n\n")
    return [[cell.strip() for cell in line.split("  ") if cell.strip()] for line in table.splitlines()[2:]]


def test_presets_are_listed_with_their_sources(capsys: Capture) -> None:
    listed = printed(capsys)
    for name, preset in aqn.PRESETS.items():
        assert f"{name} " in listed
        assert preset.schedule.text in listed
        assert aqn.SOURCES[name] in listed
    rows = json.loads(printed(capsys, "--json"))
    assert [row["name"] for row in rows] == list(aqn.PRESETS)


def test_a_preset_s_run_is_shown_by_intervals(capsys: Capture) -> None:
    page = printed(capsys, "qerl_default", "--steps", "29")
    assert page.startswith(f"{K10.text}\npreset qerl_default: {aqn.SOURCES['qerl_default']}\n")
    rows = table_of(page)
    assert rows[:2] == [["0 to 2", "0", "-"], ["3 to 5", "0.05", "95.3%"]]
    # at a bf16 weight of 1 the midpoints to the neighbours are 2^-8 above and 2^-9 below
    share = (math.erfc(2**-8 / 0.0028117 / math.sqrt(2)) + math.erfc(2**-9 / 0.0028117 / math.sqrt(2))) / 2
    assert rows[6] == ["18 to 20", "0.002812", f"{share:.1%}"]
    assert rows[-1] == ["27 to 28", "0.0005", "0.0%"]
    assert "never acts" not in page


def test_a_schedule_is_shown_with_what_a_short_run_leaves_out(capsys: Capture) -> None:
    page = printed(capsys, "--schedule", K10.text, "--steps", "5")
    assert [row[:2] for row in table_of(page)][:2] == [["0", "0"], ["1", "0.02812"]]
    assert page.endswith("never acts in 5 steps: sigma 0.05, 0.01581, 0.005, 0.001581, 0.0005\n")


def test_json_holds_the_same_run(capsys: Capture) -> None:
    report = json.loads(printed(capsys, "--schedule", K10.text, "--steps", "5", "--json"))
    assert [(i["first"], i["last"], i["sigma"]) for i in report["intervals"]] == K10.intervals(5)
    assert report["skipped"] == list(K10.skipped(5))
    assert (report["name"], report["source"], report["steps"]) == (None, None, 5)
    assert aqn.parse(report["schedule"]) == K10


def test_every_kind_of_schedule_can_be_asked_for(capsys: Capture) -> None:
    inner = "constant(value=0.02)"
    texts = [
        inner,
        K10.text,
        "k-stage-paper(sigma_start=0.05, sigma_end=0.0005, stages=10)",
        "epoch-aware(sigma_start=0.05, sigma_end=0.0005, stages_per_epoch=5, epochs=2)",
        "custom(points=((0, 0.0), (0.5, 0.02)))",
        f"scaled(schedule={inner}, factors=((0, 1.0), (0.5, 0.5)))",
    ]
    assert {type(aqn.parse(text)) for text in texts} == set(aqn.SCHEDULES.values())
    for text in texts:
        assert "0.02" in printed(capsys, "--schedule", text, "--steps", "24"), text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["qerl"], "--steps is missing"),
        (["qerl", "--steps", "9"], "unknown AQN preset 'qerl' (did you mean 'qerl_"),
        (["--steps", "9"], "give a preset or a --schedule"),
        (["--out", "a.png"], "give a preset or a --schedule"),
        (["qerl_paper", "--schedule", "constant(value=0.1)", "--steps", "9"], "leave out either it or --schedule"),
        (["--schedule", "constant", "--steps", "9"], "schedule 'constant': expected kind(field=value, ...)"),
        (["--schedule", "linear(start=1)", "--steps", "9"], "unknown schedule 'linear'"),
        (["qerl_paper", "--steps", "1"], "is 0 at every one of 1 steps"),
        (["qerl_paper", "--steps", "0"], "Invalid value for '--steps'"),
        (["qerl_paper", "--steps", "9", "--out", "a.jpg"], "--out writes a file that ends in .png, got 'a.jpg'"),
        (["qerl_paper", "--steps", "9", "--out", "none/a.png"], "cannot write none/a.png: No such file or directory"),
    ],
)
def test_a_mistake_is_one_error_and_status_2(
    arguments: list[str], message: str, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["aqn", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("aqnsim: error: ")
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_the_command_loads_neither_torch_nor_matplotlib() -> None:
    code = "from aqnsim.cli import main; main(['aqn', 'qerl_paper', '--steps', '9']); import sys; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(done.stdout.splitlines()[-1].split())
    assert "aqnsim.cli.noise" in loaded
    assert loaded & {"torch", "numpy", "matplotlib", "safetensors"} == set()


# ---- the picture ----------------------------------------------------------------------------------------------------


def lines_of(figure: Figure) -> list[tuple[float, float, float]]:
    found = []
    for collection in figure.axes[0].collections:
        if isinstance(collection, LineCollection):
            (start, end), *rest = collection.get_segments()
            assert not rest
            assert start[1] == end[1]
            found.append((float(start[0]), float(end[0]), float(start[1])))
    return found


def test_each_interval_with_noise_is_a_line_and_each_without_is_grey() -> None:
    schedule = aqn.EpochAware(0.05, 0.0005, stages_per_epoch=5, epochs=2)
    figure = noise_plot.picture(schedule, 58)
    intervals = schedule.intervals(58)
    assert lines_of(figure) == [(i.first, i.last + 1, i.sigma) for i in intervals if i.sigma]
    grey = [(p.get_x(), p.get_x() + p.get_width()) for p in figure.axes[0].patches]
    assert grey == [(i.first, i.last + 1) for i in intervals if not i.sigma]
    assert len(grey) == 2


def test_the_picture_says_what_survives_and_which_schedule_it_is() -> None:
    axes = noise_plot.picture(K10, 29).axes[0]
    shown = [text.get_text() for text in axes.texts]
    assert shown == ["95%", "92%", "85%", "74%", "57%", "33%", "12%", "1%", "0%"]
    assert axes.get_title(loc="left") == K10.text
    assert (axes.get_xlim(), axes.get_yscale()) == ((0, 29), "log")


def test_the_command_writes_a_png_and_says_so(tmp_path: Path, capsys: Capture) -> None:
    out = tmp_path / "aqn.png"
    assert printed(capsys, "qerl_default", "--steps", "29", "--out", str(out)).endswith(f"written: {out}\n")
    image = matplotlib.image.imread(out)
    assert image.shape[:2] == (noise_plot.HEIGHT * noise_plot.DPI, noise_plot.WIDTH * noise_plot.DPI)
    assert np.ptp(image[..., :3]) > 0.9  # something is drawn on it
    assert list(tmp_path.iterdir()) == [out]


def test_a_plot_without_matplotlib_says_what_to_install(
    tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "aqnsim.cli.noise_plot", raising=False)
    monkeypatch.delattr(cli, "noise_plot", raising=False)
    for name in [n for n in sys.modules if n.partition(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert cli.main(["aqn", "qerl_paper", "--steps", "9", "--out", str(tmp_path / "a.png")]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "--out needs matplotlib: pip install 'aqnsim[plot]'" in captured.err
