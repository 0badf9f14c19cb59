"""What vLLM is sent and holds: out of place, with this step's noise, and read back; the engine is a stand-in."""

from __future__ import annotations

import inspect
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import trl
from fake_vllm import FakeEngine, generation_of
from stubs import LORA, Run, tiny_model, tiny_tokenizer
from torch import nn
from trl.distributed import DistributedBackend
from trl.generation import vllm_generation
from trl.generation.vllm_client import VLLMClient
from trl.trainer.grpo_trainer import GRPOTrainer

import aqnsim
from aqnsim._errors import ConfigError, RealisationError
from training.adapters import attach_lora
from training.engines.readback import Reading, compare, read
from training.engines.vllm import PACKED, AttestedGeneration, WorkerExtension, engine_weights, server_readings

NORM = "model.layers.0.input_layernorm.weight"


def emulated(dtype: torch.dtype = torch.float32, sigma: float = 0.05, profile: str = "mxfp4-w4a16") -> Any:
    clean = tiny_model().to(dtype)
    engine = FakeEngine(clean, tiny_tokenizer())
    model = attach_lora(clean, LORA, seed=0)
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    emulation = aqnsim.emulate(model, profile, seed=0, aqn=aqnsim.AQN(aqnsim.aqn.Constant(sigma)))
    emulation.begin_step(0, 4)
    return model, emulation, engine


def attested(bug: str | None = None, **kwargs: Any) -> tuple[AttestedGeneration, Any, FakeEngine]:
    model, emulation, engine = emulated(**kwargs)
    engine.bug = bug
    return AttestedGeneration.adopt(generation_of(model, engine), emulation), emulation, engine


def test_the_engine_computes_what_the_emulated_model_does_in_a_rollout() -> None:
    generation, emulation, engine = attested()
    generation.hold(0, noisy=True)
    ids = torch.tensor([[2, 3, 4, 5]])
    with torch.no_grad(), emulation.phase("rollout"):
        expected = emulation.model(input_ids=ids).logits
    torch.testing.assert_close(engine.model(input_ids=ids).logits, expected, rtol=1e-4, atol=1e-4)


def test_nothing_is_written_into_the_live_model() -> None:
    generation, emulation, _ = attested()
    before = {n: p.detach().clone() for n, p in emulation.model.named_parameters()}
    generation.hold(0, noisy=True)
    assert all(torch.equal(before[n], p) for n, p in emulation.model.named_parameters())


def test_an_evaluation_is_clean_and_the_next_rollout_noisy_again() -> None:
    generation, emulation, engine = attested()
    weight = dict(engine.model.named_parameters())[NORM]
    clean = dict(emulation.model.get_base_model().named_parameters())[NORM].detach()
    generation.hold(0, noisy=True)
    first = weight.detach().clone()
    assert (first - clean).std() == pytest.approx(0.05, rel=0.5)
    generation.hold(0, noisy=False)
    assert torch.equal(weight, clean)
    generation.hold(0, noisy=True)
    assert torch.equal(weight, first)  # a pure function of the step
    emulation.begin_step(1, 4)
    generation.hold(1, noisy=True)
    assert not torch.equal(weight, first)


def test_a_sync_is_made_once_a_step() -> None:
    generation, _, engine = attested()
    generation.hold(0, noisy=True)
    loads = engine.loads
    generation.hold(0, noisy=True)
    assert engine.loads == loads


def test_receipts_tell_what_was_pushed() -> None:
    generation, emulation, _ = attested()
    generation.hold(0, noisy=True)
    rollout = [r for r in emulation.receipts() if r.phase == "rollout"]
    assert {r.stream for r in rollout} == {"weight", "aqn"}
    assert len({r.site for r in rollout}) == 14 + 5
    assert all(r.realised_sigma == pytest.approx(0.05, rel=0.5) for r in rollout if r.stream == "aqn")


@pytest.mark.parametrize("bug", ["drops a norm", "swaps rows"])
def test_an_engine_that_loads_wrongly_is_caught(bug: str) -> None:
    generation, _, _ = attested(bug)
    with pytest.raises(RealisationError, match=r"does not hold what was pushed at 'model\.layers"):
        generation.hold(0, noisy=True)
    assert generation.held is None


def test_an_engine_that_keeps_the_noise_of_the_last_step_is_caught() -> None:
    generation, emulation, _ = attested("keeps the first noise")
    generation.hold(0, noisy=True)
    emulation.begin_step(1, 4)
    with pytest.raises(RealisationError, match="norm"):
        generation.hold(1, noisy=True)


def test_merging_in_place_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    generation, _, _ = attested(dtype=torch.bfloat16, sigma=0.5)
    generation._dist = DistributedBackend(SimpleNamespace(state=SimpleNamespace(deepspeed_plugin=None)))
    trl_own = vllm_generation.VLLMGeneration._iter_named_params
    monkeypatch.setattr(AttestedGeneration, "_iter_named_params", trl_own)
    with pytest.raises(ConfigError, match="was changed since the profile was attached"):
        generation.hold(0, noisy=True)


def test_a_merged_adapter_is_refused() -> None:
    model, emulation, _ = emulated()
    model.merge_adapter()
    with pytest.raises(ConfigError, match="pushed twice"):
        list(engine_weights(model, emulation, noisy=True))


def test_noise_that_bfloat16_takes_away_is_refused() -> None:
    generation, _, _ = attested(dtype=torch.bfloat16, sigma=5e-4)
    with pytest.raises(RealisationError, match=r"left after rounding to torch\.bfloat16"):
        generation.hold(0, noisy=True)


@pytest.mark.parametrize(("profile", "field"), [("mxfp4-w4a4", "input"), ("noise-5pct-matmul", "error")])
def test_what_weights_cannot_say_is_refused(profile: str, field: str) -> None:
    model, emulation, engine = emulated(profile=profile)
    with pytest.raises(ConfigError, match=f"asks for {field} at"):
        AttestedGeneration.adopt(generation_of(model, engine), emulation)


def test_a_trainer_rolls_out_with_the_engine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    engines = []

    def start(generation: Any) -> None:
        base = generation.model.get_base_model()
        clean = tiny_model()
        engines.append(FakeEngine(clean, tiny_tokenizer()))
        assert base.config.vocab_size == clean.config.vocab_size
        generation.llm = generation_of(generation.model, engines[-1]).llm

    monkeypatch.setattr(vllm_generation.VLLMGeneration, "_init_vllm", start)
    monkeypatch.setattr(vllm_generation, "SamplingParams", SimpleNamespace, raising=False)

    def emulate(model: nn.Module) -> Any:
        return aqnsim.emulate(model, "mxfp4-w4a16", seed=0, aqn=aqnsim.AQN(aqnsim.aqn.Constant(0.05)))

    run = Run(tmp_path, emulate=emulate, steps=2, engine="vllm-colocate").train()
    assert [row["step"] for row in run.metrics] == [1, 2]
    assert engines[0].loads == 2 * len(list(tiny_model().parameters()))
    assert run.trainer.engine.held == (1, True)


def test_ranks_of_an_engine_may_shard_or_replicate() -> None:
    weight, norm = torch.randn(8, 6), torch.randn(6)
    pushed = {"a.weight": read(weight), "n.weight": read(norm)}
    rows = [{"a.weight": read(half), "n.weight": read(norm)} for half in weight.chunk(2)]
    columns = [{"a.weight": read(half), "n.weight": read(norm)} for half in weight.chunk(2, dim=1)]
    compare(pushed, rows, PACKED)
    compare(pushed, columns, PACKED)
    with pytest.raises(RealisationError, match=r"n\.weight"):
        compare(pushed, [rows[0], rows[1] | {"n.weight": read(norm + 1)}], PACKED)
    with pytest.raises(RealisationError, match="never pushed"):
        compare(pushed, [rows[0] | {"b.weight": Reading(1, 2, 3)}, rows[1]], PACKED)


def test_a_server_is_read_back_through_its_workers() -> None:
    weight = torch.randn(4, 4)
    worker = WorkerExtension()
    worker.model_runner = SimpleNamespace(model=SimpleNamespace(named_parameters=lambda: [("a.weight", weight)]))
    answer = SimpleNamespace(status_code=200, json=lambda: {"results": [worker.aqnsim_readings()]})
    client = SimpleNamespace(base_url="http://server", session=SimpleNamespace(post=lambda url, json: answer))
    assert server_readings(client) == [{"a.weight": read(weight)}]
    answer.status_code = 404
    with pytest.raises(RealisationError, match="worker-extension-cls"):
        server_readings(client)


def test_trl_still_has_what_is_overridden() -> None:
    """The pinned version's private interface; a new pin has to be read again."""
    assert trl.__version__ == "1.16.0"
    own = vllm_generation.VLLMGeneration
    assert list(inspect.signature(own._iter_named_params).parameters) == ["self"]
    assert list(inspect.signature(own.sync_weights).parameters) == ["self"]
    sync = inspect.getsource(own.sync_weights)
    assert "update_named_params(self._weight_metadata, self._iter_named_params())" in sync
    assert "llm_engine.model_executor.driver_worker.model_runner.model.load_weights([(name, param)])" in sync
    assert "merge_adapter" not in sync
    assert list(inspect.signature(own.generate).parameters)[1:4] == ["prompts", "images", "num_generations"]
    assert "return prompt_ids, completion_ids, logprobs" in inspect.getsource(own.generate)
    assert {"session", "base_url"} <= set(inspect.getsource(VLLMClient.__init__).replace("self.", "").split())
    turn = inspect.signature(GRPOTrainer._generate_single_turn).parameters
    assert list(turn)[1] == "prompt_ids"
    assert "self.vllm_generation = VLLMGeneration(" in inspect.getsource(GRPOTrainer.__init__)
