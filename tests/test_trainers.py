"""What else trainers and their libraries do around a model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from mixed import ELEMENTWISE, LINEAR, MIXED, PRODUCT, assert_all_same, rules, step
from models import inputs, llama, mlp, tokens

import aqnsim
from aqnsim import ConfigError


def test_a_rollout_in_inference_mode_does_not_reach_the_training_after_it() -> None:
    results = []
    for inference in (False, True):
        model, ids = llama(), tokens()
        with aqnsim.emulate(model, MIXED) as emu:
            with torch.inference_mode(inference), emu.phase("rollout"), emu.sequences(torch.arange(3)):
                emu.begin_step(1, 5)
                rollout = model(input_ids=ids).logits
            results.append([rollout.detach().clone(), *step(model, lambda m=model: m(input_ids=tokens()).logits)])
    assert_all_same(results[1], results[0])


def test_a_backward_may_run_twice() -> None:
    model, ids = llama(), tokens()
    with aqnsim.emulate(model, MIXED):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward(retain_graph=True)
        once = [p.grad.clone() for p in model.parameters()]
        loss.backward()
    assert_all_same([p.grad for p in model.parameters()], [g + g for g in once])


@pytest.mark.parametrize("kind", ["linear", "qk"])
def test_second_derivatives_are_refused(kind: str) -> None:
    model, e = llama(), inputs(2, 5, 32).requires_grad_()
    model.set_attn_implementation("eager")  # whose own second derivatives torch has
    with aqnsim.emulate(model, rules((kind, LINEAR if kind == "linear" else PRODUCT))) as emu:
        (g,) = torch.autograd.grad(model(inputs_embeds=e).logits.square().sum(), e, create_graph=True)
        with pytest.raises(ConfigError, match=r"second derivatives .* under emulation\.off\(\)"):
            g.square().sum().backward()
        with emu.off():
            (g,) = torch.autograd.grad(model(inputs_embeds=e).logits.square().sum(), e, create_graph=True)
            g.square().sum().backward()
    assert e.grad is not None
    assert float(e.grad.abs().max()) > 0


def patched(module: Any) -> None:
    """What accelerate's hooks and kernel libraries do."""
    before = module.forward
    module.forward = lambda *args, **kwargs: before(*args, **kwargs)


def test_a_module_whose_forward_was_replaced_is_refused() -> None:
    for what, spec, name in (("linear", LINEAR, "0"), ("activation", ELEMENTWISE, "1")):
        model = mlp()
        patched(model[int(name)])
        with pytest.raises(ConfigError, match=rf"'{name}' has a forward of its own, .* emulate the model before"):
            aqnsim.emulate(model, rules((what, spec)), example={"input": inputs(2, 40)})
    model = llama()
    patched(model.model.layers[1].mlp)
    with pytest.raises(ConfigError, match=r"'model\.layers\.1\.mlp' has a forward of its own"):
        aqnsim.emulate(model, rules(("multiply", ELEMENTWISE)))


def test_a_forward_that_is_wrapped_after_is_emulated() -> None:
    model, ids = llama(), tokens()
    with aqnsim.emulate(model, MIXED):
        expected = step(model, lambda: model(input_ids=ids).logits)
        for module in model.modules():
            patched(module)
        assert_all_same(step(model, lambda: model(input_ids=ids).logits), expected)
