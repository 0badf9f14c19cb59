"""Robustness curves: every point happened as asked, says under which profile, and is made once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import fake_runs
import matplotlib.image
import pytest
import torch
from fake_runs import WriteRun
from stubs import LORA, holds_answer, problems, tiny_model, tiny_tokenizer
from typer.testing import CliRunner

import aqnsim
from aqnsim import ConfigError, RealisationError
from aqnsim.profiles import Forward, OpSpec, Profile, Rule, load
from training import curves, robustness, trained
from training.__main__ import app
from training.adapters import attach_lora
from training.robustness import attest_noise, plan, with_noise
from training.rundir import RunDirectory
from training.trained import Trained

write_run = fake_runs.write_run


@pytest.fixture
def run(write_run: WriteRun, monkeypatch: pytest.MonkeyPatch) -> RunDirectory:
    """A run of e12 whose adapters do something, on a tiny random model."""
    made = write_run("e12", fingerprint=load("mxfp4-w4a16").fingerprint, seed=3)
    save_adapters(made.path / "adapter", seed=0)

    def load_model(name: str, dtype: str) -> tuple[Any, Any]:
        return tiny_model(), tiny_tokenizer()

    class Task:
        def problems(self, split: str, count: int, seed: int) -> Any:
            return problems(count)

        score = staticmethod(holds_answer)
        end = " "

    monkeypatch.setattr(trained, "load_model", load_model)
    monkeypatch.setattr(trained, "task_of", lambda table: Task())
    return made


def save_adapters(folder: Path, seed: int) -> None:
    model = attach_lora(tiny_model(), LORA, seed=seed)
    torch.manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data = 0.05 * torch.randn_like(parameter)
    model.save_pretrained(str(folder))


def test_points_are_attested_and_name_their_profiles(run: RunDirectory) -> None:
    points = robustness.robustness([run.path], noise=[0, 0.05], draws=2)
    assert [(p.merged, p.profile, p.noise, p.seed) for p in points] == [
        (merged, profile, noise, seed)
        for merged in (False, True)
        for profile in ("ideal", "mxfp4-w4a16")
        for noise, seed in ((0.0, 3), (0.05, 3), (0.05, 4))
    ]
    for point in points:
        assert (point.trained_under, point.trained_fingerprint) == ("mxfp4-w4a16", load("mxfp4-w4a16").fingerprint)
        assert point.evaluated_under == with_noise(load(point.profile), point.noise).fingerprint
        if point.noise:
            assert point.noisy_sites == 14
            assert point.realised == pytest.approx(0.05, rel=0.02)
        else:
            assert (point.noisy_sites, point.realised) == (0, None)
    assert len({point.logits for point in points}) == len(points)  # every draw, profile and form is another forward
    assert [p.as_recorded for p in points] == [None, None, None, False, *[None] * 8]  # the fake run's answers are "7"


def test_done_points_are_skipped_and_missing_ones_made_again(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"noise": [0, 0.05], "draws": 2, "forms": [False]}
    points = robustness.robustness([run.path], **options)
    lines = (run.path / "robustness.jsonl").read_text().splitlines()
    assert len(lines) == 6
    (run.path / "robustness.jsonl").write_text("".join(f"{line}\n" for line in lines[:2] + lines[3:]))
    made = []
    evaluate = robustness.Bench._point
    monkeypatch.setattr(robustness.Bench, "_point", lambda self, point: made.append(point) or evaluate(self, point))
    assert robustness.robustness([run.path], **options) == points
    assert [(point.base.name, point.noise, point.seed) for point in made] == [("ideal", 0.05, 4)]
    save_adapters(run.path / "adapter", seed=1)  # other adapters are other points
    robustness.robustness([run.path], **options)
    assert len(made) == 7


def test_without_noise_clean_hardware_is_the_model_itself(run: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    (point,) = robustness.robustness([run.path], profiles=["clean"], noise=[0], forms=[True])
    (noisy,) = robustness.robustness([run.path], profiles=["clean"], noise=[1e-4], draws=1, forms=[True])
    assert noisy.logits != point.logits
    monkeypatch.setattr(robustness.Bench, "_clean", lambda self: (point.answers, noisy.logits))
    (run.path / "robustness.jsonl").unlink()
    with pytest.raises(RealisationError, match="without noise, clean hardware gives other results"):
        robustness.robustness([run.path], profiles=["clean"], noise=[0], forms=[True])
    assert not (run.path / "robustness.jsonl").exists()


def test_noise_that_a_layer_lost_is_an_error() -> None:
    model = tiny_model()
    emulation = aqnsim.emulate(model, with_noise(load("ideal"), 0.05))
    model.model.layers[1].mlp.up_proj.__class__ = torch.nn.Linear
    with emulation.phase("eval"):
        model(torch.ones(1, 4, dtype=torch.int64))
    with pytest.raises(RealisationError, match=r"layers\.1\.mlp\.up_proj"):
        attest_noise(emulation)


def test_noise_too_small_for_the_dtype_is_an_error() -> None:
    model = tiny_model().bfloat16()
    emulation = aqnsim.emulate(model, with_noise(load("ideal"), 1e-6))
    with emulation.phase("eval"):
        model(torch.ones(1, 4, dtype=torch.int64))
    with pytest.raises(RealisationError, match="changed no value"):
        attest_noise(emulation)


def test_a_checkpoint_is_evaluated_as_its_step(run: RunDirectory, tmp_path: Path) -> None:
    save_adapters(run.path / "checkpoint-5", seed=2)
    (point,) = robustness.robustness([run.path / "checkpoint-5"], profiles=["trained"], noise=[0], forms=[False])
    assert (point.step, point.as_recorded) == (5, None)
    (run.path / "adapter" / "adapter_model.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"has no adapter_model\.safetensors: expected the directory of a finished"):
        Trained.find(run.path)


def test_a_profile_that_was_edited_since_is_refused(write_run: WriteRun) -> None:
    made = write_run("e12", fingerprint="4d" * 8)
    save_adapters(made.path / "adapter", seed=0)
    with pytest.raises(ConfigError, match="with fingerprint 4d4d4d4d4d4d4d4d, which is 47b36c571abd37d0 now"):
        plan(Trained.find(made.path), ["trained"], [0], 1)


def test_noise_keeps_what_the_profile_keeps() -> None:
    noisy = with_noise(load("ideal"), 0.05)
    assert noisy.exclude == ("lm_head", "embedding", "router")
    sites = {site.name for site in aqnsim.emulate(tiny_model(), noisy).sites}
    assert len(sites) == 14
    assert "lm_head" not in sites
    kept = Rule(kind="linear", sites=("*.layers.0.*",))
    cast = Rule(kind=("linear", "matmul"), spec=OpSpec(forward=Forward(weight="mxfp4")))
    rules = with_noise(Profile(name="p", description="", source={"a": "b"}, rules=(kept, cast)), 0.05).rules
    assert [(r.kinds, r.spec.forward.error) for r in rules] == [
        (("linear",), None),
        (("matmul",), None),
        (("linear",), "relative-gaussian(sigma=0.05)"),
    ]


def test_a_rule_of_other_phases_leaves_the_evaluation_to_the_noise() -> None:
    spec = OpSpec(forward=Forward(weight="mxfp4"))
    in_rollouts = Rule(kind="linear", phases=("rollout",), spec=spec)
    noisy = with_noise(Profile(name="p", description="", source={"a": "b"}, rules=(in_rollouts,)), 0.05)
    rule = noisy.rule_for("linear", "model.layers.0.mlp.up_proj", phase="eval")
    assert rule is not None
    assert noisy.rules[rule].spec == OpSpec(forward=Forward(error="relative-gaussian(sigma=0.05)"))


def test_noise_on_noise_adds_its_squares_and_on_anything_else_is_refused() -> None:
    assert with_noise(load("noise-5pct-matmul"), 0.12).rules[0].spec.forward.error == "relative-gaussian(sigma=0.13)"
    assert with_noise(load("noise-5pct-matmul"), 0) == load("noise-5pct-matmul")
    error = OpSpec(forward=Forward(error="dead-zone(threshold=0.1)"))
    other = Profile(name="p", description="", source={"a": "b"}, rules=(Rule(kind="linear", spec=error),))
    with pytest.raises(ConfigError, match="could not tell noise on top of it from it"):
        with_noise(other, 0.05)


def test_the_command_writes_json_table_and_picture(run: RunDirectory, tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = ["robustness", str(run.path), "--noise", "0,0.1", "--draws", "3", "--form", "unmerged"]
    result = CliRunner().invoke(app, [*arguments, "--out", str(out)])
    assert result.exit_code == 0, result.output
    assert "0 of 8 points are done" in result.stdout
    content = json.loads((out / "robustness.json").read_text())
    assert [row["noise, %"] for row in content["table"]] == ["0", "10"] * 2
    assert [row["draws"] for row in content["table"]] == ["none", "3"] * 2
    assert len(content["points"]["e12, seed 3"]) == 8
    assert matplotlib.image.imread(out / "robustness.png").shape[:2] == (715, 1430)
    (clean, own) = curves.curves({"e12": run.read_jsonl("robustness.jsonl", robustness.RobustnessPoint)})
    assert (clean.label, own.label) == ("e12, step 12: ideal", "e12, step 12: mxfp4-w4a16 (trained with)")
    assert CliRunner().invoke(app, [*arguments[:2], "--noise", "a,b"]).exit_code == 2
    assert CliRunner().invoke(app, [*arguments[:2], "--form", "both?"]).exit_code == 2
