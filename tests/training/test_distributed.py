"""Two gloo processes run the same experiment as one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

WORKER = Path(__file__).with_name("worker.py")


def launch(directory: Path, *launcher: str) -> None:
    root = WORKER.parents[2]
    path = os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, *launcher, str(WORKER), str(directory)],
        env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict[str, Any]]:
    directory = tmp_path_factory.mktemp("distributed")
    (directory / "one").mkdir()
    (directory / "two").mkdir()
    launch(directory / "one")
    launch(directory / "two", "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    return {
        ranks: json.loads((directory / name / f"{ranks}.json").read_text())
        | {"adapters": torch.load(directory / name / f"{ranks}.pt")}
        for name, ranks in [("one", 1), ("two", 2)]
    }


def test_the_global_batch_is_the_same(runs: dict[int, dict[str, Any]]) -> None:
    one, two = runs[1], runs[2]
    assert one["micro_batches"] == 2 * two["micro_batches"] == 3 * 4
    assert len(one["tokens"]) == 3 * 16
    assert one["tokens"] == two["tokens"]


def test_metrics_and_adapters_agree_to_rounding(runs: dict[int, dict[str, Any]]) -> None:
    for one, two in zip(runs[1]["metrics"], runs[2]["metrics"], strict=True):
        nested = (row.pop("mismatch") for row in (one, two))
        assert next(nested) == pytest.approx(next(nested), rel=1e-3, abs=1e-4)
        assert one == pytest.approx(two, rel=1e-4, abs=1e-5)
    for name, parameter in runs[1]["adapters"].items():
        torch.testing.assert_close(parameter, runs[2]["adapters"][name], rtol=1e-3, atol=1e-4)


def test_the_evaluation_is_the_same(runs: dict[int, dict[str, Any]]) -> None:
    for mode in ("clean", "emulated"):
        one, two = runs[1]["evaluation"][mode], runs[2]["evaluation"][mode]
        assert [row[0] for row in one] == [row[0] for row in two] == [f"p{i}" for i in range(11)]
        assert one == two


def test_the_same_sites_report(runs: dict[int, dict[str, Any]]) -> None:
    assert runs[1]["receipts"] == runs[2]["receipts"]
    phases = {phase for _, phase, _, _ in runs[2]["receipts"]}
    assert phases == {"attach", "rollout", "train", "eval"}


@pytest.mark.parametrize("ranks", [1, 2])
def test_all_ranks_stop_together_and_resume_exactly(runs: dict[int, dict[str, Any]], ranks: int) -> None:
    run = runs[ranks]
    assert run["interrupted_at"] == [1] * ranks
    assert run["resumed_exactly"] == [True] * ranks
    assert run["resumed_metrics_equal"]
