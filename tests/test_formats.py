"""Formats as data: every code against independent libraries, the texts that name them, the cost of importing them."""

from __future__ import annotations

import dataclasses
import itertools
import math
import random
import subprocess
import sys
from functools import lru_cache
from typing import Any

import en_dtypes
import fraction_model
import gfloat
import ml_dtypes
import numpy as np
import pytest
from oracles import BLOCK_ORACLES, MODEL, ORACLES, SINGLE, Oracle, confirmed_by, ieee_info

from aqnsim import ConfigError, UnknownNameError, formats
from aqnsim.formats import BlockFormat, Format, get

ELEMENTS = [f for f in formats.ALL.values() if isinstance(f, Format)]
BLOCKS = [f for f in formats.ALL.values() if isinstance(f, BlockFormat)]
every_element = pytest.mark.parametrize("fmt", ELEMENTS, ids=lambda f: f.name)


def bits(values: object) -> np.ndarray:
    """fp64 bit patterns with one NaN, so that -0 differs from 0 and NaN equals NaN."""
    a = np.asarray(values, np.float64)
    return np.where(np.isnan(a), np.uint64(0x7FF8 << 48), a.view(np.uint64))


@lru_cache
def decoded(fmt: Format) -> np.ndarray:
    """What every code decodes to."""
    return np.array([fmt.decode(code) for code in range(fmt.codes)])


def element(text: str) -> Format:
    fmt = get(text)
    assert isinstance(fmt, Format)
    return fmt


def cases(**has: bool) -> list[Any]:
    """All pairs of an element format and an oracle with such an attribute."""
    wanted = [k for k, yes in has.items() if yes]
    return [
        pytest.param(element(name), oracle, id=f"{name}-{oracle.name}")
        for name, oracles in ORACLES.items()
        for oracle in oracles
        if all(getattr(oracle, k) is not None for k in wanted)
    ]


# ---- the registry of oracles ----------------------------------------------------------------------------------------


def test_every_element_format_has_oracles() -> None:
    assert list(ORACLES) == [f.name for f in ELEMENTS]
    for name, oracles in ORACLES.items():
        assert len([o for o in oracles if o.decode]) >= 2, name


@every_element
def test_every_rounding_has_two_oracles_or_a_reason(fmt: Format) -> None:
    roundings = [r for r in formats.ROUNDINGS if r != "hif8-hybrid" or fmt.taper]
    for rounding in (*roundings, "stochastic-1", "stochastic-8", "stochastic-31", "stochastic-32"):
        judges = [o for o in ORACLES[fmt.name] if rounding in o.roundings]
        assert (len(judges) >= 2) != ((fmt.name, rounding) in SINGLE), rounding


def test_every_named_block_format_and_every_scale_rule_has_an_oracle() -> None:
    compared = [get(text) for text in BLOCK_ORACLES]
    assert {f.name for f in BLOCKS} == {f.name for f in compared}
    used = {(f.scale_format, f.scale) for f in compared if isinstance(f, BlockFormat)}
    assert used == {(kind, rule) for kind, rules in formats.SCALE_RULES.items() for rule in rules}
    assert all(MODEL in names for names in BLOCK_ORACLES.values())
    assert all(str(get(text)) == text or get(text) == get(text.partition("(")[0]) for text in BLOCK_ORACLES)


def test_what_was_confirmed_is_told_of_every_format() -> None:
    table = confirmed_by()
    assert set(table) == set(formats.ALL)
    judges = "ml_dtypes.float8_e4m3fn; gfloat ocp_e4m3; exact rational model; NVIDIA's cuda_fp8.h"
    assert table["fp8_e4m3"]["nearest-even"] == judges
    assert table["hif8"]["hif8-hybrid"] == "exact rational model"
    assert table["nvfp4"]["scale=torchao"] == "exact rational model; torchao"
    assert all(text for row in table.values() for text in row.values())


# ---- codes and values -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("fmt", "oracle"), cases(decode=True))
def test_every_code_decodes_as_the_oracle_says(fmt: Format, oracle: Oracle) -> None:
    assert oracle.decode is not None
    codes = np.arange(fmt.codes)
    known = oracle.codes(codes)
    assert known.mean() > 0.9
    assert np.array_equal(bits(decoded(fmt))[known], bits(oracle.decode(codes))[known])


@every_element
def test_encoding_undoes_decoding(fmt: Format) -> None:
    values = decoded(fmt)
    codes = range(fmt.codes) if fmt.bits <= 16 else random.Random(0).sample(range(fmt.codes), 20_000)
    for code in codes:
        if not math.isnan(values[code]):
            assert fmt.encode(values[code]) == code


@every_element
def test_nan_is_encoded_as_one_of_its_codes(fmt: Format) -> None:
    if not fmt.has_nan:
        with pytest.raises(ConfigError, match="holds no nan"):
            fmt.encode(math.nan)
        return
    code = fmt.encode(math.nan)
    assert math.isnan(fmt.decode(code))
    if fmt.specials == "ieee" and not fmt.taper:
        quiet = ((1 << fmt.exponent_bits) - 1) << fmt.mantissa_bits | 1 << (fmt.mantissa_bits - 1)
        assert code == quiet


@every_element
def test_specials_are_announced_as_they_decode(fmt: Format) -> None:
    values = decoded(fmt)
    assert fmt.has_inf == bool(np.isposinf(values).any())
    assert fmt.has_nan == bool(np.isnan(values).any())
    assert fmt.has_negative_zero == bool(((values == 0) & np.signbit(values)).any())
    assert fmt.has_zero == bool((values == 0).any())
    assert fmt.signed == bool((values < 0).any())
    assert fmt.codes == len(values) == 1 << fmt.bits


@every_element
def test_ends_of_the_range_are_those_of_the_codes(fmt: Format) -> None:
    values = decoded(fmt)
    finite = values[np.isfinite(values)]
    assert fmt.max == finite.max()
    assert fmt.min_subnormal == finite[finite > 0].min()
    unused = fmt.is_integer and fmt.symmetric
    assert fmt.min == (finite[finite > finite.min()] if unused else finite).min()
    assert 2.0**fmt.max_exponent <= fmt.max < 2.0 ** (fmt.max_exponent + 1)


@pytest.mark.parametrize("specials", ["ieee", "fn", "fnuz", "none"])
@pytest.mark.parametrize("base", ["fp4_e2m1", "fp8_ue5m3", "e8m0"])
@pytest.mark.parametrize("exponent_bits", [1, 2, 4])
@pytest.mark.parametrize("mantissa_bits", [0, 1, 3])
def test_derived_formats_are_refused_or_have_the_range_of_their_codes(
    base: str, exponent_bits: int, mantissa_bits: int, specials: str
) -> None:
    shape = f"exponent_bits={exponent_bits}, mantissa_bits={mantissa_bits}, specials={specials}"
    try:
        fmt = element(f"{base}({shape}, bias=1)")
    except ConfigError:
        return
    values = decoded(fmt)
    finite = values[np.isfinite(values)]
    assert (fmt.max, fmt.min, fmt.min_subnormal) == (finite.max(), finite.min(), finite[finite > 0].min())
    assert fmt.has_inf == bool(np.isposinf(values).any())
    assert fmt.has_nan == bool(np.isnan(values).any())
    assert [fmt.encode(v) for v in values if not math.isnan(v)] == list(np.flatnonzero(~np.isnan(values)))


@pytest.mark.parametrize("name", ["e7m9fn", "e7m10fn", "e8m8fnuz", "e8m10fnuz", "e8m22"])
def test_wide_parametric_formats_encode_what_they_decode(name: str) -> None:
    fmt = element(name)
    for code in random.Random(1).sample(range(fmt.codes), 2000):
        value = fmt.decode(code)
        if not math.isnan(value):
            assert fmt.encode(value) == code
    assert math.isnan(fmt.decode(fmt.encode(math.nan)))
    if not fmt.has_negative_zero:
        with pytest.raises(ConfigError, match=r"holds no -0\.0"):
            fmt.encode(-0.0)


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("fp4_e2m1", [0.25, 8.0, math.inf]),
        ("fp8_e4m3fnuz", [-0.0]),
        ("fp8_ue5m3", [-1.0, -0.0]),
        ("e8m0", [0.0, 1.5]),
        ("int8", [-0.0, 0.5, 128.0]),
        ("hif8", [1.0625, -0.0, 49152.0]),
        ("bf16", [1.001]),
        ("tf32", [1 + 2.0**-11, 2.0**-137]),
        ("hf32", [3.4028235e38, 1e300]),
    ],
)
def test_what_a_format_does_not_hold_is_not_encoded(name: str, values: list[float]) -> None:
    for value in values:
        with pytest.raises(ConfigError, match=f"{name} holds no .*; expected one of its values: cast it first"):
            element(name).encode(value)


def test_codes_outside_the_format_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"code 16 is out of range 0\.\.15"):
        element("fp4_e2m1").decode(16)
    with pytest.raises(ConfigError, match="code -1"):
        element("fp4_e2m1").decode(-1)


@pytest.mark.parametrize(("fmt", "oracle"), cases(info=True))
def test_properties_are_those_of_finfo(fmt: Format, oracle: Oracle) -> None:
    info = oracle.info
    assert fmt.bits == info.bits
    assert fmt.max == float(info.max)
    if not fmt.is_integer:
        assert fmt.eps == float(info.eps)
    if isinstance(info, gfloat.FormatInfo):
        assert fmt.has_negative_zero == info.has_nz
        assert fmt.has_inf == (info.num_posinfs > 0)
        assert fmt.has_nan == (info.num_nans > 0)
        if info.has_zero == fmt.has_zero and fmt.name != "mxint8_element":  # whose lowest code is left unused
            assert fmt.min == info.min
        if info.has_subnormals:
            assert fmt.min_subnormal == info.smallest_subnormal
            assert fmt.min_normal == (info.smallest_subnormal if fmt.is_integer else info.smallest_normal)
    else:
        assert fmt.min_normal == float(info.smallest_normal)
        assert fmt.min_subnormal == float(info.smallest_subnormal)


@every_element
def test_values_ascend_to_max(fmt: Format) -> None:
    values = fmt.values()
    assert values[0] == (0.0 if fmt.has_zero else fmt.min_subnormal)
    assert values[int(fmt.has_zero)] == fmt.min_subnormal
    assert values[-1] == fmt.max
    assert all(a < b for a, b in itertools.pairwise(values))
    if fmt.max > 1:
        assert values[values.index(1.0) + 1] == 1.0 + fmt.eps


def test_values_tables() -> None:
    assert element("fp4_e2m1").values() == (0, 0.5, 1, 1.5, 2, 3, 4, 6)
    assert element("fp4_e1m2").values() == (0, 0.25, 0.5, 0.75, 1, 1.25, 1.5, 1.75)
    assert element("int4").values() == (0, 1, 2, 3, 4, 5, 6, 7)
    assert element("e8m0").values() == tuple(2.0**e for e in range(-127, 128))
    counts = {"fp6_e2m3": 32, "fp6_e3m2": 32, "fp8_e4m3": 127, "fp8_e5m2": 124, "fp8_e4m3fnuz": 128, "hif8": 127}
    assert {name: len(element(name).values()) for name in counts} == counts


def test_hif8_codes_are_those_of_the_published_table() -> None:
    hif8 = element("hif8")
    for exponent, code, count in fraction_model.HIF8_TABLE:
        for i in range(count if exponent < 15 else 1):
            assert hif8.decode(code + i) == 2.0**exponent * (1 + i / count)
            assert hif8.decode(code + i | 0x80) == -(2.0**exponent) * (1 + i / count)
    assert [hif8.decode(c) for c in (0x00, 0x6E, 0x6F, 0xEF, 0x01, 0x7E)] == [
        0.0,
        32768.0,
        math.inf,
        -math.inf,
        2.0**-22,
        2.0**-15,
    ]
    assert math.isnan(hif8.decode(0x80))


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("fp4_e2m1", ml_dtypes.float4_e2m1fn),
        ("fp4_e1m2", en_dtypes.float4_e1m2),
        ("fp6_e2m3", ml_dtypes.float6_e2m3fn),
        ("fp6_e3m2", ml_dtypes.float6_e3m2fn),
        ("fp8_e4m3", ml_dtypes.float8_e4m3fn),
        ("fp8_e5m2", ml_dtypes.float8_e5m2),
        ("fp8_e3m4", ml_dtypes.float8_e3m4),
        ("fp8_e4m3_ieee", ml_dtypes.float8_e4m3),
        ("fp8_e4m3fnuz", ml_dtypes.float8_e4m3fnuz),
        ("fp8_e5m2fnuz", ml_dtypes.float8_e5m2fnuz),
        ("bf16", ml_dtypes.bfloat16),
        ("fp16", np.float16),
    ],
)
def test_neighbours_are_those_of_nextafter(name: str, dtype: Any) -> None:
    fmt = element(name)
    values = [v for v in decoded(fmt) if math.isfinite(v)]
    for value in values if len(values) < 300 else [*random.Random(2).sample(values, 100), -fmt.max, 0.0]:
        of = np.array([value], dtype)
        if value < fmt.max:
            assert fmt.next_up(value) == float(np.nextafter(of, np.array([fmt.max], dtype))[0])
        if value > fmt.min:
            assert fmt.next_down(value) == float(np.nextafter(of, np.array([fmt.min], dtype))[0])


@every_element
def test_neighbours_of_values_that_the_format_does_not_hold(fmt: Format) -> None:
    if fmt.bits > 16:
        fmt = element("bf16")
    values = sorted({v + 0.0 for v in decoded(fmt) if fmt.min <= v <= fmt.max})
    pairs = list(itertools.pairwise(values))
    for low, high in pairs if len(pairs) < 300 else random.Random(3).sample(pairs, 100):
        between = (low + high) / 2
        assert (fmt.next_down(between), fmt.next_up(between)) == (low, high)
        assert (fmt.next_up(low), fmt.next_down(high)) == (high, low)
    assert math.isnan(fmt.next_up(math.nan))
    assert math.isnan(fmt.next_down(math.nan))
    above, below = fmt.next_up(fmt.max), fmt.next_down(fmt.min)
    assert above == math.inf if fmt.has_inf else math.isnan(above)
    assert below == -math.inf if fmt.has_inf else math.isnan(below)


# ---- parametric formats ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("e3m4", ml_dtypes.float8_e3m4),
        ("e4m3", ml_dtypes.float8_e4m3),
        ("e5m2", ml_dtypes.float8_e5m2),
        ("e5m10", np.float16),
        ("e8m7", ml_dtypes.bfloat16),
        ("e4m3fn", ml_dtypes.float8_e4m3fn),
        ("e4m3fnuz", ml_dtypes.float8_e4m3fnuz),
        ("e5m2fnuz", ml_dtypes.float8_e5m2fnuz),
    ],
)
def test_parametric_formats_are_those_of_their_names(name: str, dtype: type) -> None:
    fmt = element(name)
    codes = np.arange(fmt.codes, dtype=np.uint16 if fmt.bits == 16 else np.uint8)
    with np.errstate(invalid="ignore"):  # signalling NaNs
        expected = codes.view(np.dtype(dtype)).astype(np.float64)
    assert np.array_equal(bits(decoded(fmt)), bits(expected))
    assert fmt.overflow == ("saturate" if "fn" in name else "inf")


@pytest.mark.parametrize(("e", "m"), [(2, 0), (2, 5), (3, 1), (4, 6), (5, 0), (6, 3), (7, 2), (8, 3)])
def test_parametric_formats_decode_as_gfloat_and_the_model(e: int, m: int) -> None:
    codes = np.arange(1 << (1 + e + m))
    got = bits(decoded(element(f"e{e}m{m}")))
    assert np.array_equal(got, bits(gfloat.decode_ndarray(ieee_info(e, m), codes)))
    assert np.array_equal(got, bits(fraction_model.decoded(fraction_model.ieee(e, m))))


NO_NAMES = ["e1m2", "e9m2", "e4m23", "e4", "em", "e4m3x", "E4M3", "", "e4m3fnu", "e2m0fn", "e4m11fn", "e04m3", "e4m03"]


@pytest.mark.parametrize("name", [*NO_NAMES, "e4m٣"])
def test_what_is_not_a_parametric_format_is_unknown(name: str) -> None:
    with pytest.raises(UnknownNameError, match="known: bf16"):
        get(name)


def test_parametric_formats_stay_within_binary32() -> None:
    assert element("e8m22").min_subnormal == 2.0**-148
    with pytest.raises(ConfigError, match="outside of binary32's range"):
        get("e8m10fn")


# ---- names and texts ------------------------------------------------------------------------------------------------


def test_names_sources_and_sizes_of_all_formats() -> None:
    for name, fmt in formats.ALL.items():
        assert fmt.name == name
        assert fmt.source, f"{name} has no source"
        assert get(name) is fmt
        assert str(fmt) == name
    assert {f.name: (f.block, f.bits, f.tile) for f in BLOCKS} == {
        "mxfp4": (32, 4.25, (1, 32)),
        "mxfp6_e2m3": (32, 6.25, (1, 32)),
        "mxfp6_e3m2": (32, 6.25, (1, 32)),
        "mxfp8_e4m3": (32, 8.25, (1, 32)),
        "mxfp8_e5m2": (32, 8.25, (1, 32)),
        "mxint8": (32, 8.25, (1, 32)),
        "nvfp4": (16, 4.5, (1, 16)),
        "hif4": (64, 4.5, (1, 64)),
        "fp8_e4m3_tensor": ("tensor", 8, None),
        "fp8_e5m2_tensor": ("tensor", 8, None),
        "fp8_e4m3_token": ("axis", 8, None),
        "fp8_e4m3_channel": ("axis", 8, None),
        "fp8_e4m3_1x128": (128, 8.25, (1, 128)),
        "fp8_e4m3_128x128": ((128, 128), 8 + 32 / 128**2, (128, 128)),
        "int4_g128": (128, 4.25, (1, 128)),
        "int8_channel": ("axis", 8, None),
        "int8_token": ("axis", 8, None),
    }
    assert {f.name for f in formats.ALL.values() if f.unverified} == {"hf32", "hif4"}


def test_all_cannot_be_changed_by_a_caller() -> None:
    with pytest.raises(TypeError):
        formats.ALL["mine"] = get("bf16")  # type: ignore[index]


def test_unknown_format_names_the_closest() -> None:
    with pytest.raises(UnknownNameError, match="did you mean 'mxfp4'"):
        get("mxfp5")
    with pytest.raises(UnknownNameError, match="did you mean 'fp8_e4m3'"):
        get("fp8-e4m3")


ELEMENT_FIELDS = ("rounding", "overflow", "subnormals", "nan")
CHOICES = {
    "rounding": [*(r for r in formats.ROUNDINGS if r != "hif8-hybrid"), "stochastic-1", "stochastic-24"],
    "overflow": ["saturate", "inf", "nan"],
    "subnormals": ["keep", "flush"],
    "nan": ["keep", "zero", "max"],
    "special": ["block", "element"],
    "zero_scale": ["min", "one"],
    "block": ["1", "16", "32", "65536", "16x16", "2x64", "axis", "tensor"],
    "scale": [rule for rules in formats.SCALE_RULES.values() for rule in rules] + ["truncation-free"],
    "element": [*ORACLES, "e3m4", "e2m1fn", "e4m3fnuz", "e5m10"],
    "amax_to": ["7.5", "127", "447.99999", "0.1", "1e-3", "3.3333333333333335"],
    "scale_max": ["256", "448"],
    "specials": ["ieee", "fn", "fnuz", "none"],
    "symmetric": ["true", "false"],
    "bias": ["3", "7", "9"],
    "exponent_bits": ["4", "5"],
    "mantissa_bits": ["2", "3"],
}


def variations(name: str, count: int) -> list[str]:
    """Texts of a format with random fields, those that make a format."""
    rng = random.Random(name)
    block = isinstance(get(name), BlockFormat)
    own = {f.name for f in dataclasses.fields(get(name))}
    fields = [k for k in CHOICES if k in own or k in ELEMENT_FIELDS]
    assert block == ("scale" in fields)
    found = []
    for _ in range(count):
        chosen = rng.sample(fields, rng.randint(1, 4))
        text = f"{name}({', '.join(f'{k}={rng.choice(CHOICES[k])}' for k in chosen)})"
        try:
            get(text)
        except (ConfigError, UnknownNameError):
            continue
        found.append(text)
    return found


@pytest.mark.parametrize("name", [*formats.ALL, "e3m4", "e4m3fn", "e4m3fnuz", "e8m20"])
def test_a_formats_text_names_the_same_format(name: str) -> None:
    texts = variations(name, 400)
    assert len(texts) > 10
    for text in texts:
        fmt = get(text)
        canonical = str(fmt)
        assert get(canonical) == fmt, text
        assert str(get(canonical)) == canonical
        assert get(fmt) is fmt
        assert get(canonical).bits == fmt.bits


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        ("mxfp4( rounding = nearest-even , scale=rceil)", "mxfp4(scale=rceil)"),
        (" mxfp4 ", "mxfp4"),
        ("mxfp4 (scale=floor)", "mxfp4"),
        ("mxfp4(rounding=up,scale=ceil)", "mxfp4(scale=ceil, rounding=up)"),
        ("mxfp8_e5m2(scale=truncation-free)", "mxfp8_e5m2(scale=rceil)"),
        ("mxfp4(block=16x16)", "mxfp4(block=16x16)"),
        ("mxfp4(block=1x32)", "mxfp4"),
        ("mxfp4(element=fp4_e2m1)", "mxfp4"),
        ("mxfp4(element=fp8_e5m2)", "mxfp4(element=fp8_e5m2)"),
        ("hif4(element=fp4_e1m2)", "hif4"),
        ("hif4(rounding=nearest-away)", "hif4"),
        ("mxfp8_e4m3(element=e3m4, overflow=saturate)", "mxfp8_e4m3(element=e3m4, overflow=saturate)"),
        ("int4_g128(amax_to=7.50)", "int4_g128(amax_to=7.5)"),
        ("fp8_e4m3_tensor(amax_to=447.99999)", "fp8_e4m3_tensor(amax_to=447.99999)"),
        ("int8(symmetric=true)", "int8(symmetric=true)"),
        ("e4m3(overflow=inf)", "e4m3"),
        ("fp8_e4m3(overflow=nan, bias=8)", "fp8_e4m3(bias=8, overflow=nan)"),
    ],
)
def test_canonical_texts(text: str, canonical: str) -> None:
    assert str(get(text)) == canonical
    assert get(canonical) == get(text)


def test_equal_texts_give_equal_formats() -> None:
    assert get("nvfp4(scale=torchao)") == get("nvfp4( scale = torchao )")
    assert get("mxfp4(scale=rceil)") != get("mxfp4")
    assert hash(get("mxfp4(scale=rceil)")) == hash(get("mxfp4(scale=truncation-free)"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("mxfp4(scal=rceil)", "unknown field of format 'mxfp4' 'scal' .did you mean 'scale'"),
        ("bf16(roundings=up)", "did you mean 'rounding'"),
        ("mxfp4(name=x)", "unknown field of format 'mxfp4' 'name'"),
        ("fp8_e4m3(signed=false)", "unknown field of format 'fp8_e4m3' 'signed'"),
        ("bf16(scale=rceil)", "unknown field of format 'bf16' 'scale'"),
        ("mxfp4(scale=rcel)", "did you mean 'rceil'"),
        ("nvfp4(scale=torchoa)", "did you mean 'torchao'"),
        ("nvfp4(scale=rceil)", "unknown scale rule of format 'nvfp4' 'rceil'"),
        ("mxfp4(scale_format=fp32)", "unknown scale rule of format 'mxfp4' 'floor'"),
        ("mxfp4(scale_format=fp64)", "unknown scale format of format 'mxfp4' 'fp64'"),
        ("mxfp4(rounding=nearest-evn)", "did you mean 'nearest-even'"),
        ("mxfp4(rounding=stochastic-33)", "unknown rounding 'stochastic-33'"),
        ("mxfp4(overflow=wrap)", "unknown overflow of format 'fp4_e2m1' 'wrap'"),
        ("bf16(subnormals=drop)", "unknown subnormals"),
        ("mxfp4(special=blok)", "did you mean 'block'"),
        ("mxfp4(zero_scale=zero)", "unknown zero_scale"),
        ("fp8_e4m3(specials=ocp)", "unknown specials"),
        ("mxfp4(element=fp4_e2m2)", "did you mean 'fp4_e2m1'"),
        ("mxfp4(=rceil)", "unknown field of format 'mxfp4' ''"),
        ("mxfp4)", "unknown format"),
        ("mxfp4(scale=rceil", "unknown format"),
        ("mxfp4(scale=(rceil))", "unknown format"),
        ("mxfp4(scale=rceil)x", "unknown format"),
        ("mxfp4(scale=rceil)(rounding=up)", "unknown format"),
        ("(scale=rceil)", "unknown format"),
    ],
)
def test_unknown_names_in_a_text_are_told(text: str, message: str) -> None:
    with pytest.raises(UnknownNameError, match=message):
        get(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("mxfp4()", "expected field=value, got ''"),
        ("mxfp4(scale)", "expected field=value, got 'scale'"),
        ("mxfp4(scale=)", "expected field=value"),
        ("mxfp4(scale=rceil,)", "expected field=value, got ''"),
        ("mxfp4(scale=rceil, scale=ceil)", "'scale' is given twice"),
        ("mxfp4(block=3 2)", "block cannot be '3 2'"),
        ("mxfp4(block=32x)", "block cannot be '32x'"),
        ("mxfp4(block=row)", "block cannot be 'row'"),
        ("mxfp4(block=1x2x3)", "block must be"),
        ("mxfp4(block=0)", "block must be"),
        ("mxfp4(block=-32)", "block must be"),
        ("mxfp4(block=0x4)", "block must be"),
        ("mxfp4(block=65537)", "block must be 1..65536 elements"),
        ("mxfp4(block=257x256)", "block must be 1..65536 elements"),
        ("mxfp4(block=axis)", "block = axis needs fp32 scales, got e8m0"),
        ("nvfp4(block=tensor)", "block = tensor needs fp32 scales, got fp8_e4m3"),
        ("mxfp4(element=mxfp4)", "must be an element format, got mxfp4"),
        ("mxfp4(element=e8m0)", "elements need a sign and a zero, e8m0 has not both"),
        ("mxfp4(element=fp8_ue5m3)", "elements need a sign and a zero"),
        ("nvfp4(element=int4)", "elements up to 6 .FP4 E2M1., got int4"),
        ("hif4(block=32)", "HiFloat4 is defined for blocks of 64 of fp4_e1m2"),
        ("hif4(element=fp4_e2m1)", "HiFloat4 is defined for blocks of 64"),
        ("nvfp4(scale_max=256)", "scale_max must be 448, or 256 with a 4over6 rule"),
        ("nvfp4(scale=4over6-mse, scale_max=384)", "scale_max must be"),
        ("nvfp4(scale_max=nan)", "scale_max must be"),
        ("nvfp4(scale_max=big)", "scale_max cannot be 'big'"),
        ("mxfp4(amax_to=6)", "amax_to must be positive and needs fp32 scales"),
        ("int4_g128(amax_to=0)", "amax_to must be positive"),
        ("int4_g128(amax_to=nan)", "amax_to must be positive"),
        ("int4_g128(amax_to=inf)", "amax_to must be positive"),
        ("nvfp4(special=element)", "choices of E8M0 scales only"),
        ("fp8_e4m3_tensor(zero_scale=one)", "choices of E8M0 scales only"),
        ("fp8_e4m3(rounding=hif8-hybrid)", "defined for HiFloat8 only"),
        ("mxfp4(rounding=hif8-hybrid)", "defined for HiFloat8 only"),
        ("fp8_e4m3(overflow=inf)", "no code for Inf; use saturate or nan"),
        ("fp4_e2m1(overflow=nan)", "no code for NaN; use saturate"),
        ("int8(overflow=inf)", "no code for Inf"),
        ("fp8_e4m3(nan=zero)", "has a code for NaN; use keep"),
        ("fp8_e4m3(exponent_bits=9)", "e9m3 is not supported"),
        ("fp8_e4m3(mantissa_bits=-1)", "e4m-1 is not supported"),
        ("fp8_e4m3(mantissa_bits=3.5)", "mantissa_bits cannot be '3.5'"),
        ("fp8_e4m3(exponent_bits=0)", "an integer needs a magnitude bit, a sign and specials = 'none'"),
        ("fp8_e4m3(bias=1000)", "outside of binary32's range"),
        ("fp8_e4m3(bias=-200)", "outside of binary32's range"),
        ("int8(symmetric=yes)", "symmetric cannot be 'yes'"),
        ("fp8_ue5m3(specials=fnuz)", "fnuz"),
        ("hif8(mantissa_bits=2)", "hif8"),
        ("hif8(exponent_bits=4)", "hif8"),
        ("hif8(bias=3)", "hif8"),
    ],
)
def test_values_that_a_field_cannot_have_are_refused(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        get(text)


@pytest.mark.parametrize("what", [None, 8, b"bf16", ["bf16"]])
def test_what_is_no_text_and_no_format_is_refused(what: Any) -> None:
    with pytest.raises(ConfigError, match="expected a format or its name"):
        get(what)


def test_a_format_that_its_text_cannot_tell_is_refused() -> None:
    fp4 = element("fp4_e2m1")
    with pytest.raises(ConfigError, match="'fp4_e2m1' differs from the registered"):
        get(dataclasses.replace(fp4, source="elsewhere"))
    with pytest.raises(ConfigError, match="'mxfp4' differs from the registered"):
        get(dataclasses.replace(formats.ALL["mxfp4"], element=dataclasses.replace(fp4, bias=2)))
    with pytest.raises(ConfigError, match="'mine' is not registered"):
        get(dataclasses.replace(fp4, name="mine"))
    with pytest.raises(ConfigError, match="'mxfp4' is not registered"):
        get(dataclasses.replace(fp4, name="mxfp4"))
    assert get(dataclasses.replace(fp4, rounding="up")) == get("fp4_e2m1(rounding=up)")


@pytest.mark.parametrize(
    "change",
    [
        {"exponent_bits": 0, "signed": False},
        {"exponent_bits": 9},
        {"mantissa_bits": -1},
        {"mantissa_bits": 23},
        {"overflow": "wrap"},
        {"overflow": "inf"},
        {"overflow": "nan"},
        {"specials": "ocp"},
        {"subnormals": "drop"},
        {"nan": "inf"},
        {"rounding": "half-up"},
        {"rounding": "hif8-hybrid"},
        {"bias": 160},
        {"exponent_bits": 1, "mantissa_bits": 0, "specials": "fn"},
    ],
)
def test_element_formats_are_validated(change: dict[str, Any]) -> None:
    with pytest.raises((ConfigError, UnknownNameError), match=r"'mine'|half-up"):
        dataclasses.replace(element("fp4_e2m1"), name="mine", **change)


@pytest.mark.parametrize(
    "change",
    [
        {"block": 0},
        {"block": 65537},
        {"block": 1.5},
        {"block": (16, 16, 16)},
        {"block": "row"},
        {"scale": "flor"},
        {"scale_format": "e8m1"},
        {"scale_format": "fp8_e4m3", "scale": "te", "element": element("fp8_e4m3")},
        {"element": element("e8m0")},
        {"special": "tensor"},
        {"scale_max": 256.0},
        {"amax_to": 6.0},
    ],
)
def test_block_formats_are_validated(change: dict[str, Any]) -> None:
    with pytest.raises((ConfigError, UnknownNameError), match="'mine'"):
        dataclasses.replace(get("mxfp4"), name="mine", **change)


def test_rounding_names() -> None:
    for name in (*formats.ROUNDINGS, "stochastic-1", "stochastic-9", "stochastic-10", "stochastic-32"):
        assert formats.check_rounding(name) == name
    with pytest.raises(UnknownNameError, match="did you mean 'nearest-even'"):
        formats.check_rounding("nearest-evn")
    for name in ("stochastic-0", "stochastic-33", "stochastic-08", "stochastic-", "stochastic-8 ", ""):
        with pytest.raises(UnknownNameError, match="unknown rounding"):
            formats.check_rounding(name)


def test_random_bits_are_those_of_the_rounding() -> None:
    asked = {"mxfp4": 0, "mxfp4(rounding=stochastic)": 32, "bf16(rounding=stochastic-1)": 1, "hif8": 0}
    assert {text: formats.random_bits(get(text)) for text in asked} == asked


def test_another_rounding_changes_the_elements_only() -> None:
    assert formats.with_rounding(get("nvfp4"), "up") == get("nvfp4(rounding=up)")
    assert formats.with_rounding(get("bf16"), "toward-zero") == get("bf16(rounding=toward-zero)")
    assert formats.with_rounding(get("nvfp4"), None) is get("nvfp4")
    with pytest.raises(ConfigError, match="HiFloat8 only"):
        formats.with_rounding(get("nvfp4"), "hif8-hybrid")


# ---- imports --------------------------------------------------------------------------------------------------------


def run(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize("module", ["formats", "errors", "profiles"])
def test_the_nouns_import_neither_torch_nor_numpy(module: str) -> None:
    loaded = run(f"import sys, aqnsim.{module}; print(*sorted(sys.modules))").split()
    assert f"aqnsim.{module}" in loaded
    assert not {"torch", "numpy"} & set(loaded)


def test_importing_the_package_does_not_import_torch() -> None:
    loaded = run("import sys, aqnsim; print(*sorted(sys.modules))").split()
    assert "torch" not in loaded


def test_the_package_adds_less_than_300_ms_to_torch() -> None:
    code = (
        "import time, torch; t = time.process_time(); import aqnsim; aqnsim.cast; aqnsim.emulate;"
        "print(time.process_time() - t)"
    )
    assert min(float(run(code)) for _ in range(5)) < 0.3  # the least: other work on the machine makes it longer
