"""What a plan tells, against what is known of the runs that it plans."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from training.__main__ import app
from training.architectures import ARCHITECTURES, architecture, without_weights
from training.models import load_model
from training.plan import Count, Plan, plan

runner = CliRunner()


def planned(experiment: str, preset: str, *overrides: str) -> Plan:
    return plan(experiment, preset, list(overrides), runs=Path("nowhere"))


def test_the_shapes_are_those_of_the_model() -> None:
    real, _ = load_model("tiny", dtype="float32")
    shapes = {name: p.shape for name, p in without_weights(architecture("tiny"), "float32").named_parameters()}
    assert shapes == {name: p.shape for name, p in real.named_parameters()}


def test_the_parameters_are_as_many_as_the_models_are_said_to_have() -> None:
    counts = {
        name: sum(p.numel() for p in without_weights(architecture(name), "bfloat16").parameters())
        for name in ARCHITECTURES
    }
    assert counts["smollm2-135m-instruct"] == 134_515_008
    assert counts["Qwen/Qwen2.5-1.5B-Instruct"] == 1_543_714_304


def test_the_plan_of_e12_on_paper() -> None:
    made = planned("e12", "paper")
    assert (made.size.steps, made.size.updates) == (29, 116)
    assert made.size.generation_batches == Count(29, 145)
    assert made.size.prompts == Count(29 * 256, 145 * 256)
    (noise,) = made.noise
    assert noise.where == "layers 0-27 and the last norm"
    assert noise.sigma[:3] == (0.0, 0.0, 0.0)
    assert (max(noise.sigma), noise.sigma[-1]) == (0.05, pytest.approx(0.0005))
    casts = {site.role: site.count for site in made.sites if site.asked == "forward.weight = mxfp4"}
    assert casts == dict.fromkeys(("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"), 28)
    rank_32 = 32 * 28 * (2 * (1536 + 1536) + 2 * (1536 + 256) + 3 * (1536 + 8960))  # q and o, k and v, the MLP
    assert made.memory.trained == 2 * rank_32
    assert made.memory.weights == 2 * (1_543_714_304 + rank_32)
    assert {d.key.split(".")[0] for d in made.differences or ()} == {"aqn"}


def test_layers_that_differ_are_told_apart() -> None:
    groups = {noise.where: max(noise.sigma) for noise in planned("e9a-high-sigma", "paper").noise}
    assert groups == {"layers 14-17": 0.05}
    zones = {noise.where: noise.sigma for noise in planned("e14a", "paper").noise}
    edge, middle = zones["layers 0-5, 23-27 and the last norm"], zones["layers 6-22"]
    assert middle[:15] == edge[:15]
    assert middle[15:] == tuple(sigma / 2 for sigma in edge[15:])


def test_kept_layers_and_directions_are_in_the_plan() -> None:
    assert {site.count for site in planned("e13h", "paper").sites} == {26}
    asked = {
        site.asked.partition(".")[0] for site in planned("e8d-backward-only", "smoke").sites if site.asked != "AQN"
    }
    assert asked == {"grad_input", "grad_weight"}


def test_a_control_gets_the_overrides_but_for_what_is_asked_about() -> None:
    made = planned("e12", "smoke", "aqn.sigma_start=0.1", "lora.rank=8")
    assert {d.key.split(".")[0] for d in made.differences or ()} == {"aqn"}


def test_the_command_prints_the_plan_and_its_json() -> None:
    arguments = ["plan", "e14a", "--preset", "smoke", "--runs", "nowhere"]
    shown = runner.invoke(app, arguments, env={"COLUMNS": "80"})
    assert shown.exit_code == 0, shown.output
    assert max(map(len, shown.stdout.splitlines())) <= 80
    made = json.loads(runner.invoke(app, [*arguments, "--json"]).stdout)
    assert made["size"]["steps"] == 12
    assert made["memory"]["total"] > made["memory"]["weights"] > 0
    assert made["duration"]["seconds"] > 0


def test_a_model_whose_shapes_are_not_known_is_named() -> None:
    refused = runner.invoke(app, ["plan", "e12", "--preset", "smoke", "--set", 'model.name="other/model"'])
    assert refused.exit_code == 2
    assert "model.name = 'other/model': its shapes are not known here" in refused.stderr
