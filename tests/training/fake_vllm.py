"""A stand-in for vLLM behind TRL's VLLMGeneration: it holds a copy of the weights, stacked as vLLM stacks them."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from trl.generation.vllm_generation import VLLMGeneration

from training.engines.vllm import PACKED
from training.generation import Sample, sample


class FakeEngine:
    """Loads weights under transformers' names and holds them under vLLM's; `bug` names what it does wrong."""

    def __init__(self, clean: nn.Module, tokenizer: Any, *, bug: str | None = None) -> None:
        self.model, self.tokenizer, self.bug = copy.deepcopy(clean), tokenizer, bug
        self.loads = 0

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        parameters = dict(self.model.named_parameters())
        for name, weight in weights:
            self.loads += 1
            if self.bug == "drops a norm" and name == "model.layers.1.input_layernorm.weight":
                continue
            if self.bug == "keeps the first noise" and "norm" in name and self.loads > len(parameters):
                continue
            if self.bug == "swaps rows" and name == "model.layers.0.self_attn.q_proj.weight":
                weight = weight.flip(1)
            with torch.no_grad():
                parameters[name].copy_(weight)

    def named_parameters(self) -> Iterator[tuple[str, Tensor]]:
        stacks: dict[str, list[Tensor]] = {}
        for name, parameter in self.model.named_parameters():
            module, leaf = name.rsplit(".", 1)
            parent, _, child = module.rpartition(".")
            stacks.setdefault(".".join(filter(None, (parent, PACKED.get(child, child), leaf))), []).append(parameter)
        yield from ((name, torch.cat(parts)) for name, parts in stacks.items())


class FakeLLM:
    """What TRL calls of vllm.LLM."""

    def __init__(self, engine: FakeEngine) -> None:
        runner = SimpleNamespace(model=engine)
        worker = SimpleNamespace(model_runner=runner)
        self.llm_engine = SimpleNamespace(model_executor=SimpleNamespace(driver_worker=worker))
        self.engine = engine

    def reset_prefix_cache(self) -> None:
        """vLLM's own; there is nothing cached here."""

    def generate(self, prompts: list[dict[str, Any]], sampling_params: Any, use_tqdm: bool) -> list[Any]:
        ids = [prompt["prompt_token_ids"] for prompt in prompts]
        length = sampling_params.max_tokens
        uniforms = torch.rand(len(ids), length, dtype=torch.float64)
        completions = sample(self.engine.model, self.engine.tokenizer, ids, uniforms=uniforms, temperature=1.0)
        return [
            SimpleNamespace(prompt_token_ids=p, outputs=[SimpleNamespace(token_ids=c.tokens, logprobs=_log_probs(c))])
            for p, c in zip(ids, completions, strict=True)
        ]


def _log_probs(completion: Sample) -> list[dict[int, Any]]:
    pairs = zip(completion.tokens, completion.log_probs, strict=True)
    return [{token: SimpleNamespace(logprob=value, rank=1)} for token, value in pairs]


def generation_of(model: nn.Module, engine: FakeEngine) -> VLLMGeneration:
    """TRL's object as its constructor leaves it in colocate mode, without vLLM."""
    made = object.__new__(VLLMGeneration)
    accelerator = SimpleNamespace(is_main_process=True, num_processes=1, process_index=0)
    fields = {"mode": "colocate", "enable_sleep_mode": False, "tensor_parallel_size": 1, "_weight_metadata": None}
    made.__dict__.update(fields | {"model": model, "accelerator": accelerator, "llm": FakeLLM(engine)})
    return made
