"""The numpy definitions of the element formats against independent libraries and exact arithmetic; the noise, too.

Formats of blocks have their own files: test_block_formats.py and test_vendors.py.
"""

from __future__ import annotations

import dataclasses
from functools import lru_cache
from typing import Any

import fraction_model
import gfloat
import numpy as np
import pytest
from gfloat.types import RoundMode
from oracles import ORACLES, OVERFLOWS, STOCHASTIC, WIDE_STOCHASTIC, edge, gfloat_round, ieee_info
from test_formats import ELEMENTS, element, every_element
from values import F32, all_bf16, all_fp16, bits, critical, random_bits

from aqnsim import ConfigError, formats, reference
from aqnsim.formats import Format

FEW = 3000  # values whose rounding the model decides one by one


@lru_cache
def inputs(fmt: Format) -> F32:
    """Every bf16 and fp16 value, every value of the format and midpoint with its neighbours, and random bits."""
    return np.concatenate([all_bf16(), all_fp16(), critical(fmt), random_bits(100_000, seed=1)])


@lru_cache
def some_inputs(fmt: Format) -> F32:
    """Random ones of :func:`inputs`, and the same share of values within the format's range."""
    x, rng = inputs(fmt)[~np.isnan(inputs(fmt))], np.random.default_rng(2)
    inside = x[(np.abs(x.astype(np.float64)) <= 1.5 * fmt.max) & (np.abs(x) >= fmt.min_subnormal / 4)]
    return np.concatenate([rng.choice(x, FEW), rng.choice(inside, FEW)])


def words_for(x: F32, seed: int = 3) -> np.ndarray:
    """Random words, the least and the largest among them."""
    words = np.random.default_rng(seed).integers(0, 1 << 32, x.shape, dtype=np.uint32)
    words[::17], words[::19] = 0, 0xFFFFFFFF
    return words


def policies(fmt: Format) -> list[str]:
    return [p for p in OVERFLOWS if p == "saturate" or (p == "inf" and fmt.has_inf) or (p == "nan" and fmt.has_nan)]


def cases(stochastic: bool) -> list[Any]:
    """Every element format and every rounding that an oracle may judge."""
    random = (*STOCHASTIC, *WIDE_STOCHASTIC)
    return [
        pytest.param(fmt, rounding, id=f"{fmt.name}-{rounding}")
        for fmt in ELEMENTS
        for rounding in dict.fromkeys(r for oracle in ORACLES[fmt.name] for r in oracle.roundings)
        if (rounding in random) == stochastic
    ]


def compare_with_oracles(fmt: Format, x: F32, rounding: str, words: np.ndarray | None = None) -> None:
    """Every overflow policy against all oracles, each where it may judge."""
    for overflow in policies(fmt):
        got = bits(reference.round_to(x, changed(fmt, rounding=rounding, overflow=overflow), words))
        for oracle in ORACLES[fmt.name]:
            if oracle.round is None or rounding not in oracle.roundings:
                continue
            judged = oracle.judges(x, overflow, edge(fmt.name))
            assert judged.mean() > 0.3
            expected = oracle.round(x[judged], rounding, overflow, None if words is None else words[judged])
            assert np.array_equal(got[judged], bits(expected)), (oracle.name, overflow)


def changed(fmt: Format, **fields: Any) -> Format:
    return dataclasses.replace(fmt, **fields)


# ---- rounding -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("fmt", "rounding"), cases(stochastic=False))
def test_rounding_equals_all_oracles(fmt: Format, rounding: str) -> None:
    compare_with_oracles(fmt, inputs(fmt) if rounding != "hif8-hybrid" else critical_of_hybrid(), rounding)


@pytest.mark.parametrize(("fmt", "rounding"), cases(stochastic=True))
def test_stochastic_rounding_of_given_words_equals_all_oracles(fmt: Format, rounding: str) -> None:
    x = some_inputs(fmt)
    compare_with_oracles(fmt, x, rounding, words_for(x))


@pytest.mark.parametrize("rounding", ["stochastic-8", "stochastic-29", "stochastic"])
@pytest.mark.parametrize("fmt", [f for f in ELEMENTS if f.name != "hif8"], ids=lambda f: f.name)
def test_stochastic_rounding_of_every_bf16_and_fp16_value_equals_gfloat(fmt: Format, rounding: str) -> None:
    x = np.concatenate([all_bf16(), all_fp16()])
    words = words_for(x)
    oracle = next(o for o in ORACLES[fmt.name] if o.name.startswith("gfloat"))
    for overflow in policies(fmt):
        judged = oracle.judges(x, overflow, edge(fmt.name))
        got = reference.round_to(x, changed(fmt, rounding=rounding, overflow=overflow), words)
        expected = gfloat_round(oracle.info, x[judged], rounding, overflow, words[judged])
        assert np.array_equal(bits(got[judged]), bits(expected)), overflow


SHAPES = [(e, m) for e in range(2, 9) for m in (0, 1, 2, 3, 6, 10) if (e, m) != (8, 0)]  # e8m0 is OCP's scale format


@pytest.mark.parametrize(("exponent_bits", "mantissa_bits"), SHAPES)
def test_parametric_formats_round_as_gfloat_and_the_model(exponent_bits: int, mantissa_bits: int) -> None:
    fmt = element(f"e{exponent_bits}m{mantissa_bits}")
    info, model = ieee_info(exponent_bits, mantissa_bits), fraction_model.ieee(exponent_bits, mantissa_bits)
    x = np.concatenate([critical(fmt)[::11], random_bits(5000, seed=4)])
    known = ~np.isnan(x) | (mantissa_bits > 0)  # without mantissa bits NaN has no code
    for rounding in ("nearest-even", "nearest-away", "toward-zero", "up", "down"):
        got = bits(reference.round_to(x, changed(fmt, rounding=rounding)))
        assert np.array_equal(got[known], bits(gfloat_round(info, x[known], rounding, "inf"))), rounding
        assert np.array_equal(got, bits(fraction_model.rounded(x, model, rounding, overflow="inf"))), rounding


@every_element
def test_rounding_a_value_of_the_format_changes_nothing(fmt: Format) -> None:
    x = np.float32(fmt.values()[:: max(1, fmt.codes >> 12)])
    x = np.concatenate([x, -x[x > 0]]) if fmt.signed else x
    words = words_for(x)
    for rounding in (*formats.ROUNDINGS, "stochastic-8"):
        if rounding != "hif8-hybrid" or fmt.taper:
            got = reference.round_to(x, changed(fmt, rounding=rounding), words)
            assert np.array_equal(bits(got), bits(x)), rounding


def test_stochastic_rounding_without_words_is_refused() -> None:
    with pytest.raises(ConfigError, match="'stochastic-8' of bf16 needs random words"):
        reference.round_to(np.float32([1.0]), element("bf16(rounding=stochastic-8)"))


def test_stochastic_rounding_takes_the_uppermost_bits_of_its_word() -> None:
    x, n = np.full(1 << 16, 1.3, np.float32), np.arange(1 << 16, dtype=np.uint32)
    fine = reference.round_to(x, element("fp4_e2m1(rounding=stochastic-16)"), n << 16)
    assert np.array_equal(fine, reference.round_to(x, element("fp4_e2m1(rounding=stochastic-16)"), n << 16 | 0xFFFF))
    assert (fine == 1.5).mean() == pytest.approx(0.6, abs=2.0**-15)
    coarse = reference.round_to(x, element("fp4_e2m1(rounding=stochastic-1)"), n << 16)
    assert np.array_equal(coarse == 1.5, n >> 15 == 1)


# ---- HiFloat8's hybrid rounding -------------------------------------------------------------------------------------


@lru_cache
def critical_of_hybrid() -> F32:
    """Values of which the two compared parts of the discarded bits are equal, or differ by one; and random ones."""
    rng = np.random.default_rng(5)
    found = []
    for exponent in range(-26, 17):
        width = next((bits for limit, bits in ((3, 3), (7, 2), (15, 1), (22, 0)) if abs(exponent) <= limit), 0)
        drop = 23 - width
        rest = rng.integers(0, 1 << drop, 3000)
        leading = rest >> (drop - 14)
        tied = rest & ~0x3FFF | np.clip(leading[:, None] + [-1, 0, 1], 0, 0x3FFF).T
        parts = np.concatenate([rest, tied.ravel(), [0, 1, (1 << drop) - 1]])
        fraction = parts + (rng.integers(0, 1 << width, parts.shape) << drop)
        found.append((exponent + 127 << 23) + fraction)
    pattern = np.concatenate(found).astype(np.uint32)
    return np.concatenate([pattern.view(np.float32), (pattern | 1 << 31).view(np.float32), critical(element("hif8"))])


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        (0x41F10000, 32.0),  # 30.125, exponent 4: leading 0x2200 >= trailing 0x0000
        (0x41800001, 16.0),  # 0x0000 < 0x0001
        (0x41802001, 16.0),  # 0x0040 < 0x2001
        (0x41810004, 20.0),  # 0x0200 >= 0x0004: up, though the value is much closer to 16
        (0x41800000, 16.0),  # a value of the format
        (0x3F880000, 1.125),  # exponent 0: ties away from zero
        (0x3F87FFFF, 1.0),
        (0x471FFFFF, 32768.0),  # exponent 15: 0x1FFF < 0x3FFF
        (0x471F0000, np.inf),  # 0x1F00 >= 0x0000: up, beyond the range
        (0x47200000, np.inf),  # from 40960 on: ties away from zero
        (0x34000000, 2.0**-22),  # exponent -23: 0x2000 >= 0x0000
        (0x34003FFF, 0.0),  # 0x200F < 0x3FFF
        (0x33FFFFFF, 0.0),
    ],
)
def test_hybrid_rounding_of_known_bits(pattern: int, expected: float) -> None:
    x = np.uint32([pattern, pattern | 1 << 31]).view(np.float32)
    assert reference.round_to(x, element("hif8(rounding=hif8-hybrid)")).tolist() == [expected, -expected]


# ---- policies -------------------------------------------------------------------------------------------------------


@every_element
def test_flushed_subnormals_become_zeros_of_their_sign(fmt: Format) -> None:
    x = inputs(fmt)
    for rounding in ("nearest-even", "nearest-away", "toward-zero", "up", "down"):
        got = reference.round_to(x, changed(fmt, rounding=rounding, subnormals="flush"))
        expected = fraction_model.rounded(x, fmt.name, rounding, overflow=fmt.overflow, subnormals="flush")
        assert np.array_equal(bits(got), bits(expected)), rounding
        kept = reference.round_to(x, changed(fmt, rounding=rounding))
        small = np.abs(kept) < fmt.min_normal
        zero = np.copysign(np.float32(0), kept)
        assert np.array_equal(bits(got), bits(np.where(small, zero if fmt.has_negative_zero else 0, kept))), rounding
        assert small.any() == fmt.has_zero


@every_element
@pytest.mark.parametrize("policy", ["keep", "zero", "max"])
def test_nan_becomes_what_the_policy_says(fmt: Format, policy: str) -> None:
    if fmt.has_nan and policy != "keep":
        with pytest.raises(ConfigError, match="has a code for NaN"):
            changed(fmt, nan=policy)
        return
    x = np.uint32([0x7FC00000, 0xFFC00000, 0x7F800001, 0xFFFFFFFF, 0x3F800000]).view(np.float32)
    nan = {"keep": np.nan, "zero": 0.0, "max": fmt.max}[policy]
    got = reference.round_to(x, changed(fmt, nan=policy))
    assert np.array_equal(bits(got[:4]), bits([nan] * 4))
    assert np.array_equal(bits(got), bits(fraction_model.rounded(x, fmt.name, nan=policy)))


@every_element
def test_zeros_keep_their_sign_where_there_is_a_negative_zero(fmt: Format) -> None:
    tiny = np.float32(2.0**-149)
    got = reference.round_to(np.float32([0.0, -0.0, tiny, -tiny]), changed(fmt, rounding="nearest-even"))
    smallest = 0.0 if fmt.has_zero else fmt.min_normal
    negative = -0.0 if fmt.has_negative_zero else smallest
    assert np.array_equal(bits(got), bits([smallest, negative, smallest, negative if fmt.signed else np.nan]))


@pytest.mark.parametrize("name", ["fp8_ue5m3", "fp8_ue6m2", "e8m0"])
def test_formats_without_a_sign_make_nan_of_negative_values(name: str) -> None:
    x = -np.abs(inputs(element(name)))
    x = x[x < 0]
    for rounding in ("nearest-even", "toward-zero", "up", "down"):
        assert np.isnan(reference.round_to(x, changed(element(name), rounding=rounding))).all()
    assert not np.isnan(reference.round_to(np.float32([0.0, -0.0]), element(name))).any()


@every_element
def test_beyond_the_range_the_overflow_policy_decides(fmt: Format) -> None:
    far = np.float32([3.4028235e38, np.inf])
    for overflow in policies(fmt):
        above = {"saturate": fmt.max, "inf": np.inf, "nan": np.nan}[overflow]
        below = {"saturate": fmt.min, "inf": -np.inf, "nan": np.nan}[overflow] if fmt.signed else np.nan
        for rounding in ("nearest-even", "nearest-away", "nearest-down"):
            got = reference.round_to(far, changed(fmt, rounding=rounding, overflow=overflow))
            assert np.array_equal(bits(got), bits([above, above]))
            got = reference.round_to(-far, changed(fmt, rounding=rounding, overflow=overflow))
            assert np.array_equal(bits(got), bits([below, below]))
        inner = reference.round_to(far, changed(fmt, rounding="toward-zero", overflow=overflow))
        assert np.array_equal(bits(inner), bits([fmt.max, above])), "finite values stay in the range, Inf does not"
        down = reference.round_to(far, changed(fmt, rounding="down", overflow=overflow))
        assert np.array_equal(bits(down), bits([fmt.max, above]))
        up = reference.round_to(far, changed(fmt, rounding="up", overflow=overflow))
        assert np.array_equal(bits(up), bits([above, above]))
        if fmt.signed:
            up = reference.round_to(-far, changed(fmt, rounding="up", overflow=overflow))
            assert np.array_equal(bits(up), bits([fmt.min, below]))


@pytest.mark.parametrize(
    ("name", "last_kept", "first_beyond"),
    [
        ("fp8_e4m3(overflow=nan)", 464.0, np.nan),
        ("fp8_e5m2(overflow=inf)", 61439.996, np.inf),
        ("fp8_e5m2(overflow=nan)", 61439.996, np.nan),
        ("fp16", 65519.996, np.inf),
        ("fp8_e4m3fnuz(overflow=nan)", 247.99998, np.nan),
        ("fp8_e4m3_ieee(overflow=inf)", 247.99998, np.inf),
        ("hif8", 40959.996, np.inf),
        ("hif8(overflow=saturate)", 40959.996, 32768.0),
        ("e8m0(overflow=nan)", 1.5 * 2.0**127, np.nan),
    ],
)
def test_where_overflow_begins(name: str, last_kept: float, first_beyond: float) -> None:
    fmt = element(name)
    kept = np.float32(last_kept)
    beyond = np.nextafter(kept, np.float32(np.inf))
    assert np.array_equal(bits(reference.round_to(np.float32([kept, beyond]), fmt)), bits([fmt.max, first_beyond]))


@pytest.mark.parametrize(
    ("name", "x", "expected"),
    [
        ("fp4_e2m1", [0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5, 7], [0, 1, 1, 2, 2, 4, 4, 6]),
        ("fp4_e2m1(rounding=nearest-away)", [0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5], [0.5, 1, 1.5, 2, 3, 4, 6]),
        ("fp4_e2m1(rounding=nearest-down)", [0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5], [0, 0.5, 1, 1.5, 2, 3, 4]),
        ("e8m0", [1.5, 3.0, 0.75, 6.0, 0.0, 2.0**-140], [2, 2, 0.5, 8, 2.0**-127, 2.0**-127]),
        ("hif8", [1.9375, 36000, 1e6, 1.5 * 2**-23, 2.0**-23, 2.0**-24], [2, 32768, np.inf, 2**-22, 2**-22, 0]),
        ("tf32", [1 + 2**-11, 1 + 2**-12], [1.0009765625, 1.0]),
        ("tf32(rounding=toward-zero)", [1 + 2**-11, 1 + 2**-10 - 2**-23], [1.0, 1.0]),
        ("hf32", [1 + 2**-11, 1 + 2**-12, 1.9999], [1.00048828125, 1.0, 2.0]),
        ("hf32(rounding=nearest-away)", [1 + 2**-12], [1.00048828125]),
        ("hf32(mantissa_bits=10)", [1 + 2**-11], [1.0]),
        ("hf32(mantissa_bits=10, rounding=nearest-away)", [1 + 2**-11], [1.0009765625]),
        ("int4", [-8.5, -9, 7.5, 0.5, 1.5, -0.5], [-8, -8, 7, 0, 2, 0]),
        ("mxint8_element", [1.99, -1.99, -2, 1 / 128, 3 / 128], [127 / 64, -127 / 64, -127 / 64, 0, 2 / 64]),
    ],
)
def test_known_answers(name: str, x: list[float], expected: list[float]) -> None:
    assert reference.round_to(np.float32(x), element(name)).tolist() == np.float32(expected).tolist()


# ---- encoding -------------------------------------------------------------------------------------------------------


@every_element
def test_arrays_are_encoded_as_single_values_are(fmt: Format) -> None:
    codes = np.arange(fmt.codes)
    if fmt.bits > 16:
        codes = np.random.default_rng(6).choice(codes, 50_000)
    values = np.array([fmt.decode(c) for c in codes.tolist()])
    known = ~np.isnan(values) & (values >= fmt.min if fmt.is_integer else True)
    with np.errstate(invalid="ignore"):
        got = reference.encode(values[known].astype(np.float32), fmt)
    assert np.array_equal(got, codes[known])
    if fmt.has_nan:
        assert reference.encode(np.float32([np.nan]), fmt).tolist() == [fmt.encode(float("nan"))]


@pytest.mark.parametrize("name", ["fp4_e2m1", "fp6_e3m2", "fp8_e4m3", "fp8_e5m2", "bf16", "fp16"])
def test_codes_of_rounded_values_are_those_of_gfloat(name: str) -> None:
    fmt, oracle = element(name), ORACLES[name][-2]
    x = inputs(fmt)
    x = x[~np.isnan(x)]
    rounded = gfloat.round_ndarray(oracle.info, x.astype(np.float64), RoundMode.TiesToEven, fmt.overflow == "saturate")
    expected = gfloat.encode_ndarray(oracle.info, rounded)
    assert np.array_equal(reference.encode(reference.round_to(x, fmt), fmt), expected.astype(np.int64))


def test_bfloat16_is_what_torch_makes_of_it() -> None:
    x = inputs(element("bf16"))
    expected = next(o for o in ORACLES["bf16"] if o.name == "torch.bfloat16")
    assert expected.round is not None
    assert np.array_equal(bits(reference.to_bf16(x)), bits(expected.round(x, "nearest-even", "inf", None)))


# ---- Philox and the normal -----------------------------------------------------------------------------------------

PHILOX = [
    ((0,) * 4, (0,) * 2, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "expected"), PHILOX)
def test_philox_known_answers(counter: tuple[int, ...], key: tuple[int, int], expected: tuple[int, ...]) -> None:
    assert reference.philox(np.array(counter, np.uint32), key).tolist() == list(expected)


def test_box_muller_is_the_textbook_formula() -> None:
    words = np.random.default_rng(10).integers(0, 1 << 32, (2, 200_000), dtype=np.uint32)
    edges = np.uint32([0, 1, 2, 0x3FFFFFFF, 0x40000000, 0x80000000, 0xC0000000, 0xFFFFFFFE, 0xFFFFFFFF])
    words = np.concatenate([words, np.stack([edges, edges[::-1]])], axis=1)
    z0, z1 = reference.box_muller(words[0], words[1])
    uniform = ((words[0] >> 1) | 1).astype(np.float32) / 2.0**31
    radius = np.sqrt(-2 * np.log(uniform.astype(np.float64)))
    # quarter turns: the quadrant and a fraction in [-1/2, 1/2)
    angle = np.pi / 2 * ((words[1] >> 30) + (words[1] << np.uint32(2)).view(np.int32) / 2.0**32)
    assert np.abs(z0 - radius * np.cos(angle)).max() < 4e-6
    assert np.abs(z1 - radius * np.sin(angle)).max() < 4e-6
