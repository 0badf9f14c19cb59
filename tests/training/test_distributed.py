"""Two gloo processes run the same experiment as one, under DDP and under FSDP2."""

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


TWO = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
LAUNCHES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "one": ((), ()),
    "ddp": (TWO, ()),
    "fsdp": (TWO, ("fsdp",)),
}
BY_FORWARD = ("weight", "aqn")
"""Streams that are counted once a forward, of which each rank has its own."""


def launch(directory: Path, launcher: tuple[str, ...], arguments: tuple[str, ...]) -> None:
    root = WORKER.parents[2]
    path = os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, *launcher, str(WORKER), str(directory), *arguments],
        env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    found = {}
    for name, (launcher, arguments) in LAUNCHES.items():
        directory = tmp_path_factory.mktemp(name)
        launch(directory, launcher, arguments)
        ranks = 1 if name == "one" else 2
        found[name] = json.loads((directory / f"{ranks}.json").read_text())
        found[name]["adapters"] = torch.load(directory / f"{ranks}.pt")
    return found


@pytest.fixture(params=["ddp", "fsdp"])
def pair(runs: dict[str, dict[str, Any]], request: pytest.FixtureRequest) -> tuple[dict[str, Any], dict[str, Any]]:
    """What one process saw, and what two did."""
    return runs["one"], runs[request.param]


def test_the_global_batch_is_the_same(pair: tuple[dict[str, Any], dict[str, Any]]) -> None:
    one, two = pair
    assert one["micro_batches"] == 2 * two["micro_batches"] == 3 * 4
    assert len(one["tokens"]) == 3 * 16
    assert one["tokens"] == two["tokens"]  # sampled under AQN and op errors: the same noise for the same rows


def test_metrics_and_adapters_agree_to_rounding(pair: tuple[dict[str, Any], dict[str, Any]]) -> None:
    for one, two in zip(pair[0]["metrics"], pair[1]["metrics"], strict=True):
        one, two = dict(one), dict(two)
        assert one.pop("mismatch") == pytest.approx(two.pop("mismatch"), rel=1e-3, abs=1e-4)
        assert one == pytest.approx(two, rel=1e-4, abs=1e-5)
    for name, parameter in pair[0]["adapters"].items():
        torch.testing.assert_close(parameter, pair[1]["adapters"][name], rtol=1e-3, atol=1e-4)


def test_the_evaluation_is_the_same(pair: tuple[dict[str, Any], dict[str, Any]]) -> None:
    for mode in ("clean", "emulated"):
        one, two = pair[0]["evaluation"][mode], pair[1]["evaluation"][mode]
        assert [row[0] for row in one] == [row[0] for row in two] == [f"p{i}" for i in range(11)]
        assert one == two


def test_the_receipts_are_the_same(pair: tuple[dict[str, Any], dict[str, Any]]) -> None:
    one, two = pair[0]["receipts"], pair[1]["receipts"]
    assert {r["phase"] for r in two} == {"attach", "rollout", "train", "eval"}
    for a, b in zip(one, two, strict=True):
        assert [a[k] for k in ("site", "phase", "stream", "requested")] == [
            b[k] for k in ("site", "phase", "stream", "requested")
        ]
        # Noise is the same to the bit; what a relative error is measured against follows the adapters.
        for name, tolerance in [("requested_sigma", 1e-9), ("realised_sigma", 1e-6), ("sqnr_db", 1e-6)]:
            assert a[name] is None or b[name] == pytest.approx(a[name], rel=tolerance)
        if a["stream"] not in BY_FORWARD:
            assert b["elements"] == a["elements"]


def test_a_checkpoint_holds_whole_adapters(pair: tuple[dict[str, Any], dict[str, Any]]) -> None:
    assert pair[1]["saved"] == pair[0]["saved"]


def test_an_engine_is_sent_the_same_noise(pair: tuple[dict[str, Any], dict[str, Any]]) -> None:
    assert pair[1]["pushed"] == pair[0]["pushed"]
    assert sum(len(row) > 1 for row in pair[0]["pushed"]) == 5


@pytest.mark.parametrize("name", LAUNCHES)
def test_all_ranks_stop_together_and_resume_exactly(runs: dict[str, dict[str, Any]], name: str) -> None:
    run, ranks = runs[name], 1 if name == "one" else 2
    assert run["interrupted_at"] == [1] * ranks
    assert run["resumed_exactly"] == [True] * ranks
    assert run["resumed_metrics_equal"]
