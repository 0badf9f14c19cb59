"""The laws of an emulated model: identity, STE, receipts, nothing swapped, noise keyed by what is computed."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from models import gemma, inputs, llama, mlp, profile, qwen3, tokens, with_lora
from scipy import stats as scipy_stats
from torch import Tensor, nn
from torch.nn import functional as F
from values import same_bits

import aqnsim
from aqnsim import AQN, AbsoluteGaussian, ConfigError, RealisationError, Receipt, RelativeGaussian
from aqnsim.aqn import Constant, EpochAware, KStage
from aqnsim.emulation import Emulation
from aqnsim.emulation.modules import EmulatedLinear, EmulatedNorm
from aqnsim.rng import key_of

FIVE = str(RelativeGaussian(0.05))
UNIT = str(AbsoluteGaussian(1.0))
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
K10 = KStage(0.05, 0.0005, 10)


def logits(model: nn.Module, ids: Tensor, **kwargs: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=ids, **kwargs).logits


def loss_and_grads(model: nn.Module, run: Callable[[], Tensor]) -> list[Tensor]:
    model.zero_grad()
    out = run()
    out.float().square().mean().backward()
    return [out.detach(), *[p.grad.clone() for p in model.parameters() if p.grad is not None]]


def assert_all_same(a: list[Tensor], b: list[Tensor]) -> None:
    assert len(a) == len(b)
    assert all(same_bits(x, y) for x, y in zip(a, b, strict=True))


def find(receipts: list[Receipt], **wanted: object) -> list[Receipt]:
    return [r for r in receipts if all(getattr(r, k) == v for k, v in wanted.items())]


@contextmanager
def outputs_of(module: nn.Module) -> Iterator[list[Tensor]]:
    seen: list[Tensor] = []
    handle = module.register_forward_hook(lambda _m, _a, out: seen.append(out.detach().clone()))
    yield seen
    handle.remove()


# ---- law 1: ideal is identity --------------------------------------------------------------------------------------


@DTYPES
def test_ideal_is_bit_identical_forward_and_backward(dtype: torch.dtype) -> None:
    model, ids = llama(dtype), tokens()
    plain = loss_and_grads(model, lambda: model(input_ids=ids).logits)
    with aqnsim.emulate(model, "ideal") as emu:
        assert_all_same(loss_and_grads(model, lambda: model(input_ids=ids).logits), plain)
        assert emu.sites == []
        assert "nothing is emulated" in str(emu.report())


@DTYPES
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("name", ["mxfp4-w4a16", "nvfp4-w4a4", "noise-5pct-matmul"])
def test_off_is_bit_identical_forward_and_backward(dtype: torch.dtype, frozen: bool, name: str) -> None:
    model, ids = llama(dtype, frozen=frozen), tokens()
    model.get_input_embeddings().requires_grad_()
    plain = loss_and_grads(model, lambda: model(input_ids=ids).logits)
    with aqnsim.emulate(model, name, aqn=AQN(Constant(0.1))) as emu:
        emu.begin_step(0, 10)
        with emu.phase("rollout"):
            with emu.off(), emu.off():
                assert_all_same(loss_and_grads(model, lambda: model(input_ids=ids).logits), plain)
            assert not torch.equal(logits(model, ids), plain[0])
    assert_all_same(loss_and_grads(model, lambda: model(input_ids=ids).logits), plain)


@DTYPES
def test_a_frozen_bf16_format_on_bf16_weights_is_identity(dtype: torch.dtype) -> None:
    model, ids = llama(torch.bfloat16, frozen=True), tokens()
    plain = logits(model, ids)
    with aqnsim.emulate(model, "bf16"):
        assert same_bits(logits(model, ids), plain)


# ---- the forward is what the profile says --------------------------------------------------------------------------


@DTYPES
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("shape", [(5, 40), (2, 3, 40), (40,)])
def test_a_linear_layer_is_cast_gemm(dtype: torch.dtype, frozen: bool, shape: tuple[int, ...]) -> None:
    model, x = mlp(dtype, frozen), inputs(*shape, dtype=dtype)
    first = model[0]
    w, b = first.weight.detach().clone(), first.bias.detach().clone()
    for name, cast_input in (("mxfp4-w4a16", False), ("mxfp4-w4a4", True)):
        with aqnsim.emulate(model, name):
            y = model[0](x)
            model(x)
        xq = aqnsim.cast(x, "mxfp4") if cast_input else x
        assert same_bits(y.detach(), F.linear(xq, aqnsim.cast(w, "mxfp4"), b))


@DTYPES
def test_a_frozen_weight_holds_its_cast_once_and_a_trainable_one_keeps_its_master(dtype: torch.dtype) -> None:
    model = mlp(dtype)
    model[2].requires_grad_(False)
    masters = [model[i].weight.detach().clone() for i in (0, 2)]
    with aqnsim.emulate(model, "mxfp4-w4a16") as emu:
        assert same_bits(model[0].weight.detach(), masters[0])
        assert same_bits(model[2].weight.detach(), aqnsim.cast(masters[1], "mxfp4"))
        for _ in range(3):
            model(inputs(4, 40, dtype=dtype))
        weight = {r.site: r for r in find(emu.receipts(), stream="weight", phase="train")}
        attach = find(emu.receipts(), phase="attach")
    assert [r.site for r in attach] == ["2"]
    assert (attach[0].calls, attach[0].elements) == (1, 72 * 24)
    assert (weight["0"].calls, weight["0"].elements) == (3, 3 * 40 * 72)  # cast in each forward
    assert (weight["2"].calls, weight["2"].elements) == (3, 0)  # called, not cast again
    assert attach[0].changed > 0.9
    assert 17 < attach[0].sqnr_db < 20  # type: ignore[operator]


def test_training_moves_the_master_and_never_the_cast() -> None:
    model, x = mlp(), inputs(16, 40)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    before = model[0].weight.detach().clone()
    with aqnsim.emulate(model, "mxfp4-w4a4"):
        model(x).square().mean().backward()
        gradient = model[0].weight.grad.clone()
        optimizer.step()
    assert same_bits(model[0].weight.detach(), before - 1e-3 * gradient)


def test_unfreezing_after_the_attach_is_an_error() -> None:
    model = mlp(frozen=True)
    with aqnsim.emulate(model, "mxfp4-w4a16") as emu:
        model(inputs(2, 40))
        model[0].weight.requires_grad_(True)
        with pytest.raises(
            ConfigError, match="'0': the weight was frozen when the profile was attached and trains now"
        ):
            model(inputs(2, 40))
        emu.restore()


@DTYPES
def test_gradients_are_straight_through(dtype: torch.dtype) -> None:
    model, x = mlp(dtype), inputs(5, 40, dtype=dtype).requires_grad_()
    layer, g = model[0], inputs(5, 72, dtype=dtype, seed=1)
    with aqnsim.emulate(model, "mxfp4-w4a4"):
        layer(x).backward(g)
        model(x)
    assert x.grad is not None
    assert same_bits(x.grad, g @ aqnsim.cast(layer.weight.detach(), "mxfp4"))
    assert same_bits(layer.weight.grad, g.t() @ aqnsim.cast(x.detach(), "mxfp4"))
    assert same_bits(layer.bias.grad, g.sum(0))


@pytest.mark.parametrize("name", ["mxfp4-w4a16", "mxfp4-w4a4"])
def test_a_backward_after_the_end_is_the_backward_of_its_forward(name: str) -> None:
    model, x = mlp(frozen=True), inputs(5, 40).requires_grad_()
    with aqnsim.emulate(model, name):
        model(x).sum().backward()
        assert x.grad is not None
        expected, x.grad = x.grad, None
        later = model(x).sum()
    later.backward()
    assert x.grad is not None
    assert same_bits(x.grad, expected)


# ---- nothing is left behind ----------------------------------------------------------------------------------------


def state_of(model: nn.Module) -> list[object]:
    return [
        [(n, type(m), sorted(m.__dict__)) for n, m in model.named_modules()],
        [(len(m._forward_pre_hooks), len(m._forward_hooks), len(m._backward_hooks)) for m in model.modules()],
        [(n, p.data_ptr(), p.requires_grad, p.dtype) for n, p in model.named_parameters()],
    ]


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("name", ["nvfp4-w4a4", "noise-5pct-matmul"])
def test_restore_gives_the_model_back_as_it_was(frozen: bool, lora: bool, name: str) -> None:
    model = llama(frozen=frozen)
    if lora:
        model = with_lora(model)
    before, keys = state_of(model), list(model.state_dict())
    values = [p.detach().clone() for p in model.parameters()]
    emu = aqnsim.emulate(model, name, aqn=AQN(Constant(0.1)))
    assert list(model.state_dict()) == keys
    assert state_of(model) != before
    emu.begin_step(0, 1)
    with emu.phase("rollout"):
        logits(model, tokens())
    emu.check()
    emu.restore()
    assert state_of(model) == before
    assert_all_same([p.detach() for p in model.parameters()], values)
    assert emu.receipts()  # they stay readable
    emu.restore()  # and once more does no harm
    with aqnsim.emulate(model, name):
        logits(model, tokens())


def test_an_error_inside_the_block_restores_and_is_not_masked() -> None:
    model = mlp(frozen=True)
    before = state_of(model)
    with pytest.raises(ZeroDivisionError), aqnsim.emulate(model, "mxfp4-w4a16"):
        _ = 1 / 0
    assert state_of(model) == before


def test_a_failed_attach_leaves_the_model_alone() -> None:
    model = llama(frozen=True)
    before = state_of(model)
    with pytest.raises(ConfigError, match="multipliers name layers"):
        aqnsim.emulate(model, profile(weight="mxfp4"), aqn=AQN(Constant(0.1), multipliers={7: 1.0}))
    assert state_of(model) == before


def test_a_state_dict_loads_into_an_emulated_model() -> None:
    model = mlp()
    other = {k: v + 1 for k, v in model.state_dict().items()}
    with aqnsim.emulate(model, "mxfp4-w4a16"):
        model.load_state_dict(other)
        y = model[0](inputs(2, 40))
        model(inputs(2, 40))
    assert same_bits(y.detach(), F.linear(inputs(2, 40), aqnsim.cast(other["0.weight"], "mxfp4"), other["0.bias"]))


def test_writing_over_a_frozen_weight_is_not_lost_silently() -> None:
    model = mlp(frozen=True)
    emu = aqnsim.emulate(model, "mxfp4-w4a16")
    model.load_state_dict({k: v + 1 for k, v in model.state_dict().items()})
    with pytest.raises(ConfigError, match="frozen weight of '0' was changed since the profile was attached"):
        emu.restore()
    written = model[0].weight.detach().clone()
    emu.restore(keep_weights=True)
    assert same_bits(model[0].weight.detach(), written)
    assert type(model[0]) is nn.Linear


def test_a_deep_copy_computes_the_same() -> None:
    model, ids = llama(frozen=True), tokens()
    with aqnsim.emulate(model, "mxfp4-w4a4"):
        twin = copy.deepcopy(model)
        assert same_bits(logits(twin, ids), logits(model, ids))
        emulated = [m for m in twin.modules() if isinstance(m, EmulatedLinear)]
        assert len(emulated) == 14


# ---- adapters ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mxfp4-w4a16", "mxfp4-w4a4", "noise-5pct-matmul"])
def test_attaching_before_or_after_peft_is_the_same(name: str) -> None:
    ids = tokens()
    before, after = llama(frozen=True), with_lora(llama(frozen=True))
    first = aqnsim.emulate(before, name)
    before = with_lora(before)
    second = aqnsim.emulate(after, name)
    assert [(s.name, s.role) for s in first.sites] == [(s.name, s.role) for s in second.sites]
    assert len(first.sites) == 14
    assert same_bits(logits(before, ids), logits(after, ids))
    runs = [loss_and_grads(m, lambda m=m: m(input_ids=ids).logits) for m in (before, after)]
    assert_all_same(*runs)
    assert len(runs[0]) == 1 + 2 * 14  # the adapters' gradients


def test_adapters_are_never_emulated() -> None:
    model = with_lora(llama())
    with aqnsim.emulate(model, profile(weight="mxfp4", input="mxfp4")) as emu:
        for name, module in model.named_modules():
            assert isinstance(module, EmulatedLinear) == (name.endswith("base_layer")), name
        for p in model.parameters():
            if p.requires_grad:
                assert not torch.equal(p, aqnsim.cast(p.detach(), "mxfp4"))
        logits(model, tokens())
        assert {r.site for r in emu.receipts()} == {s.name for s in emu.sites}
        assert not any("lora" in s.name or "base_layer" in s.name for s in emu.sites)


def test_an_adapter_s_output_is_added_to_the_emulated_base() -> None:
    model = with_lora(llama(frozen=True))
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    x = inputs(5, 32)
    w = layer.base_layer.weight.detach().clone()
    a, b = (m["default"].weight.detach() for m in (layer.lora_A, layer.lora_B))
    with aqnsim.emulate(model, "mxfp4-w4a4") as emu:
        y = layer(x).detach()
        logits(model, tokens())
    expected = F.linear(aqnsim.cast(x, "mxfp4"), aqnsim.cast(w, "mxfp4")) + F.linear(F.linear(x, a), b) * 2
    torch.testing.assert_close(y, expected, rtol=1e-6, atol=1e-6)
    assert emu.profile.name == "mxfp4-w4a4"


def test_merging_gives_the_cast_weight_plus_the_adapter() -> None:
    model = with_lora(llama(frozen=True))
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    w = layer.base_layer.weight.detach().clone()
    delta = layer.get_delta_weight("default").detach().clone()
    emu = aqnsim.emulate(model, "mxfp4-w4a16")
    merged = model.merge_and_unload()
    weight = merged.model.layers[0].self_attn.q_proj.weight.detach()
    assert same_bits(weight, aqnsim.cast(w, "mxfp4") + delta)
    with pytest.raises(ConfigError, match="merged adapter"):
        emu.restore()
    emu.restore(keep_weights=True)
    assert same_bits(merged.model.layers[0].self_attn.q_proj.weight.detach(), weight)


# ---- what is refused -----------------------------------------------------------------------------------------------


def test_emulating_twice_is_refused() -> None:
    model = llama()
    with aqnsim.emulate(model, "mxfp4-w4a16"):
        logits(model, tokens())
        with pytest.raises(ConfigError, match=r"'model.layers.0.*' is already emulated"):
            aqnsim.emulate(model, "mxfp4-w4a4")
        with pytest.raises(ConfigError, match="is already emulated"):
            aqnsim.emulate(with_lora(model), "mxfp4-w4a4")
    with aqnsim.emulate(model, "ideal", aqn=AQN(Constant(0.1))) as emu:
        with pytest.raises(ConfigError, match=r"'model.layers.0.*' is already emulated"):
            aqnsim.emulate(model, "ideal", aqn=AQN(Constant(0.1)))
        emu.begin_step(0, 1)
        with emu.phase("rollout"):
            logits(model, tokens())


@pytest.mark.parametrize("frozen", [False, True])
def test_a_tied_head_is_cast_where_it_multiplies_and_not_where_it_is_looked_up(frozen: bool) -> None:
    model, plain = (llama(tied=True, frozen=frozen) for _ in range(2))
    seen = []
    model.lm_head.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with aqnsim.emulate(model, profile(weight="mxfp4", exclude=("layers.*",))):
        result = logits(model, tokens())
        assert torch.equal(model.model.embed_tokens.weight, plain.model.embed_tokens.weight)
    assert torch.equal(result, F.linear(seen[0], aqnsim.cast(plain.lm_head.weight, "mxfp4")))


def test_a_rule_that_matches_nothing_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"rule 1 of profile 'test' \(linear, sites z_proj\) matches no op"):
        aqnsim.emulate(llama(), profile(weight="mxfp4", sites=("z_proj",)))


def test_a_linear_subclass_with_a_forward_of_its_own_is_refused() -> None:
    class Doubled(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return 2 * super().forward(input)

    with pytest.raises(ConfigError, match=r"'0' is a .*Doubled, whose forward may differ"):
        aqnsim.emulate(nn.Sequential(Doubled(4, 4)), "mxfp4-w4a16")


def test_other_weight_dtypes_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"'0' has torch\.float64 weights; expected float32, bfloat16"):
        aqnsim.emulate(mlp(torch.float64), "mxfp4-w4a16")


def test_unknown_phases_and_bad_sequences_are_refused() -> None:
    emu = aqnsim.emulate(llama(), "noise-5pct-matmul")
    with pytest.raises(aqnsim.UnknownNameError, match="did you mean 'rollout'"), emu.phase("rolout"):
        pass
    for bad in (torch.tensor([[[1]]]), torch.tensor([1.0])):
        with pytest.raises(ConfigError, match="expected int64 ids"), emu.sequences(bad):
            pass
    for bad in (torch.tensor([-1]), torch.tensor([1 << 43])):
        with pytest.raises(ConfigError, match=r"0 <= id < 2\^43"), emu.sequences(bad):
            pass
    with (
        pytest.raises(ConfigError, match=r"ids of shape \(2,\) are set but the batch has 3 rows"),
        emu.sequences(torch.arange(2)),
    ):
        logits(emu.model, tokens(batch=3))
    for step, total in ((-1, 5), (6, 5)):
        with pytest.raises(ConfigError):
            emu.begin_step(step, total)


def test_sequences_that_no_noise_can_be_keyed_by_are_refused() -> None:
    emu = aqnsim.emulate(mlp(), profile(error=FIVE))
    with pytest.raises(ConfigError, match="Sequential has no token embeddings"), emu.sequences(torch.arange(2)):
        pass


# ---- requested equals realised, or it fails ------------------------------------------------------------------------


def test_a_site_that_is_never_called_fails_by_name() -> None:
    model = mlp()
    emu = aqnsim.emulate(model, "mxfp4-w4a16")
    model[0](inputs(2, 40))
    with pytest.raises(RealisationError, match=r"site '2' is emulated .rule 1 of 'mxfp4-w4a16'. but was never called"):
        emu.check()
    emu.restore()
    with pytest.raises(RealisationError, match="never called"), aqnsim.emulate(mlp(), "mxfp4-w4a16"):
        pass


@pytest.mark.parametrize(("sigma", "dtype"), [(0.0, torch.float32), (1e-9, torch.bfloat16), (1e-12, torch.float32)])
def test_noise_that_changes_nothing_fails_by_name(sigma: float, dtype: torch.dtype) -> None:
    model = mlp(dtype)
    emu = aqnsim.emulate(model, profile(error=str(RelativeGaussian(sigma))))
    model(inputs(8, 40, dtype=dtype))
    with pytest.raises(RealisationError, match=r"site '0': relative-gaussian.* on its output changed no value"):
        emu.check()


def test_errors_asked_for_in_the_backward_must_have_run() -> None:
    model = mlp()
    with aqnsim.emulate(model, profile(grad_input=FIVE)) as emu:
        y = model(inputs(2, 40).requires_grad_())
        with pytest.raises(
            RealisationError, match=r"rule 1 of profile 'test' asks for .* on grad-input, but no backward"
        ):
            emu.check(backward=True)
        y.sum().backward()
        emu.check(backward=True)


@DTYPES
@pytest.mark.parametrize("phase", ["rollout", "train", "eval", "reference"])
def test_receipts_put_the_realised_sigma_beside_the_requested(dtype: torch.dtype, phase: str) -> None:
    model, ids = llama(dtype), tokens(batch=8, length=40)
    with aqnsim.emulate(model, "noise-5pct-matmul", seed=1) as emu, emu.phase(phase):
        model(input_ids=ids).logits.float().square().mean().backward()
        emu.check(backward=True)
        receipts, report = emu.receipts(), str(emu.report())
    assert {r.phase for r in receipts} == {phase}
    for stream in ("output", "grad-input", "grad-weight"):
        found = find(receipts, stream=stream)
        assert len(found) == 14
        for r in found:
            assert r.requested == FIVE
            assert r.requested_sigma == pytest.approx(0.05)
            n = r.elements  # no product is exactly 0 here
            low, high = scipy_stats.chi2.ppf([0.0005, 0.9995], n)
            assert low < n * (r.realised_sigma / 0.05) ** 2 < high, r.site  # type: ignore[operator]
            assert r.sqnr_db == pytest.approx(-20 * math.log10(0.05), abs=2.0)
            assert r.changed > (0.99 if dtype == torch.float32 else 0.9)
    assert "relative-gaussian(sigma=0.05)" in report
    assert emu.profile.fingerprint in report


def test_receipts_between_two_moments() -> None:
    model, x = mlp(), inputs(4, 40)
    with aqnsim.emulate(model, "mxfp4-w4a4") as emu:
        model(x)
        middle = emu.snapshot()
        model(x)
        model(x)
        assert {r.calls for r in emu.receipts(until=middle)} == {1}
        assert {r.calls for r in emu.receipts(since=middle)} == {2}
        assert {r.calls for r in emu.receipts()} == {3}
        d = emu.receipts()[0].to_dict()
        assert d["requested"] == "mxfp4"


def test_receipts_survive_a_checkpoint() -> None:
    model = mlp()
    emu = aqnsim.emulate(model, "mxfp4-w4a4")
    model(inputs(4, 40))
    state = emu.state_dict()
    before = emu.receipts()
    emu.restore()
    with aqnsim.emulate(model, "mxfp4-w4a4") as emu:
        emu.load_state_dict(state)
        assert emu.receipts() == before
    with pytest.raises(ConfigError, match="another model, profile or AQN"):
        aqnsim.emulate(llama(), "mxfp4-w4a4").load_state_dict(state)


# ---- law 3: noise is keyed by what is computed, not by how ---------------------------------------------------------


def noise_of(model: nn.Module, emu: Emulation, run: Callable[[], object]) -> Tensor:
    """The noise itself, ``[batch, tokens, columns]``: what the first q_proj returns, its weight being zero."""
    with outputs_of(model.model.layers[0].self_attn.q_proj) as seen:
        run()
    return torch.cat(seen, dim=1)


@pytest.fixture
def silent() -> tuple[nn.Module, Emulation]:
    model = llama(frozen=True)
    model.model.layers[0].self_attn.q_proj.weight.data.zero_()
    return model, aqnsim.emulate(model, profile(error=UNIT))


def cached(model: nn.Module, ids: Tensor, splits: list[int], mask: Tensor | None = None) -> Tensor:
    """Logits of a forward that is given its tokens in pieces, with a cache."""
    cache, found, at = None, [], 0
    for piece in ids.split(splits, dim=1):
        at += piece.shape[1]
        with torch.no_grad():
            out = model(
                input_ids=piece,
                past_key_values=cache,
                use_cache=True,
                attention_mask=None if mask is None else mask[:, :at],
            )
        cache = out.past_key_values
        found.append(out.logits)
    return torch.cat(found, dim=1)


@pytest.mark.parametrize("splits", [[9], [1] * 9, [4, 1, 1, 3]], ids=str)
@pytest.mark.parametrize("with_mask", [False, True])
def test_a_token_sees_the_same_noise_with_and_without_a_cache(
    silent: tuple[nn.Module, Emulation], splits: list[int], with_mask: bool
) -> None:
    model, emu = silent
    ids = tokens()
    full = noise_of(model, emu, lambda: logits(model, ids))
    assert abs(float(full.std()) - 1) < 0.1
    mask = torch.ones_like(ids) if with_mask else None
    assert same_bits(noise_of(model, emu, lambda: cached(model, ids, splits, mask)), full)


def test_left_padding_does_not_move_the_noise(silent: tuple[nn.Module, Emulation]) -> None:
    model, emu = silent
    ids = tokens()
    full = noise_of(model, emu, lambda: logits(model, ids))
    padded = torch.cat([torch.zeros(3, 4, dtype=torch.int64), ids], dim=1)
    mask = torch.cat([torch.zeros(3, 4, dtype=torch.int64), torch.ones_like(ids)], dim=1)
    assert same_bits(noise_of(model, emu, lambda: logits(model, padded, attention_mask=mask))[:, 4:], full)
    pieces = noise_of(model, emu, lambda: cached(model, padded, [6, 1, 1, 5], mask))
    assert same_bits(pieces[:, 4:], full)
    right = torch.cat([ids, torch.zeros(3, 4, dtype=torch.int64)], dim=1)
    mask = torch.cat([torch.ones_like(ids), torch.zeros(3, 4, dtype=torch.int64)], dim=1)
    assert same_bits(noise_of(model, emu, lambda: logits(model, right, attention_mask=mask))[:, :9], full)


def test_the_batch_s_layout_does_not_move_the_noise(silent: tuple[nn.Module, Emulation]) -> None:
    model, emu = silent
    ids, names = tokens(batch=6), torch.tensor([5, 17, 3, 1 << 40, 0, 8])
    with emu.sequences(names):
        full = noise_of(model, emu, lambda: logits(model, ids))
    order = torch.tensor([3, 1, 5, 0, 2, 4])
    with emu.sequences(names[order]):
        assert same_bits(noise_of(model, emu, lambda: logits(model, ids[order])), full[order])
    for i in range(6):
        with emu.sequences(names[i : i + 1]):
            assert same_bits(noise_of(model, emu, lambda i=i: logits(model, ids[i : i + 1])), full[i : i + 1])
    assert len({tuple(row.flatten().tolist()) for row in full}) == 6  # and it differs between sequences
    other = noise_of(model, emu, lambda: logits(model, ids))
    assert not torch.equal(other[0], full[0])


@pytest.mark.parametrize("what", ["seed", "step", "phase", "site", "position"])
def test_noise_differs_where_its_coordinates_do(silent: tuple[nn.Module, Emulation], what: str) -> None:
    model, emu = silent
    ids = tokens()
    emu.begin_step(1, 9)
    first = noise_of(model, emu, lambda: logits(model, ids))
    assert same_bits(noise_of(model, emu, lambda: logits(model, ids)), first)  # again, the same
    if what == "seed":
        emu.restore()
        emu = aqnsim.emulate(model, profile(error=UNIT), seed=1)
        emu.begin_step(1, 9)
        other = noise_of(model, emu, lambda: logits(model, ids))
    elif what == "step":
        emu.begin_step(2, 9)
        other = noise_of(model, emu, lambda: logits(model, ids))
    elif what == "phase":
        with emu.phase("eval"):
            other = noise_of(model, emu, lambda: logits(model, ids))
    elif what == "site":
        model.model.layers[0].self_attn.o_proj.weight.data.zero_()
        with outputs_of(model.model.layers[0].self_attn.o_proj) as seen:
            logits(model, ids)
        other = seen[0]
    else:
        first, other = first[:, 1:], first[:, :-1]
    r = torch.corrcoef(torch.stack([first.flatten(), other.flatten()]))[0, 1]
    assert abs(float(r)) < 4 / math.sqrt(first.numel())


def test_generation_and_a_later_forward_compute_the_same_logits() -> None:
    model = llama(frozen=True)
    ids, names = tokens(batch=4, length=6), torch.tensor([40, 41, 42, 43])
    ids[0, :2] = 0
    mask = (ids != 0).long()
    with aqnsim.emulate(model, "noise-5pct-matmul") as emu, emu.phase("rollout"):
        with emu.sequences(names):
            done = model.generate(
                ids,
                attention_mask=mask,
                max_new_tokens=8,
                min_new_tokens=8,
                do_sample=False,
                return_dict_in_generate=True,
                output_logits=True,
            )
        rollout = torch.stack(done.logits, dim=1)
        whole = torch.cat([mask, torch.ones(4, 8, dtype=torch.int64)], dim=1)
        order = torch.tensor([2, 0, 3, 1])
        position = (whole.cumsum(1) - 1).clamp(min=0)
        with emu.sequences(names[order]):
            again = logits(model, done.sequences[order], attention_mask=whole[order], position_ids=position[order])
        torch.testing.assert_close(again[:, 5:-1], rollout[order], rtol=1e-3, atol=1e-4)
        with emu.sequences(names):  # another order of names is another noise
            other = logits(model, done.sequences[order], attention_mask=whole[order], position_ids=position[order])
        assert float((other[:, 5:-1] - rollout[order]).abs().max()) > 0.05


def test_gradient_noise_does_not_depend_on_the_batch_s_layout() -> None:
    model, names = llama(), torch.tensor([7, 3, 9])
    x = tokens()
    embedding = model.get_input_embeddings()

    def gradient(order: Tensor, emu: Emulation) -> Tensor:
        e = embedding(x[order]).detach().requires_grad_()
        with emu.sequences(names[order]):
            model(inputs_embeds=e).logits.square().sum().backward()
        assert e.grad is not None
        return e.grad

    with aqnsim.emulate(model, profile(grad_input=FIVE)) as emu:
        order = torch.tensor([2, 0, 1])
        first = gradient(torch.arange(3), emu)
        torch.testing.assert_close(gradient(order, emu), first[order], rtol=1e-4, atol=1e-4)
        emu.begin_step(1, 2)
        assert not torch.allclose(gradient(torch.arange(3), emu), first, rtol=1e-2)


def test_a_backward_keeps_the_step_of_its_forward() -> None:
    model, x = mlp(), inputs(4, 40).requires_grad_()
    with aqnsim.emulate(model, profile(grad_input=FIVE)) as emu:
        emu.begin_step(1, 9)
        model(x).sum().backward()
        assert x.grad is not None
        expected, x.grad = x.grad, None
        y = model(x).sum()
        emu.begin_step(2, 9)
        y.backward()
        assert x.grad is not None
        assert same_bits(x.grad, expected)


def test_the_reference_backend_gives_the_same_model_bit_for_bit() -> None:
    results = []
    for backend in ("cpu", "reference"):
        aqnsim.use_backend(backend)
        model, ids = llama(torch.bfloat16), tokens()
        noisy = profile(weight="nvfp4", input="mxfp4", error=FIVE, grad_input=FIVE, grad_weight=FIVE)
        with aqnsim.emulate(model, noisy, aqn=AQN(Constant(0.05), phases=("train",))) as emu:
            emu.begin_step(3, 9)
            results.append(loss_and_grads(model, lambda model=model, ids=ids: model(input_ids=ids).logits))
    assert_all_same(*results)


# ---- AQN -----------------------------------------------------------------------------------------------------------


def norms(emu: Emulation) -> list[str]:
    return [s.name for s in emu.sites if s.kind == "norm"]


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (llama, ["layers.0.input_layernorm", "layers.0.post_attention_layernorm", "layers.1.input_layernorm",
                 "layers.1.post_attention_layernorm", "norm"]),
        (qwen3, ["layers.0.self_attn.q_norm", "layers.0.self_attn.k_norm", "layers.0.input_layernorm",
                 "layers.0.post_attention_layernorm", "norm"]),
        (gemma, ["layers.0.input_layernorm", "layers.0.post_attention_layernorm", "norm"]),
    ],
    ids=["llama", "qwen3", "gemma"],
)  # fmt: skip
def test_every_rmsnorm_is_found(make: Callable[[], nn.Module], expected: list[str]) -> None:
    for lora in (False, True):
        model = with_lora(make()) if lora else make()
        with aqnsim.emulate(model, "ideal", aqn=AQN(Constant(0.1))) as emu:
            assert norms(emu) == [f"model.{n}" for n in expected]
            emu.begin_step(0, 1)
            with emu.phase("rollout"):
                logits(model, tokens())


class Norms(nn.Module):
    """torch's own norms: two RMSNorms, with and without an epsilon, and what is none."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(24, eps=1e-5)
        self.default = nn.RMSNorm(24)
        self.layer = nn.LayerNorm(24, bias=False)
        self.plain = nn.RMSNorm(24, elementwise_affine=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.plain(self.layer(self.default(self.norm(x))))


def test_torch_s_rmsnorms_are_found_and_a_layernorm_is_not() -> None:
    model = Norms()
    with aqnsim.emulate(model, "ideal", aqn=AQN(Constant(0.1))) as emu:
        assert norms(emu) == ["norm", "default"]
        emu.begin_step(0, 1)
        with emu.phase("rollout"):
            model(inputs(3, 24))


@DTYPES
@pytest.mark.parametrize("make", [llama, qwen3, gemma])
def test_noise_is_added_to_the_weight_in_fp32_and_never_written(
    make: Callable[[], nn.Module], dtype: torch.dtype
) -> None:
    model = make().to(dtype)
    norm = model.model.layers[0].input_layernorm
    norm.weight.data += inputs(32, dtype=dtype, seed=4) * 0.1
    before = norm.weight.detach().clone()
    x, sigma = inputs(2, 7, 32, dtype=dtype), 5e-4
    clean = norm(x)
    with aqnsim.emulate(model, "ideal", seed=3, aqn=AQN(Constant(sigma))) as emu:
        emu.begin_step(2, 5)
        assert same_bits(norm(x), clean)  # training
        with emu.phase("rollout"):
            noisy = norm(x)
            logits(model, tokens())
            r = find(emu.receipts(), site="model.layers.0.input_layernorm")[0]
    assert same_bits(norm.weight.detach(), before)
    key = key_of(3, "model.layers.0.input_layernorm", "aqn")
    z = torch.from_numpy(aqnsim.backends.get("reference") and _reference_normal(32, key, 2))
    offset = 1.0 if make is gemma else 0.0
    unit = x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + 1e-6)
    expected = (offset + (before.float() + sigma * z)) * unit
    torch.testing.assert_close(noisy.float(), expected, rtol=1e-5 if dtype == torch.float32 else 8e-3, atol=1e-6)
    # in bf16 this sigma is below half an ulp of the weight: it lives in fp32 only
    assert r.requested_sigma == pytest.approx(sigma)
    assert r.realised_sigma == pytest.approx(sigma * float(z.square().mean().sqrt()), rel=1e-3)
    assert r.changed == 1.0
    low, high = scipy_stats.chi2.ppf([0.0005, 0.9995], r.elements / r.calls)
    assert low < (r.realised_sigma / sigma) ** 2 * r.elements / r.calls < high


def _reference_normal(n: int, key: int, step: int) -> Any:
    import numpy as np

    from aqnsim import reference

    return reference.normal(np.zeros(1, np.int64), n, key, step)[0]


def test_aqn_acts_in_its_phases_only() -> None:
    model, ids = llama(), tokens()
    clean = logits(model, ids)
    with aqnsim.emulate(model, "ideal", aqn=AQN(Constant(0.1), phases=("rollout", "eval"))) as emu:
        emu.begin_step(0, 1)
        seen = {}
        for phase in ("rollout", "train", "eval", "reference"):
            with emu.phase(phase):
                seen[phase] = logits(model, ids)
                with emu.off():
                    assert same_bits(logits(model, ids), clean)
        assert same_bits(seen["train"], clean)
        assert same_bits(seen["reference"], clean)
        assert not torch.equal(seen["rollout"], clean)
        assert not torch.equal(seen["eval"], clean)
        assert {r.phase for r in emu.receipts()} == {"rollout", "eval"}
        assert emu.current_phase == "train"


def test_multipliers_reach_their_layers() -> None:
    model, ids = llama(), tokens()
    aqn = AQN(Constant(0.02), multipliers={0: 0.0, 1: 0.5}, default_multiplier=2.0)
    with outputs_of(model.model.layers[0].input_layernorm) as seen:
        logits(model, ids)
        with aqnsim.emulate(model, "ideal", aqn=aqn) as emu:
            emu.begin_step(0, 1)
            with emu.phase("rollout"):
                logits(model, ids)
            receipts = {r.site: r for r in emu.receipts()}
    assert same_bits(*seen)  # layer 0 is left alone
    requested = {s: pytest.approx(r.requested_sigma) for s, r in receipts.items()}
    assert requested == {
        "model.layers.1.input_layernorm": 0.01,
        "model.layers.1.post_attention_layernorm": 0.01,
        "model.norm": 0.04,
    }
    for r in receipts.values():
        low, high = scipy_stats.chi2.ppf([0.0005, 0.9995], r.elements)
        assert low < r.elements * (r.realised_sigma / r.requested_sigma) ** 2 < high  # type: ignore[operator]


def test_a_multiplier_for_a_layer_that_is_not_there_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"multipliers name layers \[2, 27\] that have no norm"):
        aqnsim.emulate(llama(), "ideal", aqn=AQN(Constant(0.02), multipliers={0: 1.0, 27: 2.0, 2: 0.0}))


def test_the_noise_follows_the_schedule() -> None:
    model = llama()
    with aqnsim.emulate(model, "ideal", aqn=AQN(KStage(0.1, 0.001, 4))) as emu:
        found = []
        for step in range(8):
            emu.begin_step(step, 8)
            start = emu.snapshot()
            with emu.phase("rollout"):
                logits(model, tokens())
            found.append([r.requested_sigma for r in emu.receipts(since=start)])
    assert found[:2] == [[], []]
    for sigmas, expected in zip(found[2:], [0.1, 0.1, 0.01, 0.01, 0.001, 0.001], strict=True):
        assert sigmas == [pytest.approx(expected)] * 5


def test_aqn_without_a_norm_is_refused() -> None:
    with pytest.raises(ConfigError, match="AQN targets rmsnorm but Sequential has none"):
        aqnsim.emulate(mlp(), "ideal", aqn=AQN(K10))
    with pytest.raises(ConfigError, match="no noise would be injected"):
        aqnsim.emulate(llama(), "ideal", aqn=AQN(K10, default_multiplier=0.0))


def test_a_schedule_that_never_advances_fails() -> None:
    model = llama()
    emu = aqnsim.emulate(model, "ideal", aqn=AQN(K10))
    with pytest.raises(RealisationError, match="schedule never advanced: call begin_step"), emu.phase("rollout"):
        logits(model, tokens())
    with pytest.raises(RealisationError, match=r"KStage\(.*never advanced: begin_step was not called"):
        emu.check()


def test_a_schedule_that_stays_at_zero_fails() -> None:
    model = llama()
    emu = aqnsim.emulate(model, "ideal", aqn=AQN(K10))
    emu.begin_step(0, 29)
    with emu.phase("rollout"):
        logits(model, tokens())
    with pytest.raises(RealisationError, match=r"KStage\(.*stayed at sigma 0 in every step"):
        emu.check()
    with pytest.raises(ConfigError, match="is 0 at every one of 1 steps"):
        emu.begin_step(0, 1)


def test_noise_that_no_rollout_saw_fails() -> None:
    model = llama()
    emu = aqnsim.emulate(model, "ideal", aqn=AQN(K10))
    emu.begin_step(5, 29)
    logits(model, tokens())  # not in a rollout
    with pytest.raises(RealisationError, match=r"'model\.layers\.0\.input_layernorm'.* never called in phase rollout"):
        emu.check()


def test_epoch_aware_schedules_reach_the_norms() -> None:
    model = llama()
    schedule = EpochAware(0.05, 0.0005, stages_per_epoch=5, epochs=2)
    with aqnsim.emulate(model, "ideal", aqn=AQN(schedule)) as emu:
        for step in (0, 12, 70):
            emu.begin_step(step, 116)
            start = emu.snapshot()
            with emu.phase("rollout"):
                logits(model, tokens())
            found = [r.requested_sigma for r in emu.receipts(since=start)]
            sigma = schedule.sigma(step, 116)
            assert found == ([pytest.approx(sigma)] * 5 if sigma else [])


def test_a_noisy_norm_is_still_a_norm_of_its_class() -> None:
    model = llama()
    cls = type(model.model.norm)
    with aqnsim.emulate(model, "ideal", aqn=AQN(Constant(0.1))) as emu:
        assert isinstance(model.model.norm, cls)
        assert isinstance(model.model.norm, EmulatedNorm)
        assert cls.__name__ in type(model.model.norm).__name__
        emu.begin_step(0, 1)
        with emu.phase("rollout"):
            logits(model, tokens())
