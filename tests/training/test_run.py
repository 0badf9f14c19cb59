"""Whole runs of the smoke preset: what a user gets, what a failure looks like, and that resuming changes nothing."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import aqnsim
from aqnsim import AQN, ConfigError, RealisationError
from aqnsim.aqn import Constant, Zone
from training import run as run_module
from training.callbacks import AqnCallback
from training.compare import compare, render
from training.run import run
from training.rundir import RunDirectory

ROOT = Path(__file__).resolve().parents[2]
SIGMAS = [0, 0, *(0.05 * 0.01 ** (i / 9) for i in range(10))]  # 12 steps, 10 stages after a warm-up


def rows(path: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (path / name).read_text().splitlines()]


def untimed(path: Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if k != "seconds"} for row in rows(path, "metrics.jsonl")]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def e12(runs: Path) -> Path:
    return run("e12", preset="smoke", runs=runs)


@pytest.fixture(scope="module")
def control(runs: Path) -> Path:
    return run("e6a-lora-mxfp4", preset="smoke", runs=runs)


def test_a_finished_run_holds_everything_that_its_reader_needs(e12: Path) -> None:
    assert RunDirectory.open(e12).status.state == "finished"
    evaluation = json.loads((e12 / "evaluation.json").read_text())
    assert evaluation["is_final"]
    assert evaluation["step"] == 12
    assert evaluation["fingerprint"] == aqnsim.profiles.load("mxfp4-w4a16").fingerprint
    problems = rows(e12, "problems.jsonl")
    counts = {(step, mode): 0 for step in (0, 12) for mode in ("clean", "emulated")}
    for problem in problems:
        counts[problem["step"], problem["mode"]] += 1
    assert set(counts.values()) == {48}
    assert (e12 / "run.png").stat().st_size > 10_000
    assert list(e12.glob("events.out.tfevents*")) or list(e12.rglob("events.out.tfevents*"))
    adapter = load_file(e12 / "adapter" / "adapter_model.safetensors")
    assert any(t.abs().max() > 0 for name, t in adapter.items() if "lora_B" in name)


def test_sigma_follows_the_schedule_and_is_realised(e12: Path) -> None:
    metrics = rows(e12, "metrics.jsonl")
    requested = [row["sigma_requested"] for row in metrics]
    assert requested == pytest.approx(SIGMAS)
    for row in metrics:
        assert row["sigma_realised"] == pytest.approx(row["sigma_requested"], rel=0.25)


def test_receipts_name_every_linear_and_norm_but_no_adapter(e12: Path) -> None:
    receipts = json.loads((e12 / "receipts.json").read_text())
    cast = {r["site"] for r in receipts if r["phase"] == "attach" and r["requested"] == "mxfp4"}
    noisy = {r["site"] for r in receipts if r["stream"] == "aqn"}
    assert len(cast) == 21  # 3 layers of 7
    assert len(noisy) == 7  # 2 norms a layer and the last one
    assert not any("lora" in site or "lm_head" in site for site in cast | noisy)
    assert {r["phase"] for r in receipts if r["stream"] == "aqn"} == {"rollout"}


def test_compare_refuses_a_winner_in_a_run_this_small(e12: Path, control: Path) -> None:
    comparison = compare(e12, control)
    from rich.console import Console

    console = Console(record=True, width=160)
    console.print(render(comparison))
    text = console.export_text()
    assert "no finding" in text
    assert "aqn" in text


def test_control_and_arm_see_the_same_problems_and_start_from_the_same_model(e12: Path, control: Path) -> None:
    def start(path: Path) -> list[tuple[Any, ...]]:
        return [(r["problem_id"], r["mode"], r["completion"]) for r in rows(path, "problems.jsonl") if r["step"] == 0]

    assert start(e12) == start(control)


def test_an_interrupted_and_resumed_run_is_the_same_run(
    e12: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = run_module.StepRecorder.write

    def interrupt_at_five(self: Any, metrics: dict[str, Any]) -> None:
        write(self, metrics)
        if metrics["step"] == 5:
            os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patched:
        patched.setattr(run_module.StepRecorder, "write", interrupt_at_five)
        with pytest.raises(KeyboardInterrupt):
            run("e12", preset="smoke", runs=tmp_path)
    (path,) = (p for p in tmp_path.iterdir() if p.is_dir())
    assert RunDirectory.open(path).status.state == "interrupted"
    run("e12", preset=None, resume=path)
    assert untimed(path) == untimed(e12)
    for name in ("receipts.jsonl", "receipts.json", "problems.jsonl", "evaluation.json"):
        assert (path / name).read_text() == (e12 / name).read_text(), name
    for name in ("adapter_model.safetensors",):
        assert (path / "adapter" / name).read_bytes() == (e12 / "adapter" / name).read_bytes()


def test_two_processes_give_the_same_receipts(e12: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "-m", "training"]
    arguments = ["run", "e12", "--preset", "smoke", "--runs", str(tmp_path), "--set", "algorithm.micro_batch_size=32"]
    done = subprocess.run(
        [*command, *arguments], cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (path,) = (p for p in tmp_path.iterdir() if p.is_dir())
    assert json.loads((path / "run.json").read_text())["processes"] == 2
    one, two = rows(e12, "metrics.jsonl"), rows(path, "metrics.jsonl")
    assert [r["sigma_requested"] for r in two] == [r["sigma_requested"] for r in one]
    assert [r["sigma_realised"] for r in two] == pytest.approx([r["sigma_realised"] for r in one], rel=1e-9)

    def asked(run_path: Path) -> list[tuple[str, ...]]:
        receipts = json.loads((run_path / "receipts.json").read_text())
        return [(r["site"], r["phase"], r["stream"], r["requested"]) for r in receipts]

    assert asked(path) == asked(e12)


# ---- requested, and not realised: the run fails and says why --------------------------------------------------------


def failed_message(runs: Path) -> str:
    (path,) = (p for p in runs.iterdir() if p.is_dir())
    status = RunDirectory.open(path).status
    assert status.state == "failed"
    return str(status.message)


def test_a_schedule_that_nobody_advances_fails_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A trainer that forgets to advance the schedule leaves sigma at its first value, which is 0."""
    monkeypatch.setattr(AqnCallback, "on_step_begin", lambda *args, **kwargs: None)
    with pytest.raises(RealisationError, match="never advanced"):
        run("e12", preset="smoke", runs=tmp_path)
    assert "never advanced" in failed_message(tmp_path)


def test_noise_that_does_not_reach_the_rollout_fails_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The log says sigma = 0.05; the model that generates never sees it."""
    phase = aqnsim.Emulation.phase
    monkeypatch.setattr(
        aqnsim.Emulation, "phase", lambda self, name: phase(self, "eval" if name == "rollout" else name)
    )
    with pytest.raises(RealisationError, match=r"asked for sigma 0\.05 and 0 of it was realised on 0 weights"):
        run("e12", preset="smoke", runs=tmp_path)
    assert "realised" in failed_message(tmp_path)


def test_a_run_too_short_for_its_schedule_is_refused_before_it_starts(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="0 at every one of 1 steps"):
        run("e12", preset="smoke", overrides=["algorithm.steps=1"], runs=tmp_path)
    assert not list(tmp_path.iterdir())


def test_layer_multipliers_reach_the_norms(tmp_path: Path) -> None:
    """Multipliers that are declared but not delivered would leave all layers alike."""
    overrides = ["aqn.multipliers={0=1.0}", "aqn.default_multiplier=0.0", "algorithm.steps=12"]
    path = run("e12", preset="smoke", overrides=overrides, runs=tmp_path)
    receipts = json.loads((path / "receipts.json").read_text())
    noisy = {r["site"] for r in receipts if r["stream"] == "aqn"}
    assert noisy == {f"model.layers.0.{n}" for n in ("input_layernorm", "post_attention_layernorm")}


def test_the_ideal_profile_scores_the_same_clean_and_emulated(tmp_path: Path) -> None:
    path = run("e7a-lora-bf16", preset="smoke", overrides=["algorithm.steps=2"], runs=tmp_path)
    problems = rows(path, "problems.jsonl")
    answers = {
        mode: [(p["step"], p["problem_id"], p["completion"]) for p in problems if p["mode"] == mode]
        for mode in ("clean", "emulated")
    }
    assert answers["clean"] == answers["emulated"]
    assert json.loads((path / "receipts.json").read_text()) == []


def test_resuming_another_experiments_run_is_refused(e12: Path) -> None:
    with pytest.raises(ConfigError, match="is a run of 'e12'"):
        run("e6a-lora-mxfp4", preset=None, resume=e12)


def test_the_realised_sigma_is_the_schedule_s_whatever_scales_it_at_a_site() -> None:
    model = nn.ModuleDict({"layers": nn.ModuleList(nn.Sequential(nn.RMSNorm(4096, eps=1e-6)) for _ in range(3))})
    zones = (Zone(0, 0, schedule=Constant(0.3)), Zone(1, 1, multiplier=0.5))
    with aqnsim.emulate(model, "ideal", aqn=AQN(Constant(0.1), zones=zones, relative_to="rms")) as emulation:
        emulation.begin_step(0, 1)
        with emulation.phase("rollout"):
            for layer in model["layers"]:  # type: ignore[attr-defined]
                layer(torch.ones(2, 4096))
        receipts = emulation.receipts()
        assert run_module.realised_aqn_sigma(emulation, receipts, 0) == pytest.approx(0.1, rel=0.05)
        with pytest.raises(RealisationError, match=r"step 0: AQN asked for sigma 0.1 and 0 of it was realised"):
            run_module.realised_aqn_sigma(emulation, [], 0)
        scaled = [dataclasses.replace(receipts[0], realised_sigma=0.1), *receipts[1:]]
        with pytest.raises(RealisationError, match="is not what the rollout saw"):
            run_module.realised_aqn_sigma(emulation, scaled, 0)
