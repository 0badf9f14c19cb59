"""The embedded preset's own model, fetched as a user fetches it: emulated, noisy, and clean again."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import aqnsim
from training.adapters import attach_lora
from training.config import load
from training.generation import generate
from training.hardware import build_aqn
from training.models import end_completions_at, load_model
from training.tasks import task_of

EXPERIMENT = load("e12", "embedded")


@pytest.fixture(scope="module")
def setup() -> tuple[Any, Any, Any]:
    arithmetic = task_of(EXPERIMENT.task)
    model, tokenizer = load_model(EXPERIMENT.model.name, dtype=EXPERIMENT.model.dtype)
    end_completions_at(model, tokenizer, arithmetic.end)
    return attach_lora(model, EXPERIMENT.lora, seed=0), tokenizer, arithmetic


def right(model: Any, tokenizer: Any, task: Any) -> int:
    problems = task.problems("eval", 40, 0)
    prompts = [tokenizer(p.prompt)["input_ids"] for p in problems]
    tokens = generate(model, tokenizer, prompts, max_new_tokens=EXPERIMENT.algorithm.max_new_tokens)
    texts = tokenizer.batch_decode(tokens, skip_special_tokens=True)
    return sum(task.score(t, p.answer) for t, p in zip(texts, problems, strict=True))


def test_no_op_of_the_real_model_is_out_of_reach(setup: tuple[Any, Any, Any]) -> None:
    coverage = aqnsim.survey(setup[0], EXPERIMENT.profile.name)
    assert coverage.uncovered == ()
    assert coverage.other == {}
    assert len([op for op in coverage.of_status("emulated") if op.kind == "linear"]) == 30 * 7
    assert {op.role for op in coverage.of_status("excluded")} >= {"lm_head", "embedding"}
    assert sum(op.role == "adapter" for op in coverage.of_status("kept")) > 0


def test_the_real_model_is_emulated_in_every_layer_and_comes_back_as_it_was(setup: tuple[Any, Any, Any]) -> None:
    model, tokenizer, task = setup
    ids = torch.tensor([tokenizer("12 + 9 =")["input_ids"]])

    def logits() -> torch.Tensor:
        with torch.no_grad():
            out: torch.Tensor = model(input_ids=ids).logits
        return out

    plain, clean_score = logits(), right(model, tokenizer, task)
    emulation = aqnsim.emulate(model, EXPERIMENT.profile.name, seed=0, aqn=build_aqn(EXPERIMENT, layers=30))
    linears = [s for s in emulation.sites if s.kind == "linear"]
    norms = [s for s in emulation.sites if s.kind == "norm"]
    assert (len(linears), len(norms)) == (30 * 7, 30 * 2 + 1)
    for receipt in emulation.receipts():
        assert receipt.sqnr_db is not None
        assert 17.5 < receipt.sqnr_db < 19.5, receipt

    emulated = logits()
    assert not torch.equal(emulated, plain)
    emulated_score = right(model, tokenizer, task)
    assert 0 < emulated_score < clean_score  # 4 bits cost something, and leave something to learn

    emulation.begin_step(15, 30)
    with emulation.phase("rollout"):
        noisy = logits()
    assert not torch.equal(noisy, emulated)
    for receipt in emulation.receipts():
        if receipt.stream == "aqn":
            n = receipt.elements / receipt.calls
            assert receipt.realised_sigma == pytest.approx(emulation.sigma, rel=6 / (2 * n) ** 0.5)

    with emulation.off():
        assert torch.equal(logits(), plain)
    emulation.check()
    emulation.restore()
    assert torch.equal(logits(), plain)
