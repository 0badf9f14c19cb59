"""PEFT's adapters on an emulated model: attached before or after, merged, unmerged, and cast again on purpose."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from mixed import MIXED, assert_all_same, step
from models import inputs, llama, tokens
from torch import Tensor, nn
from torch.nn import functional as F
from values import same_bits

import aqnsim
from aqnsim import ConfigError

LAYER = "model.layers.0.self_attn.q_proj"


def adapted(model: nn.Module, dora: bool = False) -> Any:
    """LoRA or DoRA on every linear layer but the head."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(1)
    config = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", init_lora_weights=False, use_dora=dora)
    return get_peft_model(model, config).eval()


def adapters(model: nn.Module) -> dict[str, Tensor]:
    return {k: v.detach().clone() for k, v in model.state_dict().items() if "lora_" in k}


def outputs(model: nn.Module) -> list[Tensor]:
    ids = tokens()
    return step(model, lambda: model(input_ids=ids, labels=ids).loss)


def weight(model: Any) -> Tensor:
    layer = model.get_submodule(LAYER)
    held: Tensor = getattr(layer, "base_layer", layer).weight.detach()
    return held


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_attaching_before_or_after_the_adapter_is_the_same(dora: bool) -> None:
    before, after = llama(frozen=True), adapted(llama(frozen=True), dora)
    first = aqnsim.emulate(before, MIXED)
    before = adapted(before, dora)
    second = aqnsim.emulate(after, MIXED)
    assert [(s.name, s.role) for s in first.sites] == [(s.name, s.role) for s in second.sites]
    # DoRA takes its magnitudes from the weight as it is at that moment, cast(W) or W: they are adapters like others
    before.load_state_dict(adapters(after), strict=False)
    assert_all_same(outputs(before), outputs(after))


def test_dora_norms_what_the_base_multiplies_by() -> None:
    model = adapted(llama(frozen=True), dora=True)
    with aqnsim.emulate(model, "mxfp4-w4a16"):
        layer = model.base_model.model.get_submodule(LAYER)
        x, w = inputs(5, 32), layer.base_layer.weight.detach()
        assert same_bits(w, aqnsim.cast(w, "mxfp4"))
        combined = w + layer.get_delta_weight("default").detach()
        unit = layer.lora_magnitude_vector["default"].weight.detach() / combined.norm(dim=1)
        torch.testing.assert_close(layer(x).detach(), F.linear(x, unit[:, None] * combined), rtol=1e-4, atol=1e-5)
        outputs(model)


def test_merging_adds_to_the_cast_weight_and_computes_what_the_adapter_did() -> None:
    model = adapted(llama(frozen=True))
    layer = model.base_model.model.get_submodule(LAYER)
    w, delta = layer.base_layer.weight.detach().clone(), layer.get_delta_weight("default").detach()
    emu = aqnsim.emulate(model, "mxfp4-w4a16")
    apart = model(input_ids=tokens()).logits.detach()
    model.merge_adapter()
    assert same_bits(layer.base_layer.weight.detach(), aqnsim.cast(w, "mxfp4") + delta)
    torch.testing.assert_close(model(input_ids=tokens()).logits.detach(), apart, rtol=1e-3, atol=1e-3)
    for lost in (emu.restore, emu.off().__enter__):
        with pytest.raises(ConfigError, match=r"was changed .* refresh_weights\(\) writes cast\(W\) again"):
            lost()
    model.unmerge_adapter()
    emu.refresh_weights()  # taking off what was added leaves rounding errors
    assert same_bits(layer.base_layer.weight.detach(), aqnsim.cast(w, "mxfp4"))
    assert same_bits(model(input_ids=tokens()).logits.detach(), apart)
    emu.restore()
    assert same_bits(layer.base_layer.weight.detach(), w)


def test_a_weight_that_trained_when_attached_keeps_its_master_and_merging_casts_the_sum() -> None:
    model = llama()
    w = weight(model).clone()
    with aqnsim.emulate(model, "mxfp4-w4a16"):
        model = adapted(model)  # freezes the base only now
        layer = model.base_model.model.get_submodule(LAYER)
        delta, x = layer.get_delta_weight("default").detach(), inputs(5, 32)
        model.merge_adapter()
        assert same_bits(layer.base_layer.weight.detach(), w + delta)
        assert same_bits(layer(x).detach(), F.linear(x, aqnsim.cast(w + delta, "mxfp4")))
        model(input_ids=tokens())


@pytest.mark.parametrize("base", ["master", "cast"])
def test_casting_a_merged_weight_again_is_asked_for_by_emulating_again(base: str) -> None:
    model = adapted(llama(frozen=True))
    layer = model.base_model.model.get_submodule(LAYER)
    w, delta = layer.base_layer.weight.detach().clone(), layer.get_delta_weight("default").detach().clone()
    emu = aqnsim.emulate(model, "mxfp4-w4a16")
    if base == "master":  # Q(W + BA)
        emu.restore()
        merged, total = model.merge_and_unload(), w + delta
    else:  # Q(Q(W) + BA)
        merged, total = model.merge_and_unload(), aqnsim.cast(w, "mxfp4") + delta
        emu.restore(keep_weights=True)
    assert same_bits(weight(merged), total)
    with aqnsim.emulate(merged.requires_grad_(False), "mxfp4-w4a16"):
        assert same_bits(weight(merged), aqnsim.cast(total, "mxfp4"))
        merged(input_ids=tokens())
