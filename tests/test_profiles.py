"""Profiles: what ships, what is refused, and a fingerprint that changes exactly when a number can."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import family, llama, tokens
from torch import nn

import aqnsim
from aqnsim import ConfigError, Emulation, UnknownNameError, formats, profiles
from aqnsim.emulation.coverage import survey
from aqnsim.profiles import (
    ELEMENTWISE,
    GEMMS,
    KINDS,
    Forward,
    GradInput,
    GradWeight,
    OpSpec,
    Profile,
    Rule,
    from_toml,
    load,
)
from aqnsim.profiles.difference import Difference, differences, exclusions, in_words
from aqnsim.profiles.spec import PARTS
from aqnsim.profiles.texts import FIELD_MEANINGS, KIND_MEANINGS, commented, flat, to_dict, to_toml
from aqnsim.rng import PHASES

FIXED = {
    "ideal",
    "bf16",
    "mxfp4-w4a16",
    "mxfp4-w4a4",
    "nvfp4-w4a16",
    "nvfp4-w4a4",
    "noise-5pct-matmul",
    "noise-5pct-all-ops",
}
EMULATING = [name for name in profiles.names() if name != "ideal"]
KEPT = ("router", "lm_head", "embedding")
TEXT = """
name = "mine"
description = "for a test"
exclude = ["lm_head"]

[source]
definition = "made up"

[[rule]]
kind = "linear"
sites = ["*_proj"]
forward.input = "mxfp4"
forward.weight = "nvfp4"
forward.error = "relative-gaussian(sigma=0.05)"
grad_input.error = "relative-gaussian(sigma=0.1)"
grad_weight.error = "absolute-gaussian(sigma=0.2)"
"""


def with_(old: str, new: str) -> str:
    assert old in TEXT
    return TEXT.replace(old, new)


def test_the_fixed_names_are_there() -> None:
    assert set(profiles.names()) >= FIXED


@pytest.mark.parametrize("name", profiles.names())
def test_every_shipped_profile_loads(name: str) -> None:
    p = load(name)
    assert p.name == name
    assert p.description
    assert p.source
    assert all(isinstance(v, str) and v for v in p.source.values())
    assert load(p) is p


def test_what_the_shipped_profiles_ask_for() -> None:
    assert load("ideal").rules == ()
    for fmt in ("mxfp4", "nvfp4"):
        assert [r.spec for r in load(f"{fmt}-w4a16").rules] == [OpSpec(forward=Forward(weight=fmt))]
        assert [r.spec for r in load(f"{fmt}-w4a4").rules] == [OpSpec(forward=Forward(weight=fmt, input=fmt))]
    five = "relative-gaussian(sigma=0.05)"
    everywhere = OpSpec(
        forward=Forward(error=five), grad_input=GradInput(error=five), grad_weight=GradWeight(error=five)
    )
    assert [r.spec for r in load("noise-5pct-matmul").rules] == [everywhere]
    for name in EMULATING:
        assert load(name).rule_for("linear", "lm_head", "lm_head") is None
        assert load(name).rule_for("embedding", "model.embed_tokens", "embedding") is None
        assert load(name).rule_for("linear", "model.layers.0.mlp.gate", "router") is None
        assert load(name).rule_for("softmax", "model.layers.0.mlp.gate.softmax", "router") is None
        assert load(name).rule_for("linear", "model.layers.0.mlp.gate_proj", "gate_proj") is not None


@pytest.mark.parametrize("name", ["ascend-910-class", "mi355", "illustrative-npu"])
def test_what_no_vendor_publishes_is_called_illustrative(name: str) -> None:
    assert "illustrative" in load(name).description
    assert load(name).source["illustrative"]


@pytest.mark.parametrize("name", [n for n in profiles.names() if n.endswith("-training")])
def test_a_recipe_says_where_it_stands_and_what_it_leaves_out(name: str) -> None:
    source = load(name).source
    assert re.search("arXiv|TransformerEngine", source["recipe"])
    assert source["not_modelled"]


# ---- what the shipped profiles do ------------------------------------------------------------------------------------


def run(model: nn.Module, emu: Emulation) -> None:
    """A forward in every phase, and the backward of training."""
    ids = tokens()
    for phase in PHASES:
        with emu.phase(phase), torch.set_grad_enabled(phase == "train"):
            loss = model(input_ids=ids, labels=ids).loss
            if phase == "train":
                loss.backward()


def streams(spec: OpSpec) -> dict[str, str]:
    """The receipts of a spec, one for each format and error: the stream, and a text that its request holds."""
    found = {}
    for name, value in flat(spec).items():
        part, field = name.split(".")
        prefix = "" if part == "forward" else part.replace("_", "-")
        if field == "error":
            found[prefix or "output"] = value
        elif field == "output":
            found[f"{prefix or 'output'}-cast"] = value
        elif field in ("input", "weight", "grad"):
            found[f"{prefix}.{field}".removeprefix(".")] = value
    return found


@pytest.mark.parametrize("name", EMULATING)
def test_every_shipped_profile_does_what_it_says_at_every_op_it_says(name: str) -> None:
    profile, model = load(name), llama()
    expected = {}
    for op in survey(model).ops:
        for phase in PHASES:
            rule = profile.rule_for(op.kind, op.name, op.role, phase)
            if rule is not None and op.status != "constant":
                asked = streams(profile.rules[rule].spec)
                expected |= {(op.name, phase, s): text for s, text in asked.items() if is_made(s, phase)}
    with aqnsim.emulate(model, profile) as emu:
        run(model, emu)
        emu.check(backward=True)
        found = {(r.site, r.phase, r.stream): r.requested for r in emu.receipts()}
    assert expected
    assert found.keys() == expected.keys()
    assert [key for key, text in expected.items() if text not in found[key]] == []
    assert all(bool(torch.isfinite(p.grad).all()) for p in model.parameters() if p.grad is not None)


def is_made(stream: str, phase: str) -> bool:
    """Whether :func:`run` makes a stream in a phase: gradients in training alone."""
    return phase == "train" or not stream.startswith("grad-")


UNMEASURED = ("accumulator", "approximation")
"""Fields that leave no receipt of their own."""


@pytest.mark.parametrize("name", [n for n in EMULATING if re.search("accumulator|table", to_toml(load(n)))])
def test_accumulators_and_tables_of_shipped_profiles_change_logits_and_gradients(name: str) -> None:
    profile = load(name)
    for field in UNMEASURED:
        text = re.sub(rf"\n\w+\.{field} = [^\n]+", "", to_toml(profile))
        if from_toml(text) == profile:
            continue
        results = []
        for p in (profile, from_toml(text)):
            model = llama()
            with aqnsim.emulate(model, p):
                loss = model(input_ids=tokens(), labels=tokens()).loss
                loss.backward()
            results.append((loss.detach(), model.model.layers[0].mlp.up_proj.weight.grad))
        assert not torch.equal(results[0][1], results[1][1])
        torch.testing.assert_close(results[0], results[1], rtol=0.2, atol=0.05)


def test_noise_on_all_ops_reaches_every_kind_of_op_forward_and_backward() -> None:
    profile = load("noise-5pct-all-ops")
    assert profile.kinds == set(KINDS) - {"embedding"}  # which it excludes
    assert {text for r in profile.rules for text in flat(r.spec).values()} == {"relative-gaussian(sigma=0.05)"}
    for rule in profile.rules:
        assert rule.spec.forward.error
        assert rule.spec.grad_input.error
        weighted = set(rule.kinds) & {*GEMMS, "norm", "conv"}
        assert bool(rule.spec.grad_weight.error) == bool(weighted) == (weighted == set(rule.kinds))
    model = llama()
    kinds = {op.kind for op in survey(model).ops if op.status != "constant"}
    assert kinds == set(KINDS) - {"conv", "matmul"}  # which a Llama has not
    with aqnsim.emulate(model, profile) as emu:
        run(model, emu)
        assert {site.kind for site in emu.sites} == kinds - {"embedding"}
        assert emu.report().violations() == []


@pytest.mark.parametrize("name", EMULATING)
def test_routers_heads_and_embeddings_of_a_mixture_are_untouched(name: str) -> None:
    model = family("qwen3_moe")
    coverage = survey(model, name)
    assert {op.role for op in coverage.of_status("excluded")} == set(KEPT)
    assert {op.role for op in coverage.of_status("emulated")}.isdisjoint(KEPT)
    hidden = torch.randn(5, model.config.hidden_size, generator=torch.Generator().manual_seed(0))
    kept = (model.model.layers[0].mlp.gate, model.lm_head)
    before = [module(hidden) for module in kept]
    with aqnsim.emulate(model, name) as emu:
        run(model, emu)
        emu.check(backward=True)
        after = [module(hidden) for module in kept]
        assert {r.role for r in emu.receipts()}.isdisjoint(KEPT)
    torch.testing.assert_close(after, before, rtol=0, atol=0)


def test_a_profile_may_roll_out_in_one_format_and_train_in_another() -> None:
    profile = load("mxfp4-rollout")
    assert [profile.rule_for("linear", "layers.0.mlp.up_proj", "up_proj", phase) for phase in PHASES] == [0, 1, 0, 1]
    model, ids = llama(frozen=True), tokens()

    def logits(name: str, phase: str) -> torch.Tensor:
        with aqnsim.emulate(model, name) as emu, emu.phase(phase), torch.no_grad():
            return model(input_ids=ids).logits

    assert torch.equal(logits("mxfp4-rollout", "rollout"), logits("mxfp4-w4a16", "rollout"))
    assert torch.equal(logits("mxfp4-rollout", "train"), logits("bf16", "train"))
    assert not torch.equal(logits("mxfp4-rollout", "rollout"), logits("mxfp4-rollout", "train"))


def test_text_becomes_rules() -> None:
    p = from_toml(TEXT)
    assert p.exclude == ("lm_head",)
    assert p.rules[0].sites == ("*_proj",)
    assert p.rules[0].spec.forward == Forward(input="mxfp4", weight="nvfp4", error="relative-gaussian(sigma=0.05)")
    assert p.rules[0].spec.grad_weight.error == "absolute-gaussian(sigma=0.2)"


def test_a_path_loads_a_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(TEXT)
    assert load(path) == load(str(path)) == from_toml(TEXT)
    with pytest.raises(ConfigError, match=r"missing\.toml'.*no such file"):
        load(tmp_path / "missing.toml")


def test_the_first_rule_that_matches_wins_and_exclusions_win_over_all() -> None:
    text = TEXT + '\n[[rule]]\nkind = "linear"\nforward.weight = "mxfp4"\n'
    p = from_toml(text)
    assert p.rule_for("linear", "model.layers.0.q_proj") == 0
    assert p.rule_for("linear", "model.layers.0.fc1") == 1
    assert p.rule_for("linear", "lm_head") is None
    assert p.rule_for("linear", "model.lm_head") is None
    assert p.rule_for("norm", "model.norm") is None


# ---- fingerprints --------------------------------------------------------------------------------------------------


def test_shipped_profiles_have_different_fingerprints() -> None:
    found = {load(n).fingerprint for n in profiles.names()}
    assert len(found) == len(profiles.names())
    assert all(len(f) == 16 and int(f, 16) >= 0 for f in found)


@pytest.mark.parametrize(
    "text",
    [
        "# a comment\n" + TEXT,
        with_("for a test", "other words"),
        with_("made up", "another source"),
        with_('name = "mine"', 'name = "yours"'),
        with_("sigma=0.05", "sigma=5e-2"),
        with_("sigma=0.05", "sigma=0.050"),
    ],
    ids=["comment", "description", "source", "name", "exponent", "trailing zero"],
)
def test_what_changes_no_number_keeps_the_fingerprint(text: str) -> None:
    assert from_toml(text).fingerprint == from_toml(TEXT).fingerprint


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("sigma=0.05", "sigma=0.051"),
        ("sigma=0.1)", "sigma=0.11)"),
        ("sigma=0.2", "sigma=0.21"),
        ('input = "mxfp4"', 'input = "nvfp4"'),
        ('weight = "nvfp4"', 'weight = "mxfp4"'),
        ('forward.input = "mxfp4"\n', ""),
        ("relative-gaussian(sigma=0.05)", "absolute-gaussian(sigma=0.05)"),
        ("grad_input", "grad_weight"),
        ('"*_proj"', '"q_proj"'),
        ('["lm_head"]', "[]"),
    ],
)
def test_what_changes_a_number_changes_the_fingerprint(old: str, new: str) -> None:
    text = with_(old, new)
    if old == "grad_input":
        text = text.replace('grad_weight.error = "absolute-gaussian(sigma=0.2)"\n', "")
    assert from_toml(text).fingerprint != from_toml(TEXT).fingerprint


def test_the_meaning_of_a_format_is_part_of_the_fingerprint(monkeypatch: pytest.MonkeyPatch) -> None:
    import dataclasses

    from aqnsim.formats import names, texts

    before = from_toml(TEXT).fingerprint
    other = dataclasses.replace(formats.get("nvfp4"), block=32)
    monkeypatch.setattr(names, "ALL", {**formats.ALL, "nvfp4": other})
    monkeypatch.setattr(texts, "_get", texts._get.__wrapped__)  # as in a process that never saw the other one
    assert from_toml(TEXT).fingerprint != before


def test_two_spellings_of_a_format_have_one_fingerprint() -> None:
    def fingerprint(text: str) -> str:
        return from_toml(with_('"nvfp4"', f'"{text}"')).fingerprint

    assert fingerprint("nvfp4( block = 16 )") == fingerprint("nvfp4")
    assert fingerprint("nvfp4(scale=torchao)") != fingerprint("nvfp4")


def test_a_format_that_draws_random_bits_makes_an_op_that_draws() -> None:
    spec = from_toml(with_('"nvfp4"', '"nvfp4(rounding=stochastic)"')).rules[0].spec
    assert OpSpec(forward=Forward(weight=spec.forward.weight)).draws
    assert not OpSpec(forward=Forward(weight="nvfp4")).draws


@pytest.mark.parametrize("name", profiles.names())
def test_a_fingerprint_survives_writing_and_reading(name: str) -> None:
    profile = load(name)
    assert from_toml(to_toml(profile)).fingerprint == profile.fingerprint
    assert from_toml(commented(profile)).fingerprint == profile.fingerprint
    assert OpSpec.parse(OpSpec().text).is_empty


def with_another(text: str, number: re.Match[str]) -> Iterator[Profile]:
    """Profiles whose text has another number in that place, as far as it may stand there."""
    value = float(number[1]) if "." in number[1] else int(number[1])
    for other in (value * 2, value + 1, value - 1):
        try:
            yield from_toml(f"{text[: number.start(1)]}{other}{text[number.end(1) :]}")
        except ConfigError:
            continue


@pytest.mark.parametrize("name", profiles.names())
def test_a_fingerprint_changes_with_any_number_of_a_rule(name: str) -> None:
    text = to_toml(load(name))
    start = len(text.partition("[[rule]]")[0])
    numbers = list(re.compile(r"= ?([0-9]+(?:\.[0-9]+)?)").finditer(text, start))
    for number in numbers:
        changed = list(with_another(text, number))
        assert changed, f"no other number than {number[0]} can stand there"
        assert load(name).fingerprint not in {p.fingerprint for p in changed}
    assert bool(numbers) == bool(re.search("sigma|accumulator|table|hadamard|block=", text[start:]))


# ---- texts -----------------------------------------------------------------------------------------------------------

FORMATS = st.sampled_from(["mxfp4", "nvfp4(block=16x16)", "mxfp8_e4m3(scale=rceil)", "hif8", "e5m7"])
ERRORS = st.sampled_from(["relative-gaussian(sigma=0.05)", "absolute-gaussian(sigma=1e-3)"])
UNITS = st.sampled_from(["hopper_fp8(promote=128)", "ieee_fp32", "accumulator(fraction_bits=9, chunk=4)"])
NAMES = st.lists(st.text(min_size=1), min_size=1, max_size=3).map(tuple)
MAYBE = {
    "input": FORMATS,
    "weight": FORMATS,
    "grad": FORMATS,
    "output": FORMATS,
    "error": ERRORS,
    "accumulator": UNITS,
    "hadamard": st.sampled_from([16, 32, 64, 128]),
    "bias": st.just("missed"),
}
TABLES = {
    "softmax": "table(function='exp', index_bits=6) + table(function='reciprocal', index_bits=7, newton=1)",
    "norm": "table(function='rsqrt', index_bits=5)",
}


def parts(fields: dict[str, list[str]]) -> st.SearchStrategy[OpSpec]:
    made = {
        part: st.fixed_dictionaries({}, optional={name: MAYBE[name] for name in names}).map(lambda d, c=cls: c(**d))
        for part, cls in PARTS.items()
        if (names := fields.get(part))
    }
    return st.builds(OpSpec, **made)


PRODUCT = parts(
    {
        "forward": ["input", "weight", "accumulator", "error", "output", "bias"],
        "grad_input": ["grad", "weight", "accumulator", "error", "output", "hadamard"],
        "grad_weight": ["grad", "input", "accumulator", "error", "output", "hadamard"],
    }
)
OTHER = parts({"forward": ["input", "error", "output"], "grad_input": ["grad", "error", "output"]})


def some(kinds: tuple[str, ...]) -> st.SearchStrategy[str | tuple[str, ...]]:
    one = st.sampled_from(kinds)
    return one | st.lists(one, min_size=1, unique=True).map(tuple)


def rules_of(
    kinds: st.SearchStrategy[str | tuple[str, ...]], specs: st.SearchStrategy[OpSpec]
) -> st.SearchStrategy[Rule]:
    phases = st.lists(st.sampled_from(PHASES), min_size=1, unique=True).map(tuple)
    return st.builds(Rule, kind=kinds, sites=NAMES, phases=phases, spec=specs)


RULES = st.one_of(
    rules_of(some(GEMMS), PRODUCT),
    rules_of(some(tuple(k for k in ELEMENTWISE if k != "embedding")), OTHER),
    rules_of(st.just("embedding"), parts({"forward": ["error", "output"], "grad_input": ["grad"]})),
    *(rules_of(st.just(k), st.just(OpSpec(forward=Forward(approximation=t)))) for k, t in TABLES.items()),
)
PROFILES = st.builds(
    Profile,
    name=st.text(),
    description=st.text(),
    source=st.dictionaries(st.text(), st.text(), min_size=1, max_size=3),
    exclude=st.lists(st.text(), max_size=2).map(tuple),
    rules=st.lists(RULES, max_size=3).map(tuple),
)


@pytest.mark.parametrize("name", profiles.names())
def test_a_shipped_profile_survives_writing_and_reading(name: str) -> None:
    assert from_toml(to_toml(load(name))) == load(name)
    assert from_toml(commented(load(name))) == load(name)


@settings(deadline=None, max_examples=200)
@given(PROFILES)
def test_any_profile_survives_writing_and_reading(profile: Profile) -> None:
    again = from_toml(to_toml(profile))
    assert again == profile
    assert again.fingerprint == profile.fingerprint
    assert differences(again, profile) == []


def test_every_kind_and_field_is_explained_once() -> None:
    fields = [f"{part}.{name}" for part, cls in PARTS.items() for name in cls.__dataclass_fields__]
    assert sorted(FIELD_MEANINGS) == sorted(["kind", "sites", "phases", *fields])
    assert tuple(KIND_MEANINGS) == KINDS
    text = commented(load("ideal"))
    explained = re.findall(r"^#   ([\w.]+) +\S", text, re.MULTILINE)
    assert explained == [*FIELD_MEANINGS, *KIND_MEANINGS]
    assert all(len(line) <= 120 for line in text.splitlines() if line.startswith("#"))


def test_the_profiles_in_the_documentation_load_and_run() -> None:
    page = (Path(__file__).parents[1] / "docs/profiles.md").read_text(encoding="utf-8")
    whole, phases = re.findall(r"```toml\n(.*?)```", page, re.DOTALL)
    assert len(from_toml(whole).rules) == 2
    with aqnsim.emulate(llama(), from_toml(whole)) as emu:
        run(emu.model, emu)
        assert {s.rule for s in emu.sites if s.role == "down_proj"} == {0}
        assert {s.rule for s in emu.sites if s.role != "down_proj"} == {1}
    head = 'name = "a"\ndescription = "b"\nsource.definition = "c"\n'
    found, shipped = from_toml(head + phases).rules, load("mxfp4-rollout").rules
    assert [(r.phases, r.spec.forward) for r in found] == [(r.phases, r.spec.forward) for r in shipped]


def test_a_profile_as_data_holds_all_that_it_says() -> None:
    data = to_dict(from_toml(TEXT))
    assert data["name"] == "mine"
    assert data["exclude"] == ["lm_head"]
    assert data["source"] == {"definition": "made up"}
    assert data["fingerprint"] == from_toml(TEXT).fingerprint
    assert data["rules"] == [
        {
            "kinds": ["linear"],
            "sites": ["*_proj"],
            "phases": list(PHASES),
            "forward": {"input": "mxfp4", "weight": "nvfp4", "error": "relative-gaussian(sigma=0.05)"},
            "grad_input": {"error": "relative-gaussian(sigma=0.1)"},
            "grad_weight": {"error": "absolute-gaussian(sigma=0.2)"},
        }
    ]


# ---- differences -----------------------------------------------------------------------------------------------------


def test_profiles_that_differ_in_a_field_say_so_for_each_kind() -> None:
    a, b = load("mxfp8-training"), load("blackwell")
    found = differences(a, b)
    unit = "accumulator(fraction_bits=25, chunk=32)"
    assert [(d.kinds, d.rules, d.field, d.values) for d in found[:3]] == [
        (("linear",), (1, 1), f"{part}.accumulator", (None, unit)) for part in PARTS
    ]
    assert [(d.kinds, d.rules, d.field) for d in found[3:]] == [(("matmul", "qk", "pv"), (None, 2), "rule")]
    assert in_words(found[0], "a", "b") == f"forward.accumulator is not asked for in a, {unit} in b"
    assert in_words(found[3], "a", "b").startswith("only in b: sites = *, phases = rollout, train, eval, reference, ")


@pytest.mark.parametrize("name", profiles.names())
def test_a_profile_differs_from_itself_in_nothing_and_from_every_other_in_something(name: str) -> None:
    for other in profiles.names():
        assert (differences(load(name), load(other)) == []) == (name == other)
        mirrored = differences(load(other), load(name))
        assert {(d.kinds, d.field, d.values[::-1]) for d in mirrored} == {
            (d.kinds, d.field, d.values) for d in differences(load(name), load(other))
        }


def test_a_field_that_is_left_out_differs_from_its_default_in_nothing() -> None:
    bias = from_toml(with_("forward.input =", 'forward.bias = "missed"\nforward.input ='))
    assert differences(from_toml(TEXT), bias) == [Difference(("linear",), (1, 1), "forward.bias", ("exact", "missed"))]


def test_exclusions_are_compared_as_sets() -> None:
    a, b = from_toml(TEXT), from_toml(with_('["lm_head"]', '["embedding", "lm_head"]'))
    assert exclusions(a, b) == ((), ("embedding",))
    assert exclusions(b, a) == (("embedding",), ())


# ---- bad profiles --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name = ", "not valid TOML"),
        (with_("description =", "descripton ="), "unknown key 'descripton' .did you mean 'description'"),
        (with_("exclude =", "excludes ="), "unknown key 'excludes' .did you mean 'exclude'"),
        (with_("forward.input", "forward.inputs"), r"rule 1\.forward: unknown key 'inputs' .did you mean 'input'"),
        (with_("grad_input.error", "grad_input.eror"), r"rule 1\.grad_input: unknown key 'eror' .did you mean 'error'"),
        (with_("grad_input.error", "gradinput.error"), "rule 1: unknown key 'gradinput' .did you mean 'grad_input'"),
        (with_("sites =", "site ="), "rule 1: unknown key 'site' .did you mean 'sites'"),
        (with_("forward.input", "spec.forward.input"), "rule 1: unknown key 'spec'"),
        (with_("[[rule]]", "[[rules]]"), r"unknown key 'rules' .did you mean '\[\[rule\]\]'"),
        (with_("[[rule]]", "[rule]"), r"expected \[\[rule\]\]"),
        (with_('[source]\ndefinition = "made up"', ""), r"a \[source\] table must say"),
        (with_('definition = "made up"', ""), r"a \[source\] table must say"),
        (with_('name = "mine"', ""), "name"),
        (with_('name = "mine"', "name = 3"), "profile 3: name must be a text, got 3"),
        (with_('"for a test"', "[]"), r"profile 'mine': description must be a text, got \[\]"),
        (with_('"made up"', "2026-01-01"), r"profile 'mine': source.definition must be a text, got datetime"),
        (with_('kind = "linear"\n', ""), "kind"),
        (with_('["*_proj"]', '"*_proj"'), "expected a list of globs"),
        (with_('["lm_head"]', '"lm_head"'), "expected a list of globs"),
        (with_('forward.input = "mxfp4"', "forward.input = 4"), "expected the name of a format, got 4"),
        (with_('"relative-gaussian(sigma=0.05)"', "0.05"), "expected an error model's text, got 0.05"),
        (with_("sigma=0.05", "sigma=-1"), "sigma must be a finite number >= 0, got -1"),
        (with_("(sigma=0.05)", ""), r"expected kind\(field=value"),
    ],
)
def test_bad_profiles_get_one_clear_error(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        from_toml(text)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"mxfp4"', '"mxfp5"', "unknown format 'mxfp5' .did you mean 'mxfp4'"),
        ("relative-gaussian(sigma=0.05", "relative-gauss(sigma=0.05", "did you mean 'relative-gaussian'"),
        ('"linear"', '"liner"', "unknown kind of site 'liner' .did you mean 'linear'"),
    ],
)
def test_unknown_names_in_profiles_come_with_the_closest(old: str, new: str, message: str) -> None:
    with pytest.raises(UnknownNameError, match=message):
        from_toml(with_(old, new))


def test_an_unknown_profile_names_the_closest() -> None:
    with pytest.raises(UnknownNameError, match=r"unknown profile 'mxfp4-w4a61' .did you mean 'mxfp4-w4a16'"):
        load("mxfp4-w4a61")


# ---- specs as text -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", profiles.names())
def test_spec_text_round_trip_of_shipped_profiles(name: str) -> None:
    for rule in load(name).rules:
        assert OpSpec.parse(rule.spec.text) == rule.spec


def test_spec_text_round_trip() -> None:
    spec = from_toml(TEXT).rules[0].spec
    assert OpSpec.parse(spec.text) == spec
    assert OpSpec.parse(OpSpec().text) == OpSpec()
    assert OpSpec().text == "{}"
    assert spec.has_error
    assert not OpSpec(forward=Forward(input="mxfp4")).has_error
    assert OpSpec(grad_weight=GradWeight(error="absolute-gaussian(sigma=0.2)")).has_error


def test_rules_match_by_kind_and_glob() -> None:
    rule = Rule(kind="linear", sites=("layers.*.q_proj",))
    assert rule.matches("linear", "model.layers.3.q_proj")
    assert rule.matches("linear", "layers.3.self_attn.q_proj")
    assert not rule.matches("linear", "model.layers.3.k_proj")
    assert not rule.matches("norm", "model.layers.3.q_proj")
