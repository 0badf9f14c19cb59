"""Ops as hardware computes them: accumulators in products, tables in softmax, norms and activations."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models import SOURCE, inputs, llama, mlp, tokens
from torch import nn

import aqnsim
from aqnsim import ConfigError, functions
from aqnsim.profiles import Forward, GradInput, GradWeight, OpSpec, Profile, Rule, from_toml

EXP = "table(function='exp', index_bits=6)"
RSQRT = "table(function='rsqrt', index_bits=6)"


def of(*rules: tuple[str, OpSpec]) -> Profile:
    made = tuple(Rule(kind=kind, spec=spec) for kind, spec in rules)
    return Profile(name="test", description="for a test", source=SOURCE, rules=made)


# ---- accumulators ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("unit", ["hopper_fp8", "ampere_bf16", "accumulator(fraction_bits=13, chunk=8)"])
def test_every_product_of_a_linear_layer_adds_as_its_unit_does(unit: str) -> None:
    spec = OpSpec(
        forward=Forward(input="fp8_e4m3", weight="fp8_e4m3", accumulator=unit),
        grad_input=GradInput(grad="fp8_e5m2", accumulator=unit),
        grad_weight=GradWeight(grad="fp8_e5m2", accumulator="ieee_fp32"),
    )
    layer = nn.Linear(96, 40, bias=False)
    model, x = nn.Sequential(layer), inputs(24, 96).requires_grad_()
    g = inputs(24, 40, seed=1)
    with aqnsim.emulate(model, of(("linear", spec))) as emu:
        y = model(x)
        y.backward(g)
        assert {r.requested for r in emu.receipts() if r.stream == "grad-input"} <= {spec.grad_input.accumulator}
    xq, wq = (aqnsim.cast(t.detach(), "fp8_e4m3") for t in (x, layer.weight))
    gq = aqnsim.cast(g, "fp8_e5m2")

    def gemm(a: torch.Tensor, b: torch.Tensor, accumulator: str) -> torch.Tensor:
        return torch.ops.aqnsim.gemm(a, b, accumulator)

    assert torch.equal(y, gemm(xq, wq.t(), unit))
    assert torch.equal(x.grad, gemm(gq, wq, unit))  # type: ignore[arg-type]
    assert torch.equal(layer.weight.grad, gemm(gq.t(), xq, "ieee_fp32"))  # type: ignore[arg-type]


def test_an_accumulator_of_few_bits_moves_the_logits_and_a_bias_is_added_after_it() -> None:
    model, x = mlp(), inputs(5, 40)
    clean = model(x)
    with aqnsim.emulate(
        model, of(("linear", OpSpec(forward=Forward(accumulator="accumulator(fraction_bits=6, chunk=4)"))))
    ):
        hidden = torch.ops.aqnsim.gemm(x, model[0].weight.t().detach(), "accumulator(fraction_bits=6, chunk=4)")
        assert torch.equal(model[0](x), hidden + model[0].bias)
        assert not torch.equal(model(x), clean)


def test_two_names_of_one_accumulator_have_one_fingerprint() -> None:
    text = """
        name = "a"
        description = "a"
        source.definition = "a"
        [[rule]]
        kind = "linear"
        forward.accumulator = "UNIT"
    """
    named, spelt = (
        from_toml(text.replace("UNIT", unit)).fingerprint
        for unit in ("hopper_fp8", "accumulator(fraction_bits=13, chunk=32, result_bits=13)")
    )
    assert named == spelt
    with pytest.raises(aqnsim.UnknownNameError, match="hopper_fp8"):
        from_toml(text.replace("UNIT", "hoper_fp8"))


# ---- tables ---------------------------------------------------------------------------------------------------------


def test_softmax_norms_and_activations_are_read_from_tables() -> None:
    def logits(bits: int | None) -> Any:
        model = llama()
        if bits is None:
            return model(input_ids=tokens()).logits
        tables = {"softmax": "exp", "norm": "rsqrt", "activation": "exp"}
        specs = [
            (kind, OpSpec(forward=Forward(approximation=f"table(function={f!r}, index_bits={bits})")))
            for kind, f in tables.items()
        ]
        with aqnsim.emulate(model, of(*specs)) as emu:
            result = model(input_ids=tokens()).logits
            assert len({r.site for r in emu.receipts()}) == 2 + 5 + 2
            return result

    exact = logits(None)
    errors = [float((logits(bits) - exact).abs().max()) for bits in (2, 5, 8)]
    assert errors[0] > 4 * errors[1] > 16 * errors[2] > 0


def test_an_emulated_norm_and_activation_are_those_of_the_tables() -> None:
    model = nn.Sequential(nn.RMSNorm(32, eps=1e-6), nn.SiLU())
    x = inputs(4, 32)
    specs = (
        ("norm", OpSpec(forward=Forward(approximation=RSQRT))),
        ("activation", OpSpec(forward=Forward(approximation=EXP))),
    )
    with aqnsim.emulate(model, of(*specs), example={"input": x}):
        y = model(x)
    expected = functions.silu(functions.rms_norm(x, model[0].weight.detach(), 1e-6, 0.0, RSQRT), EXP)
    assert torch.equal(y, expected)


@pytest.mark.parametrize(
    ("kind", "tables", "message"),
    [
        (
            "add",
            EXP,
            "forward.approximation means nothing for an op of kind 'add'; kinds .*: softmax, norm, activation",
        ),
        ("softmax", RSQRT, "a softmax needs a table of 'exp'"),
        ("norm", f"{RSQRT} + {EXP}", "a norm computes no 'exp'"),
    ],
)
def test_tables_that_an_op_does_not_read_are_refused(kind: str, tables: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Rule(kind=kind, spec=OpSpec(forward=Forward(approximation=tables)))


def test_an_activation_without_tables_is_refused_by_name() -> None:
    model = nn.Sequential(nn.ReLU())
    with pytest.raises(ConfigError, match="'0' is a ReLU, which is neither SiLU nor GELU"):
        aqnsim.emulate(
            model, of(("activation", OpSpec(forward=Forward(approximation=EXP)))), example={"input": inputs(2, 4)}
        )
