"""Two gloo processes under DDP or FSDP2 compute what one does that accumulates over the same micro-batches."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed_worker import CASES
from mixed import assert_all_same
from values import same_bits

WORKER = Path(__file__).with_name("distributed_worker.py")
LAUNCHER = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
EXACT = ("site", "phase", "stream", "requested", "calls", "elements", "changed", "saturated", "nonfinite")
SUMS = ("requested_sigma", "realised_sigma", "sqnr_db")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Any]:
    directory = tmp_path_factory.mktemp("distributed")
    for launcher in ((), LAUNCHER):
        path = os.pathsep.join([str(WORKER.parent), str(WORKER.parents[1]), os.environ.get("PYTHONPATH", "")])
        done = subprocess.run(
            [sys.executable, *launcher, str(WORKER), str(directory)],
            env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=240,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-4000:]
    return {n: torch.load(directory / f"{n}.pt", weights_only=False) for n in (1, 2)}


@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_two_processes_compute_what_one_does(runs: dict[int, Any], case: tuple[str, str, str]) -> None:
    one, two = runs[1][case[1]], runs[2][case]
    assert two["sites"] == one["sites"]
    assert same_bits(two["outputs"], one["outputs"])
    assert same_bits(two["clean"], one["clean"])  # off()
    assert same_bits(two["emulated"], one["emulated"])
    # a sum of two halves has one order: not even that rounds differently
    assert list(two["gradients"]) == list(one["gradients"])
    assert_all_same(list(two["gradients"].values()), list(one["gradients"].values()))


@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_their_receipts_add_up_to_the_one_s(runs: dict[int, Any], case: tuple[str, str, str]) -> None:
    one, two = runs[1][case[1]]["receipts"], runs[2][case]["receipts"]
    assert [[r[k] for k in EXACT] for r in two] == [[r[k] for k in EXACT] for r in one]
    for a, b in zip(two, one, strict=True):
        known = [k for k in SUMS if b[k] is not None]
        assert [a[k] for k in known] == [pytest.approx(b[k], rel=1e-9) for k in known]


@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_the_wrapper_outlives_the_emulation(runs: dict[int, Any], case: tuple[str, str, str]) -> None:
    assert runs[2][case]["restored"]
    names = runs[2][case]["classes"]
    assert any(n.startswith("FSDP") for n in names) == (case[0] == "fsdp")
    assert not any("Emulated" in n for n in names)
    masters = runs[1][case[1]]["masters"]
    assert runs[2][case]["masters"].keys() == masters.keys()
    assert all(same_bits(runs[2][case]["masters"][n], w) for n, w in masters.items())


@pytest.mark.parametrize(
    ("act", "expected"),
    [
        ("attach", "is sharded already, and cast(W) cannot be written into it: emulate the model first"),
        ("off", "was changed since the profile was attached"),
        ("restore", "restore(keep_weights=True) keeps what is there"),
        ("refresh", "is sharded, and a shard cannot be cast on its own"),
    ],
)
def test_what_sharded_weights_cannot_do_is_refused(runs: dict[int, Any], act: str, expected: str) -> None:
    assert expected in runs[2]["refused"][act]
