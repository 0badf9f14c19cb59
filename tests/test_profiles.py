"""Profiles: what ships, what is refused, and a fingerprint that changes exactly when a number can."""

from __future__ import annotations

from pathlib import Path

import pytest

from aqnsim import ConfigError, UnknownNameError, formats, profiles
from aqnsim.profiles import Forward, GradInput, GradWeight, OpSpec, Rule, from_toml, load

FIXED = {
    "ideal",
    "bf16",
    "mxfp4-w4a16",
    "mxfp4-w4a4",
    "nvfp4-w4a16",
    "nvfp4-w4a4",
    "noise-5pct-matmul",
}
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
    for name in FIXED - {"ideal"}:
        assert load(name).rule_for("linear", "lm_head") is None
        assert load(name).rule_for("linear", "model.layers.0.mlp.gate") is None  # a router
        assert load(name).rule_for("linear", "model.layers.0.mlp.gate_proj") == 0


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
