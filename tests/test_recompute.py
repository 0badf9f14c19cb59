"""Gradient checkpointing runs a layer's forward twice; the second run is at the first one's moment."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from mixed import MIXED, assert_all_same, gpt2, gradients, step
from models import llama, tokens, with_lora
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import aqnsim
from aqnsim import ConfigError, Receipt
from aqnsim.emulation import Emulation


def adapted() -> nn.Module:
    return with_lora(llama(frozen=True))


def dropping() -> nn.Module:
    """A model that drops values at random, which the global generator replays."""
    model = gpt2()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.2
    return model


MODELS = pytest.mark.parametrize("make", [llama, gpt2, adapted, dropping])
REENTRANT = pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])


def trained(make: Callable[[], nn.Module], reentrant: bool | None) -> nn.Module:
    """A model in training mode, recomputing its layers unless ``reentrant`` is None."""
    model = make().train()
    model.enable_input_require_grads()  # the reentrant kind gives no gradients without
    if reentrant is not None:
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    return model


def run(
    make: Callable[[], nn.Module], reentrant: bool | None, body: Callable[[nn.Module, Emulation], list[Tensor]]
) -> tuple[list[Tensor], list[Receipt]]:
    model = trained(make, reentrant)
    torch.manual_seed(0)
    with aqnsim.emulate(model, MIXED, seed=3) as emu:
        emu.begin_step(2, 9)
        return body(model, emu), emu.receipts()


def backward(receipts: list[Receipt]) -> list[Receipt]:
    """Those of gradients: a forward that runs twice reports twice."""
    return [r for r in receipts if r.stream.startswith("grad")]


def one_step(model: nn.Module, emu: Emulation) -> list[Tensor]:
    ids = tokens()
    with emu.sequences(torch.tensor([5, 7, 11])):
        return step(model, lambda: model(input_ids=ids, labels=ids).loss)


def two_batches(model: nn.Module, emu: Emulation) -> list[Tensor]:
    """Forwards of two batches before the backward of both, at other steps, phases and sequences."""
    losses = []
    for i, phase in enumerate(("train", "rollout")):
        emu.begin_step(i, 9)
        ids = tokens(batch=2 + i, length=6 + i, seed=i)
        with emu.phase(phase), emu.sequences(torch.arange(2 + i) + 100 * i):
            losses.append(model(input_ids=ids, labels=ids).loss)
    found = []
    with emu.phase("eval"):
        for loss in losses:
            loss.backward()
            found += [loss.detach(), *gradients(model)]
    return found


@MODELS
@REENTRANT
@pytest.mark.parametrize("body", [one_step, two_batches])
def test_recomputing_layers_changes_no_bit(
    make: Callable[[], nn.Module], reentrant: bool, body: Callable[[nn.Module, Emulation], list[Tensor]]
) -> None:
    plain, receipts = run(make, None, body)
    recomputed, again = run(make, reentrant, body)
    assert_all_same(recomputed, plain)
    assert backward(again) == backward(receipts)
    assert {r.phase for r in again} == {r.phase for r in receipts}
    assert any(r.calls > s.calls for r, s in zip(again, receipts, strict=True))  # some did run twice


def checkpoint_layers(model: nn.Module, **kwargs: Any) -> None:
    """Let every layer be recomputed as a user would, without the model's own switch."""

    def recomputed(forward: Callable[..., Any], x: Tensor, **given: Any) -> Any:
        given["past_key_values"] = None  # or the second run would add its keys to the first one's
        return checkpoint(lambda y: forward(y, **given), x, **kwargs)

    for layer in model.model.layers:
        layer.forward = partial(recomputed, layer.forward)


def test_a_layer_that_the_user_checkpoints_changes_no_bit() -> None:
    results = []
    for wrapped in (False, True):
        model = llama().train()
        with aqnsim.emulate(model, MIXED, seed=3) as emu:
            if wrapped:
                checkpoint_layers(model, use_reentrant=False, context_fn=emu.recompute_context)
            results.append(two_batches(model, emu))
    assert_all_same(*results)


@REENTRANT
def test_a_checkpoint_that_the_emulation_does_not_know_is_refused(reentrant: bool) -> None:
    model = llama().train()
    with aqnsim.emulate(model, MIXED, seed=3):
        model.enable_input_require_grads()
        checkpoint_layers(model, use_reentrant=reentrant)
        loss = model(input_ids=tokens(), labels=tokens()).loss
        with pytest.raises(ConfigError, match=r"context_fn=emulation\.recompute_context"):
            loss.backward()


@REENTRANT
def test_a_backward_on_the_other_weights_is_refused(reentrant: bool) -> None:
    model = trained(llama, reentrant)
    with aqnsim.emulate(model, MIXED) as emu:
        loss = model(input_ids=tokens(), labels=tokens()).loss
        with emu.off(), pytest.raises(ConfigError, match=r"recomputed after off\(\) began or ended"):
            loss.backward()
