"""Each direction of a product on its own: what is cast, along which axis, what rotates, what a bias adds to."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from mixed import FIVE, STOCHASTIC, rules
from models import inputs, llama, tokens
from torch import Tensor, nn
from torch.nn import functional as F
from values import same_bits

import aqnsim
import aqnsim.ops
from aqnsim import NoiseKey
from aqnsim.accumulator import HOST
from aqnsim.backends import cpu
from aqnsim.backends.compose import _Direction
from aqnsim.profiles import Forward, GradInput, GradWeight, OpSpec
from aqnsim.receipts import STREAMS
from aqnsim.rng import clock, key_of

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
KEYS = [key_of(0, "site", stream) for stream in STREAMS]
CLOCK = torch.tensor(clock(5, "train"))

EVERY = OpSpec(
    forward=Forward(input="mxfp8_e4m3", weight="mxfp4", output="bf16"),
    grad_input=GradInput(grad=STOCHASTIC, weight="mxfp8_e4m3", output="fp8_e5m2"),
    grad_weight=GradWeight(grad="mxfp4", input="mxfp8_e5m2", output="bf16"),
)
STRAIGHT = OpSpec(
    forward=Forward(input="mxfp8_e4m3", weight="mxfp4"), grad_input=GradInput(grad="fp8_e5m2"), grad_weight=GradWeight()
)


def cast(x: Tensor, fmt: str | None, axis: int, stream: str = "") -> Tensor:
    if fmt is None:
        return x
    key = NoiseKey(seed=0, site="site", stream=stream, step=5) if "stochastic" in fmt else None
    return aqnsim.cast(x, fmt, axis=axis, key=key)


def product(a: Tensor, b: Tensor, output: str | None) -> Tensor:
    if output is None:
        return a @ b
    return cast(torch.ops.aqnsim.gemm(a, b, HOST), output, -1).to(a.dtype)


@DTYPES
@pytest.mark.parametrize("spec", [EVERY, STRAIGHT], ids=["every", "straight"])
def test_a_linear_layer_casts_each_operand_along_the_contraction_of_its_product(
    dtype: torch.dtype, spec: OpSpec
) -> None:
    x, w, g = inputs(70, 40, dtype=dtype), inputs(48, 40, dtype=dtype, seed=1), inputs(70, 48, dtype=dtype, seed=2)
    args = (spec.text, True, KEYS, CLOCK, None)
    y, _ = torch.ops.aqnsim.linear(x, w, None, *args, None)
    gx, gw, _ = torch.ops.aqnsim.linear_backward(g, x, w, *args, True, True)

    forward, grad_input, grad_weight = spec.forward, spec.grad_input, spec.grad_weight
    xq, wq = cast(x, forward.input, -1), cast(w, forward.weight, -1)
    assert same_bits(y, product(xq, wq.t(), forward.output))
    gq = cast(g, grad_input.grad, -1, "grad-input.grad")
    held = cast(w, grad_input.weight, -2) if grad_input.weight else wq
    assert same_bits(gx, product(gq, held, grad_input.output))
    gq = cast(g, grad_weight.grad, -2)
    held = cast(x, grad_weight.input, -2) if grad_weight.input else xq
    assert same_bits(gw, product(gq.t(), held, grad_weight.output))


@DTYPES
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("spec", [EVERY, STRAIGHT], ids=["every", "straight"])
def test_a_product_of_activations_does_so_too(dtype: torch.dtype, transposed: bool, spec: OpSpec) -> None:
    a, g = inputs(2, 3, 70, 40, dtype=dtype), inputs(2, 3, 70, 48, dtype=dtype, seed=2)
    b = inputs(2, 3, *((48, 40) if transposed else (40, 48)), dtype=dtype, seed=1)
    along, across = (-1, -2) if transposed else (-2, -1)
    args = (KEYS, CLOCK, None, None, None)
    y, _ = torch.ops.aqnsim.matmul(a, b, transposed, spec.text, dtype, *args, None)
    ga, gb, _ = torch.ops.aqnsim.matmul_backward(g, a, b, transposed, spec.text, *args, True, True)

    def turned(t: Tensor) -> Tensor:
        """The second operand as ``[contraction, columns]``."""
        return t.mT if transposed else t

    forward, grad_input, grad_weight = spec.forward, spec.grad_input, spec.grad_weight
    aq, bq = cast(a, forward.input, -1), cast(b, forward.weight, along)
    assert same_bits(y, product(aq, turned(bq), forward.output))
    gq = cast(g, grad_input.grad, -1, "grad-input.grad")
    held = cast(b, grad_input.weight, across) if grad_input.weight else bq
    assert same_bits(ga, product(gq, turned(held).mT, grad_input.output))
    gq = cast(g, grad_weight.grad, -2)
    held = cast(a, grad_weight.input, -2) if grad_weight.input else aq
    expected = product(gq.mT, held, grad_weight.output) if transposed else product(held.mT, gq, grad_weight.output)
    assert same_bits(gb, expected)


@pytest.mark.parametrize("size", [16, 64])
@pytest.mark.parametrize("length", [64, 70])
def test_a_rotation_without_casts_leaves_the_gradients(size: int, length: int) -> None:
    x, w, g = inputs(length, 40), inputs(48, 40, seed=1), inputs(length, 48, seed=2)
    spec = OpSpec(grad_input=GradInput(hadamard=size), grad_weight=GradWeight(hadamard=size))
    gx, gw, _ = torch.ops.aqnsim.linear_backward(g, x, w, spec.text, False, KEYS, CLOCK, None, True, True)
    torch.testing.assert_close(gx, g @ w, rtol=1e-5, atol=2e-5)
    torch.testing.assert_close(gw, g.t() @ x, rtol=1e-5, atol=2e-5)
    assert not torch.equal(gw, g.t() @ x)  # it was rotated


def test_the_signs_of_a_rotation_do_not_repeat() -> None:
    direction = _Direction(cpu.cast, cpu.gemm, cpu.missed, GradWeight(), KEYS[8:], CLOCK)
    signs = direction._signs(128, torch.empty(0))
    assert torch.equal(signs[:16], direction._signs(16, torch.empty(0)))
    assert all(not torch.equal(signs[:32], signs[i : i + 32]) for i in range(1, 97))


def test_a_rotation_helps_a_block_format_with_outliers() -> None:
    x, w, g = inputs(512, 64), inputs(64, 64, seed=1), inputs(512, 64, seed=2)
    g[::32] *= 20  # a token in each block dwarfs the others
    exact = (g.double().t() @ x.double()).float()

    def sqnr(size: int | None) -> float:
        spec = OpSpec(grad_weight=GradWeight(grad="mxfp4", input="mxfp4", hadamard=size))
        _, gw, _ = torch.ops.aqnsim.linear_backward(g, x, w, spec.text, False, KEYS, CLOCK, None, False, True)
        return float(10 * torch.log10(exact.square().mean() / (gw - exact).square().mean()))

    assert sqnr(16) > sqnr(None) + 2


@DTYPES
@pytest.mark.parametrize("bias", ["exact", "missed"])
def test_a_bias_is_added_after_the_error_or_before_it(dtype: torch.dtype, bias: str) -> None:
    x, w, b = inputs(6, 40, dtype=dtype), inputs(48, 40, dtype=dtype, seed=1), inputs(48, dtype=dtype, seed=2)
    spec = OpSpec(forward=Forward(error=FIVE, bias=bias))
    y, _ = torch.ops.aqnsim.linear(x, w, b, spec.text, True, KEYS, CLOCK, None, None)

    def missed(t: Tensor) -> Tensor:
        return torch.ops.aqnsim.perturb(t, FIVE, KEYS[2], CLOCK, None, None, None, False)[0]  # type: ignore[no-any-return]

    clean = torch.ops.aqnsim.gemm(x, w.t(), HOST)
    expected = missed(clean) + b.float() if bias == "exact" else missed(clean + b.float())
    assert same_bits(y, expected.to(dtype))


def test_a_frozen_weight_costs_no_product_and_counts_none() -> None:
    layer = nn.Linear(40, 48, bias=False).requires_grad_(False)
    model = nn.Sequential(layer, nn.Linear(48, 8, bias=False))
    spec = OpSpec(grad_weight=GradWeight(grad="mxfp4", input="mxfp4", error=FIVE))
    with aqnsim.emulate(model, rules(("linear", spec))) as emu:
        model(inputs(5, 40)).sum().backward()
        found = {(r.site, r.stream) for r in emu.receipts() if r.stream.startswith("grad-weight")}
    assert {site for site, _ in found} == {"1"}
    assert layer.weight.grad is None


def test_a_frozen_weight_is_cast_for_the_backward_from_what_it_holds() -> None:
    layer = nn.Linear(40, 48, bias=False).requires_grad_(False)
    w, x, g = layer.weight.detach().clone(), inputs(5, 40).requires_grad_(), inputs(5, 48, seed=1)
    spec = OpSpec(forward=Forward(weight="mxfp4"), grad_input=GradInput(weight="mxfp8_e4m3"))
    with aqnsim.emulate(layer, rules(("linear", spec))):
        layer(x).backward(g)
    assert x.grad is not None
    assert same_bits(x.grad, g @ aqnsim.cast(aqnsim.cast(w, "mxfp4"), "mxfp8_e4m3", axis=-2))


@pytest.mark.parametrize("frozen", [False, True])
def test_a_tied_head_and_its_embedding_each_get_their_gradient(frozen: bool) -> None:
    model, ids = llama(tied=True), tokens()
    table = model.get_input_embeddings().weight
    model.lm_head.requires_grad_(not frozen)
    spec = OpSpec(forward=Forward(weight="mxfp4"), grad_weight=GradWeight(grad="mxfp4", error=FIVE))
    seen: list[Any] = []
    model.lm_head.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    with aqnsim.emulate(model, rules(("linear", spec))) as emu:
        before = table.detach().clone()
        out = model(input_ids=ids).logits
        assert same_bits(out.detach(), F.linear(seen[0], aqnsim.cast(before, "mxfp4")))
        out.square().mean().backward()
        heads = [r for r in emu.receipts() if r.site == "lm_head" and r.stream == "grad-weight"]
    assert same_bits(table.detach(), before)
    assert len(heads) == (0 if frozen else 1)
    assert (table.grad is None) == frozen
