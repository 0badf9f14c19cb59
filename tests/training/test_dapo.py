from __future__ import annotations

import inspect
import itertools
import json
import resource
import signal
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import PeftModel
from stubs import (
    LORA,
    Run,
    StubEmulation,
    algorithm,
    same,
    tiny_model,
    tiny_tokenizer,
)
from transformers import TrainerCallback
from trl import GRPOTrainer

from aqnsim._errors import ConfigError, RealisationError
from training.adapters import attach_lora, check_gradient_flow
from training.arguments import grpo_config
from training.callbacks import InterruptCallback
from training.checkpoints import STAGING, CheckpointError, latest_checkpoint, require_checkpoint
from training.dapo import DapoTrainer, refuse_uncovered_lm_head
from training.prompts import PromptSchedule


class StopAt(TrainerCallback):
    """Ends a run early, as Ctrl-C does."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            control.should_save = control.should_training_stop = True


class Killed(BaseException):
    """Stands for SIGKILL: nothing may catch it, so nothing is cleaned up."""


class ByPrompt:
    """Scores by what the trainer asked for: the n-th batch of completions is right, wrong or mixed.

    `plan` gives for each generation batch how many of its groups are mixed; the others are all wrong.
    """

    def __init__(self, plan: list[int], group_size: int = 4, groups: int = 4) -> None:
        self.plan, self.group_size, self.groups = plan, group_size, groups
        self.calls = itertools.count()

    def __call__(self, completion: str, answer: str) -> bool:
        batch, row = divmod(next(self.calls), self.group_size * self.groups)
        group, member = divmod(row, self.group_size)
        return group >= self.groups - self.plan[batch] and member == 0


# Dynamic sampling


def test_refills_until_the_batch_is_full(tmp_path: Path) -> None:
    run = Run(tmp_path, score=ByPrompt([1, 2, 3, 0]), max_generation_batches=4, steps=1).train()
    (metrics,) = run.results
    assert (metrics["kept_groups"], metrics["generation_batches"]) == (4, 3)
    assert not metrics["starved"]
    # Mixed groups are the last of each batch: one of batch 0, two of batch 1, the first of three of batch 2.
    ids = sorted(int(i) for batch in run.micro_batches for i in batch["sequence_ids"])
    groups = [3, 4 + 2, 4 + 3, 8 + 1]
    assert ids == [4 * group + member for group in groups for member in range(4)]
    assert all(batch["completion_mask"].any(1).all() for batch in run.micro_batches)


def test_a_starved_step_proceeds_with_what_there_is(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = Run(tmp_path, score=ByPrompt([1, 0, 1]), steps=1)
    before = run.adapters
    run.train()
    (metrics,) = run.results
    assert metrics["starved"]
    assert metrics["kept_groups"] == 2
    assert metrics["generation_batches"] == 3
    assert "step 1 is starved: 2 of 4 groups" in caplog.text
    weight = {
        int(i): bool(mask.any())
        for batch in run.micro_batches
        for i, mask in zip(batch["sequence_ids"], batch["completion_mask"], strict=True)
    }
    assert len(weight) == 16
    assert {i // 4 for i, has in weight.items() if has} == {3, 8 + 3}
    assert not same(before, run.adapters)


@pytest.mark.parametrize("always", [False, True])
def test_nothing_to_learn_leaves_the_parameters_and_the_momentum_alone(
    tmp_path: Path, always: bool, caplog: pytest.LogCaptureFixture
) -> None:
    seen: list[dict[str, torch.Tensor]] = []
    momenta: list[list[torch.Tensor]] = []

    class Keep(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            seen.append(run.adapters)
            states = kwargs["optimizer"].state.values()
            momenta.append([s[key].clone() for s in states for key in ("exp_avg", "step")])

    # The first step learns, so that there is momentum; the second has nothing to learn from.
    score = ByPrompt([4])

    def two_phases(completion: str, answer: str) -> bool:
        return score(completion, answer) if len(seen) == 0 else always

    run = Run(tmp_path, score=two_phases, callbacks=[Keep()], steps=2)
    run.train()
    assert [m["kept_groups"] for m in run.results] == [4, 0]
    assert run.results[1]["starved"]
    assert run.results[1]["loss"] == 0
    assert run.results[1]["grad_norm"] == 0
    assert same(seen[0], seen[1])
    assert momenta[0]
    assert all(map(torch.equal, momenta[0], momenta[1]))
    assert "the update is skipped" in caplog.text


def test_groups_are_dropped_by_accuracy_not_by_the_shaped_reward(tmp_path: Path) -> None:
    """All answers agree while the overlong punishment differs: nothing to learn."""
    run = Run(tmp_path, score=lambda completion, answer: True, steps=1).train()
    (metrics,) = run.results
    assert metrics["reward"] < metrics["accuracy"] == 1  # some were punished
    assert metrics["kept_groups"] == 0


def test_without_dynamic_sampling_the_batch_is_trls_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ours: list[dict[str, torch.Tensor]] = []
    theirs: list[dict[str, torch.Tensor]] = []
    for cls, store in [(DapoTrainer, ours), (GRPOTrainer, theirs)]:
        original = cls._generate_and_score_completions

        def recording(self: Any, inputs: Any, original: Any = original, store: Any = store) -> dict[str, torch.Tensor]:
            store.append(original(self, inputs))
            return store[-1]

        monkeypatch.setattr(cls, "_generate_and_score_completions", recording)
    run = Run(tmp_path, dynamic_sampling=False, steps=1, score=ByPrompt([2])).train()
    (a,), (b,) = ours, theirs
    assert a.keys() == b.keys() | {"sequence_ids", "sampling_per_token_logps", "whole_mask"}
    assert all(torch.equal(a[name], b[name]) for name in b)
    assert a["sequence_ids"].tolist() == list(range(16))
    assert run.results[0]["kept_groups"] == 2
    assert not run.results[0]["starved"]


def test_the_loss_is_the_mean_over_the_tokens_that_have_a_weight(tmp_path: Path) -> None:
    """The gradient of the step, against DAPO's formula written out over the whole batch at once."""
    gradients: dict[str, torch.Tensor] = {}

    class Keep(TrainerCallback):
        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            gradients.update({n: p.grad.clone() for n, p in trainable() if p.grad is not None})

    def trainable() -> Any:
        return [(n, p) for n, p in run.model.named_parameters() if p.requires_grad]

    run = Run(
        tmp_path,
        score=ByPrompt([1, 0, 1]),
        callbacks=[Keep()],
        steps=1,
        max_grad_norm=1e9,
        learning_rate=1e-12,
    )
    run.train()
    tokens = sum(int(batch["completion_mask"].sum()) for batch in run.micro_batches)
    assert {int(batch["num_items_in_batch"]) for batch in run.micro_batches} == {tokens}
    objective = torch.tensor(0.0)
    for batch in run.micro_batches:
        ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
        mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)
        width = batch["completion_ids"].shape[1]
        logits = run.model(input_ids=ids, attention_mask=mask).logits[:, -width - 1 : -1]
        chosen = logits.log_softmax(-1).gather(2, batch["completion_ids"][..., None])[..., 0]
        ratio = (chosen - chosen.detach()).exp()
        objective = objective - (ratio * batch["advantages"][:, None] * batch["completion_mask"]).sum()
    run.model.zero_grad()
    (objective / tokens).backward()
    expected = {n: p.grad for n, p in trainable()}
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-7)


# What the emulation is told


def test_phases_steps_and_ids(tmp_path: Path) -> None:
    run = Run(tmp_path, score=ByPrompt([1, 0, 4] * 2), steps=2).train()
    assert run.emulation.steps == [(0, 2), (1, 2)]
    sampled = {s: set() for s in (0, 1)}
    learned: dict[int, Counter[int]] = {s: Counter() for s in (0, 1)}
    for phase, step, ids in run.emulation.seen:
        assert phase in ("rollout", "train")
        if phase == "rollout":
            sampled[step] |= set(ids)
        else:
            learned[step].update(ids)
    for step in (0, 1):
        assert sampled[step] == set(range(48))  # three generation batches of 16
        assert set(learned[step]) == {12, 13, 14, 15, *range(32, 44)}
        assert set(learned[step].values()) == {1}


def test_a_row_has_the_same_id_in_the_rollout_and_in_the_loss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rollouts: dict[int, tuple[list[int], list[int]]] = {}
    original = DapoTrainer._generate_single_turn

    def recording(self: Any, prompts: Any, *args: Any, **kwargs: Any) -> Any:
        completions, none = original(self, prompts, *args, **kwargs)
        for row in zip(self._sequence_ids, prompts, completions, strict=True):
            rollouts[row[0]] = row[1:]
        return completions, none

    monkeypatch.setattr(DapoTrainer, "_generate_single_turn", recording)
    run = Run(tmp_path, score=ByPrompt([1, 1, 4]), steps=1, micro_batch_size=2).train()
    assert len(run.micro_batches) == 8
    assert len(rollouts) == 48
    for batch in run.micro_batches:
        for i, prompt, prompt_mask, tokens, mask in zip(
            *(
                batch[k]
                for k in (
                    "sequence_ids",
                    "prompt_ids",
                    "prompt_mask",
                    "completion_ids",
                    "completion_mask",
                )
            ),
            strict=True,
        ):
            assert rollouts[int(i)] == (
                prompt[prompt_mask.bool()].tolist(),
                tokens[mask.bool()].tolist(),
            )


def test_phase_and_ids_hold_in_the_recomputation_of_a_checkpointed_backward(tmp_path: Path) -> None:
    run = Run(tmp_path, gradient_checkpointing=True, steps=1)
    forwards: list[tuple[str, tuple[int, ...], bool]] = []
    layer = run.model.get_base_model().model.layers[0].mlp
    layer.register_forward_pre_hook(
        lambda *_: forwards.append((run.emulation._phase, run.emulation._ids, torch.is_grad_enabled()))
    )
    run.train()
    in_loss = [ids for phase, ids, grad in forwards if phase == "train"]
    assert len(in_loss) == 2 * len(run.micro_batches)  # forward and recomputation
    assert all(ids and in_loss.count(ids) == 2 for ids in in_loss)


def test_a_completion_does_not_depend_on_who_shares_its_batch(tmp_path: Path) -> None:
    """Same ids, same prompts, half the group: the shared completions are the same."""
    from training.generation import keyed_uniforms, sample

    model, tokenizer = tiny_model(), tiny_tokenizer()
    prompts = tokenizer(["1+1=", "12+12=", "3+4="])["input_ids"]

    def drawn(rows: list[int], seed: int = 5) -> list[list[int]]:
        uniforms = keyed_uniforms(seed, 2, rows, 12)
        chosen = [prompts[i] for i in rows]
        return [s.tokens for s in sample(model, tokenizer, chosen, uniforms=uniforms, temperature=1.0)]

    together = drawn([0, 1, 2])
    assert [drawn([i])[0] for i in range(3)] == together
    assert drawn([0, 1, 2], seed=6) != together


def test_sampling_follows_the_softmax() -> None:
    from training.generation import KeyedSampling, keyed_uniforms

    draws = 20_000
    scores = torch.tensor([[0.0, 1.0, -torch.inf, 2.0]])
    uniforms = keyed_uniforms(0, 0, range(draws), 1)
    sampler = KeyedSampling(uniforms, temperature=2.0, prompt_width=3)
    chosen = sampler(torch.zeros(draws, 3, dtype=torch.long), scores.expand(draws, 4)).argmax(1)
    share = torch.bincount(chosen, minlength=4) / draws
    expected = (scores[0] / 2).softmax(0)
    # 5 standard errors
    assert ((share - expected).abs() <= 5 * (expected * (1 - expected) / draws).sqrt()).all()


def test_a_models_own_generation_config_does_not_leak_into_the_decoding() -> None:
    from training.generation import generate

    model, tokenizer = tiny_model(), tiny_tokenizer()
    prompts = tokenizer(["1+1=", "2+2="])["input_ids"]
    plain = generate(model, tokenizer, prompts, max_new_tokens=8)
    model.generation_config.repetition_penalty = 50.0
    shipped = model.generation_config
    assert generate(model, tokenizer, prompts, max_new_tokens=8) == plain
    assert model.generation_config is shipped


# The schedule of the problems


def test_an_epoch_asks_each_problem_once_and_refills_ask_others() -> None:
    schedule = PromptSchedule(problems=20, prompts_per_step=6, seed=3)
    epochs = [[i for s in range(3) for i in schedule.indices(3 * e + s, 0)] for e in range(2)]
    assert all(len(set(epoch)) == 18 for epoch in epochs)
    assert epochs[0] != epochs[1]
    asked = [i for batch in range(3) for i in schedule.indices(4, batch)]
    assert len(set(asked)) == 18
    assert schedule.indices(4, 1) != schedule.indices(5, 1)
    assert PromptSchedule(20, 6, seed=4).indices(0, 0) != schedule.indices(0, 0)


def test_a_small_task_wraps_around() -> None:
    schedule = PromptSchedule(problems=4, prompts_per_step=4, seed=0)
    assert sorted(schedule.indices(0, 5)) == [0, 1, 2, 3]
    with pytest.raises(ConfigError, match="exceeds the 3 problems"):
        PromptSchedule(problems=3, prompts_per_step=4, seed=0)


# Checkpoints


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_resumed_run_is_bit_identical(tmp_path: Path, dtype: str) -> None:
    """Over the end of an epoch (20 problems, 4 a step), with refills, and with rollouts disturbed by step."""
    settings: dict[str, Any] = {
        "steps": 7,
        "epochs": 2,
        "count": 20,
        "dtype": dtype,
        "save_every": 50,
    }
    straight = Run(tmp_path / "a", **settings).train()
    first = Run(tmp_path / "b", callbacks=[StopAt(3)], **settings).train()
    second = Run(tmp_path / "b", callbacks=[StopAt(6)], **settings)
    second.train(resume_from_checkpoint=str(require_checkpoint(tmp_path / "b")))
    third = Run(tmp_path / "b", **settings)
    third.train(resume_from_checkpoint=str(require_checkpoint(tmp_path / "b")))
    assert max(row["generation_batches"] for row in straight.results) > 1
    assert first.results + second.results + third.results == straight.results
    assert second.emulation.steps == [(step, 7) for step in (3, 4, 5)]
    assert same(third.adapters, straight.adapters)
    assert {p.dtype for p in third.adapters.values()} == {getattr(torch, dtype)}
    assert not same(first.adapters, straight.adapters)


def test_a_checkpoint_is_resumed_under_its_own_profile(tmp_path: Path) -> None:
    Run(tmp_path, steps=1).train()
    checkpoint = require_checkpoint(tmp_path)
    other = Run(tmp_path, steps=2)
    other.emulation.profile.fingerprint = "another"
    with pytest.raises(ConfigError, match="a run is resumed under its own profile"):
        other.train(resume_from_checkpoint=str(checkpoint))


def test_checkpoints_hold_adapters_only_and_the_newest_are_kept(tmp_path: Path) -> None:
    Run(tmp_path, steps=4, save_every=1).train()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-3", "checkpoint-4"]
    adapter = tmp_path / "checkpoint-4" / "adapter_model.safetensors"
    assert adapter.stat().st_size < 50_000
    profile = json.loads((tmp_path / "checkpoint-4" / "profile.json").read_text())
    assert profile == {"profile": "stub", "fingerprint": "0123456789abcdef"}


def test_a_run_killed_while_saving_resumes_from_the_previous_checkpoint(tmp_path: Path) -> None:
    straight = Run(tmp_path / "straight", steps=3, save_every=1).train()
    killed = Run(tmp_path, steps=3, save_every=1)
    save = killed.trainer._save_scaler

    def die_at_two(output: str) -> None:
        if killed.trainer.state.global_step == 2:
            raise Killed
        save(output)

    killed.trainer._save_scaler = die_at_two
    with pytest.raises(Killed):
        killed.train()
    assert (tmp_path / STAGING / "checkpoint-2" / "adapter_model.safetensors").exists()
    checkpoint = require_checkpoint(tmp_path)
    assert checkpoint.name == "checkpoint-1"
    resumed = Run(tmp_path, steps=3, save_every=1)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert same(resumed.adapters, straight.adapters)
    assert not (tmp_path / STAGING).exists()


def test_a_full_disk_is_one_error_and_keeps_the_previous_checkpoint(tmp_path: Path) -> None:
    run = Run(tmp_path, steps=2, save_every=1)
    save = run.trainer._save_optimizer_and_scheduler

    def on_a_full_disk(output: str) -> None:
        if run.trainer.state.global_step == 1:
            return save(output)
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1024, hard))
        try:
            save(output)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    run.trainer._save_optimizer_and_scheduler = on_a_full_disk
    with pytest.raises(CheckpointError, match=r"step 2.*checkpoint-1, is intact: make room"):
        run.train()
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]
    resumed = Run(tmp_path, steps=2)
    resumed.train(resume_from_checkpoint=str(latest_checkpoint(tmp_path)))
    assert [row["step"] for row in resumed.results] == [2]


def test_nothing_to_resume(tmp_path: Path) -> None:
    (tmp_path / STAGING / "checkpoint-9").mkdir(parents=True)
    assert latest_checkpoint(tmp_path) is None
    with pytest.raises(ConfigError, match="nothing to resume"):
        require_checkpoint(tmp_path)


# Ctrl-C


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_ends_the_step_and_leaves_a_resumable_run(tmp_path: Path, number: int) -> None:
    handler = signal.getsignal(number)
    straight = Run(tmp_path / "a").train()
    run = Run(tmp_path / "b", save_every=100)
    run.emulation.on_forward = lambda phase: (
        signal.raise_signal(number)
        if (phase, run.emulation._step) == ("train", 1) and not run.trainer.interrupt.requested
        else None
    )
    run.train()
    assert run.trainer.interrupted
    assert not straight.trainer.interrupted
    assert [row["step"] for row in run.results] == [1, 2]
    assert signal.getsignal(number) is handler
    rest = Run(tmp_path / "b")
    rest.train(resume_from_checkpoint=str(require_checkpoint(tmp_path / "b")))
    assert run.results + rest.results == straight.results
    assert same(rest.adapters, straight.adapters)


def test_a_second_interrupt_stops_at_once() -> None:
    with InterruptCallback() as interrupt:
        signal.raise_signal(signal.SIGINT)
        assert interrupt.requested
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


# Adapters


def test_adapters_go_on_every_linear_but_the_head() -> None:
    model = attach_lora(tiny_model(), LORA, seed=0)
    adapted = {n.split(".lora_")[0].rsplit(".", 1)[-1] for n, _ in model.named_parameters() if "lora_" in n}
    assert adapted == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {
        n for n, _ in model.named_parameters() if "lora_" in n
    }


@pytest.mark.parametrize("base", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_adapters_have_the_dtype_that_is_named(dtype: str, base: torch.dtype) -> None:
    model = attach_lora(tiny_model().to(base), LORA.model_copy(update={"dtype": dtype}), seed=0)
    assert {p.dtype for n, p in model.named_parameters() if "lora_" in n} == {getattr(torch, dtype)}
    assert model.get_base_model().lm_head.weight.dtype == base


def test_adapters_are_a_function_of_the_seed() -> None:
    def adapters(seed: int) -> dict[str, torch.Tensor]:
        model = tiny_model()
        torch.rand(seed + 1)  # a different state of the global generator
        return {n: p for n, p in attach_lora(model, LORA, seed=seed).named_parameters() if "lora_A" in n}

    assert same(adapters(1), adapters(1))
    assert not same(adapters(1), adapters(2))


@pytest.mark.parametrize("target", ["lm_head", "q_porj"])
def test_a_target_that_cannot_be_adapted(target: str) -> None:
    with pytest.raises(ConfigError, match=f"lora.targets: '{target}'"):
        attach_lora(tiny_model(), LORA.model_copy(update={"targets": ("q_proj", target)}), seed=0)


def test_gradient_flow_is_checked_after_the_first_backward(tmp_path: Path) -> None:
    model = attach_lora(tiny_model(), LORA, seed=0)
    ids = torch.arange(8)[None]
    model(input_ids=ids, labels=ids).loss.backward()
    check_gradient_flow(model)
    name, parameter = next((n, p) for n, p in model.named_parameters() if "layers.1.mlp.up_proj.lora_B" in n)
    parameter.grad.zero_()
    with pytest.raises(RealisationError, match=f"no gradient reaches {name}"):
        check_gradient_flow(model)


def test_a_run_whose_adapters_get_no_gradient_fails(tmp_path: Path) -> None:
    run = Run(tmp_path, steps=1)
    attention = run.model.get_base_model().model.layers[1].self_attn
    attention.q_proj.register_forward_hook(lambda module, inputs, output: output.detach())
    with pytest.raises(RealisationError, match=r"layers\.1\.self_attn\.q_proj\.lora_B"):
        run.train()


def test_a_gradient_that_is_not_finite_is_never_applied(tmp_path: Path) -> None:
    run = Run(tmp_path, steps=1)
    before = run.adapters
    parameter = next(p for n, p in run.model.named_parameters() if "layers.0.mlp.up_proj.lora_A" in n)
    parameter.register_hook(lambda gradient: gradient * torch.nan)
    with pytest.raises(RealisationError, match=r"NaN or infinite .*the update was not made"):
        run.train()
    assert same(before, run.adapters)


# The lm_head


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize(
    ("site", "tied", "reason"),
    [
        ("lm_head", False, "whose forward the loss never calls"),
        ("model.embed_tokens", True, "shares its weight with the tied lm_head"),
    ],
)
def test_an_emulated_lm_head_is_refused(site: str, tied: bool, reason: str, wrapped: bool) -> None:
    base = tiny_model(tied=tied)
    emulation = StubEmulation(
        base,
        sites=[SimpleNamespace(name=site, module=base.get_submodule(site), parameter=base.get_submodule(site).weight)],
    )
    model = attach_lora(base, LORA, seed=0) if wrapped else base
    with pytest.raises(ConfigError, match=reason):
        refuse_uncovered_lm_head(emulation, model)


@pytest.mark.parametrize("site", ["model.layers.0.mlp.up_proj", "model.embed_tokens"])
def test_other_sites_are_not_refused(site: str) -> None:
    base = tiny_model()
    emulation = StubEmulation(
        base,
        sites=[SimpleNamespace(name=site, module=base.get_submodule(site), parameter=base.get_submodule(site).weight)],
    )
    refuse_uncovered_lm_head(emulation, attach_lora(base, LORA, seed=0))


# The config, and what TRL must keep


def test_every_field_of_the_algorithm_is_used(tmp_path: Path) -> None:
    settings = algorithm(steps=None, epochs=3, temperature=0.9, micro_batch_size=8)
    args = grpo_config(settings, output_dir=tmp_path, seed=1, report_to=(), world_size=1)
    expected = {
        "loss_type": "dapo", "epsilon": 0.2, "epsilon_high": 0.25, "beta": 0.0,
        "scale_rewards": "group", "num_generations": 4, "num_iterations": 1,
        "max_completion_length": 8, "temperature": 0.9, "reward_weights": [1.0, 0.5],
        "max_steps": -1, "num_train_epochs": 3, "learning_rate": 1e-2, "warmup_steps": 0,
        "weight_decay": 0.1, "max_grad_norm": 1.0, "per_device_train_batch_size": 8,
        "gradient_accumulation_steps": 2, "steps_per_generation": 2, "bf16": False,
        "use_vllm": False, "mask_truncated_completions": False,
    }  # fmt: skip
    assert {name: getattr(args, name) for name in expected} == expected
    assert args.lr_scheduler_type == "constant_with_warmup"


def test_epochs_decide_the_number_of_steps(tmp_path: Path) -> None:
    run = Run(tmp_path, steps=None, epochs=2, count=9, micro_batch_size=16).train()
    assert [row["step"] for row in run.results] == [1, 2, 3, 4]


@pytest.mark.parametrize(("ranks", "match"), [(3, "3 ranks"), (4, "micro_batch_size = 8")])
def test_a_step_that_cannot_be_divided(tmp_path: Path, ranks: int, match: str) -> None:
    settings = algorithm(micro_batch_size=8)
    with pytest.raises(ConfigError, match=match):
        grpo_config(settings, output_dir=tmp_path, seed=0, report_to=(), world_size=ranks)


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("_generate_and_score_completions", ["self", "inputs"]),
        (
            "_generate_single_turn",
            [
                "self",
                "prompt_ids",
                "images",
                "multimodal_fields",
                "num_generations",
                "has_tool_images",
            ],
        ),
        ("_calculate_rewards", ["self", "inputs", "prompts", "completions", "completion_ids_list"]),
        ("compute_loss", ["self", "model", "inputs", "return_outputs", "num_items_in_batch"]),
        ("training_step", ["self", "model", "inputs", "num_items_in_batch"]),
        ("log", ["self", "logs", "start_time"]),
        ("_save_checkpoint", ["self", "model", "trial"]),
        ("_get_output_dir", ["self", "trial"]),
        ("_save", ["self", "output_dir", "state_dict"]),
        ("_load_from_checkpoint", ["self", "resume_from_checkpoint", "model"]),
    ],
)
def test_trl_still_has_what_is_overridden(name: str, parameters: list[str]) -> None:
    assert list(inspect.signature(getattr(GRPOTrainer, name)).parameters) == parameters
    assert getattr(DapoTrainer, name) is not getattr(GRPOTrainer, name)


def test_trl_still_works_as_the_overrides_assume(tmp_path: Path) -> None:
    """All rollouts go through `_generate_single_turn`; a generation batch is one optimizer step."""
    source = inspect.getsource(GRPOTrainer._generate)
    assert "self._generate_single_turn(" in source
    assert "self._metrics[mode]" in inspect.getsource(GRPOTrainer.log)
    run = Run(tmp_path, steps=1, dynamic_sampling=False)
    calls = Counter[str]()
    for name in ("_generate_and_score_completions", "_generate_single_turn", "_calculate_rewards"):
        original = getattr(run.trainer, name)

        def counting(*args: Any, name: str = name, original: Any = original, **kwargs: Any) -> Any:
            calls[name] += 1
            return original(*args, **kwargs)

        setattr(run.trainer, name, counting)
    run.train()
    assert set(calls.values()) == {1}
    assert len(calls) == 3
    # old_per_token_logps would be another forward, and another draw of the noise
    assert not any("old_per_token_logps" in batch for batch in run.micro_batches)
    assert isinstance(run.model, PeftModel)
