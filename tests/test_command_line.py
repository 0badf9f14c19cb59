"""The command line ``aqnsim``: every registered name is shown, and a wrong one is an error in one line."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import aqnsim
from aqnsim import ConfigError, backends, cli, formats, profiles
from aqnsim.cli import output, pages, tables, tensors
from aqnsim.formats import BlockFormat, Format
from aqnsim.profiles.texts import flat, to_dict, to_toml

Capture = pytest.CaptureFixture[str]

ELEMENTS = [f for f in formats.ALL.values() if isinstance(f, Format)]
BLOCKS = [f for f in formats.ALL.values() if isinstance(f, BlockFormat)]
SPELT = [
    "e3m4",
    "e5m10",
    "e8m22",
    "e4m3fnuz",
    "mxfp4(rounding=stochastic-8)",
    "nvfp4(scale=torchao)",
    "mxfp8_e5m2(block=16x16)",
]


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "aqnsim.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | environment)


def rows_of(text: str) -> list[dict[str, str]]:
    """The rows of an aligned table by its header: columns begin where the rule's dashes do."""
    header, rule, *lines = text.splitlines()
    starts = [i for i, c in enumerate(rule) if c == "-" and (i == 0 or rule[i - 1] == " ")]
    cuts = [slice(a, b) for a, b in zip(starts, [*starts[1:], None], strict=True)]
    return [{header[c].strip(): line[c].strip() for c in cuts} for line in lines]


def cells(text: str) -> dict[str, dict[str, str]]:
    """The rows of an aligned table by their first cell."""
    return {next(iter(row.values())): row for row in rows_of(text)}


def sections(page: str) -> dict[str, str]:
    """The parts of a page by the first word of their heading; of two, the last."""
    parts = [part.partition("\n") for part in page.rstrip("\n").split("\n\n")]
    return {title.split()[0].rstrip(":"): body for title, _, body in parts}


def value(text: str) -> float:
    """What a page spells, such as ``-1.5*2^-17``."""
    factor, star, power = text.rpartition("*")
    if "^" not in text:
        return float(text)
    sign = -1.0 if not star and text.startswith("-") else 1.0
    return float(factor or sign) * 2.0 ** int(power.partition("^")[2])


def data(text: str) -> Any:
    """JSON, strictly: NaN and Infinity are no JSON."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"not JSON: {constant}")

    return json.loads(text, parse_constant=refuse)


def same(a: float, b: float) -> bool:
    return a == b and math.copysign(1, a) == math.copysign(1, b) if not math.isnan(a) else math.isnan(b)


# ---- formats --------------------------------------------------------------------------------------------------------


def test_formats_shows_every_format(capsys: Capture) -> None:
    assert cli.main(["formats"]) == 0
    rows = cells(capsys.readouterr().out)
    assert list(rows) == list(formats.ALL)
    # OCP MX v1.0 table 5: E4M3 reaches 448, its smallest normal is 2^-6 and its smallest subnormal 2^-9
    shown = [
        "bits",
        "element",
        "block",
        "scale",
        "max",
        "min normal",
        "min subnormal",
        "rounding",
        "overflow",
        "verified",
    ]
    expected = ["8.25", "fp8_e4m3", "32", "e8m0 floor", "448", "2^-6", "2^-9", "nearest-even", "saturate", "yes"]
    assert [rows["mxfp8_e4m3"][c] for c in shown] == expected
    assert [rows[n]["block"] for n in ("hif8", "fp8_e4m3_128x128", "int8_token")] == ["-", "128x128", "axis"]
    assert [rows[n]["scale"] for n in ("hif8", "nvfp4", "int8_token")] == ["-", "fp8_e4m3 te", "fp32 amax"]
    for name, row in rows.items():
        assert row["source"] == formats.ALL[name].source
        assert row["verified"] == ("no" if formats.ALL[name].unverified else "yes")


def test_formats_as_json_holds_the_same_rows(capsys: Capture) -> None:
    assert cli.main(["formats", "--json"]) == 0
    rows = data(capsys.readouterr().out)
    assert [row["name"] for row in rows] == list(formats.ALL)
    assert [tuple(row) for row in rows] == [tables.format_table()[0]] * len(rows)
    assert [row["max"] for row in rows] == [formats.element_of(f).max for f in formats.ALL.values()]


@pytest.mark.parametrize("fmt", ELEMENTS, ids=str)
def test_an_element_formats_page_shows_its_fields_and_its_range(fmt: Format, capsys: Capture) -> None:
    assert cli.main(["formats", str(fmt)]) == 0
    page = sections(capsys.readouterr().out)
    assert page["format"].splitlines()[0] == f"source: {fmt.source}"
    assert (f"unverified: {fmt.unverified}" in page["format"].splitlines()) == bool(fmt.unverified)
    fields = cells(page["fields"])
    assert list(fields) == list(Format.__dataclass_fields__)
    assert all(row["meaning"] for row in fields.values())
    assert fields["rounding"]["value"] == fmt.rounding
    ranges = cells(page["ranges"])
    for name in ("max", "min", "min_normal", "min_subnormal", "eps"):
        assert value(ranges[name]["value"].split(" = ")[0]) == getattr(fmt, name)
    assert [ranges[n]["value"] for n in ("codes", "has_nan")] == [str(fmt.codes), str(fmt.has_nan).lower()]


@pytest.mark.parametrize("fmt", [f for f in ELEMENTS if f.bits <= 8], ids=str)
def test_a_narrow_formats_page_shows_every_code(fmt: Format, capsys: Capture) -> None:
    assert cli.main(["formats", str(fmt)]) == 0
    rows = rows_of(sections(capsys.readouterr().out)["codes"])
    shown = {int(row["code"], 16) + int(c): value(v) for row in rows for c, v in row.items() if c != "code"}
    assert list(shown) == list(range(fmt.codes))
    assert [code for code, v in shown.items() if not same(v, fmt.decode(code))] == []


@pytest.mark.parametrize("fmt", [f for f in ELEMENTS if f.bits > 8], ids=str)
def test_a_wide_formats_page_shows_the_kinds_of_its_codes(fmt: Format, capsys: Capture) -> None:
    assert cli.main(["formats", str(fmt)]) == 0
    rows = rows_of(sections(capsys.readouterr().out)["codes"])
    ends = [(int(row["first"], 16), int(row["last"], 16)) for row in rows]
    assert [a for a, _ in ends] == [0, *(b + 1 for _, b in ends[:-1])]  # no code is left out
    assert ends[-1][1] == fmt.codes - 1
    assert [int(row["codes"]) for row in rows] == [b - a + 1 for a, b in ends]
    for row, (first, last) in zip(rows, ends, strict=True):
        values = [value(v) for v in row["values"].split() if v != "..."]
        assert same(values[0], fmt.decode(first))
        assert same(values[-1], fmt.decode(last))
    expected = ["zero", "subnormal", "normal", "Inf", "NaN"]
    negative = [k if k == "NaN" else f"negative {k}" for k in expected]
    assert [row["kind"] for row in rows] == expected + negative


@pytest.mark.parametrize("fmt", [f for f in ELEMENTS if f.bits <= 16], ids=str)
def test_the_number_line_holds_every_positive_number(fmt: Format) -> None:
    numbers = [b.value(i) for b in pages.binades(fmt) for i in range(b.values)]
    assert numbers == [v for v in fmt.values() if v > 0]


def test_the_number_line_of_hif8_tapers(capsys: Capture) -> None:
    assert cli.main(["formats", "hif8"]) == 0
    lines = rows_of(sections(capsys.readouterr().out)["number"])
    assert [row["binade"] for row in lines] == [f"2^{e}" for e in range(-22, 16)]
    # arXiv 2409.16626: 3 bits up to exponents of 3, then 2 up to 7, 1 up to 15, and 7 powers of two below
    assert [int(row["mantissa bits"][0]) for row in lines] == [0] * 7 + [1] * 8 + [2] * 4 + [3] * 7 + [2] * 4 + [1] * 8
    assert [row["line"].count("|") for row in lines] == [int(row["values"]) for row in lines]
    assert lines[-1]["numbers"] == "32768"  # 1.5 * 2^15 is the code of Inf


def test_a_long_number_line_is_shortened(capsys: Capture) -> None:
    assert cli.main(["formats", "bf16"]) == 0
    lines = rows_of(sections(capsys.readouterr().out)["number"])
    assert len(lines) < 20
    assert [row["line"] for row in lines if row["binade"] == "..."] == ["250 binades like these"]
    assert value(lines[-1]["numbers"].split()[-1]) == formats.element_of(formats.get("bf16")).max


@pytest.mark.parametrize("fmt", BLOCKS, ids=str)
def test_a_block_formats_page_works_a_block_through(fmt: BlockFormat, capsys: Capture) -> None:
    assert cli.main(["formats", str(fmt)]) == 0
    page = sections(capsys.readouterr().out)
    block = cells(page["block"])
    assert block["geometry"]["value"] == tables.block_text(fmt)
    assert block["bits"]["value"] == f"{fmt.bits:g}"
    rows = rows_of(page["a"])
    inputs = torch.tensor([float(row["in"]) for row in rows])
    assert inputs.tolist() == torch.tensor(pages.EXAMPLE).tolist()
    # the kernels agree with the reference that made the page
    assert [row["out"] for row in rows] == [f"{y:.6g}" for y in aqnsim.cast(inputs, fmt).tolist()]
    held = {*fmt.element.values(), *(-v for v in fmt.element.values())}
    assert {value(row["element"]) for row in rows} <= held
    assert value(cells(page["ranges"])["max"]["value"].split(" = ")[0]) == fmt.element.max
    assert "codes" in page


@pytest.mark.parametrize("text", SPELT)
def test_a_page_is_headed_by_the_canonical_text(text: str, capsys: Capture) -> None:
    assert cli.main(["formats", text.replace("(", "( ")]) == 0
    assert capsys.readouterr().out.splitlines()[0] == f"format {text}"


@pytest.mark.parametrize("text", [*formats.ALL, *SPELT])
def test_a_page_as_json_is_json_and_complete(text: str, capsys: Capture) -> None:
    fmt = formats.get(text)
    assert cli.main(["formats", text, "--json"]) == 0
    page = data(capsys.readouterr().out)
    assert page["format"] == text
    assert [f["name"] for f in page["fields"]] == list(type(fmt).__dataclass_fields__)
    element = page["element"] if isinstance(fmt, BlockFormat) else page
    fmt = formats.element_of(fmt)
    assert element["ranges"]["max"] == fmt.max
    if fmt.bits > 8:
        assert sum(kind["codes"] for kind in element["kinds"]) == fmt.codes
        return
    assert len(element["codes"]) == fmt.codes
    assert all(same(float(v), fmt.decode(code)) for code, v in enumerate(element["codes"]))


def test_flushed_subnormals_are_said_to_be_unreachable(capsys: Capture) -> None:
    assert cli.main(["formats", "bf16(subnormals=flush)"]) == 0
    assert "one binade a line; no cast gives those below min_normal" in capsys.readouterr().out


# ---- what is printed where ------------------------------------------------------------------------------------------


def test_piped_output_is_plain_and_whole_however_narrow_a_terminal_would_be() -> None:
    done = run("formats", COLUMNS="40", FORCE_COLOR="1", TTY_COMPATIBLE="1")
    assert done.stdout.splitlines() == output.aligned(tables.format_table()).splitlines()
    assert "\x1b" not in done.stdout
    assert done.stderr == ""


@pytest.mark.parametrize(
    "arguments", [["formats"], ["formats", "hif4"], ["profile", "list"], ["profile", "show", "bf16"]]
)
def test_a_terminal_gets_every_word_too(arguments: list[str], capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    assert cli.main(arguments) == 0
    plain = capsys.readouterr().out
    monkeypatch.setenv("COLUMNS", "400")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert cli.main(arguments) == 0
    rich = re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out)
    assert {w for w in plain.split() if w.strip("-")} - set(rich.split()) == set()
    assert ("─" in rich) == (plain.count("---") > 0)


def test_progress_is_for_terminals_only(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    def work() -> str:
        with output.progress("working", 2) as step:
            step("first")
            step("second")
        return capsys.readouterr().err

    assert work() == ""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    assert "working: second" in work()


@pytest.mark.parametrize(
    ("code", "absent"),
    [
        ("import aqnsim.cli", {"torch", "numpy", "matplotlib", "safetensors"}),
        ("from aqnsim.cli import main; main(['formats'])", {"torch", "numpy", "matplotlib", "safetensors"}),
        ("from aqnsim.cli import main; main(['formats', 'hif8'])", {"torch", "numpy", "matplotlib", "safetensors"}),
        ("from aqnsim.cli import main; main(['formats', 'mxfp4'])", {"torch", "matplotlib", "safetensors"}),
        ("from aqnsim.cli import main; main(['profile', 'list'])", {"torch", "numpy", "matplotlib", "safetensors"}),
    ],
)
def test_a_command_loads_only_what_it_needs(code: str, absent: set[str]) -> None:
    code += "; import sys; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(done.stdout.splitlines()[-1].split())
    assert "aqnsim.cli.pages" in loaded
    assert loaded & absent == set()


# ---- cast -----------------------------------------------------------------------------------------------------------

KNOWN = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5, 6])  # OCP MX: becomes 0, 1, 1, 2, 2, 4, 4, 6
Save = Callable[..., Path]


@pytest.fixture
def save(tmp_path: Path) -> Save:
    def save(name: str = "in.safetensors", **named: torch.Tensor) -> Path:
        path = tmp_path / name
        save_file(named, path, metadata={"format": "pt", "made by": "a test"})
        return path

    return save


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def cast_report(capsys: Capture, *arguments: str | Path) -> Any:
    assert cli.main(["cast", *map(str, arguments), "--json"]) == 0
    return data(capsys.readouterr().out)


def test_cast_reports_what_it_changed(save: Save, capsys: Capture) -> None:
    report = cast_report(capsys, save(w=KNOWN.reshape(1, 8)), "--format", "mxfp4")
    error2, signal2 = 5 * 0.25**2 + 2 * 0.5**2 - 0.25**2 + 1, float((KNOWN**2).sum())
    (row,) = report["tensors"]
    assert row | {"sqnr_db": None} == {
        "name": "w",
        "shape": [1, 8],
        "dtype": "F32",
        "elements": 8,
        "sqnr_db": None,
        "zeroed": 1 / 8,
        "saturated": 0.0,
        "max_absolute_error": 1.0,
        "max_relative_error": 1.0,
        "changed": 7 / 8,
        "nonfinite": 0,
        "note": "",
    }
    assert row["sqnr_db"] == pytest.approx(10 * math.log10(signal2 / error2))


def test_cast_prints_a_row_a_tensor_and_one_for_all(save: Save, capsys: Capture) -> None:
    file = save(a=KNOWN, b=torch.full((32,), 7.0), n=torch.arange(3), other=KNOWN.clone())
    assert cli.main(["cast", str(file), "--format", "mxfp4", "--include", "[abn]"]) == 0
    table, rest = capsys.readouterr().out.split("\n\n")
    rows = cells(table)
    assert list(rows) == ["a", "b", "n", "total"]
    # floor(log2 7) - 2 = 0: the scale is 1, and 7 lies beyond E2M1's 6
    shown = ("shape", "dtype", "elements", "zeroed", "saturated", "max abs error", "changed", "note")
    assert [rows["b"][c] for c in shown] == ["32", "F32", "32", "0.000%", "100.000%", "1", "100.000%", "-"]
    assert [rows["n"][c] for c in ("dtype", "elements", "note")] == ["I64", "-", "skipped: not float"]
    assert [rows["total"][c] for c in shown[2:6]] == ["40", "2.500%", "80.000%", "1"]
    assert rest == "not included: 1 other tensors\n"


def test_the_total_is_that_of_all_values_together(save: Save, capsys: Capture) -> None:
    a, b = normal(16, 32), 100 * normal(8, 32, seed=1)
    apart = cast_report(capsys, save(a=a, b=b), "--format", "mxfp4")
    together = cast_report(capsys, save(ab=torch.cat([a, b])), "--format", "mxfp4")
    assert apart["total"] == pytest.approx(together["total"], rel=1e-6)
    assert apart["total"] == pytest.approx({k: together["tensors"][0][k] for k in apart["total"]}, rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64, torch.float8_e4m3fn, torch.bfloat16])
def test_other_floats_are_cast_as_float32_and_the_row_says_so(
    dtype: torch.dtype, save: Save, tmp_path: Path, capsys: Capture
) -> None:
    x, out = normal(4, 32).to(dtype), tmp_path / "out.safetensors"
    report = cast_report(capsys, save(w=x), "--format", "mxfp4", "--out", out)
    assert report["tensors"][0]["note"] == ("" if dtype == torch.bfloat16 else "cast as float32")
    written = load_file(out)["w"]
    assert written.dtype == dtype
    assert torch.equal(written.float(), aqnsim.cast(x.float(), "mxfp4"))


def test_results_that_the_files_dtype_rounds_are_counted(save: Save, tmp_path: Path, capsys: Capture) -> None:
    file, out = save(w=normal(4, 32).half()), tmp_path / "out.safetensors"
    report = cast_report(capsys, file, "--format", "nvfp4", "--out", out)
    exact = aqnsim.cast(load_file(file)["w"].float(), "nvfp4")
    rounded = int((load_file(out)["w"].float() != exact).sum())
    assert rounded > 0
    assert report["tensors"][0]["note"] == f"cast as float32, {rounded} results rounded to F16"


def test_the_written_file_differs_in_the_cast_values_alone(save: Save, tmp_path: Path, capsys: Capture) -> None:
    named = {
        "a.weight": normal(8, 64),
        "b.weight": normal(8, 64, seed=1).bfloat16(),
        "norm": normal(64),
        "ids": torch.arange(5),
        "scalar": torch.tensor(1.3),
        "empty": torch.zeros(0, 3),
    }
    file, out = save(**named), tmp_path / "out.safetensors"
    cast_report(
        capsys, file, "--format", "mxfp4", "--axis", "0", "--include", "*weight", "--include", "[se]*", "--out", out
    )
    written = load_file(out)
    for name, x in named.items():
        chosen = name not in ("norm", "ids")
        expected = aqnsim.cast(x, "mxfp4", axis=0) if chosen else x
        assert torch.equal(written[name], expected), name
        assert written[name].dtype == x.dtype
    with safe_open(file, "pt") as before, safe_open(out, "pt") as after:
        assert after.metadata() == before.metadata()


def test_a_file_can_be_cast_in_place(save: Save, capsys: Capture) -> None:
    file = save(w=KNOWN)
    cast_report(capsys, file, "--format", "mxfp4", "--out", file)
    assert load_file(file)["w"].tolist() == [0, 1, 1, 2, 2, 4, 4, 6]
    assert list(file.parent.iterdir()) == [file]


def test_a_failure_leaves_nothing_half_written(
    save: Save, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, out = save(a=normal(4), b=normal(4)), save("out.safetensors", old=normal(2))
    before, measure, calls = out.read_bytes(), tensors.measure, []

    def fails_at_the_second(*arguments: Any) -> Any:
        calls.append(arguments)
        if len(calls) == 2:
            raise ConfigError("made up")
        return measure(*arguments)

    monkeypatch.setattr(tensors, "measure", fails_at_the_second)
    assert cli.main(["cast", str(file), "--format", "mxfp4", "--out", str(out)]) == 2
    assert capsys.readouterr().err == "aqnsim: error: b: made up\n"
    assert out.read_bytes() == before
    assert sorted(tmp_path.iterdir()) == [file, out]


def test_values_that_the_files_dtype_cannot_hold_are_an_error(save: Save, tmp_path: Path, capsys: Capture) -> None:
    file = save(w=torch.tensor([65504.0], dtype=torch.float16))  # bf16 rounds it to 65536
    assert cli.main(["cast", str(file), "--format", "bf16", "--out", str(tmp_path / "out")]) == 2
    assert "w: 1 results are beyond the range of torch.float16" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == [file]


def test_a_stochastic_cast_is_a_function_of_the_seed_and_the_name(save: Save, tmp_path: Path, capsys: Capture) -> None:
    file = save(a=normal(8, 32), b=normal(8, 32))

    def cast(*seed: str) -> dict[str, torch.Tensor]:
        out = tmp_path / "out"
        cast_report(capsys, file, "--format", "mxfp4(rounding=stochastic)", "--out", out, *seed)
        return load_file(out)

    first, again, other = cast(), cast("--seed", "0"), cast("--seed", "1")
    assert torch.equal(first["a"], again["a"])
    assert not torch.equal(first["a"], other["a"])
    assert not torch.equal(first["a"], first["b"])


def test_infinite_measurements_are_json_too(save: Save, capsys: Capture) -> None:
    report = cast_report(capsys, save(w=torch.tensor([1.0, math.inf, math.nan])), "--format", "bf16")
    assert report["tensors"][0]["sqnr_db"] == "inf"
    assert report["tensors"][0]["nonfinite"] == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["w.safetensors", "--format", "mxfp5"], "unknown format 'mxfp5' (did you mean 'mxfp4'?)"),
        (["none.safetensors", "--format", "mxfp4"], "none.safetensors: no such file"),
        ([".", "--format", "mxfp4"], "not a file; expected a .safetensors file"),
        (["text.safetensors", "--format", "mxfp4"], "text.safetensors cannot be read as a safetensors file: "),
        (["w.safetensors", "--format", "mxfp4", "--include", "v*"], "--include 'v*' matches none of 2 tensors: ids, w"),
        (["w.safetensors", "--format", "mxfp4", "--include", "ids"], "no float tensor to cast; these are none: ids"),
        (["w.safetensors", "--format", "mxfp4", "--axis", "2"], "w: axis 2 is out of range for 2 dimensions"),
        (["w.safetensors", "--format", "mxfp4", "--seed", "1"], "the rounding of mxfp4 draws no random bits"),
        (
            ["w.safetensors", "--format", "mxfp4", "--out", "none/out"],
            "cannot write none/out: No such file or directory",
        ),
        (["w.safetensors", "--format", "mxfp4", "--out", "."], "cannot write .: it is a folder"),
        (["w.safetensors"], "Missing option '--format'"),
    ],
)
def test_a_cast_that_cannot_be_is_one_error_and_status_2(
    arguments: list[str], message: str, save: Save, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    save("w.safetensors", w=normal(2, 32), ids=torch.arange(3))
    (tmp_path / "text.safetensors").write_text("This is no tensor, but text that is long enough.")
    monkeypatch.chdir(tmp_path)
    assert cli.main(["cast", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("aqnsim: error: ")
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["text.safetensors", "w.safetensors"]


# ---- profiles, backends, mistakes -----------------------------------------------------------------------------------


def test_profile_list_shows_every_profile(capsys: Capture) -> None:
    assert cli.main(["profile", "list"]) == 0
    rows = cells(capsys.readouterr().out)
    assert list(rows) == profiles.names()
    assert [rows["mxfp4-w4a16"][c] for c in ("weight", "input")] == ["mxfp4", "-"]
    assert all(profiles.load(name).fingerprint == row["fingerprint"] for name, row in rows.items())


def test_profile_list_as_json_holds_every_profile(capsys: Capture) -> None:
    assert cli.main(["profile", "list", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == [to_dict(profiles.load(name)) for name in profiles.names()]


@pytest.mark.parametrize("name", profiles.names())
def test_profile_show_tells_all_that_a_profile_holds(name: str, capsys: Capture) -> None:
    assert cli.main(["profile", "show", name]) == 0
    shown, profile = capsys.readouterr().out, profiles.load(name)
    expected = [profile.name, profile.fingerprint, profile.description, *profile.source.values(), *profile.exclude]
    for rule in profile.rules:
        expected += [*rule.kinds, *rule.sites, *rule.phases]
        expected += [f"  {field} = {value}\n" for field, value in flat(rule.spec).items()]
    assert [text for text in expected if text not in f"{shown}\n"] == []
    assert shown.count("\nrule ") == len(profile.rules)


@pytest.mark.parametrize("name", profiles.names())
def test_profile_show_as_json_and_as_toml_is_the_profile(name: str, capsys: Capture) -> None:
    assert cli.main(["profile", "show", name, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == to_dict(profiles.load(name))
    assert cli.main(["profile", "show", name, "--toml"]) == 0
    assert profiles.from_toml(capsys.readouterr().out) == profiles.load(name)


def test_profile_show_takes_a_file(tmp_path: Path, capsys: Capture) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(
        'name = "mine"\ndescription = "d"\n[source]\nwhy = "w"\n[[rule]]\nkind = "linear"\ngrad_input.error = '
        '"absolute-gaussian(sigma=0.5)"\n'
    )
    assert cli.main(["profile", "show", str(path)]) == 0
    assert "grad_input.error = absolute-gaussian(sigma=0.5)" in capsys.readouterr().out


def test_profile_diff_says_what_differs_kind_by_kind_in_words(capsys: Capture) -> None:
    assert cli.main(["profile", "diff", "mxfp4-w4a16", "mi355"]) == 0
    one, other = (profiles.load(name).fingerprint for name in ("mxfp4-w4a16", "mi355"))
    assert capsys.readouterr().out.splitlines() == [
        f"mxfp4-w4a16 ({one}) and mi355 ({other})",
        "  the fingerprints differ",
        "",
        "linear (rule 1)",
        "  forward.weight is mxfp4 in mxfp4-w4a16, mxfp4(scale=even) in mi355",
        "  forward.input is not asked for in mxfp4-w4a16, mxfp4(scale=even) in mi355",
        "",
        "matmul, qk, pv (no rule and rule 2)",
        "  only in mi355: sites = *, phases = rollout, train, eval, reference, "
        "forward.input = bf16, forward.weight = bf16",
        "",
        "also differ, which changes no number: description, source",
    ]


def test_profile_diff_of_files_that_share_a_name_and_differ_in_exclusions(tmp_path: Path, capsys: Capture) -> None:
    for folder, exclude in (("a", '"lm_head"'), ("b", '"router"')):
        (tmp_path / folder).mkdir()
        text = to_toml(profiles.load("bf16")).replace('"lm_head", "embedding", "router"', exclude)
        (tmp_path / folder / "mine.toml").write_text(text)
    a, b = (str(tmp_path / folder / "mine.toml") for folder in "ab")
    assert cli.main(["profile", "diff", a, b]) == 0
    shown = capsys.readouterr().out
    assert "exclude\n  only in the first: lm_head\n  only in the second: router\n" in shown
    assert "the fingerprints differ" in shown
    assert cli.main(["profile", "diff", a, a]) == 0
    assert capsys.readouterr().out.count("\n") == 2


def test_profile_diff_notices_another_order_alone(tmp_path: Path, capsys: Capture) -> None:
    path = tmp_path / "mine.toml"
    text = to_toml(profiles.load("bf16"))
    path.write_text(text.replace('"lm_head", "embedding", "router"', '"router", "embedding", "lm_head"'))
    assert cli.main(["profile", "diff", "bf16", str(path)]) == 0
    assert "they ask the same of every kind of op, in other rules or another order" in capsys.readouterr().out


def test_profile_diff_as_json(capsys: Capture) -> None:
    assert cli.main(["profile", "diff", "mxfp4-w4a16", "nvfp4-w4a16", "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert [p["name"] for p in data["profiles"]] == ["mxfp4-w4a16", "nvfp4-w4a16"]
    assert data["same numbers"] is False
    assert data["exclude"] == [[], []]
    assert data["rules"] == [
        {
            "kinds": ["linear"],
            "rules": [1, 1],
            "field": "forward.weight",
            "values": ["mxfp4", "nvfp4"],
            "words": "forward.weight is mxfp4 in mxfp4-w4a16, nvfp4 in nvfp4-w4a16",
        }
    ]


@pytest.mark.parametrize("start", [None, *profiles.names()])
def test_profile_new_writes_a_valid_profile_to_start_from(start: str | None, tmp_path: Path, capsys: Capture) -> None:
    path = tmp_path / "mine.toml"
    assert cli.main(["profile", "new", str(path), *(["--from", start] if start else [])]) == 0
    assert capsys.readouterr().out == f"{path}\n"
    assert list(tmp_path.iterdir()) == [path]
    mine, origin = profiles.load(path), profiles.load(start or "bf16")
    assert (mine.name, mine.rules, mine.exclude) == ("mine", origin.rules, origin.exclude)
    assert mine.fingerprint == origin.fingerprint
    assert mine.source["start"] == f"profile {origin.name} ({origin.fingerprint})"


def test_profile_new_leaves_a_file_that_is_there_alone(
    tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "mine.toml"
    path.write_text("mine")
    expected = f"aqnsim: error: cannot write {path}: it exists already; give another name or remove it first\n"
    assert cli.main(["profile", "new", str(path)]) == 2
    assert capsys.readouterr().err == expected
    monkeypatch.setattr(Path, "exists", lambda self: False)  # as when another process writes it in this moment
    assert cli.main(["profile", "new", str(path)]) == 2
    assert capsys.readouterr().err == expected
    assert path.read_text() == "mine"
    assert list(tmp_path.iterdir()) == [path]


def test_backends_shows_which_one_serves_a_device(capsys: Capture) -> None:
    backends.use("reference", "cpu")
    assert cli.main(["backends"]) == 0
    rows = cells(capsys.readouterr().out)
    assert set(rows) == set(backends.names())
    assert [rows["reference"][c] for c in ("devices", "serves")] == ["cpu", "cpu"]
    assert [rows["cpu"][c] for c in ("devices", "serves")] == ["cpu", "-"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["profile", "show", "mxfp4-w4a15"], "unknown profile 'mxfp4-w4a15' (did you mean 'mxfp4-w4a16'?)"),
        (["profile", "show", "nowhere/my.toml"], "profile 'nowhere/my.toml': no such file"),
        (["profile", "show", "bf16", "--json", "--toml"], "--json and --toml are two ways to print a profile"),
        (["profile", "diff", "bf16", "fp61"], "unknown profile 'fp61' (did you mean 'fp16'?)"),
        (["profile", "diff", "bf16"], "Missing argument 'B'"),
        (["profile", "new", "mine.tml"], "a profile is a file that ends in .toml, got 'mine.tml'"),
        (["profile", "new", "nowhere/mine.toml"], "cannot write nowhere/mine.toml: No such file or directory"),
        (["profile", "new", "mine.toml", "--from", "bf61"], "unknown profile 'bf61' (did you mean 'bf16'?)"),
        (["formats", "nvfp5"], "unknown format 'nvfp5' (did you mean 'nvfp4'?)"),
        (["formats", "mxfp4(scal=floor)"], "unknown field of format 'mxfp4' 'scal' (did you mean 'scale'?)"),
        (["formats", "--format", "hif8"], "--format chooses what --plot draws"),
        (["formats", "--plot", "hif8"], "--plot writes a file that ends in .png, got 'hif8'"),
        (["formats", "--plot", "--json"], "--plot draws a PNG and --json prints"),
        (["formats", "hif8", "bf16"], "Got unexpected extra argument(s) (bf16)"),
        (["formats", "--jsn"], "No such option: --jsn"),
        (["profil"], "No such command 'profil'. Did you mean 'profile'?"),
        ([], "Missing command; see aqnsim --help"),
        (["profile"], "Missing command; see aqnsim --help"),
        (["profile", "show"], "Missing argument 'NAME'"),
    ],
)
def test_a_mistake_is_one_error_and_status_2(arguments: list[str], message: str, capsys: Capture) -> None:
    assert cli.main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("aqnsim: error: ")
    assert message in captured.err
    assert captured.err.count("\n") == 1


def test_a_process_ends_with_the_status() -> None:
    done = run("profile", "show", "nowhere")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("aqnsim: error: unknown profile 'nowhere'")
    assert run("--help").returncode == 0


def test_an_interrupt_is_no_traceback(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(tables, "format_table", interrupted)
    assert cli.main(["formats"]) == 130
    assert capsys.readouterr().err == ""


def test_a_plot_without_matplotlib_says_what_to_install(
    tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "aqnsim.cli.plots", raising=False)
    monkeypatch.delattr(cli, "plots", raising=False)
    for name in [n for n in sys.modules if n.partition(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert cli.main(["formats", "--plot", str(tmp_path / "a.png")]) == 2
    assert "--plot needs matplotlib: pip install 'aqnsim[plot]'" in capsys.readouterr().err


def test_a_broken_profile_names_its_file_and_key(tmp_path: Path, capsys: Capture) -> None:
    path = tmp_path / "broken.toml"
    path.write_text('name = "b"\ndescription = "d"\nexlude = []\n[source]\nwhy = "w"\n')
    assert cli.main(["profile", "show", str(path)]) == 2
    message = capsys.readouterr().err
    assert str(path) in message
    assert "unknown key 'exlude' (did you mean 'exclude'?)" in message


def test_the_installed_command_is_this_one() -> None:
    (command,) = entry_points(group="console_scripts", name="aqnsim")
    assert command.load() is cli.main
