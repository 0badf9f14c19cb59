"""Every experiment: it attaches to a model, and in a short run it does what it asks for, as its receipts say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from aqnsim.aqn import layer_of
from training.architectures import architecture, narrowed
from training.config import KINDS, Algorithm, Experiment, ModelTable, ProfileTable, Table, TaskTable, ZoneTable, load
from training.hardware import build_aqn, build_profile
from training.plan import attached, noise_of, sites_of
from training.run import Arm, run
from training.rundir import RunDirectory
from training.sources import KIND_KEYS, names

LAYERS = 3  # of the smoke preset's model
SHORT = [
    "task.eval_problems=8",
    "algorithm.prompts_per_step=4",
    "algorithm.group_size=4",
    "algorithm.micro_batch_size=16",
]
EXPERIMENTS = {name: load(name, "smoke") for name in names()}


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_attaches_and_reaches_all_that_it_names(name: str) -> None:
    e = EXPERIMENTS[name]
    emulation = attached(e, narrowed(architecture("tiny")), seed=0)
    asked = {site.asked for site in sites_of(emulation)}
    assert bool(asked - {"AQN"}) == (e.profile.name != "ideal")
    assert bool(noise_of(emulation, e.total_steps)) == (e.aqn.schedule != "none")
    directions = {text.partition(".")[0] for text in asked - {"AQN"}}
    if e.profile.directions != "both":
        assert directions <= ({"forward"} if e.profile.directions == "forward" else {"grad_input", "grad_weight"})
    kept = {layer % LAYERS for layer in e.profile.keep_layers}
    emulated = {layer_of(s.name) for s in emulation.sites if any(not spec.is_empty for spec in s.specs.values())}
    assert not kept & emulated


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_a_short_run_realises_what_the_experiment_asks_for(name: str, tmp_path: Path) -> None:
    e = load(name, "smoke", [*SHORT, f"algorithm.steps={3 * EXPERIMENTS[name].algorithm.epochs}"])
    path = run(name, preset="smoke", overrides=[*SHORT, f"algorithm.steps={e.total_steps}"], runs=tmp_path)
    assert RunDirectory.open(path).status.state == "finished"
    receipts = json.loads((path / "receipts.json").read_text())
    _check_noise(e, path, [r for r in receipts if r["stream"] == "aqn"])
    _check_hardware(e, [r for r in receipts if r["stream"] != "aqn"])
    assert ("reference" in {r["phase"] for r in receipts}) == bool(e.algorithm.kl and e.profile.name != "ideal")


def test_every_setting_is_read_by_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A setting that nothing reads is a wish that is silently ignored. Validation is over when reading is recorded."""
    steps = "algorithm.steps=3"
    e = load("e14a", "smoke", [*SHORT, steps, "algorithm.dynamic_sampling=true"])
    more = (["multipliers.1=1"], ['schedule="constant"', "sigma=0.1"], ["zones=[{first=0,last=1,multiplier=1}]"])
    noises = [load("e12", "smoke", [steps, *(f"aqn.{text}" for text in texts)]) for texts in more]
    read: set[str] = set()
    plain = Table.__getattribute__

    def recording(self: Table, name: str) -> Any:
        read.update(f"{cls.__name__}.{name}" for cls in type(self).__mro__)
        return plain(self, name)

    monkeypatch.setattr(Table, "__getattribute__", recording)
    arm = Arm(e, 0)
    directory = RunDirectory.create(tmp_path, e, seed=0, fingerprint=arm.emulation.profile.fingerprint)
    arm.run(directory, Console(quiet=True), resuming=False)
    for noise in noises:
        build_aqn(noise, layers=LAYERS)
    tables = [ProfileTable, Algorithm, ModelTable, ZoneTable, *(kind for kinds in KINDS.values() for kind in kinds)]
    declared = {f"{cls.__name__}.{key}" for cls in tables for key in cls.model_fields.keys() - {*KIND_KEYS.values()}}
    declared |= {"Algorithm.name", "ProfileTable.name", "ModelTable.name"}
    assert declared - read == {"Gsm8kTask.data", *(f"Gsm8kTask.{key}" for key in TaskTable.model_fields)}
    assert load("e14a", "paper").task.parameters == {"data": "openai/gsm8k"}  # which a task is made with


def _check_noise(e: Experiment, path: Path, receipts: list[dict[str, Any]]) -> None:
    metrics = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    assert len(metrics) == e.total_steps
    aqn = build_aqn(e, layers=LAYERS)
    if aqn is None:
        assert receipts == []
        assert {row["sigma_realised"] for row in metrics} == {None}
        return
    assert {r["phase"] for r in receipts} == {"rollout"}
    noisy = {layer_of(r["site"]) for r in receipts}
    assert noisy == {i for i in (None, *range(LAYERS)) if aqn.multiplier(_norm(i))}
    requested = [aqn.schedule.sigma(step, e.total_steps) for step in range(e.total_steps)]
    assert any(requested)
    assert [row["sigma_requested"] for row in metrics] == pytest.approx(requested)
    assert [row["sigma_realised"] for row in metrics] == pytest.approx(requested, rel=0.3)


def _norm(layer: int | None) -> str:
    return "model.norm" if layer is None else f"model.layers.{layer}.input_layernorm"


def _check_hardware(e: Experiment, receipts: list[dict[str, Any]]) -> None:
    profile = build_profile(e, layers=LAYERS)
    kept = {layer % LAYERS for layer in e.profile.keep_layers}
    assert {layer_of(r["site"]) for r in receipts} - {None} == (set(range(LAYERS)) - kept if profile.rules else set())
    asked = {value for rule in profile.rules for _, part in rule.spec.parts for value in part.asked.values()}
    assert {r["requested"] for r in receipts} - {"-"} == asked  # "-" counts the calls of a forward that is exact
