"""Accumulators of matrix units: texts, bits of the reference and the kernels, independent models, properties."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import math
import os
import subprocess
import sys
from collections.abc import Callable
from fractions import Fraction

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mmaemu.model import chain
from torch import Tensor
from values import bits, random_bits, same_bits

from aqnsim import ConfigError, UnknownNameError, formats, ops, reference
from aqnsim.accumulator import MATRIX_UNITS, ORDERS, ROUNDINGS, Accumulator, get
from aqnsim.backends import cpu
from aqnsim.backends import reference as slow

F32 = npt.NDArray[np.float32]
every_unit = pytest.mark.parametrize("unit", MATRIX_UNITS)
every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
IEEE = get("ieee_fp32")
GEMM = ops.torch.ops.aqnsim.gemm


def normals(*shape: int, seed: int = 0, spread: int = 0) -> F32:
    """Standard normals; with a spread, times powers of two from 2^-spread to 2^spread."""
    rng = np.random.default_rng(seed)
    powers = rng.integers(-spread, spread + 1, shape)
    return np.ldexp(rng.standard_normal(shape).astype(np.float32), powers.astype(np.int32))


def patterns(*shape: int, seed: int) -> F32:
    return random_bits(math.prod(shape), seed).reshape(shape)


# ---- texts ---------------------------------------------------------------------------------------------------------


@every_unit
def test_an_accumulator_is_what_its_text_says(unit: str) -> None:
    accumulator = MATRIX_UNITS[unit].accumulator
    assert get(unit) == get(str(accumulator)) == get(accumulator) == accumulator


def test_a_text_changes_fields_of_a_unit() -> None:
    assert get(" hopper_fp8( promote=128, chunk = 16 ) ") == dataclasses.replace(
        get("hopper_fp8"), promote=128, chunk=16
    )
    assert str(get("volta_fp16(rounding=nearest-even)")) == (
        "accumulator(fraction_bits=23, chunk=4, rounding=nearest-even, min_exponent=-14)"
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("accumulator(chunk=4)", "fraction_bits and chunk must be given"),
        ("accumulator", "fraction_bits and chunk must be given"),
        ("hopper_fp8(promote)", "expected field=value, got 'promote'"),
        ("hopper_fp8(promote=1, promote=2)", "field 'promote' is given twice"),
        ("hopper_fp8(promote=x)", "promote must be an integer, got 'x'"),
        ("hopper_fp8(promote=100)", "promote=100 must be a multiple of chunk=32"),
        ("hopper_fp8(chunk=0)", r"chunk must be an integer in 1..256, got 0"),
        ("hopper_fp8(chunk=257)", r"chunk must be an integer in 1..256, got 257"),
        ("hopper_fp8(fraction_bits=46)", r"fraction_bits must be an integer in 1..45, got 46"),
        ("cdna3_bf16(fraction_bits=39)", r"fraction_bits must be an integer in 1..38, got 39"),
        ("hopper_fp8(result_bits=24)", r"result_bits must be an integer in 1..23, got 24"),
        ("hopper_fp8(min_exponent=-127)", r"min_exponent must be an integer in -126..127"),
        ("hopper_fp8(order=random)", "order must be one of fused, products-first"),
        ("hopper_fp8(rounding=up)", "rounding must be one of truncate, nearest-even"),
        ("hopper_fp8(subnormals=no)", "subnormals must be one of keep, flush"),
        ("cdna1_fp16(fraction_bits=20)", "order=pairwise adds in fp32"),
        ("cdna1_fp16(chunk=3)", "a power of two as chunk"),
    ],
)
def test_what_no_unit_can_be_is_refused(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        get(text)


def test_unknown_names_are_refused_with_the_closest() -> None:
    with pytest.raises(UnknownNameError, match="did you mean 'hopper_fp8'"):
        get("hoper_fp8")
    with pytest.raises(UnknownNameError, match="did you mean 'promote'"):
        get("hopper_fp8(promot=1)")
    with pytest.raises(ConfigError, match="expected an accumulator or its text, got 3"):
        get(3)  # type: ignore[arg-type]


@every_unit
def test_a_unit_names_its_source_and_formats_that_exist(unit: str) -> None:
    assert MATRIX_UNITS[unit].source
    assert all(name in formats.ALL for name in MATRIX_UNITS[unit].formats)


def test_exactly_the_units_with_an_independent_model_are_verified() -> None:
    assert {name for name, unit in MATRIX_UNITS.items() if unit.verified} == set(EMULATED)


# ---- an exact model ------------------------------------------------------------------------------------------------


def power(e: int) -> Fraction:
    return Fraction(2) ** e


def leading(x: Fraction) -> int:
    """floor(log2 |x|)."""
    e = abs(x.numerator).bit_length() - x.denominator.bit_length()
    return e if abs(x) >= power(e) else e - 1


def on_grid(x: Fraction, quantum: Fraction, rounding: str) -> Fraction:
    to_integer: Callable[[Fraction], int] = {"truncate": int, "nearest-even": round, "down": math.floor}[rounding]
    return to_integer(x / quantum) * quantum


def as_float(x: Fraction, fraction_bits: int = 23, rounding: str = "nearest-even", flush: bool = False) -> float:
    if x == 0:
        return 0.0
    held = on_grid(x, power(max(leading(x), -126) - fraction_bits), rounding)
    if abs(held) >= power(128):
        return math.copysign(math.inf, held)
    return 0.0 if flush and abs(held) < power(-126) else float(held)


def ieee(op: str, x: float, y: float, flush: bool = False) -> float:
    if math.isfinite(x) and math.isfinite(y):
        exact = Fraction(x) * Fraction(y) if op == "*" else Fraction(x) + Fraction(y)
        return as_float(exact, flush=flush)
    return x * y if op == "*" else x + y


def modelled_chunk(a: list[float], b: list[float], running: float, unit: Accumulator) -> float:
    flush = unit.subnormals == "flush"
    products = [ieee("*", x, y, flush) for x, y in zip(a, b, strict=True)]
    if unit.order == "pairwise":
        products += [0.0] * (unit.chunk - len(products))
        while len(products) > 1:
            products = [ieee("+", x, y, flush) for x, y in zip(products[::2], products[1::2], strict=True)]
        return ieee("+", running, products[0], flush)
    numbers = [math.isfinite(x) and math.isfinite(y) for x, y in zip(a, b, strict=True)]
    if unit.order != "fused":
        numbers = [n and math.isfinite(p) for n, p in zip(numbers, products, strict=True)]
    if not all(numbers) or not math.isfinite(running):
        return running + sum(p for p, n in zip(products, numbers, strict=True) if not n)
    terms, exponents = [], []
    for x, y in zip(a, b, strict=True):
        exact = Fraction(x) * Fraction(y)
        terms.append(on_grid(exact, power(leading(exact) - 23), "nearest-even") if exact else exact)
        exponents.append(sum(max(leading(Fraction(v)), unit.min_exponent) for v in (x, y)) if exact else -300)
    own = max(leading(Fraction(running)), -126) if running else -126

    def together(places: slice) -> tuple[Fraction, int]:
        largest = max([-300, *exponents[places]])
        quantum = power(largest - unit.fraction_bits)
        return sum((on_grid(t, quantum, unit.rounding) for t in terms[places]), Fraction(0)), largest

    if unit.order == "fused":
        quantum = power(max([own, *exponents]) - unit.fraction_bits)
        total = sum((on_grid(t, quantum, unit.rounding) for t in [*terms, Fraction(running)]), Fraction(0))
    else:
        before = Fraction(running)
        if unit.order == "products-first":
            total, largest = together(slice(None))
        else:
            (even, e0), (odd, e1) = together(slice(0, None, 2)), together(slice(1, None, 2))
            largest = max(e0, e1)
            total = sum(on_grid(t, power(largest - unit.fraction_bits), "down") for t in (even, odd))
            if own < max(largest, own) - 25:
                before = Fraction(0)
        common = max(largest, own)
        total = on_grid(total, power(common - unit.fraction_bits - 7), "down")
        total += on_grid(before, power(common - unit.fraction_bits), "down")
    return as_float(total, unit.result_bits, unit.result_rounding, flush)


def modelled(a: F32, b: F32, unit: Accumulator) -> float:
    """The product of a row and a column."""
    x, y = ([float(v) for v in values] for values in (a, b))
    if unit.subnormals == "flush":
        x, y = ([0.0 if abs(v) < 2.0**unit.min_exponent else v for v in values] for values in (x, y))
    running, total = 0.0, 0.0
    for k in range(0, len(x), unit.chunk):
        running = modelled_chunk(x[k : k + unit.chunk], y[k : k + unit.chunk], running, unit)
        if unit.promote and (k + unit.chunk) % unit.promote == 0:
            total, running = ieee("+", total, running), 0.0
    return ieee("+", total, running)


@st.composite
def accumulators(draw: st.DrawFn) -> Accumulator:
    order = draw(st.sampled_from(ORDERS))
    chunk = draw(st.sampled_from([1, 2, 4, 8] if order == "pairwise" else [1, 2, 3, 4, 8, 15]))
    promote = draw(st.sampled_from([0, chunk, 2 * chunk]))
    subnormals = draw(st.sampled_from(["keep", "flush"]))
    min_exponent = draw(st.sampled_from([-126, -14, 3]))
    if order == "pairwise":
        return dataclasses.replace(IEEE, chunk=chunk, subnormals=subnormals, min_exponent=min_exponent, promote=promote)
    return Accumulator(
        draw(st.integers(1, (51 if order == "fused" else 42) - chunk.bit_length())),
        chunk,
        order,
        draw(st.sampled_from(ROUNDINGS)),
        draw(st.integers(1, 23)),
        draw(st.sampled_from(ROUNDINGS)),
        subnormals,
        min_exponent,
        promote,
    )


def operands(exponents: range) -> st.SearchStrategy[float]:
    """fp32 numbers with few and with many significant bits, of the given exponents, and zeros."""
    significand = st.one_of(st.integers(-15, 15), st.integers(-(2**24) + 1, 2**24 - 1))
    return st.builds(
        lambda s, e: float(np.float32(math.ldexp(s, e - max(abs(s).bit_length(), 1)))),
        significand,
        st.integers(exponents.start, exponents.stop),
    )


NEAR, FAR = operands(range(-6, 6)), operands(range(-140, 126))
ODD = st.sampled_from([math.inf, -math.inf, math.nan, 3.4028234663852886e38, -3.4028234663852886e38, 2.0**-149, 0.0])
any_accumulator = st.one_of(accumulators(), st.sampled_from([u.accumulator for u in MATRIX_UNITS.values()]))
pairs = st.one_of(
    st.lists(st.tuples(NEAR, NEAR), min_size=1, max_size=35),
    st.lists(st.tuples(FAR, FAR), min_size=1, max_size=35),
    st.lists(st.tuples(st.one_of(NEAR, FAR, ODD), st.one_of(NEAR, FAR, ODD)), min_size=1, max_size=35),
)


@settings(max_examples=800, deadline=None)
@given(any_accumulator, pairs)
def test_reference_and_kernels_equal_the_exact_model(unit: Accumulator, values: list[tuple[float, float]]) -> None:
    a, b = np.array(values, np.float32).T
    expected = bits(modelled(a, b, unit))
    assert bits(reference.gemm(a[None], b[:, None], unit)) == expected
    assert bits(cpu.gemm(torch.from_numpy(a[None].copy()), torch.from_numpy(b[:, None].copy()), str(unit))) == expected


# ---- the kernels equal the reference -------------------------------------------------------------------------------

SHAPES = [(1, 1, 1), (3, 5, 7), (65, 70, 66), (2, 256, 3), (64, 33, 64), (130, 17, 1)]


def assert_same_gemm(a: Tensor, b: Tensor, text: str) -> Tensor:
    got = cpu.gemm(a, b, text)
    assert same_bits(got, slow.gemm(a, b, text))
    return got


@every_unit
@every_dtype
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_kernels_equal_the_reference_on_any_shape(unit: str, dtype: torch.dtype, shape: tuple[int, int, int]) -> None:
    m, k, n = shape
    for spread in (0, 10, 120):
        a, b = normals(m, k, seed=1, spread=spread), normals(k, n, seed=2, spread=spread)
        assert_same_gemm(torch.from_numpy(a).to(dtype), torch.from_numpy(b).to(dtype), unit)


@every_unit
@every_dtype
def test_kernels_equal_the_reference_on_all_exponents_infinities_and_nans(unit: str, dtype: torch.dtype) -> None:
    a, b = (torch.from_numpy(patterns(70, 40, seed=s).copy()).to(dtype) for s in (3, 4))
    got = assert_same_gemm(a, b.T, unit)
    assert got.isnan().any()
    got = assert_same_gemm(a[:, :3], b.T[:3], unit)  # short rows: without a NaN in most
    assert got.isinf().any()
    assert got.isfinite().any()


@every_unit
def test_kernels_equal_the_reference_on_subnormals(unit: str) -> None:
    a = normals(33, 70, seed=5)
    b = np.ldexp(normals(70, 65, seed=6), -140)
    text = str(dataclasses.replace(get(unit), min_exponent=-126))
    got = assert_same_gemm(torch.from_numpy(a), torch.from_numpy(b), text)
    kept = get(unit).subnormals == "keep"
    assert bool(((got != 0) & (got.abs() < 2**-126)).any()) == kept


@every_unit
def test_kernels_equal_the_reference_where_sums_cancel(unit: str) -> None:
    half = normals(9, 32, seed=7)
    a = np.concatenate([half, -half], axis=1)
    b = np.concatenate([normals(32, 5, seed=8)] * 2)
    got = assert_same_gemm(torch.from_numpy(a), torch.from_numpy(b), unit)
    assert got.abs().max() < 1e-2


@pytest.mark.parametrize("order", ORDERS[:3])
@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("fraction_bits", [5, 13, 25, 28, 29, 37])
def test_kernels_equal_the_reference_for_every_width_of_sums(order: str, rounding: str, fraction_bits: int) -> None:
    a, b = (torch.from_numpy(normals(20, 100, seed=s, spread=3)) for s in (9, 10))
    for chunk in (1, 7, 16):
        unit = Accumulator(fraction_bits, chunk, order, rounding, result_rounding=rounding)
        assert_same_gemm(a, b.T, str(unit))
        same_sign = Accumulator(fraction_bits, chunk, order, rounding, promote=3 * chunk)
        assert_same_gemm(a.abs(), b.T.abs(), str(same_sign))


def test_bits_depend_neither_on_threads_nor_on_the_batch() -> None:
    a = torch.from_numpy(normals(3, 2, 80, 40, seed=11, spread=4))
    b = torch.from_numpy(normals(3, 2, 40, 90, seed=12, spread=4))
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = cpu.gemm(a, b, "hopper_bf16")
        torch.set_num_threads(2)
        two = cpu.gemm(a, b, "hopper_bf16")
    finally:
        torch.set_num_threads(before)
    assert same_bits(one, two)
    assert same_bits(one, slow.gemm(a, b, "hopper_bf16"))
    parts = torch.cat([cpu.gemm(a[1, 1, i : i + 9], b[1, 1], "hopper_bf16") for i in range(0, 80, 9)])
    assert same_bits(parts, one[1, 1])
    columns = torch.cat([cpu.gemm(a[1, 1], b[1, 1, :, j : j + 25], "hopper_bf16") for j in range(0, 90, 25)], dim=1)
    assert same_bits(columns, one[1, 1])


def test_strided_operands_count_as_their_values() -> None:
    a, b = torch.from_numpy(normals(6, 20, 5)), torch.from_numpy(normals(6, 20, 7))
    assert same_bits(
        cpu.gemm(a.transpose(1, 2), b, "ampere_bf16"),
        cpu.gemm(a.transpose(1, 2).contiguous(), b, "ampere_bf16"),
    )


@pytest.mark.parametrize("shape", [(0, 3, 4), (3, 0, 4), (3, 4, 0)], ids=str)
def test_empty_products(shape: tuple[int, int, int]) -> None:
    m, k, n = shape
    got = assert_same_gemm(torch.ones(m, k), torch.ones(k, n), "hopper_fp8")
    assert got.shape == (m, n)
    assert not got.any()


def digest() -> str:
    """Of products by all units; run in other processes, too."""
    sums = hashlib.sha256()
    for unit in MATRIX_UNITS:
        for seed in range(3):
            a, b = normals(70, 40, seed=seed, spread=60 * seed), normals(40, 70, seed=seed + 9, spread=60 * seed)
            sums.update(bits(cpu.gemm(torch.from_numpy(a), torch.from_numpy(b), unit)).tobytes())
    return sums.hexdigest()


@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512", "avx512bf16"])
def test_every_instruction_set_gives_the_same_bits(isa: str) -> None:
    code = "import test_accumulator; from aqnsim import _core; print(_core.isa(), test_accumulator.digest())"
    env = os.environ | {"AQNSIM_ISA": isa, "PYTHONPATH": os.path.dirname(__file__)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    if f"AQNSIM_ISA={isa} cannot run here" in done.stderr:
        pytest.skip(f"this processor cannot run {isa}")
    assert done.stdout.split() == [isa, digest()], done.stderr


# ---- an emulator of two units --------------------------------------------------------------------------------------

EMULATED = {"ada_fp8": "ada", "hopper_fp8": "hopper"}


@pytest.mark.parametrize("unit", EMULATED)
@pytest.mark.parametrize(("dtype", "min_exponent"), [(torch.float8_e4m3fn, -6), (torch.float8_e5m2, -14)], ids=str)
@pytest.mark.parametrize("kind", ["normals", "small", "numbers", "codes"])
def test_units_equal_an_emulator_that_was_compared_with_hardware(
    unit: str, dtype: torch.dtype, min_exponent: int, kind: str
) -> None:
    rng = np.random.default_rng(13)
    if kind in ("normals", "small"):
        lowest = 0 if kind == "normals" else min_exponent - 2  # half of the small ones are subnormal
        values = np.ldexp(rng.standard_normal((2, 3000, 100)), rng.integers(lowest, lowest + 4, (2, 3000, 100)))
        a, b = torch.from_numpy(values).float().to(dtype)
        b = b if kind == "normals" else torch.from_numpy(values[1] * 2.0**-lowest).float().to(dtype)
    else:
        codes = torch.from_numpy(rng.integers(0, 256, (2, 3000, 100), dtype=np.uint8))
        codes = torch.where(codes.view(dtype).float().isfinite(), codes, 0) if kind == "numbers" else codes[..., :4]
        a, b = codes.view(dtype)
    text = f"{unit}(min_exponent={min_exponent})"
    got = cpu.gemm(a.float()[:, None], b.float()[:, :, None], text)[:, 0, 0]
    assert same_bits(got, chain.dot(a, b, preset=EMULATED[unit]))
    assert (got != (a.double() * b.double()).sum(1).float()).any()
    if kind == "small":
        assert not same_bits(got, cpu.gemm(a.float()[:, None], b.float()[:, :, None], unit)[:, 0, 0])


# ---- known answers and properties ----------------------------------------------------------------------------------


def dot(a: list[float], b: list[float], text: str) -> float:
    return cpu.gemm(torch.tensor([a]), torch.tensor(b)[:, None], text).item()


def test_known_answers() -> None:
    # 13 bits below 1: 2^-13 is kept, 2^-14 is cut off, however often it comes
    assert dot([1.0, 2**-13], [1.0, 1.0], "hopper_fp8") == 1 + 2**-13
    assert dot([1.0] + [2**-14] * 31, [1.0] * 32, "hopper_fp8") == 1
    assert dot([1.0] + [2**-14] * 31, [1.0] * 32, "hopper_bf16") == 1 + 31 * 2**-14
    # the running sum takes part in the alignment: the second chunk is cut by the first one's sum
    assert dot([1.0] + [0.0] * 31 + [2**-14] * 32, [1.0] * 64, "hopper_fp8") == 1
    # 1.5 * 1.5 = 2.25 is aligned by the exponent 0 of its factors, not by its own
    assert dot([1.5, 2**-13], [1.5, 1.0], "hopper_fp8(result_bits=23)") == 2.25 + 2**-13
    # 14 bits of a result: 2.25 + 2^-13 has one too many
    assert dot([1.5, 2**-13], [1.5, 1.0], "hopper_fp8") == 2.25
    # toward zero on either side
    assert dot([1.0, -(2**-14)], [1.0, 1.0], "hopper_fp8") == 1
    assert dot([-1.0, 2**-14], [1.0, 1.0], "hopper_fp8") == -1
    # products first: a sum far below is rounded down, and the result to nearest even
    assert dot([-(2**-31)] * 8 + [1.0], [1.0] * 9, "cdna3_bf16") == 1 - 2**-24
    # smallest exponent of a format: 2^-9 * 1 is aligned as 2^-6, so that 2^-20 is lost
    assert dot([2**-9, 2**-9], [1.0, 2**-11], "hopper_fp8(min_exponent=-6)") == 2**-9
    assert dot([2**-9, 2**-9], [1.0, 2**-11], "hopper_fp8") == 2**-9 + 2**-20


def test_zero_is_positive() -> None:
    for unit in MATRIX_UNITS:
        for a in ([-0.0, -0.0], [1.0, -1.0], [-(2**-149), 0.0]):
            assert bits(dot(a, [2**-20, 2**-20], unit)) == 0


def test_infinities_and_nans_follow_ieee_754() -> None:
    inf, nan = math.inf, math.nan
    for unit in MATRIX_UNITS:
        ones = [1.0] * 40
        at = lambda i, v, a: [*a[:i], v, *a[i + 1 :]]  # noqa: E731
        assert dot(at(33, inf, ones), ones, unit) == inf
        assert dot(at(0, inf, ones), at(0, -1.0, ones), unit) == -inf
        assert math.isnan(dot(at(5, inf, ones), at(5, 0.0, ones), unit))
        assert math.isnan(dot(at(5, nan, ones), at(5, 0.0, ones), unit))
        assert math.isnan(dot(at(39, -inf, at(0, inf, ones)), ones, unit))
        assert dot([2.0**127] * 40, [2.0] * 40, unit) == inf  # beyond the range


def test_beyond_the_range_a_fused_sum_may_come_back() -> None:
    huge = [2.0**127, 2.0**127, -(2.0**127), -(2.0**127), 1.0]
    assert dot(huge, [2.0] * 5, "hopper_bf16") == 0  # exact within a chunk, 1 is cut off
    assert math.isnan(dot(huge, [2.0] * 5, "cdna3_bf16"))  # products have the range of fp32


numbers = st.lists(st.tuples(operands(range(-3, 3)), operands(range(-3, 3))), min_size=1, max_size=15)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(*[st.integers(-(2**11), 2**11)] * 2), min_size=1, max_size=15))
def test_with_enough_bits_one_chunk_is_the_exactly_rounded_dot_product(values: list[tuple[int, int]]) -> None:
    a, b = np.array(values, np.float32).T
    exact = sum((Fraction(x) * Fraction(y) for x, y in values), Fraction(0))
    text = "accumulator(fraction_bits=45, chunk=15, result_rounding=nearest-even)"
    assert dot(a.tolist(), b.tolist(), text) == as_float(exact)


@settings(max_examples=300, deadline=None)
@given(numbers)
def test_one_product_at_a_time_with_many_bits_is_sequential_fp32(values: list[tuple[float, float]]) -> None:
    a, b = np.array(values, np.float32).T
    expected = np.float32(0)
    for x, y in zip(a, b, strict=True):
        expected += x * y
    exact = "accumulator(fraction_bits=48, chunk=1, rounding=nearest-even, result_rounding=nearest-even)"
    assert dot(a.tolist(), b.tolist(), exact) == expected
    assert dot(a.tolist(), b.tolist(), "ieee_fp32") == expected


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(sorted(MATRIX_UNITS)), numbers, st.integers(-20, 20), st.integers(-20, 20))
def test_powers_of_two_scale_results_exactly(unit: str, values: list[tuple[float, float]], i: int, j: int) -> None:
    a, b = np.array(values, np.float32).T
    text = str(dataclasses.replace(get(unit), min_exponent=-126))
    scaled = dot(np.ldexp(a, i).tolist(), np.ldexp(b, j).tolist(), text)
    assert scaled == math.ldexp(dot(a.tolist(), b.tolist(), text), i + j)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(operands(range(-9, 9)), operands(range(-9, 9))), min_size=1, max_size=32), st.randoms())
def test_within_a_chunk_the_order_of_products_does_not_matter(values: list[tuple[float, float]], rng: object) -> None:
    shuffled = list(values)
    rng.shuffle(shuffled)  # type: ignore[attr-defined]
    a, b = np.array(values, np.float32).T
    c, d = np.array(shuffled, np.float32).T
    assert dot(a.tolist(), b.tolist(), "hopper_fp8") == dot(c.tolist(), d.tolist(), "hopper_fp8")


def test_promotion_adds_partial_sums_in_fp32() -> None:
    a, b = torch.from_numpy(normals(5, 300, seed=14)), torch.from_numpy(normals(300, 6, seed=15))
    expected = torch.zeros(5, 6)
    for k in range(0, 300, 128):
        expected += cpu.gemm(a[:, k : k + 128], b[k : k + 128], "hopper_fp8")
    assert same_bits(cpu.gemm(a, b, "hopper_fp8(promote=128)"), expected)


def error(text: str) -> float:
    """Root mean square error against fp64 for fp8 operands, relative to that of the results."""
    a, b = (torch.from_numpy(normals(100, 1024, seed=s)).to(torch.float8_e4m3fn).float() for s in (16, 17))
    exact = a.double() @ b.double().T
    return float((cpu.gemm(a, b.T, text) - exact).square().mean().sqrt() / exact.square().mean().sqrt())


def test_fewer_bits_and_longer_sums_miss_by_more() -> None:
    by_bits = [error(f"hopper_fp8(fraction_bits={n}, result_bits=23)") for n in (9, 11, 13, 15, 17, 19, 21, 23)]
    assert all(coarse > 1.5 * fine for coarse, fine in itertools.pairwise(by_bits))
    assert error("hopper_fp8") > 1.5 * error("hopper_fp8(promote=128)") > 10 * error("blackwell_fp8")
    assert error("hopper_fp8(rounding=nearest-even, result_rounding=nearest-even)") < error("hopper_fp8")


# ---- the op --------------------------------------------------------------------------------------------------------


@every_dtype
@pytest.mark.parametrize("batch", [(), (2,), (2, 3)], ids=str)
def test_opcheck_gemm(dtype: torch.dtype, batch: tuple[int, ...]) -> None:
    a = torch.from_numpy(normals(*batch, 4, 40)).to(dtype)
    b = torch.from_numpy(normals(*batch, 40, 5)).to(dtype)
    torch.library.opcheck(GEMM.default, (a, b, "hopper_fp8"))
    got = GEMM(a, b, "hopper_fp8")
    assert got.dtype == torch.float32
    assert same_bits(got, cpu.gemm(a, b, "hopper_fp8"))


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        (torch.ones(2, 3), torch.ones(4, 2), r"got \[2, 3\] and \[4, 2\]"),
        (torch.ones(3), torch.ones(3, 2), r"got \[3\] and \[3, 2\]"),
        (torch.ones(2, 2, 3), torch.ones(3, 3, 2), "equal batch dimensions"),
        (torch.ones(2, 3), torch.ones(3, 2).bfloat16(), "operands of one dtype"),
        (torch.ones(2, 3).double(), torch.ones(3, 2).double(), "float32 or bfloat16"),
    ],
)
def test_operands_that_do_not_fit_are_refused(a: Tensor, b: Tensor, message: str) -> None:
    for backend in (cpu, slow):
        with pytest.raises(ConfigError, match=message):
            backend.gemm(a, b, "hopper_fp8")
