"""AQN at work: which weights of a model get which noise, in which bits, and what a run without it is told."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from mixed import MIXED, assert_all_same, gpt2, gradients
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
from aqnsim.profiles import GradInput, OpSpec, Profile, Rule
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
    result: Tensor = torch.ops.aqnsim.perturb(weight, str(AbsoluteGaussian(sigma)), key, now, None, None, None, False)[
        0
    ]
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


@FROZEN
def test_noise_comes_after_the_bits_that_flip_in_a_stored_weight(frozen: bool) -> None:
    flipping = profile(weight="mxfp4 + bit-flip(rate=0.01, target=codes)")
    model, eye = mlp(frozen=frozen), torch.eye(40)
    held = []
    for sigma in (1e-9, 0.01):
        with aqnsim.emulate(model, flipping, aqn=AQN(Constant(sigma), targets="linear", phases=ALL)) as emu:
            emu.begin_step(0, 1)
            held.append((model[0](eye) - model[0].bias).detach().t())
            model(eye)
    with aqnsim.emulate(model, flipping):
        stored = (model[0](eye) - model[0].bias).detach().t()
        model(eye)
    torch.testing.assert_close(held[0], stored, rtol=0, atol=1e-6)
    torch.testing.assert_close(held[1], noisy(stored, 0.01, "0"), rtol=0, atol=1e-6)
    assert not torch.allclose(stored, aqnsim.cast(model[0].weight.detach(), "mxfp4"), atol=1e-3)


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


# ---- mixtures of experts -------------------------------------------------------------------------------------------

INPUT = [f"model.layers.{i}.input_layernorm" for i in (0, 1)]
POST = [f"model.layers.{i}.post_attention_layernorm" for i in (0, 1)]
HEADS = [f"model.layers.{i}.self_attn.{n}_norm" for i in (0, 1) for n in "qk"]


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        ("all", [*INPUT, *POST, *HEADS, "model.norm"]),
        ("post_attention_only", POST),
        ("protect_router", [*INPUT, *HEADS, "model.norm"]),
    ],
)
def test_the_rule_for_mixtures_chooses_norms_by_what_a_router_reads(rule: Any, expected: list[str]) -> None:
    model = family("qwen3_moe")
    assert sorted(reached(model, AQN(Constant(0.1), moe=rule))) == sorted(expected)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


class Routed(nn.Module):
    """A block with experts behind a norm: its names say nothing."""

    def __init__(self, copies: bool) -> None:
        super().__init__()
        self.copies = copies
        self.a, self.b = nn.RMSNorm(8, eps=1e-6), nn.RMSNorm(8, eps=1e-6)
        self.block = Block()

    def forward(self, x: Tensor) -> Tensor:
        x = self.b(x)
        return self.block(self.a(x) * 1 if self.copies else self.a(x).view(-1, 8))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(8, 2)
        self.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        weights = self.gate(x.float()).softmax(-1)
        return sum(weights[..., i, None] * e(x) for i, e in enumerate(self.experts))  # type: ignore[return-value]


def test_what_feeds_a_router_is_known_by_the_tensor_that_it_reads() -> None:
    aqn = AQN(Constant(0.1), targets=("rmsnorm", "linear"), moe="protect_router")
    example = {"x": inputs(3, 8)}
    emu = aqnsim.emulate(Routed(copies=False), "ideal", aqn=aqn, example=example)
    assert noised(emu) == ["b", "block.experts.0", "block.experts.1"]  # neither a nor the router
    with pytest.raises(ConfigError, match=r"the router 'block\.gate' reads no output of a norm or a linear layer"):
        aqnsim.emulate(Routed(copies=True), "ideal", aqn=aqn, example=example)


def test_a_model_without_routers_has_nothing_to_protect() -> None:
    assert len(reached(llama(), AQN(Constant(0.1), moe="protect_router"))) == 5
    assert len(reached(mlp(), AQN(Constant(0.1), targets="linear", moe="protect_router"))) == 2  # without an example


@pytest.mark.parametrize("name", ["ideal", "mxfp4-w4a16"])
def test_each_expert_has_noise_of_its_own(name: str) -> None:
    model = family("qwen3_moe")
    experts, x = model.model.layers[0].mlp.experts, inputs(6, 64)
    chosen, weights = torch.tensor([[0], [0], [1], [1], [3], [3]]), torch.ones(6, 1)
    site = "model.layers.0.mlp.experts"
    aqn = AQN(Constant(0.01), targets=("gate_up_proj", "down_proj"), phases=ALL)
    with aqnsim.emulate(model, name, aqn=aqn) as emu, torch.no_grad():
        emu.begin_step(0, 1)
        y = experts(x, chosen, weights)
        forward(model)
        assert noised(emu) == [
            f"model.layers.{i}.mlp.experts.{w}" for i in (0, 1) for w in ("gate_up_proj", "down_proj")
        ]

    def held(w: str, expert: int) -> Tensor:
        weight = getattr(experts, w)[expert].detach()
        weight = weight if name == "ideal" else aqnsim.cast(weight, "mxfp4")
        key = key_of(0, f"{site}.{w}", f"aqn#{expert + 1}")
        now = torch.tensor(clock(0, "train"))
        noisy: Tensor = torch.ops.aqnsim.perturb(
            weight, str(AbsoluteGaussian(0.01)), key, now, None, None, None, False
        )[0]
        return noisy

    for i, expert in enumerate(chosen[:, 0].tolist()):
        gate, up = F.linear(x[i : i + 1], held("gate_up_proj", expert)).chunk(2, -1)
        expected = F.linear(experts.act_fn(gate) * up, held("down_proj", expert))
        torch.testing.assert_close(y[i : i + 1], expected, rtol=1e-4, atol=1e-5)


class OtherExperts(nn.Module):
    """Stacked weights that another forward than the known one multiplies by."""

    def __init__(self) -> None:
        super().__init__()
        self.up_proj = nn.Parameter(torch.ones(2, 4, 4))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.up_proj[0]


def test_experts_that_compute_in_another_way_are_refused_by_name() -> None:
    model = nn.ModuleDict({"head": nn.Linear(4, 4), "experts": OtherExperts()})
    aqn = AQN(Constant(0.1), targets="linear")
    with pytest.raises(ConfigError, match=r"AQN would reach 'experts\.up_proj', whose shape is \(2, 4, 4\).*exclude"):
        reached(model, aqn)
    assert reached(model, dataclasses.replace(aqn, exclude=("experts.*",))) == ["head"]


# ---- relative to the weight ------------------------------------------------------------------------------------------


@DTYPES
@pytest.mark.parametrize(("make", "target"), [(llama, "linear"), (llama, "rmsnorm"), (gemma, "rmsnorm")])
def test_sigma_relative_to_the_root_mean_square_of_the_weight_that_acts(
    make: Callable[[], nn.Module], target: str, dtype: torch.dtype
) -> None:
    model = make().to(dtype)
    for p in model.parameters():
        p.data.mul_(3).add_(0.25)
    offset = 1.0 if make is gemma else 0.0
    with aqnsim.emulate(model, "ideal", aqn=AQN(Constant(0.02), targets=target, relative_to="rms", phases=ALL)) as emu:
        emu.begin_step(0, 1)
        forward(model)
        receipts = [r for r in emu.receipts() if r.stream == "aqn"]
        weights = {s.name: s.parameter for s in emu.sites}
    assert len(receipts) == len(weights) > 2
    for r in receipts:
        weight = weights[r.site].detach().double() + offset  # type: ignore[union-attr]
        sigma = 0.02 * float(weight.square().mean().sqrt())
        low, high = sigma_interval(sigma, r.elements, 1e-6)
        # what a bf16 weight stores of its noise is part of it; norms are noisy in fp32
        assert r.requested_sigma == pytest.approx(sigma, rel=1e-6)
        assert low < r.realised_sigma < high  # type: ignore[operator]
        assert r.requested == "absolute-gaussian(schedule * rms)"


def test_sigma_follows_a_weight_that_trains_from_step_to_step() -> None:
    model = mlp()
    with aqnsim.emulate(
        model, "ideal", aqn=AQN(Constant(0.02), targets="linear", relative_to="rms", phases=ALL)
    ) as emu:
        emu.begin_step(0, 2)
        model(inputs(2, 40))
        first = asked(emu)["0"]
        model[0].weight.data.mul_(2)
        start = emu.snapshot()
        model(inputs(2, 40))
        assert emu.receipts(since=start)[0].requested_sigma == pytest.approx(first)  # fixed when the step begins
        emu.begin_step(1, 2)
        start = emu.snapshot()
        model(inputs(2, 40))
        assert emu.receipts(since=start)[0].requested_sigma == pytest.approx(2 * first)


def test_a_frozen_weight_counts_as_the_cast_that_it_holds() -> None:
    model = mlp(frozen=True)
    aqn = AQN(Constant(0.02), targets="linear", relative_to="rms", phases=ALL)
    with aqnsim.emulate(model, "mxfp4-w4a16", aqn=aqn) as emu:
        emu.begin_step(0, 1)
        model(inputs(2, 40))
        held = model[0].weight.double().square().mean().sqrt()
        assert asked(emu)["0"] == pytest.approx(0.02 * float(held))
        with emu.off(), pytest.raises(ConfigError, match=r"begin_step inside of off\(\)"):
            emu.begin_step(0, 1)


def test_a_sharded_weight_counts_as_a_whole(tmp_path: Any) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    model = mlp()
    expected = float(model[0].weight.detach().double().square().mean().sqrt())
    aqn = AQN(Constant(0.02), targets=("0",), relative_to="rms")
    emu = aqnsim.emulate(model, "ideal", aqn=aqn)
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        model[0].weight = nn.Parameter(distribute_tensor(model[0].weight.detach(), mesh, [Shard(0)]))
        emu.begin_step(0, 1)
        assert emu.noise is not None
        assert emu.noise.sigmas == {"0": pytest.approx(0.02 * expected)}
    finally:
        torch.distributed.destroy_process_group()


# ---- a run of steps ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", aqnsim.aqn.PRESETS)
@pytest.mark.parametrize("under", ["ideal", "mxfp4-w4a4"])
def test_a_preset_runs_from_its_first_step_to_its_last(name: str, under: str) -> None:
    model, aqn = llama(frozen=True), preset(name)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    found = []
    with aqnsim.emulate(model, under, aqn=aqn) as emu:
        held = {n: p.detach().clone() for n, p in model.named_parameters()}
        for step in range(20):
            emu.begin_step(step, 20)
            start = emu.snapshot()
            with emu.phase("rollout"):
                forward(model)
            forward(model)
            noise = [r for r in emu.receipts(since=start) if r.stream == "aqn"]
            found.append({r.requested_sigma for r in noise})
            assert len(noise) == (5 if step >= 2 else 0)
            assert all(r.phase == "rollout" for r in noise)
        assert all(same_bits(p.detach(), held[n]) for n, p in model.named_parameters())
        assert "AQN added in place would change" in str(emu.report())
    assert all(same_bits(p.detach(), before[n]) for n, p in model.named_parameters())
    for step, sigmas in enumerate(found):
        assert all(s == pytest.approx(aqn.schedule.sigma(step, 20)) for s in sigmas)
    assert len({round(s, 9) for sigmas in found for s in sigmas}) == 9


def test_noise_acts_in_its_phases_and_is_drawn_anew_in_each() -> None:
    model, x = mlp(), inputs(3, 40)
    clean = model(x)
    with aqnsim.emulate(model, "ideal", aqn=AQN(Constant(0.1), targets="linear", phases=("rollout", "eval"))) as emu:
        emu.begin_step(0, 1)
        seen = {}
        for phase in PHASES[1:]:
            with emu.phase(phase):
                seen[phase] = model(x)
                with emu.off():
                    assert same_bits(model(x).detach(), clean.detach())
        assert {r.phase for r in emu.receipts()} == {"rollout", "eval"}
        assert {r.stream for r in emu.receipts()} == {"aqn"}
    assert all(same_bits(seen[p].detach(), clean.detach()) for p in ("train", "reference"))
    assert not torch.equal(seen["rollout"], clean)
    assert not torch.equal(seen["rollout"], seen["eval"])


def test_a_copy_of_the_model_has_the_same_noise_and_reports_it() -> None:
    model, x = mlp(), inputs(3, 40)
    with aqnsim.emulate(model, "mxfp4-w4a16", aqn=AQN(Constant(0.1), targets="linear", phases=ALL)) as emu:
        emu.begin_step(0, 1)
        twin = copy.deepcopy(model)
        assert same_bits(twin(x).detach(), model(x).detach())
        assert {r.calls for r in emu.receipts() if r.stream == "aqn"} == {2}


def test_the_audit_of_a_strict_attach_needs_no_step() -> None:
    model = llama()
    aqn = AQN(Constant(0.1), targets=("linear", "rmsnorm"), exclude=("lm_head",), phases=ALL)
    with aqnsim.emulate(model, "mxfp4-w4a4", aqn=aqn, strict=True) as emu:
        assert emu.receipts() == []
        emu.begin_step(0, 1)
        forward(model)
        assert {r.calls for r in emu.receipts() if r.stream == "aqn"} == {1}


# ---- recomputation and compilation -----------------------------------------------------------------------------------

FALLING = Custom(((0, 0.02), (1, 0.01)), unit="step")
NOISY = AQN(FALLING, targets=("rmsnorm", "linear"), exclude=("lm_head",), phases=("rollout",))


def two_steps(model: nn.Module, emu: Emulation) -> list[Tensor]:
    """Forwards at two steps before the backward of both, in another phase."""
    losses = []
    for step in (0, 1):
        emu.begin_step(step, 9)
        with emu.phase("rollout"):
            losses.append(model(input_ids=tokens(seed=step), labels=tokens(seed=step)).loss)
    found = []
    for loss in losses:
        loss.backward()
        found += [loss.detach(), *gradients(model)]
    return found


@pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])
@pytest.mark.parametrize("name", ["ideal", "mxfp4-w4a4"])
def test_recomputed_layers_have_the_noise_of_their_forward(name: str, reentrant: bool) -> None:
    results = []
    for recomputes in (False, True):
        model = llama().train()
        if recomputes:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.enable_input_require_grads()
        with aqnsim.emulate(model, name, seed=3, aqn=NOISY) as emu:
            results.append(two_steps(model, emu))
    assert_all_same(*results)


def test_a_recomputation_that_does_not_know_its_step_is_refused() -> None:
    model, x = mlp(), inputs(3, 40).requires_grad_()
    with aqnsim.emulate(model, "ideal", aqn=AQN(Constant(0.1), targets="linear")) as emu:
        emu.begin_step(0, 1)
        with emu.phase("rollout"):
            plain = checkpoint(model, x, use_reentrant=False).sum()
            known = checkpoint(model, x, use_reentrant=False, context_fn=emu.recompute_context).sum()
        with pytest.raises(ConfigError, match=r"context_fn=emulation\.recompute_context"):
            plain.backward()
        known.backward()


@pytest.fixture
def _fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("_fresh_dynamo")
def test_a_compiled_model_has_the_same_noise_and_one_graph_for_each_sigma() -> None:
    schedule = Custom(((0, 0.0), (1, 0.02), (3, 0.01)), unit="step")
    aqn = dataclasses.replace(NOISY, schedule=schedule, phases=ALL, relative_to="rms")
    results, receipts, graphs = [], [], []
    for compiled in (False, True):
        model, ids = llama(), tokens()
        model.model.layers = model.model.layers[:1]
        with aqnsim.emulate(model, MIXED, seed=3, aqn=aqn) as emu:
            counter = CompileCounterWithBackend("aot_eager")
            if compiled:
                model.compile(backend=counter, fullgraph=True)
            found = []
            for step in (1, 2, 3, 1):
                emu.begin_step(step, 5)
                model.zero_grad()
                loss = model(input_ids=ids, labels=ids, use_cache=False).loss
                loss.backward()
                found += [loss.detach(), *gradients(model)]
                graphs.append(counter.frame_count)
            results.append(found)
            receipts.append(emu.receipts())
    assert_all_same(*results)
    assert receipts[0] == receipts[1]
    assert graphs[4:] == [1, 1, 2, 2]


# ---- what an implementation in place would keep ----------------------------------------------------------------------


def test_survival_is_that_of_the_weights_in_their_own_dtype() -> None:
    model = llama(torch.bfloat16)
    schedule = KStage(0.01, 0.0001, 4)
    emu = aqnsim.emulate(model, "ideal", aqn=AQN(schedule))
    found = emu.survival(40)
    assert [(s.first, s.last) for s in found] == [(0, 9), (10, 19), (20, 29), (30, 39)]
    assert [s.sigma for s in found] == pytest.approx([0.0, 0.01, 0.001, 0.0001])
    assert [s.share for s in found] == pytest.approx([survives(s.sigma, [1.0], "bf16") for s in found])
    assert found[1].share > 0.7
    assert found[3].share < 1e-6
    with pytest.raises(ConfigError, match="survival: give total_steps"):
        emu.survival()
    with pytest.raises(ConfigError, match="survival: no AQN"):
        aqnsim.emulate(mlp(), "mxfp4-w4a16").survival(4)


def test_survival_counts_each_weight_with_its_own_sigma_and_size() -> None:
    model = mlp(torch.bfloat16)
    aqn = AQN(Constant(0.001), targets="linear")
    emu = aqnsim.emulate(model, "ideal", aqn=aqn)
    values = [model[i].weight.detach().reshape(-1) for i in (0, 2)]
    shares = [survives(0.001, v.tolist(), "bf16") for v in values]
    sizes = [v.numel() for v in values]
    (found,) = emu.survival(7)
    assert (found.first, found.last, found.sigma) == (0, 6, 0.001)
    assert found.share == pytest.approx(sum(a * b for a, b in zip(shares, sizes, strict=True)) / sum(sizes))
    draws = torch.randn(50, values[0].numel(), generator=torch.Generator().manual_seed(0)) * 0.001
    changed = float(((values[0].float() + draws).bfloat16() != values[0]).double().mean())
    assert changed == pytest.approx(shares[0], abs=5 * math.sqrt(0.25 / draws.numel()))
    relative = dataclasses.replace(aqn, relative_to="rms")
    emu.restore()
    (scaled,) = aqnsim.emulate(model, "ideal", aqn=relative).survival(7)
    assert scaled.sigma == pytest.approx(max(0.001 * float(v.double().square().mean().sqrt()) for v in values))


def test_zones_share_the_rows_of_the_run() -> None:
    step = Custom(((0, 0.01), (5, 0.001)), unit="step")
    emu = aqnsim.emulate(llama(torch.bfloat16), "ideal", aqn=AQN(Constant(0.002), zones=(Zone(0, 0, schedule=step),)))
    assert [(s.first, s.last, s.sigma) for s in emu.survival(8)] == [(0, 4, 0.01), (5, 7, 0.002)]


def test_the_report_names_the_steps_whose_noise_would_be_lost() -> None:
    model = llama(torch.bfloat16)
    with aqnsim.emulate(model, "ideal", aqn=AQN(KStage(0.01, 0.0001, 4), phases=ALL)) as emu:
        assert emu.report().survival == ()
        emu.begin_step(10, 40)
        forward(model)
        report = emu.report()
    line = "AQN added in place would change 0.0% of the stored weights in steps 30 to 39, where sigma is 0.0001"
    assert str(report).splitlines()[-1] == line
    assert report.to_dict()["survival"][0] == {"first": 0, "last": 9, "sigma": 0.0, "share": 0.0}
    assert len(report.to_dict()["survival"]) == 4


# ---- noise that would be absent in silence ---------------------------------------------------------------------------


def test_a_linear_layer_that_no_rollout_called_fails() -> None:
    model = mlp()
    emu = aqnsim.emulate(model, "ideal", aqn=AQN(Constant(0.1), targets="linear"))
    emu.begin_step(0, 1)
    with emu.phase("rollout"):
        model[0](inputs(2, 40))
    with pytest.raises(
        RealisationError, match=r"AQN reached no forward of '2'.*the linear was never called in phase ro"
    ):
        emu.check()


def test_a_rollout_before_the_first_step_fails() -> None:
    model = mlp()
    emu = aqnsim.emulate(model, "ideal", aqn=AQN(Constant(0.1), targets="linear"))
    model(inputs(2, 40))  # no phase of the noise
    with emu.phase("rollout"), pytest.raises(RealisationError, match="call begin_step"):
        model(inputs(2, 40))


def test_a_sigma_that_a_stored_linear_weight_cannot_hold_fails() -> None:
    model = nn.Sequential(nn.Linear(64, 64)).bfloat16()
    model[0].weight.data.fill_(1.0)
    emu = aqnsim.emulate(model, "ideal", aqn=AQN(Constant(1e-5), targets="linear", phases=ALL))
    emu.begin_step(0, 1)
    model(inputs(2, 64, dtype=torch.bfloat16))
    with pytest.raises(RealisationError, match="on its aqn changed no value"):
        emu.check()


def test_steps_leave_no_noise_behind_in_the_weights() -> None:
    """Noise was added to stored weights in place, and those of one step were still there in the next."""
    model, x = mlp(frozen=True), inputs(3, 40)
    with aqnsim.emulate(model, "ideal", aqn=AQN(Constant(0.1), targets="linear", phases=ALL)) as emu:
        outputs = []
        for step in (0, 1, 2, 0):
            emu.begin_step(step, 3)
            outputs.append(model(x))
    assert same_bits(outputs[3], outputs[0])
    spread = [float((y - model(x)).square().mean().sqrt()) for y in outputs]
    assert max(spread) < 1.5 * min(spread)


VARIED: dict[str, Any] = {
    "schedule": Constant(0.2),
    "targets": ("rmsnorm", "q_proj"),
    "multipliers": {1: 2.0},
    "default_multiplier": 0.5,
    "phases": ("rollout",),
    "zones": (Zone(0, 0, schedule=Constant(0.3)),),
    "moe": "protect_router",
    "relative_to": "rms",
    "exclude": ("input_layernorm",),
}
"""Another value for every field."""


def test_every_field_of_the_description_reaches_the_model() -> None:
    """Lists of layers and of excluded names were dropped on their way: several runs were one and the same."""
    assert set(VARIED) == {f.name for f in dataclasses.fields(AQN)}
    plain, outputs = AQN(Constant(0.1), phases=ALL), []
    for aqn in (plain, *(dataclasses.replace(plain, **{name: value}) for name, value in VARIED.items())):
        model = family("qwen3_moe")
        for p in model.parameters():
            p.data.mul_(1.5)
        emu = aqnsim.emulate(model, "ideal", aqn=aqn)
        emu.begin_step(0, 1)
        outputs.append(forward(model))
        assert sorted(asked(emu)) == (sorted(noised(emu)) if "train" in aqn.phases else [])
    assert all(not torch.equal(a, b) for i, a in enumerate(outputs) for b in outputs[:i])


def test_a_checkpoint_of_other_noise_is_refused() -> None:
    model = mlp()
    states = []
    for targets in (("0",), ("0", "2")):
        with aqnsim.emulate(model, "mxfp4-w4a16", aqn=AQN(Constant(0.1), targets=targets, phases=ALL)) as emu:
            emu.begin_step(0, 1)
            model(inputs(2, 40))
            states.append(emu.state_dict())
    emu = aqnsim.emulate(model, "mxfp4-w4a16", aqn=AQN(Constant(0.1), targets=("0",)))
    with pytest.raises(ConfigError, match="a checkpoint has AQN at 2 sites, this emulation at 1"):
        emu.load_state_dict(states[1])
    emu.load_state_dict(states[0])
