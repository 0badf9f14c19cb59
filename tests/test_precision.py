"""Half-precision models and autocast: emulated ops compute as those of the model in that dtype do."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from mixed import FIVE, MIXED, STOCHASTIC, UNIT, assert_all_same, gpt2, rules, step
from models import inputs, llama, mlp, tokens
from torch import Tensor, nn
from torch.nn import functional as F
from values import same_bits

import aqnsim
import aqnsim.ops
from aqnsim import ConfigError
from aqnsim.backends import get as backend
from aqnsim.emulation.attention import Attention
from aqnsim.errors import BitFlip
from aqnsim.profiles import Forward, GradInput, GradWeight, OpSpec
from aqnsim.receipts import STATS

HALVES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
MODELS = pytest.mark.parametrize("make", [llama, gpt2])
STEP = torch.tensor(5)


def numbers(stats: Tensor) -> dict[str, float]:
    return dict(zip(STATS, stats.tolist(), strict=True))


# ---- float16 as a dtype of the primitives ---------------------------------------------------------------------------


@pytest.mark.parametrize("fmt", ["mxfp4", "nvfp4", "fp8_e4m3", STOCHASTIC, "bf16", "hif8", "int8", "mxint8"])
@pytest.mark.parametrize("axis", [-1, 0])
def test_a_cast_of_float16_is_the_cast_of_its_values_rounded_once(fmt: str, axis: int) -> None:
    x = torch.cat([inputs(40, 50, dtype=torch.float16) * 3, torch.full((2, 50), 6e4).half(), torch.zeros(2, 50).half()])
    x[0, :4] = torch.tensor([torch.inf, -torch.inf, torch.nan, -0.0])
    x[1] *= 1e-5
    wide, _ = torch.ops.aqnsim.cast(x.float(), fmt, axis, 7, STEP, None, True)
    for name in ("cpu", "reference"):
        out, stats = backend(name).ops["cast"](x, fmt, axis % 2, 7, STEP, None, True)
        assert out.dtype == torch.float16
        assert same_bits(out, wide.half())
        a, b = x.double().numpy(), out.double().numpy()
        both = np.isfinite(a) & np.isfinite(b)
        found = numbers(stats)
        assert found["changed"] == ((x.view(torch.int16) != out.view(torch.int16)) & ~(x.isnan() & out.isnan())).sum()
        assert found["error2"] == pytest.approx(((b[both] - a[both]) ** 2).sum(), rel=1e-12)
        assert found["nonfinite"] == (~np.isfinite(b)).sum()
        assert (found["calls"], found["count"]) == (1, x.numel())


@pytest.mark.parametrize("error", [FIVE, UNIT])
@pytest.mark.parametrize(("before", "after"), [(torch.float16, None), (torch.float32, torch.float16)])
def test_an_error_enters_in_fp32_and_is_stored_in_float16(
    error: str, before: torch.dtype, after: torch.dtype | None
) -> None:
    y = inputs(40, 50).to(before) * 100
    y[0, :2] = torch.tensor([6.5e4, 0.0])
    wide, asked = torch.ops.aqnsim.perturb(y.float(), error, 7, STEP, None, None, None, True)
    for name in ("cpu", "reference"):
        out, stats = backend(name).ops["perturb"](y, error, 7, STEP, None, None, after, True)
        assert same_bits(out, wide.half())
        clean, found, whole = y.half(), numbers(stats), numbers(asked)
        assert found["changed"] == (clean != out).sum()
        finite = out.isfinite()
        moved = (out.double() - clean.double())[finite]
        assert found["error2"] == pytest.approx(float(moved.square().sum()), rel=1e-12)
        assert found["nonfinite"] == (~finite).sum()
        assert all(found[k] == pytest.approx(whole[k], rel=1e-5) for k in ("injected2", "injected_n", "requested2"))


def test_noise_below_half_an_ulp_of_float16_is_reported_as_no_change() -> None:
    y = torch.full((100,), 1024.0).half()
    _, stats = torch.ops.aqnsim.perturb(y, "relative-gaussian(sigma=0.00001)", 7, STEP, None, None, None, True)
    assert numbers(stats)["changed"] == 0
    assert numbers(stats)["error2"] == 0
    assert numbers(stats)["injected2"] > 0


def test_a_flip_of_bits_that_float16_has_not_is_refused() -> None:
    for name in ("cpu", "reference"):
        with pytest.raises(ConfigError, match=r"bit-flip.* on a float16 result"):
            backend(name).ops["perturb"](inputs(4, 4).half(), str(BitFlip(0.1)), 7, STEP, None, None, None, True)


def test_float16_is_quantized_to_the_codes_of_its_values() -> None:
    x = inputs(6, 64, dtype=torch.float16)
    q, wide = aqnsim.quantize(x, "mxfp4"), aqnsim.quantize(x.float(), "mxfp4")
    assert torch.equal(q.codes, wide.codes)
    assert same_bits(q.dequantize(), aqnsim.cast(x, "mxfp4"))


# ---- models in half precision ---------------------------------------------------------------------------------------


@MODELS
@HALVES
def test_a_half_model_trains_alike_on_both_backends(make: Callable[..., nn.Module], dtype: torch.dtype) -> None:
    results = []
    for name in ("cpu", "reference"):
        aqnsim.use_backend(name)
        model, ids = make(dtype), tokens()
        with aqnsim.emulate(model, MIXED, seed=3) as emu:
            results.append(step(model, lambda model=model, ids=ids: model(input_ids=ids).logits))
            emu.check(backward=True)
        assert {t.dtype for t in results[-1]} == {dtype}
    assert_all_same(*results)


@HALVES
@pytest.mark.parametrize("frozen", [False, True])
def test_a_half_linear_layer_is_a_cast_and_a_product(dtype: torch.dtype, frozen: bool) -> None:
    model, x = mlp(dtype, frozen), inputs(5, 40, dtype=dtype).requires_grad_()
    w, b, g = model[0].weight.detach().clone(), model[0].bias.detach(), inputs(5, 72, dtype=dtype, seed=1)
    with aqnsim.emulate(model, "mxfp4-w4a4"):
        y = model[0](x)
        y.backward(g)
        model(x)
    wq, xq = aqnsim.cast(w, "mxfp4"), aqnsim.cast(x.detach(), "mxfp4")
    assert same_bits(y.detach(), F.linear(xq, wq, b))
    assert x.grad is not None
    assert same_bits(x.grad, g @ wq)
    assert frozen or same_bits(model[0].weight.grad, g.t() @ xq)


# ---- autocast --------------------------------------------------------------------------------------------------------

SPEC = OpSpec(
    forward=Forward(input="mxfp8_e4m3", weight="mxfp4", error=FIVE),
    grad_input=GradInput(grad="fp8_e5m2", error=FIVE),
    grad_weight=GradWeight(grad="mxfp8_e5m2", error=FIVE),
)


@HALVES
def test_a_linear_layer_under_autocast_computes_as_the_half_layer_does(dtype: torch.dtype) -> None:
    results = []
    for half in (False, True):
        model, x, g = mlp(), inputs(5, 40).requires_grad_(), inputs(5, 72, dtype=dtype, seed=1)
        with aqnsim.emulate(model.to(dtype) if half else model, rules(("linear", SPEC))):
            with torch.autocast("cpu", dtype, enabled=not half):
                y = model[0](x.to(dtype) if half else x)
            y.backward(g)
            model(x.to(model[0].weight.dtype))
        grads = [model[0].weight.grad, model[0].bias.grad, x.grad]
        results.append([y.detach(), *[t.to(dtype) for t in grads]])
        assert {t.dtype for t in grads[:2]} == {dtype if half else torch.float32}  # the masters' own
    assert_all_same(*results)


@HALVES
def test_a_frozen_weight_under_autocast_is_rounded_after_its_cast(dtype: torch.dtype) -> None:
    model, x = mlp(frozen=True), inputs(5, 40)
    w, b = model[0].weight.detach().clone(), model[0].bias.detach()
    with aqnsim.emulate(model, "mxfp4-w4a4"), torch.autocast("cpu", dtype):
        y = model[0](x)
        model(x)
    assert same_bits(y, F.linear(aqnsim.cast(x.to(dtype), "mxfp4"), aqnsim.cast(w, "mxfp4").to(dtype), b.to(dtype)))


@HALVES
def test_attention_under_autocast_computes_as_on_half_operands(dtype: torch.dtype) -> None:
    model = llama()
    with aqnsim.emulate(model, MIXED):
        attention = model.model.layers[0].self_attn
        op = next(o for o in attention.aqnsim_functions.ops.values() if isinstance(o, Attention))
        operands = [inputs(2, 4, 6, 8), inputs(2, 2, 6, 8, seed=1), inputs(2, 2, 6, 8, seed=2)]
        with torch.autocast("cpu", dtype):
            found, _ = op(lambda: None, (attention, *operands, None), {})
        expected, _ = op(lambda: None, (attention, *(t.to(dtype) for t in operands), None), {})
        assert found.dtype == dtype
        assert same_bits(found, expected)
        model(input_ids=tokens())


@MODELS
@HALVES
def test_a_model_trains_under_autocast_with_its_masters(make: Callable[[], nn.Module], dtype: torch.dtype) -> None:
    def run(model: nn.Module) -> list[Tensor]:
        def forward() -> Tensor:
            with torch.autocast("cpu", dtype):
                out: Tensor = model(input_ids=tokens()).logits
            return out

        return step(model, forward)

    plain = run(make())
    results = []
    for recomputed in (False, True):
        model = make().train()
        if recomputed:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        with aqnsim.emulate(model, MIXED, seed=3) as emu:
            results.append(run(model))
            emu.check(backward=True)
            with emu.off():
                assert_all_same(run(model.eval()), plain)
    assert [t.dtype for t in results[0]] == [t.dtype for t in plain]
    assert all(bool(t.isfinite().all()) for t in results[0])
    assert_all_same(*results)
