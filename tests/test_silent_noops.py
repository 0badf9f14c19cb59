"""Ways in which a run can ask for noise or quantisation and get none: each must act or fail, never pass in silence."""

from __future__ import annotations

import pytest
import torch
from models import inputs, llama, mlp, profile, tokens, with_lora
from torch import nn
from values import same_bits

import aqnsim
from aqnsim import AQN, ConfigError, RealisationError, RelativeGaussian
from aqnsim.aqn import EpochAware, KStage
from aqnsim.emulation.modules import EmulatedLinear
from aqnsim.profiles import load

SCHEDULES = {
    "k-stage": KStage(0.05, 0.0005, 10),
    "epoch-aware": EpochAware(0.05, 0.0005, stages_per_epoch=5, epochs=2),
}


def forward(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=tokens()).logits


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_a_step_after_the_warm_up_really_moves_every_norm(schedule: KStage | EpochAware) -> None:
    """The schedule was printed, but the weights got the sigma of a step 0 of 1: warm-up, so nothing, in every step."""
    model = llama()
    outputs: dict[str, list[torch.Tensor]] = {}
    with aqnsim.emulate(model, "ideal", aqn=AQN(schedule)) as emu:
        sites = [s for s in emu.sites if s.kind == "norm"]
        assert len(sites) == 5
        for step in (0, 30, 80):
            emu.begin_step(step, 116)
            with emu.phase("rollout"), torch.no_grad():
                for s in sites:
                    outputs.setdefault(s.name, []).append(s.module(inputs(4, 32)))
        receipts = emu.receipts()
    for warm_up, first, second in outputs.values():
        sigma = float((first - warm_up).std())
        assert 0.3 * schedule.sigma(30, 116) < sigma < 3 * schedule.sigma(30, 116)
        assert not torch.equal(first, second)
    assert {r.site for r in receipts if r.changed > 0 and r.realised_sigma} == set(outputs)


def test_a_training_loop_that_forgets_the_schedule_fails_at_the_first_rollout() -> None:
    """A second training loop never advanced the schedule: sigma stayed at its initial 0 throughout."""
    model = llama()
    emu = aqnsim.emulate(model, "ideal", aqn=AQN(SCHEDULES["k-stage"]))
    with pytest.raises(RealisationError, match="call begin_step"), emu.phase("rollout"):
        forward(model)
    with pytest.raises(RealisationError, match="never advanced"):
        emu.check()


def test_a_training_loop_that_stays_at_step_0_fails_at_the_end() -> None:
    """The loop called the hook, but always with the same step, which is warm-up."""
    model = llama()
    emu = aqnsim.emulate(model, "ideal", aqn=AQN(SCHEDULES["k-stage"]))
    for _ in range(5):
        emu.begin_step(0, 116)
        with emu.phase("rollout"):
            forward(model)
    with pytest.raises(RealisationError, match="stayed at sigma 0"):
        emu.check()


def test_noise_below_half_an_ulp_of_the_stored_value_fails() -> None:
    """Relative noise of 1e-4 was added to rounded bf16 results: no element changed, and robustness was reported."""
    y = inputs(64, 64, dtype=torch.bfloat16)
    key = aqnsim.NoiseKey()
    assert same_bits(aqnsim.perturb(y, RelativeGaussian(1e-4), key), y)  # what the trap is
    tiny = profile(error=str(RelativeGaussian(1e-8)))
    model = mlp(torch.bfloat16)
    with pytest.raises(RealisationError, match="changed no value"), aqnsim.emulate(model, tiny):
        model(inputs(8, 40, dtype=torch.bfloat16))


def test_noise_of_1e_4_acts_on_bf16_results_because_it_comes_before_their_rounding() -> None:
    """The same request as above, which an accelerator would realise in its fp32 accumulator."""
    model, x = mlp(torch.bfloat16), inputs(256, 40, dtype=torch.bfloat16)
    clean = model[0](x)
    with aqnsim.emulate(model, profile(error=str(RelativeGaussian(1e-4)))) as emu:
        noisy = model[0](x)
        model(x)
        changed = float((noisy != clean).double().mean())
        assert 0.005 < changed < 0.1
        receipt = next(r for r in emu.receipts() if r.site == "0")
    assert receipt.changed == pytest.approx(changed, rel=1e-6)
    assert receipt.realised_sigma == pytest.approx(1e-4, rel=0.05)


def test_aqn_below_half_an_ulp_of_a_bf16_norm_weight_acts() -> None:
    """Noise was cast to bf16 before it was added: a sigma of 0.0005 changed none of them."""
    model = llama(torch.bfloat16)
    weight = model.model.norm.weight
    noise = torch.randn(weight.shape) * 0.0005
    assert torch.equal((weight + noise.bfloat16()), weight)  # what the trap is
    with aqnsim.emulate(model, "ideal", aqn=AQN(KStage(0.0005, 0.0005, 3))) as emu:
        emu.begin_step(1, 3)
        with emu.phase("rollout"):
            forward(model)
        for r in emu.receipts():
            assert r.changed > 0.9  # of 32: one may draw next to nothing
            assert r.realised_sigma == pytest.approx(0.0005, rel=0.5)


def test_targets_that_match_no_module_fail_at_the_attach() -> None:
    """Selectors by class name matched 0 modules, and three runs were compared as if they had had noise."""
    with pytest.raises(ConfigError, match="no noise would be injected"):
        aqnsim.emulate(mlp(), "ideal", aqn=AQN(SCHEDULES["k-stage"]))
    with pytest.raises(ConfigError, match="matches no op"):
        aqnsim.emulate(llama(), profile(weight="mxfp4", sites=("model.layers.*.attention",)))
    with pytest.raises(ConfigError, match="matches no op"):
        aqnsim.emulate(llama(), profile(weight="mxfp4", exclude=("*",)))


def test_layer_multipliers_that_reach_no_layer_fail_at_the_attach() -> None:
    """A table of multipliers was dropped on its way, so that all layers got the same noise."""
    with pytest.raises(ConfigError, match=r"layers \[14\] that have no norm"):
        aqnsim.emulate(llama(), "ideal", aqn=AQN(SCHEDULES["k-stage"], multipliers={14: 2.0}))
    with pytest.raises(ConfigError, match="layer index must be an integer"):
        AQN(SCHEDULES["k-stage"], multipliers={"1": 2.0})  # type: ignore[dict-item]


def test_a_decay_to_zero_is_refused() -> None:
    """sigma_end = 0 made the geometric decay 0 from its second stage on."""
    with pytest.raises(ConfigError, match="sigma_end must be a finite number > 0, got 0"):
        KStage(0.2, 0, 10)
    with pytest.raises(ConfigError, match="sigma_end must be a finite number > 0, got 0"):
        EpochAware(0.2, 0, 5)


def test_constant_noise_is_not_spelt_as_one_stage() -> None:
    """One stage was meant as constant noise; it is all warm-up, so none."""
    with pytest.raises(ConfigError, match="at least 3 stages, got 1"):
        KStage(0.05, 0.05, 1)


def test_adapters_stay_in_full_precision() -> None:
    """Adapters were quantised with the base, because their names matched: scores halved."""
    model = with_lora(llama(frozen=True))
    adapters = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    assert len(adapters) == 28
    with aqnsim.emulate(model, profile(weight="mxfp4", input="mxfp4", exclude=("lm_head",))) as emu:
        forward(model)
        assert not any(isinstance(m, EmulatedLinear) for n, m in model.named_modules() if "lora_" in n)
        assert all(same_bits(p.detach(), adapters[n]) for n, p in model.named_parameters() if n in adapters)
        assert len(emu.sites) == 14


def test_every_base_layer_is_quantised_once() -> None:
    """Wrapper and base layer were both counted and both quantised: 364 hooks on 182 layers."""
    model = with_lora(llama(frozen=True))
    wrapped = [m for m in model.modules() if hasattr(m, "base_layer")]
    with aqnsim.emulate(model, "mxfp4-w4a16") as emu:
        forward(model)
        assert len(emu.sites) == len(wrapped) == 14
        assert {s.module for s in emu.sites} == {m.base_layer for m in wrapped}
        assert len({s.module.weight.data_ptr() for s in emu.sites}) == 14  # type: ignore[union-attr]
        assert [r.calls for r in emu.receipts() if r.phase == "attach"] == [1] * 14
        with pytest.raises(ConfigError, match="already emulated"):
            aqnsim.emulate(model, "mxfp4-w4a16")


@pytest.mark.parametrize("name", ["mxfp4-w4a4", "nvfp4-w4a4"])
def test_every_trainable_weight_gets_a_gradient(name: str) -> None:
    """Rounding has derivative 0 and the straight-through estimator was not used: nothing learnt in many runs."""
    model = llama()
    with aqnsim.emulate(model, name):
        model(input_ids=tokens()).logits.square().mean().backward()
    for n, p in model.named_parameters():
        assert p.grad is not None, n
        assert p.grad.abs().sum() > 0, n


@pytest.mark.parametrize("name", ["mxfp4-w4a4", "nvfp4-w4a4"])
def test_every_adapter_gets_a_gradient_through_quantised_layers(name: str) -> None:
    """The same, for adapters below frozen quantised layers."""
    model = with_lora(llama(frozen=True))
    with aqnsim.emulate(model, name):
        model(input_ids=tokens()).logits.square().mean().backward()
    gradients = [p.grad for p in model.parameters() if p.requires_grad]
    assert len(gradients) == 28
    assert all(g is not None and g.abs().sum() > 0 for g in gradients)


def test_a_result_can_tell_which_profile_it_was_made_under() -> None:
    """Models trained in 4 bits were scored in 16, and nothing in the result showed it."""
    model = mlp()
    found = {}
    for name in ("ideal", "bf16", "mxfp4-w4a16", "mxfp4-w4a4", "nvfp4-w4a4"):
        with aqnsim.emulate(model, name) as emu:
            model(inputs(2, 40))
            assert emu.profile.fingerprint == load(name).fingerprint
            assert emu.profile.fingerprint in str(emu.report())
            found[name] = emu.profile.fingerprint
    assert len(set(found.values())) == len(found)
