"""Every op of every family is emulated, and the emulation computes what the model does."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from models import everything, family, inputs, llama, mlp, profile, tokens, with_lora
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode
from values import same_bits

import aqnsim
from aqnsim import ConfigError, RealisationError, profiles
from aqnsim.emulation.binding import Binding
from aqnsim.emulation.coverage import Coverage, survey
from aqnsim.profiles import KINDS, Forward, GradInput, OpSpec, Profile, Rule

FAMILIES = (
    *("llama", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "mistral", "phi", "phi3", "gpt2", "olmo2"),
    *("gpt_neox", "bloom", "qwen3_moe", "qwen2_moe", "mixtral", "gpt_oss", "deepseek_v3"),
)
MIXTURES = ("qwen3_moe", "qwen2_moe", "mixtral", "gpt_oss", "deepseek_v3")
NEAR = "e8m22"  # one bit less than fp32
PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "addmv", "mv", "convolution", "_grouped_mm", "grouped_mm_fallback")


@pytest.fixture(scope="module", params=FAMILIES)
def model(request: pytest.FixtureRequest) -> nn.Module:
    return family(request.param)


def run(model: nn.Module) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits, and the gradients of the loss."""
    ids = tokens(2, 7)
    model.zero_grad()
    out = model(input_ids=ids, labels=ids)
    out.loss.backward()
    return out.logits.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


class Products(TorchDispatchMode):
    """Names of the products of matrices that torch itself runs, wherever they come from."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.rpartition("::")[2]
        if name in PRODUCTS or "scaled_dot_product" in name or "softmax" in name.removeprefix("_log"):
            self.seen.append(name)
        return func(*args, **(kwargs or {}))


# ---- every op --------------------------------------------------------------------------------------------------------


def test_no_op_of_a_family_is_out_of_reach(model: nn.Module) -> None:
    coverage = survey(model)
    assert coverage.uncovered == ()
    assert {op.status for op in coverage.ops} <= {"kept", "constant"}
    assert all(op.calls for op in coverage.of_status("kept") if op.kind != "activation")
    kinds = {op.kind for op in coverage.ops}
    assert {"embedding", "linear", "norm", "softmax", "activation", "add", "loss"} <= kinds
    assert {"kv_cache", "qk", "pv"} <= kinds or "matmul" in kinds  # attention that a forward spells out itself


def test_the_flops_are_those_of_torch_s_own_counter(model: nn.Module) -> None:
    model = copy.deepcopy(model)
    model.set_attn_implementation("eager")
    if hasattr(model.config, "num_experts_per_tok"):
        model.set_experts_implementation("eager")
    ids = tokens(1, 16)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(input_ids=ids)
    constant = sum(op.flops for op in survey(model, example={"input_ids": ids}).of_status("constant"))
    assert survey(model, example={"input_ids": ids}).flops + constant == counter.get_total_flops()


def test_a_profile_of_all_kinds_emulates_every_op_and_every_flop(model: nn.Module) -> None:
    coverage = survey(model, everything("bf16"))
    assert {op.status for op in coverage.ops} <= {"emulated", "constant"}
    assert coverage.emulated_share == 1.0
    assert sum(op.flops for op in coverage.of_status("constant")) == 0


def test_torch_multiplies_no_matrices_beside_an_emulation_of_everything(model: nn.Module) -> None:
    ids = tokens(1, 5)
    with torch.no_grad(), Products() as plain:
        model(input_ids=ids)
    with aqnsim.emulate(model, everything("bf16")) as emu, torch.no_grad():
        model(input_ids=ids, labels=ids)
        with Products() as emulated:
            model(input_ids=ids)
        softmaxes = sum(s.kind == "softmax" for s in emu.sites)
    assert len(plain.seen) > 10
    assert [n for n in emulated.seen if n != "_softmax"] == []
    assert len(emulated.seen) <= softmaxes  # torch computes those, between their casts


def test_an_emulation_in_a_wide_format_computes_what_the_model_does(model: nn.Module) -> None:
    logits, grads = run(model)
    with aqnsim.emulate(model, everything(NEAR)) as emu:
        near, near_grads = run(model)
        with emu.off():
            off, off_grads = run(model)
    assert not same_bits(near, logits)
    torch.testing.assert_close(near, logits, rtol=1e-4, atol=1e-5 * float(logits.abs().max()))
    assert near_grads.keys() == grads.keys()
    for name, grad in grads.items():
        torch.testing.assert_close(near_grads[name], grad, rtol=1e-3, atol=2e-5 * float(grad.abs().max()), msg=name)
    assert same_bits(off, logits)
    assert all(same_bits(off_grads[name], grad) for name, grad in grads.items())


def test_errors_on_every_op_run_forward_and_backward(model: nn.Module) -> None:
    error = "relative-gaussian(sigma=0.05)"
    spec = OpSpec(forward=Forward(error=error), grad_input=GradInput(error=error))
    rule = Rule(kind=KINDS, spec=spec)
    noise = Profile(name="noise", description="for a test", source={"definition": "for a test"}, rules=(rule,))
    logits, grads = run(model)
    with aqnsim.emulate(model, noise):
        # BLOOM folds heads into the batch; Gemma 3 normalises queries and keys with their heads before their tokens
        if model.config.model_type in ("bloom", "gemma3_text"):
            with pytest.raises(ConfigError, match="logical rows are set but the op has"):
                run(model)
            pytest.skip("rows whose tokens are not known are refused")
        noisy, noisy_grads = run(model)
    assert not torch.allclose(noisy, logits, rtol=1e-3)
    assert noisy_grads.keys() == grads.keys()
    assert all(g.isfinite().all() for g in noisy_grads.values())


def test_restoring_gives_classes_and_bits_back(model: nn.Module) -> None:
    classes = [type(m) for m in model.modules()]
    attributes = [set(m.__dict__) for m in model.modules()]
    logits, grads = run(model)
    emu = aqnsim.emulate(model, everything("bf16"))
    assert emu.coverage.emulated_share == 1.0
    emulated, _ = run(model)
    emu.restore()
    after, after_grads = run(model)
    assert not same_bits(emulated, logits)
    assert [type(m) for m in model.modules()] == classes
    assert [set(m.__dict__) for m in model.modules()] == attributes
    assert same_bits(after, logits)
    assert all(same_bits(after_grads[name], grad) for name, grad in grads.items())


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2", "gpt_oss"])
def test_attention_that_is_not_fused_is_emulated_as_well(name: str) -> None:
    model = family(name, attn_implementation="eager")
    logits, _ = run(model)
    with aqnsim.emulate(model, everything(NEAR), strict=True) as emu:
        near, _ = run(model)
    assert emu.coverage.emulated_share == 1.0
    torch.testing.assert_close(near, logits, rtol=1e-4, atol=1e-5 * float(logits.abs().max()))


def test_tables_that_no_activation_enters_are_no_sites() -> None:
    """OPT counts positions by a product of a mask of ones with itself."""
    model = family("opt")
    constants = survey(model).of_status("constant")
    assert [op.kind for op in constants] == ["multiply"]
    with aqnsim.emulate(model, everything("bf16")) as emu:
        model(input_ids=tokens(), labels=tokens())
    assert constants[0].name not in {s.name.rpartition(".")[0] for s in emu.sites if s.kind == "multiply"}


# ---- mixtures --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
@pytest.mark.parametrize("name", MIXTURES)
def test_experts_compute_what_the_model_s_own_do_whichever_way_they_run(name: str, implementation: str) -> None:
    model = family(name)
    model.set_experts_implementation(implementation)
    logits, grads = run(model)
    coverage = survey(model, everything(NEAR))
    assert coverage.uncovered == ()
    assert coverage.emulated_share == 1.0
    with aqnsim.emulate(model, everything(NEAR)):
        near, near_grads = run(model)
    torch.testing.assert_close(near, logits, rtol=1e-4, atol=1e-5 * float(logits.abs().max()))
    for key, grad in grads.items():
        torch.testing.assert_close(near_grads[key], grad, rtol=1e-3, atol=2e-5 * float(grad.abs().max()), msg=key)


@pytest.mark.parametrize("name", MIXTURES)
def test_the_shipped_profiles_keep_routers_heads_and_embeddings(name: str) -> None:
    model = family(name)
    for shipped in ("mxfp4-w4a4", "noise-5pct-matmul", "bf16", "nvfp4-w4a16"):
        coverage = survey(model, shipped)
        kept = [op for op in coverage.ops if op.role in ("router", "lm_head", "embedding")]
        assert {op.role for op in kept} == {"router", "lm_head", "embedding"}
        assert {op.status for op in kept} == {"excluded"}
        linear = [op for op in coverage.ops if op.kind == "linear" and op not in kept]
        assert {op.status for op in linear} == {"emulated"}


def test_a_gate_of_the_experts_own_is_one_op() -> None:
    """gpt-oss clamps and shifts, and its weights are ``[experts, inputs, outputs]`` with biases."""
    names = {op.name.rpartition(".")[2]: op for op in survey(family("gpt_oss")).ops if ".experts." in op.name}
    assert set(names) == {"gate_up_proj", "down_proj", "gate", "weigh", "combine"}
    assert names["gate"].kind == "activation"
    assert names["gate_up_proj"].kind == names["down_proj"].kind == "linear"


def test_blocks_of_transposed_experts_run_along_their_inputs() -> None:
    model = family("gpt_oss").requires_grad_(False)
    experts = model.get_submodule("model.layers.0.mlp.experts")
    master = experts.gate_up_proj.detach().clone()
    with aqnsim.emulate(model, "mxfp4-w4a16") as emu:
        model(input_ids=tokens())
        assert same_bits(experts.gate_up_proj, aqnsim.cast(master, "mxfp4", axis=-2))
        with emu.off():
            assert same_bits(experts.gate_up_proj, master)


class Clamped(nn.Module):
    """Experts whose gate is plain for small values only."""

    def __init__(self, limit: float) -> None:
        super().__init__()
        self.gate_up_proj, self.down_proj = nn.Parameter(inputs(2, 12, 8)), nn.Parameter(inputs(2, 8, 6, seed=1))
        self.act_fn, self.limit = nn.SiLU(), limit

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        x, index, weights = hidden_states, top_k_index, top_k_weights
        result = torch.zeros_like(x)
        for expert in index.unique():
            token, choice = torch.where(index == expert)
            gate, up = F.linear(x[token], self.gate_up_proj[expert]).clamp(max=self.limit).chunk(2, -1)
            y = F.linear(self.act_fn(gate) * up, self.down_proj[expert]) * weights[token, choice, None]
            result.index_add_(0, token, y)
        return result


@pytest.mark.parametrize(("limit", "plain"), [(1e9, True), (9.0, False)])
def test_experts_that_only_look_plain_run_their_own_forward(limit: float, plain: bool) -> None:
    model = Clamped(limit)
    index = torch.tensor([[0, 1]] * 4 + [[1, 0]])
    example = {"hidden_states": 3 * inputs(5, 8), "top_k_index": index, "top_k_weights": inputs(5, 2, seed=3)}
    expected = model(**example)
    coverage = survey(model, everything(NEAR), example)
    assert coverage.uncovered == ()
    assert coverage.emulated_share == 1.0
    assert any(op.name.endswith("combine") for op in coverage.ops) == plain
    with aqnsim.emulate(model, everything(NEAR), example=example) as emu:
        torch.testing.assert_close(model(**example), expected, rtol=1e-4, atol=1e-4)
        with emu.off():
            assert same_bits(model(**example), expected)


# ---- roles -----------------------------------------------------------------------------------------------------------

ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}
GATED = {"gate_proj", "up_proj", "down_proj"}
ROLES = {
    "llama": ATTENTION | GATED,
    "qwen3": ATTENTION | GATED,
    "gemma2": ATTENTION | GATED,
    "phi": ATTENTION | {"up_proj", "down_proj"},
    "phi3": {"qkv_proj", "o_proj", "gate_up_proj", "down_proj"},
    "gpt2": {"qkv_proj", "o_proj", "up_proj", "down_proj"},
    "gpt_neox": {"qkv_proj", "o_proj", "up_proj", "down_proj"},
    "qwen3_moe": ATTENTION | {"router", "gate_up_proj", "down_proj"},
    "mixtral": ATTENTION | {"router", "gate_up_proj", "down_proj"},
    "qwen2_moe": ATTENTION | GATED | {"router", "gate_up_proj", "shared_expert_gate"},
}


@pytest.mark.parametrize("name", ROLES)
def test_roles_are_the_same_words_in_every_family(name: str) -> None:
    ops = survey(family(name)).ops
    assert {op.role for op in ops if op.kind == "linear"} == ROLES[name] | {"lm_head"}


# ---- what is not covered ---------------------------------------------------------------------------------------------


class Hidden(nn.Module):
    """A product that no rewriting reaches: the function comes from a container at run time, under no name."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.weight = nn.Linear(8, 8), nn.Parameter(torch.eye(8))
        self.table = {"product": torch.Tensor.__matmul__}

    def forward(self, x: Tensor) -> Tensor:
        return self.table["product"](self.first(x), self.weight)


def hidden() -> tuple[nn.Module, dict[str, Tensor]]:
    return Hidden(), {"x": torch.ones(3, 8)}


def test_an_op_that_no_rule_can_reach_is_found_with_its_share() -> None:
    model, example = hidden()
    coverage = survey(model, "mxfp4-w4a4", example)
    assert [(op.kind, op.role, op.flops) for op in coverage.uncovered] == [("matmul", "mm", 2 * 3 * 8 * 8)]
    assert coverage.share(*coverage.uncovered) == coverage.emulated_share == 0.5


def test_strict_refuses_it_by_name_and_leaves_the_model_alone() -> None:
    model, example = hidden()
    with pytest.raises(ConfigError, match=r"1 ops cannot be emulated, 50.00% of the FLOPs: .*matmul, 50.00%"):
        aqnsim.emulate(model, "mxfp4-w4a4", example=example, strict=True)
    assert type(model.first) is nn.Linear
    with aqnsim.emulate(model, "mxfp4-w4a4", example=example) as emu:
        model(**example)
        assert len(emu.coverage.uncovered) == 1


def test_strict_accepts_what_a_profile_keeps_and_excludes() -> None:
    with aqnsim.emulate(llama(), "mxfp4-w4a4", strict=True) as emu:
        emu.model(input_ids=tokens())
    statuses = {op.role: op.status for op in emu.coverage.ops}
    assert statuses["lm_head"] == statuses["embedding"] == "excluded"
    assert statuses["qk"] == statuses["norm"] == "kept"
    assert statuses["q_proj"] == "emulated"


def test_an_op_that_is_to_be_emulated_and_is_not_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def torch_s(self: Binding, x: Tensor, weight: Tensor, bias: Tensor | None, part: int = 0) -> Tensor:
        return nn.functional.linear(x, weight, bias)

    monkeypatch.setattr(Binding, "linear", torch_s)
    with pytest.raises(RealisationError, match=r"q_proj.* of its \d+ FLOPs 0 were"):
        survey(llama(), "mxfp4-w4a4")


@pytest.mark.parametrize("part", ["norm", "softmax", "activation", "add", "embedding"])
def test_an_elementwise_op_that_does_not_act_is_an_error(part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Binding.leave

    def lame(self: Binding, y: Tensor, dtype: torch.dtype, *args: Any) -> Tensor:
        return y.to(dtype) if self.site.kind == part else real(self, y, dtype, *args)

    monkeypatch.setattr(Binding, "leave", lame)
    monkeypatch.setattr(Binding, "enter", lambda self, x, *_: x.float())
    with pytest.raises(RealisationError, match=part):
        survey(llama(), everything("bf16"))


# ---- the report ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def of_llama() -> Coverage:
    return survey(llama(), "mxfp4-w4a4")


def test_shares_add_up(of_llama: Coverage) -> None:
    parts = [of_llama.share(*of_llama.of_status(s)) for s in ("emulated", "excluded", "kept")]
    assert sum(parts) == pytest.approx(1.0)
    assert all(part > 0 for part in parts)
    assert of_llama.flops == sum(op.flops for op in of_llama.ops)


def test_flops_of_layers_follow_from_their_shapes(of_llama: Coverage) -> None:
    length = 16
    for op in of_llama.ops:
        if op.kind == "linear":
            assert op.flops == 2 * length * op.shape[0] * op.shape[1]
        if op.kind in ("qk", "pv"):
            assert op.flops == 2 * 4 * length * length * 8
        if op.kind == "softmax":
            assert op.elements == 4 * length * length


def test_longer_sequences_spend_a_larger_share_on_attention() -> None:
    def share(length: int) -> float:
        coverage = survey(llama(), length=length)
        return coverage.share(*(op for op in coverage.ops if op.kind in ("qk", "pv")))

    assert share(8) < share(32)


def test_the_table_joins_repeated_layers(of_llama: Coverage) -> None:
    joined = {row[0]: row for row in of_llama.table()}
    assert joined["model.layers.*.mlp.up_proj"][1] == "2"
    assert joined["model.layers.*.mlp.up_proj"][5] == "emulated (rule 1)"
    assert len(of_llama.table(grouped=False)) == 1 + len(of_llama.ops)
    assert len({len(row) for row in of_llama.table()}) == 1


def test_adapters_are_kept_and_named_as_such() -> None:
    coverage = survey(with_lora(llama()), "mxfp4-w4a4")
    assert coverage.uncovered == ()
    adapters = [op for op in coverage.ops if op.role == "adapter"]
    assert sum(op.flops for op in adapters) > 0
    assert {op.status for op in adapters} == {"kept"}


def test_a_survey_leaves_no_trace() -> None:
    model = llama(frozen=True)
    before = copy.deepcopy(model.state_dict())
    classes = [type(m) for m in model.modules()]
    state = torch.random.get_rng_state()
    with aqnsim.emulate(model, "mxfp4-w4a16") as emu:
        receipts = emu.receipts()
        assert emu.coverage.emulated_share > 0.5
        assert emu.receipts() == receipts
        model(input_ids=tokens())
    survey(model)
    assert [type(m) for m in model.modules()] == classes
    assert all(same_bits(v, before[k]) for k, v in model.state_dict().items())
    assert torch.equal(torch.random.get_rng_state(), state)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_a_survey_of_what_is_emulated_or_no_longer_is_refused() -> None:
    model = llama()
    with aqnsim.emulate(model, "mxfp4-w4a4") as emu:
        model(input_ids=tokens())
        with pytest.raises(ConfigError, match="already emulated"):
            survey(model)
    with pytest.raises(ConfigError, match="was restored; ask for it before"):
        _ = emu.coverage


def test_a_model_without_tokens_wants_an_example() -> None:
    with pytest.raises(ConfigError, match="pass example="):
        survey(mlp())
    coverage = survey(mlp(), profile(weight="mxfp4", input="mxfp4"), {"input": torch.ones(3, 40)})
    assert [op.status for op in coverage.ops] == ["emulated", "kept", "emulated"]
    assert coverage.emulated_share == 1.0


def test_coverage_is_data(of_llama: Coverage) -> None:
    data = of_llama.to_dict()
    assert data["profile"] == "mxfp4-w4a4"
    assert data["emulated_share"] == of_llama.emulated_share
    assert sum(op["flops"] for op in data["ops"]) == data["flops"]
    assert profiles.load("mxfp4-w4a4").name == of_llama.profile
