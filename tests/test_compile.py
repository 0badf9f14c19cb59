"""torch.compile traces an emulated model whole, and computes what it computes uncompiled."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from mixed import BY_TOKEN, FIVE, MIXED, assert_all_same, gpt2, step
from models import llama, profile, tokens
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import aqnsim

MODELS = pytest.mark.parametrize("make", [llama, gpt2])


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def small(make: Callable[[], nn.Module]) -> nn.Module:
    """One layer of a model: tracing takes the time here."""
    model = make()
    body = getattr(model, "model", None) or model.transformer
    name = "layers" if hasattr(body, "layers") else "h"
    setattr(body, name, getattr(body, name)[:1])
    return model


def loss_of(model: nn.Module, ids: Tensor) -> Callable[[], Tensor]:
    return lambda: model(input_ids=ids, labels=ids, use_cache=False).loss


def counted(model: nn.Module) -> CompileCounterWithBackend:
    """Compile a model in place, whole; the counter says how many graphs were made."""
    counter = CompileCounterWithBackend("aot_eager")
    model.compile(backend=counter, fullgraph=True)
    return counter


@MODELS
def test_a_compiled_model_computes_the_same_bits_and_receipts(make: Callable[[], nn.Module]) -> None:
    results, receipts = [], []
    for compiled in (False, True):
        model, ids = small(make), tokens()
        with aqnsim.emulate(model, MIXED, seed=3) as emu:
            if compiled:
                counted(model)
            with emu.sequences(torch.tensor([5, 7, 11])):
                emu.begin_step(2, 9)
                results.append(step(model, loss_of(model, ids)))
            receipts.append(emu.receipts())
    assert_all_same(results[1], results[0])
    assert receipts[1] == receipts[0]


@MODELS
def test_the_graph_has_no_breaks(make: Callable[[], nn.Module]) -> None:
    model, ids = small(make), tokens()
    with aqnsim.emulate(model, MIXED):
        found = torch._dynamo.explain(model)(input_ids=ids, labels=ids, use_cache=False)
    assert (found.graph_count, found.graph_break_count) == (1, 0), found.break_reasons


def test_steps_and_sequences_do_not_recompile_and_a_phase_does_once() -> None:
    model, ids = small(llama), tokens()
    with aqnsim.emulate(model, MIXED) as emu:
        counter = counted(model)
        seen = []
        for number in range(4):
            emu.begin_step(number, 9)
            with emu.sequences(torch.arange(3) + number):
                seen.append(step(model, loss_of(model, ids))[0])
        assert counter.frame_count == 1
        assert len({float(loss) for loss in seen}) == 4
        for _ in range(2):
            for phase in ("rollout", "eval", "train", "reference"):
                with emu.phase(phase), emu.sequences(torch.arange(3)):
                    step(model, loss_of(model, ids))
        assert counter.frame_count == 4


def test_off_and_the_end_of_the_emulation_reach_a_compiled_model() -> None:
    model, ids = small(llama), tokens()
    clean = small(llama)
    counted(clean)
    plain = step(clean, loss_of(clean, ids))
    emu = aqnsim.emulate(model, MIXED)
    counted(model)
    emulated = step(model, loss_of(model, ids))
    with emu.off():
        assert_all_same(step(model, loss_of(model, ids)), plain)
    assert_all_same(step(model, loss_of(model, ids)), emulated)
    emu.restore()
    assert_all_same(step(model, loss_of(model, ids)), plain)


def test_a_model_compiled_before_is_emulated_after_and_given_back() -> None:
    model, ids = small(llama), tokens()
    eager = small(llama)
    with aqnsim.emulate(eager, MIXED, seed=3) as emu:
        emulated, sites = step(eager, loss_of(eager, ids)), [s.name for s in emu.sites]
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    plain = step(model, loss_of(compiled, ids))
    with aqnsim.emulate(compiled, MIXED, seed=3) as emu:
        assert [s.name for s in emu.sites] == sites
        assert_all_same(step(model, loss_of(compiled, ids)), emulated)
    assert_all_same(step(model, loss_of(compiled, ids)), plain)


def test_a_compiled_model_may_recompute_its_layers() -> None:
    results = []
    for compiled in (False, True):
        model, ids = small(llama).train(), tokens()
        model.gradient_checkpointing_enable({"use_reentrant": False})
        with aqnsim.emulate(model, MIXED, seed=3) as emu:
            if compiled:
                counted(model)
            emu.begin_step(2, 9)
            results.append(step(model, loss_of(model, ids)))
    assert_all_same(results[1], results[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_a_compiled_model_under_autocast_computes_the_same(dtype: torch.dtype) -> None:
    results = []
    for compiled in (False, True):
        model, ids = small(llama), tokens()
        with aqnsim.emulate(model, MIXED, seed=3):
            if compiled:
                counted(model)
            with torch.autocast("cpu", dtype):
                results.append([model(input_ids=ids, use_cache=False).logits.detach()])
    assert_all_same(results[1], results[0])


def test_compiled_decoding_with_a_static_cache_computes_the_same() -> None:
    from transformers import StaticCache

    ids, results = tokens(batch=2, length=6), []
    for compiled in (False, True):
        model = small(llama)
        with aqnsim.emulate(model, BY_TOKEN, seed=3) as emu, torch.no_grad():
            cache = StaticCache(config=model.config, max_cache_len=8)
            found = [model(input_ids=ids[:, :3], past_key_values=cache, use_cache=True).logits]
            counter = counted(model) if compiled else None
            for i in range(3, 6):
                emu.begin_step(i, 9)
                found.append(model(input_ids=ids[:, i : i + 1], past_key_values=cache, use_cache=True).logits)
            assert counter is None or counter.frame_count == 1
        results.append(found)
    assert_all_same(results[1], results[0])


def test_inductor_agrees_where_it_fuses_what_torch_computes() -> None:
    results: list[list[Tensor]] = []
    receipts: list[Any] = []
    for compiled in (False, True):
        model, ids = small(llama), tokens(batch=2, length=5)
        formats = profile(weight="mxfp4", input="mxfp8_e4m3", error=FIVE, grad_input=FIVE)
        with aqnsim.emulate(model, formats, seed=3) as emu:
            if compiled:
                model.compile(fullgraph=True)
            emu.begin_step(2, 9)
            results.append(step(model, loss_of(model, ids)))
            receipts.append([(r.site, r.phase, r.stream, r.calls, r.elements) for r in emu.receipts()])
    assert receipts[1] == receipts[0]
    for found, expected in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(found, expected, rtol=0.05, atol=0.02)
