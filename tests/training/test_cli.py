"""The command line: one clear line for what a user can mend, a traceback for what is a bug."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import fake_runs
import pytest
from fake_runs import WriteRun
from typer.testing import CliRunner

from aqnsim._errors import ConfigError
from training.__main__ import app
from training.sources import names

write_run = fake_runs.write_run

runner = CliRunner()


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """How `training.run.run` was called, in place of a run."""
    made: list[dict[str, Any]] = []
    module = ModuleType("training.run")
    module.run = lambda experiment, **options: made.append({"experiment": experiment, **options})  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "training.run", module)
    return made


def test_run_hands_over_its_arguments(calls: list[dict[str, Any]]) -> None:
    arguments = ["run", "e12", "--preset", "smoke", "--set", "lora.rank=8", "--set", "aqn.stages=4"]
    scale = ["--processes", "2", "--fsdp", "--dry-run"]
    result = runner.invoke(app, [*arguments, "--seed", "3", "--runs", "out", "--resume", "out/x", *scale])
    assert result.exit_code == 0, result.output
    assert calls == [
        {
            "experiment": "e12",
            "preset": "smoke",
            "overrides": ["lora.rank=8", "aqn.stages=4"],
            "seed": 3,
            "runs": Path("out"),
            "resume": Path("out/x"),
            "processes": 2,
            "fsdp": True,
            "dry_run": True,
        }
    ]


def test_run_has_defaults(calls: list[dict[str, Any]]) -> None:
    assert runner.invoke(app, ["run", "e12"]).exit_code == 0
    assert calls == [
        {
            "experiment": "e12",
            "preset": "embedded",
            "overrides": [],
            "seed": 0,
            "runs": Path("runs"),
            "resume": None,
            "processes": None,
            "fsdp": False,
            "dry_run": False,
        }
    ]


def failing(error: BaseException) -> ModuleType:
    def run(*_: object, **__: object) -> None:
        raise error

    module = ModuleType("training.run")
    module.run = run  # type: ignore[attr-defined]
    return module


def test_our_errors_are_one_line_and_exit_code_2(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "training.run", failing(ConfigError("sigma = -1: refused")))
    result = runner.invoke(app, ["run", "e12"])
    assert (result.exit_code, result.stderr) == (2, "error: sigma = -1: refused\n")


def test_other_errors_keep_their_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "training.run", failing(ZeroDivisionError("a bug")))
    assert isinstance(runner.invoke(app, ["run", "e12"]).exception, ZeroDivisionError)


def test_ctrl_c_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "training.run", failing(KeyboardInterrupt()))
    result = runner.invoke(app, ["run", "e12"])
    assert (result.exit_code, result.stderr) == (130, "interrupted\n")


def test_list_shows_every_experiment_with_its_claim() -> None:
    result = runner.invoke(app, ["list"])
    assert result.exit_code == 0, result.output
    for name in names():
        assert name in result.stdout
    shown = " ".join(result.stdout.replace("│", " ").split())
    for part in ("72.48", "0.05 -> 0.0005", "4-bit weights, LoRA", "claims, never evidence"):
        assert part in shown


def test_compare_prints_the_verdict(write_run: WriteRun) -> None:
    a, b = write_run("e12"), write_run("e6a-lora-mxfp4")
    result = runner.invoke(app, ["compare", str(a.path), str(b.path)])
    assert result.exit_code == 0, result.output
    assert "no finding" in result.stdout


def test_compare_refuses_in_one_line(write_run: WriteRun, tmp_path: Path) -> None:
    result = runner.invoke(app, ["compare", str(write_run("e12").path), str(tmp_path / "nothing")])
    assert result.exit_code == 2
    assert result.stderr == f"error: {tmp_path / 'nothing'} has no config.json\n"


def test_plot_writes_beside_the_run_unless_told(write_run: WriteRun, tmp_path: Path) -> None:
    run = write_run()
    assert runner.invoke(app, ["plot", str(run.path)]).exit_code == 0
    assert (run.path / "run.png").exists()
    out = tmp_path / "picture.png"
    assert str(out) in runner.invoke(app, ["plot", str(run.path), "--out", str(out)]).stdout
    assert out.exists()


def test_help_and_errors_load_neither_torch_nor_matplotlib() -> None:
    code = (
        "import sys, training.__main__ as cli\n"
        "from typer.testing import CliRunner\n"
        "assert 'compare' in CliRunner().invoke(cli.app, ['--help']).stdout\n"
        "print(sorted({'torch', 'scipy', 'matplotlib'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
