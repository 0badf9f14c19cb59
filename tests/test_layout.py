"""A token's results do not depend on how its batch is laid out: split, padded, packed, cached."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from mixed import BY_TOKEN, FIVE, assert_all_same, gpt2, rules
from models import llama, tokens
from torch import Tensor, nn
from values import same_bits

import aqnsim
from aqnsim.emulation import Emulation
from aqnsim.emulation.rows import Rows, rows_of_forward
from aqnsim.profiles import Forward, GradWeight, OpSpec

MODELS = pytest.mark.parametrize("make", [llama, gpt2])
NAMES = torch.tensor([5, 17, 3, 1 << 40, 0, 8])
IDS = tokens(batch=6, length=8)


def logits(model: nn.Module, emu: Emulation, ids: Tensor, names: Tensor, **kwargs: Any) -> Tensor:
    with torch.no_grad(), emu.sequences(names):
        return model(input_ids=ids, **kwargs).logits  # type: ignore[no-any-return]


def in_pieces(model: nn.Module, emu: Emulation, splits: list[int], cache: Any, **kwargs: Any) -> Tensor:
    found = []
    for piece in IDS.split(splits, dim=1):
        found.append(logits(model, emu, piece, NAMES, past_key_values=cache, use_cache=True, **kwargs))
    return torch.cat(found, dim=1)


@MODELS
@pytest.mark.parametrize("sizes", [[3, 3], [1] * 6, [4, 2]], ids=str)
def test_a_batch_may_be_split(make: Callable[[], nn.Module], sizes: list[int]) -> None:
    model = make()
    with aqnsim.emulate(model, BY_TOKEN, seed=3) as emu:
        whole = logits(model, emu, IDS, NAMES)
        parts = [logits(model, emu, i, n) for i, n in zip(IDS.split(sizes), NAMES.split(sizes), strict=True)]
    assert same_bits(torch.cat(parts), whole)


@MODELS
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_no_token(make: Callable[[], nn.Module], side: str) -> None:
    model, pads, ones = make(), torch.zeros(6, 4, dtype=torch.int64), torch.ones_like(IDS)
    parts = (slice(4, None), [pads, IDS], [pads, ones]) if side == "left" else (slice(8), [IDS, pads], [ones, pads])
    where, ids, mask = parts[0], torch.cat(parts[1], dim=1), torch.cat(parts[2], dim=1)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with aqnsim.emulate(model, BY_TOKEN, seed=3) as emu:
        whole = logits(model, emu, IDS, NAMES)
        padded = logits(model, emu, ids, NAMES, attention_mask=mask, position_ids=positions)
    assert same_bits(padded[:, where], whole)


@MODELS
@pytest.mark.parametrize("splits", [[8], [1] * 8, [4, 1, 3]], ids=str)
@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_a_cache_changes_no_token(make: Callable[[], nn.Module], splits: list[int], kind: str) -> None:
    from transformers import DynamicCache, StaticCache

    model = make()
    with aqnsim.emulate(model, BY_TOKEN, seed=3) as emu:
        whole = logits(model, emu, IDS, NAMES)
        cache = DynamicCache() if kind == "dynamic" else StaticCache(config=model.config, max_cache_len=12)
        assert same_bits(in_pieces(model, emu, splits, cache), whole)


@pytest.mark.parametrize("implementation", [None, "static"])
def test_generation_computes_what_a_forward_over_its_tokens_does(implementation: str | None) -> None:
    model, ids = llama(), IDS[:, :5].clone()
    ids[0, :2] = 0
    mask = (ids != 0).long()
    with aqnsim.emulate(model, BY_TOKEN, seed=3) as emu:
        with emu.sequences(NAMES):
            done = model.generate(
                ids,
                attention_mask=mask,
                max_new_tokens=6,
                min_new_tokens=6,
                do_sample=False,
                cache_implementation=implementation,
                return_dict_in_generate=True,
                output_logits=True,
                disable_compile=True,
            )
        whole = torch.cat([mask, torch.ones(6, 6, dtype=torch.int64)], dim=1)
        positions = (whole.cumsum(1) - 1).clamp(min=0)
        again = logits(model, emu, done.sequences, NAMES, attention_mask=whole, position_ids=positions)
    assert same_bits(again[:, 4:-1], torch.stack(done.logits, dim=1))


def test_sequences_may_be_packed_into_a_row() -> None:
    model = llama()
    model.set_attn_implementation("eager")
    lengths = [3, 5]
    packed = torch.cat([IDS[0, :3], IDS[1, :5]])[None]
    names = torch.cat([NAMES[i].expand(n) for i, n in enumerate(lengths)])[None]
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    owner = torch.tensor([0] * 3 + [1] * 5)
    seen = (owner[:, None] == owner[None]) & torch.ones(8, 8, dtype=torch.bool).tril()
    mask = torch.zeros(1, 1, 8, 8).masked_fill(~seen, torch.finfo(torch.float32).min)
    with aqnsim.emulate(model, BY_TOKEN, seed=3) as emu:
        alone = [logits(model, emu, IDS[i : i + 1, :n], NAMES[i : i + 1])[0] for i, n in enumerate(lengths)]
        together = logits(model, emu, packed, names, position_ids=positions, attention_mask=mask)
    assert same_bits(together[0], torch.cat(alone))


def per_step(spec: OpSpec) -> OpSpec:
    """The same errors, drawn once a step for all phases."""

    def drawn(part: Any) -> Any:
        return part if part.error is None else replace(part, error=part.error.replace(")", ", draw=per_step)"))

    return OpSpec(forward=drawn(spec.forward), grad_input=drawn(spec.grad_input), grad_weight=drawn(spec.grad_weight))


@MODELS
@pytest.mark.parametrize("draw", ["per_step", "per_phase"])
def test_rollout_and_training_see_one_hardware_where_noise_is_drawn_once_a_step(
    make: Callable[[], nn.Module], draw: str
) -> None:
    """Tokens decoded one by one with a cache in a rollout, then in one forward of the training step."""
    noisy = rules(
        ("linear", OpSpec(forward=Forward(input="mxfp8_e4m3", weight="mxfp4", error=FIVE))),
        (("norm", "activation", "add", "qk", "pv", "softmax", "kv_cache"), OpSpec(forward=Forward(error=FIVE))),
    )
    if draw == "per_step":
        noisy = rules(*((r.kind, per_step(r.spec)) for r in noisy.rules))
    from transformers import DynamicCache

    model = make()
    with aqnsim.emulate(model, noisy, seed=3) as emu:
        emu.begin_step(4, 9)
        with emu.phase("rollout"):
            rollout = in_pieces(model, emu, [1] * 8, DynamicCache())
        trained = logits(model, emu, IDS, NAMES)
        assert same_bits(rollout, trained) == (draw == "per_step")
        emu.begin_step(5, 9)
        assert not torch.equal(logits(model, emu, IDS, NAMES), trained)


# ---- the rows of attention's tensors --------------------------------------------------------------------------------


def rows(ids: Tensor, names: Tensor, **kwargs: Any) -> Rows:
    return rows_of_forward(kwargs, ids, names)


def by_token(flat: Tensor, batch: int, heads: int, length: int) -> Tensor:
    return flat.reshape(batch, heads, length, 2).transpose(1, 2)


@pytest.mark.parametrize("what", ["cached", "scores"])
def test_attention_s_rows_go_by_sequence_and_position(what: str) -> None:
    """Keys and scores of the same tokens have the same coordinates packed, padded and alone."""

    def of(r: Rows, batch: int, length: int) -> Tensor:
        return by_token(getattr(r, what)(torch.zeros(batch, 2, length, 4)), batch, 2, length)

    alone = [of(rows(IDS[i : i + 1, :n], NAMES[i : i + 1]), 1, n) for i, n in ((0, 3), (1, 5))]
    names = torch.cat([NAMES[0].expand(3), NAMES[1].expand(5)])[None]
    positions = torch.cat([torch.arange(3), torch.arange(5)])[None]
    packed = of(rows(torch.zeros(1, 8, dtype=torch.int64), names, position_ids=positions), 1, 8)
    # a score's columns count from its row's first key: of the second sequence, 3 keys before its own
    before = torch.tensor([0] * 3 + [3] * 5)[None, :, None] if what == "scores" else 0
    found = torch.stack([packed[..., 0], packed[..., 1] + before], -1)
    assert torch.equal(found, torch.cat(alone, dim=1))

    mask = torch.tensor([[0, 0, 0, 0, 0, 1, 1, 1], [0, 0, 0, 1, 1, 1, 1, 1]])
    padded = of(rows(torch.zeros(2, 8, dtype=torch.int64), NAMES[:2], attention_mask=mask), 2, 8)
    for i, n in ((0, 3), (1, 5)):
        shift = 8 - n if what == "scores" else 0
        found = torch.stack([padded[i, 8 - n :, :, 0], padded[i, 8 - n :, :, 1] + shift], -1)
        assert torch.equal(found, alone[i][0])


def test_keys_from_the_cache_have_the_rows_that_they_had() -> None:
    class Past:
        def get_seq_length(self) -> int:
            return 6

    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1]])
    keys = torch.zeros(2, 2, 7, 4)
    whole = rows(torch.zeros(2, 7, dtype=torch.int64), NAMES[:2], attention_mask=mask).cached(keys)
    one = torch.zeros(2, 1, dtype=torch.int64)
    last = rows(one, NAMES[:2], attention_mask=mask, past_key_values=Past()).cached(keys)
    static = rows(one, NAMES[:2], attention_mask=mask, past_key_values=Past()).cached(torch.zeros(2, 2, 12, 4))
    assert torch.equal(by_token(last, 2, 2, 7)[:, 2:], by_token(whole, 2, 2, 7)[:, 2:])
    assert torch.equal(by_token(static, 2, 2, 12)[:, 2:7], by_token(whole, 2, 2, 7)[:, 2:])


# ---- gradients ------------------------------------------------------------------------------------------------------


def input_gradients(model: nn.Module, emu: Emulation, ids: Tensor, names: Tensor) -> Tensor:
    e = model.get_input_embeddings()(ids).detach().requires_grad_()
    with emu.sequences(names):
        model(inputs_embeds=e).logits.square().sum().backward()
    assert e.grad is not None
    return e.grad


@MODELS
def test_the_gradient_of_the_input_does_not_depend_on_the_split(make: Callable[[], nn.Module]) -> None:
    model = make()
    with aqnsim.emulate(model, BY_TOKEN, seed=3) as emu:
        whole = input_gradients(model, emu, IDS, NAMES)
        parts = [input_gradients(model, emu, i, n) for i, n in zip(IDS.split(2), NAMES.split(2), strict=True)]
    assert same_bits(torch.cat(parts), whole)


def test_the_noise_of_a_weight_gradient_is_keyed_by_its_batch_s_first_token() -> None:
    """Micro-batches with other first sequences get other noise; the same ones get the same."""

    def gradient(first: int) -> Tensor:
        model = llama()
        noisy = rules(("linear", OpSpec(grad_weight=GradWeight(error=FIVE))))
        with aqnsim.emulate(model, noisy, seed=3) as emu, emu.sequences(torch.tensor([first, 50])):
            model(input_ids=IDS[:2]).logits.square().mean().backward()
        grad = model.model.layers[1].mlp.down_proj.weight.grad
        assert grad is not None
        return grad.clone()

    assert same_bits(gradient(7), gradient(7))
    first, other = gradient(7), gradient(8)
    clean = llama()
    clean(input_ids=IDS[:2]).logits.square().mean().backward()
    exact = clean.model.layers[1].mlp.down_proj.weight.grad
    z = torch.stack([(g / exact - 1).flatten() / 0.05 for g in (first, other)])
    assert abs(float(torch.corrcoef(z)[0, 1])) < 4 / z.shape[1] ** 0.5
    assert abs(float(z.std()) - 1) < 0.1


def test_accumulating_over_micro_batches_adds_their_gradients() -> None:
    model = llama()

    def backward(ids: Tensor, names: Tensor, emu: Emulation) -> None:
        with emu.sequences(names):
            model(input_ids=ids).logits.square().sum().backward()

    with aqnsim.emulate(model, BY_TOKEN, seed=3) as emu:
        separate = []
        for ids, names in zip(IDS.split(2), NAMES.split(2), strict=True):
            model.zero_grad()
            backward(ids, names, emu)
            separate.append([p.grad.clone() for p in model.parameters()])
        model.zero_grad()
        for ids, names in zip(IDS.split(2), NAMES.split(2), strict=True):
            backward(ids, names, emu)
    assert_all_same([p.grad for p in model.parameters()], [a + b + c for a, b, c in zip(*separate, strict=True)])
