"""Several updates a step, GRPO with KL, the distance between rollout and loss, and training all weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from stubs import Run
from test_dapo import ByPrompt

import aqnsim
from training.batch import deal
from training.checkpoints import latest_checkpoint
from training.mismatch import TokenTally, importance_weights
from training.run import MODEL, run

GRPO = {"name": "grpo", "dynamic_sampling": False}


# ---- several updates a step -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("updates", [1, 2, 4])
@pytest.mark.parametrize("mixed", [1, 4])
def test_a_step_makes_as_many_updates_whatever_was_filtered(tmp_path: Path, updates: int, mixed: int) -> None:
    score = ByPrompt([mixed] * 6)
    run = Run(tmp_path, score=score, steps=2, updates_per_step=updates, micro_batch_size=4).train()
    assert run.trainer.state.global_step == 2 * updates
    assert [m["step"] for m in run.results] == [1, 2]
    assert run.emulation.steps == [(step, 2) for step in (0, 1) for _ in range(updates)]
    rollouts = {(step, ids) for phase, step, ids in run.emulation.seen if phase == "rollout"}
    assert {step for step, _ in rollouts} == {0, 1}
    batches = run.micro_batches
    assert len(batches) == 2 * 4
    for step in (0, 1):
        ids = sorted(int(i) for b in batches[4 * step : 4 * step + 4] for i in b["sequence_ids"])
        assert len(ids) == len(set(ids)) == 16


def test_informative_groups_are_dealt_out_evenly() -> None:
    assert deal([1, 2, 3, 4, 5, 6], 3) == [[1, 4], [2, 5], [3, 6]]  # type: ignore[list-item]


def test_the_ratio_is_1_before_the_first_update_and_not_after_it(tmp_path: Path) -> None:
    seen: list[tuple[float, float]] = []
    made = Run(tmp_path, steps=1, updates_per_step=2, micro_batch_size=8, **GRPO)
    loss_of = made.trainer._compute_loss

    def watching(model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        loss = loss_of(model, inputs)
        now = made.trainer._policy_now[0].detach()
        far = ((now - inputs["old_per_token_logps"]).abs() * inputs["completion_mask"]).max()
        seen.append((made.trainer.state.global_step, float(far)))
        return loss

    made.trainer._compute_loss = watching
    made.train()
    assert [step for step, _ in seen] == [0, 1]
    assert seen[0][1] < 1e-5
    assert seen[1][1] > 1e-3


def test_the_old_policy_has_the_noise_of_the_loss(tmp_path: Path) -> None:
    """With errors of 5 % two draws would differ by far more than an update does."""

    def noisy(model: torch.nn.Module) -> Any:
        return aqnsim.emulate(model, "noise-5pct-matmul", seed=3)

    made = Run(tmp_path, steps=1, updates_per_step=2, micro_batch_size=8, emulate=noisy, learning_rate=1e-30, **GRPO)
    distances: list[float] = []
    count = made.trainer._count

    def watching(inputs: dict[str, torch.Tensor]) -> None:
        now = made.trainer._policy_now[0].detach()
        distances.append(float(((now - inputs["old_per_token_logps"]) * inputs["completion_mask"]).abs().max()))
        count(inputs)

    made.trainer._count = watching
    made.train()
    assert len(distances) == 2
    assert max(distances) < 1e-4
    assert made.results[0]["mismatch"]["std"] > 1e-3  # the rollout's own draw is another


def test_a_resumed_run_goes_on_between_steps(tmp_path: Path) -> None:
    settings = {"updates_per_step": 2, "micro_batch_size": 8, **GRPO}
    whole = Run(tmp_path / "whole", steps=4, save_every=2, **settings).train()
    Run(tmp_path / "part", steps=2, save_every=2, **settings).train()
    checkpoint = latest_checkpoint(tmp_path / "part")
    assert checkpoint is not None
    assert checkpoint.name == "checkpoint-4"
    rest = Run(tmp_path / "part", steps=4, save_every=2, **settings)
    rest.train(resume_from_checkpoint=str(checkpoint))
    assert rest.results == whole.results[2:]
    assert all(torch.equal(a, b) for a, b in zip(rest.adapters.values(), whole.adapters.values(), strict=True))


# ---- GRPO and its KL term -------------------------------------------------------------------------------------------


def test_the_loss_is_grpos_with_its_kl_by_the_formula(tmp_path: Path) -> None:
    """Mean over sequences of means over tokens of -r A + beta (e^d - d - 1), with r = 1 and d = log ref - log p."""
    beta, found = 0.3, []
    made = Run(tmp_path, steps=2, micro_batch_size=16, kl=beta, score=ByPrompt([4, 3]), **GRPO)
    loss_of = made.trainer._compute_loss

    def watching(model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        loss = loss_of(model, inputs)
        now, mask = made.trainer._policy_now[0].detach(), inputs["completion_mask"].float()
        d = inputs["ref_per_token_logps"] - now
        each = -inputs["advantages"][:, None] + beta * (d.exp() - d - 1)
        found.append((float(loss), float(((each * mask).sum(1) / mask.sum(1)).mean()), float((d.abs() * mask).max())))
        return loss

    made.trainer._compute_loss = watching
    made.train()
    for loss, formula, _ in found:
        assert loss == pytest.approx(formula, abs=1e-5)
    assert found[0][2] < 1e-5  # B is 0: the adapters change nothing yet
    assert found[1][2] > 1e-3
    phases = {phase for phase, _, _ in made.emulation.seen}
    assert "reference" in phases
    assert made.results[0]["kl"] == pytest.approx(0, abs=1e-8)
    assert made.results[1]["kl"] > 0


def test_without_kl_nobody_asks_the_reference(tmp_path: Path) -> None:
    made = Run(tmp_path, steps=1).train()
    assert {phase for phase, _, _ in made.emulation.seen} == {"rollout", "train"}


def test_dapo_has_the_mean_over_tokens(tmp_path: Path) -> None:
    found = []
    made = Run(tmp_path, steps=1, micro_batch_size=16, score=ByPrompt([4]))
    loss_of = made.trainer._compute_loss

    def watching(model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        mask, tokens = inputs["completion_mask"].float(), inputs["num_items_in_batch"]
        assert float(mask.sum()) == float(tokens)
        found.append((float(loss_of(model, inputs)), float((-inputs["advantages"][:, None] * mask).sum() / tokens)))
        return loss_of(model, inputs)

    made.trainer._compute_loss = watching
    made.train()
    assert found[0][0] == pytest.approx(found[0][1], abs=1e-6)


# ---- sampling and training ------------------------------------------------------------------------------------------


def test_rollout_and_loss_agree_where_nothing_is_noisy_and_differ_where_something_is(tmp_path: Path) -> None:
    def ideal(model: torch.nn.Module) -> Any:
        return aqnsim.emulate(model, "ideal")

    same = Run(tmp_path / "same", steps=1, emulate=ideal).train().results[0]["mismatch"]
    assert same["max"] < 1e-4
    assert abs(same["k1"]) < 1e-5
    assert same["beyond"] == 0
    noisy = Run(tmp_path / "noisy", steps=1).train().results[0]["mismatch"]  # the stub's noise is AQN's
    assert noisy["std"] > 1e-2
    assert noisy["k3"] > 1e-4


def test_importance_weights_by_hand() -> None:
    train = torch.tensor([[-1.0, -1.0], [-2.0, -0.5]])
    rollout = torch.tensor([[-1.0, -3.0], [-1.0, -0.5]])
    mask = torch.tensor([[1, 1], [1, 0]])
    by_token = torch.tensor([[0.0, 2.0], [-1.0, 0.0]]).exp()
    by_sequence = torch.tensor([[2.0], [-1.0]]).exp()
    for mode, ratio in (("token", by_token), ("sequence", by_sequence)):
        cut = importance_weights(f"{mode}-truncate", 3.0, train, rollout, mask)  # type: ignore[arg-type]
        assert torch.allclose(cut, ratio.clamp(max=3.0))
        dropped = importance_weights(f"{mode}-mask", 3.0, train, rollout, mask)  # type: ignore[arg-type]
        assert torch.allclose(dropped, ratio * (ratio <= 3.0))
    assert torch.equal(importance_weights("report", 3.0, train, rollout, mask), torch.ones(2, 2))


def test_a_correction_weighs_the_advantages(tmp_path: Path) -> None:
    plain = Run(tmp_path / "plain", steps=1, score=ByPrompt([4])).train()
    cut = Run(tmp_path / "cut", steps=1, score=ByPrompt([4]), mismatch="token-truncate", mismatch_limit=1.0).train()
    for a, b in zip(plain.micro_batches, cut.micro_batches, strict=True):
        ids = torch.argsort(a["sequence_ids"]), torch.argsort(b["sequence_ids"])
        log_ratio = (b["old_per_token_logps"] - b["sampling_per_token_logps"]) * b["completion_mask"]
        weights = log_ratio.exp().clamp(max=1.0)
        assert b["advantages"].shape == weights.shape
        assert torch.allclose(b["advantages"][ids[1]], a["advantages"][ids[0]][:, None] * weights[ids[1]], atol=1e-5)


def test_a_tally_of_no_tokens_says_so() -> None:
    assert TokenTally(torch.device("cpu")).result() == {"tokens": 0}


# ---- all weights ----------------------------------------------------------------------------------------------------

FULL = """
extends = "e6a-lora-mxfp4"
[question]
ask = "What does training all weights change?"
[lora]
method = "none"
"""
SHORT = [
    "algorithm.steps=4",
    "algorithm.learning_rate=3e-4",
    "task.eval_problems=8",
    "algorithm.max_generation_batches=1",
]


def test_all_weights_train_as_masters_and_a_resumed_run_ends_with_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    toml = tmp_path / "full.toml"
    toml.write_text(FULL)
    whole = run(str(toml), preset="smoke", overrides=SHORT, runs=tmp_path / "whole")
    from safetensors.torch import load_file

    from training.models import load_model

    trained = load_file(whole / MODEL / "model.safetensors")
    start, _ = load_model("tiny", dtype="float32")
    moved = [n for n, p in start.named_parameters() if n in trained and not torch.equal(p, trained[n])]
    assert len(moved) == len(trained)
    assert json.loads((whole / MODEL / "aqnsim.json").read_text())["profile"] == "mxfp4-w4a16"
    weight = "model.layers.0.mlp.up_proj.weight"
    assert not torch.equal(aqnsim.cast(trained[weight], "mxfp4"), trained[weight])
    receipts = json.loads((whole / "receipts.json").read_text())
    assert {(r["phase"], r["stream"]) for r in receipts} == {(p, "weight") for p in ("rollout", "train", "eval")}

    from training.callbacks import InterruptCallback

    def stop(self: InterruptCallback, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 2:
            self.requested = control.should_save = control.should_training_stop = True

    with monkeypatch.context() as patch:
        patch.setattr(InterruptCallback, "on_step_end", stop)
        with pytest.raises(KeyboardInterrupt):
            run(str(toml), preset="smoke", overrides=SHORT, runs=tmp_path / "part")
    (part,) = (tmp_path / "part").iterdir()
    run("full", preset=None, runs=tmp_path / "part", resume=part)
    again = load_file(part / MODEL / "model.safetensors")
    assert all(torch.equal(trained[n], again[n]) for n in trained)


def test_the_reference_of_a_full_run_is_a_copy_of_the_first_weights(tmp_path: Path) -> None:
    toml = tmp_path / "full.toml"
    toml.write_text(FULL)
    grpo = ["algorithm.name='grpo'", "algorithm.dynamic_sampling=false", "algorithm.kl=0.05", "algorithm.steps=2"]
    path = run(str(toml), preset="smoke", overrides=[*SHORT[1:], *grpo], runs=tmp_path / "runs")
    metrics = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    assert metrics[0]["kl"] == pytest.approx(0, abs=1e-6)
    assert metrics[1]["kl"] > 1e-6
    receipts = json.loads((path / "receipts.json").read_text())
    assert "reference" in {r["phase"] for r in receipts}
