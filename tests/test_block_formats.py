"""Formats of blocks: scale rules against exact rational arithmetic, special blocks, how blocks lie in a tensor."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import fraction_model as model
import numpy as np
import pytest
from oracles import MODEL, MX_NAMES, MX_RULES, NVFP4_RULES, judged_by
from values import F32, bits

from aqnsim import ConfigError, formats, reference
from aqnsim.formats import BlockFormat, get
from aqnsim.reference import Blocks


def block_format(text: str) -> BlockFormat:
    fmt = get(text)
    assert isinstance(fmt, BlockFormat)
    return fmt


def judged(scale_format: str) -> list[str]:
    """The formats with such scales that the model may judge."""
    return [text for text in judged_by(MODEL) if block_format(text).scale_format == scale_format]


MX, NVFP4 = block_format("mxfp4"), block_format("nvfp4")


# ---- the model over a tensor ----------------------------------------------------------------------------------------


def tiles_of(x: F32, where: list[list[list[int]]]) -> list[model.Tile]:
    flat = model.fractions(x)
    return [[[flat[i] for i in row] for row in tile] for tile in where]


def mx_block(tile: model.Tile, fmt: BlockFormat) -> model.Block:
    if any(v for row in tile for v in row):
        rows = fmt.tile[0] if fmt.tile else 1
        return model.mx(tile, fmt.element.name, fmt.scale, fmt.element.rounding, rows)
    return model.Block(Fraction(1) if fmt.zero_scale == "one" else Fraction(1, 2**127), tile, tile)


def model_blocks(x: F32, fmt: BlockFormat, where: list[list[list[int]]]) -> tuple[list[model.Block], Fraction]:
    """Every block by the model, and the tensor's scale."""
    tiles = tiles_of(x, where)
    if fmt.scale_format == "e8m0":
        return [mx_block(t, fmt) for t in tiles], Fraction(1)
    if fmt.scale_format == "fp32":
        to = None if fmt.amax_to is None else Fraction(fmt.amax_to)
        return [model.fp32_scaled(t, fmt.element.name, fmt.scale, to) for t in tiles], Fraction(1)
    assert fmt.tile is not None
    return model.nvfp4(tiles, fmt.scale, int(fmt.scale_max), rows=fmt.tile[0])


def assert_equals_model(text: str, x: F32, axis: int = -1) -> Blocks:
    """Scales, elements and values of all blocks; zeros have their input's sign where the element has two zeros."""
    fmt = block_format(text)
    got = reference.blocks_of(x, fmt, axis)
    where = model.positions(x.shape, fmt.block, axis)
    expected, tensor_scale = model_blocks(x, fmt, where)
    assert np.array_equal(got.scales.reshape(-1), model.floats(b.scale for b in expected)), text
    assert got.tensor_scale == model.floats([tensor_scale])[0]
    order = [i for tile in where for row in tile for i in row]
    assert sorted(order) == list(range(x.size))
    for part in ("elements", "values"):
        flat = model.floats(v for b in expected for row in getattr(b, part) for v in row)
        assert np.array_equal(getattr(got, part).reshape(-1)[order], flat), (text, part)
        if fmt.element.has_negative_zero:
            assert np.array_equal(np.signbit(getattr(got, part)), np.signbit(x)), (text, part)
    assert np.array_equal(bits(reference.cast(x, fmt, axis)), bits(got.values))
    return got


def blocks(n: int, width: int, seed: int, low: int = -150, high: int = 120) -> F32:
    """Random blocks in which magnitudes, ties, powers of two, zeros of both signs and subnormals all occur."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((n, width)) * np.exp2(rng.integers(low, high, (n, 1)))
    x[: n // 4] *= np.exp2(rng.integers(-12, 1, (n // 4, width)))
    grid = rng.integers(-64, 65, (n // 2, width)) / 8  # multiples of 1/8: full of ties
    x[n // 2 : n // 2 * 2] = grid * np.exp2(rng.integers(low + 10, high - 20, (n // 2, 1)))
    x[rng.random(x.shape) < 0.05] = 0
    x[rng.random(x.shape) < 0.02] = -0.0
    return x.astype(np.float32)


def heavy_tailed(shape: tuple[int, ...], seed: int, exponent: int = 0) -> F32:
    rng = np.random.default_rng(seed)
    return (rng.standard_t(2, shape) * 2.0**exponent).astype(np.float32)


def around(values: list[float]) -> F32:
    """Values and their binary32 neighbours."""
    v = np.float32(values)
    return np.concatenate([v, np.nextafter(v, np.float32(0)), np.nextafter(v, np.float32(np.inf))])


def headed_by(largest: F32, width: int, seed: int) -> F32:
    """Blocks with a given largest magnitude, of either sign, somewhere in them."""
    rng = np.random.default_rng(seed)
    x = rng.uniform(-1, 1, (len(largest), width)) * largest[:, None].astype(np.float64)
    x = x.astype(np.float32)
    x = np.clip(x, -largest[:, None], largest[:, None])
    x[np.arange(len(x)), rng.integers(0, width, len(x))] = largest * rng.choice(np.float32([-1, 1]), len(x))
    return x


# ---- E8M0 scales ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", judged("e8m0"))
def test_mx_equals_exact_rational_arithmetic(text: str) -> None:
    assert_equals_model(text, blocks(80, 32, seed=3))


@pytest.mark.parametrize("text", judged("e8m0"))
def test_mx_scales_of_largest_values_at_which_a_rule_steps(text: str) -> None:
    element = block_format(text).element
    digits = [1.0, 1.5, 1.75, 2 - 2.0**-element.mantissa_bits, 2 - 2.0 ** -(element.mantissa_bits + 1)]
    digits += [element.max / 2.0**element.max_exponent, 2 - 2.0 ** -(element.mantissa_bits + 2)]
    x = headed_by(np.concatenate([around([d * 2.0**e for d in digits]) for e in (-20, 0, 7)]), 32, seed=4)
    assert_equals_model(text, x)


@pytest.mark.parametrize("rounding", ["nearest-away", "nearest-down", "toward-zero", "up", "down"])
@pytest.mark.parametrize("name", ["mxfp4", "mxfp8_e5m2", "mxint8"])
def test_mx_elements_take_their_own_rounding(name: str, rounding: str) -> None:
    assert_equals_model(f"{name}(rounding={rounding})", blocks(40, 32, seed=5, low=-60, high=60))


def test_the_search_for_the_least_error_rounds_its_trials_to_nearest_even() -> None:
    x = blocks(200, 32, seed=6, low=-20, high=20)
    scales = reference.blocks_of(x, block_format("mxfp4(scale=mse)")).scales
    assert np.array_equal(scales, reference.blocks_of(x, block_format("mxfp4(scale=mse, rounding=up)")).scales)
    assert set(np.unique(scales / reference.blocks_of(x, MX).scales)) == {1.0, 2.0}


def test_stochastic_elements_take_the_words_of_their_places() -> None:
    x = heavy_tailed((6, 50), seed=7)
    words = np.random.default_rng(8).integers(0, 1 << 32, x.shape, dtype=np.uint32)
    texts = ["mxfp4(rounding=stochastic-8)", "nvfp4(rounding=stochastic, block=4x8)"]
    for text, axis in itertools.product(texts, [0, 1]):
        fmt = block_format(text)
        got = reference.blocks_of(x, fmt, axis, words)
        flat = model.rounded(got.scaled.ravel(), "fp4_e2m1", fmt.element.rounding, words=words.ravel())
        assert np.array_equal(got.elements.ravel(), flat)
    with pytest.raises(ConfigError, match="needs random words"):
        reference.blocks_of(x, block_format("mxfp4(rounding=stochastic)"))


def first(text: str, value: float) -> tuple[float, float]:
    """The scale of the block ``[value, 1, 0, ...]``, and what becomes of its first value."""
    x = np.zeros(32, np.float32)
    x[:2] = value, 1.0 if 1e-30 < value < 1e30 else 0.0
    got = reference.blocks_of(x, block_format(text))
    return float(got.scales[0]), float(got.values[0])


@pytest.mark.parametrize(
    ("name", "value", "by_rule"),
    [
        ("mxfp4", 7.9999995, {"floor": (1, 6), "ceil": (2, 8), "even": (2, 8), "rceil": (2, 8), "amct": (2, 8)}),
        ("mxfp4", 7.0, {"floor": (1, 6), "ceil": (2, 8), "even": (2, 8), "rceil": (2, 8), "amct": (1, 6)}),
        ("mxfp4", 6.0000005, {"floor": (1, 6), "ceil": (2, 6), "even": (1, 6), "rceil": (2, 6), "amct": (1, 6)}),
        ("mxfp4", 5.0, {"floor": (1, 4), "ceil": (2, 4), "even": (1, 4), "rceil": (1, 4), "amct": (1, 4)}),
        ("mxfp4", 8.0, {"floor": (2, 8), "ceil": (2, 8), "even": (2, 8), "rceil": (2, 8), "amct": (2, 8)}),
        ("mxfp4", 7.96875, {"floor": (1, 6), "ceil": (2, 8), "even": (2, 8), "rceil": (2, 8), "amct": (2, 8)}),
        ("mxfp4", 63.5, {"floor": (8, 48), "ceil": (16, 64), "even": (16, 64), "rceil": (16, 64), "amct": (16, 64)}),
        ("mxfp8_e4m3", 448.00003, {"floor": (1, 448), "ceil": (2, 448), "even": (1, 448), "rceil": (2, 448)}),
        ("mxfp8_e4m3", 480.0, {"floor": (1, 448), "ceil": (2, 480), "even": (1, 448), "rceil": (2, 480)}),
        ("mxfp8_e4m3", 496.0, {"floor": (1, 448), "ceil": (2, 512), "even": (2, 512), "rceil": (2, 512)}),
        ("mxfp8_e4m3", 512.0, {"floor": (2, 512), "ceil": (2, 512), "even": (2, 512), "rceil": (2, 512)}),
        ("mxfp8_e4m3", 450.0, {"floor": (1, 448), "amct": (2, 448)}),
        ("mxint8", 1.9921875, {"floor": (1, 1.984375), "ceil": (2, 2), "even": (2, 2), "rceil": (2, 2)}),
        ("mxfp4", 3e38, {"floor": (2.0**125, 6 * 2.0**125), "ceil": (2.0**126, math.inf)}),
        ("mxfp4", 2.0**-149, {"floor": (2.0**-127, 0.0), "ceil": (2.0**-127, 0.0)}),  # cannot go below 2^-127
        ("mxfp4", 2.0**-127, {"floor": (2.0**-127, 2.0**-127), "rceil": (2.0**-127, 2.0**-127)}),
    ],
)
def test_worked_values_of_the_scale_rules(name: str, value: float, by_rule: dict[str, tuple[float, float]]) -> None:
    assert {rule: first(f"{name}(scale={rule})", value) for rule in by_rule} == by_rule


@pytest.mark.parametrize(
    ("values", "scale"),
    [
        ([5.0, 5.0, 5.0], 1.0),  # 4 by either scale: a tie, to floor's
        ([7.0] * 16, 1.0),  # 6 or 8: a tie, to floor's
        ([7.5] * 16, 2.0),  # 8 rather than 6
        ([6.5] + [0.5] * 15, 1.0),  # the larger scale would lose the small values
        ([4.0] + [0.25] * 31, 0.5),  # 3 for 4, but the small values live
    ],
)
def test_the_least_error_decides_and_ties_go_to_floor(values: list[float], scale: float) -> None:
    x = np.zeros(32, np.float32)
    x[: len(values)] = values
    assert reference.blocks_of(x, block_format("mxfp4(scale=mse)")).scales.tolist() == [scale]


def test_the_log2_trap_holds_for_every_exponent() -> None:
    below = np.nextafter(np.exp2(np.arange(-120, 127, dtype=np.float32)), np.float32(0))
    got = reference.cast(below[:, None], MX)[:, 0]
    assert np.array_equal(got, 6 * np.exp2(np.arange(-121, 126) - 2.0).astype(np.float32))


@pytest.mark.parametrize("rule", MX_RULES)
@pytest.mark.parametrize("name", MX_NAMES)
def test_a_bad_value_makes_its_mx_block_nan_and_no_other(name: str, rule: str) -> None:
    fmt = block_format(f"{name}(scale={rule})")
    clean = reference.cast(np.ones((2, 96), np.float32), fmt)
    for bad in (np.nan, np.inf, -np.inf):
        x = np.ones((2, 96), np.float32)
        x[0, 40] = bad
        got = reference.blocks_of(x, fmt)
        assert np.isnan(got.values[0, 32:64]).all()
        assert np.isnan(got.scales).tolist() == [[False, True, False], [False, False, False]]
        assert np.array_equal(np.delete(got.values, range(32, 64), axis=1), np.delete(clean, range(32, 64), axis=1))
        assert np.array_equal(got.values[1], clean[1])


@pytest.mark.parametrize("rule", MX_RULES)
@pytest.mark.parametrize("name", MX_NAMES)
def test_a_bad_value_may_stay_alone(name: str, rule: str) -> None:
    fmt = block_format(f"{name}(scale={rule}, special=element)")
    x = blocks(40, 32, seed=9, low=-100, high=90)
    bad = np.random.default_rng(10).random(x.shape) < 0.1
    bad[0] = True
    clean = reference.blocks_of(np.where(bad, np.float32(0), x), fmt)
    for value, element in ((np.nan, np.nan), (np.inf, fmt.element.max), (-np.inf, fmt.element.min)):
        got = reference.blocks_of(np.where(bad, np.float32(value), x), fmt)
        assert np.array_equal(got.scales, clean.scales)
        above = np.inf if element > 0 else -np.inf if element < 0 else np.nan
        expected = above if fmt.element.overflow == "inf" else element
        assert np.array_equal(bits(got.elements), bits(np.where(bad, np.float32(expected), clean.elements)))
        kept = ~bad
        assert np.array_equal(got.values[kept], clean.values[kept])


@pytest.mark.parametrize("rule", MX_RULES)
def test_blocks_of_zeros_keep_their_signs_and_have_the_scale_that_is_chosen(rule: str) -> None:
    x = np.zeros(64, np.float32)
    x[1::2] = -0.0
    for choice, scale in (("min", 2.0**-127), ("one", 1.0)):
        got = reference.blocks_of(x, block_format(f"mxfp4(scale={rule}, zero_scale={choice})"))
        assert got.scales.tolist() == [scale, scale]
        assert np.array_equal(bits(got.values), bits(x))
    few = np.float32([[1.0, 0.0], [0.0, 0.0]])
    got = reference.blocks_of(few, block_format(f"mxfp4(scale={rule}, zero_scale=one)"))
    alone = reference.blocks_of(few[0], block_format(f"mxfp4(scale={rule})"))
    assert got.scales.ravel().tolist() == [alone.scales[0], 1.0]


# ---- NVFP4 ----------------------------------------------------------------------------------------------------------


def nvfp4_tensors(seed: int, count: int, spread: int = 40) -> list[F32]:
    """Tensors of 4 x 48: of normal and heavy-tailed values, with tiny blocks, and of ties."""
    rng = np.random.default_rng(seed)
    found = []
    for case in range(count):
        x = rng.standard_normal((4, 48)) * np.exp2(rng.integers(-12, 3, (4, 1)))
        if case % 4 == 1:  # blocks whose scale is a subnormal E4M3 number, or 0
            x[1:] *= np.exp2(rng.integers(-22, -8, (3, 1)))
        if case % 4 == 2:
            x = rng.integers(-24, 25, (4, 48)) / 4
        if case % 4 == 3:
            x = rng.standard_t(2, (4, 48))
            x[1, 16:32] = 0
        x[rng.random(x.shape) < 0.03] = -0.0
        found.append((x * 2.0 ** rng.integers(-spread, spread)).astype(np.float32))
    return found


@pytest.mark.parametrize("text", judged("fp8_e4m3"))
def test_nvfp4_equals_exact_rational_arithmetic(text: str) -> None:
    qutlass = block_format(text).scale == "qutlass"  # it has no scale of the tensor
    for x in nvfp4_tensors(seed=11, count=24, spread=6 if qutlass else 40):
        assert_equals_model(text, x)


@pytest.mark.parametrize("rule", [r for r in NVFP4_RULES if not r.startswith("4over6") and r != "qutlass"])
def test_nvfp4_of_large_and_of_small_tensors(rule: str) -> None:
    smallest = -90 if rule == "torchao" else -110  # its reciprocals overflow earlier
    for x, exponent in itertools.product(nvfp4_tensors(seed=12, count=4, spread=1), (smallest, -70, 90, 110)):
        assert_equals_model(f"nvfp4(scale={rule})", x * np.float32(2.0**exponent))


def test_qutlass_holds_the_largest_value_of_a_block_as_its_scale() -> None:
    largest = around([float(v) for v in formats.element_of(get("fp8_e4m3")).values()[1:]])
    grid = model.element("fp8_e4m3").grid[:-1]
    middles = model.floats(Fraction(a + b, 2 ** (model.UNITS + 1)) for a, b in itertools.pairwise(grid))
    for x in (headed_by(largest, 16, seed=13), headed_by(around(middles.tolist()), 16, seed=14)):
        assert_equals_model("nvfp4(scale=qutlass)", x)


def pair(second: float, tensor: float = 1.0) -> F32:
    """A row of two blocks: ``[tensor, 0, ...]`` and ``[second, 0, ...]``."""
    x = np.zeros(32, np.float32)
    x[0], x[16] = tensor, second
    return x


SMALL = {
    "2^-15": pair(2.0**-15),
    "scale 1.49 * 2^-9": pair(1.49 * 2.0**-9 / 448),
    "scale 0.4 * 2^-9": pair(0.4 * 2.0**-9 / 448),
    "tensor 1e-38": pair(5e-39, tensor=1e-38),
}


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        ("te", [3.05e-5, 4.36e-6, 0.0, 1.57e-42]),
        ("modelopt", [3.05e-5, 4.36e-6, 1.45e-6, 5.0e-39]),
        ("compressed_tensors", [3.05e-5, 4.36e-6, 0.0, 0.0]),
        ("torchao", [3.49e-5, 5.81e-6, 2.9e-6, 5.0e-39]),
    ],
)
def test_nvfp4_of_small_blocks(rule: str, expected: list[float]) -> None:
    fmt = block_format(f"nvfp4(scale={rule})")
    got = [float(reference.cast(x, fmt)[16]) for x in SMALL.values()]
    assert got == pytest.approx(expected, rel=5e-3)


@pytest.mark.parametrize(
    ("rule", "scales", "elements"),
    [
        ("te", [448, 0], [6, 6]),
        ("modelopt", [448, 2.0**-9], [6, 2]),
        ("compressed_tensors", [448, 0.125], [6, 0]),
        ("torchao", [448, 2.0**-6], [6, 0.5]),
        ("4over6-mae", [448, 2.0**-9], [6, 2]),
    ],
)
def test_nvfp4_where_a_scale_would_round_to_zero(rule: str, scales: list[float], elements: list[float]) -> None:
    got = reference.blocks_of(SMALL["scale 0.4 * 2^-9"], block_format(f"nvfp4(scale={rule})"))
    assert got.scales.tolist() == scales
    assert got.elements[[0, 16]].tolist() == elements


@pytest.mark.parametrize("rule", NVFP4_RULES)
def test_nvfp4_of_a_tensor_of_zeros(rule: str) -> None:
    x = np.zeros(32, np.float32)
    x[1::2] = -0.0
    got = reference.blocks_of(x, block_format(f"nvfp4(scale={rule})"))
    if rule in ("torchao", "modelopt"):  # amax / 2688 is 0, and they divide by it
        assert np.isnan(got.values).all()
    else:
        assert np.array_equal(bits(got.values), bits(x))
        assert got.scales.tolist() == [0.125 if rule == "compressed_tensors" else 0.0] * 2


@pytest.mark.parametrize(
    ("rule", "after_inf", "after_nan"),
    [
        ("te", [np.inf, np.nan], [np.nan, np.nan]),
        ("4over6-mae", [np.inf, np.nan], [np.nan, np.nan]),
        ("4over6-mse", [np.inf, np.nan], [np.nan, np.nan]),
        ("torchao", [np.nan, np.nan], [np.nan, np.nan]),
        ("modelopt", [np.nan, np.nan], [np.nan, np.nan]),
        ("compressed_tensors", [np.nan, np.nan], [1.03125, 0.0]),  # its scale of the tensor becomes 1
        ("qutlass", [1.0, 0.0], [1.0, 0.0]),  # it has none
    ],
)
def test_nvfp4_blocks_beside_an_infinity_or_a_nan(rule: str, after_inf: list[float], after_nan: list[float]) -> None:
    fmt = block_format(f"nvfp4(scale={rule})")
    for bad, expected in ((np.inf, after_inf), (-np.inf, after_inf), (np.nan, after_nan)):
        y = reference.cast(pair(1.0, tensor=bad), fmt)
        assert np.array_equal(bits(y[16:18]), bits(np.float32(expected))), bad
        assert not np.isfinite(y[0]) or (rule, bad) in (("qutlass", np.inf), ("qutlass", -np.inf))


def test_4over6_takes_the_scale_of_4_only_where_its_error_is_less() -> None:
    x = heavy_tailed((64, 64), seed=15)
    for error, power in (("mae", 1), ("mse", 2)):
        got = reference.blocks_of(x, block_format(f"nvfp4(scale=4over6-{error})"))
        plain = reference.blocks_of(x, NVFP4)
        share = (got.scales > 1.2 * plain.scales).mean()
        assert 0.1 < share < 0.9
        errors = [(np.abs(np.float64(y) - x) ** power).sum() for y in (got.values, plain.values)]
        assert errors[0] < errors[1]
    six = reference.blocks_of(np.full((1, 16), 3.0, np.float32), block_format("nvfp4(scale=4over6-mse)"))
    assert six.elements.tolist() == [[6.0] * 16], "equal errors go to 6"


def test_the_errors_of_a_tiles_rows_are_added_first_half_to_second_half() -> None:
    x = np.zeros((4, 32), np.float32)
    x[0, 0] = 2688  # a tile that makes the tensor's scale 1
    tiny = 1.5 * 2.0**-26  # lost beside 0.5, but not twice of it
    x[0, 16:18] = 6, 4.5  # off by 0.5 with the scale of 6, which is 1
    x[1, 16:18] = 4, tiny  # off by 0.5 with the scale of 4, which is 1.5
    x[3, 16] = tiny
    got = assert_equals_model("nvfp4(scale=4over6-mae, block=4x16)", x)
    assert got.scales.tolist() == [[448.0, 1.5]]


def test_the_scale_of_4_is_one_and_a_half_times_that_of_6_before_it_is_rounded() -> None:
    grid = model.element("fp8_e4m3").grid[:-1]
    middles = [float(Fraction(a + b, 2 ** (model.UNITS + 1))) for a, b in itertools.pairwise(grid)]
    largest = 4 * around([m for m in middles if m < 400])
    x = np.repeat(0.75 * largest[:, None], 16, axis=1)  # 3 or 4.5
    x[:, 0] = largest
    x = np.concatenate([np.full((1, 16), 2688), x]).astype(np.float32)
    scales = assert_equals_model("nvfp4(scale=4over6-mse)", x).scales.ravel()
    assert (scales[1:] > 1.2 * largest / 6).mean() > 0.9


# ---- fp32 scales ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", judged("fp32"))
def test_fp32_scaled_formats_equal_exact_rational_arithmetic(text: str) -> None:
    for seed, exponent in ((16, 0), (17, -100), (18, 90)):
        x = heavy_tailed((5, 150), seed, exponent)
        x[1, :140] = 0
        x[2] = np.round(x[2] / np.float32(2.0**exponent)) * np.float32(2.0**exponent)
        x[3, ::7] = -0.0
        for axis in (0, 1):
            assert_equals_model(text, x, axis)


@pytest.mark.parametrize("rule", ["amax", "te", "te-pow2"])
def test_fp32_scales_of_tiny_and_of_huge_values(rule: str) -> None:
    for amax in (2.0**-149, 1e-40, 1.3e-36, 1.4e-36, 3e38):
        x = np.float32([amax, -amax / 3, amax / 448, 0.0])
        assert_equals_model(f"fp8_e4m3_tensor(scale={rule})", x)


@pytest.mark.parametrize("rule", ["amax", "te", "te-pow2"])
def test_fp32_scaled_blocks_of_zeros_have_scale_one(rule: str) -> None:
    x = np.zeros((2, 4), np.float32)
    x[0] = [0.0, -0.0, 0.0, -0.0]
    x[1, 0] = 448
    got = reference.blocks_of(x, block_format(f"fp8_e4m3_token(scale={rule})"))
    assert got.scales.tolist() == [[1.0], [1.0]]
    assert np.array_equal(bits(got.values), bits(x))
    assert np.array_equal(reference.cast(x[0], block_format("int8_token")), np.zeros(4))


@pytest.mark.parametrize(
    ("rule", "bad", "expected"),
    [
        ("amax", np.inf, [np.nan, np.nan]),  # inf / inf, and 1 / inf * inf
        ("amax", np.nan, [np.nan, np.nan]),
        ("te", np.inf, [448.0, 1.0]),  # scale 1
        ("te", np.nan, [np.nan, 1.0]),
        ("te-pow2", np.inf, [448.0, 1.0]),
    ],
)
def test_fp32_scaled_blocks_with_an_infinity_or_a_nan(rule: str, bad: float, expected: list[float]) -> None:
    y = reference.cast(np.float32([[bad, 1.0], [2.0, 1.0]]), block_format(f"fp8_e4m3_token(scale={rule})"))
    assert np.array_equal(bits(y[0]), bits(np.float32(expected)))
    assert y[1].tolist() == [2.0, 1.0]


@pytest.mark.parametrize(
    ("text", "x", "scale", "expected"),
    [
        ("int8_token", [127.0, 1.0, -0.5, 63.5], 1.0, [127, 1, 0, 64]),
        ("int4_g128", [7.0, -7.0, 3.5], 1.0, [7, -7, 4]),
        ("int4_g128(amax_to=7.5)", [7.5, -7.5, 3.5], 1.0, [7, -8, 4]),  # both ends of two's complement
        ("int8_token(amax_to=127.5)", [127.5, -127.5], 1.0, [127, -128]),
        ("fp8_e4m3_tensor", [2.0, 1.0], 1 / 224, [2, 1]),
        ("fp8_e4m3_tensor(scale=amax)", [896.0, 2.0], 2.0, [896, 2]),
        ("fp8_e4m3_tensor(scale=te-pow2)", [3.0, 1.0], 2.0**-7, [3, 1]),  # 448 / 3 = 149.3, down to 128
    ],
)
def test_known_answers_of_fp32_scales(text: str, x: list[float], scale: float, expected: list[float]) -> None:
    got = reference.blocks_of(np.float32(x), block_format(text))
    assert got.scales.ravel().tolist() == [np.float32(scale)]
    assert got.values.tolist() == expected


# ---- HiFloat4 -------------------------------------------------------------------------------------------------------


def hif4_blocks(n: int, seed: int) -> F32:
    """Blocks of 64 of many magnitudes, of groups that differ in them, and of ties."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((n, 64)) * np.exp2(rng.integers(-70, 22, (n, 1)))
    x[::3] *= np.repeat(np.exp2(rng.integers(-3, 1, (len(x[::3]), 16))), 4, axis=1)
    x[1::3] = rng.integers(-64, 65, x[1::3].shape) / 8 * np.exp2(rng.integers(-40, 12, (len(x[1::3]), 1)))
    x[rng.random(x.shape) < 0.05] = 0
    return x.astype(np.float32)


def hif4_blocks_at_steps() -> F32:
    """Blocks whose scale, before it is rounded to bfloat16, lies beside a midpoint of UE6M2."""
    seventh = float(model.bfloat16(Fraction(1, 7)))
    middles = [2.0**e * (1 + (2 * k + 1) / 8) for e in (-40, -1, 0, 9) for k in range(4)]
    near = [m / seventh * (1 + d) for m in middles for d in (-(2.0**-9), -(2.0**-11), 0, 2.0**-11, 2.0**-9)]
    return headed_by(np.float32(near), 64, seed=34)


def levels(block: model.HiF4) -> int:
    """The 32 bits of a block's three levels: the scale's code, one bit for each 8 and one for each 4."""
    code = formats.element_of(get("fp8_ue6m2")).encode(float(block.scale))
    ones = sum(bit << (8 + i) for i, bit in enumerate(block.eights))
    return code | ones | sum(bit << (16 + i) for i, bit in enumerate(block.fours))


@pytest.mark.parametrize("bf16", [False, True])
def test_hif4_equals_exact_rational_arithmetic(bf16: bool) -> None:
    x = np.concatenate([hif4_blocks(150, seed=19), hif4_blocks_at_steps()])
    x[0] = 0
    x = reference.to_bf16(x) if bf16 else x
    got = reference.blocks_of(x, block_format("hif4"))
    for i, row in enumerate(x):
        expected = model.hif4(model.fractions(row))
        assert np.array_equal(got.elements[i], model.floats(expected.elements))
        assert np.array_equal(got.values[i], model.floats(expected.values))
        assert got.scales[i].view(np.uint32).tolist() == [levels(expected)]
    assert got.scales.dtype == np.int32
    assert np.array_equal(np.signbit(got.values), x < 0)


def test_hif4_of_the_largest_and_the_smallest_values() -> None:
    x = np.stack([np.full(64, v, np.float32) for v in (3.4028235e38, 2.0**18, 1e-40, 2.0**-46, 0.0)])
    got = reference.blocks_of(x, block_format("hif4"))
    assert got.values[0, 0] == 49152 * 4 * 1.75, "the scale saturates, and the codes do"
    expected = [model.hif4(model.fractions(row)) for row in x]
    assert got.values[:, 0].tolist() == [float(block.values[0]) for block in expected]
    assert got.scales.view(np.uint32).ravel().tolist() == [levels(block) for block in expected]


def test_a_bad_value_makes_its_hif4_block_nan_and_no_other() -> None:
    for bad in (np.nan, np.inf, -np.inf):
        x = hif4_blocks(3, seed=20)
        clean = reference.blocks_of(x, block_format("hif4"))
        x[1, 17] = bad
        got = reference.blocks_of(x, block_format("hif4"))
        assert np.isnan(got.values[1]).all()
        assert got.scales.ravel().tolist() == [clean.scales[0, 0], 0xFF, clean.scales[2, 0]]
        assert np.array_equal(got.values[::2], clean.values[::2])


def test_hif4_of_a_worked_block() -> None:
    x = np.zeros(64, np.float32)
    x[:8] = [7.0, 3.5, 1.75, 0.875, -7.0, 0.1, 0.125, -0.1]
    x[8:12] = [3.5, 1.0, -0.875, 0.25]
    x[60:] = [0.375, -0.625, 0.12, 1.75]
    got = reference.blocks_of(x, block_format("hif4"))
    assert got.scales.view(np.uint32).tolist() == [48 << 2 | 1 << 8 | 0b111 << 16]
    assert got.values[:8].tolist() == [7, 4, 2, 1, -7, 0, 0, 0]
    assert got.values[8:12].tolist() == [3.5, 1.0, -1.0, 0.5]
    assert got.values[60:].tolist() == [0.5, -0.75, 0.0, 1.75]


# ---- how blocks lie in a tensor -------------------------------------------------------------------------------------

LAYOUTS = ["mxfp4", "nvfp4", "fp8_e4m3_1x128", "fp8_e4m3_token", "fp8_e4m3_tensor", "int4_g128(block=5)"]
TILED = [
    "mxfp4(block=4x8)",
    "mxfp8_e4m3(scale=mse, block=3x8)",
    "nvfp4(block=16x16)",
    "nvfp4(scale=4over6-mae, block=5x8)",
    "nvfp4(scale=4over6-mse, block=16x16)",
    "fp8_e4m3_128x128(block=8x4)",
    "int4_g128(block=1x7)",
]


@pytest.mark.parametrize("text", LAYOUTS)
def test_blocks_run_along_any_axis(text: str) -> None:
    x = heavy_tailed((7, 3, 37), seed=21)
    for axis in range(-3, 3):
        got = assert_equals_model(text, x, axis)
        assert got.scales.shape == formats.scale_shape(block_format(text), x.shape, axis)


@pytest.mark.parametrize("text", TILED)
@pytest.mark.parametrize("shape", [(21, 37), (3, 9, 20), (16, 32), (1, 50), (50, 1), (23,)])
def test_tiles_lie_in_the_last_two_axes(text: str, shape: tuple[int, ...]) -> None:
    x = heavy_tailed(shape, seed=22)
    for axis in (-1, -2) if len(shape) > 1 else (-1, 0):
        got = assert_equals_model(text, x, axis)
        rows, columns = block_format(text).tile or (0, 0)
        sizes = list(shape)
        sizes[axis] = -(-sizes[axis] // columns)
        if len(shape) > 1:
            sizes[-3 - axis] = -(-sizes[-3 - axis] // rows)
        assert got.scales.shape == tuple(sizes)


def test_a_tile_turned_is_the_turned_tensor() -> None:
    x = heavy_tailed((40, 24), seed=23)
    fmt = block_format("mxfp4(block=4x8)")
    along, turned = reference.blocks_of(x, fmt, axis=0), reference.blocks_of(x.T.copy(), fmt, axis=1)
    assert np.array_equal(along.values, turned.values.T)
    assert np.array_equal(along.scales, turned.scales.T)
    assert not np.array_equal(along.values, reference.cast(x, fmt, axis=1))


@pytest.mark.parametrize("axis", [0, -3])
def test_tiles_along_another_axis_are_refused(axis: int) -> None:
    with pytest.raises(ConfigError, match="tiles lie in the last two axes"):
        reference.blocks_of(np.ones((4, 4, 4), np.float32), block_format("mxfp4(block=2x2)"), axis)


@pytest.mark.parametrize("text", [*LAYOUTS, *TILED, "hif4"])
@pytest.mark.parametrize("shape", [(0,), (0, 5), (5, 0), (2, 0, 3), (1, 1)])
def test_empty_tensors_stay_empty(text: str, shape: tuple[int, ...]) -> None:
    fmt = block_format(text)
    for axis in (-1, -2) if len(shape) > 1 else (-1,):
        got = reference.blocks_of(np.ones(shape, np.float32), fmt, axis)
        assert got.values.shape == got.elements.shape == got.scaled.shape == shape
        assert got.scales.shape == formats.scale_shape(fmt, shape, axis)
        assert got.values.size == 0 or got.values.tolist() == [[0.9375 if text == "hif4" else 1.0]]


@pytest.mark.parametrize("text", [t for t in (*LAYOUTS, "hif4", "mxfp4(block=4x8)") if "int4" not in t])
def test_a_single_number_is_a_block(text: str) -> None:
    got = reference.blocks_of(np.float32(3.0), block_format(text))
    assert got.values.shape == ()
    assert float(got.values) == pytest.approx(3.0625 if text == "hif4" else 3.0, rel=1e-6)
    assert got.scales.shape == formats.scale_shape(block_format(text), (), -1)


@pytest.mark.parametrize("text", ["mxfp4", "nvfp4", "hif4", "mxfp4(scale=mse)", "nvfp4(scale=4over6-mse)", "int4_g128"])
def test_the_last_block_may_be_short(text: str) -> None:
    fmt = block_format(text)
    assert isinstance(fmt.block, int)
    x = heavy_tailed((3, 2 * fmt.block + 5), seed=24)
    x[:, -5:] *= 10
    padded = np.zeros((3, 3 * fmt.block), np.float32)
    padded[:, : x.shape[1]] = x
    got, full = reference.blocks_of(x, fmt), reference.blocks_of(padded, fmt)
    assert np.array_equal(got.values, full.values[:, : x.shape[1]])
    assert np.array_equal(got.scales, full.scales)


def test_parts_fit_together() -> None:
    x = heavy_tailed((4, 64), seed=25)
    for text in ("mxfp4", "fp8_e4m3_1x128"):
        got = reference.blocks_of(x, block_format(text))
        scales = np.repeat(got.scales, 64 // got.scales.shape[1], axis=1)
        assert np.array_equal(got.values, got.elements * scales)
        assert np.array_equal(got.elements, reference.round_to(got.scaled, block_format(text).element))
        assert got.tensor_scale == 1


# ---- how good the formats are ---------------------------------------------------------------------------------------


def sqnr(x: F32, y: F32) -> float:
    error = np.sum((y.astype(np.float64) - x) ** 2)
    return float(10 * np.log10(np.sum(x.astype(np.float64) ** 2) / error))


@pytest.mark.parametrize("scale", [1, 0.05, 0.02, 0.01, 0.002])
def test_sqnr_of_normal_weights(scale: float) -> None:
    x = (np.random.default_rng(7).standard_normal((512, 512)) * scale).astype(np.float32)
    assert sqnr(x, reference.cast(x, NVFP4)) == pytest.approx(20.44, abs=0.05)
    assert 18.55 <= sqnr(x, reference.cast(x, MX)) <= 18.95


# ---- negative controls: what this suite must be able to tell apart --------------------------------------------------


def mx_by(x: F32, exponent: Callable[[F32], F32], round_half: Callable[[Any], Any]) -> F32:
    """MXFP4 with another rule for the scale or for ties; enough for values without subnormals."""
    amax = np.abs(x).max(axis=-1, keepdims=True)
    scale = np.exp2(exponent(amax) - 2).astype(np.float32)
    v = np.abs(x / scale)
    quantum = np.exp2(np.clip(np.floor(np.log2(np.maximum(v, 2.0**-9))), 0, None) - 1)
    return (np.sign(x) * np.minimum(round_half(v / quantum) * quantum, 6) * scale).astype(np.float32)


def bit_exponent(x: F32) -> F32:
    return (np.frexp(x)[1] - 1).astype(np.float32)


def told_apart(x: F32, wrong: F32, fmt: BlockFormat = MX) -> bool:
    """Whether the model finds a wrong result wrong; it must find the reference's right."""
    where = model.positions(x.shape, fmt.block)
    expected, _ = model_blocks(x, fmt, where)
    flat = model.floats(v for b in expected for row in b.values for v in row)
    order = [i for tile in where for row in tile for i in row]
    assert np.array_equal(reference.cast(x, fmt).reshape(-1)[order], flat)
    return not np.array_equal(wrong.reshape(-1)[order], flat)


def test_the_model_of_the_controls_is_right() -> None:
    x = np.random.default_rng(26).standard_normal((64, 32)).astype(np.float32)
    assert not told_apart(x, mx_by(x, bit_exponent, np.rint))


def test_a_scale_from_log2_is_told_apart() -> None:
    x = np.zeros((1, 32), np.float32)
    x[0, 0] = 7.9999995
    wrong = mx_by(x, lambda a: np.floor(np.log2(a)), np.rint)
    assert wrong[0, 0] == 8.0
    assert told_apart(x, wrong)


def test_ties_away_from_zero_are_told_apart() -> None:
    x = np.float32([[0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5, 6]])
    away = mx_by(x, bit_exponent, lambda v: np.floor(v + 0.5))
    assert away.tolist() == [[0.5, 1, 1.5, 2, 3, 4, 6, 6]]
    assert told_apart(x, away)


def test_a_missing_carry_into_the_exponent_is_told_apart() -> None:
    x = blocks(40, 32, seed=27, low=-20, high=20)
    fmt = block_format("mxfp8_e4m3")
    q = reference.blocks_of(x, fmt)
    grid = np.exp2(np.floor(np.log2(np.maximum(np.abs(q.scaled), 2.0**-6))))  # keeps the binade of what was rounded
    wrong = np.sign(x) * np.minimum(np.abs(q.elements), grid * 1.875) * np.repeat(q.scales, 32, axis=1)
    assert told_apart(x, wrong.astype(np.float32), fmt)


def test_even_without_a_carry_is_told_apart() -> None:
    x = headed_by(around([7.0, 7.5, 6.0]), 32, seed=28)
    assert told_apart(x, reference.cast(x, MX), block_format("mxfp4(scale=even)"))


def test_blocks_that_run_over_the_end_of_a_row_are_told_apart() -> None:
    x = np.random.default_rng(29).standard_normal((4, 40)).astype(np.float32)
    assert told_apart(x, reference.cast(x.reshape(-1), MX).reshape(x.shape))


def test_nvfp4_with_a_division_instead_of_a_reciprocal_is_told_apart() -> None:
    fmt, found = NVFP4, False
    for x in nvfp4_tensors(seed=30, count=12):
        q = reference.blocks_of(x, fmt)
        scale = np.repeat(q.scales, 16, axis=1)
        with np.errstate(all="ignore"):
            exact = x / (scale.astype(np.float64) * float(np.abs(x).max()) / 2688)
        elements = model.rounded(np.nan_to_num(exact.astype(np.float32)).ravel(), "fp4_e2m1").reshape(x.shape)
        found |= told_apart(x, elements * scale * q.tensor_scale, fmt)
    assert found


@pytest.mark.parametrize(("rule", "other"), list(itertools.combinations(NVFP4_RULES, 2)))
def test_every_two_rules_of_nvfp4_differ_somewhere(rule: str, other: str) -> None:
    a, b = (block_format(f"nvfp4(scale={r})") for r in (rule, other))
    tensors = [*nvfp4_tensors(seed=31, count=8), *SMALL.values(), heavy_tailed((64, 128), seed=32)]
    assert any(not np.array_equal(bits(reference.cast(x, a)), bits(reference.cast(x, b))) for x in tensors)


@pytest.mark.parametrize(("rule", "other"), list(itertools.combinations(MX_RULES, 2)))
def test_every_two_rules_of_mx_differ_somewhere(rule: str, other: str) -> None:
    a, b = (block_format(f"mxfp4(scale={r})") for r in (rule, other))
    x = headed_by(around([4.5, 5.0, 6.0, 7.0, 7.5]), 32, seed=33)
    assert not np.array_equal(reference.cast(x, a), reference.cast(x, b))
