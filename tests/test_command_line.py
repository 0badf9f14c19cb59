"""The command line ``aqnsim``: every registered name is shown, and a wrong one is an error in one line."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import pytest

from aqnsim import backends, cli, formats, profiles


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "aqnsim.cli", *arguments], capture_output=True, text=True, check=False)


def cells(output: str) -> dict[str, list[str]]:
    """The rows of an aligned table by their first cell; cells are two spaces apart or more."""
    rows = [[cell.strip() for cell in line.split("  ") if cell.strip()] for line in output.splitlines()[2:]]
    return {row[0]: row for row in rows}


def test_formats_shows_every_format(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["formats"]) == 0
    rows = cells(capsys.readouterr().out)
    assert list(rows) == list(formats.ALL)
    # OCP MX v1.0 table 5: E4M3 reaches 448, its smallest normal is 2^-6 and its smallest subnormal 2^-9
    assert rows["mxfp8_e4m3"][1:9] == ["8.25", "fp8_e4m3", "32", "e8m0-floor", "448", "2^-6", "2^-9", "saturate"]
    assert all(row[9] == formats.ALL[name].source for name, row in rows.items())


def test_profile_list_shows_every_profile(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["profile", "list"]) == 0
    rows = cells(capsys.readouterr().out)
    assert list(rows) == profiles.names()
    assert rows["mxfp4-w4a16"][1:3] == ["mxfp4", "-"]
    assert all(profiles.load(name).fingerprint in row for name, row in rows.items())


@pytest.mark.parametrize("name", profiles.names())
def test_profile_show_tells_all_that_a_profile_holds(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["profile", "show", name]) == 0
    shown, profile = capsys.readouterr().out, profiles.load(name)
    expected = [profile.name, profile.fingerprint, profile.description, *profile.source.values(), *profile.exclude]
    for rule in profile.rules:
        spec = rule.spec
        parts = [spec.forward.input, spec.forward.weight, spec.forward.error]
        expected += [p for p in [*parts, spec.grad_input.error, spec.grad_weight.error] if p]
    assert [text for text in expected if text not in shown] == []


def test_profile_show_takes_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(
        'name = "mine"\ndescription = "d"\n[source]\nwhy = "w"\n[[rule]]\nkind = "linear"\ngrad_input.error = '
        '"absolute-gaussian(sigma=0.5)"\n'
    )
    assert cli.main(["profile", "show", str(path)]) == 0
    assert "grad_input.error = absolute-gaussian(sigma=0.5)" in capsys.readouterr().out


def test_backends_shows_which_one_serves_a_device(capsys: pytest.CaptureFixture[str]) -> None:
    backends.use("reference", "cpu")
    assert cli.main(["backends"]) == 0
    rows = cells(capsys.readouterr().out)
    assert set(rows) == set(backends.names())
    assert rows["reference"][1:3] == ["cpu", "cpu"]
    assert rows["cpu"][1:3] == ["cpu", "-"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["profile", "show", "mxfp4-w4a15"], "unknown profile 'mxfp4-w4a15' (did you mean 'mxfp4-w4a16'?)"),
        (["profile", "show", "nowhere/my.toml"], "profile 'nowhere/my.toml': no such file"),
        (["profil"], "invalid choice: 'profil'"),
        ([], "the following arguments are required: COMMAND"),
        (["profile"], "the following arguments are required: ACTION"),
        (["profile", "show"], "the following arguments are required: NAME"),
    ],
)
def test_a_mistake_is_one_error_and_status_2(arguments: list[str], message: str) -> None:
    done = run(*arguments)
    assert done.returncode == 2
    assert done.stdout == ""
    assert message in done.stderr
    assert "error: " in done.stderr
    assert "Traceback" not in done.stderr


def test_a_broken_profile_names_its_file_and_key(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "broken.toml"
    path.write_text('name = "b"\ndescription = "d"\nexlude = []\n[source]\nwhy = "w"\n')
    assert cli.main(["profile", "show", str(path)]) == 2
    message = capsys.readouterr().err
    assert str(path) in message
    assert "unknown key 'exlude' (did you mean 'exclude'?)" in message


def test_the_installed_command_is_this_one() -> None:
    (command,) = entry_points(group="console_scripts", name="aqnsim")
    assert command.load() is cli.main
