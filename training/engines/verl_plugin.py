"""AQN in verl, through its own entry points: a registered trainer, hooks, the stream of weights to the rollout.

verl (0.9.1) trains with Ray, FSDP and vLLM. This module makes its rollouts noisy: the trainer says which step begins,
each worker adds the noise of that step to the weights that it sends, and the trainer checks what was sent. Frozen
weights hold cast(W) where the actor is loaded from a checkpoint that `Emulation.save_pretrained(frozen="cast")` wrote.

Start verl with::

    VERL_USE_EXTERNAL_MODULES=training.engines.verl_plugin AQNSIM_EXPERIMENT=e12 AQNSIM_SEED=0 python -m
        verl.trainer.main_ppo trainer.v1.trainer_mode=aqn_sync actor_rollout_ref.model.lora.merge=True ...

with both variables in Ray's runtime_env. Not run on a GPU; tests hold it to verl's sources.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from math import sqrt
from typing import Any

import torch
from torch import Tensor

from aqnsim import AQN, ops  # noqa: F401  (ops defines torch.ops.aqnsim)
from aqnsim._errors import ConfigError, RealisationError
from aqnsim.errors import AbsoluteGaussian
from aqnsim.rng import clock, key_of

TRAINER = "aqn_sync"


@dataclass(frozen=True)
class Sent:
    """What one worker sent: of AQN, how much, and to how many norms.

    Attributes:
        share: of the sigma that was asked for, as found in the weights that were sent, in their own dtype.
    """

    step: int
    noisy: bool
    norms: int
    requested: float
    share: float


class NoisyStream:
    """Adds a step's noise to a stream of weights; the noise is that of an emulated model's rollout.

    Args:
        aqn: on norms, with sigmas in absolute units.
        seed: of the noise.

    Raises:
        ConfigError: noise that is relative to weights.
    """

    def __init__(self, aqn: AQN, seed: int) -> None:
        if aqn.relative_to == "rms":
            raise ConfigError("AQN in verl: sigmas relative to the weights are not supported; give absolute ones")
        self.aqn, self.seed = aqn, seed
        self.begun: tuple[int, int, bool] | None = None
        self.sent: Sent | None = None

    def begin(self, step: int, total_steps: int, noisy: bool) -> None:
        """Say which rollout the next stream is for: `noisy` is False for a validation."""
        self.aqn.schedule.check(total_steps)
        self.begun, self.sent = (step, total_steps, noisy), None

    def __call__(self, weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """The stream, with noise on the norms that AQN reaches; nothing is written in place.

        Raises:
            RealisationError: no step has begun, or AQN reaches nothing in the stream.
        """
        if self.begun is None:
            raise RealisationError(f"weights are sent before a step began: select trainer.v1.trainer_mode={TRAINER}")
        step, total, noisy = self.begun
        norms, draws, squares = 0, 0, 0.0
        for name, weight in weights:
            site = name.removesuffix(".weight")
            if weight.dim() == 1 and self.aqn.reaches(site, "norm", site.rpartition(".")[2], feeds_router=False):
                norms += 1
                sigma = self.aqn.sigma(site, step, total) if noisy else 0.0
                if sigma:
                    clean, weight = weight, self._perturbed(site, weight, sigma, step)
                    draws += clean.numel()
                    squares += float((weight.float() - clean.float()).square().sum()) / sigma**2
            yield name, weight
        if not norms:
            raise RealisationError(f"AQN on {self.aqn.targets!r} reached no weight that verl sent: merge adapters")
        share = sqrt(squares / draws) if draws else 0.0
        self.sent = Sent(step, noisy, norms, self.aqn.schedule.sigma(step, total) if noisy else 0.0, share)

    def _perturbed(self, site: str, weight: Tensor, sigma: float, step: int) -> Tensor:
        moment = torch.tensor(clock(step, "rollout", 0), device="cpu")
        noisy: tuple[Tensor, Tensor] = torch.ops.aqnsim.perturb(
            weight.float(),
            str(AbsoluteGaussian(sigma)),
            key_of(self.seed, site, "aqn"),
            moment,
            None,
            None,
            None,
            True,
        )
        return noisy[0].to(weight.dtype)


def attest(sent: Iterable[Sent | None], step: int, noisy: bool) -> None:
    """Check what every worker sent.

    Raises:
        RealisationError: a worker sent nothing, another step, or another sigma than asked for.
    """
    for rank, one in enumerate(sent):
        if one is None or (one.step, one.noisy) != (step, noisy):
            raise RealisationError(f"worker {rank} sent {one}, not the weights of step {step} with noisy={noisy}")
        if one.requested and not 0.5 < one.share < 2:
            raise RealisationError(
                f"worker {rank}, step {step}: of sigma {one.requested:g}, {one.share:.3g} is in the weights that were "
                "sent; in 16 bits a small sigma rounds away"
            )


def extend_worker(worker: type, register: Callable[..., Any], one_to_all: Any) -> None:
    """Teach verl's worker the two calls that `aqn_trainer` makes.

    Args:
        worker: ActorRolloutRefWorker.
        register, one_to_all: verl's decorator of remote methods, and the dispatch to all workers.
    """

    def aqnsim_begin(self: Any, step: int, total_steps: int, noisy: bool) -> None:
        if not self.config.model.lora.get("merge", False):
            raise ConfigError("AQN in verl needs actor_rollout_ref.model.lora.merge=True: else only adapters are sent")
        if not hasattr(self, "aqnsim_stream"):
            self.aqnsim_stream = stream_of_environment()
            engine, plain = self.actor.engine, self.actor.engine.get_per_tensor_param

            def noisy_parameters(*args: Any, **kwargs: Any) -> tuple[Iterator[tuple[str, Tensor]], Any]:
                weights, peft_config = plain(*args, **kwargs)
                return self.aqnsim_stream(weights), peft_config

            engine.get_per_tensor_param = noisy_parameters
        self.aqnsim_stream.begin(step, total_steps, noisy)

    def aqnsim_sent(self: Any) -> Sent | None:
        sent: Sent | None = self.aqnsim_stream.sent
        return sent

    for method in (aqnsim_begin, aqnsim_sent):
        setattr(worker, method.__name__, register(dispatch_mode=one_to_all)(method))


def aqn_trainer(base: Any) -> type:
    """A trainer that advances AQN's schedule, validates without noise and checks every sync.

    Args:
        base: verl's PPOTrainerSync.
    """

    class AqnTrainer(base):  # type: ignore[misc]
        """Steps count from 0 in schedules, from 1 in verl."""

        def on_init_end(self) -> None:
            self._sync(self.global_steps, noisy=False, push=super().on_init_end)  # not 0 after a resume

        def on_step_begin(self) -> None:
            super().on_step_begin()
            self._hold(self.global_steps - 1, noisy=True)

        def on_step_end(self) -> None:
            is_last = self.global_steps >= self.total_training_steps
            step = self.global_steps - 1 if is_last else self.global_steps
            self._sync(step, noisy=not is_last, push=super().on_step_end)

        def on_validate_begin(self) -> None:
            super().on_validate_begin()
            self._hold(self._held[0], noisy=False)

        def _hold(self, step: int, noisy: bool) -> None:
            if self._held != (step, noisy):
                self.checkpoint_manager.sleep_replicas()
                self._sync(step, noisy, push=lambda: self.checkpoint_manager.update_weights(self.global_steps))

        def _sync(self, step: int, noisy: bool, push: Callable[[], None]) -> None:
            self.actor_rollout_wg.aqnsim_begin(step, self.total_training_steps, noisy)
            push()
            attest(self.actor_rollout_wg.aqnsim_sent(), step, noisy)
            self._held = (step, noisy)

    return AqnTrainer


def stream_of_environment() -> NoisyStream:
    """The noise of the experiment that AQNSIM_EXPERIMENT names, with AQNSIM_PRESET and AQNSIM_SEED.

    Raises:
        ConfigError: the variable is not set, as where Ray was not told of it, or the experiment has no noise.
    """
    from training.architectures import architecture
    from training.config import load
    from training.hardware import build_aqn

    name = os.environ.get("AQNSIM_EXPERIMENT")
    if name is None:
        raise ConfigError("AQNSIM_EXPERIMENT is not set in this worker: put it into Ray's runtime_env")
    experiment, seed = load(name, os.environ.get("AQNSIM_PRESET", "paper")), int(os.environ.get("AQNSIM_SEED", "0"))
    layers = architecture(experiment.model.name).num_hidden_layers
    aqn = build_aqn(experiment, layers=layers, seed=seed)
    if aqn is None:
        raise ConfigError(f"experiment {name!r} has no AQN: take verl's own trainer_mode=sync")
    return NoisyStream(aqn, seed)


def install() -> None:
    """Register the trainer and extend the worker, in this process."""
    from verl.single_controller.base.decorator import Dispatch, register  # type: ignore[import-not-found]
    from verl.trainer.ppo.v1.trainer_base import register_trainer  # type: ignore[import-not-found]
    from verl.trainer.ppo.v1.trainer_sync import PPOTrainerSync  # type: ignore[import-not-found]
    from verl.workers.engine_workers import ActorRolloutRefWorker  # type: ignore[import-not-found]

    extend_worker(ActorRolloutRefWorker, register, Dispatch.ONE_TO_ALL)
    register_trainer(TRAINER)(aqn_trainer(PPOTrainerSync))


if "VERL_USE_EXTERNAL_MODULES" in os.environ and __name__ in os.environ["VERL_USE_EXTERNAL_MODULES"].split(","):
    install()
