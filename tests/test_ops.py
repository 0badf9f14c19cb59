"""The ops: torch's own checks, exact straight-through gradients, and fused equals composed."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from values import same_bits

import aqnsim
from aqnsim import BackendError, ConfigError, NoiseKey, RelativeGaussian, formats
from aqnsim.accumulator import HOST
from aqnsim.backends.compose import _SPREAD
from aqnsim.profiles import Forward, GradInput, GradWeight, OpSpec
from aqnsim.receipts import STATS, STREAMS

aqnsim.cast  # noqa: B018  (defines the ops)
OPS = torch.ops.aqnsim
ERROR = str(RelativeGaussian(0.05))
PLAIN = OpSpec()
W4A16 = OpSpec(forward=Forward(weight="mxfp4"))
W4A4 = OpSpec(forward=Forward(input="mxfp4", weight="mxfp4"))
NVFP4 = OpSpec(forward=Forward(input="nvfp4", weight="nvfp4"))
NOISY = OpSpec(
    forward=Forward(input="mxfp4", weight="nvfp4", error=ERROR),
    grad_input=GradInput(error=ERROR),
    grad_weight=GradWeight(error="absolute-gaussian(sigma=0.1)"),
)
FORWARD_ONLY = OpSpec(forward=Forward(error=ERROR))
SPECS = {"w4a16": W4A16, "w4a4": W4A4, "nvfp4": NVFP4, "noisy": NOISY, "error only": FORWARD_ONLY}
KEYS = [NoiseKey(stream=s).value for s in STREAMS]
OUTPUT, GRAD_INPUT, GRAD_WEIGHT = (STREAMS.index(s) for s in ("output", "grad-input", "grad-weight"))
STEP = torch.tensor(3)
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])


def tensor(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0, grad: bool = False) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=g).to(dtype).requires_grad_(grad)


# ---- torch's checks ------------------------------------------------------------------------------------------------


FORMATS = [
    "mxfp4",
    "mxfp4(block=32x32)",
    "nvfp4",
    "hif4",
    "hif8",
    "fp8_e4m3",
    "fp8_e4m3_tensor",
    "int8_token",
    "e3m4",
    "fp8_e4m3_128x128(rounding=stochastic-8)",
]


@DTYPES
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("fmt", FORMATS)
def test_opcheck_cast(fmt: str, dtype: torch.dtype, grad: bool) -> None:
    for x in (tensor(3, 70, dtype=dtype, grad=grad), tensor(4, 3, 5, dtype=dtype).transpose(0, 2).requires_grad_(grad)):
        torch.library.opcheck(OPS.cast.default, (x, fmt, 1, KEYS[0], STEP, None, True))


def opcheck(op: Any, arguments: tuple[Any, ...], fmt: str) -> None:
    """torch's checks; that of the schema compares values, which torch cannot do in float8, E4M3 scales."""
    checks = ["test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"]
    torch.library.opcheck(op, arguments, test_utils=checks[1:] if fmt == "nvfp4" else checks)


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("axis", [0, 1])
def test_opcheck_quantize_and_dequantize(fmt: str, axis: int) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        arguments = (tensor(33, 70, dtype=dtype), fmt, axis, KEYS[0], STEP, None)
        opcheck(OPS.elements.default, arguments, fmt)
        opcheck(OPS.quantize.default, arguments, fmt)
        parts = OPS.quantize(*arguments)
        opcheck(OPS.dequantize.default, (*parts, fmt, axis, [33, 70], dtype), fmt)


def test_opcheck_results_in_given_tensors() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        x = tensor(33, 70, dtype=dtype)
        for fmt in ("mxfp4", "nvfp4", "hif4", "fp8_e4m3"):
            draws = (KEYS[0], None, None)
            parts = OPS.quantize(x, fmt, 1, *draws)
            opcheck(OPS.cast_out.default, (x, fmt, 1, *draws, torch.empty_like(x)), fmt)
            opcheck(OPS.quantize_out.default, (x, fmt, 1, *draws, *(torch.empty_like(t) for t in parts)), fmt)
            opcheck(OPS.dequantize_out.default, (*parts, fmt, 1, torch.empty_like(x)), fmt)
        torch.library.opcheck(OPS.perturb_out.default, (x, ERROR, KEYS[0], STEP, None, None, torch.empty_like(x)))


def test_a_compiled_cast_is_written_where_it_is_asked_for() -> None:
    def run(x: Tensor, y: Tensor) -> Tensor:
        aqnsim.cast(x, "mxfp4", out=y)
        aqnsim.cast(x, "nvfp4", out=x)
        return x + y

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    given = [(tensor(4, 64), torch.empty(4, 64)) for _ in range(2)]
    assert same_bits(run(*given[0]), compiled(*given[1]))
    for eager, traced in zip(*given, strict=True):
        assert same_bits(eager, traced)


@DTYPES
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("out", [None, torch.float32, torch.bfloat16])
def test_opcheck_perturb(dtype: torch.dtype, grad: bool, out: torch.dtype | None) -> None:
    y = tensor(5, 30, dtype=dtype, grad=grad)
    chain = f"relative-gaussian(sigma=0.1, reference=absdot) + {ERROR} + stuck(rate=0.1, value=0.0)"
    for rows in (None, torch.arange(5) * 7, torch.stack([torch.arange(5), torch.arange(5) * 3], 1)):
        torch.library.opcheck(OPS.perturb.default, (y, ERROR, KEYS[0], STEP, rows, None, out, True))
        torch.library.opcheck(OPS.perturb.default, (y, chain, KEYS[0], STEP, rows, tensor(5, 30).abs(), out, True))


@DTYPES
@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
@pytest.mark.parametrize(
    ("x_grad", "w_grad", "bias", "with_rows", "with_receipt"),
    [
        (False, False, False, False, False),
        (True, False, True, False, False),
        (True, True, True, True, False),
        (True, True, False, True, True),
    ],
)
def test_opcheck_linear(
    dtype: torch.dtype, spec: OpSpec, x_grad: bool, w_grad: bool, bias: bool, with_rows: bool, with_receipt: bool
) -> None:
    x, w = tensor(2, 3, 40, dtype=dtype, grad=x_grad), tensor(8, 40, dtype=dtype, seed=1, grad=w_grad)
    b = tensor(8, dtype=dtype, seed=2, grad=w_grad) if bias else None
    rows = torch.arange(6) * 11 if with_rows else None
    receipt = torch.zeros(len(STREAMS), len(STATS), dtype=torch.float64) if with_receipt else None
    torch.library.opcheck(OPS.linear.default, (x, w, b, spec.text, True, KEYS, STEP, rows, receipt))


@pytest.mark.parametrize("need", [(True, True), (True, False), (False, True)])
def test_opcheck_linear_backward(need: tuple[bool, bool]) -> None:
    g, x, w = tensor(2, 3, 8), tensor(2, 3, 40), tensor(8, 40)
    torch.library.opcheck(OPS.linear_backward.default, (g, x, w, NOISY.text, True, KEYS, STEP, torch.arange(6), *need))


def test_opcheck_record() -> None:
    torch.library.opcheck(OPS.record.default, (torch.zeros(3, len(STATS)), torch.ones(3, len(STATS))))


# ---- straight-through gradients ------------------------------------------------------------------------------------


def run_linear(
    spec: OpSpec, x: Tensor, w: Tensor, b: Tensor | None = None, rows: Tensor | None = None, cast_weight: bool = True
) -> tuple[Tensor, Tensor]:
    return OPS.linear(x, w, b, spec.text, cast_weight, KEYS, STEP, rows, None)


def cast_as(x: Tensor, fmt: str | None) -> Tensor:
    return aqnsim.cast(x.detach(), fmt) if fmt else x.detach()


@DTYPES
@pytest.mark.parametrize("spec", [W4A16, W4A4, NVFP4], ids=["w4a16", "w4a4", "nvfp4"])
@pytest.mark.parametrize("shape", [(6, 72), (2, 3, 72)])
def test_gradients_are_those_of_the_gemm_of_the_cast_operands(
    dtype: torch.dtype, spec: OpSpec, shape: tuple[int, ...]
) -> None:
    x, w = tensor(*shape, dtype=dtype, grad=True), tensor(16, 72, dtype=dtype, seed=1, grad=True)
    b = tensor(16, dtype=dtype, seed=3, grad=True)
    g = tensor(*shape[:-1], 16, dtype=dtype, seed=2)
    run_linear(spec, x, w, b)[0].backward(g)
    xq, wq = cast_as(x, spec.forward.input), cast_as(w, spec.forward.weight)
    flat = g.reshape(-1, 16)
    assert x.grad is not None
    assert same_bits(x.grad, (flat @ wq).reshape(shape))
    assert w.grad is not None
    assert same_bits(w.grad, flat.t() @ xq.reshape(-1, 72))
    assert b.grad is not None
    assert same_bits(b.grad, flat.sum(0))
    # and so not those of the operands before the cast
    assert not torch.equal(x.grad, (flat @ w.detach()).reshape(shape))


@DTYPES
def test_gradients_equal_autograd_s_own_on_the_cast_operands(dtype: torch.dtype) -> None:
    x, w = tensor(6, 72, dtype=dtype, grad=True), tensor(16, 72, dtype=dtype, seed=1, grad=True)
    g = tensor(6, 16, dtype=dtype, seed=2)
    run_linear(W4A4, x, w)[0].backward(g)
    xq, wq = (cast_as(t, "mxfp4").requires_grad_() for t in (x, w))
    F.linear(xq, wq).backward(g)
    torch.testing.assert_close(x.grad, xq.grad)
    torch.testing.assert_close(w.grad, wq.grad)


def test_the_gradient_predicts_what_a_step_does() -> None:
    x, w = tensor(32, 64), tensor(16, 64, seed=1, grad=True)
    g, direction = tensor(32, 16, seed=2), tensor(16, 64, seed=3)
    run_linear(W4A4, x, w)[0].backward(g)
    assert w.grad is not None
    xq, wq = cast_as(x, "mxfp4").double(), cast_as(w, "mxfp4").double()
    difference = ((F.linear(xq, wq + direction) - F.linear(xq, wq)) * g).sum()
    assert (w.grad * direction).sum() == pytest.approx(float(difference), rel=1e-4)


@DTYPES
@pytest.mark.parametrize("name", ["cast", "perturb"])
def test_cast_and_perturb_pass_gradients_straight_through(name: str, dtype: torch.dtype) -> None:
    x, g = tensor(4, 50, dtype=dtype, grad=True), tensor(4, 50, dtype=dtype, seed=1)
    y = aqnsim.cast(x, "mxfp4") if name == "cast" else aqnsim.perturb(x, RelativeGaussian(0.1), NoiseKey())
    assert not torch.equal(y, x)
    y.backward(g)
    assert x.grad is not None
    assert same_bits(x.grad, g)


def test_perturb_to_another_dtype_returns_a_gradient_of_the_input_s() -> None:
    y = tensor(3, 8, grad=True)
    OPS.perturb(y, ERROR, 0, STEP, None, None, torch.bfloat16, False)[0].sum().backward()
    assert y.grad is not None
    assert y.grad.dtype == torch.float32


def gemms(run: Any) -> int:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        run()
    return sum(e.name in ("aten::mm", "aten::addmm", "aten::bmm") for e in profile.events())


@pytest.mark.parametrize("spec", [W4A16, W4A4, NOISY], ids=["w4a16", "w4a4", "noisy"])
@pytest.mark.parametrize(("x_grad", "w_grad", "expected"), [(True, True, 2), (True, False, 1), (False, True, 1)])
def test_only_the_gradients_that_are_needed_cost_a_gemm(
    spec: OpSpec, x_grad: bool, w_grad: bool, expected: int
) -> None:
    y, _ = run_linear(spec, tensor(4, 64, grad=x_grad), tensor(8, 64, seed=1, grad=w_grad))
    assert gemms(lambda: y.sum().backward()) == expected


@pytest.mark.parametrize("spec", [W4A16, W4A4], ids=["w4a16", "w4a4"])
def test_a_frozen_weight_keeps_no_activation(spec: OpSpec) -> None:
    kept: list[int] = []

    def pack(t: Tensor) -> Tensor:
        kept.append(t.untyped_storage().data_ptr())
        return t

    x, w = tensor(64, 32, grad=True), tensor(8, 32, seed=1)
    hidden = x * 2
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y, _ = run_linear(spec, hidden, w)
    assert hidden.untyped_storage().data_ptr() not in kept
    y.sum().backward()
    assert x.grad is not None


def test_a_frozen_weight_costs_no_cast_of_the_input_in_the_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    from aqnsim import _core

    y, _ = run_linear(W4A4, tensor(64, 32, grad=True), tensor(8, 32, seed=1))
    calls = []
    original = _core.cast
    monkeypatch.setattr(_core, "cast", lambda *a: calls.append(a[5]) or original(*a))
    y.sum().backward()
    assert calls == [(8, 1, 32)]  # the weight, for grad-input


# ---- composition ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fmt", [n for n in formats.ALL if formats.element_of(formats.get(n)).signed])
def test_linear_casts_its_operands_to_any_format(fmt: str) -> None:
    x, w = tensor(5, 140, grad=True), tensor(12, 140, seed=1, grad=True)
    y = run_linear(OpSpec(forward=Forward(input=fmt, weight=fmt)), x, w)[0]
    assert same_bits(y, F.linear(cast_as(x, fmt), cast_as(w, fmt)))
    gx, gw = torch.autograd.grad(y, (x, w), tensor(5, 12, seed=2))
    assert same_bits(gx, tensor(5, 12, seed=2) @ cast_as(w, fmt))
    assert same_bits(gw, tensor(5, 12, seed=2).T @ cast_as(x, fmt))


@DTYPES
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("spec", [W4A16, W4A4, NVFP4], ids=["w4a16", "w4a4", "nvfp4"])
def test_linear_is_cast_then_gemm(dtype: torch.dtype, with_bias: bool, spec: OpSpec) -> None:
    x, w = tensor(2, 5, 70, dtype=dtype), tensor(12, 70, dtype=dtype, seed=1)
    b = tensor(12, dtype=dtype, seed=2) if with_bias else None
    expected = F.linear(cast_as(x, spec.forward.input), cast_as(w, spec.forward.weight), b)
    assert same_bits(run_linear(spec, x, w, b)[0], expected)
    # a weight that is cast already is not cast again
    expected = F.linear(cast_as(x, spec.forward.input), w, b)
    assert same_bits(run_linear(spec, x, w, b, cast_weight=False)[0], expected)


@DTYPES
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("rows", [None, torch.arange(10) * 3 + 1], ids=["own rows", "rows"])
def test_linear_is_cast_gemm_perturb_bias_round(dtype: torch.dtype, with_bias: bool, rows: Tensor | None) -> None:
    x, w = tensor(2, 5, 70, dtype=dtype, grad=True), tensor(12, 70, dtype=dtype, seed=1, grad=True)
    b = tensor(12, dtype=dtype, seed=2) if with_bias else None
    g = tensor(2, 5, 12, dtype=dtype, seed=3)
    y, _ = run_linear(NOISY, x, w, b, rows)
    y.backward(g)

    def missed(product: Tensor, error: str | None, key: int, r: Tensor | None) -> Tensor:
        return OPS.perturb(product, error, key, STEP, r, None, None, False)[0]

    xq, wq = cast_as(x, "mxfp4").view(10, 70), cast_as(w, "nvfp4")
    product = missed(OPS.gemm(xq, wq.t(), HOST), NOISY.forward.error, KEYS[OUTPUT], rows)
    expected = product if b is None else product + b.float()
    assert same_bits(y, expected.to(dtype).view(2, 5, 12))
    g2 = g.view(10, 12)
    assert x.grad is not None
    assert same_bits(
        x.grad.view(10, 70), missed(OPS.gemm(g2, wq, HOST), NOISY.grad_input.error, KEYS[GRAD_INPUT], rows).to(dtype)
    )
    own = None if rows is None else torch.arange(12) + rows[:1] * _SPREAD
    assert w.grad is not None
    assert same_bits(
        w.grad, missed(OPS.gemm(g2.t(), xq, HOST), NOISY.grad_weight.error, KEYS[GRAD_WEIGHT], own).to(dtype)
    )


def test_both_backends_give_the_same_linear() -> None:
    x, w = tensor(2, 5, 70, grad=True), tensor(12, 70, seed=1, grad=True)
    results = []
    for backend in ("cpu", "reference"):
        aqnsim.use_backend(backend)
        x.grad = w.grad = None
        y, stats = run_linear(NOISY, x, w)
        y.sum().backward()
        results.append((y, x.grad, w.grad, stats))
    for got, expected in zip(results[0][:3], results[1][:3], strict=True):
        assert same_bits(got, expected)  # type: ignore[arg-type]
    torch.testing.assert_close(results[0][3], results[1][3], rtol=2e-4, atol=0)


# ---- the error comes before the rounding ---------------------------------------------------------------------------


def stat(stats: Tensor, name: str) -> float:
    return float(stats[STATS.index(name)])


@pytest.mark.parametrize("with_bias", [False, True])
def test_an_error_far_below_half_an_ulp_still_changes_bf16_results(with_bias: bool) -> None:
    sigma = 1e-4
    spec = OpSpec(forward=Forward(error=str(RelativeGaussian(sigma))))
    x, w = tensor(64, 128, dtype=torch.bfloat16), tensor(256, 128, dtype=torch.bfloat16, seed=1)
    b = tensor(256, dtype=torch.bfloat16, seed=2) if with_bias else None
    y, stats = run_linear(spec, x, w, b)
    product = OPS.gemm(x, w.t(), HOST)
    clean = (product if b is None else product + b.float()).bfloat16()
    share = float((y != clean).double().mean())
    # |N(0, sigma)| over the spacing 2^-8 .. 2^-7 of bf16 gives the share of results that it carries over a midpoint
    assert 0.3 * sigma * 2**7 < share < 1.2 * sigma * 2**8
    # the receipt speaks of what was stored, not of the fp32 value before the rounding
    assert stat(stats[2], "changed") / stat(stats[2], "count") == share
    assert stat(stats[2], "error2") == pytest.approx(float((y.double() - clean.double()).square().sum()), rel=1e-3)
    realised = (stat(stats[2], "injected2") / stat(stats[2], "injected_n")) ** 0.5
    assert realised == pytest.approx(sigma, rel=0.03)


def test_the_same_error_on_a_rounded_bf16_result_changes_nothing() -> None:
    y = tensor(64, 256, dtype=torch.bfloat16)
    out, stats = OPS.perturb(y, str(RelativeGaussian(1e-4)), KEYS[0], STEP, None, None, None, True)
    assert same_bits(out, y)
    assert stat(stats, "changed") == 0
    assert stat(stats, "error2") == 0


@pytest.mark.parametrize(("sigma", "low", "high"), [(1e-3, 0.005, 0.03), (5e-3, 0.5, 0.65), (5e-2, 0.93, 1.0)])
def test_how_much_noise_survives_on_a_rounded_bf16_result(sigma: float, low: float, high: float) -> None:
    y = tensor(512, 512, dtype=torch.bfloat16)
    _, stats = OPS.perturb(y, str(RelativeGaussian(sigma)), KEYS[0], STEP, None, None, None, True)
    assert low < stat(stats, "changed") / stat(stats, "count") < high


@pytest.mark.parametrize("grad", ["grad_input", "grad_weight"])
def test_gradient_receipts_speak_of_what_was_stored(grad: str) -> None:
    spec = OpSpec.parse(json.dumps({grad: {"error": str(RelativeGaussian(1e-4))}}))
    g, x, w = (tensor(*s, dtype=torch.bfloat16, seed=i) for i, s in enumerate([(96, 64), (96, 128), (64, 128)]))
    gx, gw, stats = OPS.linear_backward(g, x, w, spec.text, True, KEYS, STEP, None, True, True)
    clean_x, clean_w, _ = OPS.linear_backward(g, x, w, PLAIN.text, True, KEYS, STEP, None, True, True)
    noisy, clean, s = (gx, clean_x, stats[2]) if grad == "grad_input" else (gw, clean_w, stats[6])
    exact = OPS.gemm(*{"grad_input": (g, w), "grad_weight": (g.t(), x)}[grad], HOST).bfloat16()
    share = float((noisy != exact).double().mean())
    assert 0 < share < 0.1
    assert stat(s, "changed") / stat(s, "count") == share
    assert clean.dtype == noisy.dtype == torch.bfloat16


# ---- clear errors --------------------------------------------------------------------------------------------------


def test_rows_that_do_not_fit_the_input_are_refused() -> None:
    with pytest.raises(ConfigError, match="7 logical rows are set but the op has 6"):
        run_linear(NOISY, tensor(6, 8), tensor(4, 8), rows=torch.arange(7))


def test_a_device_without_a_backend_is_an_error_that_names_the_alternatives() -> None:
    with pytest.raises(BackendError, match=r"no backend serves device 'mps'; served: cpu.*use_backend"):
        aqnsim.backends.resolve("cast", "mps")


def test_a_backend_that_lacks_an_op_is_an_error_that_names_those_that_have_it() -> None:
    with aqnsim.backends.registered(aqnsim.backends.Backend("casts-only", ("cpu",), {})) as name:
        aqnsim.use_backend(name)
        with pytest.raises(BackendError, match="'casts-only' lacks 'cast_out' for cpu; available: cpu, reference"):
            aqnsim.cast(torch.ones(4), "mxfp4")
    assert "casts-only" not in aqnsim.backends.names()
    assert aqnsim.backends.chosen()["cpu"] == "cpu"


def test_backends_are_chosen_by_name_only() -> None:
    with pytest.raises(aqnsim.UnknownNameError, match="did you mean 'reference'"):
        aqnsim.use_backend("referense")
    with pytest.raises(BackendError, match="'reference' serves cpu, not 'cuda'"):
        aqnsim.use_backend("reference", device="cuda")
    with pytest.raises(BackendError, match="'cpu' is already registered"):
        aqnsim.backends.register(aqnsim.backends.get("cpu"))
    with pytest.raises(aqnsim.UnknownNameError, match="unknown op 'casts'"):
        aqnsim.backends.register(aqnsim.backends.Backend("mine", ("cpu",), {"casts": print}))
