"""The plug-in for verl, on stand-ins for its trainer and worker; and what it takes of verl's own sources."""

from __future__ import annotations

import ast
import importlib.metadata
import importlib.util
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from stubs import tiny_model

import aqnsim
from aqnsim._errors import ConfigError, RealisationError
from training.engines import verl_plugin
from training.engines.verl_plugin import NoisyStream, aqn_trainer, attest, extend_worker

TOTAL = 4
AQN = aqnsim.AQN(aqnsim.aqn.KStage(0.2, 0.1, 4))


class Worker:
    """ActorRolloutRefWorker with an engine that streams a model, and a rollout that keeps what it gets."""

    def __init__(self, merge: bool = True) -> None:
        self.config = SimpleNamespace(model=SimpleNamespace(lora={"merge": merge}))
        model = tiny_model()
        engine = SimpleNamespace(get_per_tensor_param=lambda **_: (iter(model.state_dict().items()), None))
        self.actor = SimpleNamespace(engine=engine)
        self.held: dict[str, torch.Tensor] = {}

    def update_weights(self) -> None:
        weights, _ = self.actor.engine.get_per_tensor_param(base_sync_done=True)
        self.held = {name: weight.clone() for name, weight in weights}


class Trainer:
    """PPOTrainerSync, of which the hooks push weights; on one worker."""

    def __init__(self, worker: Any, deaf: bool = False) -> None:
        self.worker, self.global_steps, self.total_training_steps = worker, 0, TOTAL
        push = (lambda step: None) if deaf else (lambda step: worker.update_weights())
        self.checkpoint_manager = SimpleNamespace(update_weights=push, sleep_replicas=lambda: None)
        self.actor_rollout_wg = SimpleNamespace(
            aqnsim_begin=worker.aqnsim_begin, aqnsim_sent=lambda: [worker.aqnsim_sent()]
        )

    def on_init_end(self) -> None:
        self.checkpoint_manager.update_weights(self.global_steps)

    on_step_end = on_init_end

    def on_step_begin(self) -> None:
        """verl's own does nothing."""

    on_validate_begin = on_step_begin


@pytest.fixture
def worker(monkeypatch: pytest.MonkeyPatch) -> type[Worker]:
    class Extended(Worker):
        pass

    extend_worker(Extended, lambda dispatch_mode: lambda method: method, "one to all")
    monkeypatch.setattr(verl_plugin, "stream_of_environment", lambda: NoisyStream(AQN, seed=0))
    return Extended


NORM = "model.layers.0.input_layernorm"


def test_rollouts_follow_the_schedule_and_validations_are_clean(worker: Any) -> None:
    sending = worker()
    trainer = aqn_trainer(Trainer)(sending)
    clean = tiny_model().state_dict()

    def distance() -> float:
        return float((sending.held[f"{NORM}.weight"] - clean[f"{NORM}.weight"]).square().mean().sqrt())

    trainer.on_init_end()
    trainer.on_validate_begin()
    assert distance() == 0
    for step in range(TOTAL):
        trainer.global_steps = step + 1
        trainer.on_step_begin()
        sigma = AQN.schedule.sigma(step, TOTAL)
        assert distance() == pytest.approx(sigma, rel=0.5)
        assert sending.aqnsim_sent().requested == sigma
        trainer.on_step_end()
        trainer.on_validate_begin()
        assert distance() == 0


def test_the_noise_is_that_of_the_emulated_model() -> None:
    model = tiny_model()
    emulation = aqnsim.emulate(model, "ideal", seed=7, aqn=AQN)
    emulation.begin_step(2, TOTAL)
    stream = NoisyStream(AQN, seed=7)
    stream.begin(2, TOTAL, noisy=True)
    sent = dict(stream(tiny_model().state_dict().items()))
    module = model.get_submodule(NORM)
    with emulation.phase("rollout"):
        expected = module.__dict__["aqnsim_binding"].noisy(module.weight)
    assert torch.equal(sent[f"{NORM}.weight"], expected)


def test_weights_that_never_left_are_caught(worker: Any) -> None:
    with pytest.raises(RealisationError, match="worker 0 sent None"):
        aqn_trainer(Trainer)(worker(), deaf=True).on_init_end()


def test_a_schedule_that_is_not_advanced_is_caught() -> None:
    with pytest.raises(RealisationError, match="before a step began"):
        list(NoisyStream(AQN, seed=0)(tiny_model().state_dict().items()))


def test_noise_that_reaches_nothing_or_rounds_away_is_caught() -> None:
    stream = NoisyStream(AQN, seed=0)
    stream.begin(2, TOTAL, noisy=True)
    with pytest.raises(RealisationError, match="reached no weight"):
        list(stream([("model.lora_A.weight", torch.ones(2, 2))]))
    small = NoisyStream(aqnsim.AQN(aqnsim.aqn.Constant(1e-4)), seed=0)
    small.begin(0, TOTAL, noisy=True)
    list(small([(f"{NORM}.weight", torch.ones(64, dtype=torch.bfloat16))]))
    with pytest.raises(RealisationError, match="rounds away"):
        attest([small.sent], 0, noisy=True)


def test_adapters_alone_are_refused(worker: Any) -> None:
    with pytest.raises(ConfigError, match=r"lora\.merge=True"):
        aqn_trainer(Trainer)(worker(merge=False)).on_init_end()


def test_a_worker_that_was_told_nothing_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AQNSIM_EXPERIMENT", raising=False)
    with pytest.raises(ConfigError, match="runtime_env"):
        verl_plugin.stream_of_environment()
    monkeypatch.setenv("AQNSIM_EXPERIMENT", "e12")
    assert verl_plugin.stream_of_environment().aqn.schedule.check(29) is None


# verl's own sources: it pins another transformers, so they are read and not run.

VERL = importlib.util.find_spec("verl")
needs_verl = pytest.mark.skipif(VERL is None, reason="pip install --no-deps verl==0.9.1")


def definitions(path: str) -> Iterator[tuple[str, ast.AST]]:
    assert VERL is not None
    assert VERL.origin is not None
    tree = ast.parse((Path(VERL.origin).parent / path).read_text())
    for node in tree.body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            yield node.name, node
            yield from (
                (f"{node.name}.{part.name}", part)
                for part in node.body
                if isinstance(part, ast.FunctionDef | ast.AsyncFunctionDef)
            )


@needs_verl
def test_verl_still_has_what_the_plug_in_takes() -> None:
    assert importlib.metadata.version("verl") == "0.9.1"
    base = dict(definitions("trainer/ppo/v1/trainer_base.py"))
    for hook in ("on_init_end", "on_step_begin", "on_step_end", "on_validate_begin"):
        node = base[f"PPOTrainer.{hook}"]
        assert isinstance(node, ast.FunctionDef)
        assert [argument.arg for argument in node.args.args] == ["self"]
    fit = ast.unparse(base["PPOTrainer.fit"])
    assert fit.index("self.global_steps += 1") < fit.index("self.on_step_begin()") < fit.index("self.on_step_end()")
    assert "register_trainer" in base
    sync = dict(definitions("trainer/ppo/v1/trainer_sync.py"))
    for hook in ("on_init_end", "on_step_end"):
        assert "self.checkpoint_manager.update_weights(self.global_steps)" in ast.unparse(
            sync[f"PPOTrainerSync.{hook}"]
        )
    worker = dict(definitions("workers/engine_workers.py"))
    assert "self.actor.engine.get_per_tensor_param(" in ast.unparse(worker["ActorRolloutRefWorker.update_weights"])
    engine = dict(definitions("workers/engine/fsdp/transformer_impl.py"))
    stream = ast.unparse(engine["FSDPEngine.get_per_tensor_param"])
    assert "return (self._merged_lora_per_tensor_param(), None)" in stream
    decorator = dict(definitions("single_controller/base/decorator.py"))["register"]
    assert isinstance(decorator, ast.FunctionDef)
    assert decorator.args.args[0].arg == "dispatch_mode"
