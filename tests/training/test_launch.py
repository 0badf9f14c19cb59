"""A run has as many processes as were asked for, whatever the launcher did."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from stubs import Run, tiny_model

from aqnsim._errors import ConfigError, RealisationError
from training.arguments import grpo_config
from training.config import load
from training.dryrun import STEPS, shrunk
from training.launch.world import WorldError, join
from training.sharding import attest_sharding

ROOT = Path(__file__).parents[2]
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
ACCELERATE = ("-m", "accelerate.commands.launch")
CONFIGS = str(ROOT / "training" / "launch") + os.sep
JOIN = """
import sys
from training.launch.world import join
sys.stdout.write(f"{join(int(sys.argv[1])).num_processes} here\\n")  # in one piece, as processes share the output
"""


def start(*arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, *arguments],
        env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


@pytest.fixture
def script(tmp_path: Path) -> str:
    path = tmp_path / "join.py"
    path.write_text(JOIN)
    return str(path)


def test_accelerate_on_a_cpu_starts_one_process_and_the_run_refuses(script: str) -> None:
    done = start(*ACCELERATE, "--cpu", "--num_processes", "2", script, "2")
    assert done.returncode != 0
    assert "2 processes were asked for and 1 run" in done.stderr


@pytest.mark.parametrize(
    "launcher", [TORCHRUN, (*ACCELERATE, "--config_file", CONFIGS + "ddp.yaml", "--num_processes", "2")]
)
def test_launchers_that_start_what_they_are_asked_for(script: str, launcher: tuple[str, ...]) -> None:
    assert start(*launcher, script, "2").stdout.count("2 here") == 2


def test_another_number_is_refused(script: str) -> None:
    done = start(*TORCHRUN, script, "3")
    assert done.returncode != 0
    assert "3 processes were asked for and 2 run" in done.stderr


@pytest.mark.parametrize(
    ("variable", "value", "error", "message"),
    [
        ("ACCELERATE_MIXED_PRECISION", "no", WorldError, "say how many there should be"),
        ("ACCELERATE_MIXED_PRECISION", "bf16", ConfigError, "ACCELERATE_MIXED_PRECISION=bf16"),
        ("FSDP_CPU_RAM_EFFICIENT_LOADING", "true", ConfigError, "each needs them"),
        ("ACCELERATE_USE_FSDP", "true", ConfigError, "FSDP1"),
        ("WORLD_SIZE", "2", WorldError, "2 processes were asked for and 1 run"),
    ],
)
def test_what_a_launcher_may_not_leave_open_or_change(
    monkeypatch: pytest.MonkeyPatch, variable: str, value: str, error: type[Exception], message: str
) -> None:
    if variable == "WORLD_SIZE":  # as of a launcher whose processes were never connected
        join(1)
    monkeypatch.setenv(variable, value)
    with pytest.raises(error, match=message):
        join()


def test_one_process_has_nothing_to_shard_over() -> None:
    algorithm = load("e12", "smoke").algorithm
    with pytest.raises(ConfigError, match="there is one"):
        grpo_config(algorithm, output_dir="runs", seed=0, world_size=1, fsdp=True)


def test_whole_weights_are_refused_where_shards_were_asked_for() -> None:
    attest_sharding(tiny_model(), asked=False)
    with pytest.raises(RealisationError, match=r"embed_tokens\.weight is whole, but --fsdp was asked for"):
        attest_sharding(tiny_model(), asked=True)


def test_a_run_is_resumed_with_shards_only_if_it_had_them(tmp_path: Path) -> None:
    Run(tmp_path, steps=2, save_every=1).train()
    (tmp_path / "checkpoint-1" / "pytorch_model_fsdp.bin").touch()
    with pytest.raises(ConfigError, match="checkpoint-1 is of a run with --fsdp"):
        Run(tmp_path, steps=2).train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))


def test_a_dry_run_keeps_all_but_the_scale() -> None:
    paper = load("e12", "paper")
    small = shrunk(paper, processes=2)
    assert small.model.name == "tiny-qwen2"
    assert small.total_steps == STEPS
    assert (small.profile, small.aqn) == (paper.profile, paper.aqn)
    same = {
        "clip_low",
        "clip_high",
        "learning_rate",
        "weight_decay",
        "max_grad_norm",
        "dynamic_sampling",
        "temperature",
    }
    for name in same:
        assert getattr(small.algorithm, name) == getattr(paper.algorithm, name)


def test_the_paper_run_is_rehearsed_in_shards_that_accelerate_asks_for(tmp_path: Path) -> None:
    launcher = [*ACCELERATE, "--config_file", CONFIGS + "fsdp2.yaml", "--num_processes", "2", "-m", "training"]
    done = start(*launcher, "run", "e12", "--preset", "paper", "--dry-run", "--processes", "2", "--runs", str(tmp_path))
    assert done.returncode == 0, done.stderr[-4000:]
    assert "Qwen/Qwen2.5-1.5B-Instruct (bfloat16) on 2 processes, profile mxfp4-w4a16, 29 steps" in done.stdout
    (run,) = tmp_path.iterdir()
    assert (run / f"checkpoint-{4 * STEPS}" / "pytorch_model_fsdp.bin").exists()  # 4 updates a step
    assert json.loads((run / "run.json").read_text())["processes"] == 2
    assert json.loads((run / "status.json").read_text())["state"] == "finished"
    steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert len(steps) == STEPS
    for step in steps:
        assert step["sigma_realised"] == pytest.approx(step["sigma_requested"], rel=0.25)
    assert any(step["sigma_requested"] > 0 for step in steps)
    assert (run / "adapter" / "adapter_model.safetensors").stat().st_size > 1000
