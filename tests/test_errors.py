"""Error models: their texts, and what they refuse."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
from chains import USUAL
from hypothesis import given, settings
from hypothesis import strategies as st

from aqnsim import errors
from aqnsim.errors import (
    AbsoluteGaussian,
    BitFlip,
    ConfigError,
    ErrorModel,
    RelativeGaussian,
    Saturation,
    Spike,
    Stuck,
    SystematicBias,
    UnknownNameError,
    chain,
    chain_text,
    did_you_mean,
    parse,
)
from aqnsim.rng import DRAWS

properties = settings(max_examples=200, deadline=None, derandomize=True)
positive = st.floats(1e-40, 3e38) | st.sampled_from([1, 7, 1e22, 1 / 3])
FIELDS: dict[str, st.SearchStrategy[Any]] = {
    "sigma": positive | st.just(0),
    "reference": st.sampled_from(errors.REFERENCES),
    "draw": st.sampled_from(DRAWS),
    "gain": positive.map(lambda x: -x),
    "offset": st.floats(-1e30, 1e30) | st.just(-0.0),
    "threshold": positive,
    "limit": positive,
    "rate": st.floats(2.0**-32, 1),
    "size": positive,
    "value": st.floats(-1e30, 1e30),
    "lanes": st.integers(0, 2**31 - 1),
    "bit": st.integers(-1, 31),
    "target": st.sampled_from(errors.TARGETS),
}


@st.composite
def models(draw: st.DrawFn) -> ErrorModel:
    """Any model: its required fields, gain among them, and any of the others."""
    cls = errors.MODELS[draw(st.sampled_from(sorted(errors.MODELS)))]
    given_ = [
        f.name
        for f in dataclasses.fields(cls)
        if f.default is dataclasses.MISSING or f.name == "gain" or draw(st.booleans())
    ]
    return cls(**{name: draw(FIELDS[name]) for name in given_})


@properties
@given(model=models())
def test_a_model_is_its_text(model: ErrorModel) -> None:
    assert parse(str(model)) == model
    assert str(parse(str(model))) == str(model)


@properties
@given(parts=st.lists(models().filter(lambda m: not isinstance(m, BitFlip)), min_size=1, max_size=4))
def test_a_chain_is_its_text(parts: list[ErrorModel]) -> None:
    assert chain(chain_text(parts)) == tuple(parts)


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        ("relative-gaussian(sigma=5e-2)", "relative-gaussian(sigma=0.05)"),
        (" relative-gaussian ( sigma = 1 ) ", "relative-gaussian(sigma=1.0)"),
        ("relative-gaussian(draw=frozen, sigma=1)", "relative-gaussian(sigma=1.0, draw=frozen)"),
        ("relative-gaussian(sigma=-0.0, draw=per_phase, reference=output)", "relative-gaussian(sigma=0.0)"),
        ("systematic-bias(gain=0, offset=1e+22)", "systematic-bias(offset=1e+22)"),
        ("stuck(value=0,lanes=128,rate=1)", "stuck(rate=1.0, value=0.0, lanes=128)"),
        ("bit-flip(rate=0.5, bit=3, target=codes)", "bit-flip(rate=0.5, bit=3, target=codes)"),
    ],
)
def test_spellings_of_one_model_have_one_text(text: str, canonical: str) -> None:
    assert str(parse(text)) == canonical


def test_a_chain_is_read_in_order() -> None:
    text = "systematic-bias(offset=1e+22)+absolute-gaussian(sigma=1)  +  saturation(limit=2)"
    assert chain(text) == (SystematicBias(offset=1e22), AbsoluteGaussian(1), Saturation(2))


def test_every_model_has_examples_that_say_what_it_is() -> None:
    assert set(USUAL) == set(errors.MODELS)
    for kind, cls in errors.MODELS.items():
        assert cls.kind == kind
        assert cls.__doc__


@pytest.mark.parametrize("cls", [RelativeGaussian, AbsoluteGaussian])
@pytest.mark.parametrize("sigma", [-0.1, math.nan, math.inf, -math.inf, "0.1", None, True, 1e39])
def test_a_sigma_that_is_no_size_is_refused(cls: type, sigma: object) -> None:
    with pytest.raises(ConfigError, match="sigma must be a finite number >= 0"):
        cls(sigma)


@pytest.mark.parametrize("rate", [0, -0.1, 1.0000001, math.nan, 2.0**-33, "1"])
@pytest.mark.parametrize("kind", ["spike(size=1", "stuck(value=1", "bit-flip(bit=1"])
def test_a_rate_that_is_no_probability_is_refused(kind: str, rate: object) -> None:
    cls = errors.MODELS[kind.partition("(")[0]]
    field, value = kind.partition("(")[2].split("=")
    with pytest.raises(ConfigError, match=r"rate must be a finite number in 2\^-32\.\.1"):
        cls(rate=rate, **{field: int(value)})  # type: ignore[call-arg]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("systematic-bias()", "gain and offset are both 0"),
        ("systematic-bias(gain=inf)", "gain must be a finite number, got inf"),
        ("systematic-bias(offset=nan)", "offset must be a finite number, got nan"),
        ("dead-zone(threshold=0)", "threshold must be a finite number > 0"),
        ("saturation(limit=-1)", "limit must be a finite number > 0"),
        ("spike(rate=0.1, size=0)", "size must be a finite number > 0"),
        ("stuck(rate=0.1, value=inf)", "value must be a finite number"),
        ("stuck(rate=0.1, value=0, lanes=-1)", r"lanes must be an integer in 0\.\.2147483647, got -1"),
        ("bit-flip(rate=0.1, bit=32)", r"bit must be an integer in -1\.\.31, got 32"),
        ("bit-flip(rate=0.1, bit=1.5)", r"expected kind\(field=value.*invalid literal"),
    ],
)
def test_a_field_that_cannot_be_is_refused(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("relative-gaussian(sigma=1, draw=per_pase)", "unknown draw of relative-gaussian 'per_pase'.*'per_phase'"),
        ("relative-gaussian(sigma=1, reference=abs)", "unknown reference of relative-gaussian 'abs'"),
        ("bit-flip(rate=1, target=code)", "unknown target of bit-flip 'code' .did you mean 'codes'"),
    ],
)
def test_an_unknown_choice_names_the_known_ones(text: str, message: str) -> None:
    with pytest.raises(UnknownNameError, match=message):
        parse(text)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "relative-gaussian",
        "relative-gaussian(sigma=0.1",
        "relative-gaussian()",
        "relative-gaussian(0.1)",
        "relative-gaussian(sigma=0.1, bias=1)",
        "relative-gaussian(sigma=0.1, sigma=0.1)",
        "relative-gaussian(sigma=0.1,)",
        "relative-gaussian(sigma=0.1=0.1)",
        "relative-gaussian(sgima=0.1)",
        "relative-gaussian(sigma=open)",
        "relative-gaussian(sigma=0.1); x",
    ],
)
def test_a_text_that_is_no_error_model_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"expected kind\(field=value"):
        parse(text)


@pytest.mark.parametrize("text", ["", "saturation(limit=1) +", "saturation(limit=1) saturation(limit=1)"])
def test_a_text_that_is_no_chain_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"expected kind\(field=value"):
        chain(text)


def test_a_bit_flips_last() -> None:
    with pytest.raises(ConfigError, match="bit-flip acts on the stored pattern and must be the last of its chain"):
        chain("bit-flip(rate=0.1) + saturation(limit=1)")
    assert len(chain("bit-flip(rate=0.1, target=codes) + saturation(limit=1) + bit-flip(rate=0.1)")) == 3


def test_a_missing_field_names_what_a_model_takes() -> None:
    with pytest.raises(ConfigError, match="spike takes: rate, size; optional: draw"):
        parse("spike(rate=0.1)")
    with pytest.raises(ConfigError, match="saturation takes: limit; optional: nothing"):
        parse("saturation(sigma=0.1)")


def test_an_unknown_kind_names_the_closest() -> None:
    with pytest.raises(UnknownNameError, match="did you mean 'relative-gaussian'"):
        parse("relative-gausian(sigma=0.1)")


def test_a_rate_is_held_to_32_bits() -> None:
    assert Spike(rate=1, size=1).last_hit == 2**32 - 1
    assert Spike(rate=0.5, size=1).last_hit == 2**31 - 1
    assert Stuck(rate=2**-32, value=0).last_hit == 0


def test_what_a_chain_asks_for() -> None:
    assert errors.sigma_of([RelativeGaussian(0.05)]) == 0.05
    assert errors.sigma_of([RelativeGaussian(0.05), AbsoluteGaussian(0.05)]) is None
    assert errors.sigma_of([Saturation(1)]) is None
    assert errors.rate_of([Saturation(1), AbsoluteGaussian(1)]) == 0
    assert errors.rate_of([Spike(0.25, 1), AbsoluteGaussian(1), Stuck(0.5, 1)]) == 0.75


def test_did_you_mean() -> None:
    assert did_you_mean("mxfp5", ["mxfp4", "bf16"]) == " (did you mean 'mxfp4'?)"
    assert did_you_mean("zzz", ["mxfp4", "bf16"]) == ""


def test_one_base_for_all_errors() -> None:
    for cls in (errors.ConfigError, errors.UnknownNameError, errors.RealisationError, errors.BackendError):
        assert issubclass(cls, errors.AqnsimError)
