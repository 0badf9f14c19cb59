"""The numpy definitions against independent libraries, exact rational arithmetic and known answers."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction

import fraction_model
import gfloat
import numpy as np
import pytest
from gfloat.types import Domain, FormatInfo, RoundMode
from test_formats import ELEMENTS, ORACLES
from values import F32, all_bf16, all_fp16, bits, critical, random_bits

from aqnsim import formats, reference
from aqnsim.formats import BlockFormat, Format

MXFP4 = formats.get("mxfp4")
NVFP4 = formats.get("nvfp4")
INPUTS: dict[str, Callable[[Format], F32]] = {
    "bf16": lambda _: all_bf16(),
    "fp16": lambda _: all_fp16(),
    "critical": critical,
    "random": lambda _: random_bits(100_000, seed=1),
}
every_input = pytest.mark.parametrize("inputs", INPUTS.values(), ids=INPUTS)
every_element = pytest.mark.parametrize("fmt", ELEMENTS, ids=lambda f: f.name)


@every_element
@every_input
def test_rounding_equals_ml_dtypes_in_range(fmt: Format, inputs: Callable[[Format], F32]) -> None:
    x = inputs(fmt)
    with np.errstate(invalid="ignore", over="ignore"):
        expected = x.astype(np.dtype(ORACLES[fmt.name][0])).astype(np.float32)
    # ml_dtypes has no saturating mode, and its FP4 and FP6 have no NaN: beyond the range gfloat alone is the oracle
    limit = fmt.max + (fmt.max - fmt.values()[-2]) / 2
    inside = np.abs(x) < limit
    got = reference.round_to(x, fmt)
    assert inside.sum() > 1000 or len(fmt.values()) < 1000
    assert np.array_equal(bits(got[inside]), bits(expected[inside]))


@every_element
@every_input
def test_rounding_equals_gfloat(fmt: Format, inputs: Callable[[Format], F32]) -> None:
    x = inputs(fmt)
    x = x[~np.isnan(x)]
    expected = gfloat.round_ndarray(
        ORACLES[fmt.name][1], x.astype(np.float64), RoundMode.TiesToEven, sat=fmt.overflow == "saturate"
    )
    assert np.array_equal(bits(reference.round_to(x, fmt)), bits(expected))


@every_element
def test_rounding_keeps_nan_and_the_sign_of_zero(fmt: Format) -> None:
    got = reference.round_to(np.float32([np.nan, 0.0, -0.0, -fmt.min_subnormal / 4]), fmt)
    assert np.array_equal(bits(got), bits([np.nan, 0.0, -0.0, -0.0]))


@every_element
def test_beyond_the_range_is_max_or_inf(fmt: Format) -> None:
    above = np.float32(fmt.max) if fmt.overflow == "saturate" else np.float32(np.inf)
    beyond = np.float32([np.inf, -np.inf, 3.4028235e38])
    assert reference.round_to(beyond, fmt).tolist() == [above, -above, above]


@pytest.mark.parametrize("exponent_bits", range(2, 9))
@pytest.mark.parametrize("mantissa_bits", [0, 1, 2, 3, 6, 10])
def test_parametric_formats_round_as_gfloat(exponent_bits: int, mantissa_bits: int) -> None:
    fmt = formats.get(f"e{exponent_bits}m{mantissa_bits}")
    assert isinstance(fmt, Format)
    info = FormatInfo(
        fmt.name,
        fmt.bits,
        mantissa_bits + 1,
        bias=fmt.bias,
        is_signed=True,
        domain=Domain.Extended,
        has_nz=True,
        num_high_nans=(1 << mantissa_bits) - 1,
        has_subnormals=True,
        is_twos_complement=False,
    )
    x = critical(fmt) if fmt.bits <= 12 else random_bits(20_000, seed=2)
    x = x[~np.isnan(x)]
    expected = gfloat.round_ndarray(info, x.astype(np.float64), RoundMode.TiesToEven)
    assert np.array_equal(bits(reference.round_to(x, fmt)), bits(expected))


# ---- MX -----------------------------------------------------------------------------------------------------------


def blocks(n: int, block: int, seed: int) -> F32:
    """Random blocks in which magnitudes, ties, powers of two, zeros and subnormals all occur."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((n, block)) * np.exp2(rng.integers(-150, 120, (n, 1)))
    x[: n // 4] *= np.exp2(rng.integers(-12, 1, (n // 4, block)))
    grid = rng.integers(-64, 65, (n // 2, block)) / 8  # multiples of 1/8: full of ties
    x[n // 2 : n // 2 * 2] = grid * np.exp2(rng.integers(-140, 100, (n // 2, 1)))
    x[rng.random(x.shape) < 0.05] = 0
    return x.astype(np.float32)


def exact(x: F32) -> list[Fraction]:
    return [Fraction(float(v)) for v in x]


def as_floats(values: list[Fraction]) -> F32:
    """Fractions as fp32, all of them exactly."""
    out = np.array([float(v) for v in values], np.float64)
    assert [Fraction(float(v)) for v in out.astype(np.float32)] == values
    return out.astype(np.float32)


@pytest.mark.parametrize("name", fraction_model.MX)
def test_mx_equals_exact_rational_arithmetic(name: str) -> None:
    x = blocks(240, 32, seed=3)
    got = reference.cast(x, formats.get(name))
    for row, y in zip(x, got, strict=True):
        expected = as_floats(fraction_model.mx_floor(exact(row), name))
        assert np.array_equal(y, expected)  # -0 == 0: a rational has no signed zero
    assert np.array_equal(np.signbit(got), np.signbit(x))


def first(values: list[float], fmt: BlockFormat, width: int = 32) -> float:
    """What becomes of the first value of a block, zeros behind."""
    x = np.zeros(width, np.float32)
    x[: len(values)] = values
    return float(reference.cast(x, fmt)[0])


def test_mxfp4_ties_go_to_even() -> None:
    x = np.float32([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5, 6])
    assert reference.cast(x, MXFP4).tolist() == [0, 1, 1, 2, 2, 4, 4, 6]
    assert reference.cast(-x, MXFP4).tolist() == [0, -1, -1, -2, -2, -4, -4, -6]


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("mxfp4", 7.9999995, 6.0),
        ("mxfp4", 7.96875, 6.0),  # a bf16 value whose bf16 log2 is 3
        ("mxfp4", 63.5, 48.0),
        ("mxfp4", 7.0, 6.0),
        ("mxfp4", 6.0000005, 6.0),
        ("mxfp4", 5.0, 4.0),
        ("mxfp4", 8.0, 8.0),
        ("mxfp8_e4m3", 448.00003, 448.0),
        ("mxfp8_e4m3", 480.0, 448.0),
        ("mxfp8_e4m3", 496.0, 448.0),
        ("mxfp8_e4m3", 512.0, 512.0),
        ("mxfp4", 3e38, 6 * 2.0**125),
        ("mxfp4", 2.0**-149, 0.0),  # the scale cannot go below 2^-127
        ("mxfp4", 2.0**-127, 2.0**-127),
    ],
)
def test_mx_scale_is_the_floor_of_the_exponent_bits(name: str, value: float, expected: float) -> None:
    assert first([value, 1.0 if value < 1e30 and value > 1e-30 else 0.0], formats.get(name)) == expected  # type: ignore[arg-type]


def test_the_log2_trap_holds_for_every_exponent() -> None:
    below = np.nextafter(np.exp2(np.arange(-120, 127, dtype=np.float32)), np.float32(0))
    got = reference.cast(below[:, None], MXFP4)[:, 0]
    assert np.array_equal(got, 6 * np.exp2(np.floor(np.arange(-121, 126)) - 2).astype(np.float32))


@pytest.mark.parametrize("name", [*fraction_model.MX])
def test_a_bad_value_makes_its_mx_block_nan_and_no_other(name: str) -> None:
    for bad in (np.nan, np.inf, -np.inf):
        x = np.ones((2, 96), np.float32)
        x[0, 40] = bad
        y = reference.cast(x, formats.get(name))
        assert np.isnan(y[0, 32:64]).all()
        y[0, 32:64] = 1
        assert np.array_equal(y, np.ones_like(y))


def test_blocks_of_zeros_keep_their_signs() -> None:
    x = np.zeros(64, np.float32)
    x[1::2] = -0.0
    for fmt in (MXFP4, NVFP4):
        assert np.array_equal(bits(reference.cast(x, fmt)), bits(x))
    scales = reference.blocks_of(x, MXFP4).scales
    assert scales.tolist() == [2.0**-127, 2.0**-127]


@pytest.mark.parametrize("fmt", [MXFP4, NVFP4], ids=lambda f: f.name)
def test_the_last_block_may_be_short(fmt: BlockFormat) -> None:
    x = np.random.default_rng(4).standard_normal((3, 2 * fmt.block + 5)).astype(np.float32)
    x[:, -5:] *= 100
    padded = np.zeros((3, 3 * fmt.block), np.float32)
    padded[:, : x.shape[1]] = x
    assert np.array_equal(reference.cast(x, fmt), reference.cast(padded, fmt)[:, : x.shape[1]])


@pytest.mark.parametrize("fmt", [MXFP4, NVFP4], ids=lambda f: f.name)
def test_blocks_run_along_the_axis(fmt: BlockFormat) -> None:
    x = np.random.default_rng(5).standard_normal((40, 3, 70)).astype(np.float32)
    for axis in range(3):
        expected = np.moveaxis(reference.cast(np.moveaxis(x, axis, -1).copy(), fmt), -1, axis)
        for a in (axis, axis - 3):
            assert np.array_equal(reference.cast(x, fmt, axis=a), expected)
    assert not np.array_equal(reference.cast(x, fmt, axis=0), reference.cast(x, fmt, axis=2))


# ---- NVFP4 --------------------------------------------------------------------------------------------------------


def test_nvfp4_equals_exact_rational_arithmetic() -> None:
    rng = np.random.default_rng(6)
    for case in range(40):
        x = rng.standard_normal((4, 48)) * np.exp2(rng.integers(-12, 3, (4, 1)))
        if case % 3 == 1:  # blocks whose scale is a subnormal E4M3 number, or 0
            x[1:] *= np.exp2(rng.integers(-22, -8, (3, 1)))
        if case % 3 == 2:
            x = rng.integers(-24, 25, (4, 48)) / 4
        x = (x * 2.0 ** rng.integers(-90, 90)).astype(np.float32)
        expected = fraction_model.nvfp4([exact(row) for row in x])
        got = reference.cast(x, NVFP4)
        for row, y in zip(expected, got, strict=True):
            assert np.array_equal(y, as_floats(row))


def pair(second: float, tensor: float = 1.0) -> F32:
    """A row of two blocks: ``[tensor, 0, ...]`` and ``[second, 0, ...]``."""
    x = np.zeros(32, np.float32)
    x[0], x[16] = tensor, second
    return x


@pytest.mark.parametrize(
    ("x", "expected"),
    [
        (pair(2.0**-15), 3.05e-5),
        (pair(1.49 * 2.0**-9 / 448), 4.36e-6),
        (pair(0.4 * 2.0**-9 / 448), 0.0),  # the scale rounds to 0
        (pair(5e-39, tensor=1e-38), 1.57e-42),  # S_enc is clamped to the largest fp32
    ],
    ids=["block 2^-15", "subnormal scale", "scale 0", "tensor 1e-38"],
)
def test_nvfp4_of_small_blocks(x: F32, expected: float) -> None:
    y = reference.cast(x, NVFP4)
    assert y[16] == pytest.approx(expected, rel=5e-3)
    assert not np.delete(y, [0, 16]).any()


def test_nvfp4_scale_of_zero_leaves_saturated_codes() -> None:
    parts = reference.blocks_of(pair(0.4 * 2.0**-9 / 448), NVFP4)
    assert parts.scales.tolist() == [448.0, 0.0]
    assert parts.elements[16] == 6.0


def test_nvfp4_of_a_tensor_of_zeros_is_zero() -> None:
    parts = reference.blocks_of(np.zeros(32, np.float32), NVFP4)
    assert not parts.elements.any()
    assert not parts.scales.any()
    assert not reference.cast(np.zeros(32, np.float32), NVFP4).any()


def test_nvfp4_of_infinity_and_nan() -> None:
    x = pair(1.0, tensor=np.inf)
    y = reference.cast(x, NVFP4)
    assert y[16] == np.inf
    assert np.isnan(y[17:]).all()
    assert np.isnan(reference.cast(pair(1.0, tensor=np.nan), NVFP4)).all()


# ---- how good the formats are --------------------------------------------------------------------------------------


def sqnr(x: F32, y: F32) -> float:
    error = np.sum((y.astype(np.float64) - x) ** 2)
    return float(10 * np.log10(np.sum(x.astype(np.float64) ** 2) / error))


@pytest.mark.parametrize("scale", [1, 0.05, 0.02, 0.01, 0.002])
def test_sqnr_of_normal_weights(scale: float) -> None:
    x = (np.random.default_rng(7).standard_normal((512, 512)) * scale).astype(np.float32)
    assert sqnr(x, reference.cast(x, NVFP4)) == pytest.approx(20.44, abs=0.05)
    assert 18.55 <= sqnr(x, reference.cast(x, MXFP4)) <= 18.95


# ---- negative controls: what this suite must be able to tell apart -------------------------------------------------


def mx_by(x: F32, exponent: Callable[[F32], F32], round_half: Callable[[F32], F32]) -> F32:
    """MXFP4 with another rule for the scale or for ties; enough for values without subnormals."""
    amax = np.abs(x).max(axis=-1, keepdims=True)
    scale = np.exp2(exponent(amax) - 2).astype(np.float32)
    v = np.abs(x / scale)
    quantum = np.exp2(np.clip(np.floor(np.log2(np.maximum(v, 2.0**-9))), 0, None) - 1)
    return (np.sign(x) * np.minimum(round_half(v / quantum) * quantum, 6) * scale).astype(np.float32)


def bit_exponent(x: F32) -> F32:
    return (np.frexp(x)[1] - 1).astype(np.float32)


def test_the_model_of_the_controls_is_right() -> None:
    x = np.random.default_rng(8).standard_normal((64, 32)).astype(np.float32)
    assert np.array_equal(mx_by(x, bit_exponent, np.rint), reference.cast(x, MXFP4))


def test_a_scale_from_log2_is_told_apart() -> None:
    x = np.zeros((1, 32), np.float32)
    x[0, 0] = 7.9999995
    wrong = mx_by(x, lambda a: np.floor(np.log2(a)), np.rint)
    assert wrong[0, 0] == 8.0
    assert reference.cast(x, MXFP4)[0, 0] == 6.0


def test_ties_away_from_zero_are_told_apart() -> None:
    x = np.float32([[0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5, 6]])
    away = mx_by(x, bit_exponent, lambda v: np.floor(v + 0.5))
    assert away.tolist() == [[0.5, 1, 1.5, 2, 3, 4, 6, 6]]
    assert not np.array_equal(away, reference.cast(x, MXFP4))


def test_blocks_that_run_over_the_end_of_a_row_are_told_apart() -> None:
    x = np.random.default_rng(9).standard_normal((4, 40)).astype(np.float32)
    flattened = reference.cast(x.reshape(-1), MXFP4).reshape(x.shape)
    assert not np.array_equal(flattened, reference.cast(x, MXFP4))


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
