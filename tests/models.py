"""Small models for tests, and profiles made of a few lines."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from aqnsim.cli.sites import small_model
from aqnsim.profiles import ELEMENTWISE, GEMMS, Forward, GradInput, GradWeight, OpSpec, Profile, Rule

SOURCE = {"definition": "for a test"}


def profile(
    weight: str | None = None,
    input: str | None = None,
    error: str | None = None,
    grad_input: str | None = None,
    grad_weight: str | None = None,
    sites: tuple[str, ...] = ("*",),
    exclude: tuple[str, ...] = ("lm_head",),
) -> Profile:
    """A profile of one rule."""
    spec = OpSpec(
        forward=Forward(input=input, weight=weight, error=error),
        grad_input=GradInput(error=grad_input),
        grad_weight=GradWeight(error=grad_weight),
    )
    rule = Rule(kind="linear", sites=sites, spec=spec)
    return Profile(name="test", description="for a test", source=SOURCE, exclude=exclude, rules=(rule,))


def mlp(dtype: torch.dtype = torch.float32, frozen: bool = False) -> nn.Sequential:
    """Two linear layers with biases; 40 columns leave a short last block."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 72), nn.GELU(), nn.Linear(72, 24)).to(dtype)
    return model.requires_grad_(not frozen)


def llama(dtype: torch.dtype = torch.float32, tied: bool = False, frozen: bool = False) -> nn.Module:
    """A Llama of two layers, from its configuration: 14 linear layers, a head and five norms."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=tied,
        initializer_range=0.2,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config).eval().to(dtype).requires_grad_(not frozen)


def qwen3() -> nn.Module:
    """A Qwen3 of one layer: it has norms on queries and keys."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
    )
    return Qwen3ForCausalLM(config).eval()


def gemma() -> nn.Module:
    """A Gemma of one layer: its norms multiply by 1 + w."""
    from transformers import GemmaConfig, GemmaForCausalLM

    torch.manual_seed(0)
    config = GemmaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
    )
    return GemmaForCausalLM(config).eval()


def with_lora(model: nn.Module) -> nn.Module:
    """PEFT's LoRA on all linear layers but the head, with adapters that already do something."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(1)
    config = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", init_lora_weights=False)
    return get_peft_model(model, config).eval()


def tokens(batch: int = 3, length: int = 9, seed: int = 0) -> Tensor:
    """Token ids without the special ones."""
    return torch.randint(3, 64, (batch, length), generator=torch.Generator().manual_seed(seed))


def inputs(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def family(name: str, **settings: Any) -> nn.Module:
    """A small causal language model of a family of transformers, with weights that are far from 0."""
    return small_model(name, initializer_range=0.1, **settings)


def everything(fmt: str) -> Profile:
    """A profile for every kind of op: operands, results and gradients in a format."""
    gemm = OpSpec(
        forward=Forward(input=fmt, weight=fmt, output=fmt),
        grad_input=GradInput(grad=fmt, output=fmt),
        grad_weight=GradWeight(grad=fmt, output=fmt),
    )
    other = OpSpec(forward=Forward(input=fmt, output=fmt), grad_input=GradInput(grad=fmt, output=fmt))
    rules = (Rule(kind=GEMMS, spec=gemm), Rule(kind=ELEMENTWISE, spec=other))
    return Profile(name="everything", description="for a test", source=SOURCE, rules=rules)
