"""The benchmarks: every suite runs, nothing is timed behind a red gate, and the figures are what they say."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from aqnsim import UnknownNameError, backends, conformance
from aqnsim.conformance import Check
from benchmarks import __main__ as command
from benchmarks import compare, plots, records, suites, timing
from benchmarks.kernels import KERNELS
from benchmarks.peers import PEERS
from benchmarks.records import METRICS, Row
from benchmarks.suites import SUITES

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    assert torch.get_num_threads() == threads
    backends.use("cpu")


def row(seconds: list[float], beside: list[float] | None = None, **fields: object) -> Row:
    usual = {
        "suite": "s",
        "kernel": "k",
        "elements": 4_000_000_000,
        "moved": 3,
        "beside_moved": 2,
        "metric": "of copy_",
    }
    return Row(**(usual | fields), seconds=seconds, beside="copy_", beside_seconds=beside or [1.0] * len(seconds))  # type: ignore[arg-type]


# ---- every suite ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SUITES)
def test_every_suite_runs_on_a_cpu(name: str) -> None:
    """Those of a GPU, too: their code asks a backend for its ops, and the CPU's stands in."""
    s = suites.setting(name, backend="cpu", device="cpu", repeats=1, quick=True)
    rows = list(suites.rows(s))
    assert len({r.key for r in rows}) == len(rows) > 0
    for r in rows:
        assert len(r.seconds) == s.repeats
        assert min(r.seconds) > 0
        assert r.suite == name
        assert r.metric in METRICS
        assert r.spread.median > 0
    lines = records.table(rows)
    assert len(lines) == len(rows) + 1
    assert {len(line) for line in lines} == {len(lines[0])}


def test_the_suites_of_a_gpu_time_every_kernel() -> None:
    rows = list(suites.rows(suites.setting("cuda", backend="cpu", device="cpu", repeats=1, quick=True)))
    assert {r.kernel for r in rows} >= {k.name for k in KERNELS}
    assert {"float32", "bfloat16"} <= {r.dtype for r in rows}


def test_kernels_are_chosen_by_pattern_and_dtype() -> None:
    s = suites.setting("cpu", repeats=1, quick=True, only="cast mx*", dtypes="bfloat16")
    rows = list(suites.rows(s))
    assert {r.dtype for r in rows} == {"bfloat16"}
    assert {r.kernel for r in rows} == {k.name for k in KERNELS if k.name.startswith("cast mx")}


@pytest.mark.parametrize("name", ["cuda", "triton"])
def test_a_suite_of_a_gpu_fails_without_one(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match=f"suite '{name}' needs a GPU, and torch .* sees none"):
        suites.setting(name)


def test_an_unknown_suite_is_refused() -> None:
    with pytest.raises(UnknownNameError, match="did you mean 'cpu'"):
        suites.setting("cpo")


def test_peers_are_timed_beside_ours_on_the_same_tensor() -> None:
    s = suites.setting("cpu", repeats=1, quick=True, only="cast fp8_e4m3")
    rows = [r for r in suites.rows(s, peers=True) if r.suite == "peers"]
    assert {r.beside.partition(" ")[0] for r in rows} == {"ml_dtypes", "gfloat", "torch"}
    assert all(any(c.isdigit() for c in r.beside) for r in rows)  # a version
    assert all(len(r.seconds) == len(r.beside_seconds) == 1 for r in rows)


def test_goals_are_for_mx_casts_of_every_kind_of_peer() -> None:
    assert {p.name for p in PEERS if p.text.startswith("mx")} >= {"microxcaling", "torchao", "compressed-tensors"}


def test_what_a_machine_with_a_gpu_may_lack_is_not_needed(tmp_path: Path) -> None:
    """The same command there as here, without our kernels of the CPU; the reference stands in for a GPU's backend."""
    absent = [
        "aqnsim._core",
        "typer",
        "rich",
        "pytest",
        "scipy",
        "matplotlib",
        "safetensors",
        "pydantic",
        "transformers",
    ]
    code = f"""
import sys
for name in {absent}: sys.modules[name] = None
from aqnsim import conformance
for name in list(conformance.LAWS):
    if name not in ("edges", "layout"): del conformance.LAWS[name]
from benchmarks.__main__ import main
arguments = "run --suite cuda --backend reference --device cpu --quick --repeats 1 --only *mxfp4*"
sys.exit(main([*arguments.split(), "--save", sys.argv[1]]))
"""
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, capture_output=True, text=True)
    assert "gate: backend 'reference' on cpu, every op, passes" in done.stdout, done.stderr
    assert done.returncode == 0, done.stderr
    assert "no pictures: matplotlib is not installed" in done.stdout


# ---- the gate -------------------------------------------------------------------------------------------------------


def test_nothing_is_timed_behind_a_red_gate(monkeypatch: pytest.MonkeyPatch) -> None:
    checks = [Check("edges", "mxfp4", "bit", False, "3 of 9 values differ"), Check("layout", "", "bit", True, "")]
    monkeypatch.setattr(conformance, "run", lambda *_: checks)
    monkeypatch.setattr(suites, "rows", lambda *_: pytest.fail("timed"))
    monkeypatch.setattr(command, "keep_freed_memory", lambda: None)
    suites._pass.cache_clear()
    with pytest.raises(
        SystemExit, match=r"fails 1 of 2 checks, nothing was timed\n  edges mxfp4: 3 of 9 values differ"
    ):
        command.main(["run", "--suite", "overhead", "--quick"])


def test_a_run_leaves_a_record_a_table_and_a_picture(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(suites, "gate", lambda s: None)
    monkeypatch.setattr(command, "keep_freed_memory", lambda: None)
    arguments = (
        f"run --suite cpu,scaling --quick --repeats 2 --only *mxfp4 --dtypes bfloat16 --name one --save {tmp_path}"
    )
    assert command.main(arguments.split()) == 0
    assert {p.name for p in tmp_path.iterdir()} == {"one.json", "one.txt", "one-limits.png", "one-scaling.png"}
    rows, about = records.load(tmp_path / "one.json")
    assert about["isa"] in ("baseline", "avx2", "avx512", "avx512bf16")
    assert {"commit", "date", "cpu", "threads", "packages"} <= about.keys()
    assert {r.suite for r in rows} == {"cpu", "scaling"}
    assert (tmp_path / "one.txt").read_text().strip() in capsys.readouterr().out
    again = tmp_path / "one.json"
    assert command.main(["compare", str(again), str(again)]) == 0


# ---- figures --------------------------------------------------------------------------------------------------------


def test_metrics_are_made_of_each_round_s_own_two_timings() -> None:
    r = row([2.0, 4.0, 8.0], [1.0, 4.0, 2.0])
    expected = {
        "of copy_": [0.25, 0.5, 1.0],
        "of limit": [0.375, 0.75, 1.5],
        "times": [0.25, 0.5, 1.0],
        "of plain": [1.0, 2.0, 4.0],
        "Gelt/s": [0.5, 1.0, 2.0],
        "us": [2e6, 4e6, 8e6],
        "ms": [2e3, 4e3, 8e3],
    }
    assert expected.keys() == METRICS.keys()
    for metric, (least, middle, most) in expected.items():
        spread = records.spread_of(r, metric)
        assert spread.median == pytest.approx(middle)
        assert spread.low == pytest.approx((least + middle) / 2)
        assert spread.high == pytest.approx((middle + most) / 2)


def test_a_target_is_reached_by_the_median() -> None:
    assert row([1.0, 1.25, 9.0], target=0.8).met is True
    assert row([1.0, 1.26, 9.0], target=0.8).met is False
    assert row([1.2, 1.2], metric="of plain", target=1.2).met is True
    assert row([1.21, 1.21], metric="of plain", target=1.2).met is False
    assert row([1.0]).met is None


def test_rounds_alternate_and_the_first_does_not_count() -> None:
    calls: list[str] = []
    found = timing.alternate(
        {"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, 2, lambda run: (run(), 7.0)[1]
    )
    assert calls == ["a", "b"] * 3
    assert found == {"a": [7.0, 7.0], "b": [7.0, 7.0]}


def test_what_takes_too_long_is_named_and_not_timed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(timing, "PATIENCE", -1.0)
    assert timing.alternate({"slow": lambda: None}, 3) == {}
    assert "not timed: slow took 0 s in its first round" in capsys.readouterr().err


def test_a_regression_is_what_is_worse_by_more_than_threshold_and_noise() -> None:
    steady = row([1.0, 1.0, 1.0])
    noisy = row([0.8, 1.0, 1.2])
    for before, after, expected in (
        (steady, row([1.04] * 3), False),
        (steady, row([1.06] * 3), True),
        (noisy, row([1.06] * 3), False),
        (steady, row([0.5] * 3), False),
        (row([1.0] * 3, metric="of plain"), row([1.06] * 3, metric="of plain"), True),
        (row([1.0] * 3, metric="of plain"), row([0.9] * 3, metric="of plain"), False),
    ):
        (change,) = compare.changes([before], [after])
        assert change.is_regression(0.05) is expected, (before, after)
    assert compare.changes([steady], [row([9.0], kernel="other")]) == []


def test_comparing_tells_by_its_exit_code(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, seconds, kernel in (("a", 1.0, "k"), ("b", 1.5, "k"), ("c", 1.0, "other")):
        records.save(tmp_path / f"{name}.json", [row([seconds] * 3, kernel=kernel)], {})
    a, b, c = (str(tmp_path / f"{name}.json") for name in "abc")
    assert command.main(["compare", a, b]) == 1
    assert "REGRESSION" in capsys.readouterr().out
    assert command.main(["compare", b, a]) == 0
    assert "faster" in capsys.readouterr().out
    assert command.main(["compare", a, b, "--threshold", "0.6"]) == 0
    with pytest.raises(SystemExit, match="no row in common"):
        command.main(["compare", a, c])


def test_a_record_is_whole_or_not_there(tmp_path: Path) -> None:
    records.save(tmp_path / "new" / "r.json", [row([1.0, 2.0])], {"commit": "x"})
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["r.json"]
    assert records.load(tmp_path / "new" / "r.json") == ([row([1.0, 2.0])], {"commit": "x"})
    assert json.loads((tmp_path / "new" / "r.json").read_text())["rows"][0]["seconds"] == [1.0, 2.0]


def test_pages_show_the_newest_record_of_each_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "docs")
    import measurements

    monkeypatch.setattr(measurements, "RECORDS", tmp_path)
    assert {name: len(table()) for name, table in measurements.TABLES.items()} == dict.fromkeys(measurements.TABLES, 1)
    about = {"commit": "c0ffee", "cpu": "a chip", "threads": 2, "backend": "cpu", "packages": {"torch": "2"}}
    old = row([1.0] * 3, suite="cpu", dtype="float32", target=0.9)
    new = row([2.0] * 3, suite="cpu", dtype="float32", target=0.9)
    other = row([3.0] * 3, suite="scaling")
    records.save(tmp_path / "z-old.json", [old, other], about | {"date": "2026-01-01T00:00:00"})
    records.save(tmp_path / "a-new.json", [new], about | {"date": "2026-01-02T00:00:00", "isa": "avx2"})
    cpu = measurements.TABLES["benchmark-cpu"]()
    assert cpu[1:] == [("k", "float32", "0.5 of copy_", "0.5 to 0.5", "0.75", "at least 0.9", "no", "copy_")]
    assert measurements.TABLES["benchmark-walls"]()[1:] == [("cpu", "float32", "0.0", "4.00", "2.67")]
    assert measurements.TABLES["benchmark-scaling"]()[1][:3] == ("k", "4000000000", "0")
    machines = [line[3] for line in measurements.TABLES["benchmark-environments"]()[1:]]
    assert machines == ["a chip, 2 threads", "a chip, avx2 2 threads"]


def test_a_picture_is_of_what_there_is() -> None:
    assert plots.plots([row([1.0], moved=0)]) == {}
    assert plots.plots([row([1.0])]).keys() == {"limits"}
    assert plots.plots([row([1.0], suite="scaling")]).keys() == {"scaling"}
