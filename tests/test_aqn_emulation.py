"""AQN at work: which weights of a model get which noise, in which bits, and what a run without it is told."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from mixed import assert_all_same, gpt2, gradients
from models import SOURCE, family, gemma, inputs, llama, mlp, profile, tokens, with_lora
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from values import same_bits

import aqnsim
from aqnsim import AQN, AbsoluteGaussian, ConfigError, RealisationError, RelativeGaussian
from aqnsim.aqn import Constant, Custom, KStage, Zone, preset, survives
from aqnsim.emulation import Emulation
from aqnsim.profiles import Forward, GradInput, OpSpec, Profile, Rule
from aqnsim.receipts import PHASES
from aqnsim.report import sigma_interval
from aqnsim.rng import clock, key_of

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
FROZEN = pytest.mark.parametrize("frozen", [False, True], ids=["trains", "frozen"])
ALL = ("train",)
"""The one phase in which most of these tests run."""


def noisy(weight: Tensor, sigma: float, site: str, step: int = 0, seed: int = 0, phase: str = "train") -> Tensor:
    """``w + sigma z`` by the op's definition."""
    now = torch.tensor(clock(step, phase))
    key = key_of(seed, site, "aqn")
    result: Tensor = torch.ops.aqnsim.perturb(weight, str(AbsoluteGaussian(sigma)), key, now, None, None, False)[0]
    return result


def noised(emu: Emulation) -> list[str]:
    """Names of the sites that get noise."""
    return [s.name for s in emu.sites if s.takes_noise]


def reached(model: nn.Module, aqn: AQN) -> list[str]:
    emu = aqnsim.emulate(model, "ideal", aqn=aqn)
    emu.restore()
    return noised(emu)


def asked(emu: Emulation) -> dict[str, float]:
    """The sigma that each site was asked for, by the receipts."""
    return {r.site: r.requested_sigma for r in emu.receipts() if r.stream == "aqn" and r.requested_sigma is not None}


def forward(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(input_ids=tokens()).logits


# ---- linear layers -------------------------------------------------------------------------------------------------


@DTYPES
@FROZEN
def test_a_noisy_linear_layer_multiplies_by_the_weight_plus_noise(dtype: torch.dtype, frozen: bool) -> None:
    model, x = mlp(dtype, frozen), inputs(5, 40, dtype=dtype).requires_grad_()
    layer, g = model[0], inputs(5, 72, dtype=dtype, seed=1)
    before = layer.weight.detach().clone()
    with aqnsim.emulate(model, "ideal", seed=3, aqn=AQN(Constant(0.01), targets="linear", phases=ALL)) as emu:
        emu.begin_step(2, 5)
        y = layer(x)
        y.backward(g)
        model(x)
        assert noised(emu) == ["0", "2"]
    w = noisy(before, 0.01, "0", step=2, seed=3)
    assert not torch.equal(w, before)
    assert same_bits(y.detach(), F.linear(x.detach(), w, layer.bias))
    assert x.grad is not None
    assert same_bits(x.grad, g @ w)
    if not frozen:
        assert same_bits(layer.weight.grad, g.t() @ x.detach())  # straight-through
    assert same_bits(layer.weight.detach(), before)


@DTYPES
@FROZEN
@pytest.mark.parametrize("name", ["mxfp4-w4a16", "mxfp4-w4a4"])
def test_the_noise_is_added_to_the_cast_weight_and_not_cast_again(dtype: torch.dtype, frozen: bool, name: str) -> None:
    model, x = mlp(dtype, frozen), inputs(5, 40, dtype=dtype).requires_grad_()
    layer, g = model[0], inputs(5, 72, dtype=dtype, seed=1)
    cast = aqnsim.cast(layer.weight.detach(), "mxfp4")
    with aqnsim.emulate(model, name, aqn=AQN(Constant(0.01), targets="linear", phases=ALL)) as emu:
        emu.begin_step(0, 1)
        y = layer(x)
        y.backward(g)
        model(x)
        found = {(r.phase, r.stream): r for r in emu.receipts() if r.site == "0"}
    w = noisy(cast, 0.01, "0")
    xq = aqnsim.cast(x.detach(), "mxfp4") if name == "mxfp4-w4a4" else x.detach()
    assert same_bits(y.detach(), F.linear(xq, w, layer.bias))
    assert x.grad is not None
    assert same_bits(x.grad, g @ w)
    if not frozen:
        assert same_bits(layer.weight.grad, g.t() @ xq)
    weight, noise = found["train", "weight"], found["train", "aqn"]
    assert (weight.calls, weight.elements) == (2, 0 if frozen else 2 * 40 * 72)
    assert (noise.calls, noise.elements) == (2, 2 * 40 * 72)
    assert noise.realised_sigma == pytest.approx(0.01, rel=0.1)
    assert ("train", "output") not in found


def test_errors_of_the_product_come_beside_the_noise_of_its_weight() -> None:
    model, x = mlp(), inputs(5, 40)
    wrong = profile(weight="mxfp4", error=str(RelativeGaussian(0.05)))
    with aqnsim.emulate(model, wrong, seed=3, aqn=AQN(Constant(0.01), targets="linear", phases=ALL)) as emu:
        emu.begin_step(0, 1)
        y = model[0](x).detach()
        model(x)
        streams = {r.stream for r in emu.receipts() if r.site == "0"}
    w = noisy(aqnsim.cast(model[0].weight.detach(), "mxfp4"), 0.01, "0", seed=3)
    bias = model[0].bias.detach()
    other = aqnsim.perturb(x @ w.t(), RelativeGaussian(0.05), aqnsim.NoiseKey(seed=3, site="0"))
    torch.testing.assert_close(y, other + bias, rtol=1e-5, atol=1e-6)
    assert streams == {"weight", "aqn", "output"}


def test_a_product_that_emulates_its_gradient_alone_still_says_so() -> None:
    model = mlp()
    spec = OpSpec(grad_input=GradInput(grad="mxfp8_e5m2"))
    rule = Rule(kind="linear", spec=spec)
    gradient = Profile(name="gradient", description="for a test", source=SOURCE, rules=(rule,))
    with aqnsim.emulate(model, gradient, aqn=AQN(Constant(0.01), targets="linear", phases=ALL)) as emu:
        emu.begin_step(0, 1)
        model(inputs(5, 40).requires_grad_()).sum().backward()
        calls = {(r.site, r.stream): r.calls for r in emu.receipts()}
    assert calls["0", "aqn"] == calls["0", "output"] == calls["0", "grad-input.grad"] == 1


@DTYPES
def test_a_transposed_layer_has_the_noise_of_its_weight_as_outputs_by_inputs(dtype: torch.dtype) -> None:
    model, x = gpt2(dtype), inputs(5, 32, dtype=dtype)
    layer = model.transformer.h[0].mlp.c_fc
    w, b = layer.weight.detach().t().contiguous(), layer.bias.detach()
    with aqnsim.emulate(model, "ideal", aqn=AQN(Constant(0.01), targets="linear", phases=ALL)) as emu:
        emu.begin_step(0, 1)
        y = layer(x).detach()
        forward(model)
        assert "transformer.h.0.mlp.c_fc" in noised(emu)
    expected = F.linear(x, noisy(w, 0.01, "transformer.h.0.mlp.c_fc"), b)
    assert same_bits(y, expected)


def test_all_tokens_and_calls_of_a_step_see_one_noise() -> None:
    model, x = mlp(), inputs(6, 40)
    with aqnsim.emulate(model, "ideal", aqn=AQN(Constant(0.01), targets="linear", phases=ALL)) as emu:
        emu.begin_step(0, 2)
        whole = model(x)
        parts = torch.cat([model(x[:1]), model(x[1:])])
        emu.begin_step(1, 2)
        later = model(x)
    torch.testing.assert_close(whole, parts)
    assert not torch.allclose(whole, later)


def test_adapters_get_no_noise_and_their_base_layers_do() -> None:
    model = with_lora(llama(frozen=True))
    with aqnsim.emulate(model, "mxfp4-w4a16", aqn=AQN(Constant(0.01), targets="linear", exclude=("lm_head",))) as emu:
        assert len(noised(emu)) == 14
        assert all(s.module in {m.base_layer for m in model.modules() if hasattr(m, "base_layer")} for s in emu.sites)
        emu.begin_step(0, 1)
        with emu.phase("rollout"):
            forward(model)


# ---- where ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        ("linear", 15),
        ("rmsnorm", 5),
        (("rmsnorm", "linear"), 20),
        (("q_proj", "layers.1.*"), 1 + 9),
        (("*.self_attn.*",), 8),
        (("model.norm",), 1),
    ],
)
def test_targets_choose_weights_by_word_or_glob(targets: str | tuple[str, ...], expected: int) -> None:
    assert len(reached(llama(), AQN(Constant(0.1), targets=targets))) == expected


def test_excluded_names_are_left_alone() -> None:
    assert reached(llama(), AQN(Constant(0.1), targets="linear", exclude=("layers.*",))) == ["lm_head"]


def test_what_has_no_weight_of_its_own_to_add_noise_to_is_no_target() -> None:
    with pytest.raises(ConfigError, match=r"AQN targets embed_tokens, act_fn, but nothing there is reached"):
        reached(llama(), AQN(Constant(0.1), targets=("rmsnorm", "embed_tokens", "act_fn")))
    with pytest.raises(ConfigError, match=r"AQN targets rmsnorm, but nothing there is reached"):
        reached(gpt2(), AQN(Constant(0.1)))  # it has LayerNorms


def test_a_linear_layer_of_another_forward_is_refused_by_name() -> None:
    class Doubled(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return 2 * super().forward(input)

    model = nn.Sequential(Doubled(4, 4), nn.Linear(4, 4))
    with pytest.raises(ConfigError, match=r"'0' is a .*Doubled.*exclude it in the profile, and from AQN"):
        reached(model, AQN(Constant(0.1), targets="linear"))
    assert reached(model, AQN(Constant(0.1), targets="linear", exclude=("0",))) == ["1"]


@pytest.mark.parametrize(
    "factors", [{"default_multiplier": 0.0}, {"zones": (Zone(0, 1, multiplier=0.0),), "targets": ("layers.*",)}]
)
def test_a_factor_of_zero_everywhere_is_refused(factors: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="the multiplier of every site is 0"):
        reached(llama(), AQN(Constant(0.1), **factors))


def test_a_zone_of_layers_that_are_not_there_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"name layers \[2\], in which nothing is reached"):
        reached(llama(), AQN(Constant(0.1), zones=(Zone(1, 2, multiplier=0.5),)))


# ---- zones ---------------------------------------------------------------------------------------------------------


def test_zones_have_schedules_of_their_own() -> None:
    model = llama()
    late = Custom(((0, 0.0), (2, 0.03)), unit="step")
    aqn = AQN(Constant(0.02), zones=(Zone(0, 0, schedule=late), Zone(1, 1, multiplier=0.5)), phases=ALL)
    seen = []
    with aqnsim.emulate(model, "ideal", aqn=aqn) as emu:
        for step in (1, 2):
            emu.begin_step(step, 4)
            start = emu.snapshot()
            forward(model)
            assert emu.sigma == 0.02
            found = emu.receipts(since=start)
            seen.append({r.site.removeprefix("model."): r.requested_sigma for r in found})
    expected = {"layers.1.input_layernorm": 0.01, "layers.1.post_attention_layernorm": 0.01, "norm": 0.02}
    assert seen[0] == pytest.approx(expected)
    zone = {"layers.0.input_layernorm": 0.03, "layers.0.post_attention_layernorm": 0.03}
    assert seen[1] == pytest.approx({**zone, **expected})


def test_a_zone_that_stayed_at_zero_fails_by_its_layers() -> None:
    model = llama()
    late = Custom(((0, 0.0), (3, 0.03)), unit="step")
    emu = aqnsim.emulate(model, "ideal", aqn=AQN(Constant(0.02), zones=(Zone(0, 0, schedule=late),), phases=ALL))
    for step in range(3):
        emu.begin_step(step, 4)
        forward(model)
    with pytest.raises(
        RealisationError, match=r"Custom\(.*in the zone of layers 0 to 0 stayed at sigma 0 in every step"
    ):
        emu.check()
    emu.begin_step(3, 4)
    forward(model)
    emu.check()


def test_zones_that_cover_every_site_need_nothing_of_the_common_schedule() -> None:
    model = llama()
    late = Custom(((0, 0.0), (3, 0.03)), unit="step")
    aqn = AQN(late, targets=("layers.*.input_layernorm",), zones=(Zone(0, 1, schedule=Constant(0.1)),), phases=ALL)
    with aqnsim.emulate(model, "ideal", aqn=aqn) as emu:
        emu.begin_step(0, 4)
        forward(model)


def test_a_run_in_which_a_zone_would_never_act_is_refused_when_it_begins() -> None:
    late = Custom(((0, 0.0), (30, 0.03)), unit="step")
    emu = aqnsim.emulate(llama(), "ideal", aqn=AQN(Constant(0.02), zones=(Zone(0, 0, schedule=late),)))
    with pytest.raises(ConfigError, match=r"Custom\(.*is 0 at every one of 4 steps"):
        emu.begin_step(0, 4)


def test_a_resumed_run_knows_the_sigmas_of_its_first_part() -> None:
    early = Custom(((0, 0.03), (2, 0.0)), unit="step")
    aqn = AQN(Constant(0.02), zones=(Zone(0, 0, schedule=early),), phases=ALL)
    model = llama()
    with aqnsim.emulate(model, "ideal", aqn=aqn) as emu:
        emu.begin_step(0, 4)
        forward(model)
        state = {k: v.clone() for k, v in emu.state_dict().items()}
    resumed = aqnsim.emulate(model, "ideal", aqn=aqn)
    resumed.load_state_dict(state)
    resumed.begin_step(3, 4)
    forward(model)
    resumed.check()
    resumed.restore()
    forgetful = aqnsim.emulate(model, "ideal", aqn=aqn)
    forgetful.begin_step(3, 4)
    forward(model)
    with pytest.raises(RealisationError, match="zone of layers 0 to 0 stayed at sigma 0"):
        forgetful.check()
