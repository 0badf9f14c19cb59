"""The tables of docs/results.md: made from archived records, without those that were marked invalid."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import fake_runs
import pytest
from fake_runs import WriteRun

from training.records import INVALID, Invalid

write_run = fake_runs.write_run
DOCS = Path(__file__).resolve().parents[2] / "docs"


@pytest.fixture
def archived(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location("docs_archived", DOCS / "archived.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "docs_archived", module)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "ARCHIVE", tmp_path)
    return module


def test_arms_are_means_over_seeds(archived: ModuleType, write_run: WriteRun) -> None:
    for seed, correct in enumerate((30, 32, 34)):
        write_run("e12", correct=[i < correct for i in range(40)], seed=seed)
    ((_, *row),) = [archived.TABLES["results-arms"]()[1]]
    assert row[:6] == ["tiny", "arithmetic", "0, 1, 2", "40", "80.0 (67.6 to 92.4)", "80.0 (67.6 to 92.4)"]


def test_runs_have_their_start_their_intervals_and_where_they_ran(archived: ModuleType, write_run: WriteRun) -> None:
    run = write_run("e12", correct=[True] * 30 + [False] * 10)
    head, row = archived.TABLES["results-runs"]()
    cells = dict(zip(head, row, strict=True))
    assert cells["record"] == run.path.name
    assert cells["emulated, start"] == "37.5"
    assert cells["emulated, end"] == "75.0 (59.8 to 85.8)"
    assert cells["revision"] == "c0ffee"
    head, row = archived.TABLES["results-receipts"]()
    assert dict(zip(head, row, strict=True)) == {
        "record": run.path.name,
        "weights": "mxfp4",
        "worst SQNR, dB": "18.5",
        "steps with noise": "10 of 12",
        "largest deviation of sigma": "+0.20 %",
    }


def test_an_invalid_record_drops_out_of_every_table_and_its_reason_is_listed(
    archived: ModuleType, write_run: WriteRun
) -> None:
    kept = write_run("e12", correct=[True] * 20 + [False] * 20, seed=0)
    wrong = write_run("e12", correct=[True] * 40, seed=1)
    alone = write_run("e6a-lora-mxfp4", correct=[True] * 40, seed=0)
    names = ("results-arms", "results-runs", "results-receipts")

    def pages() -> dict[str, str]:
        return {name: json.dumps(archived.TABLES[name]()) for name in archived.TABLES}

    before = pages()
    assert all("e6a-lora-mxfp4" in before[name] for name in names)
    assert "75.0" in before["results-arms"]
    assert before["results-invalid"].endswith('["none", "", ""]]')
    for run in (wrong, alone):
        run.write_json(INVALID, Invalid(reason="its noise was never injected", since="2026-01-01"))
    after = pages()
    for name in names:
        assert wrong.path.name not in after[name]
        assert "e6a-lora-mxfp4" not in after[name]
    assert '"0", "40", "50.0", "50.0"' in after["results-arms"]  # one seed is left, and no interval
    assert kept.path.name in after["results-runs"]
    assert [row[1:] for row in archived.TABLES["results-invalid"]()[1:]] == [
        ("2026-01-01", "its noise was never injected")
    ] * 2
    assert {row[0] for row in archived.TABLES["results-invalid"]()[1:]} == {wrong.path.name, alone.path.name}


def test_unfinished_records_are_in_no_table(archived: ModuleType, write_run: WriteRun) -> None:
    write_run("e12", state="interrupted")
    assert archived.TABLES["results-runs"]()[1][0] == "none"
