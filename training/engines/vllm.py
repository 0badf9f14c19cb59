"""Rollouts by vLLM, through TRL: what its engine multiplies by is pushed, read back and compared.

vLLM runs its own forward, so it can be given weights and nothing else: cast(W), the adapters' product and AQN. A
profile that asks for more in a rollout is refused. Nothing is merged into the live model, as TRL would: adding and
taking off a product in 16 bits leaves the base off its grid.

Not run on a GPU: TRL's interface stands in the tests, with an engine that holds a copy of the model.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftModel
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn
from trl.generation.vllm_generation import VLLMGeneration

from aqnsim._errors import ConfigError, RealisationError
from training.engines.readback import Reading, compare, read
from training.sharding import whole

if TYPE_CHECKING:
    from aqnsim import Emulation

PACKED = {
    "q_proj": "qkv_proj",
    "k_proj": "qkv_proj",
    "v_proj": "qkv_proj",
    "gate_proj": "gate_up_proj",
    "up_proj": "gate_up_proj",
}
"""Modules of transformers that vLLM's Llama and Qwen2 hold stacked in one."""

MIN_SURVIVING = 0.5
"""Share of AQN's sigma that has to be left in the engine's dtype: less is another experiment."""


class AttestedGeneration(VLLMGeneration):
    """TRL's VLLMGeneration, with every sync pushed out of place and read back from the engine.

    Attributes:
        emulation: of the model that is pushed.
        noisy: whether a sync carries AQN: in rollouts, not in evaluations.
        pushed: what the last sync pushed, by the name of transformers.
        held: step and `noisy` of what the engine holds; None before the first sync.
    """

    emulation: Emulation
    noisy: bool
    pushed: dict[str, Reading]
    held: tuple[int, bool] | None

    @classmethod
    def adopt(cls, generation: VLLMGeneration, emulation: Emulation) -> AttestedGeneration:
        """Take over the generation that TRL made, engine and all.

        Raises:
            ConfigError: see `refuse_what_weights_cannot_say`.
        """
        refuse_what_weights_cannot_say(emulation)
        generation.__class__ = cls
        assert isinstance(generation, cls)
        generation.emulation, generation.noisy, generation.pushed, generation.held = emulation, True, {}, None
        return generation

    def hold(self, step: int, *, noisy: bool) -> None:
        """Let the engine have the weights of a step; nothing is sent where it has them.

        Raises:
            RealisationError, ConfigError: see `sync_weights`.
        """
        if self.held != (step, noisy):
            self.held, self.noisy = None, noisy
            self.sync_weights()
            self.held = step, noisy

    def _iter_named_params(self) -> Iterator[tuple[str, Tensor]]:
        for name, weight in engine_weights(self.model, self.emulation, noisy=self.noisy):
            self.pushed[name] = read(weight)
            yield name, weight

    def sync_weights(self) -> None:
        """Push, then read back.

        Raises:
            RealisationError: the engine holds something else, or its dtype has no room for the noise.
            ConfigError: a frozen weight of the live model was written, now or before.
        """
        self.pushed = {}
        self.emulation.check_frozen()
        super().sync_weights()
        self.emulation.check_frozen()
        compare(self.pushed, self.engine_readings(), PACKED)

    def engine_readings(self) -> list[dict[str, Reading]]:
        """What each rank of the engine holds, by vLLM's names; of one engine, on the ranks that can ask it."""
        if self.mode == "server":
            return server_readings(self.vllm_client) if self.accelerator.is_main_process else []
        model = self.llm.llm_engine.model_executor.driver_worker.model_runner.model
        mine = {name: read(weight) for name, weight in model.named_parameters()}
        if self.tensor_parallel_size == 1:
            return [mine]
        gathered: list[Any] = [None] * self.tensor_parallel_size
        torch.distributed.all_gather_object(gathered, mine, group=self.tp_group)
        return gathered


class WorkerExtension:
    """Mixed into a server's workers: `vllm serve --worker-extension-cls training.engines.vllm.WorkerExtension`."""

    model_runner: Any

    def aqnsim_readings(self) -> dict[str, list[float]]:
        """This rank's weights, as plain numbers: they go through JSON."""
        return {name: list(read(weight)) for name, weight in self.model_runner.model.named_parameters()}


def server_readings(client: Any) -> list[dict[str, Reading]]:
    """Ask every worker of a server, which runs with VLLM_SERVER_DEV_MODE=1.

    Raises:
        RealisationError: the server does not know `WorkerExtension`.
    """
    response = client.session.post(f"{client.base_url}/collective_rpc", json={"method": "aqnsim_readings"})
    if response.status_code != 200:
        raise RealisationError(
            f"the vLLM server cannot be read back (HTTP {response.status_code}): start it with VLLM_SERVER_DEV_MODE=1 "
            "and --worker-extension-cls training.engines.vllm.WorkerExtension"
        )
    return [{n: Reading(*numbers) for n, numbers in worker.items()} for worker in response.json()["results"]]


def engine_weights(model: nn.Module, emulation: Emulation, *, noisy: bool) -> Iterator[tuple[str, Tensor]]:
    """What the emulated forward of a rollout multiplies by, under transformers' names; no parameter is written.

    A linear gives ``cast(W) + B A`` in the dtype of W, summed in fp32; a weight that AQN reaches ``w + sigma z``, with
    the z of a rollout by the model itself. Every rank has to iterate: sharded weights are gathered on the way.

    Args:
        model: with or without LoRA adapters.
        emulation: attached to it.
        noisy: False for the same weights without AQN.

    Raises:
        ConfigError: adapters of another kind than plain LoRA.
        RealisationError: noise that rounding to the dtype of the weight takes away.
    """
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    with torch.no_grad(), emulation.phase("rollout"):
        for name, parameter in base.named_parameters():
            owner, _, leaf = name.rpartition(".")
            module = base.get_submodule(owner)
            if ".lora_" in name:
                continue
            weight = whole(parameter)
            if leaf == "weight":
                weight = _acting(module, weight, noisy)
            wrapper = base.get_submodule(owner.removesuffix(".base_layer"))
            if wrapper is not module and leaf == "weight":
                weight = (weight.float() + _product(wrapper, name)).to(weight.dtype)
            yield name.replace(".base_layer", ""), weight.detach()


def _acting(module: nn.Module, weight: Tensor, noisy: bool) -> Tensor:
    """A weight as its module's emulated forward takes it."""
    binding = module.__dict__.get("aqnsim_binding")
    if binding is None or binding.site.kind not in ("linear", "norm"):
        return weight
    if binding.site.kind == "linear" and binding.casts_weight(weight):
        weight = binding.cast_weight(weight)
    elif binding.plan.weight:
        binding.count_call("weight")
    if not noisy or not binding.noise:
        return weight
    exact = weight.float()
    rounded: Tensor = binding.noisy(exact).to(weight.dtype)
    sigma = binding.emulation.noise.sigmas[binding.site.name]
    realised = float((rounded.float() - exact).square().mean().sqrt())
    if realised < MIN_SURVIVING * sigma:
        raise RealisationError(
            f"AQN on {binding.site.name!r}: of sigma {sigma:g}, {realised:g} is left after rounding to {weight.dtype}, "
            "which is what the engine holds. Roll out with the emulated model, which adds noise in fp32, or take a "
            "larger sigma or a float32 model"
        )
    return rounded


def _product(wrapper: nn.Module, name: str) -> Tensor:
    """``alpha / r * B A`` of the active adapters, in fp32."""
    if isinstance(wrapper, LoraLinear) and wrapper.merged:
        raise ConfigError(f"{name}: the adapter is merged, so its product would be pushed twice; unmerge it before")
    if not isinstance(wrapper, LoraLinear) or wrapper.fan_in_fan_out or any(wrapper.use_dora.values()):
        raise ConfigError(f"{name}: {type(wrapper).__name__} is no plain LoRA, whose product could be pushed")
    product = torch.zeros((), device=next(wrapper.parameters()).device)
    for adapter in wrapper.active_adapters:
        layers: Any = wrapper.lora_A[adapter], wrapper.lora_B[adapter]
        down, up = (whole(layer.weight).float() for layer in layers)
        product = product + wrapper.scaling[adapter] * up @ down
    return product


def refuse_what_weights_cannot_say(emulation: Emulation) -> None:
    """Refuse a profile that asks, in a rollout, for more than the weights of linear layers.

    Raises:
        ConfigError: naming a site and what it asks for.
    """
    for site in emulation.sites:
        asked = site.specs["rollout"].forward.asked
        beyond = [field for field in asked if field != "weight" or site.kind != "linear"]
        if beyond:
            raise ConfigError(
                f"profile {emulation.profile.name!r} asks for {', '.join(beyond)} at {site.name!r}: vLLM's forward is "
                "its own and would leave that out. Take a profile of weights alone, such as mxfp4-w4a16, or roll out "
                "with the emulated model (rollout.engine = 'model')"
            )
