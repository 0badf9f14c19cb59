"""Profiles that ask for everything at once, and a model's run under them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from models import SOURCE
from torch import Tensor, nn
from values import same_bits

from aqnsim import AbsoluteGaussian, RelativeGaussian
from aqnsim.profiles import Forward, GradInput, GradWeight, OpSpec, Profile, Rule

FIVE = str(RelativeGaussian(0.05))
UNIT = str(AbsoluteGaussian(1.0))
STOCHASTIC = "fp8_e5m2(rounding=stochastic)"

LINEAR = OpSpec(
    forward=Forward(input="mxfp8_e4m3", weight="mxfp4", error=FIVE, output="bf16"),
    grad_input=GradInput(grad=STOCHASTIC, weight="mxfp8_e4m3", error=FIVE, output="bf16"),
    grad_weight=GradWeight(grad="mxfp4", input="mxfp4", hadamard=16, error=FIVE),
)
NORM = OpSpec(
    forward=Forward(input="bf16", error=FIVE, output=STOCHASTIC),
    grad_input=GradInput(error=FIVE, output="bf16"),
    grad_weight=GradWeight(error=FIVE),
)
ELEMENTWISE = OpSpec(
    forward=Forward(input="bf16", error=str(RelativeGaussian(0.01)), output="bf16"),
    grad_input=GradInput(grad="bf16", error=str(RelativeGaussian(0.01))),
)
PRODUCT = OpSpec(
    forward=Forward(input="fp8_e4m3", weight="mxfp8_e4m3", error=FIVE),
    grad_input=GradInput(grad=STOCHASTIC, weight="mxfp8_e4m3", error=FIVE),
    grad_weight=GradWeight(grad="fp8_e5m2", input="mxfp8_e4m3", hadamard=16, error=FIVE),
)
PLAIN_PRODUCT = OpSpec(
    forward=Forward(input="fp8_e4m3", weight="fp8_e4m3", error=FIVE),
    grad_input=GradInput(grad=STOCHASTIC, error=FIVE),
)
PER_HEAD = OpSpec(
    forward=Forward(error=FIVE, output=STOCHASTIC), grad_input=GradInput(grad="fp8_e5m2", error=FIVE, output="bf16")
)


def rules(*table: tuple[str | tuple[str, ...], OpSpec]) -> Profile:
    """A profile of a rule for each kind."""
    made = tuple(Rule(kind=kind, spec=spec) for kind, spec in table)
    return Profile(name="mixed", description="for a test", source=SOURCE, rules=made)


MIXED = rules(
    ("linear", LINEAR),
    ("norm", NORM),
    (("activation", "add", "multiply"), ELEMENTWISE),
    (("qk", "pv"), PRODUCT),
    (("softmax", "rope", "kv_cache"), PER_HEAD),
)
"""Formats, errors and stochastic rounding on every kind of op."""

BY_TOKEN = rules(
    *((r.kind, r.spec) for r in MIXED.rules if "qk" not in r.kinds),
    ("qk", PRODUCT),
    ("pv", PLAIN_PRODUCT),
)
"""The same where each token's result depends on earlier tokens alone: blocks of values would run along the tokens."""


def gpt2(dtype: torch.dtype = torch.float32) -> nn.Module:
    """A GPT-2 of two layers: transposed linear layers with biases, LayerNorms, a tied head."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=64,
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=64,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        initializer_range=0.2,
        bos_token_id=1,
        eos_token_id=2,
    )
    model = GPT2LMHeadModel(config).eval().to(dtype)
    model.loss_type = "ForCausalLM"  # else transformers warns, which torch.compile cannot trace
    return model


def step(model: nn.Module, run: Callable[[], Tensor]) -> list[Tensor]:
    """A result and every gradient of its mean square."""
    model.zero_grad()
    out = run()
    out.float().square().mean().backward()
    return [out.detach(), *gradients(model)]


def gradients(model: nn.Module) -> list[Tensor]:
    """A copy of every gradient that there is."""
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


def assert_all_same(found: list[Tensor], expected: list[Tensor]) -> None:
    """Lists of tensors of the same bits; the message says which differ."""
    assert len(found) == len(expected)
    other = [i for i, (a, b) in enumerate(zip(found, expected, strict=True)) if not same_bits(a, b)]
    assert not other, f"tensors {other} of {len(found)} differ"
