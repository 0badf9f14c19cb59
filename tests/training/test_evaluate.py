from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from stubs import LORA, StubEmulation, holds_answer, problems, tiny_model, tiny_tokenizer

import aqnsim
from aqnsim import ConfigError, RealisationError
from training.adapters import attach_lora
from training.evaluate import attest_clean, evaluate, evaluate_modes

SIZES = {"batch_size": 4, "max_new_tokens": 6}


def modes(emulation: Any, model: Any, **kwargs: Any) -> Any:
    count = kwargs.pop("count", 10)
    return evaluate_modes(emulation, model, tiny_tokenizer(), problems(count), holds_answer, **SIZES, **kwargs)


def test_results_are_greedy_in_order_and_scored() -> None:
    model, tokenizer = tiny_model(), tiny_tokenizer()
    emulation = StubEmulation(model)
    results = evaluate(model, tokenizer, problems(10), holds_answer, emulation=emulation, **SIZES)
    assert [result.problem_id for result in results] == [f"p{i}" for i in range(10)]
    for problem, result in zip(problems(10), results, strict=True):
        ids = tokenizer(problem.prompt, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            for _ in range(6):  # greedy, one token at a time, without a cache or padding
                ids = torch.cat([ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)], 1)
                if ids[0, -1] == tokenizer.eos_token_id:
                    break
        completion = tokenizer.decode(ids[0, len(tokenizer(problem.prompt)["input_ids"]) :], skip_special_tokens=True)
        assert (result.completion, result.answer) == (completion, problem.answer)
        assert result.correct == (problem.answer in completion)


def test_every_forward_is_in_the_phase_eval_with_the_problems_ids() -> None:
    model = tiny_model()
    emulation = StubEmulation(model)
    evaluate(model, tiny_tokenizer(), problems(10), holds_answer, emulation=emulation, **SIZES)
    assert {phase for phase, _, _ in emulation.seen} == {"eval"}
    assert list(Counter(ids for _, _, ids in emulation.seen)) == [(0, 1, 2, 3), (4, 5, 6, 7), (8, 9)]


def test_the_training_mode_is_left_as_it_was() -> None:
    model = tiny_model().train()
    evaluate(model, tiny_tokenizer(), problems(2), holds_answer, emulation=StubEmulation(model), **SIZES)
    assert model.training


def test_no_problems() -> None:
    model = tiny_model()
    with pytest.raises(ConfigError, match="no problems"):
        evaluate(model, tiny_tokenizer(), [], holds_answer, emulation=StubEmulation(model), **SIZES)


@pytest.mark.parametrize("profile", ["mxfp4-w4a16", "mxfp4-w4a4", "noise-5pct-matmul"])
def test_clean_is_the_plain_model_and_emulated_is_not(profile: str) -> None:
    plain = tiny_model()
    model = tiny_model()
    emulation = aqnsim.emulate(model, profile, seed=0)
    results = modes(emulation, attach_lora(model, LORA, seed=0), count=30)
    expected = evaluate(plain, tiny_tokenizer(), problems(30), holds_answer, emulation=StubEmulation(plain), **SIZES)
    assert results["clean"] == expected
    assert results["emulated"] != expected
    phases = {receipt.phase for receipt in emulation.receipts()}
    assert "eval" in phases
    assert "train" not in phases


def test_ideal_scores_are_the_clean_ones() -> None:
    model = tiny_model()
    results = modes(aqnsim.emulate(model, "ideal", seed=0), model)
    assert results["emulated"] == results["clean"]


def test_aqn_stays_out_of_the_evaluation() -> None:
    model = tiny_model()
    aqn = aqnsim.AQN(aqnsim.aqn.Constant(value=0.5))
    emulation = aqnsim.emulate(model, "ideal", seed=0, aqn=aqn)
    emulation.begin_step(0, 10)
    results = modes(emulation, model)
    assert results["emulated"] == results["clean"]


def test_scoring_another_model_than_the_emulated_one_fails() -> None:
    emulation = aqnsim.emulate(tiny_model(), "mxfp4-w4a16", seed=0)
    with pytest.raises(RealisationError, match=r"never reached site 'model\.layers\.0\.self_attn\.q_proj'"):
        modes(emulation, tiny_model())


def test_one_site_that_lost_its_emulation_is_named() -> None:
    model = tiny_model()
    emulation = aqnsim.emulate(model, "noise-5pct-matmul", seed=0)
    model.model.layers[1].mlp.up_proj.__class__ = torch.nn.Linear
    with pytest.raises(RealisationError, match=r"never reached site 'model\.layers\.1\.mlp\.up_proj'"):
        modes(emulation, model)


def test_a_clean_score_that_was_emulated_fails() -> None:
    model = tiny_model()
    emulation = aqnsim.emulate(model, "mxfp4-w4a16", seed=0)
    start = emulation.snapshot()
    evaluate(model, tiny_tokenizer(), problems(2), holds_answer, emulation=emulation, **SIZES)
    with pytest.raises(RealisationError, match="the clean evaluation was emulated"):
        attest_clean(emulation, start)


def test_another_profile_than_the_checkpoints_needs_an_explicit_word() -> None:
    model = tiny_model()
    emulation = aqnsim.emulate(model, "mxfp4-w4a16", seed=0)
    with pytest.raises(ConfigError, match="trained under the profile 0123abcd"):
        modes(emulation, model, fingerprint="0123abcd")
    modes(emulation, model, fingerprint="0123abcd", other_profile=True, count=2)
    modes(emulation, model, fingerprint=emulation.profile.fingerprint, count=2)
