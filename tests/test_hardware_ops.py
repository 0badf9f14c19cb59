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
        ("add", EXP, "forward.approximation means nothing for an op of kind 'add'; there .*: input, error, output"),
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


# ---- faults in what is stored ---------------------------------------------------------------------------------------


def test_a_bit_of_an_operand_s_codes_flips_at_the_rate_that_was_asked_for() -> None:
    layer, x = nn.Linear(128, 64, bias=False), inputs(256, 128)
    spec = OpSpec(forward=Forward(input="mxfp4 + bit-flip(rate=0.01, bit=3, target=codes)", weight="mxfp4"))
    with aqnsim.emulate(nn.Sequential(layer), of(("linear", spec))) as emu:
        y = emu.model(x)
        (receipt,) = [r for r in emu.receipts() if r.stream == "input"]
    assert receipt.requested == "mxfp4 + bit-flip(rate=0.01, bit=3, target=codes)"
    assert receipt.requested_rate == pytest.approx(0.01)
    n = x.numel()
    assert abs(receipt.realised_rate - 0.01) < 3.9 * (0.01 * 0.99 / n) ** 0.5  # type: ignore[operator]
    clean = aqnsim.cast(x, "mxfp4") @ aqnsim.cast(layer.weight, "mxfp4").t()
    rows = (y != clean).any(1)  # bit 3 is the sign: a row without a flip is untouched
    assert 0.5 < float(rows.float().mean()) < 0.9


def test_faults_in_scales_change_whole_blocks_and_other_errors_are_no_operands() -> None:
    spec = OpSpec(forward=Forward(weight="mxfp8_e4m3 + bit-flip(rate=0.05, bit=0, target=scales, draw=frozen)"))
    layer = nn.Linear(64, 32, bias=False)
    with aqnsim.emulate(nn.Sequential(layer), of(("linear", spec))) as emu:
        identity = emu.model(torch.eye(64)).t()  # the weight as it is used
        assert torch.equal(identity, emu.model(torch.eye(64)).t())
    ratio = (identity / aqnsim.cast(layer.weight, "mxfp8_e4m3")).nan_to_num(1.0)
    blocks = ratio.unflatten(1, (2, 32))
    assert torch.equal(blocks.amin(-1), blocks.amax(-1))
    assert 0 < float((blocks[..., 0] != 1).float().mean()) < 0.25
    with pytest.raises(ConfigError, match="after a format stands a bit-flip with target=codes or target=scales"):
        Forward(input="mxfp4 + dead-zone(threshold=0.1)")


def test_an_error_relative_to_what_is_added_up_grows_where_results_cancel() -> None:
    x = torch.ones(512, 2)
    weight = torch.tensor([[1.0, -1.0 + 2**-10]])
    layer = nn.Linear(2, 1, bias=False)
    layer.weight.data = weight
    for reference, size in (("output", 2**-10), ("absdot", 2.0)):
        error = f"relative-gaussian(sigma=0.01, reference={reference})".replace(", reference=output", "")
        with aqnsim.emulate(nn.Sequential(layer), of(("linear", OpSpec(forward=Forward(error=error))))) as emu:
            missed = emu.model(x) - 2**-10
        assert float(missed.std()) == pytest.approx(0.01 * size, rel=0.15)


# ---- convolutions ---------------------------------------------------------------------------------------------------


class Convolves(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(inputs(8, 32, 3, seed=4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.conv1d(x, self.weight, padding=1)


def test_a_convolution_takes_both_operands_in_blocks_of_channels() -> None:
    model, x = Convolves(), inputs(2, 32, 10).requires_grad_()
    spec = OpSpec(forward=Forward(input="mxfp8_e4m3", weight="mxfp4"))
    with aqnsim.emulate(model, of(("conv", spec)), example={"x": x.detach()}) as emu:
        y = model(x)
        y.sum().backward()
        assert {r.stream: r.requested for r in emu.receipts()} == {"weight": "mxfp4", "input": "mxfp8_e4m3"}
    xq, wq = aqnsim.cast(x, "mxfp8_e4m3", axis=1), aqnsim.cast(model.weight, "mxfp4", axis=1)
    assert torch.equal(y, nn.functional.conv1d(xq, wq, padding=1))
    assert x.grad is not None
    assert model.weight.grad is not None


def test_a_float16_model_adds_as_its_unit_does() -> None:
    layer, x = nn.Linear(64, 32, bias=False).half(), inputs(8, 64).half()
    with aqnsim.emulate(nn.Sequential(layer), of(("linear", OpSpec(forward=Forward(accumulator="volta_fp16"))))) as emu:
        y = emu.model(x)
    expected = torch.ops.aqnsim.gemm(x.float(), layer.weight.float().t(), "volta_fp16")
    assert torch.equal(y, expected.half())
